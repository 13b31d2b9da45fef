"""Removing a long file without a stall for others. A file system mounted with `discard` may tell the
device of every block that is freed while it frees them: 16 MiB took 10 ms and more where this was
measured, and every sync of anybody stood behind it."""

from __future__ import annotations

import fcntl
import os
import time

__all__ = ["discard"]

STEP_BYTES = 1 << 20


def discard(dir_fd: int, name: str) -> None:
    """Unlinks the file, then frees its blocks from the end in steps, pausing after each for as long as it
    took. Only the unlinking can raise OSError.

    Where anyone else has the file open or mapped (a view, also in another process) it is left whole, and
    goes with the last of them: the kernel grants a write lease to nobody else's file, and without a name
    no one can open it any more.
    """
    try:
        fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=dir_fd)
    except OSError:  # whatever keeps it from being opened, it may still be unlinked
        os.unlink(name, dir_fd=dir_fd)
        return
    try:
        os.unlink(name, dir_fd=dir_fd)
        _free_in_steps(fd)
    finally:
        os.close(fd)


def _free_in_steps(fd: int) -> None:
    """Best effort: what is left is freed when the file is closed."""
    try:
        info = os.fstat(fd)
        if info.st_nlink != 0:  # another name of it stays
            return
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        for length in range(info.st_size - info.st_size % STEP_BYTES, -1, -STEP_BYTES):
            start = time.monotonic()
            os.ftruncate(fd, length)
            time.sleep(time.monotonic() - start)
    except OSError:
        return
