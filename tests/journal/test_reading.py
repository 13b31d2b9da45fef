"""Reading beside whoever removes, replaces and compacts, step by step; and damage met while looking ahead."""

from __future__ import annotations

import gc
import os
import random
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmapwal import CorruptionError, Durability, Journal, MissingOpError
from mmapwal.reader import Reader

from .files import ROOM, SMALL, Home, entry_frames, flip, settle
from .watched import Task

OP, SLOTS = 3, 16


def payload_of(op: int, version: int) -> bytes:
    """Tells of itself what it is, and is of another length in each version."""
    words = 1 + (op * 5 + version * 3) % 11
    return struct.pack("<QQQ", op, version, words) + struct.pack("<QQ", op, version) * words


def told_by(view: Any) -> tuple[int, int]:
    """(op, version) of a payload; AssertionError when it is not one, whole."""
    data = bytes(view)
    op, version, _ = struct.unpack_from("<QQQ", data)
    assert data == payload_of(op, version)
    return op, version


ITERATORS: dict[str, Callable[[Journal], Iterator[Any]]] = {
    "iter": iter,
    "entries": Journal.entries,
    "payloads": Journal.payloads,
    "arrays": Journal.arrays,
    "follow": lambda journal: journal.follow(timeout=0),
}


@pytest.mark.parametrize("name", ITERATORS)
def test_an_iterator_keeps_the_journal_that_nobody_else_has(tmp_path: Path, name: str) -> None:
    with Journal(tmp_path / "j", **SMALL) as journal:
        journal.append_many([b"%02d" % n for n in range(12)])
    with pytest.warns(ResourceWarning, match="not closed"):  # nobody could
        iterator = ITERATORS[name](Journal(tmp_path / "j", readonly=True))
        gc.collect()
        assert sum(len(one) if name == "arrays" else 1 for one in iterator) == 12
        del iterator
        gc.collect()


# --- one read, step by step -----------------------------------------------------------------------------


class Steps:
    """Counts the loads of a read, and does something before the chosen one."""

    def __init__(self, at: int, action: Callable[[], object]) -> None:
        self.count, self.at, self.action = 0, at, action

    def tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.action()


class WatchedColumn:
    def __init__(self, real: memoryview, steps: Steps) -> None:
        self.real, self.steps = real, steps

    def __getitem__(self, slot: int) -> int:
        self.steps.tick()
        return int(self.real[slot])


class WatchedSegments:
    def __init__(self, real: Any, steps: Steps) -> None:
        self.real, self.steps = real, steps

    @property
    def table(self) -> Any:
        self.steps.tick()
        return self.real.table

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def replaced(journal: Journal) -> None:
    journal.append(payload_of(OP, 2), op=OP, replace=True)


def replaced_and_compacted(journal: Journal) -> None:
    replaced(journal)
    journal._engine.rotate()
    assert journal.compact() > 0


def evicted(journal: Journal) -> None:
    """The slot has another op."""
    journal.set_snapshot_op(OP)
    journal.append(payload_of(OP + SLOTS, 1), op=OP + SLOTS)


def evicted_and_compacted(journal: Journal) -> None:
    evicted(journal)
    assert journal.compact() > 0


def truncated_and_appended(journal: Journal) -> None:
    journal.truncate_from(OP)
    journal.append(payload_of(OP, 2), op=OP)
    journal.compact()


ACTIONS = [replaced, replaced_and_compacted, evicted, evicted_and_compacted, truncated_and_appended]


