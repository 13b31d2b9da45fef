"""Many threads at once: what is acknowledged is there at once, for all, with its bytes."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest

from mmapwal import (
    BusyError,
    ClosedError,
    DuplicateOpError,
    Durability,
    Journal,
    JournalFullError,
    MissingOpError,
)

from .files import SMALL, Home, contents_of, killed
from .watched import Task

WRITERS, READERS = 8, 4


def payload_of(writer: int, n: int) -> bytes:
    return b"writer %d entry %d " % (writer, n) * (1 + (writer * 7 + n) % 9)


class Crowd:
    """Threads that append, each remembering what it was told, and threads that read that."""

    def __init__(self, journal: Journal, entries: int, *, readers: int = READERS) -> None:
        self.journal = journal
        self.acknowledged: dict[int, bytes] = {}
        self.done = threading.Event()
        self.writers = [Task(lambda w=w: self.write(w, entries)) for w in range(WRITERS)]
        self.readers = [Task(lambda r=r: self.read(r)) for r in range(readers)]

    def write(self, writer: int, entries: int) -> list[int]:
        ops = []
        for n in range(entries):
            payload = payload_of(writer, n)
            if n % 10 == 9:
                got = self.journal.append_many([payload, payload + b"!"])
                assert len(got) == 2
                self.told(got[1], payload + b"!")
                ops.append(got[1])
                op = got[0]
            else:
                op = self.journal.append(payload, kind=writer)
            self.told(op, payload)
            ops.append(op)
        return ops

    def told(self, op: int, payload: bytes) -> None:
        assert bytes(self.journal.read(op)) == payload
        self.acknowledged[op] = payload

    def read(self, seed: int) -> int:
        """Looks at what others were told, in every way; how often."""
        looks = 0
        while not self.done.is_set():
            for op in list(self.acknowledged)[seed::READERS][-20:]:  # no tuples: nothing is collected
                looks += 1
                payload = self.acknowledged[op]
                assert bytes(self.journal.read(op)) == payload
                assert self.journal.copy(op) == payload
                assert bytes(self.journal[op].payload) == payload
            known = max(self.acknowledged, default=0)
            seen = [e.op for e in itertools.islice(self.journal.entries(known - 50), 60)]
            assert seen == sorted(seen)
            assert len(self.journal) >= 0
        return looks

    def join(self) -> list[int]:
        try:
            ops = [op for t in self.writers for op in t.result()]
        finally:
            self.done.set()
            for t in self.readers:
                t.finish()
        assert all(t.result() is not None for t in self.readers)
        return ops


@pytest.mark.parametrize("durability", list(Durability))
def test_every_acknowledged_entry_is_there_at_once_with_its_bytes(home: Home, durability: Durability) -> None:
    """Over many segments, with every op given once."""
    journal = home.open(slots=8192, segment_bytes=16384, durability=durability)
    crowd = Crowd(journal, 60)
    ops = crowd.join()
    assert len(ops) == len(set(ops)) == WRITERS * 66
    assert sorted(ops) == list(range(1, len(ops) + 1))
    journal.sync()
    assert {e.op: bytes(e.payload) for e in journal} == crowd.acknowledged
    left = killed(home, journal)
    journal.close()
    for found in (home.open(), left.open()):
        assert {e.op: bytes(e.payload) for e in found} == crowd.acknowledged
        assert found.verify().ok


def test_a_segment_that_is_first_read_while_it_is_written_shows_what_was_written(home: Home) -> None:
    """The first read maps it, and every read after that sees the same mapping."""
    journal = home.open(slots=1024, segment_bytes=16384, durability=Durability.OS)
    for first in range(1, 401, 20):
        task = Task(lambda first=first: [journal.append(b"%d" % n * 180) for n in range(first, first + 20)])
        while first + 2 not in journal:
            pass
        for op in range(first, (journal.last_op or 0) + 1):
            assert journal.copy(op) == b"%d" % op * 180
        assert task.result()[-1] == first + 19
    assert [bytes(p) for p in journal.payloads()] == [b"%d" % n * 180 for n in range(1, 401)]


def test_ops_of_one_thread_only_grow(home: Home) -> None:
    journal = home.open(slots=1024, segment_bytes=65536)
    crowd = Crowd(journal, 20, readers=0)
    for task in crowd.writers:
        ops = [op for op in task.result() if crowd.acknowledged[op][-1:] != b"!"]
        assert ops == sorted(ops)
    crowd.join()


@pytest.mark.parametrize("durability", list(Durability))
def test_draining_and_compacting_beside_appends_loses_nothing(home: Home, durability: Durability) -> None:
    """A ring that is smaller than what goes through it: one thread drains what was acknowledged, and
    compacts; all that was appended is drained or there, once, with its bytes."""
    journal = home.open(slots=256, segment_bytes=16384, durability=durability)
    acknowledged: dict[int, bytes] = {}
    done = threading.Event()

    def write(writer: int) -> None:
        for n in range(60):
            payload = payload_of(writer, n)
            while True:
                try:
                    op = journal.append(payload)
                except JournalFullError:
                    continue
                break
            acknowledged[op] = payload

    def shrink() -> dict[int, bytes]:
        drained: dict[int, bytes] = {}
        rounds = 0
        while not done.is_set():
            last = max(acknowledged, default=0)
            if last < 40:
                continue
            entries = journal.drain(1, last - 20)
            rounds += 1
            if rounds % 2:
                journal.compact()
            for entry in entries:
                assert entry.op not in drained
                drained[entry.op] = bytes(entry.payload)
        return drained

    def read() -> None:
        while not done.is_set():
            for entry in journal:
                if entry.op in acknowledged:
                    assert bytes(entry.payload) == acknowledged[entry.op]
            with contextlib.suppress(MissingOpError):
                journal.copy(max(acknowledged, default=1))

    writers = [Task(lambda w=w: write(w)) for w in range(WRITERS)]
    others = [Task(shrink), Task(read), Task(read)]
    try:
        for task in writers:
            task.result()
    finally:
        done.set()
        for task in others:
            task.finish()
    drained = others[0].result()
    for task in others:
        task.result()
    left = {e.op: bytes(e.payload) for e in journal}
    assert not set(left) & set(drained)
    assert left | drained == acknowledged
    assert sorted(acknowledged) == list(range(1, WRITERS * 60 + 1))
    assert journal.verify().ok
    journal.sync()
    home = killed(home, journal)
    found = home.open()
    assert {e.op: bytes(e.payload) for e in found} == left


def test_of_two_threads_that_want_one_op_one_gets_it(home: Home) -> None:
    journal = home.open(slots=256, segment_bytes=16384)
    barrier = threading.Barrier(4)
    won: list[tuple[int, int]] = []

    def want(writer: int) -> int:
        refused = 0
        for op in range(1, 41):
            barrier.wait(60)
            try:
                journal.append(b"%d" % writer, op=op)
            except DuplicateOpError:
                refused += 1
            else:
                won.append((op, writer))
        return refused

    tasks = [Task(lambda w=w: want(w)) for w in range(4)]
    assert sum(t.result() for t in tasks) == 3 * 40
    assert sorted(op for op, _ in won) == list(range(1, 41))
    assert contents_of(journal) == {op: (b"%d" % writer, 0) for op, writer in won}


@pytest.mark.parametrize("durability", list(Durability))
@pytest.mark.parametrize("after", [1, 7, 60])
def test_close_while_appending_each_append_has_succeeded_or_says_closed(
    home: Home, durability: Durability, after: int
) -> None:
    journal = home.open(slots=1 << 18, segment_bytes=16384, durability=durability)
    acknowledged: dict[int, bytes] = {}

    def write(writer: int) -> str:
        for n in itertools.count():
            payload = payload_of(writer, n)
            try:
                op = journal.append(payload)
            except ClosedError:
                return "closed"
            acknowledged[op] = payload
        raise AssertionError

    tasks = [Task(lambda w=w: write(w)) for w in range(WRITERS)]
    while len(acknowledged) < after:
        pass
    journal.close()
    assert [t.result() for t in tasks] == ["closed"] * WRITERS
    found = home.open()
    assert found.report.outcome.value == "sealed"
    assert {e.op: bytes(e.payload) for e in found} == acknowledged


def test_close_by_several_threads_at_once_is_one_close(home: Home) -> None:
    journal = home.open(**SMALL, durability=Durability.BUFFERED)
    journal.append(b"x")
    for task in [Task(journal.close) for _ in range(4)]:
        task.result()
    assert contents_of(home.open()) == {1: (b"x", 0)}


def test_reads_while_closing_are_right_or_say_closed(home: Home) -> None:
    journal = home.open(slots=1024, segment_bytes=16384)
    journal.append_many([b"%d" % n * 20 for n in range(1, 201)])
    begun = threading.Barrier(READERS + 1)

    def read(_: int) -> str:
        begun.wait(60)
        for n in itertools.count():
            op = n % 200 + 1
            try:
                assert journal.copy(op) == bytes(journal.read(op)) == b"%d" % op * 20
                assert sum(1 for _ in journal.payloads(150)) == 51
            except ClosedError:
                return "closed"
        raise AssertionError

    tasks = [Task(lambda r=r: read(r)) for r in range(READERS)]
    begun.wait(60)
    journal.close()
    assert [t.result() for t in tasks] == ["closed"] * READERS


def test_shrinking_by_several_threads_at_once_is_done_in_turn_or_refused(home: Home) -> None:
    """Every call has happened wholly, or raised BusyError and not happened."""
    journal = home.open(slots=512, segment_bytes=16384)
    journal.append_many([b"%d" % n * 20 for n in range(1, 401)])
    calls: list[Callable[[int], Any]] = [
        lambda n: journal.drain(100 + n, 100 + n),
        journal.set_snapshot_op,
        lambda n: journal.truncate_from(400 - n),
        lambda n: journal.compact(),
    ]

    def shrink(which: int) -> list[int]:
        done = []
        for n in range(1, 41):
            try:
                calls[which](n)
            except BusyError:
                continue
            done.append(n)
        return done

    drained, moved, truncated, _ = [t.result() for t in [Task(lambda w=w: shrink(w)) for w in range(4)]]
    low, high = max(moved, default=0), 400 - max(truncated, default=0)
    wanted = set(range(low + 1, high if truncated else 401)) - {100 + n for n in drained}
    assert {e.op for e in journal} == wanted
    assert all(bytes(e.payload) == b"%d" % e.op * 20 for e in journal)
    assert {e.op for e in killed(home, journal).open()} == wanted
