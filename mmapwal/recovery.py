"""What an open finds: a torn tail, which is cut, or damage, which is refused. Evidence decides.

One sync covers many frames, and sectors reach the disk in any order, so a good frame behind a bad one
is a normal crash above the durable LSN, and damage of acknowledged data below it. *Proven* is the
highest LSN below which all is known to have been durable: told by any good frame (its durable LSN), the
start of the epoch, an end LSN, a removal, the seal, the index page. The *tail* is where the last whole
batch of the unbroken chain ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from enum import Enum
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.errors import CorruptionError
from mmapwal.index import rebuilt_slots, slot_pointer
from mmapwal.segment import MAPPINGS_MAX, Segment, SegmentTable, make_segment, native_scan, scan_fields
from mmapwal.storage import Directory
from mmapwal.superblock import SegmentRecord, Superblock
from mmapwal.threads import SecondThread

__all__ = ["TABLE", "Finding", "RecoveryReport", "RecoveryRow", "Scanned", "decide", "scan_journal"]

Progress = Callable[[int, int], None]

SPLIT_MIN_BYTES = 8 << 20  # below it a second thread takes longer to start than it saves

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
    lib.MW_STOP_OP: "the frame's op is none that a journal has",
}


class RecoveryRow(Enum):
    """The row of the decision table that an open met."""

    CREATED = "created"
    OBSERVED = "observed"  # readonly: nothing was recovered
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
    """What an open found and did. After a clean close nothing is scanned, and all counts are 0."""

    outcome: RecoveryRow = RecoveryRow.CREATED
    """Which case it met."""
    frames: int = 0
    """How many were read and checked."""
    entries: int = 0
    """How many of them are entries, removed ones too."""
    scanned_bytes: int = 0
    tail_lsn: int = 0
    """Where the journal ends."""
    proven_lsn: int = 0
    """All below it had been durable, as far as the files tell."""
    cut_bytes: int = 0
    """What was left out behind the tail: an append that nobody was told of."""
    rewritten_bytes: int = 0
    """What lay between proven and tail, written and synced once more."""
    removed_files: tuple[str, ...] = ()
    """Names of files that a crash had left behind, and nothing needs."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By step, in the order in which they were done."""


@dataclass(slots=True)
class Scanned:
    """The journal as its segments tell it."""

    slots: tuple[npt.NDArray[Any], ...]  # oldest first, the later ones win; none: the index is believed
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


