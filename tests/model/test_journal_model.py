"""A journal against a model: any calls in any order, failures, kills, power cuts, views held over them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from .grounds import CrashGround, Ground, MappedGround, MemoryGround
from .machine import JournalMachine

STEPS = 30
GROUNDS: dict[str, tuple[Callable[[bool], Ground], int]] = {
    "memory": (lambda damage: MemoryGround(), 2),
    "mapped": (lambda damage: MappedGround(), 8),
    "crash disk": (lambda damage: CrashGround(damage=damage), 1),
}
"""How to make one, and a lower share of the lives for those that take longer."""


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "mmapwal")


@pytest.mark.parametrize("ground", GROUNDS)
def test_a_journal_shows_what_the_model_of_it_shows_whatever_is_done_to_both(
    ground: str, pytestconfig: pytest.Config, tally: Callable[[str, int], None]
) -> None:
    make, share = GROUNDS[ground]
    lives = max(1, int(pytestconfig.getoption("fuzz_inputs")) // share)
    steps = [0]

    class Machine(JournalMachine):
        ground_of = staticmethod(make)

        def teardown(self) -> None:
            steps[0] += len(self.notes)
            super().teardown()

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=lives, stateful_step_count=STEPS, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    tally(f"lives of a model, {ground}", lives)
