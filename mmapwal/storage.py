"""The one seam to the outside world: all effects on files go through Storage and Directory.

Three kinds: mapped files (the journal's own), plain files, memory. Anything else that keeps the two
protocols works too: a recorder, a fault injector, a disk that tears writes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from typing_extensions import Buffer

from mmapwal._native import ffi, lib
from mmapwal.descriptor import DIRECTORY_FLAGS, Descriptor
from mmapwal.errors import ClosedError, LockedError
from mmapwal.extras import EXT, LEASES_SEE_MAPPINGS, SHARES_BLOCKS, TMPFS, XFS, copy_blocks, discard
from mmapwal.filelock import FileLock

__all__ = [
    "Directory",
    "FileStorage",
    "MappedStorage",
    "MemoryDirectory",
    "MemoryStorage",
    "Storage",
    "SyncMethod",
    "SystemDirectory",
]


class SyncMethod(Enum):
    """How a commit becomes durable."""

    AUTO = "auto"
    DSYNC = "dsync"
    FDATASYNC = "fdatasync"
    MSYNC = "msync"


@runtime_checkable
class Storage(Protocol):
    """The bytes of one file. Offsets and lengths in bytes; every failure is an OSError.

    A write that fails may have written a part. `sync` covers all that was written through this
    object; `write_sync_at` makes its own bytes durable and no others. One thread at a time may
    write, sync, truncate or close; reading goes on beside it.
    """

    def read_at(self, offset: int, length: int) -> memoryview:
        """A copy of the bytes; fewer where the file ends."""

    def write_at(self, offset: int, data: Buffer) -> int:
        """Writes all of `data`, growing the file where needed. How many bytes. `data` is the caller's again
        at return, and may change then."""

    def write_sync_at(self, offset: int, data: Buffer) -> int:
        """The same, durable at return, for these bytes only."""

    def append(self, data: Buffer) -> int:
        """Writes at the end; the offset it was written at."""

    def truncate(self, length: int) -> None:
        """Cuts the file, or grows it with a hole. Not while a view is held."""

    def sync(self) -> None:
        """Makes durable all that was written through this object, and the size. Blocks."""

    def view(self) -> memoryview:
        """Read-only: the mapping, or what stands for it. Writes through this object are seen in it."""

    def shared(self) -> memoryview:
        """Writable: stores reach the file at the latest when it is synced."""

    def close(self) -> None:
        """Gives the descriptor back. Views stay right. Twice is fine."""

    def __len__(self) -> int: ...


@runtime_checkable
class Directory(Protocol):
    """The files of one journal. Names are plain file names; every failure is an OSError."""

    concurrent: bool
    """Whether background threads may work on it; if not, all happens on the caller's thread."""

    def __str__(self) -> str: ...

    def create(self, name: str) -> Storage:
        """An empty file, open for writing; one of that name that was there is replaced."""

    def open(
        self, name: str, *, writable: bool = False, sync_method: SyncMethod = SyncMethod.FDATASYNC
    ) -> Storage:
        """FileNotFoundError when there is none."""

    def names(self) -> list[str]:
        """What is there, sorted."""

    def rename(self, old: str, new: str) -> None:
        """Atomic; replaces `new`. Not durable before sync()."""

    def unlink(self, name: str) -> None: ...

    def sync(self) -> None:
        """Makes creations, renames and unlinks durable. Blocks."""

    def sync_parent(self) -> None:
        """Makes the directory's own name durable. Blocks."""

    def subdirectory(self, name: str) -> Directory:
        """The directory of that name, made if missing; its name is durable after sync()."""

    def lock(self, name: str) -> None:
        """Takes the writer's lock until close(); LockedError when another has it."""

    def best_sync_method(self) -> SyncMethod:
        """What SyncMethod.AUTO stands for here."""

    def free_bytes(self) -> int | None:
        """Space left for this user, or None where that has no meaning."""

    def after_fork(self) -> None:
        """In a forked child: lets go of the lock's descriptor without unlocking."""

    def close(self) -> None: ...


