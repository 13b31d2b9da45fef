"""Segments: made ahead, opened, mapped when first read, and lent out as views."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.errors import CorruptionError, IncompatibleFormatError
from mmapwal.injected import InjectedIO
from mmapwal.storage import Directory, MappedStorage, Storage, SyncMethod
from mmapwal.superblock import SegmentRecord

__all__ = ["NewSegment", "Segment", "SegmentSet", "SegmentTable", "encode_header", "make_segment"]

ZERO_STEP_BYTES = 1 << 20
MAPPINGS_MAX = 16_384  # vm.max_map_count is 65,530 by default
_ZEROS = bytes(ZERO_STEP_BYTES)


def encode_header(uuid: bytes, record: SegmentRecord) -> bytes:
    """The header page; it never changes afterwards."""
    return _header(uuid, record).ljust(fmt.PAGE_BYTES, b"\0")


def _header(uuid: bytes, record: SegmentRecord) -> bytes:
    fields = (
        fmt.SEGMENT_MAGIC, fmt.FORMAT_VERSION, record.generation, uuid, record.id, record.base_lsn,
        record.capacity, fmt.segment_salt(uuid, record.id), 0,
    )  # fmt: skip
    body = np.array(fields, fmt.SEGMENT_HEADER).tobytes()[:-4]
    return body + fmt.crc32c(body).to_bytes(4, "little")


def check_header(data: bytes, uuid: bytes, record: SegmentRecord) -> None:
    """CorruptionError or IncompatibleFormatError unless it is what `record` says."""
    if data[: fmt.SEGMENT_HEADER.itemsize] == _header(uuid, record):
        return

    def damaged(offset: int, reason: str) -> CorruptionError:
        return CorruptionError(record.name, offset, record.base_lsn, None, reason)

    if len(data) < fmt.SEGMENT_HEADER.itemsize:
        raise damaged(len(data), f"the file is only {len(data)} bytes long")
    header: Any = np.frombuffer(data, fmt.SEGMENT_HEADER, 1)[0]
    if bytes(header["magic"]) != fmt.SEGMENT_MAGIC:
        raise damaged(0, "not a segment")
    if int(header["crc"]) != fmt.crc32c(data[: fmt.SEGMENT_HEADER.itemsize - 4]):
        raise damaged(0, "the checksum of the header is wrong")
    if int(header["version"]) != fmt.FORMAT_VERSION:
        raise IncompatibleFormatError(f"{record.name}: format version {header['version']}")
    raise damaged(0, "the segment belongs to another journal or another place")


class NewSegment:
    """A segment file in the making, under a temporary name. For one thread at a time. No superblock
    names a file of that name yet.

    OSError from any call: discard() it; nothing exists under its name, or nothing that a superblock names.
    """

    def __init__(self, directory: Directory, uuid: bytes, record: SegmentRecord) -> None:
        self.record = record
        self._directory = directory
        self._length = record.file_bytes
        self._end = fmt.PAGE_BYTES
        self._synced = False
        try:
            self._storage = directory.create(self._temporary)
            self._storage.write_at(0, encode_header(uuid, record))
            self._hint: Callable[[int, int], None] | None = getattr(self._storage, "start_writeback", None)
        except BaseException:
            self.discard()
            raise

    @property
    def _temporary(self) -> str:
        return self.record.name + ".tmp"

    @property
    def left_bytes(self) -> int:
        """That have no zeros yet."""
        return self._length - self._end

    def write_zeros(self, step_bytes: int = ZERO_STEP_BYTES) -> bool:
        """One step, at most ZERO_STEP_BYTES, sent on its way to the device; whether more is to come."""
        step = min(step_bytes, self.left_bytes)
        if step > 0:
            offset = self._end
            self._end += self._storage.write_at(offset, memoryview(_ZEROS)[:step])
            if self._hint is not None:
                self._hint(offset, step)
            elif self.left_bytes > 0 and self._end // ZERO_STEP_BYTES != offset // ZERO_STEP_BYTES:
                self._storage.sync()  # so that no sync has to wait for more than that
        return self.left_bytes > 0

    def leave_holes(self) -> None:
        """Instead of zeros: for what no frame goes into any more."""
        self._storage.truncate(self._length)
        self._end = self._length

    def write(self, contents: Iterable[tuple[int, Any]], source: Storage | None = None) -> None:
        """(offset, bytes) each. With a source, memoryviews among them are what that has at this place."""
        copy_from = getattr(self._storage, "copy_from", None)
        for offset, data in contents:
            start, end = offset + -offset % fmt.PAGE_BYTES, offset + len(data)
            end -= end % fmt.PAGE_BYTES
            if source is None or copy_from is None or type(data) is bytes or start >= end:
                self._storage.write_at(offset, data)
                continue
            end = start + copy_from(source, start, end - start)
            for at, rest in ((offset, data[: start - offset]), (end, data[end - offset :])):
                if len(rest) > 0:
                    self._storage.write_at(at, rest)

    def sync(self) -> None:
        """Blocks; what was written is durable, its name is not."""
        self._storage.sync()
        self._synced = True

    def publish(self) -> None:
        """Under its name, durable at return. Blocks."""
        if not self._synced:
            self.sync()
        self._storage.close()
        self._directory.rename(self._temporary, self.record.name)
        self._directory.sync()

    def discard(self) -> None:
        """Nothing is left of it, under a name that is its own."""
        with contextlib.suppress(OSError, AttributeError):  # it may not even have been opened
            self._storage.close()
        for name in (self._temporary, self.record.name):
            with contextlib.suppress(OSError):
                self._directory.unlink(name)


def make_segment(
    directory: Directory, uuid: bytes, record: SegmentRecord, contents: Iterable[tuple[int, Any]] = (), *,
    sparse: bool = False, source: Storage | None = None,
) -> None:  # fmt: skip
    """Makes the file under its name, durable at return: header, zeros to the end, then `contents`
    (offset, bytes). `sparse` leaves holes instead of zeros; memoryviews are also what `source` has at the
    same place. Blocks. OSError: as NewSegment."""
    making = NewSegment(directory, uuid, record)
    try:
        if sparse:
            making.leave_holes()
        while making.left_bytes > 0:
            making.write_zeros()
        making.write(contents, source)
        making.publish()
    except BaseException:
        making.discard()
        raise


class Segment:
    """One segment file that the superblock names. Mapped at the first read; the mapping lives as
    long as this object or any view of it."""

    def __init__(self, directory: Directory, uuid: bytes, record: SegmentRecord) -> None:
        self.record = record
        self.salt = fmt.segment_salt(uuid, record.id)
        self._directory = directory
        self._uuid = uuid
        self._storage: Storage | None = None
        self._writer: Storage | None = None
        self._io: Any = None
        self._view: memoryview | None = None
        self._address: Any = None
        self._guard = threading.Lock()

    def _open(self, *, writable: bool = False, sync_method: SyncMethod = SyncMethod.FDATASYNC) -> Storage:
        record = self.record
        try:
            storage = self._directory.open(record.name, writable=writable, sync_method=sync_method)
        except FileNotFoundError as e:
            raise CorruptionError(
                record.name, 0, record.base_lsn, None, "the superblock names it, but it is not there"
            ) from e
        try:
            self._check_length(len(storage))
            check_header(bytes(storage.read_at(0, fmt.SEGMENT_HEADER.itemsize)), self._uuid, record)
        except BaseException:
            storage.close()
            raise
        return storage

    def _check_length(self, length: int) -> None:
        """What is behind the end of a mapping is not ours."""
        if length < self.record.file_bytes:
            raise CorruptionError(
                self.record.name, length, self.record.base_lsn, None, f"the file was cut to {length} bytes"
            )

    def check(self) -> None:
        """CorruptionError unless the file is there, whole in size, and of this place."""
        if self._view is None and self._writer is None:
            self._open().close()

    @property
    def view(self) -> memoryview:
        """The whole segment, header page included, read-only; not what else its file may have grown by."""
        if self._view is None:
            with self._guard:
                if self._view is None:
                    storage = self._writer or self._open()
                    view = storage.view()[: self.record.file_bytes]
                    if storage is not self._writer:
                        storage.close()
                    self._check_length(len(view))
                    self._storage = storage
                    # A bare address, kept right by the view: a long-lived from_buffer() of a memoryview
                    # crashes CPython's garbage collector when both end in one cycle.
                    self._address = ffi.cast("const uint8_t *", ffi.from_buffer(view))
                    self._view = view
        return self._view

    @property
    def is_mapped(self) -> bool:
        return self._view is not None

    @property
    def frames(self) -> Any:
        """Pointer to the first byte behind the header page; right as long as this object is."""
        self.view  # noqa: B018  # maps it
        return self._address + fmt.PAGE_BYTES

    def copy(self, offset: int, length: int) -> bytearray:
        """Bytes of its mapping. OSError when the disk fails."""
        data = bytearray(length)
        rc = lib.mw_copy_guarded(ffi.from_buffer(data), self.frames + (offset - fmt.PAGE_BYTES), length)
        if rc < 0:
            raise OSError(-rc, "reading the segment failed", self.record.name)
        return data

    def unmap(self) -> None:
        """Lets go of the mapping; the next view makes a new one."""
        with self._guard:
            self._view = self._address = self._storage = None

    def start_writing(self, sync_method: SyncMethod) -> Any:
        """The C committer's table of functions for this file. OSError: only the first time."""
        if self._writer is None:
            self._writer = self._open(writable=True, sync_method=sync_method)
            if isinstance(self._writer, MappedStorage):
                self._io = self._writer.native_io()
            else:
                self._io = InjectedIO(self._writer)
        return self._io if not isinstance(self._io, InjectedIO) else self._io.table

    @property
    def is_writing(self) -> bool:
        return self._writer is not None

    def stop_writing(self) -> None:
        """Gives the descriptor back. The committer has left the segment, or is closed."""
        with self._guard:
            writer, self._writer, self._io = self._writer, None, None
        if writer is not None:
            writer.close()

    def after_fork(self) -> None:
        """In the child: one of the parent's threads may have held the lock."""
        self._guard = threading.Lock()

    def take_error(self) -> BaseException | None:
        """What an injected storage raised into the committer."""
        if not isinstance(self._io, InjectedIO):
            return None
        error, self._io.error = self._io.error, None
        return error

    def retire(self, held: HeldMappings) -> None:
        """No superblock names it any more: note what views still hold of it."""
        if self._storage is not None:
            held.retire(self._storage, time.monotonic())


