"""A state machine on top of a journal: recovery, applying in op order, checkpoints.

What is journaled is applied in op order, without gaps. A checkpoint is: sync the journal through the
op, persist the snapshot, then one superblock with pairing and watermark. recover() loads the snapshot
that the superblock names, by op and checksum: one that no superblock names is a checkpoint that did
not happen, and is ignored, be it newer or older.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from typing_extensions import Buffer

from mmapwal import format as fmt
from mmapwal.arguments import integer
from mmapwal.errors import (
    BusyError,
    ClosedError,
    ForkedError,
    JournalError,
    SnapshotError,
    SnapshotPersistError,
    StateMachineError,
)
from mmapwal.journal import Journal
from mmapwal.machines import MuxStateMachine, StateMachine
from mmapwal.reader import Entry
from mmapwal.snapshot import Snapshot, SnapshotStore, copy_of

__all__ = ["Replica", "SnapshotCoordinator", "recover"]

T = TypeVar("T")
_FEW = 8  # entries up to which asking for each is cheaper than setting up an iteration


# --- checkpoints ------------------------------------------------------------------------------------


class SnapshotCoordinator:
    """Takes a machine's state through all steps of a checkpoint, and says when one is due.

    `margin` is how many appends may be left before one is due. Thread-safe: of two checkpoints at once
    the second gets BusyError.
    """

    def __init__(self, journal: Journal, snapshots: SnapshotStore, *, margin: int = 64) -> None:
        self._journal = journal
        self._snapshots = snapshots
        self._margin = integer("margin", margin, 0, fmt.OP_MAX)
        self._guard = threading.Lock()
        self._turn: object | None = None

    @property
    def should_checkpoint(self) -> bool:
        """Whether the journal has room for no more than `margin` automatic appends."""
        return self._journal.remaining_capacity <= self._margin

    def checkpoint(self, machine: StateMachine, op: int) -> Snapshot:
        """Makes the machine's state, which must be that after `op`, the one to recover from.

        Syncs the journal, persists the snapshot, pairs the superblock with it and moves the watermark
        to `op`, prunes older snapshots, compacts. Whatever fails or dies before the pairing, recovery
        goes from the checkpoint before; after it, from this one. When the journal is paired with this
        op already and that snapshot is whole, it is kept as it is: a paired file is never replaced by
        other bytes, since a crash between that and the pairing would leave neither.

        Returns the snapshot, its data a slice of the file's mapping. Copies the machine's bytes once.
        Blocks for the disk; other threads may append meanwhile.

        Raises BusyError when another checkpoint or change of structure is under way; ValueError for an
        op below the watermark; SnapshotPersistError, whose resume() finishes all the steps;
        PoisonedError, ClosedError, OSError. An OSError of the compaction comes after the checkpoint
        has happened, as ``journal.pairing`` tells.
        """
        number = integer("op", op, 0, fmt.OP_MAX)
        return self.checkpoint_from(lambda: (number, copy_of(machine.snapshot())))

    def checkpoint_from(self, take: Callable[[], tuple[int, bytes]]) -> Snapshot:
        """The same with a function that returns (op, state after it). It is called when this checkpoint
        has its turn, so that no state is persisted after a newer one. Raises what it raises, too."""
        return self._in_turn(lambda: self._checkpoint(*take()))

    def _in_turn(self, work: Callable[[], T]) -> T:
        me = object()
        try:  # around the taking too: an interrupt right behind it must not leave the turn taken
            with self._guard:
                if self._turn is not None:
                    raise BusyError("another checkpoint is under way")
                self._turn = me
            return work()
        finally:
            if self._turn is me:
                self._turn = None

    def _checkpoint(self, op: int, data: bytes) -> Snapshot:
        self._refuse_backwards(op)
        self._journal.sync()
        paired = self._journal.pairing
        self._snapshots.protected_op = paired[0] if paired is not None else None
        if paired is not None and paired[0] == op:
            # Damaged or gone: it is written again. Only unreadable now: a crash would leave neither of them.
            with contextlib.suppress(SnapshotError):
                return self._finish(self._snapshots.load_paired(*paired))
        try:
            snapshot = self._snapshots.save(op, data)
        except SnapshotPersistError as e:
            raise self._resumable(e, op, fmt.crc32c(data)) from e.__cause__
        return self._pair(snapshot)

    def _refuse_backwards(self, op: int) -> None:
        watermark = self._journal.snapshot_op
        if op < watermark:
            raise ValueError(f"a checkpoint at op {op}: the entries up to {watermark} are gone already")

    def _pair(self, snapshot: Snapshot) -> Snapshot:
        self._journal.pair_snapshot(snapshot.op, snapshot.checksum)
        self._snapshots.protected_op = snapshot.op
        return self._finish(snapshot)

    def _finish(self, snapshot: Snapshot) -> Snapshot:
        with contextlib.suppress(OSError):
            self._snapshots.prune()
        with contextlib.suppress(BusyError):  # somebody else is giving space back
            self._journal.compact()
        return snapshot

    def _resumable(self, error: SnapshotPersistError, op: int, checksum: int) -> SnapshotPersistError:
        """The same error, whose resume() does not end at the snapshot."""
        message = str(error).removeprefix(f"{error.stage.value}: ")
        return SnapshotPersistError(
            error.stage, message, partial(self._in_turn, partial(self._resume, error, op, checksum))
        )

    def _resume(self, error: SnapshotPersistError, op: int, checksum: int) -> None:
        paired = self._journal.pairing
        if paired is not None and paired[0] >= op:
            return  # a later checkpoint has happened: it holds all that this one would
        self._refuse_backwards(op)
        try:
            error.resume()
        except SnapshotPersistError as e:
            raise self._resumable(e, op, checksum) from e.__cause__
        self._pair(self._snapshots.load_paired(op, checksum))


# --- the replica ------------------------------------------------------------------------------------


class _Outcome(NamedTuple):
    value: Any
    error: Exception | None


class Replica:
    """A machine that is kept at the end of its journal. Made by recover().

    Threads may submit at once: their entries share syncs, and are applied in op order. A snapshot is
    taken between two applications. An exception from apply() is raised to whoever submitted the entry;
    from then on everything but close() refuses with StateMachineError until the journal is recovered
    again, since the state may be half changed. The same holds when an interrupt hits apply().

    `journal`, `snapshots` and `machine` are what it is made of; `coordinator` makes its checkpoints.
    Entries may be appended to `journal` directly (batches, ops out of order): commit() applies them.
    """

    def __init__(
        self, journal: Journal, snapshots: SnapshotStore, machine: StateMachine, *, applied_op: int = 0
    ) -> None:
        self.journal = journal
        self.snapshots = snapshots
        self.machine = machine
        self.coordinator = SnapshotCoordinator(journal, snapshots)
        self._accepts = machine.accepts if isinstance(machine, MuxStateMachine) else None
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.Lock()  # held while the machine is called
        self._owner = 0  # the thread that holds it
        self._applied = applied_op
        self._halfway = 0  # the op whose apply() has begun and not ended
        self._failure: tuple[int, BaseException | None] | None = None
        # Under `_guard`. A result that one thread applied for another waits here. `_submitting` has
        # for each thread in submit() what was applied when it came: its op is above that.
        self._guard = threading.Lock()
        self._results: dict[int, _Outcome] = {}
        self._submitting: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- state ------------------------------------------------------------------------------------

    @property
    def last_applied_op(self) -> int | None:
        """The last op in the machine's state; None when there is none yet. Never blocks."""
        return self._applied or None

    @property
    def last_journaled_op(self) -> int | None:
        """The highest op that was journaled, be it live or below the watermark; None when none was."""
        return max(self.journal.last_op or 0, self.journal.snapshot_op) or None

    @property
    def gap_op(self) -> int | None:
        """The first op above the applied ones that does not follow its predecessor, or None.

        Applying stops below it, and submit() refuses, until somebody journals what is missing. Looks at
        every entry that is not applied.
        """
        last = self.last_journaled_op or 0
        op = self._applied + 1
        while op <= last:
            if op in self.journal:
                op += 1
            elif op <= self._applied:  # applied meanwhile, and checkpointed away
                op = self._applied + 1
            else:
                return next((entry.op for entry in self.journal.entries(op, last)), last + 1)
        return None

    @property
    def should_checkpoint(self) -> bool:
        """Whether the journal is so full that a checkpoint is due (64 appends before it refuses)."""
        return self.coordinator.should_checkpoint

    # --- work -------------------------------------------------------------------------------------

    def submit(self, payload: Buffer, *, kind: int = 0) -> Any:
        """Journals one entry, applies all up to it, and returns what apply() returned for it.

        `payload`, `kind` and how durable it is at return: as in Journal.append. Entries not applied yet
        (above recover()'s `commit_op`) come first. Blocks for the disk and for apply(). Thread-safe.

        Raises what Journal.append raises (JournalFullError: checkpoint, then submit again); what apply()
        raised for this entry; StateMachineError when apply() failed before, or, with nothing journaled,
        when a MuxStateMachine has no machine for `kind`; JournalError while gap_op is set, or when what is
        journaled cannot be read. That, and what an interrupt leaves, is applied in its turn, by anyone.
        """
        self._refuse()
        if self._accepts is not None and not self._accepts(integer("kind", kind, 0, fmt.KIND_MAX)):
            raise StateMachineError(f"no machine has kind {kind}; nothing was journaled")
        self._refuse_unfit_journal()
        me = threading.get_ident()
        try:
            with self._guard:
                self._submitting[me] = self._applied
            op = self.journal.append(payload, kind=kind)
            outcome = self._alone(lambda: self._outcome_of(op))
        finally:
            self._leave(me)
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def commit(self, op: int) -> None:
        """Applies what is journaled up to `op`, as far as there is no gap. Blocks for those who apply.

        Raises StateMachineError when apply() fails, now or before; TypeError and ValueError for what is
        no op; what reading the journal raises. Thread-safe.
        """
        target = integer("op", op, 0, fmt.OP_MAX)
        self._refuse()
        self._alone(lambda: self._advance(target))

    def checkpoint(self) -> Snapshot:
        """Makes the state as it is now the one to recover from, and gives the journal's space back.

        The state is copied between two applications; while it is persisted, submits go on. See
        SnapshotCoordinator.checkpoint for what happens in which order, and what is raised; also
        StateMachineError when apply() failed before, and what the machine's snapshot() raises.
        """
        self._refuse()
        return self.coordinator.checkpoint_from(lambda: self._alone(self._take))

    def close(self) -> None:
        """Closes the journal and the snapshots, after the application that is under way. Twice is fine.

        Views of entries and snapshots stay right. Raises what Journal.close raises, after letting go of
        everything. In a forked child it does nothing.
        """
        if os.getpid() != self._pid:
            return
        self._refuse_callback()
        with self._lock:
            self._closed = True
        try:
            self.journal.close()
        finally:
            self.snapshots.close()

    # --- applying ---------------------------------------------------------------------------------

    def _alone(self, work: Callable[[], T]) -> T:
        """Runs what calls the machine, one thread at a time."""
        with self._lock:
            self._owner = threading.get_ident()
            try:
                return work()
            finally:
                self._owner = 0

    def _take(self) -> tuple[int, bytes]:
        self._refuse_half_applied()
        return self._applied, copy_of(self.machine.snapshot())

    def _outcome_of(self, op: int) -> _Outcome:
        """What came of an entry that this thread has journaled: from another thread, or made now."""
        with self._guard:
            outcome = self._results.pop(op, None)
        if outcome is None:
            try:
                outcome = self._advance(op, own=op)
            except OSError as e:  # which would say that nothing was journaled
                raise JournalError(f"op {op} is journaled, but cannot be read and applied now") from e
        if outcome is None:
            raise JournalError(f"op {op} is journaled, but does not follow op {self._applied}, applied last")
        return outcome

    def _advance(self, target: int, *, own: int = 0) -> _Outcome | None:
        """Applies up to `target`, or up to a gap. The outcome of `own`, if it was among them."""
        self._refuse_half_applied()
        outcome = None
        for entry in self._journaled(target):
            if entry.op != self._applied + 1:
                break
            outcome = self._apply(entry, entry.op == own)
        return outcome if self._applied == own else None

    def _journaled(self, target: int) -> Iterator[Entry]:
        first = self._applied + 1
        if target - first >= _FEW:
            yield from self.journal.entries(first, target)
            return
        for op in range(first, target + 1):
            entry = self.journal.get(op)
            if entry is None:
                return
            yield entry

    def _apply(self, entry: Entry, own: bool) -> _Outcome:
        op = entry.op
        self._halfway = op
        try:
            outcome = _Outcome(self.machine.apply(entry), None)
        except BaseException as e:
            self._failure = (op, e)
            if own or not isinstance(e, Exception):
                raise
            self._keep(op, _Outcome(None, e))
            raise self._failed() from e
        if not own:
            self._keep(op, outcome)
        self._applied = op  # from here on nobody applies it again
        self._halfway = 0
        return outcome

    def _keep(self, op: int, outcome: _Outcome) -> None:
        """For whoever submitted the entry, if any other thread is in submit() at all."""
        with self._guard:
            if len(self._submitting) > (threading.get_ident() in self._submitting):
                self._results[op] = outcome

    def _leave(self, thread: int) -> None:
        """Drops the results that nobody will ask for: those of interrupted and of direct appends."""
        with self._guard:
            self._submitting.pop(thread, None)
            lowest = min(self._submitting.values(), default=fmt.OP_MAX)
            for op in [op for op in self._results if op <= lowest]:
                del self._results[op]

    # --- refusing ---------------------------------------------------------------------------------

    def _refuse(self) -> None:
        if os.getpid() != self._pid:  # before any lock: the parent may have held it at the fork
            raise ForkedError("the replica belongs to the parent process")
        if self._closed:
            raise ClosedError("the replica is closed")
        self._refuse_callback()
        if self._failure is not None:
            raise self._failed() from self._failure[1]

    def _refuse_callback(self) -> None:
        if self._owner == threading.get_ident():
            raise StateMachineError("a state machine must not call back into its replica")

    def _refuse_half_applied(self) -> None:
        """Under the lock: whoever held it before may have been interrupted inside apply()."""
        if self._failure is None and self._halfway:
            self._failure = (self._halfway, None)
        if self._failure is not None:
            raise self._failed() from self._failure[1]

    def _refuse_unfit_journal(self) -> None:
        """Before an entry is journaled that could not be applied."""
        applied = self._applied  # read first: the journal is always ahead of it
        if self.journal.last_op == applied:
            return
        if (self.last_journaled_op or 0) < applied:
            raise StateMachineError(f"op {applied} is applied and was cut from the journal: recover again")
        if (gap := self.gap_op) is not None:
            raise JournalError(
                f"there is a gap below op {gap}: give journal.append() what is missing behind op {applied}, "
                f"then commit(); or take back all behind it with journal.truncate_from({gap})"
            )

    def _failed(self) -> StateMachineError:
        op = self._failure[0] if self._failure is not None else self._halfway
        return StateMachineError(
            f"apply() of op {op} failed, the state may be half changed: recover again. Where that fails too, "
            f"mend the machine, or recover(commit_op={op - 1}) and take back all from there with "
            f"journal.truncate_from({op})"
        )