def _check(result: int, name: str) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result), name)
    return result


def _plain(data: Buffer) -> Any:
    return data if type(data) is bytes else ffi.from_buffer(data)


def _length(data: Buffer) -> int:
    return len(data) if type(data) is bytes else memoryview(data).nbytes


# --- files of the system --------------------------------------------------------------------------


class Mapping:
    """One mmap. It is unmapped when neither this object nor any view of it is left."""

    def __init__(self, fd: int, length: int, *, writable: bool, name: str) -> None:
        address = ffi.new("void **")
        _check(lib.mw_map(fd, length, writable, address), name)
        self.address = ffi.gc(address[0], partial(lib.mw_unmap, length))  # no bytecode: no interrupt
        self.length = length
        whole = memoryview(ffi.buffer(self.address, length))
        self.view = whole if writable else whole.toreadonly()


class _SystemFile:
    """What the two storages on real files share: one descriptor, and the C helper's calls on it."""

    def __init__(self, fd: int, name: str, sync_method: SyncMethod) -> None:
        method = {SyncMethod.DSYNC: lib.MW_DSYNC, SyncMethod.MSYNC: lib.MW_MSYNC}
        self._name = name
        fields = {"fd": fd, "dsync_fd": -1, "method": method.get(sync_method, lib.MW_FDATASYNC)}
        self._file = ffi.gc(ffi.new("struct mw_file *", fields), lib.mw_file_close)  # as above: no interrupt
        self._io: Any = None
        self._shared: Mapping | None = None

    def __len__(self) -> int:
        return os.fstat(self._file.fd).st_size

    def read_at(self, offset: int, length: int) -> memoryview:
        data = bytearray(max(0, min(length, len(self) - offset)))
        if data:
            done = lib.mw_file_read(self._file, offset, ffi.from_buffer(data), len(data))
            del data[_check(done, self._name) :]
        return memoryview(data).toreadonly()

    def write_at(self, offset: int, data: Buffer) -> int:
        length = _length(data)
        _check(lib.mw_file_write(self._file, offset, _plain(data), length), self._name)
        return length

    def write_sync_at(self, offset: int, data: Buffer) -> int:
        length = _length(data)
        _check(lib.mw_file_write_sync(self._file, offset, _plain(data), length), self._name)
        return length

    def append(self, data: Buffer) -> int:
        offset = len(self)
        self.write_at(offset, data)
        return offset

    def truncate(self, length: int) -> None:
        os.ftruncate(self._file.fd, length)

    def sync(self) -> None:
        if self._shared is not None:
            _check(lib.mw_map_sync(self._shared.address, self._shared.length), self._name)
        _check(lib.mw_file_sync(self._file), self._name)

    def start_writeback(self, offset: int, length: int) -> None:
        """StorageExtras.start_writeback()"""
        lib.mw_fd_start_writeback(self._file.fd, offset, length)

    def _outgrew(self, mapping: Mapping) -> bool:
        """Whether the file is longer than its mapping; views of that keep it."""
        return self._file.fd >= 0 and mapping.length < len(self)

    def shared(self) -> memoryview:
        if self._shared is None or self._outgrew(self._shared):
            self._shared = Mapping(self._file.fd, len(self), writable=True, name=self._name)
        return self._shared.view

    def close(self) -> None:
        _check(lib.mw_file_close(self._file), self._name)


