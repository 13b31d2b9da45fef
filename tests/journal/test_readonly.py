"""Journals that are only read, beside a writer in another process: whatever it does, dies of, or is not."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmapwal import (
    AsyncJournal,
    ClosedError,
    FileStorage,
    IncompatibleFormatError,
    Journal,
    JournalError,
    LockedError,
    ReadonlyError,
    RecoveryRow,
    StaleOpError,
    SystemDirectory,
    TruncatedError,
    compaction,
    following,
    observer,
)
from mmapwal import format as fmt
from mmapwal.observer import Observer

from .elsewhere import Writer, lose

SMALL: dict[str, Any] = {"slots": 256, "segment_bytes": 16384}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "j"


def ops(entries: Any) -> list[int]:
    return [entry.op for entry in entries]


# --- reading beside a writer --------------------------------------------------------------------------


def test_a_reader_sees_what_another_process_appends_removes_and_compacts_at_its_next_read(
    start: Callable[[], Writer], path: Path
) -> None:
    writer = start()
    with Journal(path, readonly=True) as reader:
        assert (len(reader), reader.last_op, list(reader)) == (0, None, [])
        writer.append(100)
        assert ops(reader) == list(range(1, 101))
        assert bytes(reader.read(7)) == b"6" * 20
        writer.do("append(b'new', op=7, replace=True)")
        assert bytes(reader.read(7)) == bytes(reader[7].payload) == reader.copy(7) == b"new"
        held = reader.read(50)
        writer.do("drain(40, 60)")
        assert 50 not in reader
        writer.do("truncate_from(90)")
        assert (reader.last_op, len(reader)) == (89, 68)
        writer.do("set_snapshot_op(20)")
        writer.do("compact(wait=True)")
        assert (reader.first_op, reader.snapshot_op, len(reader)) == (21, 20, 48)
        assert ops(reader.entries(80)) == list(range(80, 90))
        assert bytes(held) == b"49" * 20
        assert reader.header(21) is not None
        assert reader.columns().ops.tolist() == ops(reader)
        assert reader.stats().entries == 48


def test_what_writes_is_refused_and_nothing_is_changed(start: Callable[[], Writer], path: Path) -> None:
    writer = start()
    writer.append(10)
    with Journal(path, readonly=True) as reader:
        before = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.iterdir()}
        for call in (
            lambda: reader.append(b"x"), lambda: reader.append(b"x", op=90), reader.sync, reader.compact,
            lambda: reader.append_many([b"x"]), lambda: reader.append_many([]), lambda: reader.drain(1, 2),
            lambda: reader.truncate_from(3), lambda: reader.set_snapshot_op(3),
            lambda: reader.remaining_capacity, lambda: reader.set_user_data(b"x"),
            lambda: reader.pair_snapshot(3, 4),
        ):  # fmt: skip
            with pytest.raises(ReadonlyError, match="read only"):
                call()
        assert reader.readonly
        assert reader.verify().ok
        assert reader.poisoned is None
        after = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.iterdir()}
        assert after == before
        with pytest.raises(LockedError):  # the writer's still
            Journal(path)
    with pytest.raises(ClosedError):
        reader.read(1)
    with pytest.raises(ClosedError):
        next(reader.follow())
    for write in (
        lambda: reader.append(b"x"),
        lambda: reader.append_many([]),
        lambda: reader.remaining_capacity,
    ):
        with pytest.raises(ClosedError):
            write()
    assert writer.do("last_op") == "10"


def test_a_backup_by_a_reader_has_all_that_is_durable(
    start: Callable[[], Writer], path: Path, tmp_path: Path
) -> None:
    start().append(30)
    with Journal(path, readonly=True) as reader:
        reader.backup(tmp_path / "copy")
    with Journal(tmp_path / "copy") as copy:
        assert ops(copy) == list(range(1, 31))


@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_journal_that_nobody_writes_is_read_as_it_was_left(
    start: Callable[[], Writer], path: Path, end: str
) -> None:
    writer = start()
    writer.append(200)
    getattr(writer, end)()
    with Journal(path, readonly=True) as reader:
        assert ops(reader) == ops(reader.follow(timeout=0)) == list(range(1, 201))
    if end == "close":
        (path / "index").unlink()  # derived: who reads does without
        with Journal(path, readonly=True) as reader:
            assert ops(reader) == ops(reader.follow(timeout=0)) == list(range(1, 201))


def test_what_was_drained_is_gone_for_a_reader_who_looks_when_nothing_tells_of_it_any_more(
    path: Path,
) -> None:
    """All segments that had it are gone, so the removal is no longer noted either."""
    with Journal(path, **SMALL) as journal, Journal(path, readonly=True) as reader:
        for op in range(1, 41):
            journal.append(b"%d" % op * 20)
        assert len(reader) == 40
        kept = [*range(1, 10), *range(21, 41)]
        journal.drain(10, 20)
        for op in kept:
            journal.append(b"again", op=op, replace=True)
        journal._engine.rotate()
        for op in kept:
            journal.append(b"once more", op=op, replace=True)
        journal.compact(wait=True)
        assert journal.stats().removals == 0
        assert ops(reader) == kept
        assert 15 not in reader
        assert bytes(reader.read(9)) == b"once more"


def test_an_entry_that_is_replaced_while_its_segment_is_rewritten_stays_the_new_one_for_a_reader(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(path, **SMALL) as journal, Journal(path, readonly=True) as reader:
        for op in range(1, 100):
            journal.append(b"old %d " % op * 40)
        journal.drain(3, 60)  # mostly dead
        true_commit = compaction._commit

        def replaced_meanwhile(*args: Any) -> None:
            journal.append(b"new", op=2, replace=True)
            assert bytes(reader.read(2)) == b"new"
            true_commit(*args)

        monkeypatch.setattr(compaction, "_commit", replaced_meanwhile)
        journal.compact(wait=True)
        first = journal._engine.superblock.segments[0]
        assert (first.id, first.generation) == (1, 1)
        assert bytes(reader.read(2)) == b"new"
        assert len(reader) == len(journal)


# --- following across the writer's lives --------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_follower_goes_on_when_the_writer_dies_and_comes_back(
    start: Callable[[], Writer], path: Path, end: str
) -> None:
    writer = start()
    with Journal(path, readonly=True) as reader:
        got: list[int] = []
        all_came = threading.Event()

        def follows() -> None:
            for entry in reader.follow():
                got.append(entry.op)
                if entry.op == 160:
                    all_came.set()
                    return

        thread = threading.Thread(target=follows, daemon=True)
        thread.start()
        for life in range(4):
            writer.append(30)
            writer.do("append(b'z' * 3000)")
            writer.append(9)
            getattr(writer, end)()
            if life == 2:
                (path / "index").unlink()  # rebuilt, as another file
            writer = start()
        assert all_came.wait(30)
        assert got == list(range(1, 161))


async def async_ops(journal: Journal, first: int, timeout: float) -> list[int]:
    async with AsyncJournal(journal) as entries:
        return [e.op async for e in entries.follow(first, timeout=timeout)]


LOOKS: dict[str, Callable[[Journal, Any], bool]] = {
    "follow, no waiting": lambda _, entries: ops(entries) == [2],
    "follow, waiting": lambda reader, _: ops(reader.follow(2, timeout=0.01)) == [2],
    "async follow": lambda reader, _: asyncio.run(async_ops(reader, 2, 0)) == [2],
    "read": lambda reader, _: bytes(reader.read(2)) == b"0" * 20,
    "get": lambda reader, _: reader.get(2) is not None,
    "last_op": lambda reader, _: reader.last_op == 2,
    "entries": lambda reader, _: ops(reader.entries()) == [1, 2],
}


@pytest.mark.parametrize("how", LOOKS)
@pytest.mark.parametrize("lost", [False, True])
def test_a_reader_that_says_there_is_nothing_has_looked_whether_the_index_is_another_one(
    start: Callable[[], Writer], path: Path, how: str, monkeypatch: pytest.MonkeyPatch, *, lost: bool
) -> None:
    for module in (following, observer):
        monkeypatch.setattr(module, "LOOK_S", 3600)
    writer = start()
    writer.append(1)
    with Journal(path, readonly=True) as reader:
        entries = reader.follow(timeout=0)
        assert ops(entries) == [1]
        assert reader.last_op == 1
        writer.kill()
        if lost:
            (path / "index").unlink()
        else:
            (path / "index").write_bytes(b"what a failing disk left")
        start().append(1)
        assert LOOKS[how](reader, entries)


@pytest.mark.parametrize("lives", [1, 2])
def test_what_was_followed_when_written_and_is_lost_is_told_and_what_takes_its_place_comes(
    start: Callable[..., Writer], path: Path, lives: int
) -> None:
    writer = start("os")
    writer.append(3)
    writer.do("sync()")
    with Journal(path, readonly=True) as reader:
        entries = reader.follow(timeout=0, written=True)
        writer.append(4)
        assert ops(entries) == list(range(1, 8))
        assert ops(reader) == [1, 2, 3]
        writer.kill()
        lose(path, reader.durable_lsn)
        for _ in range(lives):
            writer = start("os")
            writer.append(1)
            writer.close()
        with pytest.raises(TruncatedError) as e:
            list(entries)
        assert e.value.op == 4
        assert ops(entries) == [4, 5][:lives]


@pytest.mark.parametrize("given", [False, True])
def test_a_follower_goes_on_where_the_next_life_does_also_behind_what_it_had_passed_by(
    start: Callable[..., Writer], path: Path, given: bool
) -> None:
    """What is below the op that it follows from is not given, and lost all the same."""
    writer = start("os")
    writer.append(1)
    writer.do("append(b'base', op=9)")
    writer.do("sync()")
    with Journal(path, readonly=True) as reader:
        entries = reader.follow(10, timeout=0, written=True)
        writer.do("append(b'old' * 99, op=2)")
        if given:
            writer.do("append(b'x')")
        assert ops(entries) == [10] * given
        writer.kill()
        lose(path, reader.durable_lsn)
        writer = start("os")
        for op in range(10, 18):
            writer.do(f"append(b'new', op={op})")
        if given:
            with pytest.raises(TruncatedError) as e:
                list(entries)
            assert e.value.op == 10
        assert ops(entries) == list(range(10, 18))


@pytest.mark.parametrize("lives", [1, 2])
def test_who_is_told_of_a_loss_gets_again_what_is_left_above_it_and_nothing_twice_below(
    start: Callable[..., Writer], path: Path, lives: int
) -> None:
    writer = start("os")
    writer.append(3)
    writer.do("append(b'nine', op=9)")
    writer.do("sync()")
    with Journal(path, readonly=True) as reader:
        entries = reader.follow(timeout=0, written=True)
        writer.do("append(b'five', op=5)")
        assert ops(entries) == [1, 2, 3, 9, 5]
        writer.kill()
        lose(path, reader.durable_lsn)
        for life in range(lives):
            writer = start("os")
            writer.do(f"append(b'late', op={11 + life})")
            writer.do("append(b'below', op=4)" if life == 0 else "sync()")
            writer.close()
        with pytest.raises(TruncatedError) as e:
            list(entries)
        assert e.value.op == 5
        assert ops(entries) == [9, 11, 4, 12][: 2 + lives]


def test_what_a_life_had_written_is_not_taken_for_what_the_next_one_has(
    start: Callable[..., Writer], path: Path
) -> None:
    """Of a batch the end is lost, so all of it is cut off; its frames are still there to be seen."""
    writer = start("os")
    writer.append(1)
    writer.close()
    writer = start("os")
    writer.append(4)
    with Journal(path, readonly=True) as reader:
        written = reader._engine.published()[0]
        assert written > reader.durable_lsn
        writer.kill()
        lose(path, written - 16, 16)
        writer = start("os")
        assert ops(reader.follow(timeout=0, written=True)) == [1]
        with Journal(path, readonly=True) as other:
            entries = other.follow(timeout=0, written=True)
            assert ops(entries) == [1]
            writer.append(2)
            assert ops(entries) == [2, 3]


def test_a_follower_waits_for_a_writer_that_is_not_there_yet(start: Callable[[], Writer], path: Path) -> None:
    path.mkdir()
    with Journal(path, readonly=True) as reader:
        assert (len(reader), reader.first_op, reader.snapshot_op, list(reader.follow(timeout=0))) == (
            0,
            None,
            0,
            [],
        )
        entries = reader.follow(timeout=30)
        threading.Timer(0.2, lambda: start().append(5)).start()
        assert [next(entries).op for _ in range(5)] == [1, 2, 3, 4, 5]
        assert ops(reader) == [1, 2, 3, 4, 5]
        assert list(path.iterdir())
    with pytest.raises(FileNotFoundError):
        Journal(path.parent / "nowhere", readonly=True)
    (path.parent / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        Journal(path.parent / "empty", readonly=True, create=False)
    assert list((path.parent / "empty").iterdir()) == []


def test_a_folder_of_other_files_is_not_waited_in_for_a_journal_that_cannot_come(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"not ours")
    with pytest.raises(JournalError, match="holds something else: photo"):
        Journal(tmp_path, readonly=True)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


def test_what_a_newer_superblock_proves_is_there_for_who_has_no_page_to_look_at(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observer, "LOOK_S", 0)
    copy = tmp_path / "copy"
    with Journal(path, **SMALL) as journal:
        journal.append(b"1")
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns(f"{fmt.INDEX_NAME}*"))
        reader = Journal(copy, readonly=True)
        assert ops(reader.follow(timeout=0)) == []
    shutil.copy(path / fmt.SUPERBLOCK_NAME, copy / "new")
    (copy / "new").rename(copy / fmt.SUPERBLOCK_NAME)
    assert ops(reader.follow(timeout=0)) == [1]
    reader.close()


def test_a_journal_that_takes_the_place_of_the_one_that_is_read_is_told(path: Path) -> None:
    with Journal(path, **SMALL) as journal:
        journal.append(b"one")
    with Journal(path, readonly=True) as reader:
        entries = reader.follow(timeout=5)
        assert next(entries).op == 1
        for file in path.iterdir():
            file.unlink()
        with Journal(path, **SMALL) as journal:
            journal.append(b"other")
        with pytest.raises(JournalError, match="another journal"):
            next(entries)


def test_one_that_is_closed_in_another_thread_while_it_waits_says_so(path: Path) -> None:
    with Journal(path, **SMALL) as journal, Journal(path, readonly=True) as reader:
        journal.append(b"x")
        came, told = threading.Event(), []

        def waits() -> None:
            try:
                for _ in reader.follow():
                    came.set()
            except ClosedError as e:
                told.append(e)

        thread = threading.Thread(target=waits)
        thread.start()
        assert came.wait(20)
        reader.close()
        thread.join(20)
        assert told


def test_a_reader_that_may_not_write_follows_too(
    start: Callable[[], Writer], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of another user, or on a file system that is mounted read-only."""
    writer = start()
    true_open = SystemDirectory.open

    def refuses(self: SystemDirectory, name: str, **how: Any) -> Any:
        if how.get("writable"):
            raise PermissionError(13, "Permission denied", name)
        return true_open(self, name, **how)

    monkeypatch.setattr(SystemDirectory, "open", refuses)
    with Journal(path, readonly=True) as reader:
        entries = reader.follow(timeout=20)
        for op in range(1, 20):
            writer.append(1)
            assert next(entries).op == op


