/* The ways to compute a CRC32C, one of which is chosen when the library is loaded. Not complemented. */
#ifndef MMAPWAL_CRC32C_H
#define MMAPWAL_CRC32C_H

#include "mmapwal.h"

typedef uint32_t mw_crc32c_way(uint32_t crc, const uint8_t *p, uint64_t n);

/* By vectors of 256, and of 512, bits; untouched where the processor does not multiply them without carry. */
void mw_crc32c_fold_ways(mw_crc32c_way **fold, mw_crc32c_way **wide);

#endif
