"""The fuzzers under atheris, where it is installed: each target runs, in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .mutate import TARGETS

ROOT = Path(__file__).parents[2]
SHARE = 4  # instrumented code takes longer: so many times fewer
SECONDS_MAX = 0.5  # for one input, many times over


@pytest.mark.optional  # atheris has no wheel for every Python
@pytest.mark.parametrize("target", [*TARGETS, *(f"{t}-repaired" for t in TARGETS), "native"])
def test_inputs_that_lead_to_new_branches_find_nothing(
    target: str, tmp_path: Path, pytestconfig: pytest.Config, tally: Callable[[str, int], None]
) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed")
    runs = max(10, int(pytestconfig.getoption("fuzz_inputs")) // SHARE)
    command = [sys.executable, "-m", "tests.fuzz.atheris_targets", target, f"-runs={runs}", "-max_len=96"]
    command += ["-seed=1", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120 + runs * SECONDS_MAX, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Done {runs} " in done.stderr, done.stderr[-1000:]
    tally(f"inputs fuzzed under atheris: {target}", runs)
