"""Reading entries: one by one through the mapped index, or many in one call of the C helper."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from operator import getitem
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from mmapwal import columns
from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.columns import Collection, Columns, Gathered, Header, Room
from mmapwal.engine import Engine
from mmapwal.errors import CorruptionError, MissingOpError, PoisonedError
from mmapwal.opening import Durability
from mmapwal.segment import SegmentSet, SegmentTable
from mmapwal.threads import SecondThread, threads_for

__all__ = ["DrainedEntries", "Entry", "Reader", "make_entry", "slices_of"]

PAYLOAD_ROWS = 2048
ENTRY_ROWS = 512  # before the garbage collector notices
COLUMN_ROWS = 8192
SPLIT_ROWS = 1 << 16  # below it a second thread takes longer to start than it saves
FIRST_ROWS = 64  # whoever looks at a few need not wait for many
_NO_ROW = 2**32 - 1
# Elsewhere loads may overtake each other, and a slot is read by the C helper alone.
_LOADS_ARE_ORDERED = platform.machine() in {"x86_64", "AMD64", "i686", "i386"}


OpsRange = tuple[int, int, npt.NDArray[Any] | None]
"""The first and the last op, and, where few of those between live, which."""


class Entry(NamedTuple):
    """One entry. ``payload`` is a read-only slice of the mapping; it stays right as long as it is held."""

    op: int
    payload: memoryview
    kind: int
    timestamp: int


make_entry = partial(tuple.__new__, Entry)
_slice: Any = getitem  # a fifth faster than view.__getitem__


class Reader:
    """The reading half of an engine. Any thread may use it at any time."""

    def __init__(self, engine: Engine, *, verify_reads: bool) -> None:
        self._engine = engine
        self._verify = verify_reads
        self._relaxed = engine.options.durability is not Durability.SYNC
        self._durable_lsn = 0
        self.closed: Exception | None = None
        self._take_over()

    def _take_over(self) -> None:
        """The engine's segments and index."""
        self.segments: SegmentSet = self._engine.read_segments
        index = self._engine.index
        self.slots = index.slot_count
        self._slot = index.peek if _LOADS_ARE_ORDERED else index.lookup
        self._plain_below(0 if self._relaxed or self._verify or not _LOADS_ARE_ORDERED else 2**64)

    def _plain_below(self, lsn: int) -> None:
        """Below the LSN an entry can be read without asking anyone. Above it, or closed, or verifying, or
        where loads are not ordered: locate()."""
        index = self._engine.index
        # One tuple for read(): an attribute each would cost it a tenth.
        self.plain = (self.slots, index.lsns, index.ops, index.lengths, self.segments, lsn)

    def close(self, error: Exception) -> None:
        """Every read from now on raises `error`."""
        self.closed = error
        self._plain_below(0)

    # --- one entry --------------------------------------------------------------------------------

    def locate(self, op: int) -> tuple[memoryview, int, int, int, int]:
        """(view of the segment, start, end, kind, timestamp) of the payload; MissingOpError."""
        while True:
            slots, lsns = self.plain[:2]  # of a reader of what others write there may be new ones
            try:
                slot = self._slot(op)
            except TypeError:
                raise MissingOpError(op) from None
            if self.closed is not None:
                raise self.closed
            if slot is None:
                raise MissingOpError(op)
            lsn, _, timestamp, length, kind = slot
            if self._relaxed and lsn >= self._durable_lsn:
                self._reach(lsn)
            table = self.segments.table
            row = table.row(lsn)
            if row < 0:
                self._stray(op, lsn)
                continue
            view = table.views[row]
            if view is None:
                self._map(table, row)
                continue
            start = lsn - table.bases[row] + fmt.PAYLOAD_OFFSET
            # The slot is its own sequence lock: unchanged, and so were the fields between. Looked at after
            # the table: what it names now, no compaction had left out of that.
            if (lsns[op % slots] if _LOADS_ARE_ORDERED else self._lookup_lsn(op)) != lsn:
                continue
            if self._verify:
                self.check(table, row, lsn, op)
            return view, start, start + length, kind, timestamp

    def _lookup_lsn(self, op: int) -> int:
        slot = self._engine.index.lookup(op)
        return slot[0] if slot is not None else 0

    def read(self, op: int) -> memoryview:
        """The payload, for Journal.read() where it cannot tell by itself; it shall the next time."""
        view, start, end, _, _ = self.locate(op)
        lsn = self._engine.index.lsns[op % self.slots]
        if lsn < self.plain[-1]:
            self.segments.table.lend(lsn)
        return view[start:end]

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
        if not self._verify and self.closed is None and _LOADS_ARE_ORDERED:
            self._plain_below(self._durable_lsn)
            if self.closed is not None:  # meanwhile
                self._plain_below(0)

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

    def _range(self, first: int | None, last: int | None) -> OpsRange:
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
        self, first: int | None, last: int | None, *, verify: bool, rows: int = COLUMN_ROWS,
        owner: object = None,
    ) -> Iterator[Gathered]:  # fmt: skip
        """The live entries of a range, at most `rows` at a time, until it is done. `owner`: who closes the
        engine when nobody has him any more; until then this has."""
        yield from self._chunks(self._range(first, last), verify=verify, rows=rows)

    def _chunks(self, ops_range: OpsRange, *, verify: bool, rows: int = COLUMN_ROWS) -> Iterator[Gathered]:
        low, high, ops = ops_range
        out = Room(rows)
        room = min(FIRST_ROWS, rows)
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
                room,
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
                    yield Gathered(table, out, readable, bool(cursor.uniform), int(cursor.stride))
                if readable < count:
                    raise self._engine.poisoned()
                room = min(4 * room, rows)

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
            if self.segments.table is not table:  # a longer segment may have taken the place of a blank one
                return self.segments.table
            offset = fmt.PAGE_BYTES + lsn - table.bases[row] if row >= 0 else 0
            raise CorruptionError(name, offset, lsn, op, "the frame does not verify")
        raise OSError(-rc, "reading the segment failed", name)

    def payloads(self, first: int | None, last: int | None, owner: object) -> Iterator[memoryview]:
        # A generator would cost each payload a tenth; chained, only each chunk.
        chunks = self.chunks(first, last, verify=True, rows=PAYLOAD_ROWS, owner=owner)
        return chain.from_iterable(slices_of(chunks))

    def entries(self, first: int | None, last: int | None, owner: object) -> Iterator[Entry]:
        chunks = self.chunks(first, last, verify=True, rows=ENTRY_ROWS, owner=owner)
        return chain.from_iterable(self._entries(chunks))

    @staticmethod
    def _entries(chunks: Iterator[Gathered]) -> Iterator[Iterator[Entry]]:
        current: list[Gathered] = []
        for payloads in slices_of(_noting(chunks, current)):
            out, count = current[0].out, current[0].rows
            rows = zip(
                out.op[:count].tolist(), payloads, out.kind[:count].tolist(),
                out.timestamp_ns[:count].tolist(), strict=True,
            )  # fmt: skip
            yield map(make_entry, rows)

    def headers(self, first: int | None, last: int | None, *, copy: bool | None) -> npt.NDArray[Any]:
        if copy is not True:
            lent = columns.lent_headers(self.chunks(first, last, verify=False))
            if lent is not None:
                return lent
            if copy is False:
                raise ValueError("the frames are not evenly spaced in one segment: no headers without a copy")
        return columns.copied_headers(self.chunks(first, last, verify=False))

    def columns(self, first: int | None, last: int | None) -> Columns:
        whole = self._range(first, last)
        rows = _rows_of(whole)
        making = Collection(rows)
        if rows < SPLIT_ROWS or threads_for(self._engine.directory) == 1:
            return making.columns([(0, making.take(self._chunks(whole, verify=True), 0))])
        lower, upper = _halves(whole)
        middle = _rows_of(lower)
        with SecondThread("columns") as second:
            other = second.submit(making.take, self._chunks(upper, verify=True), middle)
            end = making.take(self._chunks(lower, verify=True), 0)
            return making.columns([(0, end), (middle, other.result())])

    def arrays(self, first: int | None, last: int | None, owner: object) -> Iterator[npt.NDArray[np.uint8]]:
        chunks = self.chunks(first, last, verify=True, owner=owner)
        return (run.payloads() for run in columns.runs_of(chunks))

    def array(self, first: int | None, last: int | None, *, copy: bool | None) -> npt.NDArray[np.uint8]:
        return columns.stack(columns.runs_of(self.chunks(first, last, verify=True)), copy=copy)

    def drained(self, first: int, last: int) -> DrainedEntries:
        """The live entries of a range as they are now; their segments stay mapped for as long as it lives."""
        parts = []
        table = self.segments.table
        for chunk in self.chunks(first, last, verify=self._verify):
            table = chunk.table
            parts.append(chunk.headers())
        headers = np.concatenate(parts) if parts else np.empty(0, columns.HEADERS)
        for row in {table.row(lsn) for lsn in headers["lsn"].tolist()}:
            table.map(row)
        return DrainedEntries(table, headers)


