"""Work that no signal handler interrupts: handlers run in the main thread only, so another one does it."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from mmapwal._native import ffi, lib

__all__ = ["uninterrupted"]

T = TypeVar("T")


class _Errand(Generic[T]):
    """What is to be done, and how it ended."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._result: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        """Without collecting garbage: a finaliser may want a lock of the thread that waits for this."""
        collects = gc.isenabled()
        gc.disable()
        try:
            self._result.append(self._work())
        except BaseException as e:  # noqa: BLE001  # for the thread that waits
            self._error = e
        finally:
            if collects:
                gc.enable()

    def outcome(self) -> T:
        error, self._error = self._error, None
        if error is None:
            return self._result[0]
        try:
            raise error
        finally:
            del error  # or its frames would keep it, and it them


@ffi.def_extern()  # type: ignore[untyped-decorator]
def mw_py_errand(errand: Any) -> None:
    ffi.from_handle(errand).run()


def uninterrupted(work: Callable[[], T]) -> T:
    """What `work()` returns or raises; once begun it goes on to its end, and the exception of a signal
    handler, KeyboardInterrupt too, comes behind it. Blocks as long as `work`.

    In the main thread `work` is done by another one, so it must take no lock that the caller holds. Where
    no thread can be had it is done as it is.
    """
    if threading.current_thread() is not threading.main_thread() or sys.is_finalizing():
        return work()
    errand = _Errand(work)
    handle = ffi.new_handle(errand)
    # One call of C: between two, a handler could leave the work behind without anyone to wait for it.
    if lib.mw_aside(lib.mw_py_errand, handle) != 0:
        return work()
    return errand.outcome()
