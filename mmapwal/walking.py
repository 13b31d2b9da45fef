"""One walk over the frames of a segment, in C: what followers read, and what fills the slots of a reader."""

from __future__ import annotations

from typing import Any

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.errors import CorruptionError
from mmapwal.segment import Segment
from mmapwal.superblock import Superblock

__all__ = ["walk_error", "walk_frames"]


def walk_frames(
    segment: Segment, superblock: Superblock, removals: Any, /, *, lsn: int, limit_lsn: int,
    out: Any = None, rows: int = 0, **fields: Any,
) -> tuple[Any, int]:  # fmt: skip
    """From the frame at an LSN up to a limit, into the rows of `out` (struct mw_columns), or into slots that
    are among the other fields of struct mw_walk. (That struct, how many entries.) What went wrong,
    walk_error() says: what comes before it counts all the same."""
    record = segment.record
    walk = ffi.new(
        "struct mw_walk *",
        {
            "frames": segment.frames, "base_lsn": record.base_lsn, "capacity": record.capacity,
            "salt": segment.salt, "lsn": lsn, "limit_lsn": limit_lsn, "watermark": superblock.watermark,
            "removals": removals, "removal_count": len(superblock.removals), **fields,
        },
    )  # fmt: skip
    count = lib.mw_walk(walk, ffi.NULL if out is None else out, rows)
    if count < 0:
        raise OSError(-count, "no place of a frame", record.name)
    return walk, int(count)


def walk_error(segment: Segment, walk: Any) -> CorruptionError | OSError | None:
    """Why it went no further, where that is an error."""
    record, lsn = segment.record, int(walk.lsn)
    if walk.failed == lib.MW_E_CORRUPT:
        offset = fmt.PAGE_BYTES + lsn - record.base_lsn
        return CorruptionError(record.name, offset, lsn, int(walk.op) or None, "the frame does not verify")
    return OSError(-walk.failed, "reading the segment failed", record.name) if walk.failed else None
