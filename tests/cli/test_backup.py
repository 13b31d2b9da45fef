"""mmapwal backup, of a journal that is in use and of one that is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmapwal import Journal
from mmapwal.cli import main


@pytest.mark.parametrize("in_use", [False, True])
def test_a_journal_is_backed_up_whether_it_is_in_use_or_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_use: bool
) -> None:
    journal = Journal(tmp_path / "j", slots=64, segment_bytes=65536)
    for n in range(10):
        journal.append(b"entry %d" % n)
    if not in_use:
        journal.close()
    for kept in (0, 0):
        assert main(["backup", str(tmp_path / "j"), str(tmp_path / "copy"), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["segments"] == 1
        assert report["kept_segments"] == kept
    assert main(["backup", str(tmp_path / "j"), str(tmp_path / "copy")]) == 0
    assert "1 segments" in capsys.readouterr().out
    journal.close()
    with Journal(tmp_path / "copy") as copy:
        assert [bytes(e.payload) for e in copy] == [b"entry %d" % n for n in range(10)]


def test_a_backup_that_cannot_be_made_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backup", str(tmp_path / "nothing"), str(tmp_path / "copy")]) == 2
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()
