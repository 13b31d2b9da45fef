/* Group commit: whoever finds nobody leading takes all that is staged, stamps it, writes it, syncs it,
 * publishes it and wakes those who wait for it. The mutex is free during the I/O. */
#include <errno.h>
#include <string.h>

#include "writer.h"

/* After one of these a write did nothing that matters: a later one in a new epoch takes its place. */
static bool is_clean(int error) {
    return error == -ENOSPC || error == -EDQUOT || error == -EFBIG || error == -ENOMEM;
}

struct publish {
    struct mw_writer *w;
    const uint8_t *from, *to;
};

static int publish_slots(void *arg) {
    struct publish *p = arg;
    struct mw_writer *w = p->w;
    for (const uint8_t *at = p->from; at < p->to;) {
        struct mw_frame f;
        memcpy(&f, at, sizeof f);
        at += mw_frame_bytes(f.length);
        if (f.type != MW_ENTRY) continue;
        uint64_t number = f.op % w->config.slot_count;
        struct mw_slot *slot = &w->config.slots[number];
        if (slot->lsn == 0) w->live++;
        mw_slot_store(slot, &f);
        w->pending[number / 8] &= (uint8_t)~(1u << number % 8);
        if (f.op > w->last_op) w->last_op = f.op;
        if (w->first_op == 0 || f.op < w->first_op) w->first_op = f.op;
        w->entries++;
    }
    return 0;
}

int publish_group(struct mw_writer *w, const uint8_t *from, const uint8_t *to) {
    struct publish p = {w, from, to};
    return mw_guarded_unarmed(publish_slots, &p);
}

static int store_progress(void *arg) {
    struct mw_writer *w = arg;
    __atomic_store_n(&w->config.page->superblock_sequence, w->config.superblock_sequence, __ATOMIC_RELAXED);
    mw_progress_store(w->config.page, w->written_lsn, w->durable_lsn, w->watermark);
    return 0;
}

int publish_progress(struct mw_writer *w) { return mw_guarded_unarmed(store_progress, w); }

/* What only the leader knows: epoch, durable LSN and link, as in `as`; and the checksums, of the copies: the callers'
 * payloads may have changed. Without the mutex: the group is the leader's, and others look at ops, types and lengths
 * in it. The link of the frame that comes next. */
static uint32_t stamp(struct group *g, const struct part *p, const struct mw_target *t, const struct mw_frame *as) {
    uint32_t link = as->link;
    for (uint64_t at = p->from; at < p->to;) {
        struct mw_frame *f = frame_at(g, at);
        f->epoch = as->epoch;
        f->durable_lsn = as->durable_lsn;
        f->link = link;
        if (f->type == MW_ENTRY) f->payload_crc = mw_crc32c(0, (const uint8_t *)f + MW_FRAME_BYTES, f->length);
        f->header_crc = mw_frame_crc(f, t->salt);
        link = f->header_crc;
        at += mw_frame_bytes(f->length);
    }
    return link;
}

void poison(struct mw_writer *w, int stage, int error) {
    if (w->poison_stage == MW_STAGE_NONE) {
        w->poison_stage = stage;
        w->poison_errno = -error;
    }
    for (int i = 0; i < 2; i++) finish(w, &w->groups[i], UINT64_MAX, MW_E_POISONED);
    complete(w, w->staged_ticket, MW_E_POISONED);
    if (mw_guard_arm() == 0) (void)publish_progress(w); /* nothing new: followers shall see that it is over */
    pthread_cond_broadcast(&w->wanted);
    pthread_cond_broadcast(&w->idle);
    pthread_cond_signal(&w->kick);
}

static void forget(struct mw_writer *w, struct group *g) {
    for (uint64_t at = 0; at < g->bytes;) {
        const struct mw_frame *f = frame_at(g, at);
        uint64_t slot = f->op % w->config.slot_count;
        w->pending[slot / 8] &= (uint8_t)~(1u << slot % 8);
        at += mw_frame_bytes(f->length);
    }
    g->bytes = 0;
    g->part_count = 0;
}

/* The group that could not be written and all behind it: as if they had never been staged. A frame
 * of them may lie whole on the disk, so what is written there next has to be of a new epoch. */
void fail_staged(struct mw_writer *w, int error) {
    w->epoch_owed = true;
    if (w->config.durability == MW_BUFFERED) return; /* promised at staging: they stay and wait for room */
    for (int i = 0; i < 2; i++) {
        forget(w, &w->groups[i]);
        finish(w, &w->groups[i], UINT64_MAX, error);
    }
    complete(w, w->staged_ticket, error);
    w->stage_lsn = w->written_lsn;
    w->stage_target = w->tail_target;
    w->high_op = w->last_op;
}

/* I/O of one part, without the mutex. *stage says which step failed. */
static int write_part(const struct mw_config *config, struct mw_io *io, const struct mw_target *t,
                      const struct part *p, const uint8_t *buffer, int *stage) {
    uint64_t offset = MW_PAGE_BYTES + (p->lsn - t->base_lsn), bytes = p->to - p->from;
    bool sync = config->durability == MW_SYNC;
    if (sync && !config->separate_sync) {
        *stage = MW_STAGE_WRITE_SYNC;
        return io->write_sync(io->ctx, offset, buffer + p->from, bytes);
    }
    *stage = MW_STAGE_WRITE;
    int rc = io->write(io->ctx, offset, buffer + p->from, bytes);
    if (rc != 0 || !(sync || p->ends)) return rc;
    *stage = MW_STAGE_SYNC; /* an END is durable before the next segment takes a frame */
    return io->sync(io->ctx);
}

