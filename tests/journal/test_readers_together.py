"""Readers and followers beside other threads, and beside changes of structure at the worst moment."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmapwal import AsyncJournal, ClosedError, Journal, PoisonedError, aio_following
from mmapwal.engine import Engine
from mmapwal.observer import Observer
from mmapwal.reader import Reader
from mmapwal.segment import SegmentSet
from mmapwal.storage import SystemDirectory
from mmapwal.superblock import SuperblockFile

SMALL: dict[str, Any] = {"slots": 4096, "segment_bytes": 16384}
WAIT_S = 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "j"


@pytest.fixture
def writer(path: Path) -> Iterator[Journal]:
    with Journal(path, **SMALL) as journal:
        yield journal


class Halt:
    """A function that stops the first thread that comes by, until it is let go."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str, *, behind: bool = False) -> None:
        self.reached, self._go = threading.Event(), threading.Event()
        real = getattr(owner, name)

        def halting(*args: Any) -> Any:
            result = real(*args) if behind else None
            if not self.reached.is_set():
                self.reached.set()
                assert self._go.wait(WAIT_S)
            return result if behind else real(*args)

        patch.setattr(owner, name, halting)

    def let_go(self) -> None:
        self._go.set()


class Task:
    """A call in another thread."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._ended: list[Any] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._ended.append(self._call())
        except BaseException as e:  # noqa: BLE001  # for result()
            self._ended.append(e)

    def ended(self, wait_s: float = WAIT_S) -> bool:
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def result(self) -> Any:
        assert self.ended(), "it hangs"
        return self._ended[0]


def ops(entries: Any) -> list[int]:
    return [entry.op for entry in entries]


# --- a reader, and what others do meanwhile -----------------------------------------------------------


@pytest.mark.parametrize("between", ["published", "look"])
def test_a_reader_whose_place_is_compacted_into_a_gap_while_it_looks_reads_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, between: str
) -> None:
    """It has seen how far the journal is; the superblock that it sees then is newer."""
    with Journal(path, slots=64, segment_bytes=1 << 16) as writer, Journal(path, readonly=True) as reader:
        for _ in range(4):
            writer.append(b"x" * 1000)
        assert ops(reader) == [1, 2, 3, 4]
        writer.append_many([b"y" * 1000] * 2)
        real = getattr(Observer, between)

        def compacted_meanwhile(observer: Observer) -> Any:
            monkeypatch.undo()
            seen = real(observer) if between == "published" else None
            for _ in range(3):
                for op in range(1, 7):
                    writer.append(b"z" * 1000, op=op, replace=True)
            writer._engine.rotate()
            writer.append(b"live")
            writer.compact(wait=True)
            return seen or real(observer)

        monkeypatch.setattr(Observer, between, compacted_meanwhile)
        for _ in range(3):
            assert ops(reader) == ops(writer)
        writer.append(b"more")
        assert bytes(reader.read(writer.last_op or 0)) == b"more"


@pytest.mark.parametrize("step", ["_take_over", "_plain_below"])
def test_two_threads_whose_first_reads_come_at_once_both_find_what_is_there(
    path: Path, monkeypatch: pytest.MonkeyPatch, writer: Journal, step: str
) -> None:
    writer.append(b"one")
    with Journal(path, readonly=True) as reader:
        halt = Halt(monkeypatch, Reader, step)
        first = Task(lambda: bytes(reader.read(1)))
        assert halt.reached.wait(WAIT_S)
        second = Task(lambda: bytes(reader.read(1)))
        second.ended(0.2)
        halt.let_go()
        assert [first.result(), second.result()] == [b"one", b"one"]


def test_a_new_index_that_has_counted_as_far_as_the_old_one_is_not_taken_for_it(path: Path) -> None:
    with Journal(path, **SMALL) as journal:
        journal.append_many([b"x"] * 20)
        reader = Journal(path, readonly=True)
        assert ops(reader) == list(range(1, 21))
        word = journal._engine.index.published.word()
    (path / "index").unlink()
    with reader, Journal(path, **SMALL) as journal:
        followed = reader.follow(timeout=0)
        while journal._engine.index.published.word() != word:
            journal.append(b"new")
        reader._engine._page_at = float("-inf")  # type: ignore[attr-defined]
        last = ops(followed)[-1]  # a follower has the new index opened
        assert last == journal.last_op
        assert bytes(reader.read(last)) == b"new"
        assert reader.last_op == last


def test_reads_beside_a_thread_that_takes_over_a_compaction_find_all_that_lives(
    path: Path, monkeypatch: pytest.MonkeyPatch, writer: Journal
) -> None:
    for op in range(1, 601):
        writer.append(b"p%06d" % op * 8)
    for op in range(1, 601):
        if op % 3:
            writer.append(b"q%06d" % op * 8, op=op, replace=True)
    with Journal(path, readonly=True) as reader:
        assert len(list(reader)) == 600
        entries = reader.entries()
        began = [next(entries).op for _ in range(64)]
        assert writer.compact(wait=True) > 0
        halt = Halt(monkeypatch, Observer, "_fill")
        other = Task(lambda: bytes(reader.read(1)))
        assert halt.reached.wait(WAIT_S)
        try:
            assert began + ops(entries) == list(range(1, 601))
        finally:
            halt.let_go()
        assert other.result() == b"q000001" * 8


def test_a_follower_that_has_taken_over_a_compaction_takes_no_bytes_from_under_a_reader(
    path: Path, monkeypatch: pytest.MonkeyPatch, writer: Journal
) -> None:
    """In the new generation of the segment there is a hole where the frame was that a slot names."""
    writer.append(b"stays" * 20)
    for op in range(2, 40):
        writer.append(b"old %03d" % op * 50)
    with Journal(path, readonly=True) as reader:
        assert bytes(reader.read(20)) == b"old 020" * 50
        for op in range(2, 40):
            writer.append(b"new %03d" % op * 50, op=op, replace=True)
        assert writer.compact(wait=True) > 0
        assert writer._engine.superblock.segments[0].generation == 1
        observer: Any = reader._engine
        monkeypatch.setattr(Observer, "refresh", lambda self: None)  # it was before all that
        observer.look_again(observer.segments.table)  # a follower in another thread
        assert bytes(reader.read(20)) == b"old 020" * 50
        monkeypatch.undo()
        assert bytes(reader.read(20)) == b"new 020" * 50


def test_a_reader_has_an_entry_whose_segment_took_the_place_of_a_blank_one(path: Path) -> None:
    with Journal(path, slots=64, segment_bytes=16384) as writer, Journal(path, readonly=True) as reader:
        writer.append(b"a" * 1000)
        writer._engine.prepare_segment()
        for _ in range(8):
            writer.append(b"a" * 1000)
        assert ops(reader) == list(range(1, 10))
        writer.append(b"B" * 20000)  # too long for what is prepared
        writer.append(b"c")
        assert ops(reader) == list(range(1, 12))
        assert len(reader.read(10)) == 20000


def test_a_signal_handler_that_reads_within_a_read_takes_nothing_away_from_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(path, slots=64, segment_bytes=16384) as writer, Journal(path, readonly=True) as reader:
        for _ in range(4):
            writer.append(b"a" * 1000)
        assert bytes(reader.read(2)) == b"a" * 1000
        writer._engine.rotate()
        writer.append(b"b" * 1000)
        writer.set_snapshot_op(1)  # another superblock, which the read takes over
        saw: list[bytes] = []
        take_out = Observer._take_out

        def handler(number: int, frame: object) -> None:
            for _ in range(30):
                writer.append(b"c" * 1000, op=2, replace=True)  # into a segment that the read has not seen
            saw.append(bytes(reader.read(2)))

        def interrupted(*args: Any) -> None:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGUSR1)
            take_out(*args)

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            monkeypatch.setattr(Observer, "_take_out", interrupted)
            assert bytes(reader.read(2)) == b"c" * 1000
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert saw == [b"c" * 1000]
        assert ops(reader) == ops(writer)


def test_a_copy_of_files_of_different_times_is_read_as_far_as_they_go_together(
    path: Path, tmp_path: Path, writer: Journal
) -> None:
    writer.append_many([b"x"] * 5)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("superblock", *(file.name for file in path.glob("segment-*"))):
        shutil.copy(path / name, copy)
    writer.set_snapshot_op(1)
    shutil.copy(path / "index", copy)
    with Journal(copy, readonly=True) as reader:
        assert ops(reader) == [1, 2, 3, 4, 5]


def test_a_directory_that_is_closed_meanwhile_opens_no_file_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = SystemDirectory(tmp_path / "mine")
    (tmp_path / "other").mkdir()
    for folder in ("mine", "other"):
        (tmp_path / folder / "file").write_bytes(folder.encode())
    real, others = os.fsencode, []

    def closed_meanwhile(name: str) -> bytes:
        monkeypatch.undo()
        directory.close()
        others.append(os.open(tmp_path / "other", os.O_RDONLY | os.O_DIRECTORY))
        return real(name)

    monkeypatch.setattr("mmapwal.storage.os.fsencode", closed_meanwhile)
    storage = directory.open("file")
    os.close(others[0])
    assert bytes(storage.read_at(0, 9)) == b"mine"
    storage.close()
    with pytest.raises(ClosedError):
        directory.open("file")


def test_a_child_of_fork_reads_though_another_thread_was_looking(
    path: Path, monkeypatch: pytest.MonkeyPatch, writer: Journal
) -> None:
    writer.append_many([b"x"] * 3)
    with Journal(path, readonly=True) as reader:
        halt = Halt(monkeypatch, Observer, "_fill")
        other = Task(lambda: ops(reader))
        assert halt.reached.wait(WAIT_S)
        child = os.fork()
        if child == 0:
            signal.alarm(WAIT_S)
            monkeypatch.undo()
            os._exit(0 if ops(reader) == [1, 2, 3] else 1)
        halt.let_go()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert other.result() == [1, 2, 3]


# --- a follower, and changes of structure -------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 1])
def test_a_follower_beside_a_change_that_broke_off_is_told_of_the_poison(
    path: Path, monkeypatch: pytest.MonkeyPatch, timeout: float | None
) -> None:
    """The superblock in force does not name a segment that the table in memory still has."""
    with Journal(path, **SMALL) as journal:
        for op in range(1, 400):
            journal.append(b"p%06d" % op * 8)
        for op in range(1, 200):
            journal.append(b"p%06d" % op * 8, op=op, replace=True)
        entries = journal.follow(1, timeout=timeout)
        assert next(entries).op == 1

        def breaks_off(file: SuperblockFile) -> None:
            raise OSError(errno.EIO, "at the worst moment")

        monkeypatch.setattr(SuperblockFile, "_allocate_spare", breaks_off)
        with pytest.raises(PoisonedError):
            journal.compact()
        assert isinstance(Task(lambda: ops(entries)).result(), PoisonedError)


def test_a_follower_beside_a_thread_that_is_about_to_take_over_a_superblock_waits_for_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, writer: Journal
) -> None:
    for op in range(1, 400):
        writer.append(b"p%06d" % op * 8)
    with Journal(path, readonly=True) as reader:
        entries = reader.follow(1, timeout=0)
        assert next(entries).op == 1
        for op in range(1, 300, 2):
            writer.append(b"p%06d" % op * 8, op=op, replace=True)
        writer.compact(wait=True)
        halt = Halt(monkeypatch, SegmentSet, "follow", behind=True)
        other = Task(lambda: bytes(reader.read(2)))
        assert halt.reached.wait(WAIT_S)
        monkeypatch.setattr(Observer, "look", lambda self: True)  # it looked just before
        follows = Task(lambda: ops(entries))
        follows.ended(0.2)
        halt.let_go()
        assert isinstance(other.result(), bytes)
        assert set(range(1, 400)) <= {1, *follows.result()}


def test_a_superblock_is_told_of_before_frames_come_that_only_it_has_a_segment_for(
    writer: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_target, told = Engine.add_target, []

    def watched(engine: Engine, record: Any) -> None:
        told.append(engine.index.published.superblock_sequence() - engine.superblock.sequence)
        add_target(engine, record)

    monkeypatch.setattr(Engine, "add_target", watched)
    for _ in range(60):
        writer.append(b"x" * 1000)
    assert len(told) > 3
    assert set(told) == {0}


def test_who_acknowledges_what_came_is_not_told_that_it_is_stale(writer: Journal) -> None:
    """All that was given is compacted away before the follower goes on; nothing else was in it."""
    for _ in range(8):
        writer.append(b"p" * 1400)
    got = []
    for entry in writer.follow(1, timeout=0):
        got.append(entry.op)
        if entry.op == 8:
            writer.set_snapshot_op(8)
            writer.append(b"y" * 5000)  # in the next segment
            assert writer.compact(wait=True) > 0
    assert got == list(range(1, 10))


def test_a_follower_whose_place_lies_behind_a_gap_goes_on_in_the_lives_that_come(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it stands nothing is known to be durable yet, and inside the gap no frame begins."""
    with Journal(path, slots=64, segment_bytes=1 << 16) as writer:
        for _ in range(3):
            writer.append(b"a" * 1000)
        reader = Journal(path, readonly=True)
        entries = reader.follow(1, timeout=0)
        assert ops(entries) == [1, 2, 3]
        writer.append(b"x" * 1000)
        look = Observer.look

        def compacted_meanwhile(observer: Observer) -> bool:
            monkeypatch.undo()
            for _ in range(20):
                writer.append(b"y" * 1000, op=4, replace=True)
            writer._engine.rotate()
            writer.append(b"z")
            writer.compact(wait=True)
            return look(observer)

        monkeypatch.setattr(Observer, "look", compacted_meanwhile)
        came = ops(entries)  # no more than was durable at its look
    with reader:
        for _ in range(2):
            with Journal(path) as writer:
                writer.append(b"n")
        assert came + ops(entries) == [4, 5, 6, 7]