# Where the second part of a lane begins; of each part the view (None: not mapped, or no segment), and what to
# take off an LSN for the offset of its payload.
Lane = tuple[int, memoryview | None, int, memoryview | None, int]


class SegmentTable:
    """The segments at one moment, immutable: a reader that holds it can follow any LSN that it had."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.segments = tuple(sorted(segments, key=lambda s: s.record.base_lsn))
        self.bases = [s.record.base_lsn for s in self.segments]
        self.views: list[memoryview | None] = [s.view if s.is_mapped else None for s in self.segments]
        self._refs = ffi.new("struct mw_segment_ref[]", max(1, len(self.segments)))
        for ref, segment in zip(self._refs, self.segments, strict=False):
            ref.base_lsn, ref.capacity = segment.record.base_lsn, segment.record.capacity
            ref.salt = segment.salt
            ref.frames = segment.frames if segment.is_mapped else ffi.NULL
        self.native = ffi.new("struct mw_table *", {"refs": self._refs, "count": len(self.segments)})
        # For reading one entry: _lane() of each that was read from, filled by lend(). Segments are longer
        # than a lane, so mostly no more than two meet in it.
        self.lanes: dict[int, Lane] = {}
        self.lane_bits = min((s.record.capacity for s in self.segments), default=1).bit_length() - 1

    def _zone(self, lsn: int) -> tuple[memoryview | None, int]:
        row = self.row(lsn)
        return (None, 0) if row < 0 else (self.views[row], self.bases[row] - fmt.PAYLOAD_OFFSET)

    def lend(self, lsn: int) -> None:
        """Lets read() find the LSN, whose segment is mapped, by its lane. Two threads may do it at once: what
        one of them overwrites is put right by the next read there."""
        number = lsn >> self.lane_bits
        edge, first, _, second, _ = self.lanes.get(number, (0, None, 0, None, 0))
        if (first if lsn < edge else second) is not None:
            return
        start, end = number << self.lane_bits, (number + 1) << self.lane_bits
        near = self.segments[max(0, bisect_right(self.bases, start) - 1) : bisect_right(self.bases, end)]
        ends = {at for s in near for at in (s.record.base_lsn, s.record.next_base_lsn) if start < at < end}
        if len(ends) < 2:  # else two of them and a hole: looked up each time
            edge = ends.pop() if ends else end
            self.lanes[number] = (edge, *self._zone(start), *self._zone(edge))

    def row(self, lsn: int) -> int:
        """The row of the segment that has the LSN; -1 when none has."""
        row = bisect_right(self.bases, lsn) - 1
        if row >= 0 and lsn < self.segments[row].record.next_base_lsn:
            return row
        return -1

    def map(self, row: int) -> memoryview:
        """Maps the segment of that row where it is not."""
        view = self.views[row]
        if view is None:
            segment = self.segments[row]
            view = self.views[row] = segment.view
            self._refs[row].frames = segment.frames
        return view

    @property
    def mapped_count(self) -> int:
        return sum(s.is_mapped for s in self.segments)


class HeldMappings:
    """What views keep alive after the journal let go of it: bytes, and since when."""

    def __init__(self) -> None:
        self._held: list[tuple[weakref.ref[Any], int, float]] = []
        self._guard = threading.Lock()

    def retire(self, storage: Storage, now: float) -> None:
        mapping = getattr(storage, "_mapping", None)
        if mapping is not None:
            with self._guard:
                self._held.append((weakref.ref(mapping.address), mapping.length, now))

    def after_fork(self) -> None:
        """In the child."""
        self._guard = threading.Lock()

    def held(self) -> list[tuple[int, float]]:
        with self._guard:
            self._held = [h for h in self._held if h[0]() is not None]
            return [(length, since) for _, length, since in self._held]


class SegmentSet:
    """Owns which Segment objects are in force. Changed under the structure lock, read at any time."""

    def __init__(self, directory: Directory, uuid: bytes, records: Iterable[SegmentRecord]) -> None:
        self._directory = directory
        self._uuid = uuid
        self.held = HeldMappings()
        self._mapped_since = 0
        self._expected: Segment | None = None
        self.table = SegmentTable(Segment(directory, uuid, r) for r in records)

    def after_fork(self) -> None:
        """In the child."""
        for segment in self.table.segments:
            segment.after_fork()
        self.held.after_fork()

    def by_id(self, segment_id: int) -> Segment | None:
        return next((s for s in self.table.segments if s.record.id == segment_id), None)

    @contextlib.contextmanager
    def expecting(self, record: SegmentRecord, sync_method: SyncMethod) -> Iterator[None]:
        """Opens the file of one to come for writing, so that a want of descriptors or memory is an ordinary
        error: no superblock names it yet. Within, follow() takes it over."""
        self._expected = segment = Segment(self._directory, self._uuid, record)
        try:
            segment.start_writing(sync_method)
            yield
        finally:
            if self._expected is segment:
                self._expected = None
                segment.stop_writing()

    def follow(self, records: Iterable[SegmentRecord]) -> list[Segment]:
        """Takes over what a new superblock names; returns those that it no longer names."""
        present = {s.record.name: s for s in self.table.segments}
        kept = []
        for record in records:
            segment = present.pop(record.name, None)
            if segment is None and self._expected is not None and self._expected.record.name == record.name:
                segment, self._expected = self._expected, None
            if segment is None:
                segment = Segment(self._directory, self._uuid, record)
            segment.record = record
            kept.append(segment)
        self.table = SegmentTable(kept)
        for segment in present.values():
            segment.retire(self.held)
        return list(present.values())

    def bound_mappings(self) -> None:
        """Lets go of the mappings of segments that are only read, when there are too many."""
        self._mapped_since = 0
        if self.table.mapped_count > MAPPINGS_MAX:
            self.unmap(0)

    def count_mapping(self) -> bool:
        """One more was mapped to be read; whether it is time for bound_mappings()."""
        self._mapped_since += 1
        return self._mapped_since >= MAPPINGS_MAX

    def unmap(self, from_lsn: int) -> None:
        """Lets go of the mappings from an LSN on, but not of what is being written."""
        fresh = []
        for segment in self.table.segments:
            if segment.is_writing or not segment.is_mapped or segment.record.next_base_lsn <= from_lsn:
                fresh.append(segment)
            else:
                segment.retire(self.held)
                fresh.append(Segment(self._directory, self._uuid, segment.record))
        self.table = SegmentTable(fresh)


def scan_fields(**fields: Any) -> Any:
    """A struct mw_scan with these fields, batch and link taken from `lsn` and `link`."""
    scan = ffi.new("struct mw_scan *", fields)
    scan.batch_lsn, scan.batch_link = scan.lsn, scan.link
    if "limit_lsn" not in fields:
        scan.limit_lsn = 2**64 - 1
    return scan


def native_scan(scan: Any, name: str, *, hunt: bool = False) -> None:
    """Runs it; OSError when the disk fails under it."""
    rc = lib.mw_hunt(scan) if hunt else lib.mw_scan(scan)
    if rc < 0:
        raise OSError(-rc, "reading the segment failed", name)
