"""Frames made by hand, in a mapping that ends where the segment ends: a read past it is EIO, not luck."""

from __future__ import annotations

import mmap
import tempfile
from typing import Any, NamedTuple

import numpy as np

from mmapwal import format
from mmapwal._native import ffi, lib

BASE = 1 << 20
SALT = 0x5A17
EPOCH = 3


class Made(NamedTuple):
    """One frame: its bytes, where it lies, and the link that the next one needs."""

    raw: bytes
    lsn: int
    link: int

    @property
    def end(self) -> int:
        return self.lsn + len(self.raw)


def make(lsn: int, link: int, payload: bytes = b"", *, salt: int = SALT, **fields: int) -> Made:
    """A frame that is right, but for the `fields` given: the header's checksum is made last."""
    frame = np.zeros((), format.FRAME)
    frame["lsn"] = lsn
    frame["link"] = link
    frame["type"] = lib.MW_ENTRY
    frame["epoch"] = EPOCH
    frame["length"] = len(payload)
    frame["payload_crc"] = format.crc32c(payload)
    for name, value in fields.items():
        frame[name] = value
    if "header_crc" not in fields:
        frame["header_crc"] = format.crc32c(frame.tobytes()[4:], salt)
    raw = frame.tobytes() + payload
    skipped = int(frame["length"]) if int(frame["type"]) in {lib.MW_GAP, lib.MW_PAD} else 0
    raw = raw.ljust(format.frame_bytes(max(len(payload), min(skipped, 1 << 16))), b"\0")
    return Made(raw, lsn, int(frame["payload_crc" if frame["type"] == lib.MW_GAP else "header_crc"]))


class Chain:
    """Frames one behind the other, each linked to the one before it."""

    def __init__(self, base: int = BASE, salt: int = SALT) -> None:
        self.base, self.salt = base, salt
        self.made: list[Made] = []

    @property
    def lsn(self) -> int:
        return self.made[-1].end if self.made else self.base

    def add(self, payload: bytes = b"", **fields: int) -> Made:
        link = fields.pop("link", self.made[-1].link if self.made else self.salt)
        lsn = fields.pop("lsn", self.lsn)
        made = make(lsn, link, payload, salt=self.salt, **fields)
        self.made.append(made._replace(lsn=self.lsn))
        return self.made[-1]

    @property
    def raw(self) -> bytes:
        return b"".join(m.raw for m in self.made)


class Ground:
    """A mapping of which the last pages are behind the end of the file."""

    def __init__(self, room: int) -> None:
        pages = -(-room // mmap.PAGESIZE)
        self.bytes = pages * mmap.PAGESIZE
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the mapping
        self._file.truncate(self.bytes)
        self._address = ffi.new("void **")
        self._mapped = self.bytes + 16 * mmap.PAGESIZE
        if lib.mw_map(self._file.fileno(), self._mapped, 1, self._address) != 0:
            raise MemoryError
        self._start = ffi.cast("uint8_t *", self._address[0])

    def put(self, data: bytes) -> Any:
        """Where `data` now lies: its last byte is the last one that can be read."""
        at = self._start + self.bytes - len(data)
        ffi.memmove(at, data, len(data))
        return at

    def close(self) -> None:
        lib.mw_unmap(self._mapped, self._address[0])
        self._file.close()
