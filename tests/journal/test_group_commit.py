"""Threads that append at once share commits: all in it are told what it came to, nobody waits for ever."""

from __future__ import annotations

import errno
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mmapwal import ClosedError, Durability, Journal, PoisonedError, SyncMethod
from mmapwal.testing import Call

from .files import contents_of
from .watched import WAIT_S, Gate, Task, Watched

THREADS = 16


def is_segment(call: Call) -> bool:
    return call.name.startswith("segment")


def is_commit(call: Call) -> bool:
    return call.kind in {"write", "write_sync"} and is_segment(call)


class Crowd:
    """A journal in memory with threads at it, whose commit is held up until all that shall come is staged."""

    def __init__(self, open_on: Callable[..., Journal], method: SyncMethod = SyncMethod.DSYNC) -> None:
        self.directory = Watched(sync_method=method)
        self.directory.concurrent = True
        self.journal = open_on(self.directory, slots=1 << 16, segment_bytes=1 << 20)
        self.journal.append(b"one")
        self.engine = self.journal._engine

    @property
    def commits(self) -> int:
        return int(self.engine.state().commits)

    @contextmanager
    def gathered(
        self, *calls: Callable[[], Any], wanted: Callable[[Call], bool] = is_commit
    ) -> Iterator[tuple[Gate, list[Task]]]:
        """The first call is under way, and the others have staged what they want."""
        self.directory.on = gate = Gate(wanted)
        tasks = [Task(calls[0])]
        gate.wait()
        for call in calls[1:]:
            before = self.engine.state().staged_bytes
            tasks.append(Task(call))
            end = time.monotonic() + WAIT_S
            while self.engine.state().staged_bytes == before:
                assert time.monotonic() < end
                time.sleep(0.0005)
        yield gate, tasks
        gate.open()
        for task in tasks:
            task.finish()


def test_all_that_came_while_a_commit_was_under_way_is_one_commit(open_on: Callable[..., Journal]) -> None:
    crowd = Crowd(open_on)
    journal = crowd.journal
    calls: list[Callable[[], Any]] = [lambda n=n: journal.append(b"%d" % n) for n in range(THREADS)]
    calls += [lambda n=n: journal.append_many([b"a%d" % n, b"b%d" % n]) for n in range(4)]
    before = crowd.commits
    with crowd.gathered(*calls) as (gate, tasks):
        assert not any(t.join(0.001) or not t.is_alive() for t in tasks)  # nobody is told yet
        assert len(journal) == 1
        gate.open()
        results = [t.result() for t in tasks]
    assert results[:THREADS] == list(range(2, 2 + THREADS))
    assert results[THREADS:] == [range(n, n + 2) for n in range(18, 26, 2)]
    assert crowd.commits - before == 2
    assert [bytes(p) for p in journal.payloads(2)][:THREADS] == [b"%d" % n for n in range(THREADS)]


@pytest.mark.parametrize("method", [SyncMethod.DSYNC, SyncMethod.FDATASYNC])
@pytest.mark.parametrize("kinds", [("write", "write_sync"), ("sync", "write_sync")])
def test_a_failure_is_told_to_all_in_the_commit_and_behind_it_each_an_error_of_his_own(
    open_on: Callable[..., Journal], method: SyncMethod, kinds: tuple[str, ...]
) -> None:
    crowd = Crowd(open_on, method)
    journal = crowd.journal
    wanted = lambda call: call.kind in kinds and is_segment(call)  # noqa: E731
    calls = [lambda: journal.append(b"x"), *[lambda: journal.append_many([b"y", b"z"])] * (THREADS - 1)]
    with crowd.gathered(*calls, wanted=wanted) as (gate, tasks):
        syncing = Task(journal.sync)
        gate.open(OSError(errno.EIO, "the disk"))
        errors = [t.finish() for t in [*tasks, syncing]]
    assert [type(e) for e in errors] == [PoisonedError] * len(errors)
    assert len({id(e) for e in errors}) == len(errors)
    causes = {id(e.__cause__) for e in errors if e is not None}
    assert len(causes) == 1
    assert contents_of(journal) == {1: (b"one", 0)}


def test_a_write_without_space_is_told_to_all_and_the_next_one_works(open_on: Callable[..., Journal]) -> None:
    crowd = Crowd(open_on, SyncMethod.FDATASYNC)
    journal = crowd.journal
    with crowd.gathered(*[lambda: journal.append(b"x")] * THREADS) as (gate, tasks):
        gate.open(OSError(errno.ENOSPC, "full"))
        errors = [t.finish() for t in tasks]
    assert {type(e) for e in errors} == {OSError}
    assert {e.errno for e in errors if isinstance(e, OSError)} == {errno.ENOSPC}
    assert journal.append(b"two") == 2
    assert contents_of(journal) == {1: (b"one", 0), 2: (b"two", 0)}


def test_a_poison_from_outside_is_told_to_all_who_wait(open_on: Callable[..., Journal]) -> None:
    crowd = Crowd(open_on)
    with crowd.gathered(*[lambda: crowd.journal.append(b"x")] * THREADS) as (gate, tasks):
        crowd.engine.poison("a test", OSError(errno.EIO, "outside"))
        errors = [t.finish() for t in tasks[1:]]  # while the first is still at the disk
        assert [type(e) for e in errors] == [PoisonedError] * (THREADS - 1)
        gate.open()
        assert isinstance(tasks[0].finish(), PoisonedError)
    assert [call for call in crowd.directory.calls if call[0] == "write_sync"][2:] == []