def test_an_iterator_keeps_the_journal_that_it_is_of(path: Path) -> None:
    with Journal(path, **SMALL) as journal:
        journal.append_many([b"x"] * 3)
    entries: Any = Journal(path, readonly=True).follow(timeout=0)
    assert ops(entries) == [1, 2, 3]
    entries._owner.close()


# --- event loops --------------------------------------------------------------------------------------


def test_a_journal_that_was_followed_on_a_loop_that_is_gone_is_followed_on_the_next(
    path: Path, writer: Journal
) -> None:
    writer.append(b"one")
    with Journal(path, readonly=True) as reader:
        aj = AsyncJournal(reader)
        waiting = []

        async def abandoned() -> None:
            waiting.append(aj.follow(2).__aiter__())
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(anext(waiting[0]))), 0.05)

        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)
        loop.run_until_complete(abandoned())
        loop.close()
        writer.append(b"two")
        time.sleep(0.1)  # the thread finds that its loop is closed

        async def follows() -> int:
            entries = aj.follow(3)
            threading.Timer(0.1, writer.append, [b"three"]).start()
            async with asyncio.timeout(WAIT_S):
                return (await anext(entries)).op

        assert asyncio.run(follows()) == 3


def test_what_is_there_already_starts_no_thread(
    path: Path, writer: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.append_many([b"x"] * 5)
    started = []
    watch = aio_following._Watch

    def counted(*args: Any) -> Any:
        started.append(args)
        return watch(*args)

    monkeypatch.setattr(aio_following, "_Watch", counted)

    async def main() -> list[int]:
        with Journal(path, readonly=True) as reader:
            entries = AsyncJournal(reader).follow()
            return [(await anext(entries)).op for _ in range(5)]

    assert asyncio.run(main()) == [1, 2, 3, 4, 5]
    assert started == []
