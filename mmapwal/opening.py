"""From a directory to a settled journal: what is there is read, judged, made durable and cleaned up.

The order is what keeps a crash at any point harmless: nothing is written before a superblock with the
same facts is durable, nothing is appended before the next epoch is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import Enum

from mmapwal import format as fmt
from mmapwal.errors import CorruptionError, IncompatibleFormatError, JournalError
from mmapwal.index import SlotIndex
from mmapwal.recovery import (
    REFUSED,
    RecoveryReport,
    RecoveryRow,
    Scanned,
    Stopwatch,
    decide,
    refuse,
    rewrite_unproven,
    scan_journal,
    unproven,
)
from mmapwal.segment import SegmentSet
from mmapwal.storage import Directory, SyncMethod
from mmapwal.superblock import Seal, Superblock, SuperblockFile, read_superblock
from mmapwal.threads import SecondThread, threads_for

__all__ = ["Durability", "Opening", "Options", "check_empty", "check_sizes"]

SLOTS_DEFAULT = 65_536
SEGMENT_BYTES_DEFAULT = 16 << 20


class Durability(Enum):
    """What an append has done when it returns."""

    SYNC = "sync"
    OS = "os"
    BUFFERED = "buffered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the caller of Journal chose; None: what the journal was made with, or the default."""

    create: bool = True
    durability: Durability = Durability.SYNC
    sync_method: SyncMethod = SyncMethod.AUTO
    slots: int | None = None
    segment_bytes: int | None = None
    align_bytes: int | None = None
    progress: Callable[[int, int], None] | None = None


def refuse_strangers(directory: Directory) -> None:
    """JournalError where something is there that no journal has."""
    names = {
        fmt.LOCK_NAME,
        fmt.SUPERBLOCK_NAME,
        fmt.SUPERBLOCK_SPARE_NAME,
        fmt.INDEX_NAME,
        fmt.SNAPSHOTS_NAME,
    }
    strangers = [n for n in directory.names() if n not in names and not fmt.is_ours(n)]
    if strangers:
        raise JournalError(f"{directory} holds something else: {', '.join(strangers[:3])}")


def check_empty(directory: Directory, options: Options) -> None:
    """Whether a journal may be made here."""
    if any(fmt.is_ours(n) or n == fmt.INDEX_NAME for n in directory.names()):
        raise CorruptionError(fmt.SUPERBLOCK_NAME, 0, 0, None, "it is gone, but segments or index are there")
    if not options.create:
        raise FileNotFoundError(errno.ENOENT, "no journal here", str(directory))
    refuse_strangers(directory)


def check_sizes(directory: Directory, superblock: Superblock, options: Options) -> None:
    """IncompatibleFormatError where the caller asks for other sizes than the journal was made with."""
    for name, wanted, is_ in (
        ("slots", options.slots, superblock.slot_count),
        ("segment_bytes", options.segment_bytes, superblock.segment_bytes),
        ("commit_align_bytes", options.align_bytes, superblock.align_bytes),
    ):
        if wanted is not None and wanted != is_:
            raise IncompatibleFormatError(f"{directory} was made with {name}={is_}, not {wanted}")


def begin_crc(index: SlotIndex, second: SecondThread, threads: int) -> Callable[[], int]:
    """To be asked for the checksum of the index. It takes longer than to look at all segments, so the caller
    does that meanwhile, and the smaller part of this before."""
    if threads == 1:
        return index.crc
    told = second.submit(index.crc, halves=[0])
    index.map_half(1)
    return told.result


