"""One walk over the frames of a segment, in C: what followers read, and what fills the slots of a reader."""

from __future__ import annotations

from typing import Any

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.errors import CorruptionError
from mmapwal.recovery import removal_rows
from mmapwal.segment import Segment
from mmapwal.superblock import Superblock

__all__ = ["Walk"]


class Walk:
    """Over a segment, as a superblock shows it. For one thread at a time. `fields`: of struct mw_walk."""

    def __init__(self, segment: Segment, superblock: Superblock, **fields: Any) -> None:
        self.segment, self.superblock = segment, superblock
        record = segment.record
        self._removals = removal_rows(superblock)
        self.native = ffi.new(
            "struct mw_walk *",
            {
                "base_lsn": record.base_lsn, "capacity": record.capacity, "salt": segment.salt,
                "watermark": superblock.watermark, "removals": self._removals,
                "removal_count": len(superblock.removals), **fields,
            },
        )  # fmt: skip

    def run(self, lsn: int, limit_lsn: int, out: Any = None, rows: int = 0) -> int:
        """From the frame at an LSN up to a limit, into the rows of `out` (struct mw_columns), or into slots
        that are among the fields: how many entries, also where error() is not None."""
        walk = self.native
        walk.frames = self.segment.frames  # of the mapping that there is now
        walk.lsn, walk.limit_lsn = lsn, limit_lsn
        count = int(lib.mw_walk(walk, ffi.NULL if out is None else out, rows))
        if count < 0:
            raise OSError(-count, "no place of a frame", self.segment.record.name)
        return count

    def error(self) -> CorruptionError | OSError | None:
        """Why the last run went no further, where that is an error."""
        walk, record = self.native, self.segment.record
        if walk.failed == lib.MW_E_CORRUPT:
            lsn = int(walk.lsn)
            offset = fmt.PAGE_BYTES + lsn - record.base_lsn
            return CorruptionError(
                record.name, offset, lsn, int(walk.op) or None, "the frame does not verify"
            )
        return OSError(-walk.failed, "reading the segment failed", record.name) if walk.failed else None
