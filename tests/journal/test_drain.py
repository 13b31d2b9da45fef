"""drain: takes entries out, durably, all or none, and gives them back as lazy views."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from mmapwal import Durability, Entry, Journal, MissingOpError, PoisonedError, StaleOpError
from mmapwal import format as fmt
from mmapwal.testing import Fault, FaultDirectory

from .files import SMALL, Home, after_kill, bytes_of, contents_of, every_end, killed, settle, superblock_of
from .watched import Watched


def filled(home: Home, count: int = 10, **options: Any) -> Journal:
    journal = home.open(**(SMALL | options), clock=lambda: 5)
    for n in range(1, count + 1):
        journal.append(b"%d" % n * 40, kind=n)
    return journal


def entries(*ops: int) -> dict[int, tuple[bytes, int]]:
    return {n: (b"%d" % n * 40, n) for n in ops}


def reopened(home: Home, journal: Journal, how: str) -> Journal:
    if how == "killed":
        return killed(home, journal).open()
    if how == "closed":
        journal.close()
        return home.open()
    return journal


parametrize_after = pytest.mark.parametrize("how", ["at once", "closed", "killed"])


@parametrize_after
def test_drained_entries_are_given_back_and_are_gone(home: Home, how: str) -> None:
    journal = filled(home)
    drained = journal.drain(1, 4)
    assert list(drained) == [Entry(n, memoryview(b"%d" % n * 40), n, 5) for n in range(1, 5)]
    journal = reopened(home, journal, how)
    assert contents_of(journal) == entries(*range(5, 11))
    for op in range(1, 5):
        assert op not in journal
        assert journal.get(op) is journal.header(op) is None
        with pytest.raises(MissingOpError):
            journal.read(op)
    assert [bytes(e.payload) for e in drained] == [b"%d" % n * 40 for n in range(1, 5)]


def test_drained_entries_are_a_sequence_made_lazily(home: Home) -> None:
    journal = filled(home)
    drained = journal.drain(3, 7)
    assert len(drained) == 5
    assert [e.op for e in drained] == [3, 4, 5, 6, 7]
    assert drained[0].op == 3
    assert drained[-1] == drained[4]
    assert [e.op for e in drained[1:3]] == [4, 5]
    assert [e.op for e in drained[::-2]] == [7, 5, 3]
    assert [e.op for e in reversed(drained)] == [7, 6, 5, 4, 3]
    assert drained[2] in drained
    assert drained.index(drained[3]) == 3
    with pytest.raises(IndexError):
        drained[5]
    assert "3" in repr(drained)
    assert "7" in repr(drained)
    assert drained[0] is not drained[0]  # made anew each time
    assert list(journal.drain(3, 7)) == []


# --- the watermark ------------------------------------------------------------------------------------


@parametrize_after
def test_the_watermark_moves_to_last_when_nothing_lives_below_first(home: Home, how: str) -> None:
    journal = filled(home)
    journal.drain(1, 3)
    assert journal.snapshot_op == 3
    journal.drain(4, 4)
    assert journal.snapshot_op == 4
    journal.drain(2, 6)  # some of it is gone already
    assert journal.snapshot_op == 6
    journal = reopened(home, journal, how)
    assert (journal.snapshot_op, journal.first_op) == (6, 7)
    with pytest.raises(StaleOpError):
        journal.append(b"x", op=6)


@parametrize_after
def test_the_watermark_stays_when_something_lives_below_first(home: Home, how: str) -> None:
    journal = filled(home)
    drained = journal.drain(4, 6)
    assert [e.op for e in drained] == [4, 5, 6]
    journal = reopened(home, journal, how)
    assert journal.snapshot_op == 0
    assert contents_of(journal) == entries(1, 2, 3, 7, 8, 9, 10)
    journal.append(b"5" * 80, op=5, kind=5)  # the gap can be filled again
    assert contents_of(journal) == entries(1, 2, 3, 7, 8, 9, 10) | {5: (b"5" * 80, 5)}
    left = killed(home, journal) if how != "killed" else None
    if left is not None:
        assert contents_of(left.open()) == contents_of(journal)


def test_a_gap_below_first_does_not_hold_the_watermark(home: Home) -> None:
    journal = home.open(**SMALL)
    for op in (5, 6, 9):
        journal.append(b"x", op=op)
    assert [e.op for e in journal.drain(5, 7)] == [5, 6]
    assert journal.snapshot_op == 7
    assert [e.op for e in journal] == [9]


@parametrize_after
def test_the_watermark_passes_what_was_drained_out_of_the_middle_before(home: Home, how: str) -> None:
    journal = filled(home)
    journal.drain(3, 5)
    journal.drain(7, 8)
    assert (journal.snapshot_op, journal.stats().removals) == (0, 2)
    journal.drain(1, 2)
    assert (journal.snapshot_op, journal.stats().removals) == (2, 2)
    journal.drain(3, 6)
    assert (journal.snapshot_op, journal.stats().removals) == (6, 1)
    journal = reopened(home, journal, how)
    assert contents_of(journal) == entries(9, 10)
    journal.append(b"7 again", op=7)
    assert [e.op for e in journal] == [7, 9, 10]


@parametrize_after
def test_a_drain_beyond_the_last_op_moves_the_watermark_there(home: Home, how: str) -> None:
    journal = filled(home, 3)
    assert len(journal.drain(1, 50)) == 3
    journal = reopened(home, journal, how)
    assert (len(journal), journal.snapshot_op, journal.last_op) == (0, 50, None)
    assert journal.remaining_capacity == SMALL["slots"]
    assert journal.append(b"x") == 51


def test_a_drain_of_an_empty_journal_moves_the_watermark_too(home: Home) -> None:
    journal = home.open(**SMALL)
    assert list(journal.drain(1, 7)) == []
    assert journal.snapshot_op == 7
    assert journal.append(b"x") == 8


def test_a_drain_at_or_below_the_watermark_changes_nothing(home: Home) -> None:
    journal = filled(home)
    journal.drain(1, 5)
    before = superblock_of(home.directory())
    for first, last in ((1, 5), (1, 1), (5, 5), (2, 4)):
        assert len(journal.drain(first, last)) == 0
    assert superblock_of(home.directory()) == before
    assert contents_of(journal) == entries(*range(6, 11))


def test_a_drain_of_a_gap_with_something_below_changes_nothing(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"x", op=1)
    journal.append(b"x", op=9)
    before = superblock_of(home.directory())
    assert len(journal.drain(3, 7)) == 0
    assert superblock_of(home.directory()) == before
    assert [e.op for e in journal] == [1, 9]


def test_the_whole_of_a_journal_with_ops_far_apart_can_be_drained(home: Home) -> None:
    journal = home.open(**SMALL)
    far = [1, 10**9 + 3, 10**12 + 6, 10**15 + 8]
    for op in far:
        journal.append(b"%d" % op, op=op)
    drained = journal.drain(10**9, 10**13)
    assert [(e.op, bytes(e.payload)) for e in drained] == [(op, b"%d" % op) for op in far[1:3]]
    assert [e.op for e in journal] == [far[0], far[3]]
    drained = journal.drain(1, 2**63 - 1)
    assert [e.op for e in drained] == [far[0], far[3]]
    assert (journal.snapshot_op, journal.remaining_capacity) == (2**63 - 1, 0)


# --- the entries live on ------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", list(Durability))
def test_drained_entries_can_be_made_after_compaction_and_after_close(
    home: Home, durability: Durability
) -> None:
    journal = home.open(slots=64, segment_bytes=16384, durability=durability)
    for n in range(1, 31):
        journal.append(b"%d." % n * 700)
    segments = {r.name for r in superblock_of(home.directory()).segments}
    first, second = journal.drain(12, 14), journal.drain(1, 20)
    assert journal.compact(wait=True) > 0
    assert segments - set(home.directory().names())
    for n in range(31, 60):
        journal.append(b"%d." % n * 700)
    wanted = {n: b"%d." % n * 700 for n in range(1, 21)}
    for _ in range(2):
        found = {e.op: bytes(e.payload) for e in itertools.chain(first, second)}
        assert found == wanted
        journal.close()
    del journal
    assert {e.op: bytes(e.payload) for e in itertools.chain(first, second)} == wanted


def test_drained_entries_hold_their_mapping_and_stats_tells_it(tmp_path: Any) -> None:
    journal = Journal(tmp_path / "j", **SMALL)
    for n in range(14):
        journal.append(bytes([n]) * 2000)
    drained = journal.drain(1, 10)
    assert journal.stats().held_bytes == 0
    journal.compact()
    stats = journal.stats()
    assert stats.held_bytes >= 2 * SMALL["segment_bytes"]
    assert stats.oldest_view_s > 0
    assert bytes(drained[3].payload) == bytes([3]) * 2000
    del drained
    assert (journal.stats().held_bytes, journal.stats().oldest_view_s) == (0, 0)
    journal.close()


# --- durable, all or none -----------------------------------------------------------------------------


def test_a_drain_is_durable_when_it_returns(home: Home) -> None:
    journal = filled(home, durability=Durability.BUFFERED)
    journal.drain(4, 6)
    assert contents_of(killed(home, journal).open()) == entries(1, 2, 3, 7, 8, 9, 10)
    journal.drain(1, 3)
    left = killed(home, journal).open()
    assert contents_of(left) == entries(7, 8, 9, 10)
    assert left.snapshot_op == 3


@pytest.mark.parametrize(("first", "last"), [(1, 4), (4, 6)])
def test_a_drain_that_dies_at_any_step_has_happened_wholly_or_not_at_all(
    open_on: Callable[..., Journal], first: int, last: int
) -> None:
    directory = Watched()
    journal = open_on(directory)
    for n in range(1, 11):
        journal.append(b"%d" % n * 40, kind=n)
    moments: list[Any] = []
    directory.on = lambda call: moments.append(after_kill(directory.inner))
    journal.drain(first, last)
    moments.append(after_kill(directory.inner))
    directory.on = lambda call: None
    before, after = entries(*range(1, 11)), entries(*range(1, first), *range(last + 1, 11))
    found = []
    for disk in moments:
        with Journal("j", storage=disk) as left:
            found.append(contents_of(left))
    assert found[0] == before
    assert found[-1] == after
    assert [f for f, _ in itertools.groupby(found)] == [before, after]


@pytest.mark.parametrize("kind", ["create", "write", "sync"])
@pytest.mark.parametrize(("first", "last"), [(1, 4), (4, 6)])
def test_a_drain_that_fails_before_the_rename_has_not_happened(
    open_on: Callable[..., Journal], kind: str, first: int, last: int
) -> None:
    fault = Fault(1 << 30, kinds=kind, error=errno.ENOSPC, times=None)
    directory = FaultDirectory(Watched(), fault)
    journal = open_on(directory)
    for n in range(1, 11):
        journal.append(b"%d" % n * 40, kind=n)
    fault.nth = fault.calls + 1
    if kind == "create":  # the spare of the superblock is there already: only one after it is missing
        journal.set_user_data(b"takes the spare")
    with pytest.raises(OSError, match="No space left"):
        journal.drain(first, last)
    assert journal.poisoned is None
    assert (contents_of(journal), journal.snapshot_op) == (entries(*range(1, 11)), 0)
    fault.lift()
    assert len(journal.drain(first, last)) == last - first + 1
    assert contents_of(journal) == entries(*range(1, first), *range(last + 1, 11))


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("rename", "the superblock's rename"), ("dir_sync", "the superblock's directory sync")],
)
def test_a_failed_step_from_the_rename_on_poisons_naming_the_stage(
    open_on: Callable[..., Journal], kind: str, stage: str
) -> None:
    fault = Fault(1 << 30, kinds=kind)
    directory = FaultDirectory(Watched(), fault)
    journal = open_on(directory)
    for n in range(1, 11):
        journal.append(b"%d" % n * 40, kind=n)
    fault.nth = fault.calls + 1
    with pytest.raises(PoisonedError) as raised:
        journal.drain(4, 6)
    assert raised.value.stage == stage
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.EIO
    poisoned = journal.poisoned
    assert poisoned is not None
    assert poisoned.stage == stage
    journal.close()
    found = contents_of(open_on(directory.inner))
    assert found in (entries(*range(1, 11)), entries(1, 2, 3, 7, 8, 9, 10))


# --- many ---------------------------------------------------------------------------------------------


def test_more_drains_out_of_the_middle_than_the_superblock_has_rows_for(home: Home) -> None:
    """Every second op of a hundred and sixty, each by itself: beyond 64 rows they are compacted away."""
    journal = home.open(slots=256, segment_bytes=16384)
    journal.append_many([b"%d" % n * 60 for n in range(1, 161)], kinds=range(1, 161))
    gone = []
    for op in range(2, 161, 2):
        (entry,) = journal.drain(op, op)
        assert bytes(entry.payload) == b"%d" % op * 60
        gone.append(entry)
        assert journal.stats().removals <= fmt.REMOVALS_MAX
    assert journal.snapshot_op == 0
    wanted = {n: (b"%d" % n * 60, n) for n in range(1, 161, 2)}
    assert contents_of(journal) == wanted
    assert [bytes(e.payload) for e in gone] == [b"%d" % op * 60 for op in range(2, 161, 2)]
    journal.append(b"again", op=100)
    journal.compact()
    for found in every_end(home, journal):
        assert contents_of(found) == wanted | {100: (b"again", 0)}
        assert found.verify().ok


def test_rows_that_hide_nothing_any_more_go(home: Home) -> None:
    journal = home.open(slots=256, segment_bytes=16384)
    for n in range(1, 101):
        journal.append(b"%d" % n * 200)
    for op in range(10, 60, 10):
        journal.drain(op, op + 2)
    assert journal.stats().removals == 5
    journal.drain(30, 42)  # a wider one takes others along
    assert journal.stats().removals <= 4
    journal.set_snapshot_op(70)  # and the watermark says the same
    assert journal.stats().removals == 0
    assert contents_of(killed(home, journal).open()) == {n: (b"%d" % n * 200, 0) for n in range(71, 101)}


def test_drain_shrinks_the_disk_and_keeps_what_lives(home: Home) -> None:
    """The space comes back with compact()."""
    journal = home.open(slots=256, segment_bytes=65536)
    for n in range(1, 201):
        journal.append(b"%d" % n * 500)

    def used() -> int:
        if home.kind == "memory":
            whole = b"".join(bytes_of(home.directory()).values())
            return sum(4096 for at in range(0, len(whole), 4096) if any(whole[at : at + 4096]))
        return sum(p.stat().st_blocks * 512 for p in home.path.iterdir() if p.is_file())

    settle(journal)
    before = used()
    journal.drain(1, 150)
    freed = journal.compact(wait=True)
    assert freed > 100 * 1000
    after = used()
    assert after < before * 0.6
    wanted = {n: (b"%d" % n * 500, 0) for n in range(151, 201)}
    assert contents_of(journal) == wanted
    left = killed(home, journal)
    journal.close()
    assert contents_of(home.open()) == wanted
    assert contents_of(left.open()) == wanted
