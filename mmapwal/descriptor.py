"""A descriptor that several threads use."""

from __future__ import annotations

import os

from mmapwal._native import ffi, lib

__all__ = ["DIRECTORY_FLAGS", "Descriptor"]

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Descriptor:
    """Takes a descriptor over. It is closed when nobody has this object any more, so never under one who uses
    it: `with` gives the number. In C, since a handler that raises could keep a finalizer from it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._closing = ffi.gc(ffi.cast("void *", fd), lib.mw_fd_close)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *exc: object) -> None:
        pass
