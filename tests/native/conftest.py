"""The C helper, seen through cffi, without the journal above it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SHIM = Path(__file__).with_name("shim.c")
PRELUDE = Path(__file__).with_name("shim_prelude.py")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory, require: Callable[[object, str], None]) -> Path:
    """The library that makes system calls fail, built for this machine."""
    require(shutil.which("gcc"), "no gcc to build the LD_PRELOAD shim with")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    command = ["gcc", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", library, SHIM, "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.fixture
def run_shimmed(run_python: Run, shim: Path, tmp_path: Path) -> Callable[[str], None]:
    """Runs a script under the shim; what it checks it checks itself, with the names of the prelude."""

    def run(script: str) -> None:
        done = run_python(PRELUDE.read_text() + script, tmp_path / "file", preload=shim)
        assert done.returncode == 0, done.stderr

    return run
