"""Opens what a fuzzer made of a journal's files, looks at it in every way, works with it, opens it again.

Whatever the bytes are: each call returns or raises what its documentation names, the disk is asked a
bounded number of times, memory stays within a bound, and no entry is there that the bytes do not have.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmapwal import ExhaustedError, Journal, JournalError, inspect, recover, repair
from mmapwal import format as fmt
from mmapwal._native import lib
from mmapwal.storage import Directory, SystemDirectory
from mmapwal.superblock import read_superblock
from mmapwal.testing import Call, InterposedDirectory

from .images import Entry, Image, Words, files_of, memory_of, write_files
from .mutate import Mutation

T = TypeVar("T")

TYPED = (JournalError, OSError)
CALLS_MAX = 1500  # of the disk, for one open or one action; a segment more costs a dozen
DISK_BYTES_MAX = 64 << 20  # it is full then
MEMORY_BYTES_MAX = 16 << 20  # beside the files, and what the number of slots asks for
SLOT_COPIES_MAX = 8
TRACED_SHARE = 8  # of how many inputs the memory is looked at for one


class SmallDisk(InterposedDirectory):
    """Counts calls, and is full at some point. AssertionError for a caller that never comes to an end."""

    def __init__(self, inner: Directory) -> None:
        super().__init__(inner)
        self.calls = self.written = 0

    def wrap_directory(self, inner: Directory) -> SmallDisk:
        return SmallDisk(inner)

    def intercept(self, call: Call) -> Any:
        self.calls += 1
        assert self.calls <= CALLS_MAX, f"call {self.calls} of the disk: {call.kind} of {call.name}"
        if call.kind in {"write", "write_sync", "truncate"}:
            self.written += len(call.data)
            end = call.offset + len(call.data)  # of truncate: the length
            if max(self.written, end) > DISK_BYTES_MAX:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), call.name)
        return call.run()


class Ground:
    """Where one mutated image lies: in memory, or in real files that are mapped."""

    def __init__(self, image: Image, path: Path | None) -> None:
        self.image, self.path = image, path
        if path is None:
            self.memory = memory_of(image)
        else:
            write_files(image, path)

    @contextlib.contextmanager
    def directory(self) -> Iterator[Directory]:
        if self.path is None:
            self.memory.close()  # the lock of a journal that was refused
            yield self.memory
            return
        directory = SystemDirectory(self.path, create=False)
        directory.concurrent = False  # no thread beside: what was done is the same each time
        try:
            yield directory
        finally:
            directory.close()

    def files(self) -> Image:
        with self.directory() as directory:
            return files_of(directory)


def typed(what: str, call: Callable[[], T], *also: type[Exception]) -> T | None:
    """The result, or None for an error that the documentation names. Anything else is a finding."""
    try:
        return call()
    except (*TYPED, *also):
        return None
    except MemoryError as e:
        raise AssertionError(f"{what}: no memory") from e


@contextlib.contextmanager
def bounded_memory(slots: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    bound = MEMORY_BYTES_MAX + SLOT_COPIES_MAX * fmt.SLOT_BYTES * slots
    assert peak <= bound, f"{peak:,} bytes of memory at once, {bound:,} would be enough"


def examine(mutation: Mutation, path: Path | None = None) -> str:
    """How the open ended: the row of the recovery table, or the name of the error."""
    ground = Ground(mutation.files, path)
    traced = fmt.crc32c(mutation.data) % TRACED_SHARE == 0  # it takes three times as long
    with bounded_memory(_slots_of(ground)) if traced else contextlib.nullcontext():
        with ground.directory() as directory:
            typed("inspect", lambda: inspect(SmallDisk(directory)))
        outcome = _open(ground, mutation)
        _replica(ground, mutation)
        _repair(mutation)
    return outcome


def _slots_of(ground: Ground) -> int:
    with ground.directory() as directory:
        superblock = typed("the superblock", lambda: read_superblock(directory))
    return min(superblock.slot_count, fmt.SLOTS_MAX) if superblock is not None else 0


def _open(ground: Ground, mutation: Mutation) -> str:
    with ground.directory() as directory:
        disk = SmallDisk(directory)
        try:
            journal = Journal("j", storage=disk, create=False)
        except TYPED as e:
            if isinstance(e, JournalError):
                assert _ours(ground.files()) == _ours(ground.image), f"refused ({e}), and yet changed"
            return type(e).__name__
        try:
            disk.calls = 0
            outcome = journal.report.outcome.value
            sound = look(journal)
            if sound is not None:
                _nothing_invented(journal, mutation, sound)
                _nothing_lost(mutation, sound)
            _work(journal, disk)
            after = look(journal) if sound is not None and journal.poisoned is None else None
        finally:
            disk.calls = 0
            typed("close", journal.close)
    if after is not None:
        with ground.directory() as directory:
            journal = Journal("j", storage=SmallDisk(directory), create=False)
            try:
                assert look(journal) == after, "opened again, it shows something else"
            finally:
                journal.close()
    return outcome


def _ours(image: Image) -> Image:
    return {n: d for n, d in image.items() if n != fmt.SUPERBLOCK_SPARE_NAME}


def look(journal: Journal) -> dict[int, Entry] | None:
    """What it shows, where verify() finds nothing wrong: then all ways to look agree. Else none of them
    fails but by its errors, and nothing is returned."""
    report = typed("verify", journal.verify)
    ways: dict[str, Callable[[], Any]] = {
        "iteration": lambda: {e.op: (bytes(e.payload), e.kind) for e in journal},
        "payloads": lambda: [bytes(p) for p in journal.payloads()],
        "columns": lambda: _by_columns(journal),
        "headers": lambda: list(map(int, journal.headers()["op"])),
        "copied headers": lambda: list(map(int, journal.headers(copy=True)["checksum"])),
        "state": lambda: (len(journal), journal.first_op, journal.last_op),
    }
    seen = {name: typed(name, way) for name, way in ways.items()}
    typed("arrays", lambda: [a.sum() for a in journal.arrays()], ValueError)
    typed("array", journal.array, ValueError)
    typed("remaining_capacity", lambda: journal.remaining_capacity)
    typed("stats", journal.stats)
    ops = {*(seen["headers"] or ()), 1, journal.snapshot_op, journal.snapshot_op + 1, journal.last_op or 1}
    one_by_one = {}
    for op in sorted(o for o in ops if o <= fmt.OP_MAX)[:40]:
        view = typed("read", lambda op=op: bytes(journal.read(op)))
        copy = typed("copy", lambda op=op: journal.copy(op))
        header = typed("header", lambda op=op: journal.header(op))
        there = typed("contains", lambda op=op: op in journal)
        if copy is not None and header is not None:
            one_by_one[op] = (copy, header.kind)
            if report is not None and report.ok:
                assert view == copy, f"read and copy of op {op} differ"
                assert there, f"op {op} is not in the journal that gave it"
    if report is None or not report.ok:
        return None
    found = seen["iteration"]
    assert found is not None, "verify found nothing wrong, and it cannot be read"
    assert seen["payloads"] == [payload for payload, _ in found.values()], "payloads"
    assert seen["columns"] == found, "columns"
    assert seen["headers"] == list(found), "headers"
    assert seen["copied headers"] == [fmt.crc32c(payload) for payload, _ in found.values()], "checksums"
    assert one_by_one == found or len(found) > 39, "entries one by one"
    assert seen["state"] == (len(found), min(found, default=None), max(found, default=None)), "state"
    assert all(op > journal.snapshot_op for op in found), "an op at or below the watermark"
    return found


def _by_columns(journal: Journal) -> dict[int, Entry]:
    columns = journal.columns()
    return {
        op: (bytes(columns.payload(row)), kind)
        for row, (op, kind) in enumerate(zip(columns.ops.tolist(), columns.kinds.tolist(), strict=True))
    }


def _nothing_invented(journal: Journal, mutation: Mutation, found: dict[int, Entry]) -> None:
    """Each entry is one that was appended; or, with checksums made right, one that the files have."""
    superblock = journal._engine.superblock
    for op, (payload, kind) in found.items():
        if not mutation.repaired:
            assert (payload, kind) in mutation.grown.appended[op], f"op {op} was never appended like that"
            continue
        header = journal.header(op)
        assert header is not None
        record = next(s for s in superblock.segments if s.base_lsn <= header.lsn < s.base_lsn + s.capacity)
        names = [n for n in mutation.files if n.startswith(f"segment-{record.id:016x}-")]
        at = fmt.PAGE_BYTES + header.lsn - record.base_lsn
        assert any(_has_frame(mutation.files[n], at, op, kind, payload) for n in names), (
            f"op {op} at LSN {header.lsn} is not in the files"
        )


def _has_frame(data: bytes, at: int, op: int, kind: int, payload: bytes) -> bool:
    if at + fmt.FRAME_BYTES > len(data):
        return False
    frame: Any = np.frombuffer(data, fmt.FRAME, 1, at)[0]
    same = (int(frame["op"]), int(frame["kind"]), int(frame["type"])) == (op, kind, lib.MW_ENTRY)
    return same and data[at + fmt.FRAME_BYTES : at + fmt.FRAME_BYTES + len(payload)] == payload


def _nothing_lost(mutation: Mutation, found: dict[int, Entry]) -> None:
    """All was durable, and the index page said so: one damaged file of them is told, or harmless."""
    grown = mutation.grown
    if mutation.repaired or mutation.stale_superblock:
        return
    kinds = {"segment" if n.startswith("segment") else n for n in mutation.touched}
    if "segment" in kinds and fmt.INDEX_NAME in kinds:
        return  # the evidence may be gone too
    assert found == grown.contents, (
        f"silently lost: ops {sorted(grown.contents.keys() - found.keys())}, "
        f"come back: {sorted(found.keys() - grown.contents.keys())}"
    )


def _work(journal: Journal, disk: SmallDisk) -> None:
    """What a user does with it next."""
    actions: dict[str, Callable[[], Any]] = {
        "append": lambda: journal.append(b"behind"),
        "append_many": lambda: journal.append_many([b"a" * 5000, b"b" * 3000]),
        "truncate_from": lambda: journal.truncate_from(journal.last_op or 1),
        "replace": lambda: journal.append(b"again", op=journal.first_op or 1, replace=True),
        "drain": lambda: [bytes(e.payload) for e in journal.drain(1, journal.first_op or 1)],
        "compact": journal.compact,
        "set_snapshot_op": lambda: journal.set_snapshot_op(journal.first_op or journal.snapshot_op),
        "compact again": journal.compact,
        "append again": lambda: journal.append(b"last"),
        "sync": journal.sync,
    }
    for name, action in actions.items():
        disk.calls = 0
        typed(name, action, ValueError)  # no op is left behind the highest one


def _repair(mutation: Mutation) -> None:
    """A copy of the files is repaired, or it is told why not and they are as they were. What is repaired
    opens, and has no entry but theirs."""
    ground = Ground(mutation.files, None)
    with ground.directory() as directory:
        report = typed("repair", lambda: repair(SmallDisk(directory)))
    if report is None or not report.changed:
        assert _ours(ground.files()) == _ours(ground.image), "not repaired, and yet changed"
    if report is None:
        return
    with ground.directory() as directory:
        try:
            journal = Journal("j", storage=SmallDisk(directory), create=False)
        except (ExhaustedError, OSError):
            return
        try:
            found = look(journal)
            assert found is not None or report.remaining, "repaired, and yet something is wrong"
            _nothing_invented(journal, mutation, found or {})
        finally:
            typed("close", journal.close)


def _replica(ground: Ground, mutation: Mutation) -> None:
    """A state machine on top: its state is what it was, or it is told why it cannot be."""
    fresh = Ground(ground.image, None)
    with fresh.directory() as directory:
        machine = Words()
        try:
            replica = recover("j", machine, storage=SmallDisk(directory), create=False)
        except TYPED:
            return
        try:
            if mutation.repaired or mutation.stale_superblock:
                return
            if {n.partition("/")[0] for n in mutation.touched} <= {fmt.SNAPSHOTS_NAME, fmt.INDEX_NAME}:
                assert machine.state == mutation.grown.state, "another state was restored"
        finally:
            typed("close", replica.close)
