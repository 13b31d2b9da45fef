"""Many entries as columns and arrays: what the C helper gathers, and the views that numpy lends of it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mmapwal import format as fmt
from mmapwal._native import ffi
from mmapwal.segment import SegmentTable

__all__ = ["HEADERS", "Collection", "Columns", "Gathered", "Header", "Room", "Run"]


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
"""The fields of Journal.headers(), where they are copied."""

_IN_FRAME = {"timestamp": "timestamp_ns", "checksum": "payload_crc"}
_NAMES: tuple[str, ...] = HEADERS.names or ()
_FRAME: Mapping[str, Any] = fmt.FRAME.fields or {}
LENT_HEADERS: np.dtype[Any] = np.dtype(
    {
        "names": list(_NAMES),
        "formats": [HEADERS[name] for name in _NAMES],
        "offsets": [_FRAME[_IN_FRAME.get(name, name)][1] for name in _NAMES],
        "itemsize": fmt.FRAME_BYTES,
    }
)
"""The same fields where they lie in a frame."""


@dataclass(frozen=True, eq=False)
class Columns:
    """Live entries as columns, one row an entry, by op.

    The payload of row i is ``views[segments[i]][offsets[i] : offsets[i] + lengths[i]]``: the views are
    read-only, of whole segment files, and keep their mappings for as long as they are held. The columns
    are copies. ``checksums`` are the payloads' CRC32C, ``timestamps`` in nanoseconds.
    """

    ops: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint32]
    timestamps: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.uint16]
    checksums: npt.NDArray[np.uint32]
    lsns: npt.NDArray[np.uint64]
    segments: npt.NDArray[np.uint32]
    views: tuple[memoryview, ...]

    def __len__(self) -> int:
        return len(self.ops)

    def payload(self, row: int) -> memoryview:
        """The payload of a row, no copy."""
        start = int(self.offsets[row])
        view = self.views[int(self.segments[row])]
        return view[start : start + int(self.lengths[row])]

    def __repr__(self) -> str:
        return f"<columns of {len(self)} entries in {len(self.views)} segments>"


class Room:
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


class Gathered(NamedTuple):
    """One chunk. The room is filled anew for the next."""

    table: SegmentTable
    out: Room
    rows: int
    uniform: bool  # all in one segment
    stride: int  # and evenly: the payloads are of one length, and begin so far apart; or 0

    def view(self) -> memoryview:
        """Of the segment, when they are all in one."""
        return self.table.map(int(self.out.segment[0]))

    def lengths(self) -> npt.NDArray[np.uint32]:
        return (self.out.end[: self.rows] - self.out.start[: self.rows]).astype(np.uint32)

    def headers(self) -> npt.NDArray[Any]:
        """A copy, as HEADERS."""
        out, n = self.out, self.rows
        part = np.empty(n, HEADERS)
        part["op"], part["lsn"], part["kind"] = out.op[:n], out.lsn[:n], out.kind[:n]
        part["timestamp"], part["checksum"] = out.timestamp_ns[:n], out.checksum[:n]
        part["length"] = self.lengths()
        return part


class Run(NamedTuple):
    """Payloads of one length, evenly spaced in one segment, in the order of their ops."""

    view: memoryview
    start: int
    rows: int
    length: int
    stride: int

    def payloads(self) -> npt.NDArray[np.uint8]:
        """(rows, length), read-only, on the mapping, which lives as long as the array."""
        shape, strides = (self.rows, self.length), (self.stride, 1)
        flat = np.frombuffer(self.view, np.uint8)  # an export: nobody can let go of the mapping under it
        return np.ndarray(shape, np.uint8, flat, self.start, strides)

    def headers(self) -> npt.NDArray[Any]:
        """The headers where they lie, before each payload."""
        flat = np.frombuffer(self.view, np.uint8)
        return np.ndarray((self.rows,), LENT_HEADERS, flat, self.start - fmt.FRAME_BYTES, (self.stride,))

    def joined(self, other: Run) -> Run | None:
        """This one and the next as one, where that is even too."""
        stride = other.start - (self.start + (self.rows - 1) * self.stride)
        if self.view is not other.view or self.length != other.length:
            return None
        if stride < fmt.frame_bytes(self.length):
            return None
        if any(run.rows > 1 and run.stride != stride for run in (self, other)):
            return None
        return self._replace(rows=self.rows + other.rows, stride=stride)


def _even(chunk: Gathered) -> Run | None:
    """The whole chunk as one run."""
    if not chunk.stride:
        return None
    start, end = int(chunk.out.start[0]), int(chunk.out.end[0])
    return Run(chunk.view(), start, chunk.rows, end - start, chunk.stride)


def _split(chunk: Gathered) -> Iterator[Run]:
    """The runs of a chunk: frames side by side in one segment, of one length."""
    even = _even(chunk)
    if even is not None:
        yield even
        return
    starts, segments = chunk.out.start[: chunk.rows], chunk.out.segment[: chunk.rows]
    lengths = chunk.lengths().astype(np.uint64)
    strides = (lengths + np.uint64(fmt.FRAME_BYTES + 7)) & ~np.uint64(7)
    breaks = (segments[1:] != segments[:-1]) | (lengths[1:] != lengths[:-1])
    breaks |= starts[1:] - starts[:-1] != strides[1:]
    firsts = np.concatenate((np.zeros(1, np.intp), np.flatnonzero(breaks) + 1))
    counts = np.diff(firsts, append=chunk.rows)
    rows = (column[firsts].tolist() for column in (segments, starts, lengths, strides))
    for count, segment, start, length, stride in zip(counts.tolist(), *rows, strict=True):
        yield Run(chunk.table.map(segment), start, count, length, stride)


def runs_of(chunks: Iterable[Gathered]) -> Iterator[Run]:
    """The payloads as the fewest evenly spaced runs, by op. ValueError when they differ in length."""
    run: Run | None = None
    for part in (part for chunk in chunks for part in _split(chunk)):
        if run is not None and part.length != run.length:
            raise ValueError(f"payloads of {run.length} and of {part.length} bytes are no rows of one array")
        joined = run.joined(part) if run is not None else part
        if joined is None and run is not None:
            yield run
        run = joined if joined is not None else part
    if run is not None:
        yield run


def stack(runs: Iterable[Run], *, copy: bool | None) -> npt.NDArray[np.uint8]:
    """All rows as one array: lent when they are one run, else copied. ValueError when `copy` is False and
    they are not."""
    parts = [run.payloads() for run in runs]
    if len(parts) == 1 and copy is not True:
        return parts[0]
    if copy is False and parts:
        raise ValueError(f"the payloads lie in {len(parts)} evenly spaced runs: no one array without a copy")
    whole = np.concatenate(parts) if parts else np.empty((0, 0), np.uint8)
    whole.flags.writeable = False
    return whole


def lent_headers(chunks: Iterable[Gathered]) -> npt.NDArray[Any] | None:
    """The headers where they lie in the segment; None when that is not evenly spaced in one."""
    run: Run | None = None
    for chunk in chunks:
        part = _even(chunk)
        if part is not None and run is not None:
            part = run.joined(part)
        if part is None:
            return None
        run = part
    return run.headers() if run is not None else np.empty(0, HEADERS)


def copied_headers(chunks: Iterable[Gathered]) -> npt.NDArray[Any]:
    parts = [chunk.headers() for chunk in chunks]
    return np.concatenate(parts) if parts else np.empty(0, HEADERS)


class Collection:
    """Columns in the making, of so many entries at most. Two threads may fill parts of it."""

    def __init__(self, rows: int) -> None:
        self._whole = Columns(
            np.empty(rows, np.uint64), np.empty(rows, np.uint64), np.empty(rows, np.uint32),
            np.empty(rows, np.int64), np.empty(rows, np.uint16), np.empty(rows, np.uint32),
            np.empty(rows, np.uint64), np.empty(rows, np.uint32), (),
        )  # fmt: skip
        self._views: list[memoryview] = []
        self._numbers: dict[int, int] = {}
        self._guard = threading.Lock()

    def _number(self, view: memoryview) -> int:
        with self._guard:
            number = self._numbers.setdefault(id(view), len(self._views))
            if number == len(self._views):
                self._views.append(view[:])  # the caller's own to release
            return number

    def take(self, chunks: Iterable[Gathered], at: int) -> int:
        """All chunks, from a row on; the row behind them."""
        whole = self._whole
        for chunk in chunks:
            out, n = chunk.out, chunk.rows
            present = [int(out.segment[0])] if chunk.uniform else np.unique(out.segment[:n]).tolist()
            number_of = np.zeros(present[-1] + 1, np.uint32)
            for row in present:
                number_of[row] = self._number(chunk.table.map(row))
            rows = slice(at, at := at + n)
            whole.ops[rows], whole.lsns[rows], whole.kinds[rows] = out.op[:n], out.lsn[:n], out.kind[:n]
            whole.offsets[rows], whole.lengths[rows] = out.start[:n], chunk.lengths()
            whole.timestamps[rows], whole.checksums[rows] = out.timestamp_ns[:n], out.checksum[:n]
            whole.segments[rows] = number_of[out.segment[:n]]
        return at

    def columns(self, parts: Sequence[tuple[int, int]]) -> Columns:
        """What was taken: rows from .. behind of each part, moved up to the part before."""
        arrays: dict[str, Any] = {f.name: getattr(self._whole, f.name) for f in fields(Columns)}
        del arrays["views"]
        at = 0
        for start, end in parts:
            if start > at:
                for array in arrays.values():
                    array[at : at + end - start] = array[start:end]
            at += end - start
        return Columns(**{name: array[:at] for name, array in arrays.items()}, views=tuple(self._views))
