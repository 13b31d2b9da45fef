"""The program as a whole: help, version, exit codes, no tracebacks."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmapwal import Journal
from mmapwal.cli import compact, main

COMMANDS = ["append", "dump", "stat", "verify", "compact", "demo"]


def mmapwal(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mmapwal", *arguments], capture_output=True, check=False, timeout=60, **options
    )


def test_version_is_that_of_the_package():
    result = mmapwal("--version")
    assert result.returncode == 0
    assert result.stdout.decode() == f"mmapwal {importlib.metadata.version('mmapwal')}\n"


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command, capsys):
    assert main([command, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["fly"], ["dump"], ["stat", "x", "y"], ["verify", "--loud", "x"]])
def test_wrong_usage_exits_2(arguments, capsys):
    assert main(arguments) == 2
    assert "usage:" in capsys.readouterr().err


def test_the_entry_point_of_the_package_is_this_main():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="mmapwal")
    assert script.load() is main


def test_an_interrupt_exits_130_without_a_traceback(monkeypatch, tmp_path, capsys):
    def interrupted(path, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(compact, "open_journal", interrupted)
    assert main(["compact", str(tmp_path)]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_it_quietly(tmp_path):
    with Journal(tmp_path / "j", segment_bytes=1 << 20) as journal:
        journal.append_many([b"x" * 50] * 5000)
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "mmapwal", "dump", str(tmp_path / "j")],
            stdout=write_end, stderr=subprocess.PIPE, check=False, timeout=60,
        )  # fmt: skip
    finally:
        os.close(write_end)
    assert result.returncode == 141
    assert result.stderr == b""


def test_a_full_standard_output_is_an_error_and_no_traceback(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.append(b"x")
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "mmapwal", "dump", str(tmp_path / "j")],
            stdout=full, stderr=subprocess.PIPE, check=False, timeout=60,
        )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == b"mmapwal: No space left on device\n"


def test_a_payload_that_the_terminal_cannot_show_is_escaped(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.append("grüße".encode())
    result = mmapwal("dump", str(tmp_path / "j"), env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0
    assert rb"gr\xfc\xdfe" in result.stdout


def test_a_journal_that_another_process_writes_exits_2(tmp_path):
    with Journal(tmp_path / "j"):
        result = mmapwal("dump", str(tmp_path / "j"))
    assert result.returncode == 2
    assert result.stdout == b""
    assert b"another process has it open" in result.stderr
    assert b"Traceback" not in result.stderr