class _Telling:
    """Tells a progress callback how many bytes are done, never fewer than before."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._told = 0

    def __call__(self, done: int) -> None:
        if self._progress is not None and done > self._told:
            self._told = done
            self._progress(done, self._total)


class _Run:
    """Neighbouring segments, scanned one behind the other into slots of their own."""

    def __init__(self, table: SegmentTable, rows: range, superblock: Superblock, proven_lsn: int) -> None:
        self.found = Scanned((rebuilt_slots(superblock.slot_count),), superblock.next_base_lsn, 0)
        self.found.stop_lsn = self.found.tail_lsn
        self.found.proven_lsn = proven_lsn
        self.stopped = self.cancelled = False
        self.done_bytes = self.first_epoch = self.last_epoch = self.first_op = self.last_op = 0
        self._rows, self._superblock = rows, superblock
        self._segments = table.segments
        self._removals = removal_rows(superblock)
        self._unmaps = len(table.segments) > MAPPINGS_MAX

    def scan(self, tell: Callable[[int], None], before: Callable[[int], object] = lambda row: None) -> None:
        """`before` is called with each row before its segment is looked at. OSError when the disk fails."""
        for row in self._rows:
            if self.cancelled:
                return
            before(row)
            segment = self._segments[row]
            self._scan_segment(row, segment)
            if self._unmaps:
                segment.unmap()
            self.done_bytes += segment.record.capacity
            tell(self.done_bytes)

    def _scan_segment(self, row: int, segment: Segment) -> None:
        record, superblock, found = segment.record, self._superblock, self.found
        (slots,) = found.slots
        scan = scan_fields(
            frames=segment.frames, base_lsn=record.base_lsn, capacity=record.capacity,
            epoch=superblock.epoch, epoch_start_lsn=superblock.epoch_start_lsn,
            watermark=superblock.watermark, removals=self._removals,
            removal_count=len(superblock.removals), slots=slot_pointer(slots), slot_count=len(slots),
            salt=segment.salt, link=segment.salt, lsn=record.base_lsn, last_epoch=self.last_epoch,
            first_op=self.first_op, last_op=self.last_op, align_bytes=superblock.align_bytes,
            durable_lsn=found.proven_lsn,
        )  # fmt: skip
        if superblock.seal is not None:
            scan.limit_lsn = superblock.seal.lsn
        if not self.stopped:
            native_scan(scan, record.name)
            if found.frames == 0:
                self.first_epoch = int(scan.first_epoch)
            _take(found, scan, row, segment)
            self.last_epoch = int(scan.last_epoch)
            self.first_op, self.last_op = int(scan.first_op), int(scan.last_op)
            if scan.stop == lib.MW_STOP_END:
                found.ends[record.id] = int(scan.lsn)
                found.tail_lsn = found.stop_lsn = record.next_base_lsn
                found.tail_row = -1
            else:
                self.stopped = True
        if self.stopped and scan.lsn < record.next_base_lsn and superblock.seal is None:
            _hunt(found, scan, record.name)


def scan_journal(
    table: SegmentTable,
    superblock: Superblock,
    index_durable_lsn: int,
    progress: Progress | None = None,
    threads: int = 1,
) -> Scanned:
    """Reads and checks every frame of every segment, and rebuilds the slots in private memory: 32 bytes
    a slot for each thread, of which there are two at most.

    `progress` is called on the caller's thread. OSError when the disk fails. Changes nothing.
    """
    proven = max(superblock.proven_lsn, index_durable_lsn)
    segments = table.segments
    total = sum(s.record.capacity for s in segments)
    tell = _Telling(progress, total)
    ahead = False
    if threads > 1 and total >= SPLIT_MIN_BYTES and len(segments) <= MAPPINGS_MAX:
        for segment in segments:
            segment.view  # noqa: B018  # maps it: files are opened by one thread, in order
        ahead = not is_resident(segments)
        row = 0 if ahead else split_row(table, proven)
        found = _scan_split(table, row, superblock, proven, tell) if row > 0 else None
        if found is not None:
            return found
    run = _Run(table, range(len(segments)), superblock, proven)
    if ahead:
        _scan_behind(run, segments, tell)
    else:
        run.scan(tell)
    return run.found


def is_resident(segments: tuple[Segment, ...]) -> bool:
    """Whether the page cache has them, as far as a few looks tell."""
    return all(lib.mw_resident(*_mapping(s)) for s in segments)


def _mapping(segment: Segment) -> tuple[Any, int]:
    return ffi.cast("void *", segment.frames - fmt.PAGE_BYTES), len(segment.view)


def _scan_behind(run: _Run, segments: tuple[Segment, ...], tell: _Telling) -> None:
    """The disk is the limit: one thread reads ahead, from the first byte to the last, and one checks."""
    with SecondThread("recovery") as second:
        read = [second.submit(lib.mw_populate, *(*_mapping(s), 0)) for s in segments]
        # Whether a read worked is no matter here: the check of the same bytes tells what the disk says.
        run.scan(tell, lambda row: wait([read[row]]))


def split_row(table: SegmentTable, proven_lsn: int) -> int:
    """Where the second thread begins: at half of the bytes, or before; 0 when one is enough.

    All before it is proven: a chain that breaks there is refused and never cut, so what the second thread
    reads counts whenever the journal opens.
    """
    total = sum(s.record.capacity for s in table.segments)
    row = done = 0
    for segment in table.segments[:-1]:
        done += segment.record.capacity
        if segment.record.next_base_lsn > proven_lsn or done * 2 > total + segment.record.capacity:
            break
        row += 1
    return row


def _scan_split(
    table: SegmentTable, row: int, superblock: Superblock, proven_lsn: int, tell: _Telling
) -> Scanned | None:
    """Two threads, one before the row and one from it on. None: they do not fit together, which only a
    journal that is refused can cause; one thread finds the place."""
    older = _Run(table, range(row), superblock, proven_lsn)
    newer = _Run(table, range(row, len(table.segments)), superblock, proven_lsn)
    steps: SimpleQueue[None] = SimpleQueue()
    with SecondThread("recovery") as thread:
        second = thread.submit(newer.scan, lambda _: steps.put(None))
        second.add_done_callback(lambda _: steps.put(None))
        try:
            older.scan(lambda done: tell(done + newer.done_bytes))
            while not older.stopped and not second.done():
                steps.get()
                tell(older.done_bytes + newer.done_bytes)
        finally:
            newer.cancelled = True
    if older.stopped:
        return None
    second.result()
    tell(older.done_bytes + newer.done_bytes)
    return _joined(older, newer)


def _joined(older: _Run, newer: _Run) -> Scanned | None:
    """What one thread would have found; None when the second one went on where that would have stopped."""
    found, before = newer.found, older.found
    if found.frames > 0 and newer.first_epoch < older.last_epoch:
        return None
    (old_slots,), (new_slots,) = before.slots, found.slots
    if older.last_op > 0 and newer.last_op > 0:
        ops = max(older.last_op, newer.last_op) - min(older.first_op, newer.first_op)
        # Ops closer to each other than there are slots cannot meet in one.
        if ops >= len(old_slots) and lib.mw_slots_clash(
            slot_pointer(old_slots), slot_pointer(new_slots), len(old_slots)
        ):
            return None
    found.slots = (old_slots, new_slots)
    found.frames += before.frames
    found.entries += before.entries
    found.hidden += before.hidden
    found.scanned_bytes += before.scanned_bytes
    found.proven_lsn = max(found.proven_lsn, before.proven_lsn)
    found.ends = before.ends | found.ends
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


def unproven(
    table: SegmentTable, superblock: Superblock, found: Scanned
) -> Iterator[tuple[Segment, int, int]]:
    """The segments with something between what is proven and the tail, and what is written again of each:
    from one LSN to another."""
    for segment in table.segments:
        record = segment.record
        # A gap may lie over the place below which all is proven: no frame starts there.
        whole = superblock.align_bytes or record.generation > 0
        start = record.base_lsn if whole else max(record.base_lsn, found.proven_lsn)
        end = min(found.ends.get(record.id, found.tail_lsn), found.tail_lsn)
        if start < end and found.proven_lsn < end:
            yield segment, start, end


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
    for segment, start, end in unproven(table, superblock, found):
        record = segment.record
        copy = checked_copy(segment, start, end, superblock)
        if copy is None and start > record.base_lsn:  # what is proven ends within a frame
            start = record.base_lsn  # noqa: PLW2901
            copy = checked_copy(segment, start, end, superblock)
        if copy is None:
            raise CorruptionError(
                record.name, fmt.PAGE_BYTES, record.base_lsn, None, "the segment changed while it was read"
            )
        at = fmt.PAGE_BYTES + start - record.base_lsn
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


def checked_copy(segment: Segment, start: int, end: int, superblock: Superblock) -> bytearray | None:
    """The bytes between two LSNs; None unless they are whole frames. OSError."""
    copy = segment.copy(fmt.PAGE_BYTES + start - segment.record.base_lsn, end - start)
    if len(copy) < fmt.FRAME_BYTES:
        return None
    first = np.frombuffer(copy, fmt.FRAME, 1)[0]
    scan = scan_fields(
        frames=ffi.from_buffer(copy), base_lsn=start, capacity=len(copy), limit_lsn=start + len(copy),
        epoch=superblock.epoch, epoch_start_lsn=superblock.epoch_start_lsn,
        watermark=0, salt=segment.salt, link=int(first["link"]), lsn=start,
    )  # fmt: skip
    native_scan(scan, segment.record.name)
    whole = scan.stop in {lib.MW_STOP_LIMIT, lib.MW_STOP_END} and scan.lsn == start + len(copy)
    return copy if whole else None


class Stopwatch:
    """The time that each step of an open took."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self._seconds[step] = self._seconds.get(step, 0.0) + now - self._last
        self._last = now
