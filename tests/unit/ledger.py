"""A state machine that the tests can look into, and how they come by a replica of it."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mmapwal import Entry, Replica, recover

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
