"""Every error that mmapwal raises on purpose. OSError is let through where no more can be said."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

__all__ = [
    "BusyError",
    "ClosedError",
    "CorruptionError",
    "DuplicateOpError",
    "ExhaustedError",
    "ForkedError",
    "IncompatibleFormatError",
    "JournalError",
    "JournalFullError",
    "LockedError",
    "MissingOpError",
    "PayloadTooLargeError",
    "PersistStage",
    "PoisonedError",
    "ReadonlyError",
    "SnapshotCorruptError",
    "SnapshotError",
    "SnapshotPersistError",
    "StaleOpError",
    "StateMachineError",
    "TruncatedError",
]


class JournalError(Exception):
    """Base of all errors of mmapwal."""


class CorruptionError(JournalError):
    """Acknowledged data is damaged. Nothing was changed.

    ``segment`` is the file's name, ``offset`` a byte in it, ``lsn`` the same place in the journal,
    ``op`` the entry where it is known. ``directory``, where opening it found that, is the journal's.
    """

    directory: str | None = None

    def __init__(self, segment: str, offset: int, lsn: int, op: int | None, reason: str) -> None:
        where = f"{segment} at byte {offset} (LSN {lsn}" + (f", op {op})" if op is not None else ")")
        super().__init__(f"{where}: {reason}")
        self.segment = segment
        self.offset = offset
        self.lsn = lsn
        self.op = op
        self.reason = reason

    def __str__(self) -> str:
        where = "" if self.directory is None else f"{self.directory}: "
        return where + super().__str__()


class JournalFullError(JournalError):
    """The slot that the op needs still holds another op above the watermark. Nothing was written. A
    checkpoint, set_snapshot_op() or drain() frees slots; how many there are is fixed for a journal."""


class ExhaustedError(JournalError):
    """A number that only grows is used up; the message names it. Nothing has happened, and what the journal
    holds can be read: copy it into a new one."""


class StaleOpError(JournalError):
    """The op is at or below the watermark. ``first_op``, told to a follower that fell behind it: the first op
    that can be followed."""

    def __init__(self, message: str, first_op: int | None = None) -> None:
        super().__init__(message)
        self.first_op = first_op


class DuplicateOpError(JournalError):
    """The op is live already, and ``replace`` was not given."""


class MissingOpError(JournalError, KeyError):
    """No live entry has this op."""

    def __init__(self, op: object) -> None:
        super().__init__(op)
        self.op = op

    def __str__(self) -> str:
        return f"no live entry has op {self.op!r}"


class PayloadTooLargeError(JournalError, ValueError):
    """A payload or a batch is above the journal's bound."""


class PoisonedError(JournalError):
    """A failure left memory and disk apart: the outcome of this call is unknown.

    The journal refuses everything until it is opened again. ``stage`` names the step that failed,
    ``__cause__`` is the error that it failed with.
    """

    def __init__(self, stage: str, message: str | None = None) -> None:
        super().__init__(message or f"the journal was poisoned by a failure in {stage}; open it again")
        self.stage = stage


class ClosedError(JournalError):
    """Used after close()."""


class LockedError(JournalError):
    """Another writer, in this process or another, has the journal."""


class ForkedError(JournalError):
    """A writer was used in a forked child. The parent's is unharmed."""


class ReadonlyError(JournalError):
    """The journal was opened to be read only."""


class BusyError(JournalError):
    """Another drain, truncate_from, compact, set_snapshot_op or checkpoint is under way."""


class IncompatibleFormatError(JournalError):
    """The files are of another format version, or were made with other fixed sizes."""


class SnapshotError(JournalError):
    """A snapshot is missing, or does not fit the journal."""


class SnapshotCorruptError(SnapshotError):
    """A snapshot file is damaged."""


class PersistStage(Enum):
    """How far a snapshot got, and so what can be done about it."""

    WRITE = "write"
    SYNC = "sync"
    RENAME = "rename"
    DIR_SYNC = "dir_sync"


class SnapshotPersistError(SnapshotError):
    """A snapshot could not be made durable. ``__cause__`` is why, ``stage`` where."""

    def __init__(self, stage: PersistStage, message: str, resume: Callable[[], None]) -> None:
        super().__init__(f"{stage.value}: {message}")
        self.stage = stage
        self._resume = resume

    def resume(self) -> None:
        """Finishes what was begun, from a copy of the data: no sync that failed is repeated.

        Raises SnapshotPersistError when it fails again. Blocks for the disk.
        """
        self._resume()


class StateMachineError(JournalError):
    """apply() failed before: the state may be half changed, and the replica refuses further work."""


class TruncatedError(JournalError):
    """An entry that was already given to a follower was removed by truncate_from."""

    def __init__(self, op: int) -> None:
        super().__init__(f"op {op} was truncated after it had been followed")
        self.op = op
