/* Who is about to sleep until something is published, against a publication, at each instruction of it.
 *
 * A child publishes, one instruction at a time; behind the k-th one a follower says that he sleeps and looks at the
 * word, as mw_follow_wait() does. Asleep on the word of before he has to be woken by that publication, asleep on its
 * word by the next one. For every k, with and without somebody else who sleeps already.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "mmapwal.h"

static struct shared {
    _Alignas(4096) struct mw_index_header page;
    long woken;
} *shared;

long __wrap_syscall(long number, void *word, int what, ...);
long __wrap_syscall(long number, void *word, int what, ...) {
    (void)number;
    if (word == &shared->page.wake && what == FUTEX_WAKE) shared->woken++;
    return 0;
}

static void fail(const char *what) {
    perror(what);
    exit(2);
}

static void publish(void) { mw_progress_store(&shared->page, 8192, 8192, 0); }

static int wait_for(pid_t child) {
    int status;
    if (waitpid(child, &status, 0) != child) fail("waitpid");
    return status;
}

/* A child that stands before the publication. */
static pid_t publisher(void) {
    pid_t child = fork();
    if (child < 0) fail("fork");
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0) _exit(3);
        kill(getpid(), SIGSTOP);
        publish();
        _exit(0);
    }
    if (!WIFSTOPPED(wait_for(child))) fail("the child does not stop");
    return child;
}

/* Whether there was a k-th instruction. */
static int try(long k, uint32_t others) {
    memset(shared, 0, sizeof *shared);
    shared->page.waiting = others;
    pid_t child = publisher();
    for (long i = 0; i < k; i++) {
        if (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) != 0) fail("step");
        if (!WIFSTOPPED(wait_for(child))) return 0;
    }
    long woken = shared->woken;
    uint32_t seen = shared->page.wake;
    shared->page.waiting = 1;
    if (ptrace(PTRACE_CONT, child, NULL, NULL) != 0) fail("go on");
    if (wait_for(child) != 0) fail("the child does not end well");
    if (seen == shared->page.wake) {
        woken = shared->woken;
        publish();
    }
    if (shared->woken == woken) {
        printf("asleep on word %u behind instruction %ld, others %u: nobody wakes\n", seen, k, others);
        exit(1);
    }
    return 1;
}

int main(void) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) fail("mmap");
    publish(); /* the choice of the fastest checksum is made */
    long tried = 0;
    for (uint32_t others = 0; others <= 1; others++)
        for (long k = 0; try(k, others); k++) tried++;
    printf("%ld\n", tried);
    return tried > 100 ? 0 : 4;
}
