"""For tests of what is built on mmapwal: a disk that crashes, calls that fail.

`CrashDisk` is a directory in memory that writes down every effect. `assert_crash_safe` runs a scenario
on one, and then a check on the disks that a crash after each effect could have left: sectors, sizes
and names that no sync had covered may be there or not.

    from mmapwal import Journal
    from mmapwal.testing import assert_crash_safe

    def scenario(directory, acknowledge):
        with Journal("journal", storage=directory, slots=16, segment_bytes=16384) as journal:
            for _ in range(3):
                acknowledge(journal.append(b"entry"))

    def check(directory, acknowledged):
        with Journal("journal", storage=directory, slots=16, segment_bytes=16384) as journal:
            assert set(acknowledged) <= {entry.op for entry in journal}

    print(assert_crash_safe(scenario, check))

`FaultDirectory` wraps any directory, and makes one call fail (`FaultStorage` one file):

    for fault in every_fault(error=errno.ENOSPC):
        run(FaultDirectory(MemoryDirectory(), fault))     # until a run meets no failure

docs/TESTING.md is the guide, with what a state is and what is not modelled.
"""

from mmapwal.testing.disk import CrashDisk, CrashStorage
from mmapwal.testing.effects import SECTOR_BYTES, Effect, EffectKind
from mmapwal.testing.explore import CrashStats, assert_crash_safe
from mmapwal.testing.faults import (
    CALL_KINDS,
    Call,
    Fault,
    FaultDirectory,
    FaultStorage,
    InterposedDirectory,
    InterposedStorage,
    When,
    every_fault,
)

__all__ = [
    "CALL_KINDS",
    "SECTOR_BYTES",
    "Call",
    "CrashDisk",
    "CrashStats",
    "CrashStorage",
    "Effect",
    "EffectKind",
    "Fault",
    "FaultDirectory",
    "FaultStorage",
    "InterposedDirectory",
    "InterposedStorage",
    "When",
    "assert_crash_safe",
    "every_fault",
]
