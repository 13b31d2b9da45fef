/* Followers: readers, of this process or another, that take the frames in the order in which they became
 * durable. They sleep on a word of the index page (futex(2)), which counts publications. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "mmapwal.h"

/* A new word. Whoever is about to sleep says so first and looks at the word again then, so either the flag is seen
 * here or the new word there. The flag is taken back before the word changes: behind it, it may be of one who
 * sleeps on the new word. Nobody waits: no system call. */
void mw_followers_wake(struct mw_index_header *page, uint32_t word) {
    uint32_t waited = __atomic_load_n(&page->waiting, __ATOMIC_RELAXED);
    if (waited) __atomic_store_n(&page->waiting, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&page->wake, word, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!waited && __atomic_load_n(&page->waiting, __ATOMIC_RELAXED) == 0) return;
    syscall(SYS_futex, &page->wake, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* The followers of this mapping, and of others of the file, look around; nothing was published. */
void mw_follow_stir(struct mw_index_header *page) {
    syscall(SYS_futex, &page->wake, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

struct look {
    const struct mw_index_header *page;
    uint32_t wake;
    uint64_t sequence;
};

static int look(void *arg) {
    struct look *l = arg;
    l->wake = __atomic_load_n(&l->page->wake, __ATOMIC_ACQUIRE);
    return 0;
}

/* How often something was published: before the look at what. */
int mw_follow_word(const struct mw_index_header *page, uint32_t *wake) {
    struct look l = {page, 0, 0};
    int rc = mw_guarded(look, &l);
    *wake = l.wake;
    return rc;
}

static int look_at_sequence(void *arg) {
    struct look *l = arg;
    l->sequence = __atomic_load_n(&l->page->superblock_sequence, __ATOMIC_ACQUIRE);
    return 0;
}

/* Of the superblock; behind the look at the progress it is no older than that. */
int mw_follow_sequence(const struct mw_index_header *page, uint64_t *sequence) {
    struct look l = {page, 0, 0};
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    int rc = mw_guarded(look_at_sequence, &l);
    *sequence = l.sequence;
    return rc;
}

struct spin {
    const struct mw_index_header *page;
    uint32_t seen;
    uint64_t until_ns;
};

enum { LOOKS = 64 }; /* between two looks at the clock */

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int spin(void *arg) {
    const struct spin *s = arg;
    do {
        for (int i = 0; i < LOOKS; i++) {
            if (__atomic_load_n(&s->page->wake, __ATOMIC_ACQUIRE) != s->seen) return 1;
            relax();
        }
        sched_yield(); /* the processor may be the one that the writer needs */
    } while (monotonic_ns() < s->until_ns);
    return 0;
}

/* As mw_follow_wait, but without sleeping, so that the writer need not wake: 1 when the word is another, else 0. */
int mw_follow_spin(const struct mw_index_header *page, uint32_t seen, int64_t timeout_ns) {
    struct spin s = {page, seen, monotonic_ns() + (uint64_t)timeout_ns};
    return mw_guarded(spin, &s);
}

struct sleep {
    struct mw_index_header *page;
    uint32_t seen;
    int tells;
    const struct timespec *timeout;
};

static int sleep_on(void *arg) {
    struct sleep *s = arg;
    if (s->tells) __atomic_store_n(&s->page->waiting, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&s->page->wake, __ATOMIC_SEQ_CST) != s->seen) return 0;
    long rc = syscall(SYS_futex, &s->page->wake, FUTEX_WAIT, s->seen, s->timeout, NULL, 0);
    return rc == 0 || errno == EAGAIN || errno == EINTR ? 0 : -errno;
}

/* Until the word is another than `seen`; also wakes without a reason. -ETIMEDOUT. `tells`: the page is mapped
 * writable, and the writer wakes who says that he waits; else nobody does. */
int mw_follow_wait(struct mw_index_header *page, uint32_t seen, int64_t timeout_ns, int tells) {
    struct timespec timeout = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    struct sleep s = {page, seen, tells, &timeout};
    return mw_guarded(sleep_on, &s);
}

struct walk {
    struct mw_walk *walk;
    struct mw_columns *out;
    uint64_t max;
    volatile uint64_t count;
};

static void put(struct mw_walk *s, struct mw_columns *out, uint64_t row, const struct mw_frame *f) {
    uint64_t start = MW_PAGE_BYTES + (s->lsn - s->base_lsn) + MW_FRAME_BYTES;
    if (row == 0) s->stride = mw_frame_bytes(f->length);
    else if (start - out->start[row - 1] != s->stride || f->length != out->end[0] - out->start[0]) s->stride = 0;
    if (f->op > s->highest_op) s->highest_op = f->op;
    out->op[row] = f->op;
    out->start[row] = start;
    out->end[row] = start + f->length;
    out->lsn[row] = s->lsn;
    out->timestamp_ns[row] = f->timestamp_ns;
    out->segment[row] = s->segment;
    out->checksum[row] = f->payload_crc;
    out->kind[row] = f->kind;
}

/* A segment that is walked again may be older than what is in the slot. */
static void take_over(struct mw_slot *slot, const struct mw_frame *f) {
    if (slot->lsn < f->lsn) mw_slot_store(slot, f);
}

static int walk(void *arg) {
    struct walk *w = arg;
    struct mw_walk *s = w->walk;
    uint64_t end = s->base_lsn + s->capacity;
    s->stop = MW_WALK_LIMIT;
    s->stride = s->highest_op = 0;
    while (s->lsn < s->limit_lsn && s->lsn < end) {
        const uint8_t *at = s->frames + (s->lsn - s->base_lsn);
        struct mw_frame f;
        s->op = 0;
        if (end - s->lsn < MW_FRAME_BYTES) return MW_E_CORRUPT;
        memcpy(&f, at, sizeof f);
        uint64_t bytes = mw_frame_bytes(f.length);
        if (f.header_crc != mw_frame_crc(&f, s->salt) || f.lsn != s->lsn || bytes > end - s->lsn)
            return MW_E_CORRUPT;
        s->op = f.op;
        bool wanted = f.type == MW_ENTRY && f.op >= s->from_op &&
                      !mw_frame_hidden(s->removals, s->removal_count, f.op, f.lsn);
        bool stale = wanted && f.op <= s->watermark;
        if (stale && s->slots == NULL) s->stop = MW_WALK_STALE;
        if (wanted && s->slots == NULL && w->count == w->max) s->stop = MW_WALK_FULL;
        if (f.type == MW_GAP && !s->past_gaps) s->stop = MW_WALK_GAP;
        s->behind_lsn = s->lsn + bytes;
        if (f.type == MW_END) s->stop = MW_WALK_END;
        if (s->stop != MW_WALK_LIMIT) return 0;
        if (wanted) {
            if (mw_crc32c(0, at + MW_FRAME_BYTES, f.length) != f.payload_crc) return MW_E_CORRUPT;
            if (s->slots == NULL) put(s, w->out, w->count, &f);
            else if (!stale) take_over(&s->slots[f.op % s->slot_count], &f);
            w->count++;
        }
        s->lsn += bytes;
    }
    return 0;
}

/* The entries from walk->lsn on, one a row: how many. Where walk->failed, walk->lsn says at which place. */
int64_t mw_walk(struct mw_walk *s, struct mw_columns *out, uint64_t max) {
    if (s->lsn < s->base_lsn || s->lsn % MW_ALIGN != s->base_lsn % MW_ALIGN) return -EINVAL;
    struct walk w = {s, out, max, 0};
    s->failed = mw_guarded(walk, &w);
    return (int64_t)w.count;
}
