"""Poison: after a failure that may have left memory and disk apart everything refuses, and says why."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from mmapwal import Durability, Journal, PoisonedError, RecoveryRow, SyncMethod
from mmapwal.testing import Call, FaultDirectory, When
from mmapwal.testing import Fault as Plan

from .files import after_kill, contents_of, superblock_of
from .watched import Gate, Task, Watched

EIO = errno.EIO


class Broken:
    """A journal on a disk of which one call can be made to fail."""

    def __init__(
        self,
        open_on: Callable[..., Journal],
        durability: Durability = Durability.SYNC,
        method: SyncMethod = SyncMethod.DSYNC,
        when: When = When.BEFORE,
        **options: Any,
    ) -> None:
        self.disk = Watched(sync_method=method)
        self.fault = Plan(1 << 30, when=when)
        self.open_on = open_on
        self.journal = open_on(FaultDirectory(self.disk, self.fault), durability=durability, **options)

    def breaks(self, kinds: str, error: int = EIO) -> None:
        """The next call of this kind fails."""
        self.fault.kinds = frozenset([kinds])
        self.fault.nth = self.fault.calls + 1
        self.fault.error = error

    def reopened(self) -> Journal:
        self.journal.close()
        return self.open_on(self.disk)


def segment_sync(call: Call) -> bool:
    return call.name.startswith("segment") and call.kind in {"write_sync", "sync"}


# --- which step, and what then ------------------------------------------------------------------------

STAGES = [
    (Durability.SYNC, SyncMethod.DSYNC, "write_sync", "the write and sync of a commit"),
    (Durability.SYNC, SyncMethod.FDATASYNC, "write", "the write of a commit"),
    (Durability.SYNC, SyncMethod.FDATASYNC, "sync", "the sync of a commit"),
    (Durability.OS, SyncMethod.DSYNC, "write", "the write of a commit"),
    (Durability.OS, SyncMethod.FDATASYNC, "write", "the write of a commit"),
]


@pytest.mark.parametrize(("durability", "method", "kind", "stage"), STAGES)
@pytest.mark.parametrize("when", [When.BEFORE, When.AFTER])
def test_a_failed_commit_poisons_naming_stage_and_cause(
    open_on: Callable[..., Journal],
    durability: Durability,
    method: SyncMethod,
    kind: str,
    stage: str,
    when: When,
) -> None:
    broken = Broken(open_on, durability, method, when)
    journal = broken.journal
    journal.append(b"one")
    journal.sync()
    broken.breaks(kind)
    with pytest.raises(PoisonedError, match=stage) as raised:
        journal.append(b"two")
    error = raised.value
    assert error.stage == stage
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == EIO
    assert error.__cause__.filename.startswith("segment")
    poisoned = journal.poisoned
    assert poisoned is not None
    assert (poisoned.stage, poisoned.__cause__) == (stage, error.__cause__)
    assert poisoned is not error  # each is told by an error of his own


@pytest.mark.parametrize("durability", [Durability.OS, Durability.BUFFERED])
@pytest.mark.parametrize("method", [SyncMethod.DSYNC, SyncMethod.FDATASYNC])
def test_a_failed_sync_poisons_naming_stage_and_cause(
    open_on: Callable[..., Journal], durability: Durability, method: SyncMethod
) -> None:
    broken = Broken(open_on, durability, method)
    journal = broken.journal
    journal.append(b"one")
    broken.breaks("sync")
    with pytest.raises(PoisonedError, match="the sync of a commit") as raised:
        journal.sync()
    assert isinstance(raised.value.__cause__, OSError)
    with pytest.raises(PoisonedError):  # the second sync would succeed, and prove nothing
        journal.sync()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, EIO])
def test_a_failed_write_and_sync_in_one_is_never_clean(open_on: Callable[..., Journal], error: int) -> None:
    """It cannot tell which part failed."""
    broken = Broken(open_on)
    broken.journal.append(b"one")
    broken.breaks("write_sync", error)
    with pytest.raises(PoisonedError) as raised:
        broken.journal.append(b"two")
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == error


@pytest.mark.parametrize("error", [KeyboardInterrupt, LookupError, MemoryError])
def test_any_exception_inside_a_commit_poisons_with_it_as_the_cause(
    open_on: Callable[..., Journal], error: type[BaseException]
) -> None:
    disk = Watched()
    journal = open_on(disk)
    journal.append(b"one")

    def fail(call: Call) -> None:
        if segment_sync(call):
            raise error("in the middle")

    disk.on = fail
    with pytest.raises(PoisonedError) as raised:
        journal.append(b"two")
    disk.on = lambda call: None
    assert type(raised.value.__cause__) is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, LookupError])
@pytest.mark.parametrize("kind", ["rename", "dir_sync"])
def test_any_exception_inside_a_superblocks_rename_poisons_with_it_as_the_cause(
    open_on: Callable[..., Journal], kind: str, error: type[BaseException]
) -> None:
    disk = Watched()
    journal = open_on(disk)
    journal.append(b"one")

    def fail(call: Call) -> None:
        if call.kind == kind:
            raise error("in the middle")

    disk.on = fail
    with pytest.raises(PoisonedError) as raised:
        journal.set_user_data(b"x")
    disk.on = lambda call: None
    assert type(raised.value.__cause__) is error
    assert "superblock" in raised.value.stage


CALLS: dict[str, Callable[[Journal], Any]] = {
    "append": lambda j: j.append(b"x"),
    "append_many": lambda j: j.append_many([b"x"]),
    "append_many of nothing": lambda j: j.append_many([]),
    "append of what is refused anyway": lambda j: j.append(b"x", op=1),
    "sync": lambda j: j.sync(),
    "drain": lambda j: j.drain(1, 1),
    "truncate_from": lambda j: j.truncate_from(1),
    "set_snapshot_op": lambda j: j.set_snapshot_op(1),
    "pair_snapshot": lambda j: j.pair_snapshot(1, 1),
    "compact": lambda j: j.compact(),
    "set_user_data": lambda j: j.set_user_data(b"x"),
    "verify": lambda j: j.verify(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("durability", list(Durability))
def test_every_entry_point_of_a_poisoned_journal_refuses(
    open_on: Callable[..., Journal], call: str, durability: Durability
) -> None:
    broken = Broken(open_on, durability)
    journal = broken.journal
    journal.append_many([b"one", b"two"])
    journal.sync()
    broken.breaks("rename")
    with pytest.raises(PoisonedError):
        journal.set_user_data(b"x")
    before = list(broken.disk.calls)
    for _ in range(2):
        with pytest.raises(PoisonedError, match="rename") as raised:
            CALLS[call](journal)
        assert isinstance(raised.value.__cause__, OSError)
    assert broken.disk.calls == before  # and does nothing


# --- reading ------------------------------------------------------------------------------------------

READS: dict[str, Callable[[Journal, int], Any]] = {
    "read": lambda j, op: bytes(j.read(op)),
    "copy": lambda j, op: j.copy(op),
    "[]": lambda j, op: bytes(j[op].payload),
    "get": lambda j, op: bytes(j.get(op).payload),
    "in": lambda j, op: op in j and b"%d" % op,
    "header": lambda j, op: j.header(op) and b"%d" % op,
    "headers": lambda j, op: len(j.headers(op, op)) == 1 and b"%d" % op,
    "columns": lambda j, op: bytes(j.columns(op, op).payload(0)),
    "array": lambda j, op: j.array(op, op).tobytes(),
    "arrays": lambda j, op: next(j.arrays(op, op)).tobytes(),
    "payloads": lambda j, op: bytes(next(j.payloads(op, op))),
    "entries": lambda j, op: bytes(next(j.entries(op, op)).payload),
}


@pytest.mark.parametrize("way", READS)
@pytest.mark.parametrize("durability", [Durability.OS, Durability.BUFFERED])
@pytest.mark.parametrize("begun", [False, True])
def test_reads_above_the_durable_lsn_refuse_and_below_it_still_work(
    open_on: Callable[..., Journal], durability: Durability, way: str, begun: bool
) -> None:
    broken = Broken(open_on, durability)
    journal = broken.journal
    for n in range(1, 5):
        journal.append(b"%d" % n)
    durable = journal.sync()
    for n in range(5, 8):
        journal.append(b"%d" % n)
    if begun:  # it was read before, when it could still be
        assert READS[way](journal, 6) == b"6"
    broken.breaks("sync")
    with pytest.raises(PoisonedError):
        journal.sync()
    assert journal.durable_lsn == durable
    for op in range(1, 5):
        assert READS[way](journal, op) == b"%d" % op
    for op in range(5, 8):
        with pytest.raises(PoisonedError, match="sync of a commit"):
            READS[way](journal, op)


def test_a_range_gives_what_is_durable_and_then_refuses(open_on: Callable[..., Journal]) -> None:
    broken = Broken(open_on, Durability.OS, slots=4096)
    journal = broken.journal
    journal.append_many([b"durable"] * 60)
    journal.sync()
    journal.append_many([b"not"] * 20)
    broken.breaks("sync")
    with pytest.raises(PoisonedError):
        journal.sync()
    assert [e.op for e in journal.entries(1, 60)] == list(range(1, 61))
    for call in (lambda: list(journal), lambda: list(journal.payloads(40)), journal.headers):
        with pytest.raises(PoisonedError):
            call()


def test_with_sync_everything_acknowledged_can_be_read_and_the_failed_one_is_not_there(
    open_on: Callable[..., Journal],
) -> None:
    broken = Broken(open_on)
    for n in range(1, 5):
        broken.journal.append(b"%d" % n)
    broken.breaks("write_sync")
    with pytest.raises(PoisonedError):
        broken.journal.append(b"5")
    assert contents_of(broken.journal) == {n: (b"%d" % n, 0) for n in range(1, 5)}
    assert 5 not in broken.journal


def test_views_from_before_the_failure_stay_right(open_on: Callable[..., Journal]) -> None:
    broken = Broken(open_on, Durability.OS)
    broken.journal.append(b"written")
    view = broken.journal.read(1)
    broken.breaks("sync")
    with pytest.raises(PoisonedError):
        broken.journal.sync()
    assert bytes(view) == b"written"
    broken.journal.close()
    assert bytes(view) == b"written"


# --- closing and opening again ------------------------------------------------------------------------


@pytest.mark.parametrize("durability", list(Durability))
def test_closing_a_poisoned_journal_does_not_raise_and_does_not_seal(
    open_on: Callable[..., Journal], durability: Durability
) -> None:
    broken = Broken(open_on, durability)
    journal = broken.journal
    journal.append(b"one")
    journal.sync()
    broken.breaks("rename")
    with pytest.raises(PoisonedError):
        journal.set_user_data(b"x")
    before = list(broken.disk.calls)
    journal.close()
    journal.close()
    assert broken.disk.calls == before
    assert superblock_of(broken.disk).seal is None
    found = open_on(broken.disk)
    assert found.report.outcome is RecoveryRow.CLEAN
    assert found.poisoned is None
    assert contents_of(found) == {1: (b"one", 0)}
    assert found.append(b"two") == 2


@pytest.mark.parametrize("when", [When.BEFORE, When.AFTER, When.UNSYNCED, When.SHORT])
def test_after_reopening_the_outcome_of_the_failed_append_is_known(
    open_on: Callable[..., Journal], when: When
) -> None:
    broken = Broken(open_on, when=when)
    broken.journal.append(b"one")
    broken.breaks("write_sync")
    with pytest.raises(PoisonedError):
        broken.journal.append(b"two" * 40)
    found = broken.reopened()
    wanted = {1: (b"one", 0)} | ({2: (b"two" * 40, 0)} if when in {When.AFTER, When.UNSYNCED} else {})
    assert contents_of(found) == wanted
    assert found.append(b"next") == len(wanted) + 1
    left = after_kill(broken.disk.inner)
    assert contents_of(open_on(left)) == wanted | {len(wanted) + 1: (b"next", 0)}


def test_a_last_sync_that_fails_is_raised_by_close_which_lets_everything_go(
    open_on: Callable[..., Journal],
) -> None:
    broken = Broken(open_on, Durability.OS)
    broken.journal.append(b"one")
    broken.breaks("sync")
    with pytest.raises(PoisonedError, match="sync"):
        broken.journal.close()
    broken.journal.close()
    assert superblock_of(broken.disk).seal is None
    assert contents_of(open_on(broken.disk)) == {1: (b"one", 0)}


@pytest.mark.parametrize("kind", ["sync", "rename", "dir_sync", "write"])
def test_a_seal_that_fails_costs_a_scan_and_nothing_else(open_on: Callable[..., Journal], kind: str) -> None:
    broken = Broken(open_on)
    broken.journal.append(b"one")
    broken.breaks(kind)
    broken.journal.close()
    assert broken.fault.struck
    found = open_on(broken.disk)
    assert contents_of(found) == {1: (b"one", 0)}
    found.append(b"two")


# --- all who wait are told ----------------------------------------------------------------------------


@pytest.mark.parametrize("durability", [Durability.SYNC, Durability.OS])
def test_all_threads_that_wait_for_a_commit_are_told(
    open_on: Callable[..., Journal], durability: Durability
) -> None:
    """Those in the commit that fails, and those staged behind it."""
    disk = Watched()
    journal = open_on(disk, durability=durability)
    journal.append(b"acknowledged")
    journal.sync()
    gate = Gate(lambda c: c.name.startswith("segment") and c.kind in {"write", "write_sync"})
    disk.on = gate
    tasks = [Task(lambda: journal.append(b"first"))]
    gate.wait()
    for n in range(5):
        staged = journal.stats().staged_bytes
        tasks.append(Task(lambda n=n: journal.append(b"%d" % n)))
        while journal.stats().staged_bytes == staged:
            pass
    tasks.append(Task(journal.sync))
    gate.open(OSError(EIO, "broken"))
    errors = [t.finish() for t in tasks]
    assert [type(e) for e in errors] == [PoisonedError] * 7
    assert len({id(e) for e in errors}) == 7
    assert {str(e.__cause__) for e in errors if e} == {str(OSError(EIO, "broken"))}
    assert contents_of(journal) == {1: (b"acknowledged", 0)}


def test_threads_that_wait_for_a_segment_are_told(open_on: Callable[..., Journal]) -> None:
    disk = Watched()
    journal = open_on(disk, slots=64)
    journal.append(bytes(11_000))
    gate = Gate(lambda c: c.name == "superblock" and c.kind == "rename")
    disk.on = gate
    tasks = [Task(lambda: journal.append(bytes(5000))) for _ in range(4)]
    gate.wait()
    gate.open(OSError(EIO, "broken"))
    errors = [t.finish() for t in tasks]
    assert [type(e) for e in errors] == [PoisonedError] * 4
    assert all("rename" in str(e) for e in errors)
    assert len(journal) == 1


def test_a_failure_while_a_segment_is_prepared_in_the_background_is_told_to_the_next_call(
    open_on: Callable[..., Journal],
) -> None:
    """The rename of its superblock: memory and disk may differ, whoever did it."""
    disk = Watched()
    disk.concurrent = True
    journal = open_on(disk, slots=64)
    journal.append(bytes(1000))
    gate = Gate(lambda c: c.name == "superblock" and c.kind == "rename")
    disk.on = gate
    journal.append(bytes(8000))
    gate.wait()
    gate.open(OSError(EIO, "broken"))
    while journal.poisoned is None:
        pass
    with pytest.raises(PoisonedError, match="rename"):
        journal.append(b"x")
    assert len(journal) == 2


def test_a_failed_unlink_or_close_poisons_nothing(open_on: Callable[..., Journal]) -> None:
    broken = Broken(open_on, slots=64)
    for _ in range(30):
        broken.journal.append(bytes(2000))
    broken.journal.set_snapshot_op(25)
    broken.breaks("unlink")
    assert broken.journal.compact() > 0
    assert broken.fault.struck
    broken.breaks("close")
    for _ in range(20):
        try:
            broken.journal.append(bytes(2000))
        except OSError as e:  # of a segment that nobody has named yet: thrown away
            assert e.errno == EIO
            broken.journal.append(bytes(2000))
    assert broken.journal.poisoned is None
    assert len(broken.journal) == 25
