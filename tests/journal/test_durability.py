"""What an append has done when it returns: SYNC, OS, BUFFERED; and the methods by which it is done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from mmapwal import Durability, Journal, SyncMethod
from mmapwal.storage import SystemDirectory

from .files import ROOM, SMALL, Home, after_kill, contents_of, entry_frames, frames_of, killed
from .watched import Task, Watched, held_up

RELAXED = pytest.mark.parametrize("durability", [Durability.OS, Durability.BUFFERED])


@RELAXED
def test_what_is_not_durable_yet_is_read_by_its_own_process_at_once(
    home: Home, durability: Durability
) -> None:
    ways: dict[str, Callable[[Journal, int], bytes]] = {
        "read": lambda j, op: bytes(j.read(op)),
        "copy": lambda j, op: j.copy(op),
        "[]": lambda j, op: bytes(j[op].payload),
        "get": lambda j, op: bytes(j.get(op).payload),
        "iter": lambda j, op: [bytes(e.payload) for e in j][-1],
        "payloads": lambda j, op: bytes(next(j.payloads(op))),
        "entries": lambda j, op: bytes(next(j.entries(op)).payload),
        "header": lambda j, op: b"." * j.header(op).length,  # type: ignore[union-attr]
        "headers": lambda j, op: b"." * int(j.headers(op)[0]["length"]),
        "columns": lambda j, op: bytes(j.columns(op).payload(0)),
        "array": lambda j, op: j.array(op).tobytes(),
        "drain": lambda j, op: bytes(j.drain(op, op)[0].payload),
    }
    journal = home.open(**SMALL, durability=durability)
    for n, (name, way) in enumerate(ways.items(), 1):
        payload = b"." * (n * 7)
        assert journal.append(payload) == n
        assert len(journal) == n
        assert journal.last_op == n
        assert n in journal
        assert way(journal, n) == payload, name
    assert journal.append_many([b"a", b"b"], first_op=n + 1) == range(n + 1, n + 3)
    assert [bytes(p) for p in journal.payloads(n)] == [b"a", b"b"]
    for op in range(1, n):
        assert journal.copy(op) == b"." * (op * 7)


def test_written_and_durable_lsn_tell_how_far_each_level_is(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"x")
    assert journal.durable_lsn == journal.written_lsn == frames_of(home.directory())[-1].lsn + 64
    journal.close()

    journal = home.open(durability=Durability.OS)
    start = journal.durable_lsn
    journal.append(b"y")
    assert (journal.written_lsn, journal.durable_lsn) == (start + 64, start)
    assert journal.sync() == journal.durable_lsn == start + 64
    journal.close()

    journal = home.open(durability=Durability.BUFFERED)
    start = journal.durable_lsn
    journal.append(b"z")
    assert (journal.written_lsn, journal.durable_lsn) == (start, start)
    assert journal.stats().staged_bytes == 64
    assert journal.copy(3) == b"z"  # reading hands it to the kernel
    assert (journal.written_lsn, journal.durable_lsn) == (start + 64, start)
    assert journal.stats().staged_bytes == 0
    assert journal.sync() == start + 64


@pytest.mark.parametrize("durability", list(Durability))
def test_sync_makes_all_before_it_durable_and_costs_nothing_when_it_is(
    home: Home, durability: Durability
) -> None:
    journal = home.open(**SMALL, durability=durability)
    assert journal.sync() == journal.durable_lsn
    for n in range(5):
        journal.append(b"%d" % n)
    assert journal.sync() == journal.written_lsn == journal.durable_lsn
    before = journal.stats()
    journal.sync()
    assert journal.stats() == before
    left = killed(home, journal)
    assert contents_of(left.open()) == {n + 1: (b"%d" % n, 0) for n in range(5)}


def test_what_was_written_survives_a_kill_and_what_was_buffered_does_not(home: Home) -> None:
    journal = home.open(**SMALL, durability=Durability.OS)
    journal.append(b"written")
    assert contents_of(killed(home, journal).open()) == {1: (b"written", 0)}
    journal.close()
    journal = home.open(durability=Durability.BUFFERED)
    journal.append(b"buffered")
    assert contents_of(killed(home, journal).open()) == {1: (b"written", 0)}
    journal.sync()
    assert contents_of(killed(home, journal).open()) == {1: (b"written", 0), 2: (b"buffered", 0)}


@pytest.mark.parametrize("durability", list(Durability))
def test_close_makes_everything_durable(home: Home, durability: Durability) -> None:
    journal = home.open(**SMALL, durability=durability)
    for n in range(12):
        journal.append(b"%d" % n * 900)
    journal.close()
    assert contents_of(home.open()) == {n + 1: (b"%d" % n * 900, 0) for n in range(12)}


def test_a_full_buffer_is_handed_to_the_kernel(home: Home) -> None:
    journal = home.open(slots=64, segment_bytes=1 << 22, durability=Durability.BUFFERED)
    start = journal.written_lsn
    while journal.written_lsn == start:
        journal.append(bytes(12_500))
        assert journal.stats().staged_bytes < 512 << 10
    assert journal.stats().syncs == 0
    assert 8 <= len(journal) <= 20


def test_with_sync_an_entry_cannot_be_read_before_it_is_durable(
    open_on: Callable[..., Journal],
) -> None:
    directory = Watched()
    journal = open_on(directory)
    journal.append(b"one")
    with held_up(directory, lambda c: c.kind == "write_sync", lambda: journal.append(b"two")) as task:
        assert 2 not in journal
        assert (len(journal), journal.last_op) == (1, 1)
        assert [e.op for e in journal] == [1]
        assert journal.get(2) is None
        assert journal.remaining_capacity <= SMALL["slots"] - 1
    assert task.result() == 2
    assert journal.copy(2) == b"two"


def test_entries_of_several_threads_share_a_commit(open_on: Callable[..., Journal]) -> None:
    directory = Watched()
    journal = open_on(directory)
    journal.append(b"")
    before = journal.stats()
    with held_up(directory, lambda c: c.kind == "write_sync", lambda: journal.append(b"first")) as first:
        others = [Task(lambda n=n: journal.append(b"%d" % n)) for n in range(6)]
        while journal.stats().staged_bytes < 7 * 64:  # until they wait for the one that is held up
            pass
    ops = {t.result() for t in (first, *others)}
    assert ops == set(range(2, 9))
    after = journal.stats()
    assert after.commits - before.commits == 2
    assert after.appended_entries - before.appended_entries == 7


def test_without_an_interval_nobody_syncs_behind_the_users_back(open_on: Callable[..., Journal]) -> None:
    journal = open_on(Watched(), durability=Durability.OS)
    for _ in range(5):
        journal.append(b"x")
    assert journal.stats().syncs == 0
    assert not [t for t in threading.enumerate() if t.name == "mmapwal-sync"]


# --- how ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mapped", "file"], indirect=True)
@pytest.mark.parametrize("method", list(SyncMethod))
@pytest.mark.parametrize("durability", list(Durability))
def test_every_sync_method_keeps_what_it_is_given(
    home: Home, method: SyncMethod, durability: Durability
) -> None:
    wanted = {}
    journal = home.open(**SMALL, sync_method=method, durability=durability)
    assert journal.sync_method is not SyncMethod.AUTO
    assert method in {SyncMethod.AUTO, journal.sync_method}
    for n in range(8):
        wanted[journal.append(b"%d" % n * 1500)] = (b"%d" % n * 1500, 0)
    assert contents_of(journal) == wanted
    journal.sync()
    left = killed(home, journal)
    assert contents_of(left.open(sync_method=method)) == wanted
    journal.close()
    journal = home.open(sync_method=method)
    assert contents_of(journal) == wanted
    assert journal.append(b"more") == 9
    assert journal.copy(9) == b"more"


def test_the_calls_of_each_method_are_the_ones_it_is_named_for(open_on: Callable[..., Journal]) -> None:
    wanted = {
        (SyncMethod.DSYNC, Durability.SYNC): ["write_sync"],
        (SyncMethod.FDATASYNC, Durability.SYNC): ["write", "sync"],
        (SyncMethod.DSYNC, Durability.OS): ["write"],
        (SyncMethod.FDATASYNC, Durability.OS): ["write"],
        (SyncMethod.DSYNC, Durability.BUFFERED): [],
        (SyncMethod.FDATASYNC, Durability.BUFFERED): [],
    }
    for (method, durability), calls in wanted.items():
        directory = Watched(sync_method=method)
        journal = open_on(directory, durability=durability)
        journal.append(b"the first one makes a segment")
        directory.calls.clear()
        journal.append(b"x")
        assert [kind for kind, _ in directory.calls] == calls
        directory.calls.clear()
        journal.append_many([b"x"] * 5)
        assert [kind for kind, _ in directory.calls] == calls
        journal.close()


def test_after_unsynced_writes_a_sync_covers_every_file_that_was_written(
    open_on: Callable[..., Journal],
) -> None:
    """Entries in three segments, none synced: when sync() returns, each file has been synced after its
    last write."""
    for durability in (Durability.OS, Durability.BUFFERED):
        directory = Watched()
        journal = open_on(directory, durability=durability)
        for _ in range(9):
            journal.append(bytes(3500))
        journal.sync()
        written = {name for kind, name in directory.calls if kind == "write" and name.startswith("segment")}
        assert len(written) >= 3
        for name in written:
            kinds = [kind for kind, n in directory.calls if n == name]
            last_write = len(kinds) - kinds[::-1].index("write")
            assert "sync" in kinds[last_write:]
        journal.close()


@pytest.mark.parametrize("align", [512, 4096])
@pytest.mark.parametrize("durability", list(Durability))
def test_with_commit_align_bytes_no_two_commits_share_a_sector(
    home: Home, align: int, durability: Durability
) -> None:
    journal = home.open(slots=64, segment_bytes=65536, commit_align_bytes=align, durability=durability)
    starts = [journal.written_lsn]
    for n in range(8):
        journal.append(b"%d" % n * (n * 37))
        journal.append_many([b"a", b"b" * 100])
        journal.sync()
        starts.append(journal.written_lsn)
    assert all(lsn % align == 0 for lsn in starts[1:])
    firsts = [f for f in entry_frames(home.directory()).values() if f.op % 3 == 1]
    if durability is not Durability.BUFFERED:
        assert all(f.lsn % align == 0 for f in firsts)
    wanted = contents_of(journal)
    assert len(wanted) == 24
    left = killed(home, journal)
    assert contents_of(left.open()) == wanted
    journal.close()
    journal = home.open()
    assert contents_of(journal) == wanted
    assert journal.verify().ok


@pytest.mark.parametrize("align", [512, 4096])
def test_aligned_commits_go_over_segments(home: Home, align: int) -> None:
    journal = home.open(**SMALL, commit_align_bytes=align)
    wanted = {}
    for n in range(14):
        payload = b"%d" % n * (700 + n * 13)
        wanted[journal.append(payload)] = (payload, 0)
    journal.append(bytes(ROOM), op=15)
    wanted[15] = (bytes(ROOM), 0)
    assert contents_of(journal) == wanted
    assert contents_of(killed(home, journal).open()) == wanted
    assert journal.verify().ok


# --- a real kill --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from mmapwal import Journal, Durability
journal = Journal(sys.argv[1], slots=4096, segment_bytes=16384, durability=Durability(sys.argv[2]))
for n in range(1, 501):
    journal.append(b"entry %d" % n, kind=n % 7)
if sys.argv[3] == "sync":
    journal.sync()
print(journal.written_lsn, journal.durable_lsn, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("durability", list(Durability))
@pytest.mark.parametrize("synced", ["sync", "no sync"])
def test_a_kill_of_the_process_keeps_all_that_was_written(
    tmp_path: Any, run_python: Callable[..., Any], durability: Durability, synced: str
) -> None:
    done = run_python(KILLED, tmp_path / "j", durability.value, synced)
    assert done.returncode == -9, done.stderr
    written = int(done.stdout.split()[0])
    with Journal(tmp_path / "j") as journal:
        assert journal.report.tail_lsn == written
        count = len(journal)
        if durability is not Durability.BUFFERED or synced == "sync":
            assert count == 500
        assert contents_of(journal) == {n: (b"entry %d" % n, n % 7) for n in range(1, count + 1)}
        assert journal.append(b"goes on") == count + 1


def test_the_default_is_durable_by_the_best_method_of_the_place(tmp_path: Any) -> None:
    with Journal(tmp_path / "j") as journal:
        assert journal.durability is Durability.SYNC
        assert (journal.slots, journal.segment_bytes) == (65536, 16 << 20)
        directory = SystemDirectory(tmp_path)
        assert journal.sync_method is directory.best_sync_method()
        directory.close()
        journal.append(b"x")
        assert journal.durable_lsn == journal.written_lsn


def test_in_memory_a_kill_keeps_what_was_written_too(open_on: Callable[..., Journal]) -> None:
    directory = Watched()
    journal = open_on(directory, durability=Durability.OS)
    journal.append_many([b"a", b"b"])
    left = after_kill(directory.inner)
    assert contents_of(open_on(left)) == {1: (b"a", 0), 2: (b"b", 0)}