class MappedStorage(_SystemFile):
    """pwrite and a read-only mapping: the journal's own."""

    def __init__(self, fd: int, name: str, sync_method: SyncMethod, *, path: Path | None = None) -> None:
        super().__init__(fd, name, sync_method)
        self._mapping: Mapping | None = None
        if sync_method is SyncMethod.MSYNC:
            self.shared()
        elif sync_method is SyncMethod.DSYNC and path is not None and lib.mw_has_rwf_dsync(fd) != 1:
            self._file.dsync_fd = _check(
                lib.mw_open(-100, os.fsencode(path), os.O_WRONLY | os.O_DSYNC, 0), name
            )

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self._mapping = None  # the next view is of the new length

    def view(self) -> memoryview:
        if self._mapping is None or self._outgrew(self._mapping):
            self._mapping = Mapping(self._file.fd, len(self), writable=False, name=self._name)
        return self._mapping.view

    def shared(self) -> memoryview:
        view = super().shared()
        if self._shared is not None and self._file.method == lib.MW_MSYNC:
            if self._file.map == ffi.NULL and lib.mw_fs_type(self._file.fd) == TMPFS:
                # No page fault at a first store. Elsewhere that would make pages dirty for nothing.
                lib.mw_populate(self._shared.address, self._shared.length, True)
            self._file.map = self._shared.address
            self._file.bytes = self._shared.length
        return view

    def copy_from(self, source: Storage, offset: int, length: int) -> int:
        """StorageExtras.copy_from()"""
        if not isinstance(source, _SystemFile) or lib.mw_fs_type(self._file.fd) not in SHARES_BLOCKS:
            return 0
        return copy_blocks(source._file.fd, self._file.fd, offset, length)

    def native_io(self) -> Any:
        """The table through which the committer writes without going back to Python."""
        if self._io is None:
            self._io = ffi.new("struct mw_io *")
            self._io.write = ffi.addressof(lib, "mw_file_write")
            self._io.write_sync = ffi.addressof(lib, "mw_file_write_sync")
            self._io.sync = ffi.addressof(lib, "mw_file_sync")
            self._io.ctx = self._file
        return self._io


class FileStorage(_SystemFile):
    """pread and pwrite, no mapping: view() is an image in memory that writes through this keep right."""

    def __init__(self, fd: int, name: str, sync_method: SyncMethod, *, path: Path | None = None) -> None:
        super().__init__(fd, name, SyncMethod.FDATASYNC if sync_method is SyncMethod.MSYNC else sync_method)
        self._image: bytearray | None = None
        self._image_is_shared = False
        self._guard = threading.RLock()  # the image is loaded between two writes, not within one

    def _load(self) -> bytearray:
        with self._guard:
            if self._image is None:
                self._image = bytearray(self.read_at(0, len(self)))
            return self._image

    def _remember(self, offset: int, data: Buffer) -> None:
        if self._image is not None:
            plain = memoryview(data).cast("B")
            if offset + len(plain) > len(self._image):
                self._image = None  # it grew: views of the old one keep that
            else:
                self._image[offset : offset + len(plain)] = plain

    def truncate(self, length: int) -> None:
        with self._guard:
            super().truncate(length)
            self._image = None

    def write_at(self, offset: int, data: Buffer) -> int:
        with self._guard:
            done = super().write_at(offset, data)
            self._remember(offset, data)
        return done

    def write_sync_at(self, offset: int, data: Buffer) -> int:
        with self._guard:
            done = super().write_sync_at(offset, data)
            self._remember(offset, data)
        return done

    def view(self) -> memoryview:
        return memoryview(self._load()).toreadonly()

    def shared(self) -> memoryview:
        self._image_is_shared = True
        return memoryview(self._load())

    def sync(self) -> None:
        with self._guard:
            if self._image_is_shared and self._image is not None:
                super().write_at(0, bytes(self._image))
            super().sync()


