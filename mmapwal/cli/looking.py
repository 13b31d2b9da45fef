"""Opening a journal only to look at it: what opening changes is changed in memory alone.

A read-only journal shows what is proven to be durable, which after a power cut may be less than what was
acknowledged: only a recovery finds all of that, and tells what there was to find.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

from mmapwal import Journal, MemoryStorage, SyncMethod, SystemDirectory
from mmapwal.cli.opening import open_journal
from mmapwal.descriptor import Descriptor
from mmapwal.filelock import FileLock
from mmapwal.storage import Storage

__all__ = ["UnchangedDirectory", "look_into"]


def look_into(path: Path) -> Journal:
    """Opens and recovers it in memory, and has its lock, so that nobody writes it meanwhile; no file of it
    changes. Errors as of open_journal()."""
    return open_journal(path, create=False, storage=UnchangedDirectory(path))


class _PrivateStorage(MemoryStorage):
    """A file whose pages are copied when they are written to."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        if os.fstat(fd).st_size:
            self._data = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)  # type: ignore[assignment]


class UnchangedDirectory(SystemDirectory):
    """A directory of the file system that stays as it is: what is done to its files is done to copies."""

    concurrent = False

    def __init__(self, path: str | os.PathLike[str], *, follow_links: bool = True) -> None:
        super().__init__(path, create=False, follow_links=follow_links)
        self._changed: dict[str, Storage | None] = {}  # None: it is gone

    def create(self, name: str) -> Storage:
        file = self._changed[name] = MemoryStorage()
        return file

    def open(
        self, name: str, *, writable: bool = False, sync_method: SyncMethod = SyncMethod.FDATASYNC
    ) -> Storage:
        if name not in self._changed and not writable:
            return super().open(name)
        if name not in self._changed:
            with Descriptor(self._open_file(name, os.O_RDONLY | os.O_NONBLOCK)) as fd:
                self._changed[name] = _PrivateStorage(fd)
        file = self._changed[name]
        if file is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return file

    def names(self) -> list[str]:
        kept = [name for name in super().names() if name not in self._changed]
        return sorted(kept + [name for name, file in self._changed.items() if file is not None])

    def rename(self, old: str, new: str) -> None:
        self._changed[new] = self.open(old, writable=True)
        self._changed[old] = None

    def unlink(self, name: str) -> None:
        if name not in self.names():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        self._changed[name] = None

    def discard(self, name: str) -> None:
        self.unlink(name)

    def sync(self) -> None:
        """There is nothing to make durable."""

    def sync_parent(self) -> None:
        """As sync()."""

    def subdirectory(self, name: str) -> UnchangedDirectory:
        return UnchangedDirectory(self.path / name, follow_links=False)

    def lock(self, name: str) -> None:
        """That of the file, if there is one: without it nobody has the journal open."""
        try:
            self._lock = FileLock(self._open_lock(name), str(self.path))
        except FileNotFoundError:
            return

    def _open_lock(self, name: str) -> int:
        try:
            return self._open_file(name, os.O_RDWR)
        except OSError as e:
            if e.errno not in {errno.EACCES, errno.EPERM, errno.EROFS}:
                raise
            return self._open_file(name, os.O_RDONLY)
