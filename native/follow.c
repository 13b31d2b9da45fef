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
int mw_follow_spin(const struct mw_index_header *page, uint32_t seen, int64_t timeout_ns, struct mw_next *next) {
    struct spin s = {page, seen, monotonic_ns() + (uint64_t)timeout_ns};
    int rc = mw_guarded(spin, &s);
    if (rc == 1 && next) mw_take_next(page, next);
    return rc;
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

/* Until the word is another than `seen`, or without a reason; 1 when that was within `soon_ns`, else 0. -ETIMEDOUT.
 * `tells`: the page is mapped writable, and the writer wakes who says that he waits; else nobody does. `next`, or
 * NULL: taken when it wakes. */
int mw_follow_wait(struct mw_index_header *page, uint32_t seen, int64_t timeout_ns, int64_t soon_ns, int tells,
                   struct mw_next *next) {
    struct timespec timeout = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    struct sleep s = {page, seen, tells, &timeout};
    uint64_t began_ns = monotonic_ns();
    int rc = mw_guarded(sleep_on, &s);
    if (rc != 0) return rc;
    int soon = monotonic_ns() - began_ns < (uint64_t)soon_ns;
    if (next) mw_take_next(page, next);
    return soon;
}
