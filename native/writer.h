/* The writer's state: one owner, one mutex. stage.c fills it, commit.c empties it to the disk, wait.c has those
 * who wait for that, committer.c those who do not; writer.c makes it and changes what lives. Every function
 * here is called with the mutex held; wait_durable() and finish_append() give it back.
 *
 *   written_lsn  handed to the kernel; the tail
 *   durable_lsn  a sync covered all below it
 *   stage_lsn    where the next staged frame will lie: known, since a group that fails takes all
 *                staged behind it along
 *   leading      someone does I/O; nobody else may, and targets, groups in flight and the tail are its own
 */
#ifndef MMAPWAL_WRITER_H
#define MMAPWAL_WRITER_H

#include <pthread.h>

#include "mmapwal.h"

enum { TARGETS = 4, PARTS = TARGETS, OUTCOMES = MW_OUTCOMES };
enum { HABITS = 6 };

struct part {                  /* the frames of a group that lie in one segment */
    uint64_t target;           /* number of the target, counted from the first ever */
    uint64_t ticket;           /* the last one of those staged without waiting; 0: none */
    uint64_t lsn;
    uint64_t from, to;         /* in the group's buffer */
    bool ends;                 /* the last frame is an END */
};

struct waiter {
    struct waiter *next;
    uint64_t end_lsn;
    int result;
    bool done;
};

struct group {
    uint8_t *buffer;
    uint64_t bytes, room;
    struct part parts[PARTS];
    uint32_t part_count, waiter_count;
    struct waiter *waiters;
    uint32_t turn;             /* changes when its waiters are told, or one shall lead */
    uint32_t sleeping;         /* how many may sleep on it, at most: none was woken since */
};

struct habit {                 /* of leaders, where so many are about */
    bool waits;                /* for them, or commits at once */
    bool tries;                /* the other way than before, */
    uint64_t before;           /* which served so many a second */
    uint32_t left;             /* commits until this way is judged */
    uint32_t stay;             /* commits until another trial */
    uint64_t served, ns;       /* this way, lately */
    uint64_t usual_ns;         /* from one commit to the next */
};

struct mw_writer {
    pthread_mutex_t mutex;
    pthread_cond_t idle;       /* the leader stepped down */
    pthread_cond_t wanted;     /* a segment should be prepared */
    pthread_cond_t joined;     /* as many have staged as the leader hopes for */
    struct mw_config config;
    volatile int forked;       /* set in a child before it can touch anything else */
    bool leading, closed, epoch_owed;
    bool lead_given, lead_was_given;    /* to one of those who wait to lead: he is leading already; the last time */
    uint32_t lead_wanted;      /* how many wait for that */
    int poison_stage, poison_errno;

    struct group groups[2];
    struct group *open, *flight;

    struct mw_target targets[TARGETS];  /* number n is at n % TARGETS */
    uint64_t ends[TARGETS];    /* behind the END of a target that was left, as long as its place is free */
    uint64_t tail_target, stage_target, target_end;

    uint64_t written_lsn, durable_lsn, stage_lsn;
    uint32_t epoch, link;

    uint64_t watermark, last_op, first_op, high_op, live;
    uint64_t barrier_first, barrier_last;
    uint8_t *pending;          /* a bit for each slot that a staged entry will take */

    uint32_t company;          /* how many waited at the last commit: served, or staged meanwhile */
    uint32_t about;            /* as many lately, times FADE */
    uint64_t commit_ns;        /* what the last one took */
    uint32_t served;           /* how many were told since the last lesson, and when that was */
    uint64_t learned_ns;
    struct habit habits[HABITS];

    /* committer.c */
    pthread_t committer;
    pthread_cond_t kick;       /* what was submitted shall be committed, and nobody leads */
    bool committer_running, committer_ending, kicked;
    bool taking;               /* the outcomes are about to be taken: no need to tell */
    int event_fd;              /* or -1 */
    uint64_t staged_ticket, completed_ticket;
    struct mw_outcome outcomes[OUTCOMES];
    uint32_t outcome_count;

    uint64_t commits, syncs, entries, bytes;
};

static inline struct mw_target *target_at(struct mw_writer *w, uint64_t number) {
    return &w->targets[number % TARGETS];
}

/* Buffers come from realloc, and frames are 8-byte aligned in them. */
static inline struct mw_frame *frame_at(const struct group *g, uint64_t at) {
    return (struct mw_frame *)(void *)(g->buffer + at);
}

int check_usable(const struct mw_writer *w);
int check_sound(const struct mw_writer *w);
int64_t stage(struct mw_writer *w, const char *data, const void *lengths, const uint16_t *kinds,
              uint64_t count, int64_t op, int32_t kind, int64_t timestamp_ns, uint32_t flags);
int stage_end(struct mw_writer *w);
void align_stage(struct mw_writer *w);
bool segment_wanted(const struct mw_writer *w);

int wait_durable(struct mw_writer *w);
void await_company(struct mw_writer *w);
void learn_company(struct mw_writer *w);
void finish(struct mw_writer *w, struct group *g, uint64_t end_lsn, int result);
void step_down(struct mw_writer *w);

int commit_next(struct mw_writer *w);

int start_thread(pthread_t *thread, void *(*run)(void *), void *arg);
int64_t finish_append(struct mw_writer *w, int64_t op);
void complete(struct mw_writer *w, uint64_t ticket, int result);
void pass_to_committer(struct mw_writer *w);
int flush_staged(struct mw_writer *w);
int lead_to(struct mw_writer *w, uint64_t lsn, bool closing);
void fail_staged(struct mw_writer *w, int error);
void poison(struct mw_writer *w, int stage, int error);

int publish_group(struct mw_writer *w, const uint8_t *from, const uint8_t *to);
int publish_progress(struct mw_writer *w);

#endif
