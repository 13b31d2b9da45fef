"""Checking frames without changing anything: of segments, of an open journal, and the index against them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.engine import Engine
from mmapwal.errors import ClosedError, CorruptionError, JournalError
from mmapwal.index import rebuilt_slots
from mmapwal.recovery import STOP_REASONS, removal_rows
from mmapwal.segment import Segment, native_scan, scan_fields
from mmapwal.superblock import SegmentRecord, Superblock, read_superblock

__all__ = [
    "Damage", "Framed", "Problem", "VerifyReport", "damages", "file_problem", "index_problems",
    "scan_segment", "stop_problem", "summary_problems", "verify_open",
]  # fmt: skip

Progress = Callable[[int, int], None]

READ_STEP_BYTES = 64 * fmt.PAGE_BYTES  # stays in the processor's cache
UNREADABLE = "the disk fails to read it from here on, and nothing of this segment was checked"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and where: file, byte in it, LSN, op where it is known; how many bytes, up to
    the next good frame, where that can be said."""

    segment: str
    offset: int
    lsn: int
    op: int | None
    reason: str
    length: int = 0

    @classmethod
    def of(cls, e: CorruptionError) -> Problem:
        """What an error tells."""
        return cls(e.segment, e.offset, e.lsn, e.op, e.reason)

    def error(self) -> CorruptionError:
        """The error that tells it."""
        return CorruptionError(self.segment, self.offset, self.lsn, self.op, self.reason)

    def __str__(self) -> str:
        op = f", op {self.op}" if self.op is not None else ""
        return f"{self.segment} at byte {self.offset} (LSN {self.lsn}{op}): {self.reason}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked, and what is wrong."""

    frames: int
    entries: int
    scanned_bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


class Framed(Protocol):
    """A segment, or what was read of one."""

    record: SegmentRecord
    salt: int

    @property
    def frames(self) -> Any:
        """Pointer to the first byte behind the header page."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged stretch of a segment: from the first place where no frame follows the one before, to the
    next good frame, or to the limit."""

    problem: Problem
    stop: int  # enum mw_stop
    lsn: int
    end_lsn: int
    link: int  # what a frame at `lsn` would have
    epoch: int  # of the frame before, or 0
    next_link: int | None  # of the good frame at `end_lsn`; None: there is none


@dataclass(slots=True)
class Damages:
    """What is wrong in a segment, and what was checked."""

    found: list[Damage]
    frames: int = 0
    entries: int = 0
    scanned_bytes: int = 0
    last_epoch: int = 0  # of a good frame; 0: there is none

    @property
    def problems(self) -> list[Problem]:
        return [damage.problem for damage in self.found]


def file_problem(segment: Segment) -> Problem | None:
    """What keeps the frames of a segment, as it is under its name, from being checked: it is missing or cut,
    its header is wrong, or the disk fails to read it, and from which page on. The segment has not been opened
    before. Maps it, and has all of it read. OSError when it cannot be opened."""
    record = segment.record
    try:
        segment.check()
        view = segment.view
    except CorruptionError as e:
        return Problem.of(e)
    except ClosedError:  # meanwhile
        raise
    except JournalError as e:
        return Problem(record.name, 0, record.base_lsn, None, str(e))
    except OSError as e:
        if e.errno != errno.EIO:
            raise
        return Problem(record.name, 0, record.base_lsn, None, UNREADABLE)
    offset = _unreadable_at(segment.frames - fmt.PAGE_BYTES, len(view))
    if offset is None:
        return None
    return Problem(record.name, offset, record.base_lsn + max(0, offset - fmt.PAGE_BYTES), None, UNREADABLE)


