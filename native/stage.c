/* Staging: an entry is checked against what lives, given its place, and copied. Nothing is written. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "writer.h"

#define OP_MAX ((uint64_t)INT64_MAX)
#define KIND_MAX 0x7fff

int check_sound(const struct mw_writer *w) { return w->poison_stage != MW_STAGE_NONE ? MW_E_POISONED : 0; }

int check_usable(const struct mw_writer *w) { return w->closed ? MW_E_CLOSED : check_sound(w); }

static bool is_pending(const struct mw_writer *w, uint64_t slot) {
    return (w->pending[slot / 8] >> (slot % 8) & 1) != 0;
}

/* The staged entry that wants this slot. Only where the bit is set, so the walk is rare. */
static uint64_t pending_op(const struct mw_writer *w, uint64_t slot) {
    uint64_t found = 0;
    for (int i = 0; i < 2; i++) {
        const struct group *g = &w->groups[i];
        for (uint64_t at = 0; at < g->bytes;) {
            const struct mw_frame *f = frame_at(g, at);
            if (f->type == MW_ENTRY && f->op % w->config.slot_count == slot) found = f->op;
            at += mw_frame_bytes(f->length);
        }
    }
    return found;
}

static int admit_one(const struct mw_writer *w, uint64_t op, uint32_t flags) {
    if (op >= w->barrier_first && op <= w->barrier_last) return MW_E_BARRIER;
    if (op <= w->watermark) return MW_E_STALE;
    uint64_t slot = op % w->config.slot_count;
    const struct mw_slot *now = &w->config.slots[slot];
    if (now->lsn != 0 && now->op > w->watermark) {
        if (now->op != op) return MW_E_FULL;
        if (!(flags & MW_REPLACE)) return MW_E_DUPLICATE;
    }
    if (is_pending(w, slot)) {
        uint64_t staged = pending_op(w, slot);
        if (staged != 0 && staged != op) return MW_E_FULL;
        if (staged == op && !(flags & MW_REPLACE)) return MW_E_DUPLICATE;
    }
    return 0;
}

struct admit {
    struct mw_writer *w;
    uint64_t op, count;
    uint32_t flags;
};

static int admit(void *arg) {
    struct admit *a = arg;
    for (uint64_t i = 0; i < a->count; i++) {
        int rc = admit_one(a->w, a->op + i, a->flags);
        if (rc != 0) return rc;
    }
    return 0;
}

static int reserve(struct group *g, uint64_t bytes) {
    if (bytes <= g->room - g->bytes) return 0;
    uint64_t room = g->room != 0 ? g->room : 64 << 10;
    while (room - g->bytes < bytes) room *= 2;
    uint8_t *buffer = realloc(g->buffer, room);
    if (buffer == NULL) return -ENOMEM;
    g->buffer = buffer;
    g->room = room;
    return 0;
}

/* What must stay free behind the last entry of a segment: an END, and the padding before it. */
static uint64_t tail_reserve(const struct mw_writer *w) {
    uint64_t align = w->config.align_bytes;
    return MW_FRAME_BYTES + (align != 0 ? align + MW_FRAME_BYTES : 0);
}

static uint64_t stage_room(struct mw_writer *w) {
    if (w->target_end == w->tail_target) return 0;
    const struct mw_target *t = target_at(w, w->stage_target);
    return t->base_lsn + t->capacity - w->stage_lsn;
}

static struct part *open_part(struct mw_writer *w) {
    struct group *g = w->open;
    struct part *p = g->part_count > 0 ? &g->parts[g->part_count - 1] : NULL;
    if (p == NULL || p->target != w->stage_target) {
        p = &g->parts[g->part_count++];
        *p = (struct part){.target = w->stage_target, .lsn = w->stage_lsn, .from = g->bytes, .to = g->bytes};
    }
    return p;
}

static void put(struct mw_writer *w, const struct mw_frame *frame, const char *data) {
    struct part *p = open_part(w);
    struct group *g = w->open;
    struct mw_frame *f = frame_at(g, g->bytes);
    uint64_t bytes = mw_frame_bytes(frame->length);
    uint8_t *payload = g->buffer + g->bytes + MW_FRAME_BYTES;
    *f = *frame;
    f->lsn = w->stage_lsn;
    if (data != NULL) {
        memcpy(payload, data, frame->length);
        memset(payload + frame->length, 0, bytes - MW_FRAME_BYTES - frame->length);
    } else {
        memset(payload, 0, bytes - MW_FRAME_BYTES);
    }
    g->bytes += bytes;
    p->to = g->bytes;
    w->stage_lsn += bytes;
}

/* The segment is left: what is staged next goes to the one behind it. Room was reserved. */
static void put_end(struct mw_writer *w) {
    struct mw_frame f = {.type = MW_END};
    put(w, &f, NULL);
    w->open->parts[w->open->part_count - 1].ends = true;
    w->stage_target++;
    w->stage_lsn = target_at(w, w->stage_target)->base_lsn;
}