static int commit_part(struct mw_writer *w, struct group *g, struct part *p) {
    struct mw_target target = *target_at(w, p->target);
    struct mw_frame as = {.epoch = w->epoch, .durable_lsn = w->durable_lsn,
                          .link = p->lsn == target.base_lsn ? target.salt : w->link};
    bool synced = w->config.durability == MW_SYNC || p->ends;
    int step;
    uint64_t began_ns = monotonic_ns();
    pthread_mutex_unlock(&w->mutex);
    uint32_t link = stamp(g, p, &target, &as);
    int rc = write_part(&w->config, target.io, &target, p, g->buffer, &step);
    pthread_mutex_lock(&w->mutex);
    w->commit_ns = monotonic_ns() - began_ns;
    if (rc != 0) {
        if (step == MW_STAGE_WRITE && is_clean(rc)) return rc;
        poison(w, step, rc);
        return MW_E_POISONED;
    }
    w->link = link;
    w->written_lsn = p->lsn + (p->to - p->from);
    if (p->ends) {
        w->ends[p->target % TARGETS] = w->written_lsn;
        w->tail_target++;
        w->written_lsn = target_at(w, w->tail_target)->base_lsn;
    }
    w->commits++;
    w->bytes += p->to - p->from;
    if (synced) {
        w->durable_lsn = w->written_lsn;
        w->syncs++;
    }
    rc = mw_guard_arm();
    if (rc == 0 && w->config.durability != MW_BUFFERED)
        rc = publish_group(w, g->buffer + p->from, g->buffer + p->to);
    if (rc == 0) rc = publish_progress(w);
    if (rc != 0) {
        poison(w, MW_STAGE_INDEX, rc);
        return MW_E_POISONED;
    }
    finish(w, g, w->written_lsn, 0);
    complete(w, p->ticket, 0);
    return 0;
}

static int commit_flight(struct mw_writer *w) {
    struct group *g = w->flight;
    uint32_t done = 0;
    int rc = 0;
    while (rc == 0 && done < g->part_count) { /* poisoned from outside meanwhile: nothing more is written */
        if ((rc = check_sound(w)) == 0) rc = commit_part(w, g, &g->parts[done]);
        if (rc == 0) done++;
    }
    if (rc == 0) {
        g->bytes = 0;
        g->part_count = 0;
    } else if (done > 0) { /* what is written is not written again */
        uint64_t from = g->parts[done].from;
        memmove(g->buffer, g->buffer + from, g->bytes - from);
        g->bytes -= from;
        g->part_count -= done;
        memmove(g->parts, g->parts + done, g->part_count * sizeof *g->parts);
        for (uint32_t i = 0; i < g->part_count; i++) {
            g->parts[i].from -= from;
            g->parts[i].to -= from;
        }
    }
    return rc;
}

/* One commit: the group that is still in flight after a clean failure, or the open one. */
int commit_next(struct mw_writer *w) {
    if (w->flight->bytes == 0) {
        align_stage(w); /* cannot fail: staging reserved its room */
        struct group *g = w->open;
        w->open = w->flight;
        w->flight = g;
    }
    int rc = commit_flight(w);
    if (rc != 0 && rc != MW_E_POISONED) fail_staged(w, rc);
    return rc;
}

/* Writes all that is staged below `lsn`; the caller is told the first failure. */
static int write_below(struct mw_writer *w, uint64_t lsn) {
    int rc = 0;
    while (rc == 0 && w->written_lsn < lsn && (w->flight->bytes != 0 || w->open->bytes != 0)) {
        if ((rc = check_sound(w)) == 0 && w->epoch_owed) rc = MW_E_NEED_EPOCH;
        if (rc == 0) rc = commit_next(w);
    }
    return rc;
}

static void take_lead(struct mw_writer *w) {
    w->lead_wanted++;
    while (w->leading && !w->lead_given) pthread_cond_wait(&w->idle, &w->mutex);
    w->lead_wanted--;
    w->lead_given = false;
    w->leading = true;
}

int flush_staged(struct mw_writer *w) {
    take_lead(w);
    int rc = check_usable(w); /* closed while it waited: the files may be gone */
    if (rc == 0) rc = write_below(w, w->stage_lsn);
    step_down(w);
    return rc;
}

/* Writes all below `lsn`, then makes all that is written durable. `closing`: by who closes. */
int lead_to(struct mw_writer *w, uint64_t lsn, bool closing) {
    take_lead(w);
    int rc = closing ? check_sound(w) : check_usable(w);
    if (rc == 0) rc = write_below(w, lsn);
    if (rc == 0 && w->durable_lsn < w->written_lsn) {
        struct mw_io *io = target_at(w, w->tail_target)->io;
        uint64_t written = w->written_lsn;
        pthread_mutex_unlock(&w->mutex);
        rc = io->sync(io->ctx);
        pthread_mutex_lock(&w->mutex);
        w->syncs++;
        if (rc != 0) {
            poison(w, MW_STAGE_SYNC, rc);
            rc = MW_E_POISONED;
        } else {
            w->durable_lsn = written;
            rc = mw_guard_arm();
            if (rc == 0) rc = publish_progress(w);
            if (rc != 0) {
                poison(w, MW_STAGE_INDEX, rc);
                rc = MW_E_POISONED;
            }
        }
    }
    step_down(w);
    return rc;
}
