"""dump, stat, verify and compact, on sound, damaged, locked and missing journals."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from mmapwal import Journal
from mmapwal.cli import main

CLOCK_NS = 1_700_000_000_123_456_789
TIME = "2023-11-14T22:13:20.123456789Z"
PAYLOADS = [b"hello", b"\x00\xff binary", b"gr\xc3\xbc\xc3\x9fe", b"", b"y" * 500]
SIZES = {"slots": 256, "segment_bytes": 65536}


@pytest.fixture
def journal_path(tmp_path: Path) -> Path:
    path = tmp_path / "j"
    with Journal(path, clock=lambda: CLOCK_NS, **SIZES) as journal:
        for n, payload in enumerate(PAYLOADS):
            journal.append(payload, kind=n)
    return path


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def damage(path: Path, payload: bytes) -> Path:
    """Flips a bit of that payload in the segment that holds it."""
    for segment in sorted(path.glob("segment-*")):
        data = bytearray(segment.read_bytes())
        at = data.find(payload)
        if at >= 0:
            data[at] ^= 1
            segment.write_bytes(data)
            return segment
    raise AssertionError("the payload is in no segment")


# --- dump -----------------------------------------------------------------------------------------


def test_dump_prints_op_kind_time_length_and_payload(journal_path, capsys):
    assert main(["dump", str(journal_path)]) == 0
    lines = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()]
    assert [line[:4] for line in lines] == [
        [str(n + 1), str(n), TIME, str(len(payload))] for n, payload in enumerate(PAYLOADS)
    ]
    assert [line[4:] for line in lines[:4]] == [["hello"], ["0x" + PAYLOADS[1].hex()], ["grüße"], []]
    assert re.fullmatch("y+…", lines[4][4]) and len(lines[4][4]) < 100


def test_dump_range_is_inclusive(journal_path, capsys):
    assert main(["dump", str(journal_path), "--first", "2", "--last", "3"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["2", "3"]


def test_dump_raw_gives_back_what_append_was_given(journal_path, capsysbinary):
    assert main(["dump", str(journal_path), "--raw"]) == 0
    assert capsysbinary.readouterr().out == b"".join(p + b"\n" for p in PAYLOADS)


def test_dump_json_has_the_whole_payload(journal_path, capsys):
    assert main(["dump", str(journal_path), "--json"]) == 0
    objects = rows(capsys.readouterr().out)
    assert [base64.b64decode(o["payload"]) for o in objects] == PAYLOADS
    assert objects[0] == {
        "op": 1, "kind": 0, "timestamp": TIME, "timestamp_ns": CLOCK_NS, "length": 5, "payload": "aGVsbG8=",
    }  # fmt: skip


def test_dump_refuses_a_range_that_ends_before_it_starts(journal_path, capsys):
    assert main(["dump", str(journal_path), "--first", "3", "--last", "2"]) == 2
    assert "--first 3" in capsys.readouterr().err


def test_dump_does_not_print_what_was_drained(journal_path, capsys):
    with Journal(journal_path) as journal:
        journal.set_snapshot_op(3)
    assert main(["dump", str(journal_path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["4", "5"]


# --- stat -----------------------------------------------------------------------------------------


def test_stat_shows_counters_and_what_opening_found(journal_path, capsys):
    assert main(["stat", str(journal_path)]) == 0
    out = capsys.readouterr().out
    parts = re.split(r"^(?=\S)", out, flags=re.MULTILINE)[1:]
    journal, stats, report = (dict(re.findall(r"^  (\S.*?)  +(\S.*)$", p, re.MULTILINE)) for p in parts)
    assert journal["slots"] == "256"
    assert stats["entries"] == "5"
    assert (stats["first op"], stats["last op"]) == ("1", "5")
    assert report["outcome"] == "sealed"


def test_stat_json_is_one_object(journal_path, capsys):
    assert main(["stat", str(journal_path), "--json"]) == 0
    (facts,) = rows(capsys.readouterr().out)
    assert facts["journal"]["path"] == str(journal_path)
    assert facts["journal"]["segment_bytes"] == SIZES["segment_bytes"]
    assert facts["stats"]["entries"] == len(PAYLOADS)
    assert facts["report"]["outcome"] == "sealed"


# --- verify ---------------------------------------------------------------------------------------


def test_verify_of_a_sound_journal_exits_0(journal_path, capsys):
    assert main(["verify", str(journal_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ok: 5 entries") and len(out.splitlines()) == 1


def test_verify_json_of_a_sound_journal(journal_path, capsys):
    assert main(["verify", str(journal_path), "--json"]) == 0
    (report,) = rows(capsys.readouterr().out)
    assert report["ok"] is True and report["problems"] == [] and report["entries"] == 5


def test_verify_exits_1_with_a_line_for_each_problem(journal_path, capsys):
    segment = damage(journal_path, b"hello")
    assert main(["verify", str(journal_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"\S+ offset \d+ length \d+ lsn \d+ op (\d+|\?): \S.*", line)
    assert lines[0].startswith(f"{segment.name} offset ")


def test_verify_json_names_each_problem(journal_path, capsys):
    segment = damage(journal_path, b"hello")
    assert main(["verify", str(journal_path), "--json"]) == 1
    (report,) = rows(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["problems"][0]["segment"] == segment.name
    assert set(report["problems"][0]) == {"segment", "offset", "lsn", "op", "reason", "length"}


def test_verify_writes_nothing_and_works_beside_a_writer(journal_path, capsys):
    with Journal(journal_path):
        before = {p.name: p.read_bytes() for p in journal_path.iterdir()}
        assert main(["verify", str(journal_path)]) == 0
        assert {p.name: p.read_bytes() for p in journal_path.iterdir()} == before


# --- compact --------------------------------------------------------------------------------------


def filled(path: Path) -> Path:
    with Journal(path, **SIZES) as journal:
        for _ in range(100):
            journal.append(bytes(4000))
        journal.set_snapshot_op(90)
    return path


def test_compact_says_how_much_it_freed(tmp_path, capsys):
    path = filled(tmp_path / "j")
    before = sum(p.stat().st_size for p in path.iterdir())
    assert main(["compact", str(path)]) == 0
    freed = int(re.match(r"freed ([\d,]+) bytes", capsys.readouterr().out)[1].replace(",", ""))
    assert 0 < freed < before
    assert sum(p.stat().st_size for p in path.iterdir()) < before
    with Journal(path) as journal:
        assert [e.op for e in journal] == list(range(91, 101))


def test_compact_json(tmp_path, capsys):
    assert main(["compact", str(filled(tmp_path / "j")), "--json"]) == 0
    (result,) = rows(capsys.readouterr().out)
    assert result["freed_bytes"] > 0 and result["file_bytes"] > 0


# --- what cannot be opened ------------------------------------------------------------------------

OPENING = ["dump", "stat", "compact"]


@pytest.mark.parametrize("command", ["dump", "compact"])
def test_a_journal_that_is_being_written_is_left_alone(journal_path, capsys, command):
    with Journal(journal_path) as journal:
        assert main([command, str(journal_path)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and "has it open" in said.err
        assert "Traceback" not in said.err and len(said.err.splitlines()) == 1
        assert journal.append(b"still writing") == 6


def test_stat_shows_what_is_durable_of_a_journal_that_is_being_written(journal_path, capsys):
    with Journal(journal_path) as journal:
        journal.append(b"sixth")
        assert main(["stat", str(journal_path), "--json"]) == 0
        (shown,) = rows(capsys.readouterr().out)
        assert shown["stats"]["entries"] == 6 and shown["journal"]["slots"] == journal.slots
        assert shown["report"] is None
        assert main(["stat", str(journal_path)]) == 0
        assert "opening it" not in capsys.readouterr().out
        assert journal.append(b"still writing") == 7


@pytest.mark.parametrize("command", OPENING)
def test_a_damaged_journal_does_not_open_and_the_place_is_named(journal_path, capsys, command):
    # Without its index the journal is scanned; the seal proves that all of it was durable.
    segment = damage(journal_path, b"hello")
    (journal_path / "index").unlink()
    assert main([command, str(journal_path)]) == 2
    said = capsys.readouterr()
    assert segment.name in said.err and len(said.err.splitlines()) == 1


@pytest.mark.parametrize("command", [*OPENING, "verify"])
def test_where_there_is_no_journal_nothing_is_made(tmp_path, capsys, command):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing", tmp_path / "empty"):
        assert main([command, str(path)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and str(path) in said.err and len(said.err.splitlines()) == 1
    assert not (tmp_path / "missing").exists()
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("command", [*OPENING, "verify", "append"])
def test_a_file_is_not_a_journal(tmp_path, capsys, command):
    (tmp_path / "file").write_bytes(b"x")
    assert main([command, str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.mark.parametrize("command", [*OPENING, "verify", "append"])
def test_a_folder_that_holds_something_else_is_left_as_it_was(tmp_path, capsys, command):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_bytes(b"x")
    assert main([command, str(tmp_path / "home")]) == 2
    assert str(tmp_path / "home") in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["letter.txt"]
