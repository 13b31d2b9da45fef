/* A walk over the frames of a segment in the order in which they were written: what followers take. */
#include <errno.h>
#include <string.h>

#include "mmapwal.h"

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

static int is_place(const struct mw_walk *s) {
    return s->lsn >= s->base_lsn && s->lsn % MW_ALIGN == s->base_lsn % MW_ALIGN;
}

/* The entries from walk->lsn on, one a row: how many. Where walk->failed, walk->lsn says at which place. */
int64_t mw_walk(struct mw_walk *s, struct mw_columns *out, uint64_t max) {
    if (!is_place(s)) return -EINVAL;
    struct walk w = {s, out, max, 0};
    s->failed = mw_guarded(walk, &w);
    return (int64_t)w.count;
}

struct take {
    const struct mw_index_header *page;
    struct mw_next *next;
};

static int take(void *arg) {
    const struct take *t = arg;
    struct mw_next *n = t->next;
    struct mw_walk *s = n->walk;
    struct mw_progress progress;
    if (!is_place(s) || mw_progress_look(t->page, &progress) != 0) return 0;
    __atomic_thread_fence(__ATOMIC_ACQUIRE); /* the sequence is no older than the progress */
    if (__atomic_load_n(&t->page->superblock_sequence, __ATOMIC_ACQUIRE) != n->superblock_sequence) return 0;
    uint64_t end = n->written ? progress.written_lsn : progress.durable_lsn;
    if (s->limit_lsn > end) s->limit_lsn = end;
    struct walk w = {s, n->out, n->max, 0};
    (void)walk(&w);
    if (w.count == 0) return 0;
    n->lsn = s->lsn, n->durable_lsn = progress.durable_lsn;
    n->op = n->out->op[0], n->start = n->out->start[0], n->end = n->out->end[0];
    n->timestamp_ns = n->out->timestamp_ns[0], n->kind = n->out->kind[0];
    n->count = w.count;
    return 0;
}

/* What came where nothing else has changed. In all other cases, and when the disk fails: none, and whoever looks
 * around is told. Armed anew: the handler may be another one since the wait began. */
void mw_take_next(const struct mw_index_header *page, struct mw_next *next) {
    struct take t = {page, next};
    (void)mw_guarded(take, &t);
}
