"""sync_interval_ms: what is appended becomes durable by itself; failures are told; the thread always ends."""

from __future__ import annotations

import contextlib
import errno
import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from mmapwal import Durability, Journal, LockedError, PoisonedError
from mmapwal.testing import Call

from .files import SMALL, Home, after_kill, contents_of, killed
from .watched import WAIT_S, Gate, Task, Watched

RELAXED = pytest.mark.parametrize("durability", [Durability.OS, Durability.BUFFERED])
HOUR_MS = 3_600_000.0
THREADS = 16


def sync_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "mmapwal-sync"]


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def disk() -> Watched:
    """A directory that allows background threads."""
    disk = Watched()
    disk.concurrent = True
    return disk


def of_segments(call: Call, *kinds: str) -> bool:
    return call.kind in kinds and call.name.startswith("segment")


@RELAXED
@pytest.mark.parametrize("kind", ["mapped", "file"], indirect=True)
def test_what_was_appended_becomes_durable_by_itself(home: Home, durability: Durability) -> None:
    journal = home.open(**SMALL, durability=durability, sync_interval_ms=1)
    wanted = {}
    for n in range(10):
        wanted[journal.append(b"%d" % n * 900)] = (b"%d" % n * 900, 0)
        wait_for(lambda: journal.stats().staged_bytes == 0 and journal.durable_lsn == journal.written_lsn)
        assert contents_of(killed(home, journal).open()) == wanted
    assert journal.stats().syncs > 0


@RELAXED
def test_the_thread_syncs_the_segment_and_goes_on_until_close(
    open_on: Callable[..., Journal], disk: Watched, durability: Durability
) -> None:
    journal = open_on(disk, durability=durability, sync_interval_ms=1)
    for n in range(3):
        synced = threading.Event()
        disk.on = lambda c, synced=synced: synced.set() if of_segments(c, "sync") else None
        journal.append(b"%d" % n)
        assert synced.wait(WAIT_S)
    assert len(sync_threads()) == 1
    journal.close()
    assert not sync_threads()


def test_with_sync_there_is_nothing_to_do_in_the_background(
    open_on: Callable[..., Journal], disk: Watched
) -> None:
    journal = open_on(disk, durability=Durability.SYNC, sync_interval_ms=1)
    journal.append(b"x")
    assert not sync_threads()


def test_storage_that_allows_no_background_thread_gets_none(open_on: Callable[..., Journal]) -> None:
    disk = Watched()
    with pytest.raises(ValueError, match="no background thread"):
        open_on(disk, durability=Durability.OS, sync_interval_ms=1)
    assert disk.calls == []
    assert not sync_threads()


# --- failures -----------------------------------------------------------------------------------------


@RELAXED
@pytest.mark.parametrize("round_", range(3))
def test_a_failure_in_the_background_poisons_and_every_appending_thread_is_told(
    open_on: Callable[..., Journal], disk: Watched, durability: Durability, round_: int
) -> None:
    sizes = {"slots": 1 << 18, "segment_bytes": 1 << 22}
    journal = open_on(disk, durability=durability, sync_interval_ms=1, **sizes)
    journal.append(b"durable")
    durable = journal.sync()
    broken = OSError(errno.EIO, "broken")
    fails = threading.Event()

    def fail(call: Call) -> None:
        if fails.is_set() and of_segments(call, "sync") and not call.name.endswith(".tmp"):
            raise broken

    disk.on = fail
    begun = threading.Barrier(THREADS + 1)

    def work() -> None:
        begun.wait(WAIT_S)
        while True:
            journal.append(b"x" * 20)

    tasks = [Task(work) for _ in range(THREADS)]
    begun.wait(WAIT_S)
    wait_for(lambda: len(journal) > 50 * round_)
    fails.set()
    errors = [t.finish() for t in tasks]
    assert [type(e) for e in errors] == [PoisonedError] * THREADS
    assert {e.__cause__ for e in errors if e} == {broken}
    wait_for(lambda: not sync_threads())  # it does not sync again what a sync has failed on
    poisoned = journal.poisoned
    assert poisoned is not None
    assert poisoned.__cause__ is broken
    assert journal.durable_lsn >= durable
    journal.close()
    disk.on = lambda call: None
    assert open_on(disk, **sizes).copy(1) == b"durable"


