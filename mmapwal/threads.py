"""Threads of the journal's own: how many may share a work, one for a part of it, those that stay."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from mmapwal.storage import Directory

__all__ = ["SecondThread", "start_thread", "threads_for"]

P = ParamSpec("P")
T = TypeVar("T")


def threads_for(directory: Directory) -> int:
    """How many threads may share a long piece of work on it: two, where it allows threads and there is a
    second processor."""
    return 2 if directory.concurrent and len(os.sched_getaffinity(0)) > 1 else 1


def start_thread(name: str, run: Callable[..., None], *args: Any) -> threading.Thread:
    """One that stays, and that nobody waits for at the end of the process. OSError: none can be had."""
    thread = threading.Thread(target=run, args=args, name=f"mmapwal-{name}", daemon=True)
    try:
        thread.start()
    except RuntimeError as e:
        raise OSError(errno.EAGAIN, f"no thread can be had: {e}", thread.name) from e
    return thread


class SecondThread:
    """Does parts of a work, one after the other, beside its caller. The end of a `with` waits for them."""

    def __init__(self, name: str) -> None:
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(1, f"mmapwal-{name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, part: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Where no thread can be had, or the interpreter ends, the part is done at return."""
        if self._pool is not None:
            try:
                return self._pool.submit(part, *args, **kwargs)
            except RuntimeError:
                self._pool = None  # which has the part in its queue, and would do it again
        done: Future[T] = Future()
        try:
            done.set_result(part(*args, **kwargs))
        except BaseException as e:  # noqa: BLE001  # for who asks for the result
            done.set_exception(e)
        return done
