"""Giving space back: segments with nothing live go, those that are mostly dead are written anew.

In a new generation the live frames keep their place, and each dead run becomes one GAP frame with a
hole behind it. All of it commits by one superblock. Appends and reads go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.engine import Engine
from mmapwal.errors import CorruptionError
from mmapwal.segment import Segment, make_segment, native_scan, scan_fields
from mmapwal.superblock import SegmentRecord
from mmapwal.turn import refuse_reentry

__all__ = ["compact", "compact_in_turn", "shrinking"]

RUNS = 4096


@contextmanager
def shrinking(engine: Engine) -> Iterator[None]:
    """One shrinking operation at a time; BusyError for the second."""
    engine.check_usable()
    refuse_reentry(engine.structure)
    with engine.shrinking.hold(wait=False):
        yield


def compact(engine: Engine, *, wait: bool = False) -> int:
    """Bytes given back; `wait`: until the files are gone."""
    with shrinking(engine):
        freed = compact_in_turn(engine)
        if wait:
            engine.disposal.wait()
        return freed


class Live:
    """Which frames live: those that the slots name. Taken before a sync, so that all of them are
    durable when a frame is called dead because another took its place."""

    def __init__(self, slots: npt.NDArray[Any]) -> None:
        self.slots = slots
        named = slots[slots["lsn"] != 0]
        order = np.argsort(named["lsn"])
        self._lsns = named["lsn"][order]
        frames = (named["length"][order].astype(np.uint64) + np.uint64(fmt.FRAME_BYTES + 7)) & ~np.uint64(7)
        self._bytes = np.concatenate((np.zeros(1, np.uint64), np.cumsum(frames)))

    def between(self, record: SegmentRecord) -> tuple[int, int]:
        """(frames, bytes) that live in a segment."""
        first, last = np.searchsorted(self._lsns, [record.base_lsn, record.next_base_lsn])
        return int(last - first), int(self._bytes[last] - self._bytes[first])

    @property
    def total_bytes(self) -> int:
        return int(self._bytes[-1])


def compact_in_turn(engine: Engine, *, hidden_too: bool = False) -> int:
    """`hidden_too`: also segments with little dead in them, the present one too, so that no frame is
    left that a removal hides, and the removals can go. The caller is the only one who shrinks."""
    if hidden_too:
        engine.rotate()
    # In this order: a segment that was left before the copy has all its frames in it, and all that the
    # copy names is durable before anything is called dead.
    tail_id = engine.state().tail_id
    live = Live(engine.index.copy())
    engine.sync()
    dropped: list[SegmentRecord] = []
    renewed: dict[int, SegmentRecord] = {}
    freed = 0
    try:
        for segment in engine.segments.table.segments:
            record = segment.record
            if record.id >= tail_id:
                continue
            frames, live_bytes = live.between(record)
            if frames == 0:
                dropped.append(record)
                freed += record.file_bytes
            elif hidden_too or live_bytes * 2 < record.capacity:
                new, gained = _renew(engine, segment, live, frames)
                if new is not None:
                    renewed[record.id] = new
                    freed += gained
        if dropped or renewed or hidden_too:
            _commit(engine, dropped, renewed, tail_id if hidden_too else None)
    except BaseException:
        named = {r.name for r in engine.superblock.segments}
        engine.remove_files([r.name for r in renewed.values() if r.name not in named])
        raise
    return freed


def _commit(
    engine: Engine,
    dropped: list[SegmentRecord],
    renewed: dict[int, SegmentRecord],
    clean_below_id: int | None,
) -> None:
    gone = {r.id for r in dropped}
    with engine.structure:
        present = engine.records_with_ends()  # one may have been prepared meanwhile
        segments = tuple(renewed.get(r.id, r) for r in present if r.id not in gone)
        new = replace(engine.superblock, segments=segments)
        lowest = min((r.base_lsn for r in segments if r.id >= (clean_below_id or 0)), default=0)
        new = replace(new, removals=tuple(r for r in new.removals if r.below_lsn > lowest))
        engine.change(new, lambda: None)
        engine.dispose([r.name for r in present if r.id in gone or r.id in renewed])


def _runs(segment: Segment, end_lsn: int, live: Live) -> Iterator[Any]:
    """The kept and dead runs of a sealed segment, neighbours of one kind joined."""
    record = segment.record
    at, link = ffi.new("uint64_t *", record.base_lsn), ffi.new("uint32_t *", segment.salt)
    runs = ffi.new("struct mw_run[]", RUNS)
    slots = ffi.cast("const struct mw_slot *", ffi.from_buffer(live.slots))
    while at[0] < end_lsn:
        count = lib.mw_plan(
            segment.frames,
            record.base_lsn,
            end_lsn,
            segment.salt,
            slots,
            len(live.slots),
            at,
            link,
            runs,
            RUNS,
        )
        if count in {lib.MW_E_CORRUPT, 0}:
            raise CorruptionError(
                record.name,
                fmt.PAGE_BYTES + at[0] - record.base_lsn,
                int(at[0]),
                None,
                "a frame does not verify",
            )
        if count < 0:
            raise OSError(-count, "reading the segment failed", record.name)
        yield from (
            (r.from_lsn, r.to_lsn, r.last_lsn, r.link, r.gap_bytes, bool(r.keep)) for r in runs[0:count]
        )


def _end_of(engine: Engine, segment: Segment) -> int:
    """Behind the END frame of a sealed segment."""
    record = segment.record
    end = record.end_lsn or lib.mw_writer_ended(engine.writer, record.id)
    if end > 0 and end < record.next_base_lsn:
        return int(end)
    scan = _scan(engine, segment)
    return int(scan.lsn)


def _scan(engine: Engine, segment: Segment) -> Any:
    superblock, record = engine.superblock, segment.record
    scan = scan_fields(
        frames=segment.frames, base_lsn=record.base_lsn, capacity=record.capacity, epoch=superblock.epoch,
        epoch_start_lsn=superblock.epoch_start_lsn, salt=segment.salt, link=segment.salt, lsn=record.base_lsn,
    )  # fmt: skip
    native_scan(scan, record.name)
    if scan.stop != lib.MW_STOP_END:
        offset = fmt.PAGE_BYTES + int(scan.lsn) - record.base_lsn
        raise CorruptionError(
            record.name, offset, int(scan.lsn), int(scan.op) or None, "a frame does not verify"
        )
    return scan


def _renew(engine: Engine, segment: Segment, live: Live, frames: int) -> tuple[SegmentRecord | None, int]:
    """Writes the next generation of a segment, checked; nothing names it yet. (None, 0) when there is
    nothing to gain."""
    record, view = segment.record, segment.view
    end_lsn = _end_of(engine, segment)
    contents: list[tuple[int, Any]] = []
    gained = 0
    for start, end, last, link, gap_bytes, keep in _runs(segment, end_lsn, live):
        offset = fmt.PAGE_BYTES + start - record.base_lsn
        if keep:
            contents.append((offset, view[offset : offset + end - start]))
            continue
        last_at = fmt.PAGE_BYTES + last - record.base_lsn
        last_frame = ffi.new("struct mw_frame *")
        ffi.memmove(last_frame, view[last_at : last_at + fmt.FRAME_BYTES], fmt.FRAME_BYTES)
        gap = ffi.new("struct mw_frame *")
        lib.mw_make_gap(gap, last_frame, start, end - start, link, segment.salt)
        contents.append((offset, bytes(ffi.buffer(gap))))
        gained += end - start - gap_bytes
    if gained == 0:
        return None, 0
    new = replace(record, generation=record.generation + 1, end_lsn=end_lsn)
    source = engine.directory.open(record.name)
    try:
        make_segment(engine.directory, engine.superblock.uuid, new, contents, sparse=True, source=source)
    finally:
        with suppress(OSError):
            source.close()
    try:  # what is on the copy is checked, however it came there
        check = _scan(engine, Segment(engine.directory, engine.superblock.uuid, new))
        if int(check.lsn) != end_lsn or int(check.entry_count) != frames:
            raise CorruptionError(new.name, 0, record.base_lsn, None, "the copy is not what was copied")
    except BaseException:
        engine.remove_files([new.name])
        raise
    return new, gained
