"""One shrinking operation at a time: the second is told at once, and appends and reads go on beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mmapwal import BusyError, Journal

from .files import after_kill, contents_of
from .watched import Task, Watched, held_up

CALLS: dict[str, Callable[[Journal], Any]] = {
    "drain": lambda j: j.drain(1, 20),
    "truncate_from": lambda j: j.truncate_from(40),
    "set_snapshot_op": lambda j: j.set_snapshot_op(20),
    "pair_snapshot": lambda j: j.pair_snapshot(20, 5),
    "compact": lambda j: j.compact(),
}


def filled(open_on: Callable[..., Journal], directory: Watched) -> Journal:
    journal = open_on(directory, slots=256)
    for n in range(1, 41):
        journal.append(b"%04d" % n * 220)
    journal.set_snapshot_op(15)  # leaves a compaction something to do
    return journal


@pytest.mark.parametrize("second", CALLS)
@pytest.mark.parametrize("first", CALLS)
def test_of_two_shrinking_operations_at_once_the_second_is_refused(
    open_on: Callable[..., Journal], first: str, second: str
) -> None:
    directory = Watched()
    journal = filled(open_on, directory)

    def superblock(call: Any) -> bool:
        return (call.kind, call.name) == ("rename", "superblock")

    with held_up(directory, superblock, lambda: CALLS[first](journal)) as task, pytest.raises(BusyError):
        CALLS[second](journal)
    task.result()
    CALLS[second](journal)  # and now it can
    wanted = {e.op: bytes(e.payload) for e in journal}
    with Journal("j", storage=after_kill(directory.inner)) as left:
        assert {op: p for op, (p, _) in contents_of(left).items()} == wanted


@pytest.mark.parametrize("first", CALLS)
def test_a_shrinking_operation_that_failed_leaves_the_next_one_its_turn(
    open_on: Callable[..., Journal], first: str
) -> None:
    directory = Watched()
    journal = filled(open_on, directory)

    def fail(call: Any) -> None:
        if call.name == "superblock.tmp":
            raise OSError(28, "No space left on device", call.name)

    directory.on = fail
    with pytest.raises(OSError, match="No space left"):
        CALLS[first](journal)
    directory.on = lambda call: None
    for call in CALLS.values():
        call(journal)


@pytest.mark.parametrize("first", CALLS)
def test_reads_go_on_beside_a_shrinking_operation(open_on: Callable[..., Journal], first: str) -> None:
    directory = Watched()
    journal = filled(open_on, directory)

    def superblock(call: Any) -> bool:
        return (call.kind, call.name) == ("rename", "superblock")

    with held_up(directory, superblock, lambda: CALLS[first](journal)):
        # Before its superblock nothing has happened.
        assert [e.op for e in journal] == list(range(16, 41))
        assert bytes(journal.read(30)) == journal.copy(30) == b"0030" * 220
        assert (len(journal), journal.snapshot_op, journal.last_op) == (25, 15, 40)


@pytest.mark.parametrize("first", ["compact", "drain", "set_snapshot_op", "pair_snapshot"])
def test_appends_of_other_ops_go_on_beside_a_shrinking_operation(
    open_on: Callable[..., Journal], first: str
) -> None:
    directory = Watched()
    journal = filled(open_on, directory)

    def superblock(call: Any) -> bool:
        return (call.kind, call.name) == ("rename", "superblock")

    with held_up(directory, superblock, lambda: CALLS[first](journal)):
        assert journal.append(b"meanwhile") == 41
        assert journal.copy(41) == b"meanwhile"
    assert 41 in journal
    with Journal("j", storage=after_kill(directory.inner)) as left:
        assert left.copy(41) == b"meanwhile"


def test_an_append_of_an_op_that_a_truncation_is_taking_out_waits_for_it(
    open_on: Callable[..., Journal],
) -> None:
    directory = Watched()
    journal = filled(open_on, directory)

    def superblock(call: Any) -> bool:
        return (call.kind, call.name) == ("rename", "superblock")

    with held_up(directory, superblock, lambda: journal.truncate_from(30)) as truncation:
        later = Task(lambda: journal.append(b"thirty again"))
    assert truncation.result() == 11
    assert later.result() in {30, 41}
    op = later.result()
    assert journal.copy(op) == b"thirty again"
    assert [e.op for e in journal] == [*range(16, 30), op]
    with Journal("j", storage=after_kill(directory.inner)) as left:
        assert [e.op for e in left] == [*range(16, 30), op]
