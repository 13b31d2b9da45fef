/* The mapped index: the ring of slots and the progress that its first page publishes. Stores come
 * from whoever holds the writer's mutex; loads from any thread or process at any time. A slot's LSN
 * is its sequence lock: zeroed before the other fields change, stored after them. */
#include <errno.h>
#include <string.h>

#include "mmapwal.h"

#define LOAD(p) __atomic_load_n(&(p), __ATOMIC_RELAXED)
#define STORE(p, v) __atomic_store_n(&(p), v, __ATOMIC_RELAXED)

void mw_slot_store(struct mw_slot *slot, const struct mw_frame *f) {
    STORE(slot->lsn, 0);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    STORE(slot->op, f->op);
    STORE(slot->timestamp_ns, f->timestamp_ns);
    STORE(slot->length, f->length);
    STORE(slot->kind, f->kind);
    __atomic_store_n(&slot->lsn, f->lsn, __ATOMIC_RELEASE);
}

void mw_slot_empty(struct mw_slot *slot) { __atomic_store_n(&slot->lsn, 0, __ATOMIC_RELEASE); }

static int load(const struct mw_slot *slot, struct mw_slot *out) {
    out->lsn = __atomic_load_n(&slot->lsn, __ATOMIC_ACQUIRE);
    out->op = LOAD(slot->op);
    out->timestamp_ns = LOAD(slot->timestamp_ns);
    out->length = LOAD(slot->length);
    out->kind = LOAD(slot->kind);
    out->reserved = 0;
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return LOAD(slot->lsn) == out->lsn;
}

struct ring {
    const struct mw_slot *slots;
    struct mw_slot *to;
    uint64_t slot_count;
    uint64_t op;
    struct mw_slot *found;
    struct mw_summary *summary;
};

int mw_slot_load(const struct mw_slot *slots, uint64_t slot_count, uint64_t op, struct mw_slot *out) {
    const struct mw_slot *slot = &slots[op % slot_count];
    while (!load(slot, out)) {
    }
    return out->lsn != 0 && out->op == op ? 0 : MW_E_MISSING;
}

static int lookup(void *arg) {
    struct ring *r = arg;
    return mw_slot_load(r->slots, r->slot_count, r->op, r->found);
}

int mw_lookup(const struct mw_slot *slots, uint64_t slot_count, uint64_t op, struct mw_slot *out) {
    struct ring r = {.slots = slots, .slot_count = slot_count, .op = op, .found = out};
    return mw_guarded(lookup, &r);
}

static int clear(void *arg) {
    struct ring *r = arg;
    memset(r->to, 0, r->slot_count * sizeof *r->to);
    return 0;
}

int mw_slots_clear(struct mw_slot *slots, uint64_t slot_count) {
    struct ring r = {.to = slots, .slot_count = slot_count};
    return mw_guarded(clear, &r);
}

static void count_slot(struct mw_summary *sum, uint64_t op) {
    sum->live++;
    if (op < sum->first_op) sum->first_op = op;
    if (op > sum->last_op) sum->last_op = op;
}

static int summarise(void *arg) {
    struct ring *r = arg;
    struct mw_summary sum = {0, UINT64_MAX, 0};
    for (uint64_t i = 0; i < r->slot_count; i++)
        if (r->slots[i].lsn != 0) count_slot(&sum, r->slots[i].op);
    if (sum.live == 0) sum.first_op = 0;
    *r->summary = sum;
    return 0;
}

/* Not against concurrent stores: the caller holds the mutex, or no writer exists yet. */
int mw_slots_summary(const struct mw_slot *slots, uint64_t slot_count, struct mw_summary *out) {
    struct ring r = {.slots = slots, .slot_count = slot_count, .summary = out};
    return mw_guarded(summarise, &r);
}

static int copy_slots(void *arg) {
    struct ring *r = arg;
    for (uint64_t i = 0; i < r->slot_count; i++)
        while (!load(&r->slots[i], &r->to[i])) {
        }
    return 0;
}

int mw_slots_copy(struct mw_slot *to, const struct mw_slot *from, uint64_t slot_count) {
    struct ring r = {.slots = from, .to = to, .slot_count = slot_count};
    return mw_guarded(copy_slots, &r);
}

