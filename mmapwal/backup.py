"""A copy of a journal while it is in use, which opens by itself.

What is copied is all below one LSN, and the superblock says that a new epoch starts there, as after a
recovery that cut there: whatever else a copied file holds is no frame, and damage below is told as damage.
No file that an earlier backup names is replaced before its superblock is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmapwal import format as fmt
from mmapwal._native import lib
from mmapwal.engine import Engine
from mmapwal.errors import (
    CorruptionError,
    IncompatibleFormatError,
    JournalError,
    SnapshotError,
    SnapshotPersistError,
)
from mmapwal.index import published_progress
from mmapwal.opening import refuse_strangers
from mmapwal.recovery import REFUSED, checked_copy, decide, refuse, scan_journal
from mmapwal.segment import Segment, SegmentTable, make_segment
from mmapwal.snapshot import Snapshot, SnapshotStore, kept_snapshot
from mmapwal.storage import Directory, Storage, SystemDirectory
from mmapwal.superblock import SegmentRecord, Superblock, SuperblockFile, read_superblock
from mmapwal.verify import scan_segment, stop_problem

__all__ = ["BackupReport", "backup_in_use", "backup_open"]

Progress = Callable[[int, int], None]
LOOKS = 100  # at a journal that changes meanwhile
COMPARED_BYTES = 1 << 20  # at once


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What a backup holds: all below `durable_lsn`, and durably. `kept_segments` were there already;
    `snapshot_op` is of the paired snapshot that was copied too, None when there is none."""

    durable_lsn: int
    segments: int
    kept_segments: int
    copied_bytes: int
    snapshot_op: int | None


@dataclass(frozen=True, slots=True)
class _Moment:
    """A journal at one moment. The mappings of its segments, and its snapshot, stay whatever it does."""

    directory: Directory
    superblock: Superblock
    segments: dict[SegmentRecord, Segment]
    end_lsn: int  # all below is copied
    durable_lsn: int  # all below is on the disk, too
    snapshot: Snapshot | None

    @classmethod
    def take(
        cls,
        directory: Directory,
        superblock: Superblock,
        segments: dict[SegmentRecord, Segment],
        end_lsn: int,
        durable_lsn: int,
    ) -> _Moment:
        # An end is told once it is durable, which it may have become behind the look at what is.
        durable_lsn = max(durable_lsn, replace(superblock, segments=tuple(segments)).proven_lsn)
        end_lsn = max(end_lsn, durable_lsn)
        wanted = {r: s for r, s in segments.items() if r.base_lsn < end_lsn}
        for segment in wanted.values():
            segment.view  # noqa: B018  # maps it
        snapshot = kept_snapshot(directory, superblock.pairing, copy=True)
        return cls(directory, superblock, wanted, end_lsn, durable_lsn, snapshot)


@contextmanager
def _target(source: Directory, destination: str | os.PathLike[str] | Directory) -> Iterator[Directory]:
    """Made if missing, but for one inside the source: JournalError, the folder is the journal's alone.
    Closed in the end."""
    if isinstance(destination, str | os.PathLike):
        _refuse_inside(source, Path(destination))
        destination = SystemDirectory(destination)
    try:
        if isinstance(destination, SystemDirectory):
            _refuse_inside(source, destination.path)
        yield destination
    finally:
        destination.close()


def _refuse_inside(source: Directory, path: Path) -> None:
    if isinstance(source, SystemDirectory) and source.path.resolve() in path.resolve().parents:
        raise JournalError(f"{path} is inside {source}: a backup of a journal lies elsewhere")


def _claim(destination: Directory) -> None:
    refuse_strangers(destination)
    destination.lock(fmt.LOCK_NAME)


def backup_open(
    engine: Engine, destination: str | os.PathLike[str] | Directory, progress: Progress | None = None
) -> BackupReport:
    """Of a journal of this process: all that was appended before the call. See Journal.backup()."""
    with _target(engine.directory, destination) as target:
        engine.sync()
        with engine.structure:
            engine.check_usable()
            superblock, durable_lsn = engine.superblock, int(engine.state().durable_lsn)
            present = {segment.record.id: segment for segment in engine.segments.table.segments}
            segments = {record: present[record.id] for record in engine.records_with_ends()}
            moment = _Moment.take(engine.directory, superblock, segments, durable_lsn, durable_lsn)
        _claim(target)
        return _back_up(moment, target, progress)


def backup_in_use(
    directory: Directory,
    destination: str | os.PathLike[str] | Directory,
    progress: Progress | None = None,
) -> BackupReport:
    """Of a journal that another process is writing, or has just begun to recover: all that a recovery would
    find. Takes no lock there and changes nothing.

    FileNotFoundError when no journal is there; JournalError when it changes faster than it can be looked at.
    Else as Journal.backup().
    """
    with _target(directory, destination) as target:
        moment = _moment_in_use(directory)
        _claim(target)
        while True:
            try:
                return _back_up(moment, target, progress)
            except CorruptionError:
                now = read_superblock(directory)
                if now is None or now.epoch == moment.superblock.epoch:
                    raise
            # What was written and not durable has failed since, and something else stands there.
            moment = _moment_in_use(directory)


