"""Repairing a damaged journal: what verifies stays where it is, what does not is left out, and nothing else.

A segment with damage gets a new generation, in which each damaged stretch is one GAP frame, so that the chain
goes on; a superblock that names it commits all of it at once. The damaged files stay beside, as `.broken`.
One segment is in memory at a time: a plan has places alone, and a file is read again when it is made anew.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import struct
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.errors import CorruptionError, JournalError
from mmapwal.index import published_progress
from mmapwal.inspection import inspect_as, inspect_journal, snapshot_problems
from mmapwal.segment import Segment, make_segment, native_scan, scan_fields
from mmapwal.storage import Directory, SystemDirectory
from mmapwal.superblock import Removal, SegmentRecord, Superblock, SuperblockFile
from mmapwal.verify import Damage, Problem, damages

__all__ = ["RepairReport", "repair"]

BROKEN = ".broken"
COPY_BYTES = 1 << 20
SECTOR_BYTES = 512
_WALKED = struct.Struct("<16xQ16xI10xBx")  # of a frame: op, length, type
_OLDER = "an older entry of an op that is left out"
_ADVICE = "what cannot be read is not left out; copy the files to another disk first, and repair the copy"


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What was wrong, which stretches are left out, and where the files that changed are kept. Of what is
    damaged only those ops are known whose header is readable; what is not is an older entry of such an op.
    `changed`: whether the journal was repaired; not so when nothing was wrong, or it was only asked what
    would be. `remaining`: what no repair mends, the paired snapshot: recover() refuses it, the journal by
    itself opens."""

    problems: tuple[Problem, ...]
    dropped: tuple[Problem, ...]
    broken: tuple[str, ...]
    changed: bool
    remaining: tuple[Problem, ...] = ()


