"""The demo's checker must fail when it should: each kind of difference, planted."""

from __future__ import annotations

import json

import pytest

from mmapwal.cli.demo_check import Acknowledgement, Recovered, State, check_history, check_state, replay
from mmapwal.cli.demo_machines import CATALOG_KIND, USAGE_KIND
from mmapwal.cli.demo_tree import Submission

SUBMITTED = [Submission(CATALOG_KIND if n % 2 else USAGE_KIND, b'{"n":%d}' % n) for n in range(10)]


def recovered(count: int) -> list[Recovered]:
    return [Recovered(n + 1, *SUBMITTED[n]) for n in range(count)]


def acknowledged(count: int) -> list[Acknowledgement]:
    return [Acknowledgement(n + 1, n) for n in range(count)]


@pytest.mark.parametrize(("acks", "found"), [(0, 0), (0, 3), (5, 5), (5, 8), (10, 10)])
def test_prefixes_of_each_other_are_fine(acks, found):
    assert check_history(acknowledged(acks), recovered(found), SUBMITTED) == []


def test_nothing_submitted_is_fine():
    assert check_history([], [], []) == []


def test_a_lost_acknowledged_entry_is_found():
    assert check_history(acknowledged(6), recovered(5), SUBMITTED) == ["op 6 was acknowledged and is lost"]


def test_all_lost_is_found():
    assert len(check_history(acknowledged(6), [], SUBMITTED)) == 6


def test_an_acknowledged_entry_lost_in_the_middle_is_found():
    found = recovered(6)
    del found[3]
    differences = check_history(acknowledged(6), found, SUBMITTED)
    assert "op 4 was acknowledged and came back as something else" in differences
    assert "op 5 was recovered where op 4 belongs" in differences
    assert "op 6 was acknowledged and is lost" in differences


def test_an_unacknowledged_entry_lost_in_the_middle_is_found():
    found = recovered(6)
    del found[3]
    assert check_history(acknowledged(2), found, SUBMITTED) != []


def test_an_invented_entry_is_found():
    found = [*recovered(5), Recovered(6, CATALOG_KIND, b'{"n":99}')]
    assert check_history(acknowledged(5), found, SUBMITTED) == ["op 6 was recovered and never submitted"]


def test_an_entry_invented_behind_everything_is_found():
    found = [*recovered(10), Recovered(11, CATALOG_KIND, b"{}")]
    assert check_history(acknowledged(10), found, SUBMITTED) == ["op 11 was recovered and never submitted"]


def test_reordered_entries_are_found():
    found = recovered(6)
    found[4], found[5] = Recovered(5, *SUBMITTED[5]), Recovered(6, *SUBMITTED[4])
    assert check_history(acknowledged(4), found, SUBMITTED) == [
        "op 5 was recovered out of order: it holds submission 6",
        "op 6 was recovered out of order: it holds submission 5",
    ]


def test_an_entry_that_came_twice_is_found():
    found = [*recovered(5), Recovered(6, *SUBMITTED[4])]
    assert check_history([], found, SUBMITTED) == ["op 6 was recovered out of order: it holds submission 5"]


@pytest.mark.parametrize("change", [{"payload": b'{"n":3} '}, {"kind": 3}])
def test_a_changed_acknowledged_entry_is_found(change):
    found = recovered(6)
    found[3] = found[3]._replace(**change)
    assert check_history(acknowledged(6), found, SUBMITTED) == [
        "op 4 was acknowledged and came back as something else",
        "op 4 was recovered and never submitted",
    ]


@pytest.mark.parametrize(
    "acks",
    [
        [Acknowledgement(2, 1)],
        [Acknowledgement(1, 0), Acknowledgement(3, 2)],
        [Acknowledgement(1, 0), Acknowledgement(1, 0)],
        [Acknowledgement(1, 1)],
    ],
)
def test_acknowledgements_that_are_no_prefix_are_found(acks):
    assert any("out of order" in d for d in check_history(acks, recovered(10), SUBMITTED))


def test_an_acknowledgement_of_what_was_never_submitted_is_found():
    assert check_history(acknowledged(11), recovered(10), SUBMITTED) == [
        "op 11 was acknowledged and never submitted"
    ]


# --- the state ------------------------------------------------------------------------------------


def catalog(path: str, size: int) -> Submission:
    facts = {"path": path, "type": "file", "mode": 0o100644, "size": size, "mtime_ns": 1}
    return Submission(CATALOG_KIND, json.dumps(facts).encode())


def usage(suffix: str, size: int) -> Submission:
    return Submission(USAGE_KIND, json.dumps({"suffix": suffix, "size": size}).encode())


def test_replay_makes_the_catalog_and_the_usage():
    state = replay([catalog("a.py", 3), usage(".py", 3), catalog("b.py", 4), usage(".py", 4), usage("", 1)])
    assert state.paths == {
        "a.py": {"type": "file", "mode": 0o100644, "size": 3, "mtime_ns": 1},
        "b.py": {"type": "file", "mode": 0o100644, "size": 4, "mtime_ns": 1},
    }
    assert state.types == {".py": [2, 7], "": [1, 1]}


def test_equal_states_do_not_differ():
    entries = [catalog("a", 1), usage("", 1)]
    assert check_state(replay(entries), replay(entries), "now") == []


@pytest.mark.parametrize(
    ("actual", "place"),
    [
        (State({}, {"": [1, 1]}), "now, path 'a'"),
        (State({"a": {"size": 2}}, {"": [1, 1]}), "now, path 'a'"),
        (State({"a": {"size": 1}, "b": {}}, {"": [1, 1]}), "now, path 'b'"),
        (State({"a": {"size": 1}}, {}), "now, file type ''"),
        (State({"a": {"size": 1}}, {"": [1, 2]}), "now, file type ''"),
        (State({"a": {"size": 1}}, {"": [1, 1], ".x": [1, 0]}), "now, file type '.x'"),
    ],
)
def test_a_state_that_differs_is_found_and_named(actual, place):
    (difference,) = check_state(actual, State({"a": {"size": 1}}, {"": [1, 1]}), "now")
    assert difference.startswith(place)
