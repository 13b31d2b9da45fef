"""Directories in memory that watch, hold up or fail the calls of a journal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmapwal import MemoryDirectory, SyncMethod
from mmapwal.testing import Call, InterposedDirectory

WAIT_S = 60.0
"""How long a test waits for what has to happen; it never does, unless something hangs."""


class Watched(InterposedDirectory):
    """Writes down every call with an effect as (kind, name), and stops at a gate that is closed.

    `on`: told of each call before it happens; what it raises, the call raises.
    """

    EFFECTS = frozenset({"create", "write", "write_sync", "truncate", "sync", "rename", "unlink", "dir_sync"})

    def __init__(self, inner: Any = None, sync_method: SyncMethod = SyncMethod.DSYNC) -> None:
        super().__init__(MemoryDirectory() if inner is None else inner)
        self.calls: list[tuple[str, str]] = []
        self.on: Callable[[Call], None] = lambda call: None
        self._method = sync_method

    def wrap_directory(self, inner: Any) -> InterposedDirectory:
        return InterposedDirectory(inner)

    def best_sync_method(self) -> SyncMethod:
        return self._method

    def intercept(self, call: Call) -> Any:
        if call.kind in self.EFFECTS:
            self.calls.append((call.kind, call.name))
            self.on(call)
        return call.run()


class Gate:
    """Holds up the first call that it is told of and that is wanted, until it is opened."""

    def __init__(self, wanted: Callable[[Call], bool]) -> None:
        self._wanted = wanted
        self.reached = threading.Event()
        self._opened = threading.Event()
        self.error: BaseException | None = None

    def __call__(self, call: Call) -> None:
        if not self.reached.is_set() and self._wanted(call):
            self.reached.set()
            assert self._opened.wait(WAIT_S)
            if self.error is not None:
                raise self.error

    def wait(self) -> None:
        assert self.reached.wait(WAIT_S)

    def open(self, error: BaseException | None = None) -> None:
        self.error = error
        self._opened.set()


class Task(threading.Thread):
    """Runs a call beside the test; `result()` gives or raises what it came to."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as e:  # noqa: BLE001  # the test's own thread raises it
            self.error = e

    def finish(self) -> BaseException | None:
        """Waits; the error that it ended with."""
        self.join(WAIT_S)
        assert not self.is_alive()
        return self.error

    def result(self) -> Any:
        if (error := self.finish()) is not None:
            raise error
        return self._result


@contextmanager
def held_up(directory: Watched, wanted: Callable[[Call], bool], call: Callable[[], Any]) -> Iterator[Task]:
    """The call runs in another thread up to the first effect that is wanted, and goes on at the end."""
    gate = Gate(wanted)
    directory.on = gate
    task = Task(call)
    try:
        gate.wait()
        yield task
    finally:
        gate.open()
        task.finish()
        directory.on = lambda call: None
