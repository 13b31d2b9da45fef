"""A backup onto an earlier one: until the new one is there, the earlier one and its files are what they were;
also when the journal was opened again since, or went on from an older copy."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mmapwal import Journal, JournalError, MemoryDirectory, SystemDirectory, recover
from mmapwal import format as fmt
from mmapwal.storage import Directory
from mmapwal.superblock import read_superblock
from mmapwal.testing import CrashDisk, Fault, FaultDirectory, When, assert_crash_safe, every_fault

from .test_backup import SMALL, Contents, Sum, check_last_or_next, contents, fill, restored


def named_files(directory: Directory) -> dict[str, bytes]:
    """What the backup consists of, but for its superblock."""
    superblock = read_superblock(directory)
    assert superblock is not None
    found = {}
    for record in superblock.segments:
        storage = directory.open(record.name)
        found[record.name] = bytes(storage.read_at(0, len(storage)))
        storage.close()
    return found


def looked_at(path: Path) -> Contents:
    with Journal(path, readonly=True) as journal:
        assert journal.verify().ok
        return contents(journal)


def failing_backups(journal: Journal, earlier: Path, when: When) -> Iterator[tuple[Path, bool]]:
    """A backup onto a copy of the earlier one for each call that fails: the copy, and whether it was done."""
    for fault in every_fault(error=errno.ENOSPC, when=when):
        copy = earlier.with_name(f"copy {fault.nth}")
        shutil.copytree(earlier, copy)
        done = True
        try:
            journal.backup(FaultDirectory(SystemDirectory(copy), fault))
        except (OSError, JournalError):
            done = False
        yield copy, done
        shutil.rmtree(copy)


def lived(path: Path, align: int) -> None:
    """A journal with removals, a watermark, a cut, user data, and segments of later generations."""
    with Journal(path, **SMALL, commit_align_bytes=align) as journal:
        fill(journal, 60)
        journal.set_snapshot_op(10)
        journal.drain(15, 40)
        journal.truncate_from(58)
        journal.set_user_data(b"term 7")
        journal.compact(wait=True)
        fill(journal, 5, b"behind the cut")


@pytest.mark.parametrize("when", [When.BEFORE, When.AFTER])
@pytest.mark.parametrize("align", [0, 512])
@pytest.mark.parametrize("reopened", [0, 1, 2])
def test_a_backup_that_fails_leaves_the_earlier_one_however_often_the_journal_was_opened_since(
    tmp_path: Path, reopened: int, align: int, when: When
) -> None:
    lived(tmp_path / "j", align)
    with Journal(tmp_path / "j") as journal:
        journal.backup(tmp_path / "earlier")
        earlier = contents(journal)
    for number in range(reopened):
        with Journal(tmp_path / "j") as journal:
            journal.append(b"later %d" % number)
    with SystemDirectory(tmp_path / "earlier") as directory:
        named = named_files(directory)
    with Journal(tmp_path / "j") as journal:
        journal.append(b"latest")
        now = contents(journal)
        for copy, done in failing_backups(journal, tmp_path / "earlier", when):
            found = looked_at(copy)
            assert found in ([now] if done else [earlier, now])
            if found == earlier:
                with SystemDirectory(copy) as directory:
                    assert named_files(directory) == named
            assert restored(copy) == found


def test_a_power_cut_leaves_the_earlier_backup_of_a_journal_that_was_opened_since() -> None:
    found: list[Contents] = []

    def scenario(disk: CrashDisk, acknowledge: Callable[..., None]) -> None:
        found.clear()
        home = MemoryDirectory()
        for step in range(3):
            for _ in range(step + 1):
                with Journal("j", storage=home, clock=lambda: 1, **SMALL) as journal:
                    fill(journal, 10, b"step %d" % step)
                    found[step:] = [contents(journal)]
            with Journal("j", storage=home, clock=lambda: 1) as journal:
                journal.backup(disk)
            acknowledge(step)

    assert_crash_safe(scenario, partial(check_last_or_next, found), max_states=1000)


@pytest.mark.parametrize("nth", [1, 2, 3])  # the last is that of its superblock
def test_a_power_cut_leaves_a_backup_also_when_the_one_before_failed_at_a_sync_of_the_directory(
    nth: int,
) -> None:
    """Nobody knows which of two is in force then, and the third must not harm either."""
    found: list[Contents] = []

    def scenario(disk: CrashDisk, acknowledge: Callable[..., None]) -> None:
        found.clear()
        home = MemoryDirectory()
        for step, place in enumerate((disk, FaultDirectory(disk, Fault(nth, kinds="dir_sync")), disk)):
            for _ in range(2):
                with Journal("j", storage=home, clock=lambda: 1, **SMALL) as journal:
                    fill(journal, 10, b"step %d" % step)
                    found[step:] = [contents(journal)]
            with Journal("j", storage=home) as journal, suppress(OSError, JournalError):
                journal.backup(place)
                acknowledge(step)

    def check(disk: CrashDisk, acknowledged: list[int]) -> None:
        if not acknowledged and fmt.SUPERBLOCK_NAME not in disk.names():
            return
        assert restored(disk) in found[max(acknowledged, default=0) :]

    assert_crash_safe(scenario, check, max_states=1500)


# --- a journal that went on from an older copy ----------------------------------------------------------


def text(op: int) -> bytes:
    return b"%03d" % op + b"." * 400


def two_lines(tmp_path: Path) -> Contents:
    """Tuesday's backup of a journal, and Monday's, which is restored and goes on."""
    with Journal(tmp_path / "j", **SMALL) as journal:
        for op in range(1, 61):
            journal.append(text(op))
        journal.backup(tmp_path / "monday")
        journal.drain(2, 20)
        journal.compact(wait=True)
        fill(journal, 8, b"tuesday")
        journal.backup(tmp_path / "tuesday")
        return contents(journal)


def test_a_journal_that_went_back_to_an_older_backup_is_backed_up_whole_onto_the_newer_one(
    tmp_path: Path,
) -> None:
    """Both compacted the same segment to the same generation, and left out other entries of it."""
    two_lines(tmp_path)
    with Journal(tmp_path / "monday") as journal:
        journal.drain(8, 25)
        journal.compact(wait=True)
        fill(journal, 8, b"another tuesday")
        report = journal.backup(tmp_path / "tuesday")
        assert report.kept_segments < report.segments
        expected = contents(journal)
        assert journal.backup(tmp_path / "tuesday").kept_segments > 0
        third = journal.backup(tmp_path / "tuesday")
        assert third.kept_segments == third.segments - 1
    assert restored(tmp_path / "tuesday") == expected


def test_segments_of_two_restored_copies_that_differ_in_one_byte_are_not_taken_for_the_same(
    tmp_path: Path,
) -> None:
    """Of the first generation the frame that ends a segment tells, whatever else is the same."""
    with Journal(tmp_path / "j", **SMALL) as journal:
        journal.backup(tmp_path / "one")
        journal.backup(tmp_path / "other")
    for name, differs in (("one", b"."), ("other", b",")):
        with Journal(tmp_path / name, clock=lambda: 1) as journal:
            journal.append_many([text(op) for op in range(1, 21)])
            journal.append(text(21)[:-1] + differs)
            for op in range(22, 120):
                journal.append(text(op))
            journal.compact()  # its superblock knows where segments end
            report = journal.backup(tmp_path / "copy")
            expected = contents(journal)
    assert report.kept_segments == report.segments - 2 > 1  # all but that one and the last
    assert restored(tmp_path / "copy") == expected


@pytest.mark.parametrize("when", [When.BEFORE, When.AFTER])
def test_a_backup_of_a_journal_that_went_back_to_an_older_one_leaves_the_newer_one_when_it_fails(
    tmp_path: Path, when: When
) -> None:
    tuesday = two_lines(tmp_path)
    with Journal(tmp_path / "monday") as journal:
        journal.drain(8, 25)
        journal.compact(wait=True)
        fill(journal, 8, b"another tuesday")
        now = contents(journal)
        for copy, done in failing_backups(journal, tmp_path / "tuesday", when):
            assert restored(copy) in ([now] if done else [tuesday, now])


def open_replica(path: Path) -> Any:
    return recover(path, Sum(), **SMALL)


def submit(replica: Any, *numbers: int) -> None:
    for number in numbers:
        replica.submit(b"%d" % number)


def test_a_backup_of_a_replica_that_went_back_to_an_older_one_has_the_snapshot_that_it_is_paired_with(
    tmp_path: Path,
) -> None:
    with open_replica(tmp_path / "j") as replica:
        submit(replica, 1, 1)
        replica.journal.backup(tmp_path / "monday")
        submit(replica, 1, 1, 1)
        replica.checkpoint()
        replica.journal.backup(tmp_path / "tuesday")
    with open_replica(tmp_path / "monday") as replica:
        submit(replica, 7)
        replica.checkpoint()  # of an earlier op than tuesday's
        replica.journal.backup(tmp_path / "tuesday")
    with open_replica(tmp_path / "tuesday") as replica:
        assert replica.machine.state == [9, 3]


def test_another_snapshot_of_the_op_that_the_earlier_backup_is_paired_with_is_refused_before_it_is_harmed(
    tmp_path: Path,
) -> None:
    with open_replica(tmp_path / "j") as replica:
        submit(replica, 1, 1)
        replica.journal.backup(tmp_path / "monday")
        submit(replica, 1)
        replica.checkpoint()
        replica.journal.backup(tmp_path / "tuesday")
    with SystemDirectory(tmp_path / "tuesday") as directory:
        before = named_files(directory), directory.names()
    with open_replica(tmp_path / "monday") as replica:
        submit(replica, 7)
        replica.checkpoint()
        with pytest.raises(JournalError, match="another snapshot of op 3"):
            replica.journal.backup(tmp_path / "tuesday")
        with SystemDirectory(tmp_path / "tuesday") as directory:
            assert (named_files(directory), directory.names()) == before
        shutil.copytree(tmp_path / "tuesday", tmp_path / "look")
        with open_replica(tmp_path / "look") as earlier:
            assert earlier.machine.state == [3, 3]
        submit(replica, 7)
        replica.checkpoint()
        replica.journal.backup(tmp_path / "tuesday")
    with open_replica(tmp_path / "tuesday") as replica:
        assert replica.machine.state == [16, 4]
