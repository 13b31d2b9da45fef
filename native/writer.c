/* The writer as Python sees it: made, told of segments, epochs and removals, asked, closed. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "writer.h"

struct mw_writer *mw_writer_new(const struct mw_config *config) {
    if (mw_guard_arm() != 0) return NULL;
    struct mw_writer *w = calloc(1, sizeof *w);
    if (w == NULL) return NULL;
    w->config = *config;
    w->pending = calloc(config->slot_count / 8 + 1, 1);
    if (w->pending == NULL) {
        free(w);
        return NULL;
    }
    pthread_mutexattr_t brief; /* held for microseconds: to sleep and be woken would take longer */
    pthread_mutexattr_init(&brief);
    pthread_mutexattr_settype(&brief, PTHREAD_MUTEX_ADAPTIVE_NP);
    pthread_mutex_init(&w->mutex, &brief);
    pthread_mutexattr_destroy(&brief);
    pthread_cond_init(&w->idle, NULL);
    pthread_cond_init(&w->wanted, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&w->joined, &monotonic);
    pthread_condattr_destroy(&monotonic);
    w->open = &w->groups[0];
    w->flight = &w->groups[1];
    w->written_lsn = w->durable_lsn = w->stage_lsn = config->lsn;
    w->epoch = config->epoch;
    w->link = config->link;
    w->watermark = config->watermark;
    w->live = config->summary.live;
    w->first_op = config->summary.first_op;
    w->last_op = w->high_op = config->summary.last_op;
    pthread_cond_init(&w->kick, NULL);
    w->event_fd = -1;
    w->barrier_first = 1; /* an empty range: no barrier */
    if (publish_progress(w) != 0) {
        mw_writer_free(w);
        return NULL;
    }
    return w;
}

void mw_writer_free(struct mw_writer *w) {
    if (w == NULL) return;
    for (int i = 0; i < 2; i++) free(w->groups[i].buffer);
    free(w->pending);
    free(w);
}

/* Gives the mutex back. */
int64_t finish_append(struct mw_writer *w, int64_t op) {
    if (op > 0 && w->config.durability != MW_BUFFERED) {
        int rc = wait_durable(w);
        return rc != 0 ? rc : op;
    }
    /* A failure leaves the entry staged, as promised; the next call is told. */
    if (op > 0 && w->open->bytes >= w->config.buffer_bytes) flush_staged(w);
    if (op > 0 && w->poison_stage != MW_STAGE_NONE) op = MW_E_POISONED;
    pthread_mutex_unlock(&w->mutex);
    return op;
}

int64_t mw_append(struct mw_writer *w, const char *data, uint64_t bytes, int64_t op, int32_t kind,
                  int64_t timestamp_ns, uint32_t flags) {
    return mw_append_many(w, data, &bytes, NULL, 1, op, kind, timestamp_ns, flags);
}

/* The next op, now. Each argument that a call from Python does not have saves it 20 ns. */
int64_t mw_append_next(struct mw_writer *w, const char *data, uint64_t bytes, int32_t kind) {
    return mw_append_many(w, data, &bytes, NULL, 1, 0, kind, 0, MW_NOW);
}

int64_t mw_append_many(struct mw_writer *w, const char *data, const void *lengths,
                       const uint16_t *kinds, uint64_t count, int64_t first_op, int32_t kind,
                       int64_t timestamp_ns, uint32_t flags) {
    if (w->forked) return MW_E_FORKED;
    if (count == 0) return -EINVAL;
    pthread_mutex_lock(&w->mutex);
    int64_t op = stage(w, data, lengths, kinds, count, first_op, kind, timestamp_ns, flags);
    return finish_append(w, op);
}

/* MW_SYNC_STAGED: all that is staged is written first. Then all that is written becomes durable. */
int mw_sync(struct mw_writer *w, uint32_t flags) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    int rc = lead_to(w, flags & MW_SYNC_STAGED ? w->stage_lsn : 0, (flags & MW_SYNC_CLOSING) != 0);
    pthread_mutex_unlock(&w->mutex);
    return rc;
}

/* Hands what is staged to the kernel, when something below `below_lsn` is. */
int mw_flush(struct mw_writer *w, uint64_t below_lsn) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    int rc = check_usable(w);
    if (rc == 0 && w->written_lsn < below_lsn) rc = flush_staged(w);
    pthread_mutex_unlock(&w->mutex);
    return rc;
}

/* The target continues where the last one ends; the first one has the tail in it (else -EINVAL).
 * -EAGAIN: flush first, too many are under way. */
