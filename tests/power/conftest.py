"""Where the disks are whose power is cut, and how often it is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..filesystems.conftest import Maker, Require, made_and_removed
from .cuts import unmount

DISKS_MIB = 4096


@pytest.fixture
def power_cycles(pytestconfig: pytest.Config) -> int:
    """How many cuts for each combination."""
    return int(pytestconfig.getoption("power_cycles"))


@pytest.fixture
def disks(tmp_path: Path, require: Require) -> Iterator[Path]:
    """Where the disks are: in memory, so that only the file systems on them take time."""
    require(os.geteuid() == 0, "mounting needs root")
    path = tmp_path / "disks"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISKS_MIB}m", "tmpfs", path], check=True)
    yield path
    unmount(path)


@pytest.fixture
def make(disks: Path, require: Require) -> Iterator[Maker]:
    """Makes file systems in image files."""
    (disks / "made").mkdir()
    with made_and_removed(disks / "made", require) as maker:
        yield maker