def _unreadable_at(address: Any, length: int) -> int | None:
    """The first page of a mapping that the disk fails to bring."""
    if lib.mw_populate(ffi.cast("void *", address), length, 0) == 0:
        return None
    scratch = ffi.new("uint8_t[]", READ_STEP_BYTES)

    def fails(offset: int, step: int) -> bool:
        return int(lib.mw_copy_guarded(scratch, address + offset, min(step, length - offset))) < 0

    for start in range(0, length, READ_STEP_BYTES):
        if fails(start, READ_STEP_BYTES):
            pages = range(start, length, fmt.PAGE_BYTES)
            return next((offset for offset in pages if fails(offset, fmt.PAGE_BYTES)), start)
    return None


def damages(segment: Framed, superblock: Superblock, *, limit_lsn: int, slots: Any = None) -> Damages:
    """All that is wrong in a segment below a limit, or before its END. Behind each bad frame it goes on at
    the next good one. Fills `slots` when given. OSError when the disk fails."""
    record, checked = segment.record, Damages([])
    lsn, link = record.base_lsn, segment.salt
    while lsn < limit_lsn:
        scan = scan_segment(segment, superblock, limit_lsn=limit_lsn, slots=slots, lsn=lsn, link=link)
        checked.frames += int(scan.frame_count)
        checked.entries += int(scan.entry_count)
        checked.scanned_bytes += int(scan.lsn) - lsn
        checked.last_epoch = int(scan.last_epoch) or checked.last_epoch
        if scan.stop in {lib.MW_STOP_LIMIT, lib.MW_STOP_END}:
            break
        problem, stop, before = stop_problem(segment, scan), int(scan.stop), int(scan.link)
        if stop != lib.MW_STOP_LINK:  # then this frame is good, and the one before it is not
            scan.lsn += fmt.ALIGN_BYTES
        more = lib.mw_seek(scan)
        if more < 0:
            raise OSError(-more, "reading the segment failed", record.name)
        lsn, link = int(scan.lsn) if more else min(limit_lsn, record.next_base_lsn), int(scan.link)
        problem = replace(problem, length=lsn - problem.lsn)
        after = link if more else None
        checked.found.append(Damage(problem, stop, problem.lsn, lsn, before, checked.last_epoch, after))
        if not more:
            break
    return checked


def stop_problem(segment: Framed, scan: Any) -> Problem:
    """Why a scan of the segment went no further."""
    offset = fmt.PAGE_BYTES + int(scan.lsn) - segment.record.base_lsn
    reason = STOP_REASONS.get(int(scan.stop), "the segment ends here")
    return Problem(segment.record.name, offset, int(scan.lsn), int(scan.op) or None, reason)


def scan_segment(
    segment: Framed, superblock: Superblock, *, limit_lsn: int, slots: Any = None,
    lsn: int = 0, link: int = 0,
) -> Any:  # fmt: skip
    """Checks one segment by itself, up to a limit or the first bad frame; fills `slots` when given. From a
    frame on, with the link that it has, or from the first."""
    record = segment.record
    rows = removal_rows(superblock)
    scan = scan_fields(
        frames=segment.frames, base_lsn=record.base_lsn, capacity=record.capacity, limit_lsn=limit_lsn,
        epoch=superblock.epoch, epoch_start_lsn=superblock.epoch_start_lsn, salt=segment.salt,
        link=link if lsn else segment.salt, lsn=lsn or record.base_lsn, removals=rows,
        watermark=superblock.watermark,
        removal_count=len(superblock.removals), slot_count=superblock.slot_count,
        slots=ffi.NULL if slots is None else ffi.cast("struct mw_slot *", ffi.from_buffer(slots)),
    )  # fmt: skip
    native_scan(scan, record.name)
    return scan


