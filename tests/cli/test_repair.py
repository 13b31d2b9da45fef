"""repair: says what it would drop, and drops it."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from mmapwal import Journal
from mmapwal.cli import main
from mmapwal.storage import MappedStorage

SIZES = {"slots": 256, "segment_bytes": 65536}


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    path = tmp_path / "j"
    with Journal(path, **SIZES) as journal:
        for n in range(1, 21):
            journal.append(b"entry %02d" % n)
    (segment,) = path.glob("segment-*")
    data = segment.read_bytes()
    segment.write_bytes(data.replace(b"entry 07", b"entry ??"))
    return path


def test_repair_dry_run_says_what_it_would_drop_and_changes_nothing(damaged, capsys):
    before = {file.name: file.read_bytes() for file in damaged.iterdir()}
    assert main(["repair", "--dry-run", str(damaged)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "op 7: the checksum of the payload is wrong" in out[0]
    assert out[1] == "1 place(s) would be left out: 64 bytes"
    assert {file.name: file.read_bytes() for file in damaged.iterdir()} == before
    assert main(["repair", "--dry-run", "--json", str(damaged)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["dry_run"], report["changed"], [d["op"] for d in report["dropped"]]) == (True, False, [7])


def test_repair_drops_the_damaged_entry_alone_and_keeps_the_file_aside(damaged, capsys):
    assert main(["verify", str(damaged)]) == 1
    assert main(["dump", str(damaged)]) == 2
    capsys.readouterr()
    assert main(["repair", "--json", str(damaged)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["changed"]
    (broken,) = report["broken"]
    assert b"entry ??" in (damaged / broken).read_bytes()
    assert main(["verify", str(damaged)]) == 0
    with Journal(damaged) as journal:
        assert [e.op for e in journal] == [*range(1, 7), *range(8, 21)]
    capsys.readouterr()
    assert main(["repair", str(damaged)]) == 0
    assert capsys.readouterr().out == "nothing is wrong\n"


def test_repair_of_what_is_open_or_not_there_says_so(damaged, tmp_path, capsys):
    assert main(["repair", str(tmp_path / "nowhere")]) == 2
    with Journal(tmp_path / "open") as journal:
        journal.append(b"x")
        assert main(["repair", str(tmp_path / "open")]) == 2
        assert "open already" in capsys.readouterr().err
    (damaged / "superblock").write_bytes(b"not one")
    assert main(["repair", str(damaged)]) == 2
    assert "superblock" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["repair", "dry-run"])
def test_repair_on_a_disk_that_fails_to_read_says_where_and_changes_nothing(
    damaged, options, capsys, monkeypatch
):
    read_at = MappedStorage.read_at

    def read(self, offset, length):
        if "segment-" in self._name and offset + length > 30_000:
            raise OSError(errno.EIO, "Input/output error", self._name)
        return read_at(self, offset, length)

    before = {file.name: file.read_bytes() for file in damaged.iterdir()}
    monkeypatch.setattr(MappedStorage, "read_at", read)
    assert main(["repair", *options, str(damaged)]) == 2
    told = capsys.readouterr().err
    assert "segment-0000000000000001-00000000: Input/output error at byte 29696" in told
    assert "copy the files to another disk first" in told
    assert {file.name: file.read_bytes() for file in damaged.iterdir()} == before