def test_a_full_disk_in_the_background_is_tried_again_until_there_is_space(
    open_on: Callable[..., Journal], disk: Watched
) -> None:
    journal = open_on(disk, durability=Durability.BUFFERED, sync_interval_ms=1)
    journal.append(b"one")
    wait_for(lambda: journal.durable_lsn == journal.written_lsn and journal.stats().staged_bytes == 0)
    refused = []

    def full(call: Call) -> None:
        if of_segments(call, "write"):
            refused.append(call.name)
            raise OSError(errno.ENOSPC, "full")

    disk.on = full
    assert journal.append(b"two") == 2  # promised is only that it is buffered
    wait_for(lambda: len(refused) >= 3)
    assert journal.poisoned is None
    wanted = {1: (b"one", 0), 2: (b"two", 0)}
    with contextlib.suppress(OSError):  # told now, or buffered too: it depends on where the thread is
        wanted[journal.append(b"three")] = (b"three", 0)
    disk.on = lambda call: None
    wait_for(lambda: journal.durable_lsn == journal.written_lsn and journal.stats().staged_bytes == 0)
    with journal._engine.structure:
        left = after_kill(disk.inner)
    assert contents_of(open_on(left)) == contents_of(journal) == wanted


# --- the end of the thread ----------------------------------------------------------------------------


def test_close_ends_the_thread_however_long_its_interval(
    open_on: Callable[..., Journal], disk: Watched
) -> None:
    journal = open_on(disk, durability=Durability.OS, sync_interval_ms=HOUR_MS)
    journal.append(b"x")
    assert len(sync_threads()) == 1
    Task(journal.close).result()
    assert not sync_threads()
    assert contents_of(open_on(disk)) == {1: (b"x", 0)}


@pytest.mark.parametrize("interval_ms", [HOUR_MS, 0.01])
def test_a_journal_that_is_dropped_ends_its_thread_and_is_freed(disk: Watched, interval_ms: float) -> None:
    journal = Journal("j", storage=disk, durability=Durability.OS, sync_interval_ms=interval_ms, **SMALL)
    journal.append(b"written")
    engine = weakref.ref(journal._engine)
    with pytest.warns(ResourceWarning, match="not closed"):
        del journal
        gc.collect()
    wait_for(lambda: not sync_threads())
    wait_for(lambda: gc.collect() is not None and engine() is None)
    with Journal("j", storage=disk) as found:  # the lock is free
        assert contents_of(found) == {1: (b"written", 0)}


@pytest.mark.filterwarnings("ignore:journal .* was not closed:ResourceWarning")
def test_a_journal_that_is_collected_within_its_own_background_sync_does_not_hang(disk: Watched) -> None:
    """The collector runs on whatever thread it likes, also on one that is in the middle of a commit."""
    journals: list[Any] = [Journal("j", storage=disk, durability=Durability.OS, sync_interval_ms=1, **SMALL)]
    collected = threading.Event()

    def collect(call: Call) -> None:
        if of_segments(call, "sync") and threading.current_thread().name == "mmapwal-sync":
            journals.clear()
            gc.collect()
            collected.set()

    disk.on = collect
    journals[0].append(b"written")
    assert collected.wait(WAIT_S)
    wait_for(lambda: not sync_threads())
    disk.on = lambda call: None
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "mmapwal-abandon"])
    with Journal("j", storage=disk) as found:
        assert contents_of(found) == {1: (b"written", 0)}


@pytest.mark.filterwarnings("ignore:journal .* was not closed:ResourceWarning")
@pytest.mark.parametrize("thread", ["mmapwal-prepare", "mmapwal-sync"])
@pytest.mark.parametrize("kind", ["rename", "dir_sync"])
def test_a_journal_that_is_collected_keeps_the_lock_while_a_thread_of_it_commits_a_superblock(
    disk: Watched, kind: str, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go on in the files of the next owner."""
    monkeypatch.setattr("mmapwal.engine.ABANDON_WAIT_S", 0.01)  # what it waits for happens after that
    syncs = thread == "mmapwal-sync"
    durability, interval_ms = (Durability.BUFFERED, 1) if syncs else (Durability.SYNC, None)
    options: Any = {"slots": 1 << 12, "segment_bytes": 1 << 16, "durability": durability}
    journal = Journal("j", storage=disk, sync_interval_ms=interval_ms, **options)
    threads = [t for t in threading.enumerate() if t.name.startswith("mmapwal-")]
    gate = Gate(lambda c: c.kind == kind and threading.current_thread().name == thread)
    refused: list[Call] = []

    def on(call: Call) -> None:
        if syncs and of_segments(call, "write") and threading.current_thread().name == thread and not refused:
            refused.append(call)  # the next sync has to begin an epoch
            raise OSError(errno.ENOSPC, "planted")
        gate(call)

    disk.on = on
    journal.append(b"written")
    while not gate.reached.wait(0.01):
        if not syncs:
            journal.append(b"more" * 500)
    wanted = contents_of(journal) if not syncs else {}
    del journal
    gc.collect()
    with pytest.raises(LockedError):
        Journal("j", storage=disk)
    gate.open()
    wait_for(lambda: not any(t.is_alive() for t in threads))
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "mmapwal-abandon"])
    with Journal("j", storage=disk) as found:
        assert contents_of(found) == wanted  # what was only buffered is lost, as by a kill
        assert found.verify().ok
