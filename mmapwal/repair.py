"""Repairing a damaged journal: what verifies stays where it is, what does not is left out, and nothing else.

A segment with damage gets a new generation, in which each damaged stretch is one GAP frame, so that the chain
goes on; a superblock that names it commits all of it at once. The damaged files stay beside, as `.broken`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.errors import CorruptionError, JournalError
from mmapwal.index import published_progress
from mmapwal.inspection import inspect_journal, snapshot_problems
from mmapwal.segment import Segment, make_segment, native_scan, scan_fields
from mmapwal.storage import Directory, SystemDirectory
from mmapwal.superblock import Removal, SegmentRecord, Superblock, SuperblockFile
from mmapwal.verify import Damage, Problem, damages

__all__ = ["RepairReport", "repair"]

BROKEN = ".broken"
COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What was wrong, which stretches are left out, and where the damaged files are kept. Of what is left out
    only those ops are known whose header is readable. `changed`: whether the journal was repaired; not so
    when nothing was wrong, or it was only asked what would be. `remaining`: what no repair mends, the paired
    snapshot: recover() refuses it, the journal by itself opens."""

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
    batch the rest stays. The damaged files are copied first, to their names and `.broken`. `dry_run` says
    what it would do, and changes nothing. All or nothing, also when the machine dies halfway; blocks while
    it reads everything. A Directory that is given is closed.

    An op that is left out is missing afterwards, and does not fall back to an older entry of the same op
    where the header of the damaged one is readable; a Replica stops at such a gap. Damaged places of which
    nothing proves that they had been durable are none: opening cuts them.

    LockedError when the journal is open; FileNotFoundError when none is there. CorruptionError when the
    superblock is gone, damaged or older than the frames, or two live entries want one slot: there is nothing
    to go by then, take a backup. IncompatibleFormatError, OSError: nothing has changed.
    """
    directory = SystemDirectory(path, create=False) if isinstance(path, str | os.PathLike) else path
    try:
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
        report = RepairReport(problems, tuple(plan.dropped), (), changed=False)
        if not dry_run:
            report = plan.carry_out()
        return replace(report, problems=(*report.problems, *remaining), remaining=remaining)
    finally:
        directory.close()


class _Image:
    """The bytes of a segment as far as they can be read, in memory; zeros for what is not there."""

    def __init__(self, directory: Directory, superblock: Superblock, record: SegmentRecord) -> None:
        self.record = record
        self.salt = fmt.segment_salt(superblock.uuid, record.id)
        self.data = bytearray(record.capacity)
        self.is_there = True
        self.problem: str | None = None
        try:
            Segment(directory, superblock.uuid, record).check()
        except CorruptionError as e:
            self.problem = e.reason
        try:
            storage = directory.open(record.name)
        except FileNotFoundError:
            self.is_there = False
            return
        try:
            end = min(len(storage), fmt.PAGE_BYTES + record.capacity)
            for at in range(fmt.PAGE_BYTES, end, COPY_BYTES):
                part = storage.read_at(at, min(COPY_BYTES, end - at))
                self.data[at - fmt.PAGE_BYTES : at - fmt.PAGE_BYTES + len(part)] = part
        finally:
            storage.close()

    @property
    def frames(self) -> Any:
        return ffi.cast("const uint8_t *", ffi.from_buffer(self.data))

    def header(self, lsn: int) -> Any:
        return np.frombuffer(self.data, fmt.FRAME, 1, lsn - self.record.base_lsn)[0]

    def between(self, start: int, end: int) -> tuple[int, bytes]:
        base = self.record.base_lsn
        return fmt.PAGE_BYTES + start - base, bytes(self.data[start - base : end - base])

    def has_frame(self, superblock: Superblock, lsn: int) -> bool:
        """Whether a good frame begins there."""
        scan = scan_fields(
            frames=self.frames, base_lsn=self.record.base_lsn, capacity=self.record.capacity, salt=self.salt,
            lsn=lsn, link=0, limit_lsn=lsn + fmt.FRAME_BYTES, epoch=superblock.epoch,
            epoch_start_lsn=superblock.epoch_start_lsn,
        )  # fmt: skip
        return lsn + fmt.FRAME_BYTES <= self.record.next_base_lsn and lib.mw_seek(scan) == 1


@dataclass(frozen=True, slots=True)
class _Stretch:
    """What is left out of a segment."""

    start: int
    end: int
    link: int  # what a frame at the start has
    next_link: int | None  # what the one at the end has; None: there is none
    epoch: int
    ends: bool = False  # the segment's END has to be in it

    def fillers(self, image: _Image) -> Iterator[tuple[int, bytes]]:
        """What stands for it: a GAP, and where the segment was left its END."""
        end = self.end - fmt.FRAME_BYTES if self.ends else self.end
        if end < self.start or 0 < end - self.start < fmt.FRAME_BYTES:
            raise JournalError(f"{image.record.name} at LSN {self.start}: too short for a frame")
        link = self.link
        if end > self.start:
            length, behind = end - self.start - fmt.FRAME_BYTES, self.next_link or 0
            frame = self._frame(image, lib.MW_GAP, self.start, link=link, length=length, payload_crc=behind)
            yield self._place(image, self.start), frame
            link = behind
        if self.ends:
            yield self._place(image, end), self._frame(image, lib.MW_END, end, link=link)

    def _place(self, image: _Image, lsn: int) -> int:
        return fmt.PAGE_BYTES + lsn - image.record.base_lsn

    def _frame(self, image: _Image, kind: int, lsn: int, **fields: int) -> bytes:
        frame: Any = np.zeros((), fmt.FRAME)
        for name, value in ({"type": kind, "lsn": lsn, "epoch": self.epoch} | fields).items():
            frame[name] = value
        frame["header_crc"] = fmt.crc32c(frame.tobytes()[4:], image.salt)
        return bytes(frame.tobytes())


class _Plan:
    """What is to be left out, and what takes its place. CorruptionError when that cannot be said."""

    def __init__(self, directory: Directory, superblock: Superblock, problems: tuple[Problem, ...]) -> None:
        self._directory, self._superblock, self._problems = directory, superblock, problems
        self.dropped: list[Problem] = []
        self._contents: dict[int, list[tuple[int, bytes]]] = {}  # by segment id
        self._images: dict[int, _Image] = {}
        proven = self._proven()
        epoch = 1
        for record in superblock.segments:
            if record.base_lsn < proven:
                epoch = self._plan(record, proven, epoch)
        if not self._contents and any(p.segment != fmt.INDEX_NAME for p in problems):
            raise problems[0].error()

    def _proven(self) -> int:
        """All below it had been durable."""
        s = self._superblock
        proven = max(s.proven_lsn, published_progress(self._directory, s.uuid, s.slot_count)[1])
        for record in s.segments:
            image = _Image(self._directory, s, record)
            scan = scan_fields(
                frames=image.frames, base_lsn=record.base_lsn, capacity=record.capacity, salt=image.salt,
                lsn=record.base_lsn, link=image.salt, epoch=s.epoch, epoch_start_lsn=s.epoch_start_lsn,
            )  # fmt: skip
            native_scan(scan, record.name, hunt=True)
            if scan.stop == lib.MW_STOP_FUTURE_EPOCH:
                raise self._problems[0].error()
            proven = max(proven, int(scan.durable_lsn))
        return proven

    def _plan(self, record: SegmentRecord, proven: int, epoch: int) -> int:
        """What becomes of a segment; `epoch` is of the last frame before it. Of its own last frame."""
        image = _Image(self._directory, self._superblock, record)
        was_left = record.end_lsn > 0 or proven >= record.next_base_lsn
        checked = damages(
            image, self._superblock, limit_lsn=min(proven, record.end_lsn or record.next_base_lsn)
        )
        if not checked.found and image.problem is None:
            return epoch
        contents: list[tuple[int, bytes]] = []
        at = record.base_lsn
        for damage in checked.found:
            stretch = self._stretch(image, damage, at, epoch, was_left=was_left)
            contents.append(image.between(at, stretch.start))
            contents += stretch.fillers(image)
            problem, at, epoch = damage.problem, stretch.end, stretch.epoch
            offset, length = fmt.PAGE_BYTES + stretch.start - record.base_lsn, stretch.end - stretch.start
            op = problem.op if stretch.start == problem.lsn else None
            self.dropped.append(Problem(record.name, offset, stretch.start, op, problem.reason, length))
        contents.append(image.between(at, record.next_base_lsn))  # what nothing proves, opening judges
        self._contents[record.id], self._images[record.id] = contents, image
        return epoch

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
        elif start >= self._superblock.epoch_start_lsn:
            epoch = self._superblock.epoch
        return _Stretch(start, end, link, next_link, epoch, ends=next_link is None and was_left)

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

    def carry_out(self) -> RepairReport:
        directory, superblock = self._directory, self._superblock
        broken = tuple(self._keep(image) for image in self._images.values() if image.is_there)
        records = []
        for record in superblock.segments:
            contents = self._contents.get(record.id)
            if contents is not None:
                record = replace(record, generation=record.generation + 1)  # noqa: PLW2901
                make_segment(directory, superblock.uuid, record, contents)
            records.append(record)
        new = replace(superblock, segments=tuple(records), seal=None, removals=self._removals())
        directory.sync_parent()
        file = SuperblockFile(directory, superblock)
        try:
            file.commit(new)
            file.remove_files([image.record.name for image in self._images.values() if image.is_there])
        finally:
            file.close()
        left, _ = inspect_journal(directory)
        if left.problems:
            raise left.problems[0].error()
        return RepairReport(self._problems, tuple(self.dropped), broken, changed=True)

    def _removals(self) -> tuple[Removal, ...]:
        """An older entry of an op that is left out shall not come back: the newest that is known of it says
        below which LSN."""
        below = {d.op: d.lsn + d.length for d in self.dropped if d.op}
        rows = [Removal(op, op, lsn) for op, lsn in sorted(below.items())]
        room = fmt.REMOVALS_MAX - len(self._superblock.removals)
        return (*self._superblock.removals, *rows[:room])

    def _keep(self, image: _Image) -> str:
        """Copies the damaged file aside, durably but for its name."""
        directory, name = self._directory, image.record.name
        taken = set(directory.names())
        aside = next(n for n in _names_aside(name) if n not in taken)
        source = directory.open(name)
        try:
            target = directory.create(aside)
            try:
                length = len(source)
                for at in range(0, length, COPY_BYTES):
                    target.write_at(at, source.read_at(at, min(COPY_BYTES, length - at)))
                target.sync()
            finally:
                target.close()
        finally:
            source.close()
        return aside


def _names_aside(name: str) -> Iterator[str]:
    yield name + BROKEN
    number = 2
    while True:
        yield f"{name}{BROKEN}-{number}"
        number += 1
