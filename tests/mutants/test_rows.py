"""Each fault class of docs/GUARANTEES.md names bugs that its tests catch."""

from __future__ import annotations

import re

import pytest

from .catalogue import MUTANTS
from .planting import ROOT

BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


def rows() -> dict[int, tuple[set[str], list[str]]]:
    """By number: the tests, and the planted bugs."""
    found = {}
    for line in (ROOT / "docs" / "GUARANTEES.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 5 and re.fullmatch(r"[\d, ]+", cells[0]):
            tests, bugs = (re.findall("`([^`]+)`", cell) for cell in cells[3:])
            found.update({int(number): (set(tests), bugs) for number in cells[0].split(",")})
    return found


def test_all_35_rows_are_there() -> None:
    assert sorted(rows()) == list(range(1, 36))


@pytest.mark.parametrize("number", range(1, 36))
def test_every_row_names_bugs_that_its_own_tests_catch(number: int) -> None:
    tests, bugs = rows()[number]
    assert bugs
    for bug in bugs:
        caught_by = re.sub(r"\[.*", "", BY_NAME[bug].test.rsplit("::", 1)[1])
        assert caught_by in tests, bug
