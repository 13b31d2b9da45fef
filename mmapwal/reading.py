"""The reading half of Journal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mmapwal.columns import Columns, Header
from mmapwal.errors import MissingOpError
from mmapwal.reader import Entry, Reader

__all__ = ["Reading"]


class Reading:
    """What Journal offers to read. Every view and array is read-only, and right for as long as it is held."""

    _reader: Reader

    def read(self, op: int) -> memoryview:
        """The payload: a read-only slice of the mapping, no copy, right for as long as it is held.

        MissingOpError when no live entry has the op; PoisonedError above the durable LSN of a poisoned
        journal; CorruptionError with `verify_reads`; ClosedError. What the disk fails to bring while
        the view is read kills by SIGBUS: copy() is the guarded way.
        """
        slots, lsns, ops, lengths, segments, plain_below_lsn = self._reader.plain
        try:
            slot = op % slots
            lsn = lsns[slot]
            if ops[slot] == op and lsn < plain_below_lsn:
                length = lengths[slot]
                table = segments.table
                edge, view, shift, second, second_shift = table.lanes[lsn >> table.lane_bits]
                if lsn >= edge:
                    view, shift = second, second_shift
                # The slot is its own sequence lock: unchanged, and so were the fields between. It is
                # looked at after the table, so what it names cannot have been compacted away from it.
                if view is not None and lsns[slot] == lsn:
                    start = lsn - shift
                    return view[start : start + length]
        except TypeError:
            raise MissingOpError(op) from None
        except KeyError:  # the first read from that lane
            pass
        return self._reader.read(op)

    def copy(self, op: int) -> bytes:
        """The payload as bytes, its checksum checked, OSError where the disk fails. Else as read()."""
        return self._reader.copy(op)

    def get(self, op: int, default: Any = None) -> Entry | Any:
        """The entry, or `default` when no live entry has the op."""
        try:
            return self[op]
        except MissingOpError:
            return default

    def __getitem__(self, op: int) -> Entry:
        """The entry; errors as read()."""
        view, start, end, kind, timestamp = self._reader.locate(op)
        return Entry(op, view[start:end], kind, timestamp)

    def __contains__(self, op: object) -> bool:
        try:
            self._reader.locate(op)  # type: ignore[arg-type]
        except MissingOpError:
            return False
        return True

    def __iter__(self) -> Iterator[Entry]:
        return self.entries()

    def payloads(self, first: int | None = None, last: int | None = None) -> Iterator[memoryview]:
        """The payloads of the live ops first .. last (inclusive), by op: the fast lane. Checked in
        chunks; CorruptionError, OSError. What is appended meanwhile is not among them; what is removed
        meanwhile may be."""
        return self._reader.payloads(first, last, self)

    def entries(self, first: int | None = None, last: int | None = None) -> Iterator[Entry]:
        """The live entries first .. last (inclusive), by op. As payloads()."""
        return self._reader.entries(first, last, self)

    def header(self, op: int) -> Header | None:
        """What is known of an entry without its payload; None when it is not live. The frame is checked."""
        return self._reader.header(op)

    def previous_header(self, header: Header) -> Header | None:
        """The header of the op before; None when that is not live."""
        return self._reader.header(header.op - 1) if header.op > 1 else None

    def headers(
        self, first: int | None = None, last: int | None = None, *, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """The headers of the live ops first .. last (inclusive), by op, as a structured array with the fields
        of Header. The payloads are not read.

        `copy` as in numpy. None lends them where that is possible: payloads of one length that lie one behind
        the other, by op, in one segment. That array is read-only, strided, and keeps the mapping; what the
        disk fails to bring of it kills by SIGBUS. Else, and with True, they are copied, guarded. False raises
        ValueError where they cannot be lent. Other errors as payloads()."""
        return self._reader.headers(first, last, copy=copy)

    def columns(self, first: int | None = None, last: int | None = None) -> Columns:
        """The live entries first .. last (inclusive), by op, as numpy columns (ops, offsets, lengths,
        timestamps, kinds, checksums, lsns, segments), with the views of the segments that the offsets point
        into. The columns are copies, some 45 bytes an entry; the payloads are not. All is checked before it
        returns, in C without the GIL, a long range by two threads; errors as payloads()."""
        return self._reader.columns(first, last)

    def array(
        self, first: int | None = None, last: int | None = None, *, copy: bool | None = None
    ) -> npt.NDArray[np.uint8]:
        """The payloads of the live ops first .. last (inclusive), all of one length, as the rows of a 2-D
        array of bytes, read-only, by op. Checked before it returns, in C without the GIL. What is no row of
        bytes is a view away: ``array().view("<f8")``.

        `copy` as in numpy. None lends the mapping where the payloads lie evenly spaced in one segment: a
        strided view, no copy, which keeps the mapping for as long as it lives. Else, and with True, they are
        copied. False raises ValueError where that would be needed: arrays() never copies. An empty range
        gives shape (0, 0). ValueError when the payloads differ in length. Other errors as payloads()."""
        return self._reader.array(first, last, copy=copy)

    def arrays(self, first: int | None = None, last: int | None = None) -> Iterator[npt.NDArray[np.uint8]]:
        """As array(), but never a copy: the fewest arrays whose rows one after the other are the payloads by
        op. A new one begins with each segment, and wherever the payloads do not lie evenly spaced."""
        return self._reader.arrays(first, last, self)
