"""mmapwal: a durable journal for Python programs.

Append an entry, and when the call returns it survives a power cut; read any entry as a slice of a memory
mapping; after a crash get back exactly what was acknowledged; checkpoint a state machine and give the
space back.
"""

import logging
from typing import TYPE_CHECKING

from mmapwal.backup import BackupReport
from mmapwal.columns import Columns, Header
from mmapwal.errors import (
    BusyError,
    ClosedError,
    CorruptionError,
    DuplicateOpError,
    ExhaustedError,
    ForkedError,
    IncompatibleFormatError,
    JournalError,
    JournalFullError,
    LockedError,
    MissingOpError,
    PayloadTooLargeError,
    PersistStage,
    PoisonedError,
    ReadonlyError,
    SnapshotCorruptError,
    SnapshotError,
    SnapshotPersistError,
    StaleOpError,
    StateMachineError,
    TruncatedError,
)
from mmapwal.inspection import inspect
from mmapwal.journal import Journal, JournalStats
from mmapwal.machines import MuxStateMachine, StateMachine
from mmapwal.opening import Durability
from mmapwal.reader import Entry
from mmapwal.recovery import RecoveryReport, RecoveryRow
from mmapwal.repair import RepairReport, repair
from mmapwal.replica import Replica, SnapshotCoordinator, recover
from mmapwal.snapshot import Snapshot, SnapshotStore
from mmapwal.storage import (
    Directory,
    FileStorage,
    MappedStorage,
    MemoryDirectory,
    MemoryStorage,
    Storage,
    SyncMethod,
    SystemDirectory,
)
from mmapwal.verify import Problem, VerifyReport

if TYPE_CHECKING:
    from mmapwal.aio import AsyncJournal
else:

    def __getattr__(name: str) -> object:
        """AsyncJournal when it is first asked for: asyncio is a third of what the import would take."""
        if name != "AsyncJournal":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
        from mmapwal.aio import AsyncJournal

        return AsyncJournal

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__version__ = "0.1.0"

__all__ = [
    "AsyncJournal",
    "BackupReport",
    "BusyError",
    "ClosedError",
    "Columns",
    "CorruptionError",
    "Directory",
    "DuplicateOpError",
    "Durability",
    "Entry",
    "ExhaustedError",
    "FileStorage",
    "ForkedError",
    "Header",
    "IncompatibleFormatError",
    "Journal",
    "JournalError",
    "JournalFullError",
    "JournalStats",
    "LockedError",
    "MappedStorage",
    "MemoryDirectory",
    "MemoryStorage",
    "MissingOpError",
    "MuxStateMachine",
    "PayloadTooLargeError",
    "PersistStage",
    "PoisonedError",
    "Problem",
    "ReadonlyError",
    "RecoveryReport",
    "RecoveryRow",
    "RepairReport",
    "Replica",
    "Snapshot",
    "SnapshotCoordinator",
    "SnapshotCorruptError",
    "SnapshotError",
    "SnapshotPersistError",
    "SnapshotStore",
    "StaleOpError",
    "StateMachine",
    "StateMachineError",
    "Storage",
    "SyncMethod",
    "SystemDirectory",
    "TruncatedError",
    "VerifyReport",
    "inspect",
    "recover",
    "repair",
]

logging.getLogger("mmapwal").addHandler(logging.NullHandler())
