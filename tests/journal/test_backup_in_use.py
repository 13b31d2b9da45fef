"""A backup beside another process has all that was acknowledged, also while that one has yet to recover.

A power cut may bring the index page back as it was long before: it tells of less than is durable.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mmapwal import CorruptionError, Durability, Journal, SystemDirectory, backup
from mmapwal import format as fmt
from mmapwal.recovery import Scanned
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
