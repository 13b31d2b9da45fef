/* Reading many live entries in one call: slot, frame, check, and a row of columns for each. */
#include <errno.h>
#include <string.h>

#include "mmapwal.h"

struct gather {
    const struct mw_slot *slots;
    uint64_t slot_count;
    const struct mw_table *table;
    struct mw_cursor *cursor;
    const uint64_t *ops;
    uint64_t op_count, *taken;
    struct mw_columns *out;
    uint64_t max;
    volatile uint64_t count; /* rows that were checked, should the disk fail at the next one */
    int verify;
    uint64_t hint;           /* row of the table where the last entry was */
};

static uint64_t find(struct gather *g, uint64_t lsn) {
    const struct mw_segment_ref *refs = g->table->refs;
    uint64_t at = g->hint;
    if (at < g->table->count && lsn >= refs[at].base_lsn && lsn - refs[at].base_lsn < refs[at].capacity)
        return at;
    uint64_t low = 0, high = g->table->count;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        if (refs[middle].base_lsn <= lsn) low = middle + 1;
        else high = middle;
    }
    if (low == 0 || lsn - refs[low - 1].base_lsn >= refs[low - 1].capacity) return UINT64_MAX;
    return g->hint = low - 1;
}

static int check(const struct mw_segment_ref *ref, const struct mw_slot *slot, struct mw_frame *f) {
    uint64_t at = slot->lsn - ref->base_lsn;
    if (ref->capacity - at < MW_FRAME_BYTES) return MW_E_CORRUPT;
    memcpy(f, ref->frames + at, sizeof *f);
    if (f->lsn != slot->lsn || f->op != slot->op || f->type != MW_ENTRY) return MW_E_CORRUPT;
    if (f->length != slot->length || mw_frame_bytes(f->length) > ref->capacity - at) return MW_E_CORRUPT;
    return 0;
}

static int check_sums(const struct mw_segment_ref *ref, const struct mw_frame *f) {
    if (f->header_crc != mw_frame_crc(f, ref->salt)) return MW_E_CORRUPT;
    const uint8_t *payload = ref->frames + (f->lsn - ref->base_lsn) + MW_FRAME_BYTES;
    return f->payload_crc == mw_crc32c(0, payload, f->length) ? 0 : MW_E_CORRUPT;
}

/* The next to look at: the op itself, or its place in `ops`. */
static uint64_t *position(struct gather *g) { return g->ops != NULL ? g->taken : &g->cursor->op; }

static bool more(struct gather *g) {
    if (g->ops == NULL) return g->cursor->op <= g->cursor->last_op;
    if (*g->taken >= g->op_count) return false;
    g->cursor->op = g->ops[*g->taken];
    return true;
}

/* Whether the slot of the op still names the frame, which then is damaged. */
static bool is_still(const struct gather *g, uint64_t op, uint64_t lsn) {
    struct mw_slot slot;
    return mw_slot_load(g->slots, g->slot_count, op, &slot) == 0 && slot.lsn == lsn;
}

static void put(struct gather *g, const struct mw_segment_ref *ref, uint64_t row, const struct mw_frame *f) {
    uint64_t i = g->count;
    struct mw_columns *out = g->out;
    out->op[i] = f->op;
    out->start[i] = MW_PAGE_BYTES + (f->lsn - ref->base_lsn) + MW_FRAME_BYTES;
    out->end[i] = out->start[i] + f->length;
    out->lsn[i] = f->lsn;
    out->timestamp_ns[i] = f->timestamp_ns;
    out->segment[i] = (uint32_t)row;
    out->checksum[i] = f->payload_crc;
    out->kind[i] = f->kind;
    if (row != out->segment[0]) g->cursor->uniform = 0;
    g->count = i + 1;
}