# --- under load ---------------------------------------------------------------------------------------


def test_readers_in_other_threads_never_see_a_torn_or_wrong_entry_while_the_writer_hurries(
    start: Callable[[], Writer], path: Path, tally: Callable[[str, int], None]
) -> None:
    """Every payload says its own op; rotation, watermark and compaction go on all the time."""
    writer = start()
    stop = threading.Event()
    failures: list[BaseException] = []
    counts = [0, 0, 0]

    def right(op: int, payload: memoryview) -> bool:
        return bytes(payload) == b"%d " % op * 30

    def follows(number: int) -> None:
        entries, last = reader.follow(timeout=0.05), 0
        while not stop.is_set():
            try:
                for entry in entries:
                    assert entry.op == last + 1 or last == 0, (last, entry.op)
                    assert right(entry.op, entry.payload)
                    last = entry.op
                    counts[number] += 1
            except StaleOpError as e:
                last = 0
                assert e.first_op is not None

    def reads(number: int) -> None:
        while not stop.is_set():
            for entry in reader:
                assert right(entry.op, entry.payload)
            last = reader.last_op or 0
            for op in range(max(1, last - 5), last + 1):
                found = reader.get(op)
                assert found is None or right(op, found.payload)
                counts[number] += 1

    def run(work: Callable[[int], None], number: int) -> None:
        try:
            work(number)
        except BaseException as e:  # noqa: BLE001  # told by the test
            failures.append(e)
            stop.set()

    with Journal(path, readonly=True) as reader:
        works = (follows, follows, reads)
        threads = [threading.Thread(target=run, args=(w, n)) for n, w in enumerate(works)]
        for thread in threads:
            thread.start()
        next_op, end = 1, time.monotonic() + 3
        while time.monotonic() < end and not stop.is_set():
            for _ in range(10):
                writer.do(f"append_many([b'%d ' % op * 30 for op in range({next_op}, {next_op + 10})])")
                next_op += 10
            writer.do(f"set_snapshot_op({max(0, next_op - 80)})")
            writer.do("compact()")
        stop.set()
        for thread in threads:
            thread.join(30)
        assert failures == []
        assert all(counts)
    tally("entries seen by readers beside a writer that hurries", sum(counts))


# --- what makes no sense ------------------------------------------------------------------------------


def test_choices_that_make_no_sense_for_a_reader_are_refused(path: Path) -> None:
    with Journal(path, **SMALL) as journal:
        journal.append(b"x")
    with pytest.raises(ValueError, match="nothing to sync"):
        Journal(path, readonly=True, sync_interval_ms=5)
    with pytest.raises(ValueError, match="FileStorage"):
        Journal(path, readonly=True, storage=SystemDirectory(path, storage=FileStorage))
    with pytest.raises(IncompatibleFormatError, match="slots=256"):
        Journal(path, readonly=True, slots=512)
    with Journal(path, readonly=True, slots=256) as reader:
        assert isinstance(reader._engine, Observer)
        assert reader.report.outcome is RecoveryRow.OBSERVED
        assert ops(reader) == [1]
