"""Signal handlers that raise, at random, into threads that append and into whatever the main thread does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[[str], dict[str, int]]


@pytest.fixture
def run(tmp_path: Path, soak_seconds: float, tally: Callable[[str, int], None]) -> Run:
    def run_script(name: str) -> dict[str, int]:
        script = Path(__file__).with_name(f"interrupted_{name}.py")
        command = [sys.executable, "-W", "error", str(script), str(tmp_path / "j"), str(soak_seconds), "1"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=soak_seconds + 120, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        result: dict[str, int] = json.loads(done.stdout)
        for what, count in result.items():
            tally(f"signals into {name}: {what}", count)
        return result

    return run_script


def test_handlers_that_raise_into_appends_leave_no_hang_and_each_outcome_is_known_or_unknown(
    run: Run,
) -> None:
    """Batches are whole, nothing that was told is lost, nothing that was not submitted is there."""
    result = run("appends")
    assert result["interrupted"] > 20
    assert result["acknowledged"] > 100


def test_handlers_that_raise_into_changes_of_structure_lose_nothing_and_invent_nothing(run: Run) -> None:
    result = run("changes")
    assert result["interrupted"] > 20
    assert result["changes"] > 50


def test_handlers_that_raise_into_who_follows_lose_no_entry_and_give_none_twice(run: Run) -> None:
    result = run("follows")
    assert result["interrupted"] > 400
    assert result["entries"] > 1000