def _rows_of(ops_range: OpsRange) -> int:
    low, high, ops = ops_range
    return len(ops) if ops is not None else max(0, high - low + 1)


def _halves(ops_range: OpsRange) -> tuple[OpsRange, OpsRange]:
    low, high, ops = ops_range
    if ops is not None:
        return (low, high, ops[: len(ops) // 2]), (low, high, ops[len(ops) // 2 :])
    middle = (low + high) // 2
    return (low, middle, None), (middle + 1, high, None)


def _noting(chunks: Iterable[Gathered], current: list[Gathered]) -> Iterator[Gathered]:
    for chunk in chunks:
        current[:] = [chunk]
        yield chunk


def slices_of(chunks: Iterable[Gathered]) -> Iterator[Iterator[memoryview]]:
    """The payloads of each chunk. Where they are evenly spaced the slices are made once for all chunks."""
    made: list[slice] = []
    spacing = (0, 0)
    for chunk in chunks:
        out, count = chunk.out, chunk.rows
        start, length = int(out.start[0]), int(out.end[0] - out.start[0])
        if chunk.stride:
            if spacing != (chunk.stride, length) or len(made) < count:
                spacing = chunk.stride, length
                made = [slice(at, at + length) for at in range(0, count * chunk.stride, chunk.stride)]
            part = chunk.view()[start : int(out.end[count - 1])]
            yield map(_slice, repeat(part, count), made)
            continue
        slices = map(slice, out.start[:count].tolist(), out.end[:count].tolist())
        if chunk.uniform:
            yield map(_slice, repeat(chunk.view()), slices)
        else:
            views = map(chunk.table.map, out.segment[:count].tolist())
            yield map(_slice, views, slices)


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
        start = lsn - self._table.bases[row] + fmt.PAYLOAD_OFFSET
        payload = self._table.map(row)[start : start + int(h["length"])]
        return Entry(int(h["op"]), payload, int(h["kind"]), int(h["timestamp"]))

    def __repr__(self) -> str:
        if not len(self):
            return "<no drained entries>"
        return f"<{len(self)} drained entries, ops {self.headers['op'][0]} .. {self.headers['op'][-1]}>"
