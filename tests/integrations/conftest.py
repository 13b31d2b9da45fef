"""A small disk for one of many."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def mount_tmpfs(require: Callable[[object, str], None]) -> Iterator[Callable[[Path, str], None]]:
    """`mount_tmpfs(path, size)`: a file system of that size, until the test ends."""
    mounted: list[Path] = []

    def mount(path: Path, size: str) -> None:
        require(os.geteuid() == 0, "mounting needs root")
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
        subprocess.run(command, check=True)
        mounted.append(path)

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)
