"""The promises of recover(), Replica, SnapshotCoordinator and MuxStateMachine."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmapwal import (
    BusyError,
    ClosedError,
    Durability,
    Entry,
    IncompatibleFormatError,
    JournalError,
    JournalFullError,
    LockedError,
    MemoryDirectory,
    MuxStateMachine,
    Replica,
    SnapshotCoordinator,
    SnapshotCorruptError,
    SnapshotError,
    SnapshotPersistError,
    SnapshotStore,
    StateMachineError,
    recover,
)
from mmapwal.format import crc32c
from mmapwal.snapshot import snapshot_name

if TYPE_CHECKING:
    from tests.conftest import Home

WAIT_S = 60
SIZES = {"slots": 64, "segment_bytes": 16 << 10}


class Ledger:
    """Keeps what it was given, in order. `bad` payloads raise; `hook` runs inside apply()."""

    def __init__(self, *, bad: bytes | None = None) -> None:
        self.entries: list[tuple[int, int, bytes]] = []
        self.applied: list[int] = []
        self.bad = bad
        self.hook: Callable[[Entry], None] = lambda entry: None
        self._inside = threading.Lock()

    def apply(self, entry: Entry) -> str:
        assert self._inside.acquire(blocking=False), "two threads in the machine"
        try:
            self.applied.append(entry.op)
            self.hook(entry)
            if bytes(entry.payload) == self.bad:
                raise ArithmeticError(f"cannot take op {entry.op}")
            self.entries.append((entry.op, entry.kind, bytes(entry.payload)))
            return f"{entry.op}: {bytes(entry.payload).decode()}"
        finally:
            self._inside.release()

    def snapshot(self) -> bytearray:
        assert self._inside.acquire(blocking=False), "two threads in the machine"
        self._inside.release()
        return bytearray(b"".join(struct.pack("<QHI", o, k, len(p)) + p for o, k, p in self.entries))

    def restore(self, snapshot: memoryview) -> None:
        self.entries, at = [], 0
        while at < len(snapshot):
            op, kind, length = struct.unpack_from("<QHI", snapshot, at)
            self.entries.append((op, kind, bytes(snapshot[at + 14 : at + 14 + length])))
            at += 14 + length

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, _, payload in self.entries]


def open_replica(home: Home, machine: Any = None, **options: Any) -> Replica:
    if home.kind != "mapped":
        options.setdefault("storage", home.directory())
    replica = recover(home.path, Ledger() if machine is None else machine, **options)
    home._given.append(replica)
    return replica


@pytest.fixture
def replica(home: Home) -> Replica:
    """A new one, with little room, on each kind of storage."""
    return open_replica(home, **SIZES)


@pytest.fixture
def single() -> Any:
    """A new one in memory, for what has nothing to do with storage."""
    with recover("j", Ledger(), storage=MemoryDirectory(), **SIZES) as made:
        yield made


def reopened(home: Home, replica: Replica, machine: Any = None, **options: Any) -> Replica:
    replica.close()
    return open_replica(home, machine, **options)


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Runs it beside the test; what it returned or raised lands in the list."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as e:  # noqa: BLE001  # the test looks at it
            results.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


class Pause:
    """Stops a call of the journal in one thread, before or after its effect, until it is told to go on."""

    def __init__(self, replica: Replica, *, after: bool) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        append, self.thread = replica.journal.append, 0

        def paused(payload: Any, **options: Any) -> int:
            if threading.get_ident() != self.thread:
                return append(payload, **options)
            op = append(payload, **options) if after else 0
            self.reached.set()
            assert self.go.wait(WAIT_S)
            return op or append(payload, **options)

        replica.journal.append = paused  # type: ignore[method-assign]

    def submit(self, replica: Replica, payload: bytes) -> tuple[threading.Thread, list[Any]]:
        def work() -> Any:
            self.thread = threading.get_ident()
            return replica.submit(payload)

        thread, results = in_thread(work)
        assert self.reached.wait(WAIT_S)
        return thread, results


# --- recovery -----------------------------------------------------------------------------------------------


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


# --- checkpoints --------------------------------------------------------------------------------------------


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


# --- submitting ---------------------------------------------------------------------------------------------


def test_every_submitter_gets_the_result_of_its_own_entry(home: Home) -> None:
    replica = open_replica(home, slots=1024, segment_bytes=64 << 10)

    def work(name: int) -> list[str]:
        return [replica.submit(b"%d-%d" % (name, i), kind=name) for i in range(50)]

    running = [in_thread(lambda name=name: work(name)) for name in range(6)]
    while any(thread.is_alive() for thread, _ in running):
        with suppress(BusyError):
            replica.checkpoint()
    given: dict[int, str] = {}
    for name, (_, results) in enumerate(running):
        assert [r.split(": ")[1] for r in results[0]] == [f"{name}-{i}" for i in range(50)]
        given |= {int(r.split(": ")[0]): r.split(": ")[1] for r in results[0]}
    assert replica.machine.applied == list(range(1, 301))
    assert [p.decode() for p in replica.machine.payloads] == [given[op] for op in range(1, 301)]
    assert replica._results == {} == replica._submitting
    assert reopened(home, replica).machine.entries == replica.machine.entries


def test_submitters_journal_at_the_same_time(single: Replica) -> None:
    append, together = single.journal.append, threading.Barrier(3, timeout=WAIT_S)

    def meet(payload: Any, **options: Any) -> int:
        together.wait()  # passes only when all three are inside
        return append(payload, **options)

    single.journal.append = meet  # type: ignore[method-assign]
    running = [in_thread(lambda: single.submit(b"x")) for _ in range(3)]
    for thread, _ in running:
        thread.join()
    assert sorted(results[0] for _, results in running) == ["1: x", "2: x", "3: x"]


@pytest.mark.parametrize("durability", Durability)
def test_submits_work_at_every_durability(home: Home, durability: Durability) -> None:
    replica = open_replica(home, durability=durability, **SIZES)
    assert [replica.submit(b"a"), replica.submit(b"b")] == ["1: a", "2: b"]
    assert replica.checkpoint().op == 2
    replica.submit(b"c")
    assert reopened(home, replica).machine.payloads == [b"a", b"b", b"c"]


def test_entries_journaled_directly_are_applied_by_commit_or_by_the_next_submit(single: Replica) -> None:
    single.journal.append_many([b"1", b"2", b"3"], kinds=[7, 8, 9])
    single.commit(2)
    assert single.machine.entries == [(1, 7, b"1"), (2, 8, b"2")]
    assert single._results == {}
    assert single.submit(b"4") == "4: 4"
    assert single.machine.applied == [1, 2, 3, 4]
    for op, error in ((-1, ValueError), (2**63, ValueError), (None, TypeError), (True, TypeError)):
        with pytest.raises(error, match="op must be"):
            single.commit(op)  # type: ignore[arg-type]


def test_what_the_journal_refuses_is_raised_and_the_replica_goes_on(single: Replica) -> None:
    for payload, kind, error in (
        ("text", 0, TypeError),
        (b"", -1, ValueError),
        (bytes(2 << 20), 0, ValueError),
    ):
        single.journal._max_payload_bytes = 1 << 20
        with pytest.raises(error):
            single.submit(payload, kind=kind)  # type: ignore[arg-type]
    assert single.submit(b"x") == "1: x"


def test_an_exception_goes_to_its_submitter_and_then_everything_refuses(home: Home, replica: Replica) -> None:
    replica.machine.bad = b"bad"
    replica.submit(b"good")
    with pytest.raises(ArithmeticError, match="cannot take op 2"):
        replica.submit(b"bad")
    for call in (lambda: replica.submit(b"x"), lambda: replica.commit(2), replica.checkpoint):
        with pytest.raises(StateMachineError, match="op 2 failed") as caught:
            call()
        assert isinstance(caught.value.__cause__, ArithmeticError)
    assert (replica.last_applied_op, replica.last_journaled_op) == (1, 2)
    with pytest.raises(StateMachineError, match="op 2 failed"):
        reopened(home, replica, Ledger(bad=b"bad"))
    again = open_replica(home)
    assert again.machine.payloads == [b"good", b"bad"]
    assert again.submit(b"x") == "3: x"


@pytest.mark.parametrize("bad", [False, True])
def test_an_entry_that_another_thread_applied_is_answered_to_its_submitter(
    single: Replica, bad: bool
) -> None:
    pause = Pause(single, after=True)
    single.machine.bad = b"first" if bad else None
    thread, results = pause.submit(single, b"first")
    if bad:
        with pytest.raises(StateMachineError, match="op 1 failed"):
            single.submit(b"second")
    else:
        assert single.submit(b"second") == "2: second"
    pause.go.set()
    thread.join()
    if bad:
        assert isinstance(results[0], ArithmeticError)
        assert single.machine.applied == [1]
    else:
        assert results == ["1: first"]
        assert single.machine.applied == [1, 2]
    assert single._results == {}


@pytest.mark.parametrize("after", [False, True])
def test_a_submitter_interrupted_while_it_journals_holds_nobody_up(single: Replica, after: bool) -> None:
    append = single.journal.append

    def interrupted(payload: Any, **options: Any) -> int:
        if payload == b"mine" and not after:
            raise KeyboardInterrupt
        op = append(payload, **options)
        if payload == b"mine":
            raise KeyboardInterrupt
        return op

    single.journal.append = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        single.submit(b"mine")
    thread, results = in_thread(lambda: single.submit(b"other"))
    thread.join(WAIT_S)
    assert results == ["2: other" if after else "1: other"]
    assert single.machine.payloads == ([b"mine", b"other"] if after else [b"other"])


def test_results_that_nobody_waits_for_do_not_pile_up(single: Replica) -> None:
    for _ in range(10):
        single.journal.append(b"nobody's")
        single.submit(b"x")
        assert single._results == {}
    first = Pause(single, after=False)
    thread, _ = first.submit(single, b"slow")
    for _ in range(5):
        single.journal.append(b"nobody's")
        single.submit(b"x")
    second = Pause(single, after=True)
    other, _ = second.submit(single, b"later")
    first.go.set()
    thread.join()
    assert all(op > 30 for op in single._results)  # those from before the later one came are gone
    second.go.set()
    other.join()
    assert single._results == {}
    assert single.machine.applied == list(range(1, 33))


@pytest.mark.parametrize("where", ["apply", "keep"])
def test_an_interrupt_inside_apply_stops_the_replica(
    single: Replica, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    if where == "apply":
        single.machine.hook = interrupt
    else:  # behind apply(), before the replica has noted it
        monkeypatch.setattr(single, "_keep", interrupt)
        single.journal.append(b"nobody's")
    with pytest.raises(KeyboardInterrupt):
        single.submit(b"x")
    monkeypatch.undo()
    single.machine.hook = lambda entry: None
    thread, results = in_thread(single.checkpoint)
    thread.join(WAIT_S)
    assert isinstance(results[0], StateMachineError)
    for call in (lambda: single.submit(b"y"), lambda: single.commit(9)):
        with pytest.raises(StateMachineError, match="op 1 failed"):
            call()
    assert single.machine.applied == [1]


@pytest.mark.parametrize("call", ["submit", "commit", "checkpoint", "close"])
def test_a_machine_that_calls_back_is_refused_and_does_not_hang(single: Replica, call: str) -> None:
    arguments = {"submit": (b"again",), "commit": (1,)}
    single.machine.hook = lambda entry: getattr(single, call)(*arguments.get(call, ()))
    with pytest.raises(StateMachineError, match="must not call back"):
        single.submit(b"x")
    assert single.last_journaled_op == 1


def test_a_journal_that_was_cut_below_what_is_applied_refuses_submits(single: Replica) -> None:
    for _ in range(4):
        single.submit(b"x")
    single.journal.truncate_from(3)
    with pytest.raises(StateMachineError, match="op 4 is applied and was cut"):
        single.submit(b"y")
    assert single.journal.last_op == 2


def test_a_watermark_above_what_is_applied_refuses_submits(single: Replica) -> None:
    single.journal.append(b"never applied")
    single.journal.set_snapshot_op(1)
    assert single.gap_op == 2
    with pytest.raises(JournalError, match="gap below op 2"):
        single.submit(b"y")
    assert len(single.journal) == 0


def test_an_uncommitted_suffix_may_be_truncated_and_journaled_anew(home: Home, replica: Replica) -> None:
    replica.journal.append_many([b"1", b"2", b"3"])
    replica.commit(1)
    replica.journal.truncate_from(2)
    assert replica.submit(b"new") == "2: new"
    assert reopened(home, replica).machine.payloads == [b"1", b"new"]


def test_a_closed_replica_refuses_and_its_views_stay_right(replica: Replica) -> None:
    kept = []
    replica.machine.hook = lambda entry: kept.append(entry.payload)
    replica.submit(b"kept" * 100)
    snapshot = replica.checkpoint()
    replica.close()
    replica.close()
    for call in (lambda: replica.submit(b"x"), lambda: replica.commit(1), replica.checkpoint):
        with pytest.raises(ClosedError):
            call()
    with pytest.raises(ClosedError):
        replica.snapshots.load()
    assert bytes(kept[0]) == b"kept" * 100
    assert len(snapshot.data) == 14 + 400


@pytest.mark.parametrize("call", ["checkpoint", "close"])
def test_a_snapshot_and_a_close_wait_for_the_application_under_way(single: Replica, call: str) -> None:
    inside, go = threading.Event(), threading.Event()

    def slow(entry: Entry) -> None:
        inside.set()
        assert go.wait(WAIT_S)

    single.machine.hook = slow
    thread, results = in_thread(lambda: single.submit(b"x"))
    assert inside.wait(WAIT_S)
    waiting, waited = in_thread(getattr(single, call))
    waiting.join(0.05)
    assert waiting.is_alive()
    go.set()
    thread.join()
    waiting.join()
    assert results == ["1: x"]
    assert call == "close" or waited[0].op == 1


FORKS = """
import os, signal, sys, threading
from mmapwal import ForkedError, recover

