"""The ring of slots: what it holds, what it evicts, what it refuses, and how much room it says is left."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmapwal import (
    DuplicateOpError,
    Journal,
    JournalFullError,
    MemoryDirectory,
    StaleOpError,
)

from .files import SMALL, Home, contents_of, killed, refused_call

SLOTS = SMALL["slots"]


@pytest.fixture
def full(home: Home) -> Journal:
    """As many entries as there are slots."""
    journal = home.open(**SMALL)
    for n in range(SLOTS):
        journal.append(b"%d" % n)
    return journal


def test_a_full_ring_refuses_what_is_not_snapshotted_before_a_byte_is_written(full: Journal) -> None:
    for refused in (
        lambda: full.append(b"one more"),
        lambda: full.append(b"one more", replace=True),
        lambda: full.append(b"one more", op=SLOTS + 1),
        lambda: full.append(b"far away", op=SLOTS * 1000 + 5),
        lambda: full.append_many([b"one more"]),
        lambda: full.append_many([b"a", b"b", b"c"], first_op=SLOTS * 7),
    ):
        error = refused_call(JournalFullError, full, refused)
        assert "slot" in str(error)
    assert len(full) == SLOTS
    assert full.remaining_capacity == 0


def test_wrap_around_evicts_what_is_snapshotted(full: Journal) -> None:
    full.set_snapshot_op(3)
    assert full.remaining_capacity == 3
    assert [full.append(b"round %d" % n) for n in range(3)] == [SLOTS + 1, SLOTS + 2, SLOTS + 3]
    refused_call(JournalFullError, full, lambda: full.append(b"one more"))
    wanted = {n: (b"%d" % (n - 1), 0) for n in range(4, SLOTS + 1)}
    wanted |= {SLOTS + 1 + n: (b"round %d" % n, 0) for n in range(3)}
    assert contents_of(full) == wanted


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_what_wrapped_around_is_there_after_reopening_and_what_was_evicted_is_not(
    home: Home, how: str
) -> None:
    journal = home.open(**SMALL)
    for _ in range(5):
        while journal.remaining_capacity:
            journal.append(b"%d" % ((journal.last_op or 0) + 1))
        assert journal.last_op is not None
        journal.set_snapshot_op(journal.last_op - 5)
    last = journal.last_op
    wanted = {op: (b"%d" % op, 0) for op in range(last - 4, last + 1)}
    if how == "killed":
        journal = killed(home, journal).open()
    else:
        journal.close()
        journal = home.open()
    assert contents_of(journal) == wanted
    assert journal.remaining_capacity == SLOTS - 5
    assert journal.append(b"") == last + 1


def test_a_batch_of_which_one_slot_is_taken_is_refused_as_a_whole(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"in the way", op=5)
    refused_call(JournalFullError, journal, lambda: journal.append_many([b""] * 4, first_op=SLOTS + 2))
    refused_call(DuplicateOpError, journal, lambda: journal.append_many([b""] * 4, first_op=2))
    journal.append_many([b""] * 3, first_op=SLOTS + 6)
    assert len(journal) == 4


def test_a_batch_of_more_entries_than_slots_is_refused(home: Home) -> None:
    journal = home.open(**SMALL)
    refused_call(JournalFullError, journal, lambda: journal.append_many([b""] * (SLOTS + 1)))
    assert journal.append_many([b""] * SLOTS) == range(1, SLOTS + 1)


def test_a_batch_that_goes_beyond_the_capacity_is_refused_as_a_whole(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append_many([b""] * (SLOTS - 3))
    refused_call(JournalFullError, journal, lambda: journal.append_many([b""] * 4))
    journal.append_many([b""] * 3)


def test_an_op_at_or_below_the_watermark_is_stale_also_with_replace(full: Journal) -> None:
    full.set_snapshot_op(4)
    for op in (1, 4):
        for replace in (False, True):
            refused_call(StaleOpError, full, lambda op=op, r=replace: full.append(b"", op=op, replace=r))
    refused_call(StaleOpError, full, lambda: full.append_many([b"", b""], first_op=4))


def test_a_gap_takes_a_slot_from_the_automatic_ops_and_not_from_the_others(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"", op=10)
    assert journal.remaining_capacity == SLOTS - 1  # 11 .. 25: 26 has the slot of 10
    for _ in range(SLOTS - 1):
        journal.append(b"")
    refused_call(JournalFullError, journal, lambda: journal.append(b""))
    refused_call(JournalFullError, journal, lambda: journal.append(b"", op=9))  # 25 has its slot


def test_one_slot_is_a_journal_of_one_entry(home: Home) -> None:
    journal = home.open(slots=1, segment_bytes=16384)
    for op in range(1, 6):
        assert journal.append(b"%d" % op) == op
        refused_call(JournalFullError, journal, lambda: journal.append(b""))
        assert contents_of(journal) == {op: (b"%d" % op, 0)}
        journal.set_snapshot_op(op)
        assert journal.remaining_capacity == 1


STEPS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 4)),
    st.tuples(st.just("append at"), st.integers(1, 60)),
    st.tuples(st.just("replace"), st.integers(1, 60)),
    st.tuples(st.just("watermark"), st.integers(0, 12)),
    st.tuples(st.just("truncate"), st.integers(1, 60)),
    st.tuples(st.just("drain"), st.integers(1, 60)),
    st.tuples(st.just("reopen"), st.just(0)),
)


def take(journal: Journal, step: str, n: int) -> None:
    refusals = (JournalFullError, DuplicateOpError, StaleOpError, ValueError)
    calls: dict[str, Any] = {
        "append": lambda: [journal.append(b"") for _ in range(n)],
        "append at": lambda: journal.append(b"", op=n),
        "replace": lambda: journal.append(b"r", op=n, replace=True),
        "watermark": lambda: journal.set_snapshot_op(journal.snapshot_op + n),
        "truncate": lambda: journal.truncate_from(n),
        "drain": lambda: journal.drain(n, n + 3),
    }
    with contextlib.suppress(refusals):
        calls[step]()


@given(st.lists(STEPS, max_size=12), st.sampled_from(["sync", "os", "buffered"]))
@settings(max_examples=150)
def test_remaining_capacity_tells_exactly_how_many_automatic_appends_succeed(
    steps: list[tuple[str, int]], durability: str
) -> None:
    directory = MemoryDirectory()
    journal = Journal("j", storage=directory, slots=8, segment_bytes=16384, durability=durability)
    try:
        for step, n in steps:
            if step == "reopen":
                journal.close()
                journal = Journal("j", storage=directory, durability=durability)
            else:
                take(journal, step, n)
        room = journal.remaining_capacity
        for left in range(room, 0, -1):
            assert journal.remaining_capacity == left
            journal.append(b"")
        assert journal.remaining_capacity == 0
        with pytest.raises(JournalFullError):
            journal.append(b"")
    finally:
        journal.close()