def index_problems(present: Any, slots: Any, below_lsn: int, end_lsn: int) -> list[Problem]:
    """Slots that differ from the newest live frame, where that is below an LSN, or that name what lies
    behind the end."""
    taken = present["lsn"] != 0  # of an empty one nothing else counts
    wrong = (present["lsn"] != slots["lsn"]) | taken & (present != slots)
    wrong = wrong & (present["lsn"] < below_lsn) | (present["lsn"] >= end_lsn)
    return [
        Problem(
            fmt.INDEX_NAME, fmt.PAGE_BYTES + int(i) * fmt.SLOT_BYTES, int(present["lsn"][i]), None,
            f"the slot should name LSN {slots['lsn'][i]}, op {slots['op'][i]}",
        )
        for i in wrong.nonzero()[0][:100]
    ]  # fmt: skip


def summary_problems(slots: Any, told: tuple[int, int, int]) -> list[Problem]:
    """`told`: how many entries are said to live, the first and the last op."""
    ops = slots["op"][slots["lsn"] != 0]
    found = (len(ops), int(ops.min()), int(ops.max())) if len(ops) else (0, 0, 0)
    if found == told:
        return []
    reason = "it counts {} entries, ops {} .. {}; there are {}, ops {} .. {}".format(*told, *found)
    return [Problem(fmt.INDEX_NAME, 0, 0, None, reason)]


def verify_open(engine: Engine, progress: Progress | None = None) -> VerifyReport:
    """Checks the superblock, and the durable part of an open journal, while it goes on; the index too when
    nothing was removed meanwhile. OSError when a file cannot be opened, or the superblock not be read."""
    with engine.structure:  # one moment: no removal between the three
        superblock, state, table = engine.superblock, engine.state(), engine.segments.table
        problems = _superblock_problems(engine)
    slots = rebuilt_slots(superblock.slot_count)
    frames = entries = scanned = done = 0
    total = sum(s.record.capacity for s in table.segments)
    for used in table.segments:
        segment = Segment(engine.directory, superblock.uuid, used.record)  # as the next open will find it
        problem = file_problem(segment)
        if problem is None:
            found = damages(segment, superblock, limit_lsn=int(state.durable_lsn), slots=slots)
            frames += found.frames
            entries += found.entries
            scanned += found.scanned_bytes
            problems += found.problems
        elif used in engine.segments.table.segments:  # else it was compacted away before it was opened
            problems.append(problem)
        done += used.record.capacity
        if progress is not None:
            progress(done, total)
    if not problems:
        present = engine.index.copy()
        wrong = index_problems(present, slots, int(state.durable_lsn), _staged_lsn(engine))
        if state.durable_lsn == state.written_lsn and not state.staged_bytes:
            wrong += summary_problems(slots, (int(state.live), int(state.first_op), int(state.last_op)))
        if not _removed_since(superblock, int(state.durable_lsn), engine.superblock):
            problems += wrong
    return VerifyReport(frames, entries, scanned, tuple(problems))


def _superblock_problems(engine: Engine) -> list[Problem]:
    """Of the file, which nobody writes meanwhile."""
    try:
        found = read_superblock(engine.directory)
    except CorruptionError as e:
        return [Problem.of(e)]
    if found == engine.superblock:
        return []
    reason = "it is gone" if found is None else "it is not the one that this journal wrote last"
    return [Problem(fmt.SUPERBLOCK_NAME, 0, 0, None, reason)]


def _removed_since(before: Superblock, durable_lsn: int, now: Superblock) -> bool:
    """Whether entries below an LSN, or the segments that had them, can have gone. A segment that is added,
    or takes the place of one that has nothing yet, takes nothing away."""
    kept = {record.id: record.generation for record in now.segments}
    used = (record for record in before.segments if record.base_lsn < durable_lsn)
    same = all(kept.get(record.id) == record.generation for record in used)
    then = (before.epoch, before.watermark, before.removals)
    return not same or then != (now.epoch, now.watermark, now.removals)


def _staged_lsn(engine: Engine) -> int:
    """Where the next entry goes: behind all that any slot names."""
    with engine.structure:
        state = engine.state()
        staged = next((s for s in engine.superblock.segments if s.id == state.stage_id), None)
    return int(state.written_lsn if staged is None else staged.next_base_lsn - state.stage_room)
