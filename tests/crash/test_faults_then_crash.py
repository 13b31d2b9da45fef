"""A call fails, and the power goes before anything else is done: all that was acknowledged is there."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import islice

import pytest

from mmapwal.testing import When, every_fault

from .story import Note
from .test_faults import STEPS, FaultyLife, check_with


class Interrupted(FaultyLife):
    """Keeps what had been done and told when the first error had been told."""

    first_error: tuple[int, list[Note]] | None = None

    def check_error(self, error: Exception) -> None:
        super().check_error(error)
        if self.first_error is None:
            self.first_error = self.disk.observe(), list(self.notes)


@pytest.fixture
def lives() -> Iterator[list[Interrupted]]:
    made: list[Interrupted] = []
    yield made
    for life in made:
        life.end()


@pytest.mark.parametrize("when", [When.BEFORE, When.AFTER])
def test_the_power_goes_right_behind_the_call_that_failed(
    when: When, lives: list[Interrupted], crash_states: int
) -> None:
    for fault in every_fault(error=errno.EIO, when=when):
        life = Interrupted(fault)
        lives.append(life)
        life.run(STEPS)
        if life.first_error is not None:
            effects, notes = life.first_error
            states = life.disk.crash_states(effects, seed=fault.nth)
            for state in islice(states, max(2, crash_states // 100)):
                check_with(fault, state, notes)
        life.end()
