"""What storages and directories may offer beside the two protocols, and how the system's files do it."""

from __future__ import annotations

import fcntl
import os
import time
from typing import Any, Protocol

__all__ = ["DirectoryExtras", "StorageExtras", "copy_blocks", "discard"]

EXT, XFS, BTRFS, TMPFS = 0xEF53, 0x58465342, 0x9123683E, 0x01021994  # statfs(2)
SHARES_BLOCKS = {XFS, BTRFS}  # elsewhere a copy in the kernel was no faster than a write
LEASES_SEE_MAPPINGS = {EXT, XFS, BTRFS}  # overlayfs maps another file than the one that was opened
BLOCK_BYTES = 4096
STEP_BYTES = 1 << 20


class StorageExtras(Protocol):
    """What a storage may offer beside; who has none of it is not asked."""

    def start_writeback(self, offset: int, length: int) -> None:
        """A hint: these bytes may go to the device from now on, so that the next sync has less to wait
        for. Does not wait, makes nothing durable, raises nothing: the sync tells."""

    def copy_from(self, source: Any, offset: int, length: int) -> int:
        """As a write of the bytes that another storage has at the same place, where that is cheaper (by
        sharing blocks). `offset` and `length` are multiples of 4096. How many bytes from `offset` on
        were copied, also a multiple; 0 where it is no use. OSError as a write."""


class DirectoryExtras(Protocol):
    """What a directory may offer beside; who has none of it is not asked."""

    def discard(self, name: str) -> None:
        """As unlink(), but takes its time: the blocks go in small steps, so that others on the device
        do not wait for all of them. Views of the file stay right."""

    def identity(self, name: str) -> object:
        """Another one when another file has taken the name, of those that somebody maps. None: no file."""


def copy_blocks(from_fd: int, to_fd: int, offset: int, length: int) -> int:
    """copy_file_range at one place of both; how many bytes, in whole blocks. What it refuses, a write
    may still do, and says better what is wrong."""
    done = 0
    while done < length:
        at = offset + done
        try:
            copied = os.copy_file_range(from_fd, to_fd, length - done, at, at)
        except OSError:
            break
        if copied == 0:
            break
        done += copied
    return done - done % BLOCK_BYTES


def discard(dir_fd: int, name: str, *, in_steps: bool) -> None:
    """A file system mounted with `discard` may tell the device of every block that is freed while it frees
    them: 16 MiB took 10 ms and more where this was measured, and every sync of anybody stood behind it.

    So this unlinks the file, then frees its blocks from the end in steps, pausing after each for as long as
    it took. Only the unlinking can raise OSError.

    Where anyone else has the file open or mapped (a view, also in another process) it is left whole, and
    goes with the last of them: the kernel grants a write lease to nobody else's file, and without a name
    no one can open it any more. `in_steps` only on a file system where such a lease sees mappings.
    """
    try:
        fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=dir_fd)
    except OSError:  # whatever keeps it from being opened, it may still be unlinked
        os.unlink(name, dir_fd=dir_fd)
        return
    try:
        os.unlink(name, dir_fd=dir_fd)
        if in_steps:
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
