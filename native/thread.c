/* Threads of ours. Signals are for the interpreter's own threads, but a fault is of who makes it. */
#include <pthread.h>
#include <signal.h>

#include "writer.h"

int start_thread(pthread_t *thread, void *(*run)(void *), void *arg) {
    sigset_t others, before;
    static const int faults[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL};
    sigfillset(&others);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&others, faults[i]);
    pthread_sigmask(SIG_SETMASK, &others, &before);
    int rc = pthread_create(thread, NULL, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -rc;
}

struct errand {
    void (*run)(void *);
    void *arg;
};

static void *run_errand(void *arg) {
    const struct errand *e = arg;
    e->run(e->arg);
    return NULL;
}

/* Calls `run` on a thread of its own and waits for its end, in one call: the interpreter runs no signal handler
 * between its beginning and its end. A negative errno: it was not called. */
int mw_aside(void (*run)(void *), void *arg) {
    struct errand e = {run, arg};
    pthread_t thread;
    int rc = start_thread(&thread, run_errand, &e);
    if (rc == 0) pthread_join(thread, NULL);
    return rc;
}
