/* Walks the frames of one segment and checks each: what recovery, verify and compaction read. */
#include <errno.h>
#include <string.h>

#include "mmapwal.h"

#define AHEAD 8u   /* frames, as long as the present one, that memory is asked for before they are needed */
#define KEPT 1024u /* entries of a batch that are kept until it is whole */

static uint64_t end_lsn(const struct mw_scan *s) {
    uint64_t end = s->base_lsn + s->capacity;
    return s->limit_lsn < end ? s->limit_lsn : end;
}

static bool is_blank(const struct mw_frame *f) {
    uint64_t word[MW_FRAME_BYTES / 8];
    memcpy(word, f, sizeof word);
    uint64_t any = 0;
    for (size_t i = 0; i < MW_FRAME_BYTES / 8; i++) any |= word[i];
    return any == 0;
}

/* The header alone: checksum, place, bounds, epoch. 0, or why it is no frame. */
static int check_header(const struct mw_scan *s, const struct mw_frame *f, uint64_t lsn, uint32_t crc) {
    if (f->header_crc != crc) return MW_STOP_HEADER;
    if (f->lsn != lsn) return MW_STOP_PLACE;
    if (f->type < MW_ENTRY || f->type > MW_PAD) return MW_STOP_TYPE;
    if (f->type == MW_ENTRY && (f->op == 0 || f->op > INT64_MAX)) return MW_STOP_OP;
    if (f->epoch > s->epoch) return MW_STOP_FUTURE_EPOCH;
    if (lsn >= s->epoch_start_lsn && f->epoch != s->epoch) return MW_STOP_OLD_EPOCH;
    if (mw_frame_bytes(f->length) > s->base_lsn + s->capacity - lsn) return MW_STOP_LENGTH;
    return 0;
}

/* A payload is read only when its header is right: until then its length is anyone's. */
static int check_frame(struct mw_scan *s, const struct mw_frame *f, const uint8_t *payload) {
    if (f->type == 0 && is_blank(f)) return MW_STOP_BLANK;
    int stop = check_header(s, f, s->lsn, mw_frame_crc(f, s->salt));
    if (stop != 0) return stop;
    s->op = f->op;
    if (f->link != s->link) return MW_STOP_LINK;
    if (f->epoch < s->last_epoch) return MW_STOP_OLD_EPOCH;
    if (f->type == MW_ENTRY && f->payload_crc != mw_crc32c(0, payload, f->length)) return MW_STOP_PAYLOAD;
    return 0;
}

/* The entries of a batch count when the batch is whole. Those before its last are kept here, so that they need
 * not be read again; of a longer one the rest is. */
struct batch {
    struct mw_slot slots[KEPT];
    uint64_t count, rest_lsn;   /* kept; where the others begin */
};

static struct mw_slot slot_of(const struct mw_frame *f) {
    return (struct mw_slot){f->lsn, f->op, f->timestamp_ns, f->length, f->kind, 0};
}

static int insert(struct mw_scan *s, const struct mw_slot *new) {
    if (new->op <= s->watermark) return 0;
    if (s->removal_count != 0 && mw_frame_hidden(s->removals, s->removal_count, new->op, new->lsn)) {
        s->hidden_count++;
        return 0;
    }
    if (s->slots == NULL) return 0;
    struct mw_slot *slot = &s->slots[new->op % s->slot_count];
    if (slot->lsn != 0 && slot->op != new->op) {
        s->op = new->op;
        return MW_STOP_CONFLICT;
    }
    if (new->op < s->first_op || s->first_op == 0) s->first_op = new->op;
    if (new->op > s->last_op) s->last_op = new->op;
    *slot = *new; /* nobody else has them yet */
    return 0;
}

static void keep(struct batch *b, const struct mw_frame *f) {
    if (b->count == KEPT) return;
    if (f->type == MW_ENTRY) b->slots[b->count++] = slot_of(f);
    b->rest_lsn = f->lsn + mw_frame_bytes(f->length);
}

