"""What the journal tests share beside the homes of tests/conftest.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mmapwal import Journal
from mmapwal.storage import Directory

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
