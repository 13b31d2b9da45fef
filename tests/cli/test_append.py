"""mmapwal append: what it prints is durable, and is what was given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmapwal import Durability, Journal
from mmapwal.cli import append, main


class Feed:
    """Stands for standard input."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self._monkeypatch, self._path = monkeypatch, path
        self._files = []

    def __call__(self, data: bytes) -> None:
        self._path.write_bytes(data)
        self._files.append(self._path.open("rb"))
        self._monkeypatch.setattr(sys, "stdin", self._files[-1])

    def close(self) -> None:
        for file in self._files:
            file.close()


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Feed]:
    feed = Feed(monkeypatch, tmp_path / "input")
    yield feed
    feed.close()


def contents(path: Path) -> list[tuple[int, int, bytes]]:
    with Journal(path, create=False) as journal:
        return [(e.op, e.kind, bytes(e.payload)) for e in journal]


def test_append_prints_the_op_of_each_line_and_the_lines_are_in_the_journal(feed, tmp_path, capsys):
    feed(b"one\ntwo\nthree\n")
    assert main(["append", str(tmp_path / "j"), "--kind", "7"]) == 0
    assert capsys.readouterr().out == "1\n2\n3\n"
    assert contents(tmp_path / "j") == [(1, 7, b"one"), (2, 7, b"two"), (3, 7, b"three")]


def test_append_json_prints_one_object_a_batch(feed, tmp_path, capsys):
    feed(b"".join(b"%d\n" % n for n in range(10)))
    assert main(["append", str(tmp_path / "j"), "--batch", "4", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        {"first_op": 1, "last_op": 4, "entries": 4},
        {"first_op": 5, "last_op": 8, "entries": 4},
        {"first_op": 9, "last_op": 10, "entries": 2},
    ]


def test_append_commits_as_few_batches_as_fit(feed, tmp_path, monkeypatch, capsys):
    batches = []
    real = Journal.append_many

    def append_many(self, payloads, **options):
        batches.append(len(payloads))
        return real(self, payloads, **options)

    monkeypatch.setattr(Journal, "append_many", append_many)
    feed(b"x" * 99 + b"\n" + b"".join(b"%d\n" % n for n in range(30_000)))
    assert main(["append", str(tmp_path / "j"), "--batch", "64"]) == 0
    assert set(batches[:-1]) == {64}
    assert sum(batches) == 30_001


def test_append_keeps_bytes_as_they_are(feed, tmp_path):
    feed(b"\xff\xfe\x00 binary \r\n\n  spaces  \nno newline at the end")
    assert main(["append", str(tmp_path / "j")]) == 0
    payloads = [payload for _, _, payload in contents(tmp_path / "j")]
    assert payloads == [b"\xff\xfe\x00 binary \r", b"", b"  spaces  ", b"no newline at the end"]


def test_append_of_nothing_makes_an_empty_journal(feed, tmp_path, capsys):
    feed(b"")
    assert main(["append", str(tmp_path / "j")]) == 0
    assert capsys.readouterr().out == ""
    assert contents(tmp_path / "j") == []


def test_append_goes_on_where_the_journal_ended_with_the_sizes_that_it_has(feed, tmp_path, capsys):
    feed(b"a\n")
    assert main(["append", str(tmp_path / "j"), "--slots", "128", "--segment-bytes", "65536"]) == 0
    feed(b"b\n")
    assert main(["append", str(tmp_path / "j")]) == 0
    assert capsys.readouterr().out == "1\n2\n"
    with Journal(tmp_path / "j") as journal:
        assert (journal.slots, journal.segment_bytes) == (128, 65536)


def test_append_refuses_sizes_that_the_journal_was_not_made_with(feed, tmp_path, capsys):
    feed(b"a\n")
    assert main(["append", str(tmp_path / "j"), "--slots", "128"]) == 0
    feed(b"b\n")
    assert main(["append", str(tmp_path / "j"), "--slots", "256"]) == 2
    assert "mmapwal: " in capsys.readouterr().err


@pytest.mark.parametrize("durability", [d.value for d in Durability])
def test_append_is_durable_at_the_end_of_the_input_whatever_the_durability(
    feed, tmp_path, capsys, durability
):
    feed(b"a\nb\n")
    assert main(["append", str(tmp_path / "j"), "--durability", durability]) == 0
    assert capsys.readouterr().out == "1\n2\n"
    assert [payload for _, _, payload in contents(tmp_path / "j")] == [b"a", b"b"]


def test_append_keeps_what_fits_into_a_full_journal_and_says_that_it_is_full(feed, tmp_path, capsys):
    feed(b"".join(b"%d\n" % n for n in range(20)))
    assert main(["append", str(tmp_path / "j"), "--slots", "16", "--batch", "10"]) == 2
    said = capsys.readouterr()
    assert said.out.split() == [str(op) for op in range(1, 17)]
    assert said.err.startswith("mmapwal: ") and len(said.err.splitlines()) == 1
    with Journal(tmp_path / "j") as journal:
        assert len(journal) == 16


def test_append_refuses_an_endless_line_after_it_kept_what_came_before(feed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(append, "LINE_BYTES_MAX", 100_000)
    feed(b"first\nsecond\n" + b"x" * 300_000 + b"\nthird\n")
    assert main(["append", str(tmp_path / "j")]) == 2
    said = capsys.readouterr()
    assert said.out == "1\n2\n"
    assert "100,000 bytes" in said.err
    assert [payload for _, _, payload in contents(tmp_path / "j")] == [b"first", b"second"]


def test_append_takes_lines_larger_than_a_segment(feed, tmp_path):
    feed(b"x" * 200_000 + b"\nsmall\n")
    assert main(["append", str(tmp_path / "j"), "--segment-bytes", "65536"]) == 0
    with Journal(tmp_path / "j") as journal:
        assert [len(p) for p in journal.payloads()] == [200_000, 5]


@pytest.mark.parametrize(
    "options",
    [["--kind", "-1"], ["--kind", "32768"], ["--batch", "0"], ["--slots", "0"], ["--slots", "many"],
     ["--segment-bytes", "1"], ["--durability", "none"]],
)  # fmt: skip
def test_append_refuses_numbers_that_make_no_sense_and_makes_nothing(feed, tmp_path, capsys, options):
    feed(b"a\n")
    assert main(["append", str(tmp_path / "j"), *options]) == 2
    assert "usage:" in capsys.readouterr().err
    assert not (tmp_path / "j").exists()


def test_append_says_when_standard_input_is_closed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["append", str(tmp_path / "j")]) == 2
    assert "standard input" in capsys.readouterr().err


def test_a_slow_pipe_is_not_waited_for_and_what_was_printed_survives_kill_9(tmp_path):
    command = [sys.executable, "-m", "mmapwal", "append", str(tmp_path / "j")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"hello\nwor")
        process.stdin.flush()
        assert process.stdout.readline() == b"1\n"  # though the batch has room and the input goes on
        process.stdin.write(b"ld\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"2\n"
        os.kill(process.pid, signal.SIGKILL)
    assert [payload for _, _, payload in contents(tmp_path / "j")] == [b"hello", b"world"]
