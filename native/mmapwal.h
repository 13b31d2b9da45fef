#ifndef MMAPWAL_H
#define MMAPWAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "api.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "mmapwal's format is little-endian"
#endif

_Static_assert(sizeof(struct mw_frame) == MW_FRAME_BYTES, "frame header");
_Static_assert(sizeof(struct mw_slot) == MW_SLOT_BYTES, "slot");
_Static_assert(sizeof(struct mw_segment_header) == 64, "segment header");
_Static_assert(sizeof(struct mw_progress) == 32, "progress");
_Static_assert(offsetof(struct mw_index_header, progress) == 64, "progress has its own cache line");
_Static_assert(sizeof(struct mw_index_header) <= 512, "the index header is within one sector");

#define MW_ALIGN 8u

static inline uint64_t monotonic_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Runs fn(arg); a SIGBUS in it ends it with -EIO. Arming looks whether the handler is still ours. */
int mw_guarded(int (*fn)(void *), void *arg);
int mw_guarded_unarmed(int (*fn)(void *), void *arg);
int mw_guard_arm(void);

bool mw_frame_hidden(const struct mw_removal *removals, uint32_t count, uint64_t op, uint64_t lsn);

/* Loads and stores in the mapped index: a guard is up, and who stores holds the writer's mutex. */
void mw_slot_store(struct mw_slot *slot, const struct mw_frame *frame);
int mw_slot_load(const struct mw_slot *slots, uint64_t slot_count, uint64_t op, struct mw_slot *out);
void mw_slot_empty(struct mw_slot *slot);
void mw_progress_store(struct mw_index_header *page, uint64_t written_lsn, uint64_t durable_lsn,
                       uint64_t watermark);
int mw_progress_look(const struct mw_index_header *page, struct mw_progress *out);
void mw_followers_wake(struct mw_index_header *page, uint32_t word);
void mw_take_next(const struct mw_index_header *page, struct mw_next *next);

#endif
