"""The ring of slots, mapped: where the newest live frame of each op lies. Derived from the segments,
and rebuilt from them after an unclean close; its first page publishes how far the journal is."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.page import ProgressPage
from mmapwal.storage import Directory, Storage

__all__ = ["SlotIndex"]

_STEP = bytes(1 << 20)
PIECE_SLOTS = (1 << 20) // fmt.SLOT_BYTES


def _header(uuid: bytes, slot_count: int) -> bytes:
    header: Any = np.zeros((), fmt.INDEX_HEADER)
    header["magic"] = fmt.INDEX_MAGIC
    header["version"] = fmt.FORMAT_VERSION
    header["slot_bytes"] = fmt.SLOT_BYTES
    header["uuid"] = np.void(uuid)
    header["slot_count"] = slot_count
    header["salt"] = fmt.journal_salt(uuid)
    header["crc"] = fmt.crc32c(header.tobytes()[: fmt.INDEX_CRC_OFFSET])
    return bytes(header.tobytes())


def _is_page_of(uuid: bytes, slot_count: int, page: bytes | memoryview) -> bool:
    """By what never changes of it."""
    checked = fmt.INDEX_PROGRESS_OFFSET
    return bytes(page[:checked]) == _header(uuid, slot_count)[:checked]


def _check(rc: int) -> int:
    if rc < 0:
        raise OSError(-rc, "reading or storing the index failed", fmt.INDEX_NAME)
    return rc


class SlotIndex:
    """Slot = op % slot_count. Stores come from the C helper alone."""

    def __init__(self, storage: Storage, slot_count: int, *, fresh: bool) -> None:
        self.slot_count = slot_count
        self.fresh = fresh
        self._storage = storage
        whole = storage.shared()
        self.published = ProgressPage(whole, writable=True)
        # Bare addresses, as in Segment.view; `memory` keeps the bytes where they are.
        self.page = self.published.native
        self.slots = ffi.cast("struct mw_slot *", ffi.cast("uint8_t *", self.page) + fmt.PAGE_BYTES)
        self.memory = whole[fmt.PAGE_BYTES :].toreadonly()
        # A field of every slot, each loaded at once, for what Python reads one by one.
        table: Any = np.frombuffer(self.memory, fmt.SLOT)
        self.lsns, self.ops, self.lengths = (memoryview(table[n]) for n in ("lsn", "op", "length"))
        self._load = struct.Struct("<QQqIH").unpack_from

    @classmethod
    def open(cls, directory: Directory, uuid: bytes, slot_count: int) -> SlotIndex | None:
        """None unless the file is there, of this journal, and of this size."""
        try:
            storage = directory.open(fmt.INDEX_NAME, writable=True)
        except FileNotFoundError:
            return None
        try:
            right = len(storage) == fmt.PAGE_BYTES + slot_count * fmt.SLOT_BYTES
            if right and _is_page_of(uuid, slot_count, storage.read_at(0, fmt.INDEX_PROGRESS_OFFSET)):
                return cls(storage, slot_count, fresh=False)
        except BaseException:
            storage.close()
            raise
        storage.close()
        return None

    @classmethod
    def create(cls, directory: Directory, uuid: bytes, slot_count: int) -> SlotIndex:
        """A new, empty one, every block of it written, so that stores need no space later.

        OSError when there is no room. Nothing is synced: what a crash leaves of it is not believed.
        """
        storage = directory.create(fmt.INDEX_NAME + ".tmp")
        try:
            storage.write_at(0, _header(uuid, slot_count).ljust(fmt.PAGE_BYTES, b"\0"))
            offset, end = fmt.PAGE_BYTES, fmt.PAGE_BYTES + slot_count * fmt.SLOT_BYTES
            while offset < end:
                offset += storage.write_at(offset, _STEP[: end - offset])
            directory.rename(fmt.INDEX_NAME + ".tmp", fmt.INDEX_NAME)
        except BaseException:
            storage.close()
            raise
        return cls(storage, slot_count, fresh=True)

    def progress(self) -> tuple[int, int]:
        """(written, durable) LSN that the page publishes; zeros when it does not verify."""
        return self.published.progress()

    def map_half(self, half: int) -> None:
        """Maps the pages of one half of the file (0 or 1), all at once: where they are read one by one
        that takes longer than the reading. Best effort."""
        end = fmt.PAGE_BYTES + self.slot_count * fmt.SLOT_BYTES
        middle = end // 2 - end // 2 % fmt.PAGE_BYTES
        start, end = ((0, middle), (middle, end))[half]
        lib.mw_populate(ffi.cast("uint8_t *", self.page) + start, end - start, 0)

    def crc(self, halves: Iterable[int] = (0, 1)) -> int:
        """CRC32C of all slots. `halves`: those to map_half() first; another thread does the rest."""
        out = ffi.new("uint32_t *")
        for half in halves:
            self.map_half(half)
        _check(lib.mw_crc32c_guarded(0, self.slots, self.slot_count * fmt.SLOT_BYTES, out))
        return int(out[0])

    def fill(self, older: npt.NDArray[Any], newer: npt.NDArray[Any]) -> tuple[int, int, int]:
        """Takes over slots that were rebuilt elsewhere, and returns their summary; those of `newer` win. The
        same array twice: all of one.

        By writes: stores into the mapping would pay for a page fault in every page of it. In pieces that are
        still in the processor's cache when they are written; several threads gain nothing by it. OSError.
        """
        out = ffi.new("struct mw_summary *")
        piece = np.empty(min(PIECE_SLOTS, self.slot_count), fmt.SLOT)
        for first in range(0, self.slot_count, PIECE_SLOTS):
            count = min(PIECE_SLOTS, self.slot_count - first)
            old, new = slot_pointer(older) + first, slot_pointer(newer) + first
            _check(lib.mw_slots_merge(slot_pointer(piece), old, new, count, out))
            self._storage.write_at(fmt.PAGE_BYTES + first * fmt.SLOT_BYTES, piece[:count].data)
        return int(out.live), int(out.first_op), int(out.last_op)

    def summary(self) -> tuple[int, int, int]:
        """How many slots are taken, and the first and the last op in them. Walks them all."""
        out = ffi.new("struct mw_summary *")
        _check(lib.mw_slots_summary(self.slots, self.slot_count, out))
        return int(out.live), int(out.first_op), int(out.last_op)

    def copy(self) -> npt.NDArray[Any]:
        """The slots as they are, each one whole; the journal may go on meanwhile."""
        out = rebuilt_slots(self.slot_count)
        target = ffi.cast("struct mw_slot *", ffi.from_buffer(out))
        _check(lib.mw_slots_copy(target, self.slots, self.slot_count))
        return out

    def lookup(self, op: int) -> tuple[int, int, int, int, int] | None:
        """(lsn, op, timestamp, length, kind) of the live frame, or None. By the C helper: any machine
        orders its loads right, and a failing disk is an OSError."""
        if not 1 <= op <= fmt.OP_MAX:
            return None
        out = ffi.new("struct mw_slot *")
        rc = lib.mw_lookup(self.slots, self.slot_count, op, out)
        if rc == lib.MW_E_MISSING:
            return None
        _check(rc)
        return int(out.lsn), int(out.op), int(out.timestamp_ns), int(out.length), int(out.kind)

    def peek(self, op: int) -> tuple[int, int, int, int, int] | None:
        """lookup() without the call into C, for who looks at the slot's LSN a second time; OP_MAX may be
        exceeded."""
        slot: tuple[int, int, int, int, int] = self._load(self.memory, op % self.slot_count * fmt.SLOT_BYTES)
        return slot if slot[1] == op and slot[0] else None

    def sync(self) -> None:
        self._storage.sync()

    def close(self) -> None:
        self._storage.close()


def published_progress(directory: Directory, uuid: bytes, slot_count: int) -> tuple[int, int]:
    """(written, durable) LSN that the index page of a journal publishes, also one that another process has
    open; zeros when it is not of this journal or does not verify."""
    try:
        storage = directory.open(fmt.INDEX_NAME)
    except FileNotFoundError:
        return 0, 0
    try:
        page = bytes(storage.read_at(0, fmt.PAGE_BYTES))
    finally:
        storage.close()
    if len(page) < fmt.PAGE_BYTES or not _is_page_of(uuid, slot_count, page):
        return 0, 0
    return ProgressPage(page, writable=False).progress()


def published_page(directory: Directory, uuid: bytes, slot_count: int) -> ProgressPage | None:
    """Of the index that is there, also one that another process has open; None when none is, or not of this
    journal. Who may not store to it gets it to be read. OSError."""
    try:
        storage, writable = _open_shared(directory)
    except FileNotFoundError:
        return None
    try:
        if len(storage) != fmt.PAGE_BYTES + slot_count * fmt.SLOT_BYTES:
            return None
        if not _is_page_of(uuid, slot_count, storage.read_at(0, fmt.INDEX_PROGRESS_OFFSET)):
            return None
        return ProgressPage(storage.shared() if writable else storage.view(), writable=writable)
    finally:
        storage.close()


def _open_shared(directory: Directory) -> tuple[Storage, bool]:
    try:
        return directory.open(fmt.INDEX_NAME, writable=True), True
    except OSError as e:
        if e.errno not in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise
        return directory.open(fmt.INDEX_NAME), False


def rebuilt_slots(slot_count: int) -> npt.NDArray[Any]:
    """Empty slots in private memory, for a scan to fill. OSError when there is not so much."""
    try:
        return np.zeros(slot_count, fmt.SLOT)
    except MemoryError as e:
        raise OSError(errno.ENOMEM, f"no memory for {slot_count} slots", fmt.INDEX_NAME) from e


def slot_pointer(slots: npt.NDArray[Any]) -> Any:
    """As C takes it; right as long as the array is."""
    return ffi.cast("struct mw_slot *", ffi.from_buffer(slots))
