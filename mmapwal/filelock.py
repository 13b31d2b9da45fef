"""One process, and one object in it, has a journal: a lock on a file."""

from __future__ import annotations

import fcntl
import os
import threading

from mmapwal.errors import LockedError

__all__ = ["FileLock"]

_held: dict[tuple[int, int], int] = {}
_guard = threading.Lock()


class FileLock:
    """flock on a descriptor, which it takes over, and a list of what this process has, for file systems that
    mimic flock by locks that a process does not have against itself. LockedError or OSError: it is closed."""

    def __init__(self, fd: int, place: str) -> None:
        self._fd = fd
        try:
            info = os.fstat(fd)
            self._key = (info.st_dev, info.st_ino)
            with _guard:
                if _held.get(self._key) == os.getpid():
                    raise LockedError(f"{place}: this process has it open already")
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as e:
                    raise LockedError(f"{place}: another process has it open") from e
                _held[self._key] = os.getpid()
        except BaseException:
            os.close(fd)
            raise

    def after_fork(self) -> None:
        """Closing a copy of the descriptor leaves the parent's flock where it is."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def release(self) -> None:
        """Twice is fine."""
        self.after_fork()
        with _guard:
            if _held.get(self._key) == os.getpid():
                del _held[self._key]
