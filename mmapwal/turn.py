"""Whose turn it is to change a journal, and who must not take part in his own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from mmapwal.errors import BusyError

__all__ = ["Turn", "refuse_reentry"]


def refuse_reentry(lock: threading.RLock) -> None:
    """BusyError where this thread holds the lock already: who asks is a signal handler, or a finaliser, that
    came into a change. It would build on what the change below it is about to replace."""
    if lock._is_owned():  # type: ignore[attr-defined]  # as threading.Condition asks
        raise BusyError("this thread is within a change of the journal: call that again when it has returned")


class Turn:
    """Whose turn it is to shrink. Held by a token: wherever an interrupt arrives, whoever leaves knows
    whether it has the turn, and gives it back."""

    def __init__(self) -> None:
        self._holder: dict[str, tuple[object, int]] = {}
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, *, wait: bool) -> Iterator[None]:
        """BusyError when another has it and not `wait`, or when this very thread has it."""
        me = object()
        try:
            self._take(me, wait)
            yield
        finally:
            try:
                self._release(me)
            except BaseException:  # an interrupt on its way in
                self._release(me)
                raise

    def _take(self, me: object, wait: bool) -> None:
        mine = (me, threading.get_ident())
        while self._holder.setdefault("by", mine)[0] is not me:  # one step of the interpreter
            with self._freed:
                holder = self._holder.get("by")
                if holder is None:
                    continue
                if not wait or holder[1] == mine[1]:
                    raise BusyError("another drain, truncate_from, compact or checkpoint is under way")
                self._freed.wait()

    def _release(self, me: object) -> None:
        holder = self._holder.get("by")
        if holder is not None and holder[0] is me:
            with self._freed:
                self._holder.pop("by", None)
                self._freed.notify_all()
