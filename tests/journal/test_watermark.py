"""The watermark: ops at or below it are gone. It only grows, and is durable when the call returns."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from mmapwal import Durability, ExhaustedError, Journal, MissingOpError, PoisonedError, StaleOpError
from mmapwal.testing import Fault, FaultDirectory

from .files import (
    SMALL,
    Contents,
    Home,
    after_kill,
    contents_of,
    every_end,
    killed,
    refused_call,
    superblock_of,
)
from .watched import Watched


def filled(home: Home, **options: Any) -> Journal:
    journal = home.open(**(SMALL | options))
    for n in range(1, 11):
        journal.append(b"%d" % n * 30, kind=n)
    return journal


def entries(*ops: int) -> Contents:
    return {n: (b"%d" % n * 30, n) for n in ops}


@pytest.mark.parametrize("durability", list(Durability))
def test_ops_at_or_below_the_watermark_are_gone(home: Home, durability: Durability) -> None:
    journal = filled(home, durability=durability)
    journal.set_snapshot_op(6)
    for found in every_end(home, journal):
        assert contents_of(found) == entries(7, 8, 9, 10)
        assert (found.snapshot_op, found.first_op, len(found)) == (6, 7, 4)
        for op in range(1, 7):
            assert op not in found
            assert found.get(op) is found.header(op) is None
            with pytest.raises(MissingOpError):
                found.read(op)
            refused_call(StaleOpError, found, lambda op=op, f=found: f.append(b"", op=op))
        header = found.header(7)
        assert header is not None
        assert found.previous_header(header) is None
        assert found.headers(1, 8)["op"].tolist() == [7, 8]


@pytest.mark.parametrize("durability", list(Durability))
def test_the_watermark_is_durable_when_it_returns_and_so_is_all_before_it(
    home: Home, durability: Durability
) -> None:
    journal = filled(home, durability=durability)
    journal.set_snapshot_op(3)
    left = killed(home, journal).open()
    assert left.snapshot_op == 3
    assert contents_of(left) == entries(*range(4, 11))
    assert journal.durable_lsn == journal.written_lsn


def test_the_watermark_only_grows(home: Home) -> None:
    journal = filled(home)
    journal.set_snapshot_op(0)
    assert len(journal) == 10
    journal.set_snapshot_op(5)
    before = superblock_of(home.directory())
    journal.set_snapshot_op(5)
    assert superblock_of(home.directory()) == before  # nothing to say
    assert "5" in str(refused_call(ValueError, journal, lambda: journal.set_snapshot_op(4)))
    assert journal.snapshot_op == 5


def test_the_watermark_may_lie_above_the_last_op(home: Home) -> None:
    """A snapshot was installed: the next op is above it, and no lower one is taken any more."""
    journal = filled(home)
    journal.set_snapshot_op(1000)
    for found in every_end(home, journal):
        assert (len(found), found.first_op, found.last_op, found.snapshot_op) == (0, None, None, 1000)
        assert found.remaining_capacity == SMALL["slots"]
        refused_call(StaleOpError, found, lambda f=found: f.append(b"", op=1000))
        assert found.append(b"x") == 1001
        found.truncate_from(1001)


def test_the_largest_watermark_leaves_nothing_to_append(home: Home) -> None:
    journal = filled(home)
    journal.set_snapshot_op(2**63 - 1)
    for found in every_end(home, journal):
        assert (len(found), found.remaining_capacity, found.snapshot_op) == (0, 0, 2**63 - 1)
        refused_call(ExhaustedError, found, lambda f=found: f.append(b""))


def test_a_gap_above_the_watermark_can_be_filled(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"x", op=9)
    journal.set_snapshot_op(4)
    journal.append(b"y", op=6)
    for found in every_end(home, journal):
        assert [e.op for e in found] == [6, 9]


def test_views_of_what_the_watermark_passed_stay_right(home: Home) -> None:
    journal = filled(home)
    views = {e.op: e.payload for e in journal}
    journal.set_snapshot_op(10)
    for n in range(11, 27):
        journal.append(b"round two %d" % n)
    assert {op: bytes(v) for op, v in views.items()} == {n: b"%d" % n * 30 for n in range(1, 11)}


# --- the snapshot that belongs to it ------------------------------------------------------------------


def test_a_pairing_moves_the_watermark_with_it_by_one_superblock(home: Home) -> None:
    journal = filled(home)
    assert journal.pairing is None
    sequence = journal.stats().sequence
    journal.pair_snapshot(6, 0xDEADBEEF)
    assert journal.stats().sequence == sequence + 1
    for found in every_end(home, journal):
        assert found.pairing == (6, 0xDEADBEEF)
        assert contents_of(found) == entries(7, 8, 9, 10)
    journal = found
    journal.pair_snapshot(6, 1)  # of the same op, another one
    assert (journal.pairing, journal.snapshot_op) == ((6, 1), 6)
    journal.set_snapshot_op(8)  # the pairing stays
    assert (journal.pairing, journal.snapshot_op) == ((6, 1), 8)


def test_a_pairing_of_op_zero_is_one(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.pair_snapshot(0, 7)
    for found in every_end(home, journal):
        assert (found.pairing, found.snapshot_op) == ((0, 7), 0)


def test_user_data_is_durable_in_the_superblock(home: Home) -> None:
    journal = filled(home)
    assert journal.user_data == b""
    for data in (b"term 3, vote 2", bytes(128), b"\xff" * 128, b"trailing zeros\0\0", b"", b"x"):
        journal.set_user_data(data)
        assert journal.user_data == data
        assert killed(home, journal).open().user_data == data
    for found in every_end(home, journal):
        assert found.user_data == b"x"
        assert contents_of(found) == entries(*range(1, 11))


# --- all or nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["set_snapshot_op", "pair_snapshot"])
def test_a_watermark_that_dies_at_any_step_has_moved_wholly_or_not_at_all(
    open_on: Callable[..., Journal], call: str
) -> None:
    directory = Watched()
    journal = open_on(directory, durability=Durability.OS)
    for n in range(1, 11):
        journal.append(b"%d" % n * 30, kind=n)
    moments: list[Any] = []
    directory.on = lambda call: moments.append(after_kill(directory.inner))
    getattr(journal, call)(*([4] if call == "set_snapshot_op" else [4, 99]))
    moments.append(after_kill(directory.inner))
    directory.on = lambda call: None
    found = []
    for disk in moments:
        with Journal("j", storage=disk) as left:
            found.append((contents_of(left), left.snapshot_op, left.pairing))
    pairing = (4, 99) if call == "pair_snapshot" else None
    before, after = (entries(*range(1, 11)), 0, None), (entries(*range(5, 11)), 4, pairing)
    assert found[0] == before
    assert found[-1] == after
    assert all(f in (before, after) for f in found)


CALLS: dict[str, Callable[[Journal], Any]] = {
    "set_snapshot_op": lambda j: j.set_snapshot_op(4),
    "pair_snapshot": lambda j: j.pair_snapshot(4, 9),
    "truncate_from": lambda j: j.truncate_from(5),
    "set_user_data": lambda j: j.set_user_data(b"x"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["write", "sync"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_change_that_fails_before_the_rename_has_not_happened_and_can_be_repeated(
    open_on: Callable[..., Journal], call: str, kind: str, error: int
) -> None:
    fault = Fault(1 << 30, kinds=kind, error=error)
    directory = FaultDirectory(Watched(), fault)
    journal = open_on(directory)
    for n in range(1, 11):
        journal.append(b"%d" % n * 30, kind=n)
    fault.nth = fault.calls + 1
    with pytest.raises(OSError, match="superblock") as raised:
        CALLS[call](journal)
    assert raised.value.errno == error
    assert journal.poisoned is None
    assert (contents_of(journal), journal.snapshot_op, journal.user_data) == (entries(*range(1, 11)), 0, b"")
    left = after_kill(directory.inner.inner)  # type: ignore[attr-defined]
    assert contents_of(open_on(left)) == entries(*range(1, 11))
    CALLS[call](journal)
    assert journal.append(b"goes on") > 0


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("kind", "stage"),
    [("rename", "the superblock's rename"), ("dir_sync", "the superblock's directory sync")],
)
def test_a_change_that_fails_from_the_rename_on_poisons_naming_the_stage(
    open_on: Callable[..., Journal], call: str, kind: str, stage: str
) -> None:
    fault = Fault(1 << 30, kinds=kind)
    directory = FaultDirectory(Watched(), fault)
    journal = open_on(directory)
    for n in range(1, 11):
        journal.append(b"%d" % n * 30, kind=n)
    fault.nth = fault.calls + 1
    with pytest.raises(PoisonedError, match=stage) as raised:
        CALLS[call](journal)
    assert raised.value.stage == stage
    assert isinstance(raised.value.__cause__, OSError)
    for again in CALLS.values():
        with pytest.raises(PoisonedError, match=stage):
            again(journal)
    journal.close()
    found = open_on(directory.inner)
    assert contents_of(found) in (entries(*range(1, 11)), entries(*range(5, 11)), entries(1, 2, 3, 4))
