"""The power goes at every effect of a replica's life: the state is that of the acknowledged entries."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from mmapwal import Durability, Entry, JournalError, Replica, SnapshotPersistError, recover
from mmapwal.storage import Directory
from mmapwal.testing import CrashDisk, Fault, FaultDirectory, When, assert_crash_safe, every_fault

from .story import OPTIONS

Acknowledge = Callable[..., None]


class Ledger:
    """Keeps all that was applied; its snapshot is as large as a few sectors."""

    def __init__(self) -> None:
        self.applied: list[str] = []

    def apply(self, entry: Entry) -> int:
        self.applied.append(bytes(entry.payload).decode())
        return len(self.applied)

    def snapshot(self) -> bytes:
        return json.dumps(self.applied).encode() + b" " * 1500

    def restore(self, snapshot: memoryview) -> None:
        self.applied = json.loads(bytes(snapshot))


@contextlib.contextmanager
def recovered(disk: Directory, **options: Any) -> Iterator[Replica]:
    replica = recover("journal", Ledger(), storage=disk, **(OPTIONS | options))
    try:
        yield replica
    finally:
        getattr(disk, "inner", disk).kill()
        with contextlib.suppress(OSError, JournalError):
            replica.close()


def submits_and_checkpoints(disk: Directory, acknowledge: Acknowledge) -> None:
    """Three lives: the first ends in a kill, the second in a kill right behind a checkpoint."""
    number = 0
    for life in range(3):
        with recovered(disk) as replica:
            for _ in range(3):
                number += 1
                acknowledge(("begin", f"entry {number} " + "." * 700))
                replica.submit((f"entry {number} " + "." * 700).encode())
                acknowledge(("done", None))
            if life != 1 or number > 3:
                replica.checkpoint()
                acknowledge(("checkpoint", number))
        disk = disk.kill()  # type: ignore[attr-defined]


def wanted(notes: Sequence[tuple[str, Any]]) -> tuple[list[str], list[str]]:
    """What must be in the state, and what may."""
    begun = [what for kind, what in notes if kind == "begin"]
    done = sum(kind == "done" for kind, _ in notes)
    return begun[:done], begun


def check_replica(disk: CrashDisk, notes: Sequence[tuple[str, Any]]) -> None:
    done, begun = wanted(notes)
    checkpoints = [op for kind, op in notes if kind == "checkpoint"]
    with recovered(disk) as replica:
        applied = list(replica.machine.applied)
        assert applied in (done, begun), f"{len(applied)} applied, {len(done)} acknowledged"
        assert (replica.last_applied_op or 0) == len(applied)
        assert replica.gap_op is None
        assert replica.journal.snapshot_op >= max(checkpoints, default=0)
        paired = replica.journal.pairing
        assert (paired[0] if paired else 0) == replica.journal.snapshot_op
    disk = disk.kill()
    with recovered(disk) as replica:
        assert replica.machine.applied == applied
        replica.submit(b"after")
        replica.checkpoint()
    with recovered(disk.kill()) as replica:
        assert replica.machine.applied == [*applied, "after"]
        assert len(replica.journal) == 0


def test_a_crash_leaves_the_state_of_the_acknowledged_entries(crash_states: int) -> None:
    assert_crash_safe(submits_and_checkpoints, check_replica, max_states=crash_states * 4)


def checkpoints_what_is_not_synced(disk: CrashDisk, acknowledge: Acknowledge) -> None:
    with recovered(disk, durability=Durability.OS) as replica:
        for number in range(1, 9):
            acknowledge(("begin", f"{number}" * 500))
            replica.submit(b"%d" % number * 500)
            if number % 3 == 0:
                replica.checkpoint()
                acknowledge(("checkpoint", number))


def check_prefix(disk: CrashDisk, notes: Sequence[tuple[str, Any]]) -> None:
    """What was submitted is there up to the last checkpoint at least, without a gap, nothing else."""
    _, begun = wanted(notes)
    checkpoints = [op for kind, op in notes if kind == "checkpoint"]
    with recovered(disk) as replica:
        applied = replica.machine.applied
        assert applied == begun[: len(applied)]
        assert len(applied) >= max(checkpoints, default=0)
        assert replica.gap_op is None
        replica.submit(b"after")


def test_a_checkpoint_makes_durable_what_it_covers_before_its_snapshot(crash_states: int) -> None:
    assert_crash_safe(checkpoints_what_is_not_synced, check_prefix, max_states=crash_states)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("when", When)
def test_whatever_call_of_a_checkpoint_fails_no_state_is_lost(when: When, error: int) -> None:
    """The error is typed; `resume` of a snapshot that failed finishes the checkpoint."""
    for fault in every_fault(error=error, when=when):
        disk, notes = CrashDisk(), []  # type: tuple[CrashDisk, list[tuple[str, Any]]]
        fault.nth += 1 << 30
        with recovered(FaultDirectory(disk, fault)) as replica:
            for number in range(3):
                notes.append(("begin", f"{number}"))
                replica.submit(b"%d" % number)
                notes.append(("done", None))
            fault.nth += fault.calls - (1 << 30)
            checkpoint(replica, notes, fault)
        for state in disk.crash_states(max_states=3, seed=fault.nth):
            check_replica(state, notes)
        check_replica(disk.kill(), notes)


def checkpoint(replica: Replica, notes: list[tuple[str, Any]], fault: Fault) -> None:
    try:
        replica.checkpoint()
    except SnapshotPersistError as e:
        assert fault.struck
        e.resume()
    except (OSError, JournalError):
        assert fault.struck
        if replica.journal.poisoned is not None or not replica.journal.pairing:
            return
    notes.append(("checkpoint", 3))
