"""Reading entries: one by one through the mapped index, or many in one call of the C helper."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.engine import Engine
from mmapwal.errors import CorruptionError, MissingOpError, PoisonedError
from mmapwal.opening import Durability
from mmapwal.segment import SegmentSet, SegmentTable

__all__ = ["HEADERS", "DrainedEntries", "Entry", "Header", "Reader"]

CHUNK = 512
_NO_ROW = 2**32 - 1
_PAYLOAD_AT = fmt.PAGE_BYTES + fmt.FRAME_BYTES


class Entry(NamedTuple):
    """One entry. ``payload`` is a read-only slice of the mapping; it stays right as long as it is held."""

    op: int
    payload: memoryview
    kind: int
    timestamp: int


class Header(NamedTuple):
    """What is known of an entry without its payload. ``checksum`` is the payload's CRC32C."""

    op: int
    length: int
    kind: int
    timestamp: int
    lsn: int
    checksum: int


HEADERS = np.dtype(
    [
        ("op", "<u8"),
        ("length", "<u4"),
        ("kind", "<u2"),
        ("timestamp", "<i8"),
        ("lsn", "<u8"),
        ("checksum", "<u4"),
    ]
)
"""The columns of Journal.headers()."""

_entry = partial(tuple.__new__, Entry)


