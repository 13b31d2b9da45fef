"""Files that someone cuts under the mappings: an error from all that is guarded, in every thread, no kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmapwal import Journal

# When faulthandler is enabled: before the journal arms its guard, or after.
FAULTS = ["never", "before", "after"]


def run(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("cut_under_readers.py")
    command = [sys.executable, str(script), str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def cut_and_check(path: Path, what: str, faults: str, ways: list[str]) -> None:
    """Each of these ways ends in an error behind the cut, and nobody gets the signal."""
    done = run(path, what, faults)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    for way in ways:
        assert any(e.startswith("behind") for e in ended[way]), (way, ended[way])
    assert "Bus error" not in done.stderr


@pytest.mark.parametrize("faults", FAULTS)
def test_segments_cut_under_many_threads_are_errors_of_all_that_reads_them_and_kill_nobody(
    tmp_path: Path, faults: str
) -> None:
    ways = ["copy", "header", "headers", "entries", "payloads", "columns", "follow"]
    cut_and_check(tmp_path / "j", "segment", faults, [*ways, "readonly copy", "readonly follow"])


@pytest.mark.parametrize("faults", FAULTS)
def test_an_index_cut_under_many_threads_is_an_error_of_all_that_needs_it_and_kills_nobody(
    tmp_path: Path, faults: str
) -> None:
    ways = ["append", "copy", "entries", "payloads", "stats"]
    cut_and_check(tmp_path / "j", "index", faults, ways)


def test_an_iteration_that_fails_in_the_index_names_it(tmp_path: Path) -> None:
    index = tmp_path / "j" / "index"
    with Journal(tmp_path / "j", slots=512) as journal:
        journal.append_many([b"%d" % n for n in range(400)])
        length = index.stat().st_size
        os.truncate(index, 4096 + 4096)  # its first page, and 128 slots
        given = []
        with pytest.raises(OSError, match="reading") as raised:
            given.extend(journal.payloads(100))
        assert raised.value.filename == "index"
        assert [int(p) + 1 for p in given] == list(range(100, 128))
        os.truncate(index, length)


@pytest.mark.parametrize("faults", FAULTS)
def test_a_view_of_what_was_cut_gets_the_signal_and_faulthandler_says_where(
    tmp_path: Path, faults: str
) -> None:
    """What a user does with a view is outside of the guard: whoever had the handler before has his turn."""
    done = run(tmp_path / "j", "segment", faults, "view")
    assert done.returncode == -signal.SIGBUS
    assert ("Bus error" in done.stderr) == (faults != "never")
