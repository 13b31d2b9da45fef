/* The ways to compute a CRC32C, one of which is chosen when the library is loaded. Not complemented. */
#ifndef MMAPWAL_CRC32C_H
#define MMAPWAL_CRC32C_H

#include "mmapwal.h"

struct mw_crc32c_way {
    uint32_t (*one)(uint32_t crc, const uint8_t *p, uint64_t n); /* NULL: not on this processor */
    void (*many)(struct mw_sum *sums, uint64_t count);
    void (*frames)(uint32_t salt, const struct mw_frame *frames, uint64_t count, uint32_t *crcs);
};

/* Fills in `one` and `many` where the processor multiplies 256 bits without carry. */
void mw_crc32c_fold_way(struct mw_crc32c_way *way);

#endif
