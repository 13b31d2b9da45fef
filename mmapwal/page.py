"""The first page of an index: how far the journal is, as its writer publishes it, and a word to sleep on."""

from __future__ import annotations

import errno
from typing import Any

from typing_extensions import Buffer

from mmapwal import format as fmt
from mmapwal._native import ffi, lib

__all__ = ["ProgressPage"]


class ProgressPage:
    """Keeps the mapping that it is in. Any thread may call any method at any time; OSError from each when the
    disk fails. `writable`: the page may be stored to."""

    def __init__(self, memory: Buffer, *, writable: bool) -> None:
        self.writable = writable
        self._memory = memory
        # A bare address, as in Segment.view.
        self.native = ffi.cast("struct mw_index_header *", ffi.from_buffer(memory))

    def progress(self) -> tuple[int, int]:
        """(written, durable) LSN; zeros when it does not verify."""
        out = ffi.new("struct mw_progress *")
        rc = lib.mw_progress_read(self.native, out)
        if rc == lib.MW_E_MISSING:
            return 0, 0
        _check(rc)
        return int(out.written_lsn), int(out.durable_lsn)

    def superblock_sequence(self) -> int:
        """Of the superblock in force; when it is asked for behind progress(), no older than that."""
        out = ffi.new("uint64_t *")
        _check(lib.mw_follow_sequence(self.native, out))
        return int(out[0])

    def word(self) -> int:
        """Another one each time that something was published. To be asked for before what."""
        out = ffi.new("uint32_t *")
        _check(lib.mw_follow_word(self.native, out))
        return int(out[0])

    def spin(self, seen: int, timeout_s: float, following: Any = ffi.NULL) -> bool:
        """Blocks, without sleeping, until the word is not `seen`, at most so long: whether it is not.
        `following` (struct mw_next) is taken then."""
        rc = lib.mw_follow_spin(self.native, seen, int(timeout_s * 1e9), following)
        _check(rc)
        return bool(rc)

    def wait(self, seen: int, timeout_s: float, soon_s: float, following: Any = ffi.NULL) -> bool:
        """Blocks until the word is not `seen`, at most so long; a signal ends it, and so may nothing at all.
        Nobody wakes who cannot store to the page. `following` (struct mw_next) is taken then. Whether it was
        within `soon_s`."""
        timeout_ns, soon_ns = max(1, int(timeout_s * 1e9)), int(soon_s * 1e9)
        rc = lib.mw_follow_wait(self.native, seen, timeout_ns, soon_ns, self.writable, following)
        if rc < 0 and rc != -errno.ETIMEDOUT:
            _check(rc)
        return bool(rc == 1)

    def stir(self) -> None:
        """Ends all wait() on the page, though nothing was published."""
        lib.mw_follow_stir(self.native)


def _check(rc: int) -> None:
    if rc < 0:
        raise OSError(-rc, "reading the index failed", fmt.INDEX_NAME)