int mw_writer_add_target(struct mw_writer *w, const struct mw_target *target) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    int rc = w->target_end - w->tail_target >= TARGETS ? -EAGAIN : 0;
    const struct mw_target *last = w->target_end > w->tail_target ? target_at(w, w->target_end - 1) : NULL;
    uint64_t at = last != NULL ? last->base_lsn + last->capacity : w->written_lsn;
    if (at < target->base_lsn || at - target->base_lsn >= target->capacity) rc = -EINVAL;
    if (last != NULL && at != target->base_lsn) rc = -EINVAL;
    if (rc == 0) {
        *target_at(w, w->target_end) = *target;
        w->ends[w->target_end++ % TARGETS] = 0;
    }
    pthread_mutex_unlock(&w->mutex);
    return rc;
}

/* Takes the last prepared one back; -EBUSY when frames were staged for it. */
int mw_writer_drop_target(struct mw_writer *w) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    int rc = w->target_end - w->stage_target > 1 ? 0 : -EBUSY;
    if (rc == 0) w->target_end--;
    pthread_mutex_unlock(&w->mutex);
    return rc;
}

/* Ends the present segment, durably. */
int mw_writer_rotate(struct mw_writer *w) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    int rc = check_usable(w);
    if (rc == 0 && w->epoch_owed) rc = MW_E_NEED_EPOCH;
    if (rc == 0) rc = stage_end(w);
    if (rc == 0) rc = lead_to(w, w->stage_lsn, false);
    pthread_mutex_unlock(&w->mutex);
    return rc;
}

/* Where the segment's END ends, once that is durable; 0 when it is not, or was long ago. */
int64_t mw_writer_ended(struct mw_writer *w, uint64_t id) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    uint64_t end = 0, from = w->target_end > TARGETS ? w->target_end - TARGETS : 0;
    for (uint64_t n = from; n < w->tail_target; n++)
        if (target_at(w, n)->id == id) end = w->ends[n % TARGETS];
    pthread_mutex_unlock(&w->mutex);
    return (int64_t)end;
}

/* Blocks until a segment should be prepared: 1. 0 when the writer was closed or poisoned. */
int mw_writer_wait_wanted(struct mw_writer *w) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    while (check_usable(w) == 0 && !segment_wanted(w)) pthread_cond_wait(&w->wanted, &w->mutex);
    int rc = check_usable(w) == 0;
    pthread_mutex_unlock(&w->mutex);
    return rc;
}

/* Appends of first .. last are refused from now on; an empty range takes the barrier away. */
int mw_writer_barrier(struct mw_writer *w, uint64_t first, uint64_t last) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    w->barrier_first = first;
    w->barrier_last = last;
    pthread_mutex_unlock(&w->mutex);
    return 0;
}

struct removal {
    struct mw_writer *w;
    uint64_t first, last, below_lsn;
    int64_t removed;
};

static int empty_slots(void *arg) {
    struct removal *r = arg;
    struct mw_slot *slots = r->w->config.slots;
    for (uint64_t i = 0; i < r->w->config.slot_count; i++) {
        if (slots[i].lsn == 0 || slots[i].lsn >= r->below_lsn) continue;
        if (slots[i].op < r->first || slots[i].op > r->last) continue;
        mw_slot_empty(&slots[i]);
        r->removed++;
    }
    return 0;
}

static uint64_t highest_staged(const struct mw_writer *w) {
    uint64_t high = 0;
    for (int i = 0; i < 2; i++) {
        const struct group *g = &w->groups[i];
        for (uint64_t at = 0; at < g->bytes;) {
            const struct mw_frame *f = frame_at(g, at);
            if (f->op > high) high = f->op;
            at += mw_frame_bytes(f->length);
        }
    }
    return high;
}

static int64_t remove_ops(struct mw_writer *w, uint64_t first, uint64_t last, uint64_t below_lsn) {
    struct removal r = {w, first, last, below_lsn, 0};
    struct mw_summary sum;
    int rc = mw_guarded(empty_slots, &r);
    if (rc == 0) rc = mw_slots_summary(w->config.slots, w->config.slot_count, &sum);
    if (rc == 0) {
        w->live = sum.live;
        w->first_op = sum.first_op;
        w->last_op = sum.last_op;
        uint64_t staged = highest_staged(w);
        w->high_op = staged > sum.last_op ? staged : sum.last_op;
        rc = publish_progress(w);
    }
    if (rc == 0) return r.removed;
    poison(w, MW_STAGE_INDEX, rc);
    return MW_E_POISONED;
}

