/* SIGBUS into -EIO. A load from or a store into a mapping is killed by SIGBUS when the disk fails,
 * the file was cut, or a copy-on-write file system is full. Code that runs under mw_guarded() is
 * left by siglongjmp instead. Outside of it the signal goes to whoever had the handler before. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>

#include "mmapwal.h"

struct guard {
    sigjmp_buf env;
    struct guard *outer;
};

/* initial-exec: the handler must not allocate a thread's TLS block at its first access. */
static _Thread_local struct guard *volatile top __attribute__((tls_model("initial-exec")));
static _Thread_local volatile sig_atomic_t chaining __attribute__((tls_model("initial-exec")));

static pthread_mutex_t install_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction previous;

static void die(void) {
    struct sigaction dfl;
    memset(&dfl, 0, sizeof dfl);
    dfl.sa_handler = SIG_DFL;
    sigaction(SIGBUS, &dfl, NULL);
    raise(SIGBUS);
}

static void on_sigbus(int signo, siginfo_t *info, void *context) {
    struct guard *guard = top;
    if (guard != NULL && info->si_code > 0) { /* the kernel's, not a kill() */
        top = guard->outer;
        siglongjmp(guard->env, 1);
    }
    /* faulthandler restores the handler it found (ours) and raises again: without this a loop. */
    if (chaining) {
        die();
        return;
    }
    chaining = 1;
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signo, info, context);
    } else if (previous.sa_handler == SIG_DFL) {
        die();
    } else if (previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signo);
    } else if (info->si_code > 0) {
        die(); /* an ignored fault would come back for ever */
    }
    chaining = 0;
}

int mw_guard_arm(void) {
    struct sigaction now;
    if (sigaction(SIGBUS, NULL, &now) != 0) return -errno;
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus) return 0;
    int rc = 0;
    pthread_mutex_lock(&install_mutex);
    if (sigaction(SIGBUS, NULL, &now) != 0) {
        rc = -errno;
    } else if (!((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus)) {
        struct sigaction ours;
        memset(&ours, 0, sizeof ours);
        ours.sa_sigaction = on_sigbus;
        ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
        sigemptyset(&ours.sa_mask);
        previous = now;
        if (sigaction(SIGBUS, &ours, NULL) != 0) rc = -errno;
    }
    pthread_mutex_unlock(&install_mutex);
    return rc;
}

int mw_guarded_unarmed(int (*fn)(void *), void *arg) {
    struct guard guard;
    guard.outer = top;
    if (sigsetjmp(guard.env, 0) != 0) return -EIO; /* the handler took this guard down */
    top = &guard;
    __atomic_signal_fence(__ATOMIC_SEQ_CST); /* inlined or not, all of it is between these two */
    int rc = fn(arg);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    top = guard.outer;
    return rc;
}

int mw_guarded(int (*fn)(void *), void *arg) {
    int rc = mw_guard_arm();
    return rc != 0 ? rc : mw_guarded_unarmed(fn, arg);
}

struct copy {
    void *to;
    const void *from;
    uint64_t bytes;
};

static int copy(void *arg) {
    struct copy *c = arg;
    memcpy(c->to, c->from, c->bytes);
    return 0;
}

int mw_copy_guarded(void *to, const void *from, uint64_t bytes) {
    struct copy c = {to, from, bytes};
    return mw_guarded(copy, &c);
}
