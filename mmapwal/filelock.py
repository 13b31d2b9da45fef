"""One process, and one object in it, has a journal: a lock on a file."""

from __future__ import annotations

import fcntl
import os
import threading
import weakref

from mmapwal.descriptor import Descriptor
from mmapwal.errors import LockedError

__all__ = ["FileLock"]

_taken: weakref.WeakValueDictionary[tuple[int, int], FileLock] = weakref.WeakValueDictionary()
_guard = threading.Lock()


class FileLock:
    """flock on a descriptor, which it takes over, and a list of what this process has, for file systems that
    mimic flock by locks that a process does not have against itself. LockedError or OSError: it is closed."""

    def __init__(self, fd: int, place: str) -> None:
        self._file: Descriptor | None = Descriptor(fd)
        self._pid = os.getpid()
        try:
            info = os.fstat(fd)
            key = info.st_dev, info.st_ino
            with _guard:
                other = _taken.get(key)
                if other is not None and other.is_held:
                    raise LockedError(f"{place}: this process has it open already")
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as e:
                    raise LockedError(f"{place}: another process has it open") from e
                _taken[key] = self
        except BaseException:
            self.release()
            raise

    @property
    def is_held(self) -> bool:
        """By this process: what a forked child has is a copy, and the parent's."""
        return self._file is not None and self._pid == os.getpid()

    def release(self) -> None:
        """Twice is fine. In a forked child it closes the copy and leaves the parent's flock where it is."""
        self._file = None  # one step, so an interrupt comes before it or behind it