/* Two commits never share a sector: the group is filled up to the next boundary. Room was reserved. */
void align_stage(struct mw_writer *w) {
    uint64_t align = w->config.align_bytes;
    if (align == 0 || w->open->bytes == 0 || w->stage_lsn % align == 0) return;
    uint64_t bytes = align - w->stage_lsn % align;
    if (bytes < MW_FRAME_BYTES) bytes += align;
    struct mw_frame f = {.type = MW_PAD, .length = (uint32_t)(bytes - MW_FRAME_BYTES)};
    put(w, &f, NULL);
}

/* Makes `bytes` fit where the next frame is staged, which may be the next segment. */
static int place(struct mw_writer *w, uint64_t bytes) {
    uint64_t need = bytes + tail_reserve(w);
    if (need <= stage_room(w)) return 0;
    if (w->stage_target + 1 >= w->target_end) return MW_E_NEED_SEGMENT;
    if (need > target_at(w, w->stage_target + 1)->capacity) return MW_E_NEED_SEGMENT;
    int rc = reserve(w->open, MW_FRAME_BYTES + need);
    if (rc == 0) put_end(w);
    return rc;
}

/* Leaves the present segment although it is not full, so that it can be rewritten. */
int stage_end(struct mw_writer *w) {
    if (w->stage_target + 1 >= w->target_end) return MW_E_NEED_SEGMENT;
    int rc = reserve(w->open, tail_reserve(w));
    if (rc == 0) put_end(w);
    return rc;
}

bool segment_wanted(const struct mw_writer *w) {
    if (w->target_end == w->tail_target) return false; /* the first one is made by who needs it */
    if (w->target_end - w->stage_target > 1) return false;
    const struct mw_target *t = &w->targets[w->stage_target % TARGETS];
    return w->stage_lsn - t->base_lsn >= t->capacity / 2;
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Packed 64-bit numbers, at any address: they come as bytes of Python. */
static uint64_t length_at(const void *lengths, uint32_t flags, uint64_t i) {
    uint64_t length;
    memcpy(&length, (const char *)lengths + (flags & MW_EVEN ? 0 : i * sizeof length), sizeof length);
    return length;
}

static int sizes(const void *lengths, uint32_t flags, uint64_t count, uint64_t *bytes) {
    *bytes = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t length = length_at(lengths, flags, i);
        if (length > INT32_MAX) return MW_E_TOO_LARGE;
        *bytes += mw_frame_bytes(length);
        if (*bytes > INT32_MAX) return MW_E_TOO_LARGE;
    }
    return 0;
}

/* Stages `count` entries as one batch, or none of them. The first op, or an error. */
int64_t stage(struct mw_writer *w, const char *data, const void *lengths, const uint16_t *kinds,
              uint64_t count, int64_t op, int32_t kind, int64_t timestamp_ns, uint32_t flags) {
    int rc = check_usable(w);
    if (rc != 0) return rc;
    if (w->epoch_owed) return MW_E_NEED_EPOCH;
    if (kind < 0 || kind > KIND_MAX) return MW_E_BAD_KIND;
    for (uint64_t i = 0; kinds != NULL && i < count; i++)
        if (kinds[i] > KIND_MAX) return MW_E_BAD_KIND;
    uint64_t high = w->high_op > w->watermark ? w->high_op : w->watermark;
    uint64_t first = op == 0 ? high + 1 : (uint64_t)op;
    if (op < 0 || count > OP_MAX || first > OP_MAX - (count - 1)) return MW_E_BAD_OP;
    if (count > w->config.slot_count) return MW_E_FULL;
    struct admit a = {w, first, count, flags};
    if ((rc = mw_guarded_unarmed(admit, &a)) != 0) return rc;
    uint64_t bytes;
    if ((rc = sizes(lengths, flags, count, &bytes)) != 0) return rc;
    if ((rc = place(w, bytes)) != 0 || (rc = reserve(w->open, bytes + tail_reserve(w))) != 0) return rc;
    if (flags & MW_NOW) timestamp_ns = now_ns();
    uint64_t from = w->open->bytes;
    for (uint64_t i = 0; i < count; i++) {
        uint32_t length = (uint32_t)length_at(lengths, flags, i);
        struct mw_frame f = {.op = first + i, .timestamp_ns = timestamp_ns, .length = length,
                             .kind = kinds != NULL ? kinds[i] : (uint16_t)kind, .type = MW_ENTRY,
                             .flags = i + 1 < count ? MW_FLAG_MORE : 0};
        put(w, &f, data);
        data += length;
        uint64_t slot = f.op % w->config.slot_count;
        w->pending[slot / 8] |= (uint8_t)(1u << slot % 8);
    }
    if (first + count - 1 > w->high_op) w->high_op = first + count - 1;
    if (w->config.durability == MW_BUFFERED) {
        struct group *g = w->open;
        rc = publish_group(w, g->buffer + from, g->buffer + g->bytes);
        if (rc != 0) {
            poison(w, MW_STAGE_INDEX, rc);
            return MW_E_POISONED;
        }
    }
    if (segment_wanted(w)) pthread_cond_signal(&w->wanted);
    return (int64_t)first;
}
