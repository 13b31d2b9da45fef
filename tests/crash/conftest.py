"""How many states the crash tests look at."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from mmapwal.testing import CrashDisk

Check = Callable[[CrashDisk, Sequence[Any]], None]


class Images:
    """Counts the disks that were recovered, no two of them the same in all tests of the process."""

    def __init__(self, seen: set[int], tally: Callable[[str, int], None]) -> None:
        self._seen = seen
        self._tally = tally

    @contextmanager
    def of(self, *labels: object) -> Iterator[Callable[[Check], Check]]:
        """Gives what makes a check count; at the end the count is told for each label."""
        before = len(self._seen)

        def counting(check: Check) -> Check:
            def counted(disk: CrashDisk, notes: Sequence[Any]) -> None:
                image = disk._world.image
                names = tuple((folder, *sorted(found.items())) for folder, found in image.folders.items())
                self._seen.add(hash((names, tuple(image.files.values()))))
                check(disk, notes)

            return counted

        yield counting
        for label in ("in all", *labels):
            self._tally(f"distinct disk images recovered, {label}", len(self._seen) - before)


@pytest.fixture(scope="session")
def crash_states(pytestconfig: pytest.Config) -> int:
    """How many states to check for each scenario."""
    return int(pytestconfig.getoption("crash_states"))


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Each killed journal logs that it was closed without a seal: thousands of lines."""
    caplog.set_level(logging.ERROR, "mmapwal")


@pytest.fixture(scope="session")
def images_seen() -> set[int]:
    return set()


@pytest.fixture
def images(images_seen: set[int], tally: Callable[[str, int], None]) -> Images:
    """Counts the disks that the test recovers."""
    return Images(images_seen, tally)
