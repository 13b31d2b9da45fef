"""Every effect that a journal asks for is needed, and in this place: left out, or swapped with the next one,
the explorer finds a crash that is not recovered right. What is not needed is listed with its reason."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from mmapwal import JournalError

from .effects import Mutant, Verdict
from .lives import records, steps
from .redundant import REDUNDANT, reason

PARTS = 12
HARDER = 4


class Effort:
    """How much is tried: `instances` of a step that has to be caught, until one is; `redundant` of one that
    is listed, and so many crash `states` at each place of a life."""

    def __init__(self, crash_states: int) -> None:
        self.instances = max(1, crash_states // 25)
        self.redundant = max(1, crash_states // 200)
        self.states = min(8, max(2, crash_states // 25))


@pytest.fixture
def effort(crash_states: int) -> Effort:
    return Effort(crash_states)


def until_caught(mutants: list[Mutant], states: int) -> list[Verdict]:
    """What they came to; the last one is caught, or none is."""
    verdicts = []
    for mutant in mutants:
        verdicts.append(mutant.explore(states))
        if verdicts[-1].error is not None:
            break
    return verdicts


@pytest.mark.parametrize("part", range(PARTS))
def test_each_effect_is_needed_where_it_is_or_is_listed_as_redundant(
    part: int, effort: Effort, tally: Callable[[str, int], None]
) -> None:
    for name, mutants in steps()[part::PARTS]:
        why = reason(name)
        verdicts = until_caught(
            mutants[: effort.instances if why is None else effort.redundant], effort.states
        )
        if why is None and verdicts[-1].error is None:  # a few states may miss it
            verdicts += until_caught(mutants[: HARDER * effort.instances], HARDER * effort.states)
        error = verdicts[-1].error
        tally("effects left out or swapped, tried", len(verdicts))
        if why is not None:
            assert error is None, f"{name} is listed as redundant ({why}), and is not: {error}"
            tally("steps of the protocol that are redundant", 1)
        elif error is not None:
            assert isinstance(error, AssertionError | JournalError), f"{name}: {error!r}"
            tally("steps of the protocol of which the explorer caught a change", 1)
        else:
            assert not any(v.differs for v in verdicts), f"{name}: nothing catches it"
            tally("steps of the protocol that cannot be changed, or to no effect", 1)


def test_each_life_is_safe_as_it_is(effort: Effort) -> None:
    for record in records():
        assert record.explore(max(1, effort.states // 4)) is None


def test_every_reason_stands_for_a_step_and_every_step_has_one_reason_at_most() -> None:
    names = [name for name, _ in steps()]
    assert len(names) > 150
    for pattern in REDUNDANT:
        assert any(re.fullmatch(pattern, name) for name in names), pattern
    for name in names:
        assert sum(re.fullmatch(pattern, name) is not None for pattern in REDUNDANT) <= 1, name
