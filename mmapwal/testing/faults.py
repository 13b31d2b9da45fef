"""Failures on the seam: any Directory, with calls that fail, and the base for other wrappers of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from typing_extensions import Buffer

from mmapwal.storage import Directory, MemoryDirectory, Storage, SyncMethod

CALL_KINDS = frozenset(
    {"create", "open", "names", "rename", "unlink", "dir_sync", "sync_parent", "subdirectory", "lock"}
    | {"read", "write", "write_sync", "truncate", "sync", "view", "shared", "close"}
)
"""What calls are counted by. Storage.append is a "write", Directory.sync a "dir_sync"; "close" is a
storage's."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call on the seam. `name` is the file's. `run()` does it and returns what it returns."""

    kind: str
    name: str
    run: Callable[[], Any]
    storage: Storage | None = None
    offset: int = 0
    data: bytes = b""


class InterposedDirectory:
    """Wraps a Directory and all storages it hands out; each call passes through `intercept`."""

    def __init__(self, inner: Directory) -> None:
        self.inner = inner

    def intercept(self, call: Call) -> Any:
        """What a call comes to. This one runs it as it is."""
        return call.run()

    def wrap_directory(self, inner: Directory) -> InterposedDirectory:
        """The wrapper of a subdirectory. A subclass that keeps a state shares it here."""
        return type(self)(inner)

    @property
    def concurrent(self) -> bool:
        return self.inner.concurrent

    @concurrent.setter
    def concurrent(self, value: bool) -> None:
        self.inner.concurrent = value

    def __str__(self) -> str:
        return str(self.inner)

    def create(self, name: str) -> Storage:
        return InterposedStorage(self, name, self._do("create", name, self.inner.create))

    def open(
        self, name: str, *, writable: bool = False, sync_method: SyncMethod = SyncMethod.FDATASYNC
    ) -> Storage:
        def run() -> Storage:
            return self.inner.open(name, writable=writable, sync_method=sync_method)

        return InterposedStorage(self, name, self.intercept(Call("open", name, run)))

    def _do(self, kind: str, name: str, function: Callable[[str], Any]) -> Any:
        return self.intercept(Call(kind, name, lambda: function(name)))

    def names(self) -> list[str]:
        names: list[str] = self.intercept(Call("names", "", self.inner.names))
        return names

    def rename(self, old: str, new: str) -> None:
        self.intercept(Call("rename", new, lambda: self.inner.rename(old, new)))

    def unlink(self, name: str) -> None:
        self._do("unlink", name, self.inner.unlink)

    def sync(self) -> None:
        self.intercept(Call("dir_sync", "", self.inner.sync))

    def sync_parent(self) -> None:
        self.intercept(Call("sync_parent", "", self.inner.sync_parent))

    def subdirectory(self, name: str) -> Directory:
        return self.wrap_directory(self._do("subdirectory", name, self.inner.subdirectory))

    def lock(self, name: str) -> None:
        self._do("lock", name, self.inner.lock)

    def best_sync_method(self) -> SyncMethod:
        return self.inner.best_sync_method()

    def free_bytes(self) -> int | None:
        return self.inner.free_bytes()

    def after_fork(self) -> None:
        self.inner.after_fork()

    def close(self) -> None:
        self.inner.close()


class InterposedStorage:
    """A storage whose calls pass through its directory's `intercept`. Data is copied first: what the
    committer in C passes lives only as long as the call."""

    def __init__(self, directory: InterposedDirectory, name: str, inner: Storage) -> None:
        self.inner = inner
        self._directory = directory
        self._name = name
        self._closed = False

    def _do(self, kind: str, run: Callable[[], Any], offset: int = 0, data: bytes = b"") -> Any:
        return self._directory.intercept(Call(kind, self._name, run, self.inner, offset, data))

    def __len__(self) -> int:
        return len(self.inner)

    def read_at(self, offset: int, length: int) -> memoryview:
        data: memoryview = self._do("read", lambda: self.inner.read_at(offset, length), offset)
        return data

    def write_at(self, offset: int, data: Buffer) -> int:
        plain = memoryview(data).tobytes()
        return int(self._do("write", lambda: self.inner.write_at(offset, plain), offset, plain))

    def write_sync_at(self, offset: int, data: Buffer) -> int:
        plain = memoryview(data).tobytes()
        return int(self._do("write_sync", lambda: self.inner.write_sync_at(offset, plain), offset, plain))

    def append(self, data: Buffer) -> int:
        offset = len(self)
        self.write_at(offset, data)
        return offset

    def truncate(self, length: int) -> None:
        self._do("truncate", lambda: self.inner.truncate(length), length)

    def sync(self) -> None:
        self._do("sync", self.inner.sync)

    def view(self) -> memoryview:
        view: memoryview = self._do("view", self.inner.view)
        return view

    def shared(self) -> memoryview:
        view: memoryview = self._do("shared", self.inner.shared)
        return view

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._do("close", self.inner.close)


class When(Enum):
    """Where in a call the failure strikes."""

    BEFORE = "before"
    """Nothing of it was done. A sync has failed: on a CrashDisk no later sync makes up for it."""

    AFTER = "after"
    """All of it was done, and then an error was reported."""

    SHORT = "short"
    """A write has written the first half of its bytes, synced nothing. Others: BEFORE."""

    UNSYNCED = "unsynced"
    """A write-and-sync has written all bytes, and the sync failed. Others: BEFORE."""


class Fault:
    """A plan for a FaultDirectory: the `nth` call (from 1; of `kinds`, or any) fails with `error`.

    times: so many calls in a row fail, counted from the nth; None: all, until `lift()`.
    ValueError for a kind that there is none of, or nth < 1.

    After a run: `calls` is how many calls were counted, `struck` whether it has failed one, `where`
    which one that was.
    """

    def __init__(
        self,
        nth: int = 1,
        *,
        kinds: str | Collection[str] | None = None,
        error: int = errno.EIO,
        when: When = When.BEFORE,
        times: int | None = 1,
    ) -> None:
        self.kinds = CALL_KINDS if kinds is None else frozenset([kinds] if isinstance(kinds, str) else kinds)
        if not self.kinds <= CALL_KINDS or nth < 1:
            raise ValueError(f"no such calls: {nth} of {sorted(self.kinds)}")
        self.nth = nth
        self.error = error
        self.when = when
        self.times = times
        self.calls = 0
        self.where: str | None = None
        self._lifted = False

    def __repr__(self) -> str:
        at = f" ({self.where})" if self.where else ""
        return f"Fault({self.nth}{at}, {errno.errorcode.get(self.error, self.error)}, {self.when.value})"

    @property
    def struck(self) -> bool:
        return self.where is not None

    def lift(self) -> None:
        """No call fails from now on."""
        self._lifted = True

    def strikes(self, call: Call) -> bool:
        """Counts the call; whether it is to fail."""
        if call.kind not in self.kinds:
            return False
        self.calls += 1
        end = None if self.times is None else self.nth + self.times
        if self._lifted or self.calls < self.nth or (end is not None and self.calls >= end):
            return False
        if self.where is None:
            self.where = f"{call.kind} {call.name}".strip()
        return True


def every_fault(
    *,
    kinds: str | Collection[str] | None = None,
    error: int = errno.EIO,
    when: When = When.BEFORE,
    times: int | None = 1,
) -> Iterator[Fault]:
    """Faults for the first call, the second, and so on, until one did not strike: the run that went
    through it had no failure. `Fault` says what the arguments mean.

    >>> for fault in every_fault(kinds="sync"):
    ...     scenario(FaultDirectory(CrashDisk(), fault))
    """
    nth = 0
    while True:
        nth += 1
        fault = Fault(nth, kinds=kinds, error=error, when=when, times=times)
        yield fault
        if not fault.struck:
            return


class FaultDirectory(InterposedDirectory):
    """A Directory whose calls fail as `plan` says, with OSError. Everything else is as `inner` does it."""

    def __init__(self, inner: Directory, plan: Fault) -> None:
        super().__init__(inner)
        self.plan = plan

    def wrap_directory(self, inner: Directory) -> FaultDirectory:
        return FaultDirectory(inner, self.plan)

    def intercept(self, call: Call) -> Any:
        if not self.plan.strikes(call):
            return call.run()
        when, storage = self.plan.when, call.storage
        if when is When.AFTER or call.kind == "close":  # a close that fails has closed
            self._undo(call.run())
        elif storage is not None and call.kind in {"write", "write_sync"}:
            if when is When.SHORT:
                storage.write_at(call.offset, call.data[: len(call.data) // 2])
            elif when is When.UNSYNCED and call.kind == "write_sync":
                storage.write_at(call.offset, call.data)
                self._fail_sync(storage)
        elif storage is not None and call.kind == "sync":
            self._fail_sync(storage)
        raise OSError(self.plan.error, os.strerror(self.plan.error), call.name)

    @staticmethod
    def _undo(result: Any) -> None:
        """What nobody will get is closed."""
        if isinstance(result, Storage):
            result.close()

    @staticmethod
    def _fail_sync(storage: Storage) -> None:
        fail = getattr(storage, "fail_sync", None)
        if fail is not None:
            fail()


class FaultStorage(InterposedStorage):
    """One Storage whose calls fail as `plan` says: what a FaultDirectory opens, for a storage that is there
    already. `name` is what its errors name."""

    def __init__(self, inner: Storage, plan: Fault, name: str = "storage") -> None:
        super().__init__(FaultDirectory(MemoryDirectory(), plan), name, inner)
