"""A backup beside another process has all that was acknowledged, also while that one has yet to recover.

A power cut may bring the index page back as it was long before: it tells of less than is durable.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmapwal import CorruptionError, Durability, Journal, MappedStorage, SystemDirectory, backup
from mmapwal import format as fmt
from mmapwal.recovery import Scanned
from mmapwal.storage import Directory
from mmapwal.testing import Call, InterposedDirectory
from tests.journal.files import at_rest, entry_frames, flip
from tests.journal.test_backup import SMALL, contents, fill, restored

FIRST, LAST = 10, 100


@pytest.fixture(params=["the page of long ago", "no page"])
def cut(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What a power cut left of a journal of LAST entries, before it was opened."""
    place = tmp_path / "cut"
    with Journal(tmp_path / "j", **SMALL) as journal:
        fill(journal, FIRST)
        old = (tmp_path / "j" / fmt.INDEX_NAME).read_bytes()
        fill(journal, LAST - FIRST)
        with at_rest(journal):
            shutil.copytree(tmp_path / "j", place)
    (place / fmt.INDEX_NAME).write_bytes(old if request.param == "the page of long ago" else bytes(len(old)))
    return place


def back_up(place: Path) -> Path:
    with Journal(place, readonly=True) as reader:
        reader.backup(place.with_name("copy"))
    return place.with_name("copy")


def test_after_a_power_cut_a_backup_before_the_recovery_has_all_that_was_acknowledged(cut: Path) -> None:
    before = {path.name: path.read_bytes() for path in cut.iterdir()}
    copy = back_up(cut)
    assert {path.name: path.read_bytes() for path in cut.iterdir()} == before
    with Journal(cut) as journal:
        expected = contents(journal)
    assert len(expected[0]) == LAST
    assert restored(copy) == expected


def test_a_torn_tail_is_left_out_of_a_backup_as_a_recovery_cuts_it(cut: Path) -> None:
    directory = SystemDirectory(cut)
    last = entry_frames(directory)[LAST]
    flip(directory, last.name, last.payload_at)
    entries, _, _ = restored(back_up(cut))
    assert sorted(entries) == list(range(1, LAST))


def test_damage_below_what_later_frames_prove_is_refused_though_the_page_tells_less(cut: Path) -> None:
    directory = SystemDirectory(cut)
    damaged = entry_frames(directory)[LAST - 5]
    flip(directory, damaged.name, damaged.payload_at)
    with pytest.raises(CorruptionError, match=damaged.name):
        back_up(cut)
    assert list(cut.with_name("copy").iterdir()) == []


def test_what_was_being_written_while_the_tail_was_looked_for_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look stops where a frame is not whole, and finds one behind it that was written since."""
    looks: list[int] = []
    look = backup.scan_journal

    def appends_meanwhile(*arguments: Any) -> Scanned:
        found = look(*arguments)
        looks.append(found.tail_lsn)
        if len(looks) == 1:
            fill(journal, 2, b"meanwhile")
            found.proven_lsn = journal.durable_lsn
        return found

    monkeypatch.setattr(backup, "scan_journal", appends_meanwhile)
    with Journal(tmp_path / "j", **SMALL) as journal:
        fill(journal, 20)
        acknowledged = contents(journal)[0]
        report = backup.backup_in_use(SystemDirectory(tmp_path / "j"), tmp_path / "copy")
    assert len(looks) == 2
    assert report.durable_lsn == looks[0] < looks[1]
    assert restored(tmp_path / "copy")[0] == acknowledged


def test_what_is_written_and_not_synced_is_in_a_backup_beside_the_writer(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", durability=Durability.OS, **SMALL) as journal:
        fill(journal, 30)
        assert journal.durable_lsn < journal.written_lsn
        copy = back_up(tmp_path / "j")
        expected = contents(journal)
    assert restored(copy) == expected


def test_of_what_is_not_durable_the_bytes_are_copied_and_no_blocks_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page cache may show what the disk has lost, and a clone has what the disk has."""
    ends: list[int] = []
    share = MappedStorage.copy_from

    def noted(self: MappedStorage, source: Any, offset: int, length: int) -> int:
        ends.append(offset + length)
        return share(self, source, offset, length)

    monkeypatch.setattr(MappedStorage, "copy_from", noted)
    with Journal(tmp_path / "j", slots=256, segment_bytes=65536, durability=Durability.OS) as journal:
        fill(journal, 90)
        durable = fmt.PAGE_BYTES + journal.sync() - journal._engine.superblock.segments[0].base_lsn
        fill(journal, 90)
        copy = back_up(tmp_path / "j")
        expected = contents(journal)
    assert restored(copy) == expected
    assert ends
    assert max(ends) <= durable


def test_a_superblock_that_changes_faster_than_the_tail_is_found_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    look = backup.scan_journal

    def changes_meanwhile(*arguments: Any) -> Scanned:
        looks.append(1)
        journal.append(b"meanwhile")
        journal.set_user_data(b"%d" % len(looks))
        return look(*arguments)

    monkeypatch.setattr(backup, "scan_journal", changes_meanwhile)
    with Journal(tmp_path / "j", **SMALL) as journal:
        fill(journal, 20)
        acknowledged = contents(journal)[0]
        backup.backup_in_use(SystemDirectory(tmp_path / "j"), tmp_path / "copy")
    assert len(looks) == 1
    assert acknowledged.items() <= restored(tmp_path / "copy")[0].items()


class Failing(InterposedDirectory):
    """Once armed, a write to a segment finds no space behind what it wrote, and is looked at before."""

    arm: Callable[[], None] | None = None

    def intercept(self, call: Call) -> Any:
        arm = self.arm
        if arm is None or call.kind != "write" or not call.name.startswith("segment"):
            return call.run()
        self.arm = None
        call.run()
        arm()
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_was_written_and_failed_while_it_was_copied_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails for want of space may leave whole frames, and the next epoch begins before them."""
    look = backup._moment_in_use
    moments: list[Any] = []

    def fails_behind_the_look(directory: Directory) -> Any:
        moments.append(None)
        if len(moments) > 1:
            return look(directory)
        storage.arm = lambda: moments.__setitem__(0, look(directory))
        with pytest.raises(OSError, match="No space"):
            journal.append(b"fails")
        journal.append(b"another, and longer than the one that failed")
        return moments[0]

    monkeypatch.setattr(backup, "_moment_in_use", fails_behind_the_look)
    storage = Failing(SystemDirectory(tmp_path / "j"))
    with Journal("j", storage=storage, durability=Durability.OS, **SMALL) as journal:
        fill(journal, 20)
        backup.backup_in_use(SystemDirectory(tmp_path / "j"), tmp_path / "copy")
        expected = contents(journal)
    assert len(moments) == 2
    assert restored(tmp_path / "copy") == expected