def _moment_in_use(directory: Directory) -> _Moment:
    epoch = end_lsn = 0
    for _ in range(LOOKS):
        superblock = read_superblock(directory)
        if superblock is None:
            raise FileNotFoundError(2, "no journal here", str(directory))
        _, durable_lsn = published_progress(directory, superblock.uuid, superblock.slot_count)
        segments = {r: Segment(directory, superblock.uuid, r) for r in superblock.segments}
        try:
            if superblock.epoch != epoch:  # else what was found stays: looking may take longer than a change
                end_lsn = _chain_end(superblock, segments.values(), durable_lsn)
                epoch = superblock.epoch
            moment = _Moment.take(directory, superblock, segments, max(end_lsn, durable_lsn), durable_lsn)
        except (CorruptionError, SnapshotError):
            if read_superblock(directory) == superblock:
                raise
            continue  # a segment or the snapshot has gone meanwhile
        if read_superblock(directory) == superblock:
            return moment
    raise JournalError(f"{directory} changed {LOOKS} times while it was looked at")


def _chain_end(superblock: Superblock, segments: Iterable[Segment], durable_lsn: int) -> int:
    """Where a recovery would find the tail. After a power cut the index page may be an older one, until the
    journal is recovered; what was written and is not durable yet counts too. CorruptionError, OSError."""
    proven_lsn = max(durable_lsn, superblock.proven_lsn)
    table = SegmentTable(s for s in segments if s.record.next_base_lsn > proven_lsn)
    found = scan_journal(table, superblock, proven_lsn)
    if decide(found.finding) in REFUSED:  # or the writer was between two frames of it
        again = scan_journal(table, superblock, proven_lsn)
        stays = again.tail_lsn <= max(found.tail_lsn, proven_lsn)
        if stays and (row := decide(again.finding)) in REFUSED:
            raise refuse(row, again, table)
    return max(found.tail_lsn, proven_lsn)


def _back_up(moment: _Moment, destination: Directory, progress: Progress | None) -> BackupReport:
    before = _earlier_backup(moment, destination)
    file = _superblock_file(moment, destination, before)
    file.next(file.current.with_epoch(moment.end_lsn))  # refused before anything is copied
    snapshot = moment.snapshot
    destination.sync_parent()
    if before is not None:
        _make_certain(before, destination)
    total = sum(record.capacity for record in moment.segments)
    done = copied = kept = 0
    records = []
    for record, segment in moment.segments.items():
        if before is not None and _is_there(record, segment, before, destination):
            kept += 1
            records.append(record)
        else:
            records.append(_copy(moment, _unnamed(record, before), segment, destination))
            copied += record.file_bytes
        done += record.capacity
        if progress is not None:
            progress(done, total)
    if snapshot is not None:
        _save(snapshot, destination, before)
    _install(moment, records, destination, file)
    if snapshot is not None:
        with _snapshots(destination) as store:
            store.protected_op = snapshot.op  # not the newest, where the journal went back to an older copy
            store.prune()
    op = None if snapshot is None else snapshot.op
    return BackupReport(moment.end_lsn, len(records), kept, copied, op)


def _earlier_backup(moment: _Moment, destination: Directory) -> Superblock | None:
    """What is at the destination: nothing, a part of a backup, or an earlier one of this journal."""
    before = read_superblock(destination)
    if before is not None and before.uuid != moment.superblock.uuid:
        raise IncompatibleFormatError(f"{destination} holds another journal")
    if fmt.INDEX_NAME in destination.names():
        raise JournalError(
            f"{destination} was opened as a journal: it is no backup any more; give another folder"
        )
    _check_snapshots(moment, before, destination)
    return before


def _check_snapshots(moment: _Moment, before: Superblock | None, destination: Directory) -> None:
    """JournalError where the file of the snapshot has the name of another that the earlier backup needs."""
    paired = before.pairing if before is not None else None
    snapshot = moment.snapshot
    if paired is None or snapshot is None or paired[0] != snapshot.op:
        return
    if paired[1] != snapshot.checksum:
        raise JournalError(
            f"{destination} holds another snapshot of op {snapshot.op}, of a journal that went on elsewhere "
            "from an older copy: give another folder, or back up after the next checkpoint"
        )


def _make_certain(before: Superblock, destination: Directory) -> None:
    """Killed at its end, the earlier backup may not be durable: a power cut brings back the one before it,
    whose files stay until then. OSError, PoisonedError: the facts are the same in either case."""
    file = SuperblockFile(destination, before)
    try:
        file.commit(before)
    finally:
        file.close()


