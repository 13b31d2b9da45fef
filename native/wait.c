/* Waiting for a commit: whoever finds nobody leading leads, the others follow.
 *
 * Followers sleep on a word of their group (futex(2)), and one that was told returns without the mutex: as
 * many threads as a sync serves would otherwise queue for it just when the next group is to be staged. */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "writer.h"

static void sleep_on(uint32_t *word, uint32_t seen) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0); /* whatever it says, who sleeps looks again */
}

/* The word changes first, so nobody who is about to sleep misses it. A leader alone wakes nobody. */
static void wake(struct group *g, int count) {
    if (g->sleeping == 0) return;
    if (count == INT_MAX) g->sleeping = 0;
    __atomic_add_fetch(&g->turn, 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &g->turn, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

/* Tells those whose entries end at or below `end_lsn`. A waiter may be gone as soon as it is told. */
void finish(struct mw_writer *w, struct group *g, uint64_t end_lsn, int result) {
    struct waiter **at = &g->waiters;
    uint32_t told = 0;
    while (*at != NULL) {
        struct waiter *me = *at;
        if (me->end_lsn <= end_lsn) {
            *at = me->next;
            me->result = result;
            __atomic_store_n(&me->done, true, __ATOMIC_RELEASE);
            told++;
        } else {
            at = &me->next;
        }
    }
    if (told == 0) return;
    g->waiter_count -= told;
    w->served += told;
    w->company = told + w->open->waiter_count;
    wake(g, INT_MAX);
}

/* By turns to one who waits to lead for a reason of his own (sync, rotation), and to who has staged meanwhile: among
 * many who append he would hardly ever find nobody leading. */
void step_down(struct mw_writer *w) {
    w->lead_given = w->lead_wanted > 0 && !w->lead_was_given;
    w->lead_was_given = w->lead_given;
    w->leading = w->lead_given;
    if (w->lead_given) {
        pthread_cond_broadcast(&w->idle);
        return;
    }
    if (w->open->waiters != NULL) wake(w->open, 1);
    else pass_to_committer(w);
    pthread_cond_broadcast(&w->idle);
}

/* For a staged entry to be as durable as the journal promises: lead, or follow who leads. Gives the mutex back. */
int wait_durable(struct mw_writer *w) {
    struct group *g = w->open;
    struct waiter me = {.next = g->waiters, .end_lsn = w->stage_lsn};
    g->waiters = &me;
    if (++g->waiter_count == w->company) pthread_cond_signal(&w->joined);
    while (!me.done) {
        if (w->leading) {
            uint32_t seen = g->turn;
            g->sleeping++;
            pthread_mutex_unlock(&w->mutex);
            sleep_on(&g->turn, seen);
            if (__atomic_load_n(&me.done, __ATOMIC_ACQUIRE)) return me.result;
            pthread_mutex_lock(&w->mutex);
        } else {
            w->leading = true;
            await_company(w);
            if (!me.done) commit_next(w); /* tells everyone whose entries it took, me too */
            learn_company(w);
            step_down(w);
        }
    }
    pthread_mutex_unlock(&w->mutex);
    return me.result;
}
