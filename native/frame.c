/* One frame: its length, and the frame that stands for removed ones. */
#include <string.h>

#include "mmapwal.h"

uint64_t mw_frame_bytes(uint64_t payload_bytes) {
    return (MW_FRAME_BYTES + payload_bytes + MW_ALIGN - 1) & ~(uint64_t)(MW_ALIGN - 1);
}

bool mw_frame_hidden(const struct mw_removal *removals, uint32_t count, uint64_t op, uint64_t lsn) {
    for (uint32_t i = 0; i < count; i++)
        if (op >= removals[i].first && op <= removals[i].last && lsn < removals[i].below_lsn) return true;
    return false;
}

/* `last` is the last frame that the gap stands for; it may be a gap itself. */
void mw_make_gap(struct mw_frame *gap, const struct mw_frame *last, uint64_t lsn, uint64_t bytes,
                 uint32_t link, uint32_t salt) {
    memset(gap, 0, sizeof *gap);
    gap->payload_crc = last->type == MW_GAP ? last->payload_crc : last->header_crc;
    gap->lsn = lsn;
    gap->durable_lsn = last->durable_lsn;
    gap->length = (uint32_t)(bytes - MW_FRAME_BYTES);
    gap->link = link;
    gap->epoch = last->epoch;
    gap->type = MW_GAP;
    gap->flags = last->flags & MW_FLAG_MORE;
    gap->header_crc = mw_frame_crc(gap, salt);
}
