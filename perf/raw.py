"""Compiles raw.c with the system's C compiler, loads it, and gives its loops a typed face."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
MIB = 1 << 20

Nanoseconds = NDArray[np.uint64]


class Method(IntEnum):
    FDATASYNC = 1
    RWF_DSYNC = 2
    O_DSYNC = 3
    MSYNC = 4
    WRITE = 5


class _Loop(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_char_p),
        ("map", ctypes.c_void_p),
        ("ns", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("batch", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("elapsed_ns", ctypes.c_uint64),
        ("fd", ctypes.c_int32),
        ("method", ctypes.c_int32),
        ("separate", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _Group(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_char_p),
        ("ns", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("elapsed_ns", ctypes.c_uint64),
        ("commits", ctypes.c_uint64),
        ("fd", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def _build() -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory(prefix="mmapwal-raw-") as folder:
        library = Path(folder) / "raw.so"
        plain = [*compiler, "-std=gnu11", "-O3", "-shared", "-fPIC", "-pthread"]
        end = ["-o", str(library), str(HERE / "raw.c")]
        # the widest loads there are, where the compiler knows this machine
        if subprocess.run([*plain, "-march=native", *end], capture_output=True, check=False).returncode != 0:
            subprocess.run([*plain, *end], check=True)
        loaded = ctypes.CDLL(str(library), use_errno=True)
    loaded.raw_run.argtypes = [ctypes.POINTER(_Loop)]
    loaded.raw_group_run.argtypes = [ctypes.POINTER(_Group)]
    loaded.raw_group_open.argtypes = [ctypes.POINTER(_Group)]
    loaded.raw_group_open.restype = ctypes.c_void_p
    loaded.raw_group_append.argtypes = loaded.raw_group_close.argtypes = [ctypes.c_void_p]
    loaded.raw_group_close.restype = None
    loaded.raw_read_ns.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64)]
    loaded.raw_read_ns.restype = ctypes.c_uint64
    return loaded


_library: ctypes.CDLL | None = None


def library() -> Any:
    """The compiled loops; compiled once a process."""
    global _library  # noqa: PLW0603
    if _library is None:
        _library = _build()
    return _library


def _check(result: int) -> None:
    if result != 0:
        raise OSError(-result, os.strerror(-result))


@dataclass(frozen=True)
class Timing:
    """One round: nanoseconds of each call, and of all of them together."""

    ns: Nanoseconds
    elapsed_ns: int

    @property
    def rate(self) -> float:
        """Calls a second."""
        return len(self.ns) * 1e9 / self.elapsed_ns


class RawFile:
    """One file that the C loops write to, from its start to its end and again.

    `prepared` bytes are written with zeros and synced before, in calls of `step` bytes; 0 makes an
    empty file that grows. `fallocated` only reserves them.
    """

    def __init__(
        self, path: Path, method: Method, prepared: int = 0, *, step: int = MIB, fallocated: bool = False
    ) -> None:
        self.path = path
        self.method = method
        self.limit = prepared
        self.offset = 0
        self._fallocated = fallocated
        self._map: mmap.mmap | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self.fd = os.open(path, flags, 0o600)
        self._prepare(step)
        if method is Method.O_DSYNC:
            os.close(self.fd)
            self.fd = os.open(path, flags | os.O_DSYNC)
        elif method is Method.MSYNC:
            self._map = mmap.mmap(self.fd, prepared)

    def _prepare(self, step: int) -> None:
        os.ftruncate(self.fd, 0)
        if self._fallocated:
            os.posix_fallocate(self.fd, 0, self.limit)
        else:
            zeros = bytes(step)
            for at in range(0, self.limit, step):
                os.pwrite(self.fd, zeros, at)
        os.fsync(self.fd)

    def renew(self) -> None:
        """Back to a file that was never written, for those that grow or are only reserved."""
        if self._fallocated or self.limit == 0:
            self.offset = 0
            self._prepare(MIB)

    def run(self, data: bytes, count: int, *, batch: int = 1, separate: bool = False) -> Timing:
        """`data` holds `batch` records, made durable together, `count` times."""
        ns: Nanoseconds = np.zeros(count, np.uint64)
        at = None
        if self._map is not None:
            at = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        loop = _Loop(
            data=data,
            map=at,
            ns=ns.ctypes.data,
            bytes=len(data) // batch,
            batch=batch,
            count=count,
            offset=self.offset,
            limit=self.limit,
            fd=self.fd,
            method=int(self.method),
            separate=int(separate),
        )
        _check(library().raw_run(ctypes.byref(loop)))
        self.offset = loop.offset
        return Timing(ns, loop.elapsed_ns)

    def run_group(self, data: bytes, threads: int, count: int) -> Timing:
        """`threads` C threads, each with `count` records, one at a time: a plain leader and followers."""
        ns: Nanoseconds = np.zeros(threads * count, np.uint64)
        group = self._group(data, threads, count, ns.ctypes.data)
        _check(library().raw_group_run(ctypes.byref(group)))
        self.offset = group.offset
        return Timing(ns, group.elapsed_ns)

    @contextmanager
    def group(self, data: bytes, threads: int) -> Iterator[Callable[[object], None]]:
        """The same, an append a call, for as many threads of the caller's; which writes `data`, always."""
        group = self._group(data, threads, 0, None)
        append = library().raw_group_append
        opened = library().raw_group_open(ctypes.byref(group))

        def call(_: object) -> None:
            if append(opened) != 0:
                raise OSError(errno.EIO, "the plain group commit failed")

        try:
            yield call
        finally:
            library().raw_group_close(opened)
            self.offset = group.offset

    def _group(self, data: bytes, threads: int, count: int, ns: int | None) -> _Group:
        return _Group(
            data=data, ns=ns, bytes=len(data), count=count, offset=self.offset, limit=self.limit,
            fd=self.fd, threads=threads,
        )  # fmt: skip

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
        os.close(self.fd)
        self.path.unlink()


@contextmanager
def raw_file(
    path: Path, method: Method, prepared: int = 0, *, step: int = MIB, fallocated: bool = False
) -> Iterator[RawFile]:
    """A RawFile that is closed and removed afterwards."""
    file = RawFile(path, method, prepared, step=step, fallocated=fallocated)
    try:
        yield file
    finally:
        file.close()


def read_bandwidth(data: NDArray[np.uint8]) -> float:
    """Bytes a second when every byte is loaded once by one core."""
    total = ctypes.c_uint64()
    ns = library().raw_read_ns(data.ctypes.data, data.nbytes, ctypes.byref(total))
    return data.nbytes * 1e9 / float(ns)
