"""The promises of SnapshotCoordinator: a checkpoint that ends at any step loses nothing."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from mmapwal import (
    BusyError,
    JournalError,
    JournalFullError,
    MemoryDirectory,
    Replica,
    SnapshotCoordinator,
    SnapshotPersistError,
    recover,
)
from mmapwal.snapshot import snapshot_name

from .ledger import SIZES, WAIT_S, Ledger, in_thread, reopened

if TYPE_CHECKING:
    from tests.conftest import Home


def test_a_checkpoint_makes_room_and_gives_space_back(replica: Replica) -> None:
    with pytest.raises(JournalFullError):
        for _ in range(65):
            replica.submit(bytes(500))
    assert replica.last_applied_op == 64
    before = replica.journal.stats()
    replica.checkpoint()
    after = replica.journal.stats()
    assert (len(replica.journal), replica.journal.remaining_capacity) == (0, 64)
    assert after.segments < before.segments
    assert replica.submit(b"65") == "65: 65"


def test_a_checkpoint_is_due_when_little_room_is_left(single: Replica) -> None:
    coordinator = SnapshotCoordinator(single.journal, single.snapshots, margin=60)
    for op in range(1, 6):
        assert coordinator.should_checkpoint == (op > 4)
        single.submit(b"x")
    for margin, error in ((-1, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="margin"):
            SnapshotCoordinator(single.journal, single.snapshots, margin=margin)  # type: ignore[arg-type]


def test_steps_of_a_checkpoint_come_in_the_order_that_survives_a_crash(
    single: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    single.submit(b"1")
    single.checkpoint()
    single.submit(b"2")
    steps: list[Any] = []

    def spy(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any) -> Any:
            steps.append((name, single.snapshots.protected_op))
            return original(*args)

        monkeypatch.setattr(owner, name, call)

    for name in ("sync", "pair_snapshot", "compact"):
        spy(single.journal, name)
    for name in ("save", "prune"):
        spy(single.snapshots, name)
    single.snapshots.protected_op = None
    single.checkpoint()
    assert steps == [("sync", None), ("save", 1), ("pair_snapshot", 1), ("prune", 2), ("compact", 2)]
    assert single.journal.pairing == (2, single.snapshots.load().checksum)  # type: ignore[union-attr]


class Mortal(MemoryDirectory):
    """Dies at the nth change of a name: it and all after it have no effect."""

    def __init__(self, left: list[int], name: str = "mortal") -> None:
        super().__init__(name)
        self.left = left

    def step(self) -> None:
        self.left[0] -= 1
        if self.left[0] <= 0:
            raise OSError(errno.EIO, "the process is dead")

    def subdirectory(self, name: str) -> Any:
        return self._subdirectories.setdefault(name, Mortal(self.left, name))

    def create(self, name: str) -> Any:
        self.step()
        return super().create(name)

    def rename(self, old: str, new: str) -> None:
        self.step()
        super().rename(old, new)

    def unlink(self, name: str) -> None:
        self.step()
        super().unlink(name)

    def sync(self) -> None:
        self.step()


@pytest.mark.parametrize("again", [False, True])
def test_killed_at_any_step_of_a_checkpoint_nothing_is_lost(again: bool) -> None:
    outcomes = []
    for step in range(1, 40):
        directory = Mortal([10**9])
        replica = recover("j", Ledger(), storage=directory, **SIZES)
        for i in range(40):
            replica.submit(b"%d" % i * 200)
            if again and i == 20:
                replica.checkpoint()
        directory.left[0] = step
        with suppress(JournalError, OSError):
            replica.checkpoint()
            outcomes.append("done")
        replica.close()
        directory.left[0] = 10**9
        with recover("j", Ledger(), storage=directory) as after:
            assert after.machine.entries == replica.machine.entries
            outcomes.append(after.journal.pairing and after.journal.pairing[0])
            after.submit(b"more")
    assert outcomes[0] == (21 if again else None)
    assert outcomes[-2:] == ["done", 40]


def test_of_two_checkpoints_at_once_the_second_is_refused(single: Replica) -> None:
    single.submit(b"x")
    inside, go = threading.Event(), threading.Event()
    snapshot = single.machine.snapshot

    def slow() -> Any:
        inside.set()
        assert go.wait(WAIT_S)
        return snapshot()

    single.machine.snapshot = slow
    thread, results = in_thread(single.checkpoint)
    assert inside.wait(WAIT_S)
    with pytest.raises(BusyError):
        single.checkpoint()
    go.set()
    thread.join()
    assert results[0].op == 1
    assert single.checkpoint().op == 1


def test_submits_go_on_while_a_snapshot_is_persisted(replica: Replica) -> None:
    live = bytearray(b"before")  # a machine may hand out the buffer that it works on
    replica.machine.snapshot = lambda: live
    replica.machine.hook = lambda entry: live.__setitem__(slice(None), bytes(entry.payload)[:6])
    replica.submit(b"before")
    inside, go = threading.Event(), threading.Event()
    save = replica.snapshots.save

    def slow(op: int, data: Any) -> Any:
        inside.set()
        assert go.wait(WAIT_S)
        return save(op, data)

    replica.snapshots.save = slow  # type: ignore[method-assign, assignment]
    thread, results = in_thread(replica.checkpoint)
    assert inside.wait(WAIT_S)
    assert replica.submit(b"meanwhile") == "2: meanwhile"
    go.set()
    thread.join()
    assert (results[0].op, bytes(results[0].data), live) == (1, b"before", b"meanwh")
    assert [bytes(entry.payload) for entry in replica.journal] == [b"meanwhile"]


@pytest.mark.parametrize("call", ["create", "rename", "sync"])
def test_resuming_a_failed_persist_finishes_the_whole_checkpoint(single: Replica, call: str) -> None:
    def fail_once() -> None:
        original = getattr(directory, call)

        def failing(*args: Any) -> Any:
            setattr(directory, call, original)
            raise OSError(errno.ENOSPC, "no space")

        setattr(directory, call, failing)

    directory = single.snapshots._directory
    single.submit(b"x")
    fail_once()
    with pytest.raises(SnapshotPersistError, match=r"^\w+: snapshot of op 1") as caught:
        single.checkpoint()
    assert (single.journal.pairing, single.journal.snapshot_op) == (None, 0)
    fail_once()
    with pytest.raises(SnapshotPersistError, match=r"^\w+: snapshot of op 1") as again:
        caught.value.resume()
    single.submit(b"y")
    again.value.resume()
    assert (single.journal.pairing or (0,))[0] == single.journal.snapshot_op == 1
    pairing = single.checkpoint() and single.journal.pairing
    caught.value.resume()
    assert single.journal.pairing == pairing
    assert single.snapshots.load_paired(*pairing).op == 2  # type: ignore[misc]


def test_a_paired_snapshot_is_not_replaced_by_other_bytes_of_the_same_op(
    home: Home, replica: Replica
) -> None:
    replica.submit(b"x")
    first = replica.checkpoint()
    replica.machine.snapshot = lambda: b"other bytes"
    again = replica.checkpoint()
    assert (again.checksum, bytes(again.data)) == (first.checksum, bytes(first.data))
    directory = home.directory().subdirectory("snapshots")
    directory.unlink(snapshot_name(1))
    directory.close()
    assert bytes(replica.checkpoint().data) == b"other bytes"  # what is gone is written again
    machine = Ledger()
    machine.restore = lambda view: machine.entries.append((1, 0, bytes(view)))  # type: ignore[method-assign]
    assert reopened(home, replica, machine).machine.payloads == [b"other bytes"]


@pytest.mark.parametrize("error", [errno.EIO, errno.EMFILE])
def test_a_paired_snapshot_that_cannot_be_read_now_is_not_replaced_by_other_bytes(
    single: Replica, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """A crash between the replacing and the pairing would leave neither."""
    single.submit(b"x")
    paired = single.checkpoint()

    def unreadable(op: int, checksum: int) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(single.snapshots, "load_paired", unreadable)
        patch.setattr(single.machine, "snapshot", lambda: b"other bytes")
        with pytest.raises(OSError, match=os.strerror(error)):
            single.checkpoint()
    assert single.journal.pairing == (1, paired.checksum)
    assert bytes(single.snapshots.load_paired(1, paired.checksum).data) == bytes(paired.data)
    single.submit(b"y")
    assert single.checkpoint().op == 2


def test_a_pairing_that_fails_leaves_the_checkpoint_before(
    single: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    single.submit(b"1")
    pairing = single.checkpoint() and single.journal.pairing
    with monkeypatch.context() as patch:
        patch.setattr(
            single.journal, "pair_snapshot", lambda op, checksum: (_ for _ in ()).throw(BusyError("busy"))
        )
        for _ in range(4):
            single.submit(b"x")
            with pytest.raises(BusyError, match="busy"):
                single.checkpoint()
    assert single.journal.pairing == pairing
    assert single.snapshots.ops() == [1, 4, 5]
    assert single.checkpoint().op == 5
    assert single.snapshots.ops() == [4, 5]


def test_somebody_elses_compaction_does_not_fail_a_checkpoint(
    single: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy() -> int:
        raise BusyError("another compact")

    monkeypatch.setattr(single.journal, "compact", busy)
    single.submit(b"x")
    assert single.checkpoint().op == single.journal.snapshot_op == 1


def test_a_checkpoint_below_the_watermark_is_refused_before_it_is_written(single: Replica) -> None:
    single.submit(b"1")
    single.submit(b"2")
    single.checkpoint()
    coordinator = single.coordinator
    with pytest.raises(ValueError, match="are gone already"):
        coordinator.checkpoint(single.machine, 1)
    for op, error in ((-1, ValueError), (2**63, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="op must be"):
            coordinator.checkpoint(single.machine, op)  # type: ignore[arg-type]
    assert single.snapshots.ops() == [2]


def test_a_checkpoint_before_the_first_entry_keeps_the_first_state(home: Home, replica: Replica) -> None:
    replica.machine.entries.append((0, 0, b"born with it"))
    assert replica.checkpoint().op == 0
    again = reopened(home, replica)
    assert (again.last_applied_op, again.machine.payloads) == (None, [b"born with it"])
    assert again.submit(b"x") == "1: x"