def test_a_close_lets_all_finish_who_have_staged(open_on: Callable[..., Journal]) -> None:
    crowd = Crowd(open_on)
    journal = crowd.journal
    with crowd.gathered(*[lambda: journal.append(b"x")] * THREADS) as (gate, tasks):
        closing = Task(journal.close)
        refused = False
        while not refused:  # closed for new ones, before the old ones are done
            late = Task(lambda: journal.append(b"late"))
            late.join(0.01)
            refused = isinstance(late.error, ClosedError)
            tasks.append(late)
        assert closing.is_alive()
        gate.open()
        closing.result()
        results = [t.result() for t in tasks[:THREADS]]
    assert results == list(range(2, 2 + THREADS))


@pytest.mark.parametrize("durability", list(Durability))
@pytest.mark.parametrize("end", ["close", "poison"])
def test_an_end_at_any_moment_leaves_nobody_waiting(
    open_on: Callable[..., Journal], durability: Durability, end: str
) -> None:
    for round_ in range(30):
        directory = Watched()
        directory.concurrent = True
        journal = open_on(directory, slots=1 << 16, segment_bytes=1 << 20, durability=durability)
        acknowledged: dict[int, bytes] = {}

        def write(w: int, journal: Journal = journal, acknowledged: dict[int, bytes] = acknowledged) -> None:
            for n in itertools.count():
                payload = b"%d %d" % (w, n)
                if n % 5 == 4:
                    acknowledged[journal.append_many([payload])[0]] = payload
                    journal.sync()
                else:
                    acknowledged[journal.append(payload)] = payload

        tasks = [Task(lambda w=w: write(w)) for w in range(6)]
        while len(acknowledged) < round_ * 3:
            time.sleep(0)
        if end == "close":
            journal.close()
        else:
            journal._engine.poison("a test", OSError(errno.EIO, "outside"))
        expected = ClosedError if end == "close" else PoisonedError
        assert {type(t.finish()) for t in tasks} == {expected}
        journal.close()
        left = open_on(directory.inner, slots=1 << 16, segment_bytes=1 << 20)
        found = {e.op: bytes(e.payload) for e in left}
        if durability is not Durability.BUFFERED or end == "close":
            assert acknowledged.items() <= found.items()
        if end == "close":
            assert acknowledged == found


def test_every_thread_gets_its_share(open_on: Callable[..., Journal]) -> None:
    """Also one that only syncs; counted while all run. Where a commit takes no time, who has led leads again
    before the others are awake: here it takes as long as a disk's."""
    crowd = Crowd(open_on)
    journal = crowd.journal
    crowd.directory.on = lambda call: time.sleep(0.0001) if is_commit(call) else None
    counts = [0] * (THREADS + 1)
    stop = threading.Event()

    def work(which: int, call: Callable[[], Any]) -> None:
        while not stop.is_set():
            call()
            counts[which] += 1

    tasks = [Task(lambda w=w: work(w, lambda: journal.append(b"%d" % w))) for w in range(THREADS)]
    tasks.append(Task(lambda: work(THREADS, journal.sync)))
    try:
        while not all(counts):
            time.sleep(0.001)
        for _ in range(3):
            before = list(counts)
            end = time.monotonic() + WAIT_S
            while sum(counts[:THREADS]) - sum(before[:THREADS]) < 500 * THREADS:
                assert time.monotonic() < end
                time.sleep(0.001)
            progress = [after - b for after, b in zip(counts, before, strict=True)]
            assert min(progress) > 500 / 10
            assert max(progress[:THREADS]) < 500 * 4
    finally:
        stop.set()
        for task in tasks:
            task.finish()
    for task in tasks:
        task.result()


def test_a_signal_handler_that_raises_loses_no_wake_up(tmp_path: Path) -> None:
    """The call that it interrupts has an unknown outcome; what was told is there, and the others go on."""
    journal = Journal(tmp_path / "j", slots=1 << 17, segment_bytes=1 << 20)
    acknowledged: dict[int, bytes] = {}
    stop = threading.Event()
    interrupted = 0

    class InterruptError(Exception):
        pass

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise InterruptError

    def write(w: int) -> None:
        for n in itertools.count():
            if stop.is_set():
                return
            payload = b"%d %d" % (w, n)
            acknowledged[journal.append(payload)] = payload

    tasks = [Task(lambda w=w: write(w)) for w in range(4)]
    submitted = set()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for n in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + n % 10 / 5000)
                for k in itertools.count():
                    payload = b"main %d %d" % (n, k)
                    submitted.add(payload)
                    op = journal.append(payload)
                    acknowledged[op] = payload
            except InterruptError:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        stop.set()
        for task in tasks:
            task.finish()
    for task in tasks:
        task.result()
    assert interrupted == 60
    assert journal.poisoned is None
    found = {e.op: bytes(e.payload) for e in journal}
    assert acknowledged.items() <= found.items()
    unknown = set(found.values()) - set(acknowledged.values())
    assert unknown <= submitted
    assert len(unknown) <= interrupted
    journal.close()