/* Adds a row, or none where nothing lives. */
static int take(struct gather *g) {
    uint64_t op = g->cursor->op;
    for (;;) {
        struct mw_slot slot;
        g->cursor->lsn = 0; /* in no segment: if it is the index that fails */
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
        int rc = mw_slot_load(g->slots, g->slot_count, op, &slot);
        if (rc != 0) return rc == MW_E_MISSING ? 0 : rc;
        g->cursor->lsn = slot.lsn;
        uint64_t row = find(g, slot.lsn);
        const struct mw_segment_ref *ref = row == UINT64_MAX ? NULL : &g->table->refs[row];
        if (ref == NULL || ref->frames == NULL) {
            g->cursor->segment = (uint32_t)row;
            return MW_E_TABLE;
        }
        struct mw_frame f;
        rc = check(ref, &slot, &f);
        if (rc == 0 && g->verify) rc = check_sums(ref, &f);
        if (rc == 0) {
            put(g, ref, row, &f);
            return 0;
        }
        if (is_still(g, op, slot.lsn)) return rc;
    }
}

static int gather(void *arg) {
    struct gather *g = arg;
    while (g->count < g->max && more(g)) {
        int rc = take(g);
        if (rc != 0) return rc;
        ++*position(g);
        __atomic_signal_fence(__ATOMIC_SEQ_CST); /* in its place, should the disk fail at the next one */
    }
    return 0;
}

/* What start[0] and end[0] say of all rows when each payload begins so far behind the one before; or 0. */
static uint64_t stride_of(const struct gather *g) {
    const struct mw_columns *out = g->out;
    if (g->count == 0 || !g->cursor->uniform) return 0;
    uint64_t length = out->end[0] - out->start[0], least = mw_frame_bytes(length);
    uint64_t stride = g->count > 1 ? out->start[1] - out->start[0] : least;
    if (stride < least || stride > INT64_MAX) return 0; /* above: the second one lies before the first */
    for (uint64_t i = 1; i < g->count; i++)
        if (out->start[i] - out->start[i - 1] != stride || out->end[i] - out->start[i] != length) return 0;
    return stride;
}

int64_t mw_gather(const struct mw_slot *slots, uint64_t slot_count, const struct mw_table *table,
                  struct mw_cursor *cursor, const uint64_t *ops, uint64_t op_count, uint64_t *taken,
                  struct mw_columns *out, uint64_t max, int verify) {
    struct gather g = {.slots = slots, .slot_count = slot_count, .table = table, .cursor = cursor, .ops = ops,
                       .op_count = op_count, .taken = taken, .out = out, .max = max, .verify = verify};
    cursor->uniform = 1;
    int rc = mw_guarded(gather, &g);
    cursor->stride = stride_of(&g);
    return rc < 0 && g.count == 0 ? rc : (int64_t)g.count; /* what was taken first; the error comes again */
}

struct check_one {
    struct mw_segment_ref ref;
    struct mw_slot slot;
    struct mw_frame *header;
    void *to;
    uint64_t to_bytes;
};

static int check_one(void *arg) {
    struct check_one *c = arg;
    struct mw_frame *f = c->header;
    uint64_t at = c->slot.lsn - c->ref.base_lsn;
    if (at >= c->ref.capacity || c->ref.capacity - at < MW_FRAME_BYTES) return MW_E_CORRUPT;
    memcpy(&c->slot.length, c->ref.frames + at + offsetof(struct mw_frame, length), 4);
    int rc = check(&c->ref, &c->slot, f);
    if (rc != 0) return rc;
    if (c->to == NULL) return check_sums(&c->ref, f);
    if (f->length != c->to_bytes) return MW_E_CORRUPT;
    memcpy(c->to, c->ref.frames + at + MW_FRAME_BYTES, f->length);
    if (f->header_crc != mw_frame_crc(f, c->ref.salt)) return MW_E_CORRUPT;
    return f->payload_crc == mw_crc32c(0, c->to, f->length) ? 0 : MW_E_CORRUPT; /* of the copy */
}

int mw_check_frame(const uint8_t *frames, uint64_t base_lsn, uint64_t capacity, uint32_t salt,
                   uint64_t lsn, uint64_t op, struct mw_frame *header, void *to, uint64_t to_bytes) {
    struct check_one c = {{base_lsn, capacity, frames, salt}, {.lsn = lsn, .op = op}, header, to, to_bytes};
    return mw_guarded(check_one, &c);
}