/* The superblock says already that they are gone. How many were live. */
int64_t mw_writer_remove(struct mw_writer *w, uint64_t first, uint64_t last, uint64_t below_lsn) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    int64_t removed = remove_ops(w, first, last, below_lsn);
    pthread_mutex_unlock(&w->mutex);
    return removed;
}

/* Published with the progress from now on: others read that superblock. */
int mw_writer_note_superblock(struct mw_writer *w, uint64_t sequence) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    w->config.superblock_sequence = sequence;
    int rc = mw_guard_arm();
    if (rc == 0) rc = publish_progress(w);
    pthread_mutex_unlock(&w->mutex);
    return rc;
}

int64_t mw_writer_set_watermark(struct mw_writer *w, uint64_t op) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    w->watermark = op;
    int64_t removed = remove_ops(w, 0, op, UINT64_MAX);
    pthread_mutex_unlock(&w->mutex);
    return removed;
}

/* The superblock says already that the epoch starts at the tail. */
int mw_writer_set_epoch(struct mw_writer *w, uint32_t epoch) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    w->epoch = epoch;
    w->epoch_owed = false;
    pthread_mutex_unlock(&w->mutex);
    return 0;
}

void mw_writer_poison(struct mw_writer *w, int error) {
    if (w->forked) return;
    pthread_mutex_lock(&w->mutex);
    poison(w, MW_STAGE_OUTSIDE, error);
    pthread_mutex_unlock(&w->mutex);
}

void mw_writer_close(struct mw_writer *w) {
    if (w->forked) return;
    pthread_mutex_lock(&w->mutex);
    w->closed = true;
    while (w->leading || w->flight->waiters != NULL || w->open->waiters != NULL)
        pthread_cond_wait(&w->idle, &w->mutex);
    pthread_cond_broadcast(&w->wanted);
    pthread_mutex_unlock(&w->mutex);
}

void mw_writer_fork(struct mw_writer *w) { w->forked = 1; }

static uint64_t next_op(const struct mw_writer *w) {
    return (w->high_op > w->watermark ? w->high_op : w->watermark) + 1;
}

struct walk {
    const struct mw_writer *w;
    uint64_t op, free;
};

static int walk_free(void *arg) {
    struct walk *k = arg;
    const struct mw_config *c = &k->w->config;
    while (k->free < c->slot_count && c->slots[(k->op + k->free) % c->slot_count].lsn == 0) k->free++;
    return 0;
}

int64_t mw_writer_remaining(struct mw_writer *w) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    uint64_t next = next_op(w), slots = w->config.slot_count;
    struct walk k = {w, next, 0};
    int rc = 0;
    if (w->live == 0) k.free = slots;
    else if (w->last_op - w->first_op < slots && w->first_op + slots >= next) k.free = w->first_op + slots - next;
    else rc = mw_guarded(walk_free, &k);
    pthread_mutex_unlock(&w->mutex);
    uint64_t left = next > INT64_MAX ? 0 : (uint64_t)INT64_MAX - next + 1;
    return rc < 0 ? rc : (int64_t)(k.free < left ? k.free : left);
}

int mw_writer_state(struct mw_writer *w, struct mw_state *out) {
    if (w->forked) return MW_E_FORKED;
    pthread_mutex_lock(&w->mutex);
    const struct mw_target *tail = target_at(w, w->tail_target), *staged = target_at(w, w->stage_target);
    bool any = w->target_end != w->tail_target;
    *out = (struct mw_state){
        .live = w->live, .first_op = w->first_op, .last_op = w->last_op, .next_op = next_op(w),
        .watermark = w->watermark, .written_lsn = w->written_lsn, .durable_lsn = w->durable_lsn,
        .staged_bytes = w->open->bytes + w->flight->bytes, .tail_id = any ? tail->id : 0,
        .stage_id = any ? staged->id : 0,
        .stage_room = any ? staged->base_lsn + staged->capacity - w->stage_lsn : 0,
        .commits = w->commits, .syncs = w->syncs, .entries = w->entries, .bytes = w->bytes,
        .targets = (uint32_t)(any ? w->target_end - w->stage_target - 1 : 0),
        .target_room = (uint32_t)(TARGETS - (w->target_end - w->tail_target)), .epoch = w->epoch,
        .link = w->link, .epoch_owed = w->epoch_owed, .poison_stage = w->poison_stage,
        .poison_errno = w->poison_errno, .closed = w->closed};
    pthread_mutex_unlock(&w->mutex);
    return 0;
}
