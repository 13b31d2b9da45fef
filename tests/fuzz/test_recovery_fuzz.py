"""Whatever the files of a journal hold, opening it ends in what is documented: never in a crash of the
process, a hang, an allocation without a bound, or an entry that nobody wrote."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .mutate import TARGETS, Mutation
from .recovering import examine

Tally = Callable[[str, int], None]
INPUT_BYTES_MAX = 96
MAPPED_SHARE = 5  # real files take longer: so many times fewer


@pytest.fixture
def inputs(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("fuzz_inputs"))


def fuzz(check: Callable[[bytes], object], count: int) -> None:
    """`count` inputs, shortened when one of them fails."""

    @settings(max_examples=count, suppress_health_check=list(HealthCheck))
    @given(st.binary(min_size=6, max_size=INPUT_BYTES_MAX))
    def run(data: bytes) -> None:
        check(data)

    run()


@pytest.mark.parametrize("repaired", [False, True], ids=["as it is", "checksums right"])
@pytest.mark.parametrize("target", TARGETS)
def test_whatever_the_files_hold_opening_ends_as_documented(
    target: str, repaired: bool, inputs: int, tally: Tally
) -> None:
    outcomes: Counter[str] = Counter()
    past = [0]

    def check(data: bytes) -> None:
        mutation = Mutation(data, target, repaired=repaired)
        past[0] += mutation.is_past_checksums
        try:
            outcomes[examine(mutation)] += 1
        except Exception as e:
            e.add_note(f"{data.hex()}: {mutation}")
            raise

    fuzz(check, inputs)
    tally(f"inputs fuzzed: {target}", outcomes.total())
    if repaired:
        tally(f"inputs past all checksums: {target}", past[0])


@pytest.mark.parametrize("repaired", [False, True], ids=["as it is", "checksums right"])
@pytest.mark.parametrize("target", TARGETS)
def test_whatever_mapped_files_hold_opening_ends_as_documented(
    target: str, repaired: bool, inputs: int, tmp_path: Path, tally: Tally
) -> None:
    outcomes: Counter[str] = Counter()
    past = [0]

    def check(data: bytes) -> None:
        mutation = Mutation(data, target, repaired=repaired)
        past[0] += mutation.is_past_checksums
        path = tmp_path / "j"
        path.mkdir()
        try:
            outcomes[examine(mutation, path)] += 1
        except Exception as e:
            e.add_note(f"{data.hex()}: {mutation}")
            raise
        finally:
            shutil.rmtree(path)

    fuzz(check, max(1, inputs // MAPPED_SHARE))
    tally(f"inputs fuzzed: {target}, mapped", outcomes.total())
    if repaired:
        tally(f"inputs past all checksums: {target}, mapped", past[0])
