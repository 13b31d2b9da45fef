"""What the journal tests share beside the homes of tests/conftest.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmapwal import Journal
from mmapwal.storage import Directory

from .elsewhere import Writer
from .files import SMALL


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Poisoned and failing journals log what the tests see as errors anyhow."""
    caplog.set_level(logging.ERROR, "mmapwal")


@pytest.fixture
def open_on() -> Iterator[Callable[..., Journal]]:
    """`open_on(directory, **options)`: a small journal there, let go at the end whatever became of it."""
    given: list[Journal] = []

    def open_(directory: Directory, **options: Any) -> Journal:
        given.append(Journal("journal", storage=directory, **(SMALL | options)))
        return given[-1]

    yield open_
    for journal in given:
        journal.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Writer]]:
    """`start()`: a writer of the journal at tmp_path / "j", in a process of its own."""
    writers: list[Writer] = []

    def start_one(durability: str = "sync") -> Writer:
        writers.append(Writer(tmp_path / "j", durability))
        return writers[-1]

    yield start_one
    for writer in writers:
        if writer.is_alive:
            writer.kill()