class Machine:
    def apply(self, entry):
        if entry.op == 2:
            inside.set()
            assert go.wait(60)
        return entry.op
    def snapshot(self): return b""
    def restore(self, view): pass

inside, go = threading.Event(), threading.Event()
replica = recover(sys.argv[1], Machine())
replica.submit(b"x")
thread = threading.Thread(target=replica.submit, args=(b"y",))
thread.start()
inside.wait(60)
child = os.fork()  # another thread holds the replica's lock
if child == 0:
    signal.alarm(60)  # one that hangs does not outlive the test
    refused = 0
    for call in (lambda: replica.submit(b"z"), lambda: replica.commit(1), replica.checkpoint):
        try:
            call()
        except ForkedError:
            refused += 1
    replica.close()
    os._exit(refused)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
go.set()
thread.join()
assert replica.submit(b"z") == 3
replica.close()
"""


def test_a_forked_child_is_refused_and_the_parent_goes_on(tmp_path: Path, run_python: Any) -> None:
    result = run_python(FORKS, tmp_path / "j")
    assert (result.returncode, result.stderr) == (0, "")


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


# --- several machines as one --------------------------------------------------------------------------------


def entry(kind: int, payload: bytes = b"x", op: int = 1) -> Entry:
    return Entry(op, memoryview(payload), kind, 0)


class Part:
    """A machine whose whole state is one buffer."""

    def __init__(self, state: bytes = b"") -> None:
        self.state: Any = state

    def apply(self, entry: Entry) -> Any:
        self.state = bytes(self.state) + bytes(entry.payload)
        return self.state

    def snapshot(self) -> bytes:
        return bytes(self.state)

    def restore(self, snapshot: memoryview) -> None:
        self.state = snapshot


def address(data: Any) -> int:
    return np.frombuffer(data, np.uint8).ctypes.data


def test_a_mux_gives_each_entry_to_the_machine_of_its_kind() -> None:
    one, two = Part(), Part()
    mux = MuxStateMachine({"one": (range(10), one), "two": ({10, 32767}, two)})
    assert [mux.apply(entry(k, b"%d" % k)) for k in (0, 10, 9, 32767)] == [b"0", b"10", b"09", b"1032767"]
    with pytest.raises(StateMachineError, match="op 7: no machine has kind 11"):
        mux.apply(entry(11, op=7))
    assert (one.state, two.state) == (b"09", b"1032767")


def test_a_mux_refuses_bad_machines() -> None:
    with pytest.raises(ValueError, match="'a' and 'b' both have kind 3"):
        MuxStateMachine({"a": (range(4), Part()), "b": ([9, 3], Part())})
    for kinds, error in (([-1], ValueError), ([32768], ValueError), (["x"], TypeError), ([True], TypeError)):
        with pytest.raises(error, match="kind must be"):
            MuxStateMachine({"a": (kinds, Part())})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="name must be a str"):
        MuxStateMachine({1: ([1], Part())})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="surrogates"):
        MuxStateMachine({"\ud800": ([1], Part())})


def test_an_entry_that_no_machine_takes_is_refused_before_it_is_journaled(home: Home) -> None:
    replica = open_replica(home, MuxStateMachine({"only": ([1], Part())}), **SIZES)
    with pytest.raises(StateMachineError, match="no machine has kind 2; nothing was journaled"):
        replica.submit(b"x", kind=2)
    assert replica.last_journaled_op is None
    assert replica.submit(b"x", kind=1) == b"x"
    replica.journal.append(b"y", kind=2)
    with pytest.raises(StateMachineError, match="op 2 failed"):
        replica.submit(b"x", kind=1)


def test_a_mux_is_checkpointed_and_recovered_as_a_whole(home: Home) -> None:
    def mux() -> MuxStateMachine:
        return MuxStateMachine({"a": ([1], Part()), "b": ([2], Part()), "idle": ([3], Part())})

    replica = open_replica(home, mux(), **SIZES)
    for kind in (1, 2, 1):
        replica.submit(b"%d" % kind, kind=kind)
    replica.checkpoint()
    replica.submit(b"more", kind=2)
    again = reopened(home, replica, mux())
    assert again.machine.snapshot() == replica.machine.snapshot()
    assert again.submit(b"!", kind=1) == b"11!"
    with pytest.raises(IncompatibleFormatError, match="machines"):
        reopened(home, again, MuxStateMachine({"a": ([1, 2, 3], Part())}))


@given(
    states=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=9), st.binary(max_size=40), max_size=5
    )
)
def test_a_mux_snapshot_gives_every_machine_its_own_slice(states: dict[str, bytes]) -> None:
    def mux(parts: dict[str, Part]) -> MuxStateMachine:
        return MuxStateMachine({name: ([i], parts[name]) for i, name in enumerate(parts)})

    data = mux({name: Part(state) for name, state in states.items()}).snapshot()
    parts = {name: Part() for name in reversed(states)}
    mux(parts).restore(memoryview(data))
    assert {name: bytes(part.state) for name, part in parts.items()} == states
    for part in parts.values():
        assert part.state.obj is data
        assert not part.state.nbytes or (address(part.state) - address(data)) % 8 == 0


def test_every_cut_of_a_mux_snapshot_is_damage_and_restores_nothing() -> None:
    data = MuxStateMachine({"a": ([1], Part(b"12345678")), "b": ([2], Part(b"state"))}).snapshot()
    parts = Part(b"old"), Part(b"old")
    mux = MuxStateMachine({"a": ([1], parts[0]), "b": ([2], parts[1])})
    for damaged in (*(data[:length] for length in range(len(data))), data + b"\0", data + bytes(8)):
        with pytest.raises(SnapshotCorruptError):
            mux.restore(memoryview(damaged))
    twice = MuxStateMachine({"a": ([1], Part()), "b": ([2], Part())}).snapshot().replace(b"b\0\0", b"a\0\0")
    for damaged, error in (
        (b"X" + data[1:], SnapshotCorruptError),
        (data.replace(b"a\0\0", b"\xff\0\0"), SnapshotCorruptError),
        (twice, SnapshotCorruptError),
        (data[:8] + b"\2" + data[9:], IncompatibleFormatError),
        (data.replace(b"a\0\0", b"c\0\0"), IncompatibleFormatError),
    ):
        with pytest.raises(error):
            mux.restore(memoryview(damaged))
    assert (parts[0].state, parts[1].state) == (b"old", b"old")


@given(data=st.binary(max_size=80), count=st.integers(0, 2**32 - 1))
def test_no_bytes_make_a_mux_do_anything_but_refuse(data: bytes, count: int) -> None:
    mux = MuxStateMachine({"a": ([1], Part())})
    for raw in (data, struct.pack("<8sII", b"MMWALMUX", 1, count) + data):
        with pytest.raises((SnapshotCorruptError, IncompatibleFormatError)):
            mux.restore(memoryview(raw))
