/* Committing for those who do not wait: an event loop submits entries, a thread of ours commits them, and an
 * eventfd tells the loop once for all that became certain together. A ticket numbers each submission. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "writer.h"

/* Outcomes wait until they are taken, equal neighbours as one. What is staged ends as a success and a failure
 * at most; so that many stay free when a submission is taken. */
enum { OUTCOMES_FULL = OUTCOMES - 2 };

static void tell(const struct mw_writer *w) {
    if (w->event_fd < 0 || w->taking) return;
    uint64_t one = 1;
    ssize_t n;
    do n = write(w->event_fd, &one, sizeof one); /* a counter: it does not fill up */
    while (n < 0 && errno == EINTR);
}

/* All up to `ticket` that have no outcome yet have this one. */
void complete(struct mw_writer *w, uint64_t ticket, int result) {
    if (ticket <= w->completed_ticket) return;
    w->completed_ticket = ticket;
    struct mw_outcome *last = w->outcome_count > 0 ? &w->outcomes[w->outcome_count - 1] : NULL;
    if (last != NULL && (last->result == result || w->outcome_count == OUTCOMES)) {
        last->ticket = ticket;
        return; /* told before */
    }
    w->outcomes[w->outcome_count++] = (struct mw_outcome){ticket, result, 0};
    if (w->outcome_count == 1) tell(w);
}

static bool has_tickets(const struct mw_writer *w) { return w->staged_ticket > w->completed_ticket; }

/* As mw_append_next, but returns when the entry is staged: its outcome is that of the next ticket, counted from
 * 1 since the start. -EAGAIN: take the outcomes first. BUFFERED entries are certain now, and take no ticket. */
int64_t mw_submit_next(struct mw_writer *w, const char *data, uint64_t bytes, int32_t kind) {
    return mw_submit_many(w, data, &bytes, NULL, 1, 0, kind, 0, MW_NOW);
}

int64_t mw_submit_many(struct mw_writer *w, const char *data, const void *lengths,
                       const uint16_t *kinds, uint64_t count, int64_t first_op, int32_t kind,
                       int64_t timestamp_ns, uint32_t flags) {
    if (w->forked) return MW_E_FORKED;
    if (count == 0) return -EINVAL;
    pthread_mutex_lock(&w->mutex);
    int64_t op = w->outcome_count > OUTCOMES_FULL
                     ? -EAGAIN
                     : stage(w, data, lengths, kinds, count, first_op, kind, timestamp_ns, flags);
    if (op > 0 && w->config.durability == MW_BUFFERED) return finish_append(w, op);
    if (op > 0) w->open->parts[w->open->part_count - 1].ticket = ++w->staged_ticket;
    pthread_mutex_unlock(&w->mutex);
    return op;
}

/* Moves the outcomes to `out`, which has room for MW_OUTCOMES; how many. Then the eventfd may be written again. */
int mw_outcomes(struct mw_writer *w, struct mw_outcome *out) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    int count = (int)w->outcome_count;
    memcpy(out, w->outcomes, w->outcome_count * sizeof *out);
    w->outcome_count = 0;
    pthread_mutex_unlock(&w->mutex);
    return count;
}

/* Whoever leads now, or the thread, commits what was submitted. */
int mw_committer_kick(struct mw_writer *w) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    w->kicked = has_tickets(w);
    if (w->kicked && !w->leading) pthread_cond_signal(&w->kick);
    pthread_mutex_unlock(&w->mutex);
    return 0;
}

/* Commits what was submitted on the thread of who submits, who takes the outcomes next. */
int mw_committer_lead(struct mw_writer *w) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    w->taking = true;
    while (w->leading && has_tickets(w)) pthread_cond_wait(&w->idle, &w->mutex); /* who leads may commit ours */
    int rc = has_tickets(w) ? flush_staged(w) : 0;
    w->taking = false;
    pthread_mutex_unlock(&w->mutex);
    return rc;
}

/* The next leader, when nobody waits who could lead. */
void pass_to_committer(struct mw_writer *w) {
    if (!has_tickets(w)) w->kicked = false;
    if (w->kicked) pthread_cond_signal(&w->kick);
}

static bool shall_commit(const struct mw_writer *w) {
    return w->kicked && has_tickets(w) && !w->epoch_owed && check_usable(w) == 0;
}

static void *run(void *arg) {
    struct mw_writer *w = arg;
    pthread_mutex_lock(&w->mutex);
    while (w->committer_running || shall_commit(w)) {
        if (w->leading || !shall_commit(w)) { /* at the end whoever leads may commit the last, unkicked */
            pthread_cond_wait(w->committer_running ? &w->kick : &w->idle, &w->mutex);
        } else {
            w->kicked = false;
            w->leading = true;
            commit_next(w);
            if (!w->committer_running) w->kicked = true; /* all that is left */
            step_down(w);
        }
    }
    pthread_mutex_unlock(&w->mutex);
    return NULL;
}

/* From now on outcomes are told by `event_fd`. With `threaded` a thread commits when it is kicked; else who
 * submits does, by mw_committer_lead. -EBUSY: somebody has it already. */
int mw_committer_start(struct mw_writer *w, int event_fd, int threaded) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    int rc = check_usable(w);
    if (rc == 0 && (w->event_fd >= 0 || w->committer_ending || has_tickets(w))) rc = -EBUSY;
    if (rc == 0 && threaded) {
        w->committer_running = true;
        rc = start_thread(&w->committer, run, w);
        w->committer_running = rc == 0;
    }
    if (rc == 0) {
        w->event_fd = event_fd;
        w->staged_ticket = w->completed_ticket = 0;
        w->outcome_count = 0;
    }
    pthread_mutex_unlock(&w->mutex);
    return rc;
}

/* Ends the thread, after what was submitted is committed; the eventfd is not written any more. Twice is fine. */
int mw_committer_stop(struct mw_writer *w) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    bool running = w->committer_running;
    w->committer_running = false;
    w->committer_ending |= running; /* until then nobody starts another, whom the join would be for */
    w->event_fd = -1;
    w->kicked = has_tickets(w);
    pthread_cond_signal(&w->kick);
    pthread_mutex_unlock(&w->mutex);
    if (running) {
        pthread_join(w->committer, NULL);
        pthread_mutex_lock(&w->mutex);
        w->committer_ending = false;
        pthread_mutex_unlock(&w->mutex);
    }
    return 0;
}