def _is_there(record: SegmentRecord, segment: Segment, before: Superblock, destination: Directory) -> bool:
    """Whether an earlier backup has all of the segment: it had been left for good, and holds the same bytes.

    Of the first generation, which has all its frames, the one that ends it stands by its link for all before
    it. In a later one a gap links on as what it stands for did, whatever that was. OSError."""
    if not record.end_lsn or record not in before.segments:
        return False
    copy = Segment(destination, before.uuid, record)
    end = fmt.PAGE_BYTES + record.end_lsn - record.base_lsn
    try:
        copy.view  # noqa: B018  # maps it
    except CorruptionError:
        return False
    start = fmt.PAGE_BYTES if record.generation > 0 else end - fmt.FRAME_BYTES
    for at in range(start, end, COMPARED_BYTES):
        length = min(COMPARED_BYTES, end - at)
        if segment.copy(at, length) != copy.copy(at, length):
            return False
    return True


def _unnamed(record: SegmentRecord, before: Superblock | None) -> SegmentRecord:
    """As which generation a segment is copied: one that the earlier backup does not name, whose file stays as
    it is. Never below the journal's: a first generation has all its frames, wherever it lies."""
    if before is None or record.name not in {r.name for r in before.segments}:
        return record
    return replace(record, generation=record.generation + 1)


def _copy(moment: _Moment, record: SegmentRecord, segment: Segment, destination: Directory) -> SegmentRecord:
    """As that generation, durable at return. CorruptionError when it is damaged below the moment's end."""
    durable = _scanned(moment, segment, moment.durable_lsn)
    whole = durable
    if durable.stop == lib.MW_STOP_LIMIT:
        whole = _scanned(moment, segment, moment.end_lsn, int(durable.lsn), int(durable.link))
    end_lsn = int(whole.lsn)
    at = fmt.PAGE_BYTES + int(durable.lsn) - record.base_lsn
    parts: list[tuple[int, memoryview | bytes]] = [(fmt.PAGE_BYTES, segment.view[fmt.PAGE_BYTES : at])]
    if whole is not durable and end_lsn > durable.lsn:
        # The page cache may show what the disk lost, and who writes it anew what was not there.
        copy = checked_copy(segment, int(durable.lsn), end_lsn, moment.superblock)
        if copy is None:
            raise stop_problem(segment, durable).error()
        parts.append((at, bytes(copy)))
    source = _source(moment.directory, segment)
    try:
        make_segment(
            destination, moment.superblock.uuid, record, parts, source=source,
            sparse=whole.stop == lib.MW_STOP_END,
        )  # fmt: skip
    finally:
        if source is not None:
            source.close()
    return replace(record, end_lsn=end_lsn) if whole.stop == lib.MW_STOP_END else record


def _scanned(moment: _Moment, segment: Segment, limit_lsn: int, lsn: int = 0, link: int = 0) -> Any:
    scan = scan_segment(segment, moment.superblock, limit_lsn=limit_lsn, lsn=lsn, link=link)
    if scan.stop not in {lib.MW_STOP_LIMIT, lib.MW_STOP_END}:
        raise stop_problem(segment, scan).error()
    return scan


def _source(directory: Directory, segment: Segment) -> Storage | None:
    """The segment's file, whose blocks may be shared; None when it has gone, and only the mapping is left."""
    try:
        return directory.open(segment.record.name)
    except FileNotFoundError:
        return None


def _snapshots(destination: Directory) -> SnapshotStore:
    """Where the destination has one, and until its superblock is replaced the one before."""
    folder = destination.subdirectory(fmt.SNAPSHOTS_NAME)
    return SnapshotStore(f"{destination}/{fmt.SNAPSHOTS_NAME}", storage=folder, keep=1)


def _save(snapshot: Snapshot, destination: Directory, before: Superblock | None) -> None:
    """Durable at return; that of the earlier backup stays."""
    with _snapshots(destination) as store:
        if before is not None and before.pairing is not None:
            store.protected_op = before.pairing[0]
        try:
            store.save(snapshot.op, snapshot.data, created_at=snapshot.created_at)
        except SnapshotPersistError as e:
            raise e.__cause__ or e from None
    destination.sync()


def _superblock_file(moment: _Moment, destination: Directory, before: Superblock | None) -> SuperblockFile:
    """Of the facts that are copied. The next sequence is that of neither journal, nor of _make_certain()."""
    sequence = max(moment.superblock.sequence, before.sequence + 1 if before is not None else 0)
    copied = replace(moment.superblock, segments=tuple(moment.segments), seal=None, sequence=sequence)
    return SuperblockFile(destination, copied)


def _install(
    moment: _Moment, records: list[SegmentRecord], destination: Directory, file: SuperblockFile
) -> None:
    """Until its superblock is there, the destination is what it was before; then it is the backup."""
    copied = replace(file.current, segments=tuple(records))
    try:
        file.commit(copied.with_epoch(moment.end_lsn))
        named = {record.name for record in records}
        file.remove_files(n for n in destination.names() if fmt.is_ours(n) and n not in named)
    finally:
        file.close()
