/* Whether a leader waits for company: for those who shared the last commit, so that one sync serves more of them.
 * It pays where they come back sooner than another commit takes; that hangs on the disk, the processors, how many
 * they are and what they do meanwhile. So both ways are tried, some commits each, and the one that served more a
 * second stays until the other is tried again. */
#include "writer.h"

enum {
    COMPANY_MIN = 3,                /* two that take turns lose more by waiting than they gain */
    PAUSE_NS = 20000,               /* nobody new for so long: the others are not about to come */
    SETTLING = 4,                   /* commits that begin a way, and tell of the one before too */
    TRIAL = 24,                     /* commits of each way that are compared */
    STAY_MIN = 64, STAY_MAX = 1024, /* commits between two trials: longer after each one that was in vain */
    STALL = 3,                      /* a commit that took so many times as long as usual says nothing */
    FADE = 32,                      /* commits in which who is gone is forgotten */
};

/* For so many as are about, within a factor of two. */
static struct habit *habit(struct mw_writer *w) {
    uint32_t size = 0;
    for (uint32_t n = (w->about / FADE - 1) / COMPANY_MIN; n > 0 && size < HABITS - 1; n /= 2) size++;
    return &w->habits[size];
}

/* The leader waits until as many have staged as were there at the last commit: at most twice as long as that
 * took, and not when nobody comes for a while. */
void await_company(struct mw_writer *w) {
    if (w->config.durability != MW_SYNC || w->company < COMPANY_MIN || !habit(w)->waits) return;
    uint64_t now = monotonic_ns(), end = now + 2 * w->commit_ns;
    uint32_t here = 0;
    while (check_usable(w) == 0 && now < end && here < w->open->waiter_count && w->open->waiter_count < w->company) {
        here = w->open->waiter_count;
        uint64_t until = end - now < PAUSE_NS ? end : now + PAUSE_NS;
        struct timespec t = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
        pthread_cond_timedwait(&w->joined, &w->mutex, &t);
        now = monotonic_ns();
    }
}

static void begin(struct habit *h, bool waits, uint32_t commits) {
    h->waits = waits;
    h->left = SETTLING + commits;
    h->served = h->ns = 0;
}

/* What has been done for a while served so many a second: the other way is tried, or the better one stays. Who waits
 * has to gain by it. */
static void judge(struct habit *h) {
    uint64_t rate = h->served * 1000000000u / h->ns;
    h->tries = !h->tries;
    if (h->tries) {
        h->before = rate;
        begin(h, !h->waits, TRIAL);
        return;
    }
    uint64_t by_waiting = h->waits ? rate : h->before, at_once = h->waits ? h->before : rate;
    bool waits = by_waiting > at_once + at_once / 32;
    if (waits == h->waits) h->stay = STAY_MIN; /* the trial has shown something */
    else if (h->stay < STAY_MAX) h->stay *= 2;
    begin(h, waits, h->stay);
}

/* A commit served some; with what they took to come, it has lasted since the one before. */
void learn_company(struct mw_writer *w) {
    uint64_t now = monotonic_ns(), ns = now - w->learned_ns;
    uint32_t served = w->served;
    w->learned_ns = now;
    w->served = 0;
    if (w->config.durability != MW_SYNC || w->company < COMPANY_MIN) return;
    w->about -= w->about / FADE;
    if (w->about < w->company * FADE) w->about = w->company * FADE;
    struct habit *h = habit(w);
    if (h->stay == 0) {
        h->stay = STAY_MIN;
        h->usual_ns = ns < STALL * w->commit_ns ? ns : STALL * w->commit_ns;
        begin(h, true, TRIAL);
    }
    bool stalled = ns > STALL * h->usual_ns;
    h->usual_ns = (15 * h->usual_ns + (stalled ? STALL * h->usual_ns : ns)) / 16 + 1;
    if (stalled) return;
    if (--h->left < TRIAL) {
        h->served += served;
        h->ns += ns + 1;
    }
    if (h->left == 0) judge(h);
}