# --- recovery ---------------------------------------------------------------------------------------


def recover(
    path: str | os.PathLike[str], machine: StateMachine, *, commit_op: int | None = None,
    **journal_options: Any,
) -> Replica:  # fmt: skip
    """Opens the journal at `path` and brings `machine`, which must be new, to its end.

    Restores the snapshot that the superblock is paired with, then applies the entries above it in op
    order, up to `commit_op` (None: all that is journaled), and no further than a gap, which
    ``Replica.gap_op`` tells. A snapshot above `commit_op` is restored all the same. Snapshots that the
    superblock does not name are of checkpoints that did not happen, and are ignored. They are kept in
    ``<path>/snapshots``, made if missing. `journal_options` are those of Journal; with `storage` the
    snapshots live in its subdirectory.

    Raises SnapshotError when the paired snapshot is missing, or entries above it are gone (the
    watermark was moved without a checkpoint): the state cannot be rebuilt; SnapshotCorruptError when it
    is damaged or another one; IncompatibleFormatError; StateMachineError, which names the op, when
    restore() or apply() fails; what Journal raises; TypeError and ValueError for a bad `commit_op` or
    ``readonly``. The journal is closed then. Blocks for reading everything.
    """
    if commit_op is not None:
        commit_op = integer("commit_op", commit_op, 0, fmt.OP_MAX)
    if journal_options.get("readonly"):
        raise ValueError("a replica writes: it cannot be recovered readonly")
    with contextlib.ExitStack() as undo:
        journal = Journal(path, **journal_options)
        undo.callback(journal.close)
        directory = journal.directory.subdirectory(fmt.SNAPSHOTS_NAME)
        undo.callback(directory.close)
        journal.directory.sync()
        snapshots = SnapshotStore(f"{journal.directory}/{fmt.SNAPSHOTS_NAME}", storage=directory)
        replica = Replica(journal, snapshots, machine, applied_op=_restore(journal, snapshots, machine))
        replica.commit(fmt.OP_MAX if commit_op is None else commit_op)
        undo.pop_all()
    return replica


def _restore(journal: Journal, snapshots: SnapshotStore, machine: StateMachine) -> int:
    """The paired snapshot's state, if there is one; its op, or 0."""
    paired = journal.pairing
    base = paired[0] if paired is not None else 0
    if journal.snapshot_op > base:
        what = f"the snapshot is of op {base}" if paired is not None else "there is no snapshot"
        raise SnapshotError(
            f"{journal.directory}: the entries up to op {journal.snapshot_op} are gone and {what}: "
            "the state cannot be rebuilt"
        )
    if paired is not None:
        snapshots.protected_op = base
        snapshot = snapshots.load_paired(*paired)
        try:
            machine.restore(snapshot.data)
        except JournalError:
            raise
        except Exception as e:
            raise StateMachineError(f"restore() of the snapshot of op {base} failed") from e
    return base
