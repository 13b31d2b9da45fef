"""A small disk for one of many; a clock that goes on by hand; datastores of events."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmapwal.integrations.event_datastore import EventDatastore

from .datastores import SMALL


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


class Clock:
    """A Raft log's, which goes on by hand."""

    def __init__(self) -> None:
        self.now_s = time.monotonic()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("mmapwal.integrations.raft_log.time.monotonic", lambda: clock.now_s)
    return clock


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., EventDatastore]]:
    opened: list[EventDatastore] = []

    def open_(**options: Any) -> EventDatastore:
        opened.append(EventDatastore(tmp_path / "events", **SMALL | options))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()
