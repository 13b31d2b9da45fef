"""A backup of a journal in use opens by itself, and has all that was acknowledged before it began."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mmapwal import (
    CorruptionError,
    Durability,
    Entry,
    IncompatibleFormatError,
    Journal,
    JournalError,
    LockedError,
    MemoryDirectory,
    SnapshotCorruptError,
    SnapshotError,
    SystemDirectory,
    backup,
    inspect,
    recover,
)
from mmapwal import format as fmt
from mmapwal._native import lib
from mmapwal.backup import backup_in_use
from mmapwal.cli import main
from mmapwal.storage import Directory
from mmapwal.testing import CrashDisk, FaultDirectory, When, assert_crash_safe, every_fault

SMALL: dict[str, Any] = {"slots": 256, "segment_bytes": 16384}
Contents = tuple[dict[int, bytes], int, bytes]


def contents(journal: Journal) -> Contents:
    return {e.op: bytes(e.payload) for e in journal}, journal.snapshot_op, journal.user_data


def restored(place: Path | Directory) -> Contents:
    """As whoever needs it finds it: it opens, is sound, and takes appends."""
    options = {"storage": place} if not isinstance(place, Path) else {}
    with Journal(place if isinstance(place, Path) else "copy", **options) as journal:
        found = contents(journal)
        assert journal.verify().ok
        journal.append(b"goes on")
    return found


def fill(journal: Journal, count: int, tag: bytes = b"entry") -> None:
    for n in range(count):
        journal.append(tag + b" %d " % n * (n % 40) * 3)


def check_last_or_next(found: list[Contents], disk: CrashDisk, acknowledged: list[int]) -> None:
    """Of `found`, a backup of each step: that of the last that is acknowledged, or of the next."""
    begun = len(acknowledged)
    if not acknowledged and fmt.SUPERBLOCK_NAME not in disk.names():
        return  # the first one was not there yet
    assert restored(disk) in found[max(0, begun - 1) : begun + 1]


def test_a_backup_opens_by_itself_and_has_what_the_journal_had(home: Any, make_home: Any) -> None:
    with home.open(**SMALL) as journal:
        fill(journal, 100)
        journal.append_many([b"a" * 3000, b"b" * 4000])
        journal.set_snapshot_op(20)
        journal.drain(50, 55)
        journal.truncate_from(95)
        journal.append(b"ninety-five")
        journal.append(b"replaced", op=60, replace=True)
        journal.set_user_data(b"term 7")
        journal.compact()
        report = journal.backup(make_home("copy").directory())
        expected = contents(journal)
        journal.append(b"after it")
    assert restored(make_home("copy").directory()) == expected
    assert report.kept_segments == 0
    assert report.segments > 2
    assert report.snapshot_op is None


def test_an_empty_journal_can_be_backed_up(home: Any, make_home: Any) -> None:
    with home.open(**SMALL) as journal:
        journal.backup(make_home("copy").directory())
    assert restored(make_home("copy").directory()) == ({}, 0, b"")


@pytest.mark.parametrize("durability", [Durability.OS, Durability.BUFFERED])
def test_what_was_not_synced_is_in_the_backup_too(home: Any, make_home: Any, durability: Durability) -> None:
    with home.open(**SMALL, durability=durability) as journal:
        fill(journal, 30)
        journal.backup(make_home("copy").directory())
        expected = contents(journal)
    assert restored(make_home("copy").directory()) == expected


def test_a_second_backup_takes_only_what_is_new_and_leaves_what_has_gone(home: Any, make_home: Any) -> None:
    copy = make_home("copy")
    with home.open(**SMALL) as journal:
        fill(journal, 120)
        first = journal.backup(copy.directory())
        fill(journal, 20, b"more")
        second = journal.backup(copy.directory())
        assert second.kept_segments == first.segments - 1 > 2
        journal.set_snapshot_op(100)
        journal.compact()
        third = journal.backup(copy.directory())
        expected = contents(journal)
        assert third.segments < second.segments
    names = copy.directory().names()
    assert sum(name.startswith("segment-") for name in names) == third.segments
    assert restored(copy.directory()) == expected


def test_an_interrupted_backup_is_taken_up_by_the_next(home: Any, make_home: Any) -> None:
    copy = make_home("copy")
    with home.open(**SMALL) as journal:
        fill(journal, 100)
        for fault in every_fault(error=errno.ENOSPC, when=When.SHORT):
            try:
                journal.backup(FaultDirectory(make_home("copy").directory(), fault))
            except OSError as e:
                assert e.errno == errno.ENOSPC
            except JournalError as e:
                assert isinstance(e.__cause__, OSError)
        expected = contents(journal)
    assert restored(copy.directory()) == expected


@pytest.mark.parametrize("when", [When.BEFORE, When.AFTER])
@pytest.mark.parametrize("kind", ["memory"], indirect=True)
def test_whatever_call_fails_the_earlier_backup_stays_until_the_new_one_is_there(
    home: Any, make_home: Any, when: When
) -> None:
    with home.open(**SMALL) as journal:
        for fault in every_fault(error=errno.ENOSPC, when=when):
            copy = make_home(f"copy {fault.nth}")
            journal.backup(copy.directory())
            earlier = contents(journal)
            journal.append(b"more" * 200)
            if journal.remaining_capacity < 10:
                journal.set_snapshot_op(journal.last_op)
            done = True
            try:
                journal.backup(FaultDirectory(copy.directory(), fault))
            except (OSError, JournalError):
                done = False
            allowed = [contents(journal)] if done else [earlier, contents(journal)]
            copy.directory().close()
            assert restored(copy.directory()) in allowed


class Sum:
    """A state machine: the sum of what was submitted, and how many."""

    def __init__(self) -> None:
        self.state = [0, 0]

    def apply(self, entry: Entry) -> None:
        self.state = [self.state[0] + int(bytes(entry.payload)), self.state[1] + 1]

    def snapshot(self) -> bytes:
        return json.dumps(self.state).encode()

    def restore(self, snapshot: memoryview) -> None:
        self.state = json.loads(bytes(snapshot))


def test_a_state_machine_is_recovered_from_the_backup_with_its_paired_snapshot(
    home: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    with recover(tmp_path / "j", Sum(), **SMALL) as replica:
        for checkpoints in range(3):
            for number in range(10):
                replica.submit(b"%d" % number)
            replica.checkpoint()
            replica.submit(b"1000")
            report = replica.journal.backup(copy)
            assert report.snapshot_op == 10 + 11 * checkpoints
    snapshots = [p.name for p in (copy / "snapshots").iterdir()]
    assert len(snapshots) == 1
    with recover(copy, Sum()) as replica:
        assert replica.machine.state == [3 * 1045, 33]


# --- while the journal is at work -----------------------------------------------------------------------


def test_a_segment_that_is_left_while_the_backup_begins_is_whole_in_it(
    home: Any, make_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end becomes durable behind the look at how far the journal is."""
    with home.open(**SMALL) as journal:
        engine = journal._engine
        told = engine.records_with_ends
        fill(journal, 20)

        def leaves_one_first() -> Any:
            monkeypatch.undo()  # close() asks too
            assert lib.mw_writer_rotate(engine.writer) == 0
            return told()

        engine.prepare_segment()
        monkeypatch.setattr(engine, "records_with_ends", leaves_one_first)
        journal.backup(make_home("copy").directory())
        expected = contents(journal)
    assert restored(make_home("copy").directory())[0] == expected[0]


