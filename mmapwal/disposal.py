"""Files that no superblock names any more: they go in the background, since freeing blocks takes time."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable

from mmapwal.storage import Directory
from mmapwal.threads import start_thread

log = logging.getLogger("mmapwal")

__all__ = ["Disposal", "remove_file"]


def remove_file(unlink: Callable[[str], None], name: str) -> bool:
    """Whether it is gone. What fails is tried again at the next open."""
    try:
        unlink(name)
    except OSError as e:
        log.info("%s could not be removed: %s", name, e)
        return False
    return True


class Disposal:
    """Removes files one after the other, in a thread of its own where the directory allows threads.

    Only for names that no superblock, present or later, will name: nobody waits before making a file.
    A crash leaves the rest to the next open.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._remove: Callable[[str], None] = getattr(directory, "discard", directory.unlink)
        self._names: deque[str] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def add(self, names: Iterable[str]) -> None:
        """Does not block, unless the directory wants everything on the caller's thread."""
        if not self._directory.concurrent:
            for name in names:
                remove_file(self._remove, name)
            return
        with self._changed:
            self._names.extend(names)
        self._start()

    def _start(self) -> bool:
        """Whether somebody is at work on what there is. Where no thread can be had nothing waits for one: the
        next call tries again, or the next open removes them."""
        with self._changed:
            if self._thread is None and self._names and not self._stopped:
                try:
                    self._thread = start_thread("remove", self._run)
                except OSError as e:
                    log.info("%s could not be removed: %s", self._names[0], e)
                    return False
            return True

    def _run(self) -> None:
        done = False
        while not done:
            done = True  # also when the removal raises what is no OSError
            try:
                remove_file(self._remove, self._names[0])
                done = False
            finally:
                with self._changed:
                    self._names.popleft()
                    if done or self._stopped or not self._names:
                        done = True
                        self._thread = None
                        self._changed.notify_all()

    @property
    def pending(self) -> int:
        """How many files are still to go."""
        return len(self._names)

    def wait(self) -> bool:
        """Blocks until all are gone; whether there were any."""
        waited = False
        with self._changed:
            while self._names and not self._stopped and self._start():
                waited = True
                self._changed.wait_for(lambda: self._thread is None)
        return waited

    def stop(self) -> None:
        """The rest is left to the next open. Waits for the one under way."""
        with self._changed:
            self._stopped = True
            if self._thread is not threading.current_thread():  # a finaliser may run anywhere
                self._changed.wait_for(lambda: self._thread is None)
