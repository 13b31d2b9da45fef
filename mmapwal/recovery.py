"""What an open finds: a torn tail, which is cut, or damage, which is refused. Evidence decides.

One sync covers many frames, and sectors reach the disk in any order, so a good frame behind a bad one
is a normal crash above the durable LSN, and damage of acknowledged data below it. *Proven* is the
highest LSN below which all is known to have been durable: told by any good frame (its durable LSN), the
start of the epoch, an end LSN, a removal, the seal, the index page. The *tail* is where the last whole
batch of the unbroken chain ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.errors import CorruptionError
from mmapwal.index import rebuilt_slots
from mmapwal.segment import MAPPINGS_MAX, Segment, SegmentTable, make_segment, native_scan, scan_fields
from mmapwal.storage import Directory
from mmapwal.superblock import SegmentRecord, Superblock

__all__ = ["TABLE", "Finding", "RecoveryReport", "RecoveryRow", "Scanned", "decide", "scan_journal"]

Progress = Callable[[int, int], None]

STOP_REASONS = {
    lib.MW_STOP_BLANK: "nothing was written here",
    lib.MW_STOP_HEADER: "the checksum of the frame's header is wrong",
    lib.MW_STOP_PLACE: "a frame of another place",
    lib.MW_STOP_LINK: "the frame does not follow the one before it",
    lib.MW_STOP_OLD_EPOCH: "the frame was left behind by a cut",
    lib.MW_STOP_FUTURE_EPOCH: "the frame is of a later epoch than the superblock",
    lib.MW_STOP_LENGTH: "the frame's length goes beyond the segment",
    lib.MW_STOP_PAYLOAD: "the checksum of the payload is wrong",
    lib.MW_STOP_TYPE: "the frame is of a type that this version does not know",
    lib.MW_STOP_CONFLICT: "two live ops want the same slot",
}


class RecoveryRow(Enum):
    """The row of the decision table that an open met."""

    CREATED = "created"
    SEALED = "sealed"  # a clean close: index believed, nothing scanned
    CLEAN = "clean"  # the chain ends in blank space
    UNFINISHED = "unfinished batch"  # a batch without its last frame: cut
    TORN = "torn tail"  # a bad frame, nothing proven beyond the tail: cut
    LOST = "acknowledged data lost"  # something beyond the tail was durable: refused
    FUTURE = "superblock older than the frames"  # refused
    CONFLICT = "two live ops in one slot"  # refused


@dataclass(frozen=True, slots=True)
class Finding:
    """What the scan saw, reduced to what decides."""

    stop: int  # enum mw_stop
    batch_open: bool
    proven_beyond_tail: bool
    future_epoch: bool

    @property
    def is_future(self) -> bool:
        return self.future_epoch or bool(self.stop == lib.MW_STOP_FUTURE_EPOCH)

    @property
    def is_conflict(self) -> bool:
        return bool(self.stop == lib.MW_STOP_CONFLICT)

    @property
    def is_blank(self) -> bool:
        """The scan ended without a bad frame: blank space, the seal, or the end of the last segment."""
        return self.stop in {lib.MW_STOP_BLANK, lib.MW_STOP_LIMIT, lib.MW_STOP_END, lib.MW_STOP_NONE}


# Exactly one row holds for any finding; tests/unit/test_recovery.py tries them all.
TABLE: tuple[tuple[RecoveryRow, Callable[[Finding], bool]], ...] = (
    (RecoveryRow.FUTURE, lambda f: f.is_future),
    (RecoveryRow.CONFLICT, lambda f: not f.is_future and f.is_conflict),
    (RecoveryRow.LOST, lambda f: not f.is_future and not f.is_conflict and f.proven_beyond_tail),
    (
        RecoveryRow.CLEAN,
        lambda f: not f.is_future and f.is_blank and not f.proven_beyond_tail and not f.batch_open,
    ),
    (
        RecoveryRow.UNFINISHED,
        lambda f: not f.is_future and f.is_blank and not f.proven_beyond_tail and f.batch_open,
    ),
    (
        RecoveryRow.TORN,
        lambda f: not f.is_future and not f.is_conflict and not f.is_blank and not f.proven_beyond_tail,
    ),
)
REFUSED = {RecoveryRow.FUTURE, RecoveryRow.CONFLICT, RecoveryRow.LOST}


def decide(finding: Finding) -> RecoveryRow:
    return next(row for row, holds in TABLE if holds(finding))


@dataclass(slots=True)
class RecoveryReport:
    """What an open found and did. Sizes in bytes, times in seconds by step."""

    outcome: RecoveryRow = RecoveryRow.CREATED
    frames: int = 0
    entries: int = 0
    scanned_bytes: int = 0
    tail_lsn: int = 0
    proven_lsn: int = 0
    cut_bytes: int = 0
    rewritten_bytes: int = 0
    removed_files: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Scanned:
    """The journal as its segments tell it."""

    slots: npt.NDArray[Any] | None
    tail_lsn: int
    link: int
    tail_row: int = -1  # of the segment table; -1: behind the last segment
    stop: int = 0
    stop_lsn: int = 0
    stop_op: int | None = None
    proven_lsn: int = 0
    future_epoch: bool = False
    frames: int = 0
    entries: int = 0
    hidden: int = 0
    scanned_bytes: int = 0
    torn_bytes: int = 0  # good frames behind the stop
    ends: dict[int, int] = field(default_factory=dict)

    @property
    def finding(self) -> Finding:
        return Finding(
            stop=self.stop,
            batch_open=self.stop_lsn != self.tail_lsn,
            proven_beyond_tail=self.proven_lsn > self.tail_lsn,
            future_epoch=self.future_epoch,
        )


def removal_rows(superblock: Superblock) -> Any:
    """The removals as C reads them."""
    rows = ffi.new("struct mw_removal[]", max(1, len(superblock.removals)))
    for row, removal in zip(rows, superblock.removals, strict=False):
        row.first, row.last, row.below_lsn = removal.first, removal.last, removal.below_lsn
    return rows


def _superblock_proof(superblock: Superblock) -> int:
    return max(
        superblock.epoch_start_lsn,
        superblock.seal.lsn if superblock.seal is not None else 0,
        *(s.end_lsn for s in superblock.segments),
        *(r.below_lsn for r in superblock.removals),
    )


def scan_journal(
    table: SegmentTable,
    superblock: Superblock,
    index_durable_lsn: int,
    progress: Progress | None = None,
) -> Scanned:
    """Reads and checks every frame of every segment, and rebuilds the slots in private memory.

    OSError when the disk fails. Changes nothing.
    """
    slots = rebuilt_slots(superblock.slot_count)
    found = Scanned(slots, superblock.next_base_lsn, 0)
    found.stop_lsn = found.tail_lsn
    found.proven_lsn = max(_superblock_proof(superblock), index_durable_lsn)
    rows = removal_rows(superblock)
    total = sum(s.record.capacity for s in table.segments)
    done = last_epoch = 0
    stopped = False
    for number, segment in enumerate(table.segments):
        record = segment.record
        lib.mw_populate(ffi.cast("void *", segment.frames - fmt.PAGE_BYTES), len(segment.view), 0)
        scan = scan_fields(
            frames=segment.frames, base_lsn=record.base_lsn, capacity=record.capacity,
            epoch=superblock.epoch, epoch_start_lsn=superblock.epoch_start_lsn,
            watermark=superblock.watermark, removals=rows, removal_count=len(superblock.removals),
            slots=ffi.cast("struct mw_slot *", ffi.from_buffer(slots)), slot_count=len(slots),
            salt=segment.salt, link=segment.salt, lsn=record.base_lsn, last_epoch=last_epoch,
        )  # fmt: skip
        if superblock.seal is not None:
            scan.limit_lsn = superblock.seal.lsn
        if not stopped:
            native_scan(scan, record.name)
            _take(found, scan, number, segment)
            last_epoch = scan.last_epoch
            if scan.stop == lib.MW_STOP_END:
                found.ends[record.id] = int(scan.lsn)
                found.tail_lsn = found.stop_lsn = record.next_base_lsn
                found.tail_row = -1
            else:
                stopped = True
        if stopped and scan.lsn < record.next_base_lsn and superblock.seal is None:
            _hunt(found, scan, record.name)
        if len(table.segments) > MAPPINGS_MAX:
            segment.unmap()
        done += record.capacity
        if progress is not None:
            progress(done, total)
    return found


def _take(found: Scanned, scan: Any, number: int, segment: Segment) -> None:
    found.stop, found.stop_lsn, found.stop_op = int(scan.stop), int(scan.lsn), int(scan.op) or None
    found.tail_lsn, found.link, found.tail_row = int(scan.batch_lsn), int(scan.batch_link), number
    found.frames += int(scan.frame_count)
    found.entries += int(scan.entry_count)
    found.hidden += int(scan.hidden_count)
    found.scanned_bytes += int(scan.lsn) - segment.record.base_lsn
    found.proven_lsn = max(found.proven_lsn, int(scan.durable_lsn))


def _hunt(found: Scanned, scan: Any, name: str) -> None:
    """Looks behind the stop for good frames, and for what they say was durable."""
    native_scan(scan, name, hunt=True)
    found.proven_lsn = max(found.proven_lsn, int(scan.durable_lsn))
    found.torn_bytes += int(scan.frame_count) * fmt.FRAME_BYTES
    found.future_epoch |= scan.stop == lib.MW_STOP_FUTURE_EPOCH


def refuse(row: RecoveryRow, found: Scanned, table: SegmentTable) -> CorruptionError:
    """The error of a refused open: the place where the chain ends, and what proves that it went on."""
    number = table.row(found.stop_lsn)
    record = table.segments[number].record if number >= 0 else None
    reason = STOP_REASONS.get(found.stop, "the journal ends here")
    if row is RecoveryRow.LOST:
        reason += f", but all below LSN {found.proven_lsn} had been durable"
    elif row is RecoveryRow.FUTURE:
        reason = "frames of a later epoch than the superblock's: it is older than they are"
    return CorruptionError(
        record.name if record is not None else fmt.SUPERBLOCK_NAME,
        fmt.PAGE_BYTES + found.stop_lsn - record.base_lsn if record is not None else 0,
        found.stop_lsn,
        found.stop_op,
        reason,
    )


def rewrite_unproven(
    directory: Directory, table: SegmentTable, superblock: Superblock, found: Scanned
) -> tuple[dict[int, SegmentRecord], int]:
    """Writes all between what is proven and the tail once more, and syncs it: the page cache may show
    what the disk lost. Returns the segments that became new generations, by id, and the bytes.

    A copy is taken and checked first. In place, since the bytes are the same; where commits do not
    share sectors (align_bytes), as a new generation, since what is overwritten may be torn. OSError or
    CorruptionError: nothing acknowledged was harmed, and the next open does it again.
    """
    renewed: dict[int, SegmentRecord] = {}
    total = 0
    for segment in table.segments:
        record = segment.record
        # A gap may lie over the place below which all is proven: no frame starts there.
        whole = superblock.align_bytes or record.generation > 0
        start = record.base_lsn if whole else max(record.base_lsn, found.proven_lsn)
        end = min(found.ends.get(record.id, found.tail_lsn), found.tail_lsn)
        if end <= start or end <= found.proven_lsn:
            continue
        at = fmt.PAGE_BYTES + start - record.base_lsn
        copy = bytearray(end - start)
        source = ffi.cast("const uint8_t *", segment.frames) + (start - record.base_lsn)
        rc = lib.mw_copy_guarded(ffi.from_buffer(copy), source, len(copy))
        if rc < 0:
            raise OSError(-rc, "reading the segment failed", record.name)
        _check_copy(copy, start, segment, superblock)
        if superblock.align_bytes:
            new = replace(record, generation=record.generation + 1)
            make_segment(directory, superblock.uuid, new, [(at, copy)])
            renewed[record.id] = new
        else:
            storage = directory.open(record.name, writable=True)
            try:
                storage.write_at(at, copy)
                storage.sync()
            finally:
                storage.close()
        total += len(copy)
    return renewed, total


def _check_copy(copy: bytearray, start: int, segment: Segment, superblock: Superblock) -> None:
    first = np.frombuffer(copy, fmt.FRAME, 1)[0]
    scan = scan_fields(
        frames=ffi.from_buffer(copy), base_lsn=start, capacity=len(copy), limit_lsn=start + len(copy),
        epoch=superblock.epoch, epoch_start_lsn=superblock.epoch_start_lsn,
        watermark=0, salt=segment.salt, link=int(first["link"]), lsn=start,
    )  # fmt: skip
    native_scan(scan, segment.record.name)
    if scan.stop not in {lib.MW_STOP_LIMIT, lib.MW_STOP_END} or scan.lsn != start + len(copy):
        raise CorruptionError(
            segment.record.name, fmt.PAGE_BYTES + int(scan.lsn) - segment.record.base_lsn, int(scan.lsn),
            None, "the segment changed while it was read",
        )  # fmt: skip


class Stopwatch:
    """The time that each step of an open took."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self._seconds[step] = self._seconds.get(step, 0.0) + now - self._last
        self._last = now
