"""Every bug planted by hand is caught, by the test and in the way that the catalogue says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .catalogue import MUTANTS
from .mutant import Mutant
from .planting import Workshop, caught, patched, run_tests


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, require: Callable[[object, str], None]) -> Workshop:
    """One for all workers."""
    require(shutil.which("gcc"), "no gcc to build mutants of the C helper with")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    return Workshop(shared / "mutants")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_planted_bug_is_caught(mutant: Mutant, workshop: Workshop, tally: Callable[..., None]) -> None:
    planted = workshop.plant(mutant.name.replace(" ", "-"), mutant.patches)
    assert caught(run_tests(planted, [mutant.test], mutant.crash_states), mutant) == ""
    tally(f"mutants caught by {mutant.method.value}")


def test_without_a_bug_the_same_tests_pass_on_what_is_built_in_the_same_way(workshop: Workshop) -> None:
    planted = workshop.plant("nothing", ())
    outcome = run_tests(planted, sorted({m.test for m in MUTANTS}), 200)
    assert (outcome.failure, outcome.signal) == (None, 0)
    assert outcome.tests >= 30


def test_names_are_given_once_and_every_bug_changes_the_code() -> None:
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 25
    for mutant in MUTANTS:
        assert all(Path(file).suffix in {".py", ".c"} for file in patched(mutant.patches))
        assert all(patch.old != patch.new for patch in mutant.patches)