def test_under_load_each_backup_has_all_that_was_acknowledged_before_it_began(
    tmp_path: Path, tally: Callable[[str, int], None]
) -> None:
    stop = threading.Event()
    acknowledged: dict[int, bytes] = {}
    gone = [0]
    errors: list[Exception] = []

    def appends(thread: int) -> None:
        n = 0
        while not stop.is_set():
            payload = b"thread %d entry %d " % (thread, n) * (n % 50 + 1)
            if journal.remaining_capacity > 20:
                acknowledged[journal.append(payload)] = payload
            n += 1

    def shrinks() -> None:
        while not stop.wait(0.01):
            op = max(0, (journal.last_op or 0) - 1200)
            gone[0] = max(gone[0], op)
            journal.set_snapshot_op(op)
            journal.compact()

    def run(work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as e:  # noqa: BLE001  # looked at below
            errors.append(e)

    with Journal(tmp_path / "j", slots=2048, segment_bytes=65536) as journal:
        workers = [threading.Thread(target=run, args=(appends, n)) for n in range(3)]
        workers.append(threading.Thread(target=run, args=(shrinks,)))
        for worker in workers:
            worker.start()
        kept = 0
        for number in range(12):
            copy = tmp_path / (f"copy{number}" if number % 2 else "copy")
            expected = dict(acknowledged)
            report = journal.backup(copy)
            floor = gone[0]
            kept += report.kept_segments
            check_backup(copy, expected, floor, again=tmp_path / f"look{number}")
        stop.set()
        for worker in workers:
            worker.join()
    assert not errors
    tally("backups under load, each restored", 12)
    tally("backups under load: segments that were there already", kept)


def check_backup(copy: Path, expected: dict[int, bytes], floor: int, *, again: Path) -> None:
    """Looks at a copy of the backup, so that it stays one."""
    subprocess.run(["cp", "-r", copy, again], check=True)
    entries, watermark, _ = restored(again)
    assert watermark <= floor
    missing = {op for op in expected if op > watermark} - set(entries)
    assert not missing
    assert all(entries[op] == payload for op, payload in expected.items() if op > watermark)
    assert all(payload.startswith(b"thread ") for payload in entries.values())


WRITER = """
import sys
from mmapwal import Journal
journal = Journal(sys.argv[1], slots=65536, segment_bytes=65536)
n = 0
while True:
    n += 1
    op = journal.append(b"entry %d " % n * (n % 30 + 1))
    print(op, flush=True)
    if n % 500 == 0:
        journal.set_snapshot_op(op - 300)
        journal.compact()
"""


def test_a_journal_of_another_process_is_backed_up_while_it_is_written(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "j")], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        try:
            for number in range(10):
                told = [int(child.stdout.readline()) for _ in range(300)][-1]
                copy = tmp_path / f"copy{number % 3}"
                with SystemDirectory(tmp_path / "j", create=False) as source:
                    backup_in_use(source, SystemDirectory(copy))
                subprocess.run(["cp", "-r", copy, tmp_path / f"look{number}"], check=True)
                entries, watermark, _ = restored(tmp_path / f"look{number}")
                assert set(range(watermark + 1, told + 1)) <= set(entries)
                assert all(entries[n] == b"entry %d " % n * (n % 30 + 1) for n in entries)
        finally:
            child.kill()