def repair(
    path: str | os.PathLike[str] | Directory, *, dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> RepairReport:  # fmt: skip
    """Makes a damaged journal open again, by leaving out what is damaged: nothing that verifies, and of a
    batch the rest stays. The files that change are copied first, to their names and `.broken`. `dry_run` says
    what it would do, and changes nothing. All or nothing, also when the machine dies halfway; blocks while
    it reads everything, one segment at a time in memory. A Directory that is given is closed.

    An op that is left out is missing afterwards, and does not fall back to an older entry of the same op
    where the header of the damaged one is readable: older ones are hidden, as by drain(), and where there is
    no room for more of that they are left out too. A Replica stops at such a gap. Damaged places of which
    nothing proves that they had been durable are none: opening cuts them.

    LockedError when the journal is open; FileNotFoundError when none is there. CorruptionError when the
    superblock is gone, damaged or older than the frames, or two live entries want one slot: there is nothing
    to go by then, take a backup. IncompatibleFormatError. OSError when the disk fails: where it cannot be
    read, that names the file and the first such byte. What cannot be read is never left out, since elsewhere
    it may be readable: copy the files to another disk first, and repair the copy. OSError too where there is
    no memory for a segment. After any of these nothing has changed. PoisonedError: repaired or not, try again
    to see.
    """
    directory = SystemDirectory(path, create=False) if isinstance(path, str | os.PathLike) else path
    try:
        return _repair(directory, progress, dry_run=dry_run)
    except OSError as e:
        unreadable = _unreadable(directory, e)
        if unreadable is None:
            raise
        raise unreadable from e
    finally:
        directory.close()


def _repair(
    directory: Directory, progress: Callable[[int, int], None] | None, *, dry_run: bool
) -> RepairReport:
    if fmt.SUPERBLOCK_NAME in directory.names():
        directory.lock(fmt.LOCK_NAME)
    inspected, superblock = inspect_journal(directory, progress)
    problems = inspected.problems
    if superblock is None:
        raise problems[0].error()
    remaining = snapshot_problems(directory, superblock)
    if not problems:
        return RepairReport(remaining, (), (), changed=False, remaining=remaining)
    plan = _Plan(directory, superblock, problems)
    broken = () if dry_run else plan.carry_out()
    return RepairReport((*problems, *remaining), plan.dropped, broken, not dry_run, remaining)


def _unreadable(directory: Directory, error: OSError) -> OSError | None:
    """The error with the place, where the file that it names cannot be read."""
    name = Path(os.fsdecode(error.filename)).name if isinstance(error.filename, str | bytes) else ""
    with contextlib.ExitStack() as stack:
        folder = directory
        if name.startswith("snapshot-"):
            folder = stack.enter_context(contextlib.closing(directory.subdirectory(fmt.SNAPSHOTS_NAME)))
        try:
            file = stack.enter_context(contextlib.closing(folder.open(name)))
        except OSError:
            return None
        at, step = 0, COPY_BYTES
        while at < len(file):
            try:
                file.read_at(at, step)
                at += step
            except OSError as e:
                if step == SECTOR_BYTES:
                    code = e.errno or errno.EIO
                    return OSError(code, f"{os.strerror(code)} at byte {at}: {_ADVICE}", error.filename)
                step //= 2
    return None


class _Image:
    """A segment's file as far as it is there, in memory; zeros for the rest. OSError: no memory."""

    def __init__(self, directory: Directory, superblock: Superblock, record: SegmentRecord) -> None:
        self.record = record
        self.salt = fmt.segment_salt(superblock.uuid, record.id)
        self.problem: str | None = None
        try:
            Segment(directory, superblock.uuid, record).check()
        except CorruptionError as e:
            self.problem = e.reason
        size = record.file_bytes
        try:
            self.data = bytearray(size)
        except MemoryError as e:
            raise OSError(errno.ENOMEM, f"no memory for a segment of {size} bytes", record.name) from e
        try:
            storage = directory.open(record.name)
        except FileNotFoundError:
            return
        try:
            end = min(len(storage), size)
            for at in range(0, end, COPY_BYTES):
                part = storage.read_at(at, min(COPY_BYTES, end - at))
                self.data[at : at + len(part)] = part
        finally:
            storage.close()

    @property
    def frames(self) -> Any:
        return ffi.cast("const uint8_t *", ffi.from_buffer(self.data)) + fmt.PAGE_BYTES

    def place(self, lsn: int) -> int:
        """The byte of the file."""
        return fmt.PAGE_BYTES + lsn - self.record.base_lsn

    def header(self, lsn: int) -> Any:
        return np.frombuffer(self.data, fmt.FRAME, 1, self.place(lsn))[0]

    def between(self, start: int, end: int) -> tuple[int, memoryview]:
        return self.place(start), memoryview(self.data)[self.place(start) : self.place(end)]

    def has_frame(self, superblock: Superblock, lsn: int) -> bool:
        """Whether a good frame begins there."""
        scan = scan_fields(
            frames=self.frames, base_lsn=self.record.base_lsn, capacity=self.record.capacity, salt=self.salt,
            lsn=lsn, link=0, limit_lsn=lsn + fmt.FRAME_BYTES, epoch=superblock.epoch,
            epoch_start_lsn=superblock.epoch_start_lsn,
        )  # fmt: skip
        return lsn + fmt.FRAME_BYTES <= self.record.next_base_lsn and lib.mw_seek(scan) == 1

    def entries(self, stretches: list[_Stretch], limit_lsn: int) -> Iterator[tuple[int, int]]:
        """(LSN, op) of each entry below a limit that is in none of these stretches."""
        skipped = {stretch.start: stretch.end for stretch in stretches}
        at = self.record.base_lsn
        while at < limit_lsn:
            if at in skipped:
                at = skipped[at]
                continue
            op, length, kind = _WALKED.unpack_from(self.data, self.place(at))
            if kind == lib.MW_END:
                return
            if kind == lib.MW_ENTRY:
                yield at, op
            at += fmt.frame_bytes(length)

    def renewed(self, stretches: list[_Stretch]) -> Iterator[tuple[int, Any]]:
        """What the next generation holds: (offset, bytes)."""
        at = self.record.base_lsn
        for stretch in stretches:
            yield self.between(at, stretch.start)
            yield from stretch.fillers(self)
            at = stretch.end
        yield self.between(at, self.record.next_base_lsn)  # what nothing proves, opening judges


@dataclass(frozen=True, slots=True)
class _Stretch:
    """What is left out of a segment, and why."""

    reason: str
    op: int | None
    start: int
    end: int
    link: int  # what a frame at the start has
    next_link: int | None  # what the one at the end has; None: there is none
    epoch: int
    durable_lsn: int = 0  # what is known by it alone
    ends: bool = False  # the segment's END has to be in it

    @classmethod
    def of_entry(cls, image: _Image, lsn: int, op: int) -> _Stretch:
        """A good one, older than what is damaged of its op."""
        frame = image.header(lsn)
        end = lsn + fmt.frame_bytes(int(frame["length"]))
        link, next_link, epoch = int(frame["link"]), int(frame["header_crc"]), int(frame["epoch"])
        return cls(_OLDER, op, lsn, end, link, next_link, epoch, durable_lsn=int(frame["durable_lsn"]))

    def problem(self, record: SegmentRecord) -> Problem:
        offset = fmt.PAGE_BYTES + self.start - record.base_lsn
        return Problem(record.name, offset, self.start, self.op, self.reason, self.end - self.start)

    def fillers(self, image: _Image) -> Iterator[tuple[int, bytes]]:
        """What stands for it: a GAP, and where the segment was left its END."""
        end = self.end - fmt.FRAME_BYTES if self.ends else self.end
        if end < self.start or 0 < end - self.start < fmt.FRAME_BYTES:
            raise JournalError(f"{image.record.name} at LSN {self.start}: too short for a frame")
        link = self.link
        if end > self.start:
            length, behind = end - self.start - fmt.FRAME_BYTES, self.next_link or 0
            frame = self._frame(image, lib.MW_GAP, self.start, link=link, length=length, payload_crc=behind)
            yield image.place(self.start), frame
            link = behind
        if self.ends:
            yield image.place(end), self._frame(image, lib.MW_END, end, link=link)

    def _frame(self, image: _Image, kind: int, lsn: int, **fields: int) -> bytes:
        frame: Any = np.zeros((), fmt.FRAME)
        fields |= {"type": kind, "lsn": lsn, "epoch": self.epoch, "durable_lsn": self.durable_lsn}
        for name, value in fields.items():
            frame[name] = value
        frame["header_crc"] = fmt.crc32c(frame.tobytes()[4:], image.salt)
        return bytes(frame.tobytes())


class _Plan:
    """What is to be left out, and what takes its place. CorruptionError when that cannot be said."""

    def __init__(self, directory: Directory, superblock: Superblock, problems: tuple[Problem, ...]) -> None:
        self._directory, self._superblock, self._problems = directory, superblock, problems
        self._left_out: dict[int, list[_Stretch]] = {}  # by segment id: all that get a new generation
        self._removals = superblock.removals
        self._proven = max(
            superblock.proven_lsn, published_progress(directory, superblock.uuid, superblock.slot_count)[1]
        )
        for record in superblock.segments:
            self._proven = max(self._proven, self._proven_by(record))
        epoch = 1
        for record in superblock.segments:  # also what nothing proves, when its file is gone
            epoch = self._plan(record, epoch)
        if not self._left_out and any(p.segment != fmt.INDEX_NAME for p in problems):
            raise problems[0].error()
        self._hide_older()

    @property
    def dropped(self) -> tuple[Problem, ...]:
        """What is left out, by LSN."""
        left_out = self._left_out
        return tuple(s.problem(r) for r in self._superblock.segments for s in left_out.get(r.id, ()))

    def _image(self, record: SegmentRecord) -> _Image:
        return _Image(self._directory, self._superblock, record)

    def _proven_records(self) -> list[SegmentRecord]:
        return [r for r in self._superblock.segments if r.base_lsn < self._proven]

    def _limit(self, record: SegmentRecord) -> int:
        return min(self._proven, record.end_lsn or record.next_base_lsn)

    def _proven_by(self, record: SegmentRecord) -> int:
        """All below it had been durable, by the frames of a segment."""
        s, image = self._superblock, self._image(record)
        scan = scan_fields(
            frames=image.frames, base_lsn=record.base_lsn, capacity=record.capacity, salt=image.salt,
            lsn=record.base_lsn, link=image.salt, epoch=s.epoch, epoch_start_lsn=s.epoch_start_lsn,
        )  # fmt: skip
        native_scan(scan, record.name, hunt=True)
        if scan.stop == lib.MW_STOP_FUTURE_EPOCH:
            raise self._problems[0].error()
        return int(scan.durable_lsn)

    def _plan(self, record: SegmentRecord, epoch: int) -> int:
        """What becomes of a segment; `epoch` is of the last frame before it. Of its own last frame."""
        image = self._image(record)
        was_left = record.end_lsn > 0 or self._proven >= record.next_base_lsn
        checked = damages(image, self._superblock, limit_lsn=self._limit(record))
        if not checked.found and image.problem is None:
            return max(epoch, checked.last_epoch)
        stretches: list[_Stretch] = []
        at = record.base_lsn
        for damage in checked.found:
            stretch = self._stretch(image, damage, at, epoch, was_left=was_left)
            stretches.append(stretch)
            at, epoch = stretch.end, stretch.epoch
        self._left_out[record.id] = stretches
        return max(epoch, checked.last_epoch)

    def _stretch(
        self, image: _Image, damage: Damage, good_from: int, epoch: int, *, was_left: bool
    ) -> _Stretch:
        """`good_from`: where the good frames before it begin."""
        start, end, link, next_link = damage.lsn, damage.end_lsn, damage.link, damage.next_link
        if damage.stop == lib.MW_STOP_LINK:
            start, end, link, next_link = self._unlinked(image, damage, good_from)
        if next_link is None and not was_left and image.has_frame(self._superblock, end):
            next_link = int(image.header(end)["link"])
        epoch = max(epoch, damage.epoch)
        if next_link is not None:
            epoch = max(epoch, int(image.header(end)["epoch"]))
        elif end > self._superblock.epoch_start_lsn:
            epoch = self._superblock.epoch
        problem, ends = damage.problem, next_link is None and was_left
        op = problem.op if start == problem.lsn else None
        return _Stretch(problem.reason, op, start, end, link, next_link, epoch, ends=ends)

    def _unlinked(self, image: _Image, damage: Damage, at: int) -> tuple[int, int, int, int]:
        """Two good frames that do not follow each other: the first of them is not what had been written there
        last. (start, end, link, next link.)"""
        link = image.salt if at == image.record.base_lsn else int(image.header(at)["link"])
        while True:
            frame = image.header(at)
            behind = at + fmt.frame_bytes(int(frame["length"]))
            if behind >= damage.lsn:
                break
            link = int(frame["payload_crc"] if frame["type"] == lib.MW_GAP else frame["header_crc"])
            at = behind
        if at == damage.lsn:  # the first of the segment
            return at, behind, link, int(frame["header_crc"])
        return at, damage.lsn, link, int(image.header(damage.lsn)["link"])

    def _hide_older(self) -> None:
        """An older entry of an op that is left out shall not come back. Removals hide it, one for ops that
        follow each other; of those for which there is no room the older entries are left out themselves."""
        damaged = {d.op: d.lsn for d in self.dropped if d.op}  # of each op the newest
        older: Counter[int] = Counter()
        alive = set()  # in spite of it: a newer entry is good
        for record in self._proven_records() if damaged else ():
            for lsn, op in self._visible(self._image(record), record, damaged):
                if lsn < damaged[op]:
                    older[op] += 1
                else:
                    alive.add(op)
        runs = [ops for ops in _runs(sorted(damaged.keys() - alive)) if any(older[op] for op in ops)]
        runs.sort(key=lambda ops: -sum(older[op] for op in ops))  # no segment is renewed for the first ones
        room = fmt.REMOVALS_MAX - len(self._removals)
        self._removals += tuple(
            Removal(ops[0], ops[-1], max(damaged[op] for op in ops)) for ops in sorted(runs[:room])
        )
        rest = {op: damaged[op] for ops in runs[room:] for op in ops}
        for record in self._proven_records() if rest else ():
            self._leave_out_older(record, rest)

    def _visible(
        self, image: _Image, record: SegmentRecord, ops: Container[int]
    ) -> Iterator[tuple[int, int]]:
        """(LSN, op) of each good entry of these ops that neither the watermark nor a removal hides."""
        superblock = self._superblock
        for lsn, op in image.entries(self._left_out.get(record.id, []), self._limit(record)):
            if op not in ops or op <= superblock.watermark:
                continue
            if not any(r.first <= op <= r.last and lsn < r.below_lsn for r in superblock.removals):
                yield lsn, op

    def _leave_out_older(self, record: SegmentRecord, below: dict[int, int]) -> None:
        """Of these ops what lies below these LSNs."""
        image = self._image(record)
        older = []
        for lsn, op in self._visible(image, record, below):
            if lsn < below[op]:
                older.append(_Stretch.of_entry(image, lsn, op))
        if older:
            stretches = [*self._left_out.get(record.id, []), *older]
            self._left_out[record.id] = sorted(stretches, key=lambda s: s.start)

    def carry_out(self) -> tuple[str, ...]:
        """Makes it so; the files that are kept."""
        directory, superblock = self._directory, self._superblock
        names = set(directory.names())
        old = [r for r in superblock.segments if r.id in self._left_out]
        new = {r.id: _renewed(r, names) for r in old}
        segments = tuple(new.get(r.id, r) for r in superblock.segments)
        repaired = replace(superblock, segments=segments, seal=None, removals=self._removals)
        asides = {r.name: _name_aside(r.name, names) for r in old if r.name in names}
        file = SuperblockFile(directory, superblock)
        try:
            directory.sync_parent()  # as an open does: the journal may have been copied here just now
            for name, aside in asides.items():
                _copy(directory, name, aside)
            for record in old:
                contents = self._image(record).renewed(self._left_out[record.id])
                make_segment(directory, superblock.uuid, new[record.id], contents)
            left = inspect_as(directory, repaired)  # as it will be
            if left.problems:
                raise left.problems[0].error()
            file.commit(repaired)
            file.remove_files(asides)
        except BaseException:
            if file.current is superblock and not file.in_doubt:  # nothing has happened, and nothing stays
                file.remove_files([*asides.values(), *(r.name for r in new.values())])
            raise
        finally:
            with contextlib.suppress(OSError):  # of the spare file, on which nothing depends
                file.close()
        return tuple(asides.values())


def _runs(ops: list[int]) -> list[list[int]]:
    """Neighbours together; the ops are sorted."""
    runs: list[list[int]] = []
    for op in ops:
        if runs and runs[-1][-1] == op - 1:
            runs[-1].append(op)
        else:
            runs.append([op])
    return runs


def _renewed(record: SegmentRecord, taken: set[str]) -> SegmentRecord:
    """Its next generation. Where the superblock is an old one, later ones may be there, and stay."""
    generations = itertools.count(record.generation + 1)
    records = (replace(record, generation=generation) for generation in generations)
    return next(r for r in records if r.name not in taken)


def _name_aside(name: str, taken: set[str]) -> str:
    aside, number = name + BROKEN, 2
    while aside in taken:
        aside, number = f"{name}{BROKEN}-{number}", number + 1
    return aside


def _copy(directory: Directory, name: str, to: str) -> None:
    """Durably but for its name."""
    source = directory.open(name)
    try:
        target = directory.create(to)
        try:
            length = len(source)
            for at in range(0, length, COPY_BYTES):
                target.write_at(at, source.read_at(at, min(COPY_BYTES, length - at)))
            target.sync()
        finally:
            target.close()
    finally:
        source.close()
