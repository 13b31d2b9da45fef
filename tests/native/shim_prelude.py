"""What every script under the shim begins with: a file of the helper, and plans for its calls."""

import ctypes
import errno  # noqa: F401
import os
import sys

from mmapwal._native import ffi, lib

SHORT, NOTHING = -1, -2
library = ctypes.CDLL(None)

fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
os.ftruncate(fd, 8192)
file = ffi.new("struct mw_file *", {"fd": fd, "dsync_fd": -1, "method": lib.MW_FDATASYNC})


def plan(call, *steps):
    assert library.shim_plan(call.encode(), (ctypes.c_int * len(steps))(*steps), len(steps)) == 0


def calls(call):
    return library.shim_count(call.encode())


def flags():
    return library.shim_flags()


def synced_bytes():
    library.shim_synced_bytes.restype = ctypes.c_size_t
    return library.shim_synced_bytes()


def content(offset, length):
    with open(sys.argv[1], "rb") as f:  # noqa: PTH123  # another descriptor, and no pread
        f.seek(offset)
        return f.read(length)