class SystemDirectory:
    """A directory of the file system, held by a descriptor, so that a change of the working directory or a
    rename of a parent does not matter. Made if missing and `create`. The modes are of what is made, less the
    umask: for the owner alone, unless you say otherwise. A link in the place of a file is an error; so is one
    in the place of the directory, unless `follow_links`.
    """

    concurrent = True

    def __init__(
        self, path: str | os.PathLike[str], *, create: bool = True,
        storage: type[MappedStorage] | type[FileStorage] = MappedStorage,
        file_mode: int = 0o600, directory_mode: int = 0o700, follow_links: bool = True,
    ) -> None:  # fmt: skip
        self.path = Path(path).absolute()
        self._storage, self._file_mode, self._directory_mode = storage, file_mode, directory_mode
        self._lock: FileLock | None = None
        if create:
            self.path.mkdir(mode=directory_mode, exist_ok=True)
        flags = DIRECTORY_FLAGS if follow_links else DIRECTORY_FLAGS | os.O_NOFOLLOW
        self._held: Descriptor | None = Descriptor(os.open(self.path, flags))

    def __str__(self) -> str:
        return str(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self, name: str, flags: int, method: SyncMethod) -> Storage:
        fd = self._open_file(name, flags)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", self._path_of(name))
        return self._storage(fd, self._path_of(name), method, path=self.path / name)

    def _open_file(self, name: str, flags: int) -> int:
        with self._directory() as fd:
            return _check(lib.mw_open(fd, os.fsencode(name), flags, self._file_mode), self._path_of(name))

    def _path_of(self, name: str) -> str:
        return f"{self.path}/{name}"  # joining paths takes as long as opening the file

    def _directory(self) -> Descriptor:
        """Not closed by another thread for as long as it is used. ClosedError."""
        held = self._held
        if held is None:
            raise ClosedError(f"{self.path} is closed")
        return held

    def create(self, name: str) -> Storage:
        with contextlib.suppress(FileNotFoundError):
            self.unlink(name)
        storage = self._open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, SyncMethod.FDATASYNC)
        lib.mw_set_nocow(storage._file.fd)  # type: ignore[attr-defined]  # refused where it means nothing
        return storage

    def open(
        self, name: str, *, writable: bool = False, sync_method: SyncMethod = SyncMethod.FDATASYNC
    ) -> Storage:
        flags = os.O_RDWR if writable else os.O_RDONLY
        return self._open(name, flags, sync_method if writable else SyncMethod.FDATASYNC)

    def names(self) -> list[str]:
        with self._directory() as fd:
            return sorted(os.listdir(fd))  # noqa: PTH208  # of the descriptor, not the path

    def rename(self, old: str, new: str) -> None:
        with self._directory() as fd:
            os.rename(old, new, src_dir_fd=fd, dst_dir_fd=fd)

    def unlink(self, name: str) -> None:
        with self._directory() as fd:
            os.unlink(name, dir_fd=fd)

    def discard(self, name: str) -> None:
        """DirectoryExtras.discard()"""
        with self._directory() as fd:
            discard(fd, name, in_steps=lib.mw_fs_type(fd) in LEASES_SEE_MAPPINGS)

    def identity(self, name: str) -> tuple[int, int] | None:
        """DirectoryExtras.identity()"""
        with self._directory() as fd, contextlib.suppress(FileNotFoundError):
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            return found.st_dev, found.st_ino
        return None

    def sync(self) -> None:
        with self._directory() as fd:
            _check(lib.mw_fd_sync(fd), str(self.path))

    def sync_parent(self) -> None:
        with self._directory() as fd, Descriptor(os.open("..", DIRECTORY_FLAGS, dir_fd=fd)) as parent:
            _check(lib.mw_fd_sync(parent), str(self.path.parent))

    def subdirectory(self, name: str) -> SystemDirectory:
        modes: Any = {"file_mode": self._file_mode, "directory_mode": self._directory_mode}
        return SystemDirectory(self.path / name, storage=self._storage, follow_links=False, **modes)

    def lock(self, name: str) -> None:
        self._lock = FileLock(self._open_file(name, os.O_RDWR | os.O_CREAT), str(self.path))

    def best_sync_method(self) -> SyncMethod:
        """RWF_DSYNC where a write into written space changes no metadata. On tmpfs, where nothing is durable
        anyway, a store. Elsewhere write and sync apart, so that a full disk is told from a failed sync."""
        with self._directory() as fd:
            kind = lib.mw_fs_type(fd)
        if kind in {EXT, XFS}:
            return SyncMethod.DSYNC
        if kind == TMPFS and self._storage is MappedStorage:
            return SyncMethod.MSYNC
        return SyncMethod.FDATASYNC

    def free_bytes(self) -> int | None:
        with self._directory() as fd:
            info = os.fstatvfs(fd)
        return info.f_bavail * info.f_frsize

    def after_fork(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def close(self) -> None:
        # The lock last: nothing is done here any more once another may have it.
        self._held = None
        if self._lock is not None:
            self._lock.release()


# --- memory ---------------------------------------------------------------------------------------


class MemoryStorage:
    """A file in memory, for tests and simulators. A sync does nothing."""

    def __init__(self, data: Buffer = b"") -> None:
        self._data = bytearray(data)

    def __len__(self) -> int:
        return len(self._data)

    def _resize(self, length: int) -> None:
        if length == len(self._data):
            return
        kept = bytearray(length)  # a new one: views of the old keep it
        kept[: len(self._data)] = self._data[:length]
        self._data = kept

    def read_at(self, offset: int, length: int) -> memoryview:
        return memoryview(bytes(self._data[offset : offset + length]))

    def write_at(self, offset: int, data: Buffer) -> int:
        plain = memoryview(data).cast("B")
        if offset + len(plain) > len(self._data):
            self._resize(offset + len(plain))
        self._data[offset : offset + len(plain)] = plain
        return len(plain)

    def write_sync_at(self, offset: int, data: Buffer) -> int:
        return self.write_at(offset, data)

    def append(self, data: Buffer) -> int:
        offset = len(self._data)
        self.write_at(offset, data)
        return offset

    def truncate(self, length: int) -> None:
        self._resize(length)

    def sync(self) -> None:
        pass

    def view(self) -> memoryview:
        return memoryview(self._data).toreadonly()

    def shared(self) -> memoryview:
        return memoryview(self._data)

    def close(self) -> None:
        pass


class MemoryDirectory:
    """Files in memory. The object outlives the journals that are opened on it, one after another."""

    concurrent = False

    def __init__(self, name: str = "memory") -> None:
        self._name = name
        self._files: dict[str, Storage] = {}
        self._subdirectories: dict[str, MemoryDirectory] = {}
        self._locked = False

    def __str__(self) -> str:
        return f"<{self._name}>"

    def create(self, name: str) -> Storage:
        self._files[name] = MemoryStorage()
        return self._files[name]

    def open(
        self, name: str, *, writable: bool = False, sync_method: SyncMethod = SyncMethod.FDATASYNC
    ) -> Storage:
        if name not in self._files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return self._files[name]

    def names(self) -> list[str]:
        return sorted([*self._files, *self._subdirectories])

    def rename(self, old: str, new: str) -> None:
        if old not in self._files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), old)
        self._files[new] = self._files.pop(old)

    def unlink(self, name: str) -> None:
        if name not in self._files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        del self._files[name]

    def sync(self) -> None:
        pass

    def sync_parent(self) -> None:
        pass

    def subdirectory(self, name: str) -> Directory:
        if name not in self._subdirectories:
            self._subdirectories[name] = MemoryDirectory(f"{self._name}/{name}")
        return self._subdirectories[name]

    def lock(self, name: str) -> None:
        if self._locked:
            raise LockedError(f"{self}: it is open already")
        self._locked = True

    def best_sync_method(self) -> SyncMethod:
        return SyncMethod.DSYNC

    def free_bytes(self) -> int | None:
        return None

    def after_fork(self) -> None:
        pass

    def close(self) -> None:
        self._locked = False