class Columns:
    """Room for one chunk of entries, filled by the C helper."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.op = np.empty(rows, np.uint64)
        self.start = np.empty(rows, np.uint64)
        self.end = np.empty(rows, np.uint64)
        self.lsn = np.empty(rows, np.uint64)
        self.timestamp_ns = np.empty(rows, np.int64)
        self.segment = np.empty(rows, np.uint32)
        self.checksum = np.empty(rows, np.uint32)
        self.kind = np.empty(rows, np.uint16)
        self.native = ffi.new("struct mw_columns *")
        for name, _ in ffi.typeof("struct mw_columns").fields:
            column = getattr(self, name)
            setattr(
                self.native, name, ffi.cast(ffi.typeof(getattr(self.native, name)), ffi.from_buffer(column))
            )


class Reader:
    """The reading half of an engine. Any thread may use it at any time."""

    def __init__(self, engine: Engine, *, verify_reads: bool) -> None:
        self._engine = engine
        self.segments: SegmentSet = engine.segments
        self._verify = verify_reads
        self.slots = engine.index.slot_count
        self.load_place = engine.index.load_place
        self.words = engine.index.words
        self.memory = engine.index.memory
        self._load = engine.index.load
        self._relaxed = engine.options.durability is not Durability.SYNC
        self._durable_lsn = 0
        # Below it an entry can be read without asking anyone; above it, or closed, or verifying: locate().
        self.plain_below_lsn = 0 if self._relaxed or verify_reads else 2**64
        self.closed: Exception | None = None

    def close(self, error: Exception) -> None:
        """Every read from now on raises `error`."""
        self.closed = error
        self.plain_below_lsn = 0

    # --- one entry --------------------------------------------------------------------------------

    def locate(self, op: int) -> tuple[memoryview, int, int, int, int]:
        """(view of the segment, start, end, kind, timestamp) of the payload; MissingOpError."""
        while True:
            try:
                lsn, found, timestamp, length, kind, _ = self._load(
                    self.memory, op % self.slots * fmt.SLOT_BYTES
                )
            except TypeError:
                raise MissingOpError(op) from None
            if self.closed is not None:
                raise self.closed
            if found != op or lsn == 0:
                raise MissingOpError(op)
            if self._relaxed and lsn >= self._durable_lsn:
                self._reach(lsn)
            table = self.segments.table
            row = bisect_right(table.bases, lsn) - 1
            if row < 0 or lsn >= table.segments[row].record.next_base_lsn:
                self._stray(op, lsn)
                continue
            view = table.views[row]
            if view is None:
                self._map(table, row)
                continue
            start = lsn - table.bases[row] + _PAYLOAD_AT
            # The slot is its own sequence lock: unchanged, and so were the fields between.
            if self._load(self.memory, op % self.slots * fmt.SLOT_BYTES)[0] != lsn:
                continue
            if self._verify:
                self.check(table, row, lsn, op)
            return view, start, start + length, kind, timestamp

    def _map(self, table: SegmentTable, row: int) -> None:
        """Maps a segment for reading. What was compacted away meanwhile is no error: the slot has changed."""
        try:
            table.map(row)
        except CorruptionError:
            if self.segments.table is table:
                raise
        if self.segments.count_mapping():
            with self._engine.structure:
                self.segments.bound_mappings()

    def _stray(self, op: int, lsn: int) -> None:
        """The table that was read does not have the LSN: an old one, or the index is damaged."""
        found = self._engine.index.lookup(op)
        if found is not None and found[0] == lsn and self.segments.table.row(lsn) < 0:
            raise CorruptionError(fmt.INDEX_NAME, 0, lsn, op, "a slot names a place that no segment has")

    def _reach(self, lsn: int) -> None:
        """OS and BUFFERED: hands what is buffered to the kernel; after a failure only durable is read."""
        engine = self._engine
        state = engine.state()
        if not state.poison_stage and lsn >= state.written_lsn:
            engine.flush(lsn + 1)
            state = engine.state()
        if state.poison_stage and lsn >= state.durable_lsn:
            raise engine.poisoned()
        self._durable_lsn = int(state.durable_lsn)
        if not self._verify and self.closed is None:
            self.plain_below_lsn = self._durable_lsn

    def _readable(self, lsns: npt.NDArray[Any]) -> int:
        """How many of the rows can be given: all, or those before the first that a failure leaves unclear."""
        try:
            self._reach(int(lsns.max()))
        except PoisonedError:
            unclear = lsns >= int(self._engine.state().durable_lsn)
            return int(unclear.argmax())
        return len(lsns)

    def check(self, table: SegmentTable, row: int, lsn: int, op: int, target: bytearray | None = None) -> Any:
        """Checks the frame, guarded against SIGBUS; copies its payload to a target. Its header."""
        segment = table.segments[row]
        header = ffi.new("struct mw_frame *")
        to, length = (ffi.NULL, 0) if target is None else (ffi.from_buffer(target), len(target))
        rc = lib.mw_check_frame(
            segment.frames,
            segment.record.base_lsn,
            segment.record.capacity,
            segment.salt,
            lsn,
            op,
            header,
            to,
            length,
        )
        if rc == lib.MW_E_CORRUPT:
            offset = fmt.PAGE_BYTES + lsn - segment.record.base_lsn
            raise CorruptionError(segment.record.name, offset, lsn, op, "the frame does not verify")
        if rc < 0:
            raise OSError(-rc, "reading the segment failed", segment.record.name)
        return header

    def find(self, op: int) -> tuple[SegmentTable, int, int, int] | None:
        """(table, row, LSN, length) of the live frame, or None."""
        if self.closed is not None:
            raise self.closed
        while (found := self._engine.index.lookup(op)) is not None:
            lsn = found[0]
            if self._relaxed and lsn >= self._durable_lsn:
                self._reach(lsn)
            table = self.segments.table
            row = table.row(lsn)
            again = self._engine.index.lookup(op)
            if row < 0:
                self._stray(op, lsn)
            elif table.views[row] is None:
                self._map(table, row)
            elif again is not None and again[0] == lsn:
                return table, row, lsn, found[3]
        return None

    def copy(self, op: int) -> bytes:
        found = self.find(op)
        if found is None:
            raise MissingOpError(op)
        table, row, lsn, length = found
        target = bytearray(length)
        self.check(table, row, lsn, op, target)
        return bytes(target)

    def header(self, op: int) -> Header | None:
        found = self.find(op)
        if found is None:
            return None
        table, row, lsn, _ = found
        f = self.check(table, row, lsn, op)
        return Header(op, int(f.length), int(f.kind), int(f.timestamp_ns), lsn, int(f.payload_crc))

    # --- many -------------------------------------------------------------------------------------

    def _range(self, first: int | None, last: int | None) -> tuple[int, int, npt.NDArray[Any] | None]:
        """The ops to look at: a range to walk, or, where few of a wide range live, those that do."""
        if self.closed is not None:
            raise self.closed
        state = self._engine.state()
        if not state.live:
            return 1, 0, None
        low = max(int(state.first_op), first if first is not None else 1)
        high = min(int(state.last_op), last if last is not None else fmt.OP_MAX)
        if low > high:
            return 1, 0, None
        if high - low < 4 * self.slots:
            return low, high, None
        slots = self._engine.index.copy()
        ops = slots["op"][(slots["lsn"] != 0) & (slots["op"] >= low) & (slots["op"] <= high)]
        return low, high, np.sort(ops)

    def chunks(
        self, first: int | None, last: int | None, *, verify: bool, rows: int = CHUNK
    ) -> Iterator[tuple[SegmentTable, Columns, int, bool]]:
        """(table, columns, how many, whether all in one segment) until the range is done. The columns
        are filled anew for the next."""
        low, high, ops = self._range(first, last)
        out = Columns(rows)
        cursor = ffi.new("struct mw_cursor *", {"op": low, "last_op": high})
        taken = ffi.new("uint64_t *")
        if ops is None:
            ops_at, op_count = ffi.NULL, 0
        else:
            ops_at, op_count = ffi.cast("uint64_t *", ffi.from_buffer(ops)), len(ops)
        index = self._engine.index
        table = self.segments.table
        suspect: tuple[int, int] | None = None
        while True:
            if self.closed is not None:
                raise self.closed
            if self._relaxed and not self._engine.state().poison_stage:
                self._engine.flush()
            count = lib.mw_gather(
                index.slots,
                index.slot_count,
                table.native,
                cursor,
                ops_at,
                op_count,
                taken,
                out.native,
                rows,
                verify,
            )
            if count == lib.MW_E_CORRUPT and self._relaxed and suspect != (cursor.op, cursor.lsn):
                suspect = (cursor.op, cursor.lsn)  # staged behind the flush: look again behind the next
            elif count < 0:
                table = self._recover_gather(count, table, cursor)
            elif count == 0:
                return
            else:
                readable = self._readable(out.lsn[:count]) if self._relaxed else count
                if readable:
                    yield table, out, readable, bool(cursor.uniform)
                if readable < count:
                    raise self._engine.poisoned()

    def _recover_gather(self, rc: int, table: SegmentTable, cursor: Any) -> SegmentTable:
        op, lsn = int(cursor.op), int(cursor.lsn)
        if self._relaxed:
            self._reach(lsn)
        if rc == lib.MW_E_TABLE:
            if cursor.segment != _NO_ROW:
                self._map(table, int(cursor.segment))
                return table if table.views[int(cursor.segment)] is not None else self.segments.table
            if self.segments.table is table:
                self._stray(op, lsn)
            return self.segments.table
        row = table.row(lsn)
        name = table.segments[row].record.name if row >= 0 else fmt.INDEX_NAME
        if rc == lib.MW_E_CORRUPT:
            offset = fmt.PAGE_BYTES + lsn - table.bases[row] if row >= 0 else 0
            raise CorruptionError(name, offset, lsn, op, "the frame does not verify")
        raise OSError(-rc, "reading the segment failed", name)

    def payloads(self, first: int | None, last: int | None) -> Iterator[memoryview]:
        for table, out, count, uniform in self.chunks(first, last, verify=True):
            yield from _slices(table, out, count, uniform)

    def entries(self, first: int | None, last: int | None) -> Iterator[Entry]:
        for table, out, count, uniform in self.chunks(first, last, verify=True):
            rows = zip(
                out.op[:count].tolist(), _slices(table, out, count, uniform), out.kind[:count].tolist(),
                out.timestamp_ns[:count].tolist(), strict=True,
            )  # fmt: skip
            yield from map(_entry, rows)

    def headers(self, first: int | None, last: int | None) -> npt.NDArray[Any]:
        parts = [
            _headers(out, count) for _, out, count, _ in self.chunks(first, last, verify=False, rows=8192)
        ]
        return np.concatenate(parts) if parts else np.empty(0, HEADERS)

    def drained(self, first: int, last: int) -> DrainedEntries:
        """The live entries of a range as they are now; their segments stay mapped for as long as it lives."""
        parts = []
        table = self.segments.table
        for chunk_table, out, count, _ in self.chunks(first, last, verify=self._verify, rows=8192):
            table = chunk_table
            parts.append(_headers(out, count))
        headers = np.concatenate(parts) if parts else np.empty(0, HEADERS)
        for row in {table.row(lsn) for lsn in headers["lsn"].tolist()}:
            table.map(row)
        return DrainedEntries(table, headers)


def _slices(table: SegmentTable, out: Columns, count: int, uniform: bool) -> Iterator[memoryview]:
    slices = map(slice, out.start[:count].tolist(), out.end[:count].tolist())
    if uniform:
        view = table.map(int(out.segment[0]))
        return map(view.__getitem__, slices)
    views = map(table.map, out.segment[:count].tolist())
    return (view[part] for view, part in zip(views, slices, strict=True))


def _headers(out: Columns, count: int) -> npt.NDArray[Any]:
    part = np.empty(count, HEADERS)
    part["op"], part["lsn"], part["kind"] = out.op[:count], out.lsn[:count], out.kind[:count]
    part["timestamp"], part["checksum"] = out.timestamp_ns[:count], out.checksum[:count]
    part["length"] = (out.end[:count] - out.start[:count]).astype(np.uint32)
    return part


class DrainedEntries(Sequence[Entry]):
    """What a drain removed, by op. Entries are made when they are asked for; their payloads are slices
    of mappings that live as long as this sequence or any payload of it."""

    def __init__(self, table: SegmentTable, headers: npt.NDArray[Any]) -> None:
        self._table = table
        self.headers = headers

    def __len__(self) -> int:
        return len(self.headers)

    @overload
    def __getitem__(self, at: int) -> Entry: ...
    @overload
    def __getitem__(self, at: slice) -> DrainedEntries: ...
    def __getitem__(self, at: int | slice) -> Entry | DrainedEntries:
        if isinstance(at, slice):
            return DrainedEntries(self._table, self.headers[at])
        h = self.headers[at]
        lsn = int(h["lsn"])
        row = self._table.row(lsn)
        start = lsn - self._table.bases[row] + _PAYLOAD_AT
        payload = self._table.map(row)[start : start + int(h["length"])]
        return Entry(int(h["op"]), payload, int(h["kind"]), int(h["timestamp"]))

    def __repr__(self) -> str:
        if not len(self):
            return "<no drained entries>"
        return f"<{len(self)} drained entries, ops {self.headers['op'][0]} .. {self.headers['op'][-1]}>"
