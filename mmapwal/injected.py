"""The C committer's way to a storage that is Python code: its table of functions, and the errors."""

from __future__ import annotations

import errno
from typing import Any

from mmapwal._native import ffi, lib
from mmapwal.storage import Storage

__all__ = ["InjectedIO"]


class InjectedIO:
    """The C committer's table of functions for a storage that is Python code. ``error`` keeps the
    exception that a call ended with, since C sees only an errno."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.error: BaseException | None = None
        self._handle = ffi.new_handle(self)
        self.table = ffi.new("struct mw_io *")
        self.table.write = lib.mw_py_write
        self.table.write_sync = lib.mw_py_write_sync
        self.table.sync = lib.mw_py_sync
        self.table.ctx = self._handle


def _on_error(_kind: object, error: BaseException | None, trace: Any) -> int:
    """The errno that C is told. What is no OSError stays unclear, so the journal is poisoned by it."""
    handle = trace.tb_frame.f_locals.get("ctx") if trace is not None else None
    if handle is not None:
        ffi.from_handle(handle).error = error
    code = error.errno if isinstance(error, OSError) else None
    return -(code or errno.EIO)


@ffi.def_extern(onerror=_on_error, error=-errno.EIO)  # type: ignore[untyped-decorator]
def mw_py_write(ctx: Any, offset: int, data: Any, length: int) -> int:
    ffi.from_handle(ctx).storage.write_at(offset, ffi.buffer(data, length))
    return 0


@ffi.def_extern(onerror=_on_error, error=-errno.EIO)  # type: ignore[untyped-decorator]
def mw_py_write_sync(ctx: Any, offset: int, data: Any, length: int) -> int:
    ffi.from_handle(ctx).storage.write_sync_at(offset, ffi.buffer(data, length))
    return 0


@ffi.def_extern(onerror=_on_error, error=-errno.EIO)  # type: ignore[untyped-decorator]
def mw_py_sync(ctx: Any) -> int:
    ffi.from_handle(ctx).storage.sync()
    return 0
