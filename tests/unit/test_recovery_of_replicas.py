"""The promises of recover(): the state of the snapshot and of the entries behind it, or a refusal."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmapwal import (
    IncompatibleFormatError,
    JournalError,
    LockedError,
    MemoryDirectory,
    Replica,
    SnapshotCoordinator,
    SnapshotCorruptError,
    SnapshotError,
    SnapshotStore,
    StateMachineError,
    recover,
)
from mmapwal.format import crc32c
from mmapwal.snapshot import snapshot_name

from .ledger import SIZES, Ledger, open_replica, reopened

if TYPE_CHECKING:
    from tests.conftest import Home


def test_a_new_journal_recovers_to_nothing(replica: Replica) -> None:
    assert (replica.last_applied_op, replica.last_journaled_op, replica.gap_op) == (None, None, None)


def test_reopening_replays_everything_in_order(home: Home, replica: Replica) -> None:
    for i in range(20):
        assert replica.submit(b"%d" % i, kind=i) == f"{i + 1}: {i}"
    again = reopened(home, replica)
    assert again.machine.entries == replica.machine.entries == [(i + 1, i, b"%d" % i) for i in range(20)]
    assert again.last_applied_op == again.last_journaled_op == 20


def test_replay_stops_at_commit_op_and_goes_on_when_told(home: Home, replica: Replica) -> None:
    for i in range(1, 31):
        replica.submit(b"%d" % i)
    again = reopened(home, replica, commit_op=15)
    assert (again.last_applied_op, again.last_journaled_op, again.gap_op) == (15, 30, None)
    again.commit(17)
    assert again.machine.applied == list(range(1, 18))
    again.commit(3)
    assert again.last_applied_op == 17
    assert again.submit(b"next") == "31: next"
    assert again.machine.applied == list(range(1, 32))
    with reopened(home, again, commit_op=0) as none:
        assert none.last_applied_op is None
        none.commit(2**63 - 1)
        assert none.last_applied_op == 31


def test_replay_stops_at_a_gap_and_says_where(home: Home, replica: Replica) -> None:
    for op in (1, 2, 4, 5, 7):
        replica.journal.append(b"%d" % op, op=op)
    again = reopened(home, replica)
    assert (again.last_applied_op, again.gap_op, again.last_journaled_op) == (2, 4, 7)
    again.commit(7)
    assert (again.last_applied_op, again.gap_op) == (2, 4)
    with pytest.raises(JournalError, match="gap below op 4") as caught:
        again.submit(b"no")
    assert type(caught.value) is JournalError
    assert again.last_journaled_op == 7
    again.journal.append(b"3", op=3)
    assert again.gap_op == 7
    again.commit(7)
    assert (again.last_applied_op, again.gap_op) == (5, 7)
    again.journal.append(b"6", op=6)
    assert again.gap_op is None
    assert again.submit(b"8") == "8: 8"
    assert again.machine.payloads == [b"%d" % op for op in range(1, 9)]


def test_a_gap_is_told_above_commit_op_and_before_the_first_entry(home: Home, replica: Replica) -> None:
    replica.journal.append(b"x", op=3)
    again = reopened(home, replica)
    assert (again.last_applied_op, again.gap_op) == (None, 3)
    again.journal.append_many([b"1", b"2"], first_op=1)
    again.journal.append(b"x", op=5)
    last = reopened(home, again, commit_op=2)
    assert (last.last_applied_op, last.gap_op) == (2, 5)


def test_recovery_takes_the_snapshot_and_replays_only_what_follows(home: Home, replica: Replica) -> None:
    for i in range(10):
        replica.submit(b"%d" % i)
    snapshot = replica.checkpoint()
    assert (snapshot.op, bytes(snapshot.data)) == (10, bytes(replica.machine.snapshot()))
    assert replica.last_journaled_op == replica.last_applied_op == 10
    replica.submit(b"more")
    again = reopened(home, replica, commit_op=None)
    assert again.machine.applied == [11]
    assert again.machine.entries == replica.machine.entries
    assert again.snapshots.protected_op == 10
    assert reopened(home, again, commit_op=4).last_applied_op == 11 - 1


@pytest.mark.parametrize("op", [1, 3, 9])
def test_a_snapshot_that_no_superblock_names_is_ignored(home: Home, replica: Replica, op: int) -> None:
    replica.submit(b"1")
    replica.submit(b"2")
    if op != 1:
        replica.checkpoint()
    replica.submit(b"3")
    replica.snapshots.save(op, b"of a checkpoint that did not happen")
    assert reopened(home, replica).machine.payloads == [b"1", b"2", b"3"]


def spoil(home: Home, how: str) -> None:
    directory = home.directory().subdirectory("snapshots")
    name = directory.names()[-1]
    data = bytearray(directory.open(name).read_at(0, 1 << 20))
    directory.unlink(name)
    if how == "another":
        SnapshotStore("s", storage=directory).save(2, b"another")
    elif how != "missing":
        data[8 if how == "newer" else -1] += 1
        if how == "newer":
            data[44:48] = struct.pack("<I", crc32c(bytes(data[:44])))
        directory.create(name).write_at(0, data[:-1] if how == "torn" else data)
    directory.close()


@pytest.mark.parametrize(
    ("how", "error"),
    [("missing", SnapshotError), ("torn", SnapshotCorruptError), ("rotten", SnapshotCorruptError),
     ("another", SnapshotCorruptError), ("newer", IncompatibleFormatError)],
)  # fmt: skip
def test_a_bad_paired_snapshot_is_refused_and_the_journal_closed(
    home: Home, replica: Replica, how: str, error: type[Exception]
) -> None:
    replica.submit(b"1")
    replica.checkpoint()
    replica.submit(b"2")
    replica.checkpoint()
    replica.close()
    spoil(home, how)
    with pytest.raises(error) as caught:
        open_replica(home)
    assert type(caught.value) is error
    home.open().close()


def test_entries_that_went_without_a_snapshot_are_refused(home: Home, replica: Replica) -> None:
    for i in range(4):
        replica.submit(b"%d" % i)
    replica.journal.set_snapshot_op(1)
    with pytest.raises(SnapshotError, match=r"up to op 1 are gone and there is no snapshot"):
        reopened(home, replica)
    journal = home.open()
    store = SnapshotStore("s", storage=journal.directory.subdirectory("snapshots"))
    machine = Ledger()
    SnapshotCoordinator(journal, store).checkpoint(machine, 2)
    store.close()
    journal.set_snapshot_op(3)
    journal.close()
    with pytest.raises(SnapshotError, match=r"up to op 3 are gone and the snapshot is of op 2"):
        open_replica(home)


def test_a_failing_machine_fails_recovery_naming_the_op(home: Home, replica: Replica) -> None:
    for payload in (b"1", b"2", b"3"):
        replica.submit(payload)
    with pytest.raises(StateMachineError, match="op 2 ") as caught:
        reopened(home, replica, Ledger(bad=b"2"))
    assert isinstance(caught.value.__cause__, ArithmeticError)
    again = open_replica(home)
    again.checkpoint()
    machine = Ledger()
    machine.restore = lambda view: 1 // 0  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(StateMachineError, match=r"restore\(\) of the snapshot of op 3") as caught:
        reopened(home, again, machine)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert open_replica(home).machine.payloads == [b"1", b"2", b"3"]


def test_bad_arguments_are_refused_before_anything_is_opened(tmp_path: Path) -> None:
    for commit_op, error in ((-1, ValueError), (2**63, ValueError), (True, TypeError), ("1", TypeError)):
        with pytest.raises(error, match="commit_op"):
            recover(tmp_path / "j", Ledger(), commit_op=commit_op)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="readonly"):
        recover(tmp_path / "j", Ledger(), readonly=True)
    assert list(tmp_path.iterdir()) == []


def test_snapshots_live_in_the_journal_and_their_directory_is_durable(tmp_path: Path) -> None:
    class Recorder(MemoryDirectory):
        calls: list[str] = []  # noqa: RUF012

        def subdirectory(self, name: str) -> Any:
            self.calls.append(name)
            return super().subdirectory(name)

        def sync(self) -> None:
            self.calls.append("sync")

    with recover("j", Ledger(), storage=Recorder()):
        assert Recorder.calls[Recorder.calls.index("snapshots") + 1] == "sync"
    with recover(str(tmp_path / "j"), Ledger()) as replica:
        replica.submit(b"x")
        replica.checkpoint()
        assert os.listdir(tmp_path / "j" / "snapshots") == [snapshot_name(1)]  # noqa: PTH208
        with pytest.raises(LockedError):
            recover(tmp_path / "j", Ledger())


steps = st.lists(
    st.sampled_from(["submit"] * 6 + ["direct", "direct", "commit", "checkpoint", "reopen", "kill"]),
    max_size=40,
)


@given(steps=steps)
@settings(max_examples=60)
def test_any_history_recovers_to_the_state_of_its_entries(steps: list[str]) -> None:
    directory, journaled, applied = MemoryDirectory(), 0, 0
    replica = recover("j", Ledger(), storage=directory, **SIZES)
    killed = []
    for step in steps:
        if step == "submit" and replica.journal.remaining_capacity:
            journaled += 1
            assert replica.submit(b"%d" % journaled) == f"{journaled}: {journaled}"
            applied = journaled
        elif step == "direct" and replica.journal.remaining_capacity:
            journaled += 1
            replica.journal.append(b"%d" % journaled)
        elif step == "commit":
            applied = min(applied + 1, journaled)
            replica.commit(applied)
        elif step == "checkpoint":
            assert replica.checkpoint().op == applied
        elif step in {"reopen", "kill"}:
            if step == "kill":
                killed.append(replica)
                directory = copy_of_files(directory)
            else:
                replica.close()
            replica = recover("j", Ledger(), storage=directory)
            applied = journaled
        assert (replica.last_applied_op or 0, replica.last_journaled_op or 0) == (applied, journaled)
        assert replica.machine.payloads == [b"%d" % op for op in range(1, applied + 1)]
    for left in (replica, *killed):
        left.close()


def copy_of_files(directory: MemoryDirectory) -> MemoryDirectory:
    copy = MemoryDirectory()
    for name, storage in directory._files.items():
        copy.create(name).write_at(0, storage.read_at(0, len(storage)))
    for name, inner in directory._subdirectories.items():
        copy._subdirectories[name] = copy_of_files(inner)
    return copy