def test_what_was_removed_while_the_journal_was_looked_at_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The superblock that was read first says nothing of the removal, and the durable LSN is behind it."""
    look = backup.published_progress
    with Journal(tmp_path / "j", **SMALL) as journal:
        fill(journal, 50)

        def remove_and_look(*arguments: Any) -> tuple[int, int]:
            monkeypatch.setattr(backup, "published_progress", look)
            journal.drain(20, 29)
            journal.append(b"after the removal")
            return look(*arguments)

        monkeypatch.setattr(backup, "published_progress", remove_and_look)
        with SystemDirectory(tmp_path / "j") as source:
            backup_in_use(source, SystemDirectory(tmp_path / "copy"))
        expected = contents(journal)
    assert restored(tmp_path / "copy") == expected


# --- crashes --------------------------------------------------------------------------------------------


def test_a_power_cut_leaves_the_earlier_backup_or_the_new_one() -> None:
    found: list[Contents] = []

    def scenario(disk: CrashDisk, acknowledge: Callable[..., None]) -> None:
        found.clear()
        with Journal("j", storage=MemoryDirectory(), clock=lambda: 1, **SMALL) as journal:
            for step in range(3):
                fill(journal, 60, b"step %d" % step)
                if step == 2:
                    journal.set_snapshot_op(100)
                    journal.compact()
                found.append(contents(journal))
                journal.backup(disk)
                acknowledge(step)

    assert_crash_safe(scenario, partial(check_last_or_next, found), max_states=1500)


def test_a_power_cut_leaves_no_backup_without_the_snapshot_that_it_is_paired_with() -> None:
    def scenario(disk: CrashDisk, acknowledge: Callable[..., None]) -> None:
        with recover("j", Sum(), storage=MemoryDirectory(), clock=lambda: 1, **SMALL) as replica:
            for _ in range(2):
                for number in range(5):
                    replica.submit(b"%d" % number)
                replica.checkpoint()
                replica.submit(b"100")
                replica.journal.backup(disk)
                acknowledge(replica.machine.state)

    def check(disk: CrashDisk, acknowledged: list[list[int]]) -> None:
        if not acknowledged and fmt.SUPERBLOCK_NAME not in disk.names():
            return
        with recover("copy", Sum(), storage=disk, **SMALL) as replica:
            assert replica.machine.state in [[110, 6], [220, 12]][max(0, len(acknowledged) - 1) :]

    assert_crash_safe(scenario, check, max_states=600)


# --- what is refused ------------------------------------------------------------------------------------


def test_a_damaged_journal_is_refused_with_the_place_and_the_backup_stays_as_it_was(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", **SMALL) as journal:
        fill(journal, 100)
        journal.backup(tmp_path / "copy")
        expected = contents(journal)
        fill(journal, 50, b"more")
        segment = sorted((tmp_path / "j").glob("segment-*"))[-2]
        with segment.open("r+b") as f:
            f.seek(4096 + 500)
            f.write(b"rot!")
        with pytest.raises(CorruptionError, match=segment.name):
            journal.backup(tmp_path / "copy")
    assert inspect(tmp_path / "copy").ok
    assert restored(tmp_path / "copy") == expected


def test_a_snapshot_that_rotted_is_refused_and_the_earlier_backup_keeps_the_good_one(tmp_path: Path) -> None:
    with recover(tmp_path / "j", Sum(), **SMALL) as replica:
        replica.submit(b"5")
        replica.checkpoint()
        replica.journal.backup(tmp_path / "copy")
        (snapshot,) = (tmp_path / "j" / "snapshots").glob("snapshot-*")
        data = bytearray(snapshot.read_bytes())
        data[-1] ^= 1
        snapshot.write_bytes(data)
        with pytest.raises(SnapshotCorruptError, match=snapshot.name):
            replica.journal.backup(tmp_path / "copy")
    with recover(tmp_path / "copy", Sum()) as replica:
        assert replica.machine.state == [5, 1]


@pytest.mark.parametrize("in_use", [False, True])
def test_a_snapshot_that_is_missing_is_refused_and_the_earlier_backup_keeps_it(
    tmp_path: Path, in_use: bool
) -> None:
    with recover(tmp_path / "j", Sum(), **SMALL) as replica:
        assert replica.journal.backup(tmp_path / "never").snapshot_op is None
        replica.submit(b"5")
        replica.checkpoint()
        replica.journal.backup(tmp_path / "copy")
        (snapshot,) = (tmp_path / "j" / "snapshots").glob("snapshot-*")
        snapshot.unlink()
        with Journal(tmp_path / "j", readonly=True) as reader:
            source = reader if in_use else replica.journal
            with pytest.raises(SnapshotError, match=f"{snapshot.name}: .* is missing"):
                source.backup(tmp_path / "copy")
    with recover(tmp_path / "copy", Sum()) as replica:
        assert replica.machine.state == [5, 1]


def test_a_snapshot_that_gives_way_to_a_later_one_while_the_journal_is_looked_at_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = backup.published_progress
    with recover(tmp_path / "j", Sum(), **SMALL) as replica:
        replica.submit(b"5")
        replica.checkpoint()

        def check_point_and_look(*arguments: Any) -> tuple[int, int]:
            monkeypatch.undo()
            for _ in range(2):  # so many are kept
                replica.submit(b"6")
                replica.checkpoint()
            return look(*arguments)

        monkeypatch.setattr(backup, "published_progress", check_point_and_look)
        with SystemDirectory(tmp_path / "j") as source:
            report = backup_in_use(source, SystemDirectory(tmp_path / "copy"))
        assert report.snapshot_op == 3
    with recover(tmp_path / "copy", Sum()) as replica:
        assert replica.machine.state == [17, 3]


def test_segments_of_an_earlier_backup_that_are_not_the_same_are_copied_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", **SMALL) as journal:
        fill(journal, 200)
        journal.compact()  # its superblock knows where segments end
        journal.backup(tmp_path / "copy")
        kept = sorted((tmp_path / "copy").glob("segment-*"))
        with kept[0].open("r+b") as f:  # another life of the same segment
            f.seek(-3000, 2)
            f.write(bytes(3000))
        kept[1].unlink()
        report = journal.backup(tmp_path / "copy")
        expected = contents(journal)
        assert report.kept_segments == report.segments - 3  # and the last one
    assert restored(tmp_path / "copy") == expected


def test_a_directory_of_another_journal_or_one_that_was_opened_since_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "other", **SMALL) as other, Journal(tmp_path / "j", **SMALL) as journal:
        fill(journal, 10)
        other.backup(tmp_path / "copy")
        with pytest.raises(IncompatibleFormatError, match="another journal"):
            journal.backup(tmp_path / "copy")
        with pytest.raises(LockedError):
            journal.backup(tmp_path / "j")
        with pytest.raises(LockedError):
            journal.backup(tmp_path / "other")
        journal.backup(tmp_path / "mine")
        restored(tmp_path / "mine")
        with pytest.raises(JournalError, match="no backup any more"):
            journal.backup(tmp_path / "mine")
        with pytest.raises(FileNotFoundError):
            journal.backup(tmp_path / "nowhere" / "copy")


def test_a_backup_into_the_journal_itself_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "j")
    with Journal(tmp_path / "j", **SMALL) as journal, Journal(tmp_path / "link", readonly=True) as reader:
        fill(journal, 10)
        before = sorted((tmp_path / "j").iterdir())
        for place in (tmp_path / "j" / "sub", tmp_path / "link" / "a" / "b", str(tmp_path / "j/../j/sub")):
            for source in (journal, reader):
                with pytest.raises(JournalError, match="is inside"):
                    source.backup(place)
            with SystemDirectory(tmp_path / "j") as directory, pytest.raises(JournalError, match="is inside"):
                backup_in_use(directory, place)
            assert main(["backup", str(tmp_path / "j"), str(place)]) == 2
        assert sorted((tmp_path / "j").iterdir()) == before
        (tmp_path / "j" / "sub").mkdir()
        with pytest.raises(JournalError, match="is inside"):
            journal.backup(SystemDirectory(tmp_path / "j" / "sub"))
    assert main(["backup", str(tmp_path / "j"), str(tmp_path / "j" / "sub")]) == 2
