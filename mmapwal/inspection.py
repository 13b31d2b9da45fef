"""Looking at a whole journal, also one that refuses to open: its segments, its index, and the snapshot that
it is paired with."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from mmapwal import format as fmt
from mmapwal.engine import Engine
from mmapwal.errors import CorruptionError, IncompatibleFormatError, SnapshotError
from mmapwal.index import SlotIndex
from mmapwal.recovery import REFUSED, RecoveryRow, decide, refuse, scan_journal
from mmapwal.segment import Segment, SegmentTable
from mmapwal.snapshot import kept_snapshot, snapshot_name
from mmapwal.storage import Directory, SystemDirectory
from mmapwal.superblock import Superblock, read_superblock
from mmapwal.verify import (
    Problem,
    Progress,
    VerifyReport,
    damages,
    file_problem,
    index_problems,
    summary_problems,
    verify_open,
)

__all__ = ["inspect", "inspect_journal", "inspect_open", "snapshot_problems"]


def inspect(path: str | os.PathLike[str] | Directory, progress: Progress | None = None) -> VerifyReport:
    """Checks the journal in a directory, also one that refuses to open, and the snapshot that it is paired
    with, where recover() keeps that. Takes no lock, writes nothing, blocks while it reads everything.

    Beside a live writer it may report what is only under way. FileNotFoundError when no journal is there;
    IncompatibleFormatError for another format version. A segment that the disk fails to read is a problem;
    OSError when a file cannot be opened, or another one not be read.
    """
    own = SystemDirectory(path, create=False) if isinstance(path, str | os.PathLike) else None
    directory: Any = own or path
    try:
        report, superblock = inspect_journal(directory, progress)
        if superblock is None:
            return report
        return replace(report, problems=(*report.problems, *snapshot_problems(directory, superblock)))
    finally:
        if own is not None:
            own.close()


def inspect_journal(
    directory: Directory, progress: Progress | None = None
) -> tuple[VerifyReport, Superblock | None]:
    """inspect() without the snapshot, and the superblock; None where that is what is wrong."""
    try:
        superblock = read_superblock(directory)
    except CorruptionError as e:
        return VerifyReport(0, 0, 0, (Problem.of(e),)), None
    if superblock is not None:
        return inspect_as(directory, superblock, progress), superblock
    if not any(fmt.is_ours(n) for n in directory.names()):
        raise FileNotFoundError(2, "no journal here", str(directory))
    gone = Problem(fmt.SUPERBLOCK_NAME, 0, 0, None, "it is gone, but segments are there")
    return VerifyReport(0, 0, 0, (gone,)), None


def inspect_as(
    directory: Directory, superblock: Superblock, progress: Progress | None = None
) -> VerifyReport:
    """What it is by this superblock, whichever is in force."""
    problems: list[Problem] = []
    sound: list[Segment] = []
    for record in superblock.segments:
        segment = Segment(directory, superblock.uuid, record)
        problem = file_problem(segment)
        if problem is None:
            sound.append(segment)
        else:
            problems.append(problem)
    table = SegmentTable(sound)
    index = SlotIndex.open(directory, superblock.uuid, superblock.slot_count)
    try:
        durable = index.progress()[1] if index is not None else 0
        found = scan_journal(table, superblock, durable, progress)
        row = decide(found.finding)
        if row in REFUSED or problems:
            for segment in sound:
                limit = min(found.proven_lsn, segment.record.end_lsn or segment.record.next_base_lsn)
                problems += damages(segment, superblock, limit_lsn=limit).problems
        if row in REFUSED and (row is not RecoveryRow.LOST or not problems):
            problems.append(Problem.of(refuse(row, found, table)))
        seal = superblock.seal
        if seal is not None and not problems and index is not None and index.crc() == seal.index_crc:
            problems += index_problems(index.copy(), found.slots[0], seal.lsn, seal.lsn)
            problems += summary_problems(found.slots[0], (seal.live, seal.first_op, seal.last_op))
    finally:
        if index is not None:
            index.close()
    return VerifyReport(found.frames, found.entries, found.scanned_bytes, tuple(problems))


def snapshot_problems(directory: Directory, superblock: Superblock) -> tuple[Problem, ...]:
    """Of the paired one. None where snapshots are not kept with the journal: nobody knows where they are."""
    try:
        kept_snapshot(directory, superblock.pairing)
    except (SnapshotError, IncompatibleFormatError) as e:
        op, _ = superblock.pairing or (0, 0)
        return (Problem(f"{fmt.SNAPSHOTS_NAME}/{snapshot_name(op)}", 0, 0, op, str(e)),)
    return ()


def inspect_open(engine: Engine, progress: Progress | None = None) -> VerifyReport:
    """verify_open(), and the snapshot unless it was replaced by a later one meanwhile."""
    report, superblock = verify_open(engine, progress), engine.superblock
    problems = snapshot_problems(engine.directory, superblock)
    if not problems or engine.superblock.pairing != superblock.pairing:
        return report
    return replace(report, problems=(*report.problems, *problems))