static int insert_batch(struct mw_scan *s, struct batch *b, uint64_t to_lsn) {
    int stop = 0;
    for (uint64_t i = 0; i < b->count && stop == 0; i++) stop = insert(s, &b->slots[i]);
    for (uint64_t lsn = b->rest_lsn; lsn < to_lsn && stop == 0;) {
        struct mw_frame f;
        memcpy(&f, s->frames + (lsn - s->base_lsn), sizeof f);
        struct mw_slot slot = slot_of(&f);
        if (f.type == MW_ENTRY) stop = insert(s, &slot);
        lsn += mw_frame_bytes(f.length);
    }
    b->count = 0;
    return stop;
}

/* A commit that is aligned is whole with its padding: the next one would share the sector of the last frame. */
static bool ends_batch(const struct mw_scan *s, const struct mw_frame *f, uint64_t next) {
    if (f->flags & MW_FLAG_MORE) return false;
    return s->align_bytes == 0 || next % s->align_bytes == 0 || next <= s->durable_lsn || f->type == MW_END;
}

/* A frame that is good takes effect: 0, or why the scan ends at it or behind it. */
static int accept_frame(struct mw_scan *s, struct batch *batch, const struct mw_frame *f, bool inserts) {
    uint64_t next = s->lsn + mw_frame_bytes(f->length);
    bool ends = ends_batch(s, f, next);
    if (inserts && !ends) {
        keep(batch, f);
    } else if (inserts) {
        struct mw_slot slot = slot_of(f);
        int stop = s->batch_lsn != s->lsn ? insert_batch(s, batch, s->lsn) : 0;
        if (stop == 0 && f->type == MW_ENTRY) stop = insert(s, &slot);
        if (stop != 0) return stop;
    }
    if (f->type == MW_ENTRY) s->entry_count++;
    if (s->frame_count++ == 0) s->first_epoch = f->epoch;
    if (f->durable_lsn > s->durable_lsn) s->durable_lsn = f->durable_lsn;
    s->last_epoch = f->epoch;
    s->link = f->type == MW_GAP ? f->payload_crc : f->header_crc;
    s->lsn = next;
    if (ends) {
        s->batch_lsn = next;
        s->batch_link = s->link;
    }
    return f->type == MW_END ? MW_STOP_END : 0;
}

/* One frame after the other: the processor is at the next ones before a checksum is there. */
static int scan(struct mw_scan *s) {
    uint64_t end = end_lsn(s);
    bool inserts = s->slots != NULL || s->removal_count != 0;
    struct batch batch;
    batch.count = 0;
    for (;;) {
        s->op = 0;
        if (s->lsn >= s->limit_lsn) return MW_STOP_LIMIT;
        if (end - s->lsn < MW_FRAME_BYTES) return MW_STOP_LENGTH;
        const uint8_t *at = s->frames + (s->lsn - s->base_lsn);
        struct mw_frame f;
        memcpy(&f, at, sizeof f);
        uint64_t bytes = mw_frame_bytes(f.length); /* anyone's, too: where it leads nowhere, nothing is read */
        __builtin_prefetch(at + AHEAD * bytes);
        __builtin_prefetch(at + AHEAD * bytes + offsetof(struct mw_frame, length));
        int stop = check_frame(s, &f, at + MW_FRAME_BYTES);
        if (stop == 0) stop = accept_frame(s, &batch, &f, inserts);
        if (stop != 0) return stop;
    }
}

static int scan_to_stop(void *arg) {
    struct mw_scan *s = arg;
    s->stop = scan(s);
    return 0;
}

int mw_scan(struct mw_scan *s) {
    if (s->lsn < s->base_lsn || s->lsn > s->base_lsn + s->capacity) return -EINVAL;
    return mw_guarded(scan_to_stop, s);
}

static int hunt(void *arg) {
    struct mw_scan *s = arg;
    uint64_t end = s->base_lsn + s->capacity;
    for (uint64_t lsn = s->lsn; lsn + MW_FRAME_BYTES <= end; lsn += MW_ALIGN) {
        const uint8_t *at = s->frames + (lsn - s->base_lsn);
        uint64_t claimed;
        memcpy(&claimed, at + offsetof(struct mw_frame, lsn), sizeof claimed);
        if (claimed != lsn) continue; /* the cheap test: nearly everything ends here */
        struct mw_frame f;
        memcpy(&f, at, sizeof f);
        int stop = check_header(s, &f, lsn, mw_frame_crc(&f, s->salt));
        if (stop == MW_STOP_FUTURE_EPOCH) s->stop = stop;
        if (stop != 0) continue;
        s->frame_count++;
        if (f.durable_lsn > s->durable_lsn) s->durable_lsn = f.durable_lsn;
    }
    return 0;
}