struct merge {
    struct mw_slot *to;
    const struct mw_slot *older, *newer;
    uint64_t count;
    struct mw_summary *summary;
};

static int merge(void *arg) {
    struct merge *m = arg;
    struct mw_summary sum = *m->summary;
    if (sum.live == 0) sum.first_op = UINT64_MAX;
    for (uint64_t i = 0; i < m->count; i++) {
        const struct mw_slot slot = m->newer[i].lsn != 0 ? m->newer[i] : m->older[i];
        m->to[i] = slot;
        if (slot.lsn != 0) count_slot(&sum, slot.op);
    }
    if (sum.live == 0) sum.first_op = 0;
    *m->summary = sum;
    return 0;
}

/* All in private memory. The summary is added to; zeros at first. */
int mw_slots_merge(struct mw_slot *to, const struct mw_slot *older, const struct mw_slot *newer,
                   uint64_t count, struct mw_summary *summary) {
    struct merge m = {to, older, newer, count, summary};
    return mw_guarded(merge, &m);
}

/* Both in private memory. */
int mw_slots_clash(const struct mw_slot *older, const struct mw_slot *newer, uint64_t slot_count) {
    for (uint64_t i = 0; i < slot_count; i++)
        if (older[i].lsn != 0 && newer[i].lsn != 0 && older[i].op != newer[i].op) return 1;
    return 0;
}

static uint32_t progress_check(const struct mw_index_header *page, const struct mw_progress *p) {
    return mw_crc32c(page->salt, p, offsetof(struct mw_progress, check));
}

/* Others look meanwhile, so a word at a time; of what they see half done the check is wrong. */
static void copy_progress(struct mw_progress *to, const struct mw_progress *from) {
    typedef uint64_t __attribute__((may_alias)) word;
    word *t = (word *)to;
    const word *f = (const word *)from;
    for (size_t i = 0; i < sizeof *to / sizeof *t; i++) STORE(t[i], LOAD(f[i]));
}

void mw_progress_store(struct mw_index_header *page, uint64_t written_lsn, uint64_t durable_lsn,
                       uint64_t watermark) {
    uint32_t sequence = page->wake + 1;
    struct mw_progress *to = &page->progress[sequence & 1];
    struct mw_progress p = {written_lsn, durable_lsn, watermark, sequence, 0};
    p.check = progress_check(page, &p);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    copy_progress(to, &p);
    mw_followers_wake(page, sequence);
}

static int read_both(const struct mw_index_header *page, struct mw_progress *out) {
    int found = 0;
    for (int i = 0; i < 2; i++) {
        struct mw_progress p;
        copy_progress(&p, &page->progress[i]);
        if (p.check != progress_check(page, &p) || p.durable_lsn > p.written_lsn) continue;
        if (!found || (int32_t)(p.sequence - out->sequence) > 0) *out = p;
        found = 1;
    }
    return found;
}

/* Publications may come between the looks at the two: the one is of before them, the other half done. Then what is
 * found is older than the word says behind the look, and the word is another one than before it. */
int mw_progress_look(const struct mw_index_header *page, struct mw_progress *out) {
    for (;;) {
        uint32_t before = __atomic_load_n(&page->wake, __ATOMIC_ACQUIRE);
        int found = read_both(page, out);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        uint32_t behind = LOAD(page->wake);
        if (found && (int32_t)(out->sequence - behind) >= 0) return 0;
        if (behind == before) return found ? 0 : MW_E_MISSING; /* what a crash has left */
    }
}

struct progress {
    const struct mw_index_header *page;
    struct mw_progress *out;
};

static int read_progress(void *arg) {
    struct progress *r = arg;
    return mw_progress_look(r->page, r->out);
}

/* The newer of the two, no older than any that this process was told of: the other may be of a life before, of which
 * the end was lost. MW_E_MISSING when neither verifies. */
int mw_progress_read(const struct mw_index_header *page, struct mw_progress *out) {
    struct progress r = {page, out};
    return mw_guarded(read_progress, &r);
}
