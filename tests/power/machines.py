"""A replica that submits while it checkpoints, with a state that is known from how many entries are in it.

Run as a program it lives: it recovers what is there and goes on. It notes when a submit begins (+) and
returns (-), and when a checkpoint begins (c) and which op it was of (C).
"""

from __future__ import annotations

import itertools
import os
import random
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mmapwal import Entry, JournalFullError, Replica, SyncMethod, recover
from mmapwal import format as fmt
from mmapwal.storage import MappedStorage, SystemDirectory

OPTIONS: dict[str, Any] = {"segment_bytes": 16384, "slots": 512}
_STATE = struct.Struct("<QI")


def payload(number: int) -> bytes:
    return (b"command %d; " % number * 90)[: 12 + number * 397 % 1000]


def filler(number: int) -> bytes:
    """So that a snapshot is of several pages."""
    return random.Random(number).randbytes(9000 + number * 61 % 5000)


class Chain:
    """Counts, and folds all that it took in their order."""

    def __init__(self) -> None:
        self.count = self.fold = 0

    def apply(self, entry: Entry) -> int:
        self.count += 1
        self.fold = fmt.crc32c(bytes(entry.payload), self.fold)
        return self.count

    def snapshot(self) -> bytes:
        return _STATE.pack(self.count, self.fold) + filler(self.count)

    def restore(self, snapshot: memoryview) -> None:
        self.count, self.fold = _STATE.unpack_from(snapshot)
        if snapshot[_STATE.size :] != filler(self.count):
            raise ValueError(f"not a snapshot of {self.count} commands")


def fold_of(count: int) -> int:
    """What a chain holds after the first so many commands."""
    fold = 0
    for number in range(1, count + 1):
        fold = fmt.crc32c(payload(number), fold)
    return fold


class _UnsyncedStorage(MappedStorage):
    def sync(self) -> None:
        """Says that it was done."""


class UnsyncedSnapshots(SystemDirectory):
    """Whose snapshots are not made durable; whoever looks must find the loss."""

    def subdirectory(self, name: str) -> SystemDirectory:
        return SystemDirectory(self.path / name, storage=_UnsyncedStorage)


def submit(replica: Replica, numbers: range) -> None:
    for number in numbers:
        os.write(1, b"+%d\n" % number)
        while True:
            try:
                replica.submit(payload(number))
                break
            except JournalFullError:  # the other thread makes room
                time.sleep(0.001)
        os.write(1, b"-%d\n" % number)


def checkpoint(replica: Replica) -> None:
    for turn in itertools.count():
        os.write(1, b"c%d\n" % turn)
        snapshot = replica.checkpoint()
        os.write(1, b"C%d\n" % snapshot.op)


def live(path: Path, count: int, method: SyncMethod, *how: str) -> None:
    storage = UnsyncedSnapshots(path) if "unsynced" in how else None
    replica = recover(path, Chain(), sync_method=method, storage=storage, **OPTIONS)
    machine: Any = replica.machine
    threading.Thread(target=checkpoint, args=(replica,), daemon=True).start()
    submit(replica, range(machine.count + 1, machine.count + 1 + count))
    os._exit(0)


if __name__ == "__main__":
    live(Path(sys.argv[1]), int(sys.argv[2]), SyncMethod(sys.argv[3]), *sys.argv[4:])