int mw_hunt(struct mw_scan *s) {
    if (s->lsn < s->base_lsn || s->lsn % MW_ALIGN != s->base_lsn % MW_ALIGN) return -EINVAL;
    s->stop = MW_STOP_NONE;
    s->frame_count = 0;
    return mw_guarded(hunt, s);
}

static int seek(void *arg) {
    struct mw_scan *s = arg;
    uint64_t end = end_lsn(s);
    for (; s->lsn + MW_FRAME_BYTES <= end; s->lsn += MW_ALIGN) {
        struct mw_frame f;
        memcpy(&f, s->frames + (s->lsn - s->base_lsn), sizeof f);
        if (f.lsn != s->lsn || check_header(s, &f, s->lsn, mw_frame_crc(&f, s->salt)) != 0) continue;
        s->link = f.link;
        return 1;
    }
    return 0;
}

/* The next good frame from scan->lsn on, at any place below the limit: 1, and scan->lsn and scan->link are what a
 * scan goes on with there. 0: none. */
int mw_seek(struct mw_scan *s) {
    if (s->lsn < s->base_lsn || s->lsn % MW_ALIGN != s->base_lsn % MW_ALIGN) return -EINVAL;
    return mw_guarded(seek, s);
}

struct plan {
    const uint8_t *frames;
    uint64_t base_lsn, end_lsn;
    const struct mw_slot *slots;
    uint64_t slot_count;
    uint64_t *lsn;
    uint32_t *link;
    struct mw_run *runs;
    uint64_t max_runs, count;
    uint32_t salt;
};

/* END stays, since it says that the segment was left; PAD and GAP are as dead as their neighbours. */
static bool is_kept(const struct plan *p, const struct mw_frame *f) {
    if (f->type == MW_END) return true;
    if (f->type != MW_ENTRY) return false;
    const struct mw_slot *slot = &p->slots[f->op % p->slot_count];
    return slot->lsn == f->lsn && slot->op == f->op;
}

static int plan(void *arg) {
    struct plan *p = arg;
    while (*p->lsn < p->end_lsn) {
        if (p->end_lsn - *p->lsn < MW_FRAME_BYTES) return MW_E_CORRUPT;
        struct mw_frame f;
        memcpy(&f, p->frames + (*p->lsn - p->base_lsn), sizeof f);
        uint64_t bytes = mw_frame_bytes(f.length);
        if (f.lsn != *p->lsn || bytes > p->end_lsn - *p->lsn) return MW_E_CORRUPT;
        if (f.link != *p->link || f.header_crc != mw_frame_crc(&f, p->salt)) return MW_E_CORRUPT;
        bool keep = is_kept(p, &f);
        struct mw_run *run = p->count > 0 ? &p->runs[p->count - 1] : NULL;
        if (run == NULL || run->keep != keep) {
            if (p->count == p->max_runs) return 0;
            run = &p->runs[p->count++];
            run->from_lsn = *p->lsn;
            run->link = *p->link;
            run->keep = keep;
            run->gap_bytes = 0;
        }
        run->to_lsn = *p->lsn + bytes;
        run->last_lsn = *p->lsn;
        if (f.type == MW_GAP) run->gap_bytes += bytes;
        *p->link = f.type == MW_GAP ? f.payload_crc : f.header_crc;
        *p->lsn += bytes;
    }
    return 0;
}

int64_t mw_plan(const uint8_t *frames, uint64_t base_lsn, uint64_t end, uint32_t salt,
                const struct mw_slot *slots, uint64_t slot_count, uint64_t *lsn, uint32_t *link,
                struct mw_run *runs, uint64_t max_runs) {
    struct plan p = {frames, base_lsn, end, slots, slot_count, lsn, link, runs, max_runs, 0, salt};
    int rc = mw_guarded(plan, &p);
    return rc < 0 ? rc : (int64_t)p.count;
}
