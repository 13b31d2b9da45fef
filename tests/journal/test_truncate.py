"""truncate_from: takes a suffix out, leaves the watermark alone, and what is gone stays gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mmapwal import Durability, Journal
from mmapwal import format as fmt

from .files import (
    SMALL,
    Contents,
    Home,
    after_kill,
    contents_of,
    entry_frames,
    every_end,
    flip,
    killed,
    superblock_of,
)
from .watched import Watched


def filled(home: Home, count: int = 10, **options: Any) -> Journal:
    journal = home.open(**(SMALL | options))
    for n in range(1, count + 1):
        journal.append(b"old %d" % n * 10, kind=n)
    return journal


def old(*ops: int) -> Contents:
    return {n: (b"old %d" % n * 10, n) for n in ops}


def reopened(home: Home, journal: Journal, how: str) -> Journal:
    if how == "killed":
        return killed(home, journal).open()
    if how == "closed":
        journal.close()
        return home.open()
    return journal


parametrize_after = pytest.mark.parametrize("how", ["at once", "closed", "killed"])


@parametrize_after
def test_a_suffix_is_removed_and_counted(home: Home, how: str) -> None:
    journal = filled(home)
    assert journal.truncate_from(8) == 3
    assert (journal.last_op, journal.snapshot_op, len(journal)) == (7, 0, 7)
    journal = reopened(home, journal, how)
    assert contents_of(journal) == old(*range(1, 8))
    assert journal.append(b"new 8") == 8


@parametrize_after
def test_truncate_from_leaves_the_watermark_and_makes_room_that_can_be_filled_again(
    home: Home, how: str
) -> None:
    journal = filled(home, SMALL["slots"])
    journal.set_snapshot_op(4)
    assert journal.remaining_capacity == 4
    assert journal.truncate_from(7) == SMALL["slots"] - 6
    assert journal.snapshot_op == 4
    assert journal.remaining_capacity == SMALL["slots"] - 2
    journal = reopened(home, journal, how)
    assert journal.snapshot_op == 4
    assert journal.remaining_capacity == SMALL["slots"] - 2
    wanted = old(5, 6)
    while journal.remaining_capacity:
        op = journal.append(b"new")
        wanted[op] = (b"new", 0)
    assert contents_of(journal) == wanted
    assert sorted(wanted) == list(range(5, 5 + SMALL["slots"]))


@parametrize_after
@pytest.mark.parametrize("durability", list(Durability))
def test_what_was_truncated_never_comes_back(home: Home, durability: Durability, how: str) -> None:
    """Not after it was filled again, nor after that was truncated, reopened or lost its tail."""
    journal = filled(home, durability=durability)
    journal.truncate_from(5)
    for n in range(5, 8):
        journal.append(b"new %d" % n)
    journal.truncate_from(7)
    journal.sync()
    wanted = old(1, 2, 3, 4) | {5: (b"new 5", 0), 6: (b"new 6", 0)}
    journal = reopened(home, journal, how)
    assert contents_of(journal) == wanted
    journal.compact()
    assert contents_of(journal) == wanted
    assert journal.append(b"seven") == 7
    wanted[7] = (b"seven", 0)
    assert contents_of(journal) == wanted
    journal.truncate_from(5)
    assert contents_of(journal) == old(1, 2, 3, 4)


def test_a_torn_tail_after_a_truncation_does_not_bring_back_what_was_truncated(home: Home) -> None:
    journal = filled(home)
    journal.truncate_from(5)
    journal.append(b"new 5")
    left = killed(home, journal)
    left.directory().unlink(fmt.INDEX_NAME)
    frame = entry_frames(left.directory())[5]
    flip(left.directory(), frame.name, frame.at)
    assert contents_of(left.open()) == old(1, 2, 3, 4)


@parametrize_after
def test_an_op_that_was_replaced_and_truncated_has_no_older_frame_to_fall_back_to(
    home: Home, how: str
) -> None:
    journal = filled(home)
    for _ in range(3):
        journal.append(b"replaced", op=6, replace=True)
    assert journal.truncate_from(6) == 5
    journal = reopened(home, journal, how)
    assert contents_of(journal) == old(1, 2, 3, 4, 5)


def test_a_truncation_above_the_last_op_changes_nothing(home: Home) -> None:
    journal = filled(home)
    before = superblock_of(home.directory())
    for op in (11, 12, 2**63 - 1):
        assert journal.truncate_from(op) == 0
    assert superblock_of(home.directory()) == before
    assert contents_of(journal) == old(*range(1, 11))
    assert journal.append(b"x") == 11


def test_an_empty_journal_can_be_truncated(home: Home) -> None:
    journal = home.open(**SMALL)
    assert journal.truncate_from(1) == 0
    assert journal.append(b"x") == 1


@parametrize_after
def test_everything_can_be_truncated(home: Home, how: str) -> None:
    journal = filled(home)
    assert journal.truncate_from(1) == 10
    journal = reopened(home, journal, how)
    assert (len(journal), journal.first_op, journal.last_op, journal.snapshot_op) == (0, None, None, 0)
    assert journal.append(b"x") == 1


@parametrize_after
def test_gaps_and_late_entries_are_truncated_by_op_and_not_by_time(home: Home, how: str) -> None:
    journal = home.open(**SMALL)
    for op in (9, 2, 12, 5, 3):
        journal.append(b"%d" % op, op=op)
    assert journal.truncate_from(6) == 2
    journal = reopened(home, journal, how)
    assert contents_of(journal) == {op: (b"%d" % op, 0) for op in (2, 3, 5)}
    assert journal.append(b"") == 6


def test_truncating_and_filling_many_times_stays_bounded(home: Home) -> None:
    journal = home.open(slots=32, segment_bytes=16384)
    journal.append_many([b"base"] * 3)
    for n in range(50):
        assert journal.append_many([b"try %d" % n] * 4) == range(4, 8)
        assert journal.truncate_from(5 if n % 3 else 4) in {3, 4}
        if n % 3:
            assert journal.truncate_from(4) == 1
        assert journal.stats().removals <= fmt.REMOVALS_MAX
    journal.append(b"kept")
    for found in every_end(home, journal):
        assert contents_of(found) == dict.fromkeys((1, 2, 3), (b"base", 0)) | {4: (b"kept", 0)}
        assert found.verify().ok


def test_truncations_from_ever_higher_ops_take_a_row_each_and_are_compacted(home: Home) -> None:
    """No row is within another: the last one of each is filled again and lives."""
    journal = home.open(slots=512, segment_bytes=16384)
    for n in range(1, 91):
        journal.append(b"kept %d" % n)
        journal.append(b"lost %d" % n)
        assert journal.truncate_from(n + 1) == 1
        assert journal.stats().removals <= fmt.REMOVALS_MAX
    for found in every_end(home, journal):
        assert contents_of(found) == {n: (b"kept %d" % n, 0) for n in range(1, 91)}


def test_a_truncation_is_durable_when_it_returns(home: Home) -> None:
    journal = filled(home, durability=Durability.BUFFERED)
    journal.truncate_from(6)
    assert contents_of(killed(home, journal).open()) == old(*range(1, 6))


def test_a_truncation_that_dies_at_any_step_has_happened_wholly_or_not_at_all(
    open_on: Callable[..., Journal],
) -> None:
    directory = Watched()
    journal = open_on(directory, durability=Durability.OS)
    for n in range(1, 11):
        journal.append(b"old %d" % n * 10, kind=n)
    moments: list[Any] = []
    directory.on = lambda call: moments.append(after_kill(directory.inner))
    journal.truncate_from(4)
    moments.append(after_kill(directory.inner))
    directory.on = lambda call: None
    found = []
    for disk in moments:
        with Journal("j", storage=disk) as left:
            found.append(contents_of(left))
    assert found[0] == old(*range(1, 11))
    assert found[-1] == old(1, 2, 3)
    assert all(f in (found[0], found[-1]) for f in found)


def test_views_of_what_was_truncated_and_overwritten_stay_right(home: Home) -> None:
    journal = filled(home)
    views = {e.op: e.payload for e in journal}
    journal.truncate_from(3)
    for n in range(3, 11):
        journal.append(b"new %d" % n * 10)
    journal.compact()
    assert {op: bytes(v) for op, v in views.items()} == {op: p for op, (p, _) in old(*range(1, 11)).items()}