class Opening:
    """One open, step by step. The caller has the lock, and lets go when a step fails."""

    file: SuperblockFile
    segments: SegmentSet
    index: SlotIndex
    found: Scanned
    summary: tuple[int, int, int]
    """How many entries are live, the first and the last op: of the index as it is when this is done."""
    seal: Seal | None = None
    """The seal, when it and the index were believed."""

    def __init__(self, directory: Directory, options: Options) -> None:
        self.directory = directory
        self.options = options
        self.report = RecoveryReport()
        self.watch = Stopwatch(self.report.seconds)

    def run(self) -> None:
        """CorruptionError, IncompatibleFormatError, ExhaustedError, JournalError, OSError; PoisonedError
        when the superblock is in doubt. A refused journal was not changed."""
        superblock = read_superblock(self.directory)
        created = superblock is None
        if superblock is None:
            superblock = self._create()
        else:
            self.file = SuperblockFile(self.directory, superblock)
        check_sizes(self.directory, superblock, self.options)
        method = self.options.sync_method
        self.sync_method = self.directory.best_sync_method() if method is SyncMethod.AUTO else method
        self.segments = SegmentSet(self.directory, superblock.uuid, superblock.segments)
        index = SlotIndex.open(self.directory, superblock.uuid, superblock.slot_count)
        if index is not None:
            self.index = index
        with SecondThread("recovery") as second:
            crc = self._begin_crc(index, superblock, second)
            for segment in self.segments.table.segments:
                segment.check()
            self.watch.lap("superblock")
            is_sealed = superblock.seal is not None and crc() == superblock.seal.index_crc
        self.found = self._find(superblock, index, is_sealed=is_sealed)
        self._settle(superblock, index)
        if created:
            self.report.outcome = RecoveryRow.CREATED

    def _begin_crc(
        self, index: SlotIndex | None, superblock: Superblock, second: SecondThread
    ) -> Callable[[], int | None]:
        """begin_crc(), where there is an index that a seal may vouch for."""
        if index is None or superblock.seal is None:
            return lambda: None
        return begin_crc(index, second, threads_for(self.directory))

    def _find(self, superblock: Superblock, index: SlotIndex | None, *, is_sealed: bool) -> Scanned:
        """Where the journal ends: by the seal, or by a scan. Changes nothing."""
        seal, report = superblock.seal, self.report
        if seal is not None and is_sealed:
            self.watch.lap("index")
            self.seal = seal
            self.summary = (seal.live, seal.first_op, seal.last_op)
            report.outcome = RecoveryRow.SEALED
            row = self.segments.table.row(seal.lsn)
            return Scanned((), seal.lsn, seal.link, row, proven_lsn=seal.lsn)
        durable = 0 if index is None else index.progress()[1]
        found = scan_journal(
            self.segments.table, superblock, durable, self.options.progress, threads_for(self.directory)
        )
        report.outcome = decide(found.finding)
        self.watch.lap("scan")
        if report.outcome in REFUSED:
            raise refuse(report.outcome, found, self.segments.table)
        return found

    def _create(self) -> Superblock:
        check_empty(self.directory, self.options)
        superblock = Superblock(
            uuid=os.urandom(16),
            slot_count=self.options.slots or SLOTS_DEFAULT,
            segment_bytes=self.options.segment_bytes or SEGMENT_BYTES_DEFAULT,
            align_bytes=self.options.align_bytes or 0,
            sequence=0,
        )
        self.directory.sync_parent()
        self.file = SuperblockFile(self.directory, superblock)
        self.file.commit(superblock)
        return self.file.current

    def _settle(self, superblock: Superblock, index: SlotIndex | None) -> None:
        """Makes what was found the truth: the superblock durable, the tail proven, a new epoch there. The
        index, which nobody believes before a seal, is filled while that waits for the disk."""
        found, report = self.found, self.report
        if found.slots or index is None:  # else the first change is a commit, which checks them itself
            self._check_numbers(superblock)
        with SecondThread("recovery") as second:
            filled = self._begin_filling(index, second)
            if found.slots:
                # The superblock that was read may not have been durable: no segment is written before one is.
                self.file.commit(superblock)
                self.directory.sync_parent()
                self.remove_strangers()
                self.watch.lap("superblock")
            if index is None:
                index = SlotIndex.create(self.directory, superblock.uuid, superblock.slot_count)
                filled = self._begin_filling(index, second)
            self.index = index
            self._prove(superblock)
            if filled is not None:
                self.summary = filled.result()
        found.slots = ()
        report.frames, report.entries, report.scanned_bytes = found.frames, found.entries, found.scanned_bytes
        report.tail_lsn, report.proven_lsn = found.tail_lsn, found.proven_lsn
        report.cut_bytes = found.stop_lsn - found.tail_lsn + found.torn_bytes if found.stop_lsn else 0
        self.watch.lap("index")

    def _check_numbers(self, superblock: Superblock) -> None:
        """ExhaustedError, before anything is changed, where a number is used up that this open needs."""
        found, renewed = self.found, set()
        if found.slots and superblock.align_bytes:
            renewed = {s.record.id for s, _, _ in unproven(self.segments.table, superblock, found)}
        segments = (replace(r, generation=r.generation + (r.id in renewed)) for r in superblock.segments)
        new = replace(superblock.with_epoch(found.tail_lsn), segments=tuple(segments))
        replace(new, sequence=superblock.sequence + (2 if found.slots else 1)).checked()

    def _begin_filling(
        self, index: SlotIndex | None, second: SecondThread
    ) -> Future[tuple[int, int, int]] | None:
        """With what was found, if anything was. Done at return, unless a second thread has a processor."""
        slots = self.found.slots
        if index is None or not slots:
            return None
        if threads_for(self.directory) > 1:
            return second.submit(index.fill, slots[0], slots[-1])
        self.summary = index.fill(slots[0], slots[-1])
        return None

    def _prove(self, superblock: Superblock) -> None:
        found, records = self.found, superblock.segments
        if found.slots:
            renewed, written = rewrite_unproven(self.directory, self.segments.table, superblock, found)
            self.report.rewritten_bytes = written
            records = tuple(
                replace(renewed.get(r.id, r), end_lsn=found.ends.get(r.id, r.end_lsn)) for r in records
            )
            self.watch.lap("rewrite")
        kept = [r for r in records if r.base_lsn <= found.tail_lsn]
        if self.report.outcome in {RecoveryRow.SEALED, RecoveryRow.CLEAN}:
            kept = list(records[: len(kept) + 1])  # the one prepared ahead is still blank
        self.file.commit(replace(superblock, segments=tuple(kept)).with_epoch(found.tail_lsn))
        if not found.slots:
            self.directory.sync_parent()
        self.segments.follow(self.file.current.segments)
        self.watch.lap("epoch")

    def remove_strangers(self) -> None:
        """Files of our own names that the superblock does not name. A failed unlink is no matter."""
        named = {r.name for r in self.file.current.segments}
        removed = [n for n in self.directory.names() if fmt.is_ours(n) and n not in named]
        self.report.removed_files += tuple(self.file.remove_files(removed))

    def let_go(self) -> None:
        """Closes what was opened so far, but the directory."""
        if hasattr(self, "index"):
            self.index.close()
        if hasattr(self, "file"):
            self.file.close()
