"""tail: the last entries, beside a writer, and those that come."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mmapwal import Journal
from mmapwal.cli import main

SIZES = {"slots": 256, "segment_bytes": 65536}


def fill(journal: Journal, count: int) -> None:
    for _ in range(count):
        journal.append(b"entry %d" % ((journal.last_op or 0) + 1))


def texts(text: str) -> list[str]:
    return [json.loads(line)["op"] for line in text.splitlines()]


def test_tail_prints_the_last_entries_of_a_journal_that_is_being_written(tmp_path, capsys):
    with Journal(tmp_path / "j", **SIZES) as journal:
        fill(journal, 30)
        assert main(["tail", str(tmp_path / "j")]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [int(line.split()[0]) for line in lines] == list(range(21, 31))
        assert lines[-1].endswith("entry 30")
        for options, expected in (
            (["-n", "3"], [28, 29, 30]), (["-n", "0"], []), (["--from", "29"], [29, 30]),
            (["-n", "1000"], list(range(1, 31))), (["-f", "-n", "2", "--timeout", "0.01"], [29, 30]),
        ):  # fmt: skip
            assert main(["tail", str(tmp_path / "j"), "--json", *options]) == 0
            assert texts(capsys.readouterr().out) == expected


def test_tail_raw_prints_the_payloads_alone(tmp_path, capfdbinary):
    with Journal(tmp_path / "j", **SIZES) as journal:
        fill(journal, 3)
        assert main(["tail", str(tmp_path / "j"), "--raw", "-n", "2"]) == 0
    assert capfdbinary.readouterr().out == b"entry 2\nentry 3\n"


def test_tail_of_nothing_says_so_and_with_f_waits_for_it(tmp_path, capsys):
    assert main(["tail", str(tmp_path / "j")]) == 2
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["tail", str(tmp_path / "empty")]) == 2
    assert "no journal here" in capsys.readouterr().err
    assert main(["tail", "-f", "--timeout", "0.05", str(tmp_path / "empty")]) == 0
    assert main(["tail", "-f", "--timeout", "0.05", str(tmp_path / "j")]) == 2


def test_tail_f_does_not_wait_in_a_folder_of_other_files(tmp_path, capsys):
    (tmp_path / "photo.jpg").write_bytes(b"not ours")
    assert main(["tail", "-f", str(tmp_path)]) == 2
    assert "photo.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("there", ["journal", "nothing"])
def test_tail_f_goes_on_with_what_comes_and_says_what_was_removed(tmp_path: Path, there: str) -> None:
    path = tmp_path / "j"
    if there == "journal":
        with Journal(path, **SIZES) as journal:
            fill(journal, 5)
    command = [sys.executable, "-m", "mmapwal", "tail", "-f", "--json", "--from", "1", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None and tail.stderr is not None
        watchdog = threading.Timer(60, tail.kill)
        watchdog.start()
        try:
            with Journal(path, **SIZES) as journal:
                fill(journal, 20 - (journal.last_op or 0))
                assert [json.loads(tail.stdout.readline())["op"] for _ in range(20)] == list(range(1, 21))
                journal.truncate_from(11)
                fill(journal, 1)
                assert json.loads(tail.stdout.readline())["op"] == 11
                assert "op 11 was truncated" in tail.stderr.readline()
            with Journal(path) as journal:  # another life
                fill(journal, 1)
                assert json.loads(tail.stdout.readline())["op"] == 12
            tail.send_signal(2)
            assert tail.wait(30) == 130
            assert tail.stderr.read() == "mmapwal: interrupted\n"
        finally:
            watchdog.cancel()
            tail.kill()