def old_segment(home: Home, durability: Durability) -> Journal:
    """OP lies in a segment that was left, and most of which is dead."""
    journal = home.open(**SMALL, durability=durability)
    for op in (1, 2, OP, 4):
        journal.append(payload_of(op, 1), op=op)
    journal.append(bytes(ROOM // 2), op=5)
    journal.append(bytes(ROOM // 2), op=5, replace=True)
    journal.sync()
    told_by(journal.read(OP))  # its segment is mapped, and lent
    told_by(journal.read(OP))
    return journal


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("durability", [Durability.SYNC, Durability.OS])
@pytest.mark.parametrize("way", ["read", "[]", "in"])
def test_whatever_happens_between_two_steps_of_a_read_it_gives_the_op_asked_for_or_none(
    home: Home, action: Callable[[Journal], None], durability: Durability, way: str
) -> None:
    taken = 0
    for at in range(1, 30):
        journal = old_segment(home, durability)
        reader: Reader = journal._reader
        steps = Steps(at, lambda journal=journal: action(journal))  # type: ignore[misc]
        slots, lsns, ops, lengths, segments, below = reader.plain
        columns = tuple(WatchedColumn(c, steps) for c in (lsns, ops, lengths))
        real = reader.segments
        reader.segments = WatchedSegments(segments, steps)  # type: ignore[assignment]
        reader.plain = (slots, *columns, reader.segments, below)  # type: ignore[assignment]
        try:
            if way == "in":
                assert (OP in journal) in {True, False}
            else:
                view = journal.read(OP) if way == "read" else journal[OP].payload
                assert told_by(view) in {(OP, 1), (OP, 2)}
        except MissingOpError:
            assert action in {evicted, evicted_and_compacted, truncated_and_appended}
        reader.segments, reader.plain = real, (slots, lsns, ops, lengths, segments, below)
        journal.close()
        home = home.after_kill()
        for name in home.directory().names():
            home.directory().unlink(name)
        if steps.count < at:
            break
        taken += 1
    assert taken >= (5 if way == "read" else 2)  # it was stopped before every load


def test_reads_beside_a_writer_that_replaces_evicts_and_compacts_are_of_the_op_asked_for(home: Home) -> None:
    """Reads, iterations, columns and arrays at full speed, with threads that change every few bytecodes."""
    journal = home.open(slots=64, segment_bytes=16384, durability=Durability.OS)
    journal.append_many([payload_of(op, 0) for op in range(1, 33)])
    done, before = threading.Event(), sys.getswitchinterval()

    def write() -> int:
        chance = random.Random(1)
        for version in range(1, 700):
            low, high = journal.snapshot_op + 1, journal.last_op or 0
            op = chance.randint(low, high)
            journal.append(payload_of(op, version), op=op, replace=True)
            journal.append(payload_of(high + 1, version), op=high + 1)
            if high - low > 50:
                journal.set_snapshot_op(low + 25)
            if version % 40 == 0:
                journal.compact()
        return journal.compact()

    def read(seed: int) -> int:
        chance, found = random.Random(seed), 0
        while not done.is_set():
            low, high = journal.snapshot_op + 1, journal.last_op or 0
            for op in (chance.randint(low, high) for _ in range(200)):
                try:
                    assert told_by(journal.read(op))[0] == op
                    assert told_by(journal[op].payload)[0] == op
                    found += 1
                except MissingOpError:
                    pass
            assert all(told_by(e.payload)[0] == e.op for e in journal)
            columns = journal.columns()
            for row, op in enumerate(columns.ops.tolist()):
                assert told_by(columns.payload(row))[0] == op
        return found

    sys.setswitchinterval(1e-5)
    try:
        readers = [Task(lambda n=n: read(n)) for n in range(2)]
        try:
            assert Task(write).result() >= 0
        finally:
            done.set()
            found = [r.result() for r in readers]
        assert all(n > 0 for n in found)
    finally:
        sys.setswitchinterval(before)
    assert journal.verify().ok


def test_every_op_is_found_over_segments_of_any_length_and_the_holes_between_them(home: Home) -> None:
    """Longer segments, dropped ones, and the first and last frame of each."""
    journal = home.open(slots=4096, segment_bytes=16384, durability=Durability.OS)
    for n in range(60):
        journal.append(payload_of(journal.last_op or 0, n) * (1 + 40 * (n % 7 == 0) + 300 * (n % 11 == 0)))
    everything = {e.op: bytes(e.payload) for e in journal}
    journal.drain(20, 40)
    journal.compact()
    for _ in range(2):
        for op, payload in everything.items():
            if 20 <= op <= 40:
                with pytest.raises(MissingOpError):
                    journal.read(op)
            else:
                assert journal.read(op) == payload
                assert journal.copy(op) == payload


# --- looking ahead --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [1, 2, 15, 16, 17, 18, 33, 40])
def test_what_lies_before_a_damaged_frame_is_given_and_then_the_damage_is_told(home: Home, op: int) -> None:
    journal = home.open(slots=64, segment_bytes=65536)
    journal.append_many([payload_of(n, 7) for n in range(1, 41)])
    flip(home.directory(), *entry_frames(home.directory())[op][:2])  # a byte of the header's checksum
    for read in (journal.entries, journal.payloads):
        found: list[int] = []
        with pytest.raises(CorruptionError) as raised:
            for item in read():
                found.append(told_by(getattr(item, "payload", item))[0])
        assert found == list(range(1, op))
        assert raised.value.op == op
    for whole in (journal.columns, lambda: list(journal.arrays(op, op)), lambda: journal.array(op, op)):
        with pytest.raises(CorruptionError):
            whole()


@pytest.mark.parametrize("kind", ["mapped"], indirect=True)
@pytest.mark.parametrize("page", [2, 3, 5])
def test_what_lies_before_a_page_that_the_disk_does_not_bring_is_given_and_then_the_error(
    home: Home, page: int
) -> None:
    journal = home.open(slots=64, segment_bytes=65536)
    journal.append_many([bytes([n]) * 700 for n in range(1, 41)])
    journal.read(1)  # maps it
    frames = entry_frames(home.directory())
    os.truncate(home.path / frames[1].name, page * 4096)
    whole = [op for op, f in frames.items() if f.at + f.bytes <= page * 4096]
    found: list[int] = []
    with pytest.raises(OSError, match="segment"):
        for entry in journal.entries():
            found.append(entry.op)
    assert found == whole
    with pytest.raises(OSError, match="segment"):
        journal.columns()
    os.truncate(home.path / frames[1].name, 65536)


@pytest.mark.parametrize("kind", ["mapped"], indirect=True)
def test_a_segment_that_was_cut_before_it_was_mapped_is_damage_and_nothing_behind_it_is_read(
    home: Home,
) -> None:
    journal = home.open(slots=64, segment_bytes=65536)
    journal.append_many([bytes([n]) * 700 for n in range(1, 41)])
    name = entry_frames(home.directory())[1].name
    os.truncate(home.path / name, 3 * 4096)
    for read in (lambda: journal.read(1), lambda: journal.copy(1), lambda: list(journal), journal.columns):
        with pytest.raises(CorruptionError, match="cut to 12288 bytes"):
            read()
    os.truncate(home.path / name, 65536)


def test_a_prepared_segment_that_gave_way_to_a_longer_one_is_not_taken_for_it(home: Home) -> None:
    journal = home.open(slots=4096, segment_bytes=16384)
    journal.append_many([b"%d" % op for op in range(1, 121)])
    settle(journal)
    segments = journal._engine.segments
    assert not any(segments.table.segments[-1].view[4096:])  # mapped, and blank
    segments.follow(journal._engine.superblock.segments)
    payloads = journal.payloads()
    first = bytes(next(payloads))
    journal.append(b"long" * 16384, op=100, replace=True)
    found = [first, *map(bytes, payloads)]
    assert found == [b"%d" % op if op != 100 else b"long" * 16384 for op in range(1, 121)]
