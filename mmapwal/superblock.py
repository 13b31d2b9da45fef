"""The record that says what exists. Every change of structure commits by replacing it.

A replacement is written to a spare file, synced, renamed over the old one, and the directory synced:
before the rename nothing has happened, after it all of it. A file that was renamed is never torn, so
one that does not verify is rot, and is refused.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np

from mmapwal import format as fmt
from mmapwal.errors import (
    CorruptionError,
    ExhaustedError,
    IncompatibleFormatError,
    JournalError,
    PoisonedError,
)
from mmapwal.storage import Directory, Storage

log = logging.getLogger("mmapwal")

__all__ = ["Cut", "Removal", "Seal", "SegmentRecord", "Superblock", "SuperblockFile", "read_superblock"]


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """One segment that exists. `end_lsn` is behind its END frame, once a sync has covered that; else 0."""

    id: int
    base_lsn: int
    capacity: int
    generation: int = 0
    end_lsn: int = 0
    name: str = field(init=False, repr=False, compare=False)  # of id and generation

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", fmt.segment_name(self.id, self.generation))

    @property
    def next_base_lsn(self) -> int:
        return self.base_lsn + self.capacity

    @property
    def file_bytes(self) -> int:
        """With the header page. A file that is longer has grown by what is not ours."""
        return fmt.PAGE_BYTES + self.capacity


@dataclass(frozen=True, slots=True)
class Removal:
    """Ops first .. last are gone where their frames lie below the LSN."""

    first: int
    last: int
    below_lsn: int


@dataclass(frozen=True, slots=True)
class Cut:
    """truncate_from(op), committed by the superblock of that sequence. For followers, who were given what it
    removed. One that a later cut of the same op or a lower one follows is left out."""

    sequence: int
    op: int


@dataclass(frozen=True, slots=True)
class Seal:
    """What a clean close leaves: where the journal ends, and that the index may be believed."""

    lsn: int
    link: int
    index_crc: int
    live: int
    first_op: int
    last_op: int


_SEAL_FIELDS = ("seal_lsn", "seal_link", "index_crc", "seal_live", "seal_first_op", "seal_last_op")


@dataclass(frozen=True, slots=True)
class Superblock:
    """All the facts, immutable: a change is a new one."""

    uuid: bytes
    slot_count: int
    segment_bytes: int
    align_bytes: int
    sequence: int = 1
    watermark: int = 0
    next_segment_id: int = 1
    epoch: int = 1
    epoch_start_lsn: int = fmt.FIRST_LSN
    seal: Seal | None = None
    pairing: tuple[int, int] | None = None
    segments: tuple[SegmentRecord, ...] = ()
    removals: tuple[Removal, ...] = ()
    cuts: tuple[Cut, ...] = ()
    user_data: bytes = b""

    @property
    def next_base_lsn(self) -> int:
        """Where the next segment starts."""
        return self.segments[-1].next_base_lsn if self.segments else max(self.epoch_start_lsn, fmt.FIRST_LSN)

    @property
    def proven_lsn(self) -> int:
        """All below it had been durable, as far as this tells."""
        seal_lsn = self.seal.lsn if self.seal is not None else 0
        ends = (s.end_lsn for s in self.segments)
        return max(self.epoch_start_lsn, seal_lsn, *ends, *(r.below_lsn for r in self.removals))

    def with_epoch(self, start_lsn: int) -> Superblock:
        """The next epoch, from `start_lsn` on; it breaks the seal."""
        return replace(self, epoch=self.epoch + 1, epoch_start_lsn=start_lsn, seal=None)

    def with_cut(self, op: int) -> Superblock:
        """As the next one, which cuts the journal off at an op. Of too many the two oldest become one, which
        tells some followers of more than was removed."""
        cuts = [*(c for c in self.cuts if c.op < op), Cut(self.sequence + 1, op)]
        if len(cuts) > fmt.CUTS_MAX:
            cuts[:2] = [Cut(cuts[1].sequence, cuts[0].op)]
        return replace(self, cuts=tuple(cuts))

    def cut_since(self, sequence: int) -> int | None:
        """The lowest op at which the journal was cut off after the superblock of that sequence."""
        return min((c.op for c in self.cuts if c.sequence > sequence), default=None)

    @property
    def encoded_bytes(self) -> int:
        """How many bytes encode() gives."""
        lists = (self.segments, self.removals, self.cuts)
        rows = (len(n) * row.itemsize for n, (_, row) in zip(lists, fmt.SUPERBLOCK_LISTS, strict=True))
        return fmt.SUPERBLOCK_HEAD.itemsize + sum(rows) + 4

    def checked(self) -> Superblock:
        """Itself, when it will be read again. ExhaustedError names what has counted beyond its end;
        JournalError for anything else that decode() would refuse."""
        for used_up in _used_up(self):
            raise ExhaustedError(f"the journal cannot go on: {used_up}")
        for wrong in _contradictions(self):
            raise JournalError(f"the superblock would contradict itself: {wrong}")
        return self

    def encode(self) -> bytes:
        head: Any = np.zeros((), fmt.SUPERBLOCK_HEAD)
        head["magic"] = fmt.SUPERBLOCK_MAGIC
        head["version"] = fmt.FORMAT_VERSION
        head["uuid"] = np.void(self.uuid)
        for name in (
            "sequence", "slot_count", "segment_bytes", "align_bytes", "watermark", "next_segment_id",
            "epoch", "epoch_start_lsn",
        ):  # fmt: skip
            head[name] = getattr(self, name)
        if self.seal is not None:
            head["flags"] |= fmt.SUPERBLOCK_SEALED
            for name, value in zip(_SEAL_FIELDS, astuple(self.seal), strict=True):
                head[name] = value
        if self.pairing is not None:
            head["flags"] |= fmt.SUPERBLOCK_PAIRED
            head["snapshot_op"], head["snapshot_crc"] = self.pairing
        head["segment_count"], head["removal_count"] = len(self.segments), len(self.removals)
        head["cut_count"] = len(self.cuts)
        head["user_bytes"] = len(self.user_data)
        head["user"] = np.void(self.user_data.ljust(fmt.USER_DATA_BYTES_MAX, b"\0"))
        segments = np.array(
            [(s.id, s.base_lsn, s.capacity, s.end_lsn, s.generation, 0) for s in self.segments],
            fmt.SUPERBLOCK_SEGMENT,
        )
        removals = np.array([(r.first, r.last, r.below_lsn) for r in self.removals], fmt.SUPERBLOCK_REMOVAL)
        cuts = np.array([(c.sequence, c.op) for c in self.cuts], fmt.SUPERBLOCK_CUT)
        head["bytes"] = self.encoded_bytes
        body: bytes = head.tobytes() + segments.tobytes() + removals.tobytes() + cuts.tobytes()
        return body + struct.pack("<I", fmt.crc32c(body))

    @classmethod
    def decode(cls, data: bytes) -> Superblock:
        """ValueError says what is wrong; IncompatibleFormatError for another version."""
        if len(data) < fmt.SUPERBLOCK_HEAD.itemsize + 4:
            raise ValueError(f"only {len(data)} bytes long")
        head: Any = np.frombuffer(data, fmt.SUPERBLOCK_HEAD, 1)[0]
        if bytes(head["magic"]) != fmt.SUPERBLOCK_MAGIC:
            raise ValueError("not a superblock")
        if int(head["version"]) != fmt.FORMAT_VERSION and not _is_rot_of_version(data):
            raise IncompatibleFormatError(
                f"format version {head['version']}; this mmapwal reads version {fmt.FORMAT_VERSION}"
            )
        *places, end = fmt.superblock_places(head)
        if int(head["bytes"]) != end + 4 or end + 4 > len(data):
            raise ValueError("its length does not fit its contents")
        if struct.unpack_from("<I", data, end)[0] != fmt.crc32c(data[:end]):
            raise ValueError("its checksum is wrong")
        flags = int(head["flags"])
        if flags & ~(fmt.SUPERBLOCK_SEALED | fmt.SUPERBLOCK_PAIRED):
            raise ValueError(f"it has flags that nobody sets: {flags:#x}")
        if int(head["user_bytes"]) > fmt.USER_DATA_BYTES_MAX:
            raise ValueError(f"it has {head['user_bytes']} bytes of user data")
        segments, removals, cuts = (
            np.frombuffer(data, row, int(head[count]), at).tolist()
            for at, (count, row) in zip(places, fmt.SUPERBLOCK_LISTS, strict=True)
        )
        superblock = cls(
            uuid=bytes(head["uuid"]),
            slot_count=int(head["slot_count"]),
            segment_bytes=int(head["segment_bytes"]),
            align_bytes=int(head["align_bytes"]),
            sequence=int(head["sequence"]),
            watermark=int(head["watermark"]),
            next_segment_id=int(head["next_segment_id"]),
            epoch=int(head["epoch"]),
            epoch_start_lsn=int(head["epoch_start_lsn"]),
            seal=Seal(*(int(head[name]) for name in _SEAL_FIELDS)) if flags & fmt.SUPERBLOCK_SEALED else None,
            pairing=(int(head["snapshot_op"]), int(head["snapshot_crc"]))
            if flags & fmt.SUPERBLOCK_PAIRED
            else None,
            segments=tuple(
                SegmentRecord(id, base, capacity, generation, end)
                for id, base, capacity, end, generation, _ in segments
            ),
            removals=tuple(Removal(*row) for row in removals),
            cuts=tuple(Cut(*row) for row in cuts),
            user_data=bytes(head["user"])[: int(head["user_bytes"])],
        )
        wrong = next(_contradictions(superblock), None)
        if wrong is not None:
            raise ValueError(f"it contradicts itself: {wrong}")
        return superblock


def _contradictions(s: Superblock) -> Iterator[str]:
    """What no journal writes, though the checksum is right: sizes, places and counts are bounded here, before
    anything is allocated, mapped or added up by them. Asked before a write too: what is written is read."""
    yield from _used_up(s)
    if len(s.removals) > fmt.REMOVALS_MAX or len(s.cuts) > fmt.CUTS_MAX:
        yield f"{len(s.removals)} removals, {len(s.cuts)} cuts"
    if not 1 <= s.slot_count <= fmt.SLOTS_MAX:
        yield f"{s.slot_count} slots"
    sized = fmt.SEGMENT_BYTES_MIN <= s.segment_bytes <= fmt.SEGMENT_BYTES_MAX
    if not sized or s.segment_bytes % fmt.PAGE_BYTES:
        yield f"segments of {s.segment_bytes} bytes"
    if s.align_bytes not in fmt.ALIGN_CHOICES:
        yield f"commits aligned to {s.align_bytes} bytes"
    if s.epoch < 1:
        yield f"epoch {s.epoch}"
    if s.watermark > fmt.OP_MAX or (s.pairing is not None and s.pairing[0] > s.watermark):
        yield f"watermark {s.watermark}, paired with {s.pairing}"
    yield from _misplaced(s)
    if not fmt.FIRST_LSN <= s.epoch_start_lsn <= s.next_base_lsn:
        yield f"the epoch starts at LSN {s.epoch_start_lsn}, the segments end at {s.next_base_lsn}"
    for r in s.removals:
        if not 1 <= r.first <= r.last <= fmt.OP_MAX or r.below_lsn > s.next_base_lsn:
            yield f"{r}"
    for c in s.cuts:
        if not 1 <= c.op <= fmt.OP_MAX or c.sequence > s.sequence:
            yield f"{c} in the superblock of sequence {s.sequence}"
    if s.seal is not None:
        live, first, last = s.seal.live, s.seal.first_op, s.seal.last_op
        counted = s.watermark < first <= last <= fmt.OP_MAX and live <= min(s.slot_count, last - first + 1)
        if live == 0:
            counted = first == last == 0
        if not counted or not s.epoch_start_lsn <= s.seal.lsn <= s.next_base_lsn:
            yield f"{s.seal}"


def _used_up(s: Superblock) -> Iterator[str]:
    """What only grows, and has come to its end."""
    for name, number, most in (
        ("epoch", s.epoch, fmt.EPOCH_MAX),
        ("sequence", s.sequence, fmt.SEQUENCE_MAX),
        ("next segment", s.next_segment_id, fmt.SEGMENT_ID_MAX),
        ("generation", max((r.generation for r in s.segments), default=0), fmt.GENERATION_MAX),
        ("LSN", s.next_base_lsn, fmt.LSN_MAX),
        ("number of segments", len(s.segments), fmt.SEGMENTS_MAX),
    ):
        if number > most:
            yield f"{name} {number}, and {most} is the last"


def _misplaced(s: Superblock) -> Iterator[str]:
    """Segments that are no segments, or not in order one behind the other."""
    end, last_id = fmt.FIRST_LSN, 0
    for r in s.segments:
        sized = 0 < r.capacity <= fmt.CAPACITY_MAX and r.capacity % fmt.PAGE_BYTES == 0
        placed = r.base_lsn >= end and r.base_lsn % 8 == 0 and last_id < r.id < s.next_segment_id
        ended = r.end_lsn == 0 or r.base_lsn < r.end_lsn <= r.next_base_lsn
        if not (sized and placed and ended):
            yield f"{r}"
        end, last_id = r.next_base_lsn, r.id


def _is_rot_of_version(data: bytes) -> bool:
    """Whether all is right but the version: damage, and not the mark of another format."""
    head: Any = np.frombuffer(data, fmt.SUPERBLOCK_HEAD, 1).copy()
    head["version"] = fmt.FORMAT_VERSION
    end = int(head["bytes"][0]) - 4
    body = head.tobytes() + data[head.nbytes : end]
    return len(data) >= end + 4 and data[end : end + 4] == struct.pack("<I", fmt.crc32c(body))


def read_superblock(directory: Directory) -> Superblock | None:
    """Empty (None), present, or unreadable: CorruptionError, IncompatibleFormatError, OSError."""
    try:
        storage = directory.open(fmt.SUPERBLOCK_NAME)
    except FileNotFoundError:
        return None
    try:
        if len(storage) > fmt.SUPERBLOCK_BYTES_MAX:
            raise CorruptionError(fmt.SUPERBLOCK_NAME, 0, 0, None, f"{len(storage)} bytes long")
        data = bytes(storage.read_at(0, len(storage)))
    finally:
        storage.close()
    try:
        return Superblock.decode(data)
    except ValueError as e:
        raise CorruptionError(fmt.SUPERBLOCK_NAME, 0, 0, None, str(e)) from e
    except IncompatibleFormatError as e:
        raise IncompatibleFormatError(f"{directory}: {e}") from None


class SuperblockFile:
    """Owns the facts that are in force. Callers hold the engine's structure lock."""

    def __init__(self, directory: Directory, current: Superblock) -> None:
        self._directory = directory
        self._spare: Storage | None = None
        self.current = current
        self.in_doubt = False  # nobody knows which one is in force

    def next(self, new: Superblock) -> Superblock:
        """What commit() would write. ExhaustedError or JournalError: a read would refuse it."""
        return replace(new, sequence=self.current.sequence + 1).checked()

    def commit(self, new: Superblock) -> None:
        """Makes `new`, with the next sequence, the one in force; durable at return. Blocks.

        OSError, or what next() raises: nothing has happened. PoisonedError: it may be in force or not. The
        same holds for any exception, KeyboardInterrupt too.
        """
        new = self.next(new)
        self._write_spare(new)
        stage = "the superblock's rename"
        try:
            self.in_doubt = True
            self._directory.rename(fmt.SUPERBLOCK_SPARE_NAME, fmt.SUPERBLOCK_NAME)
            stage = "the superblock's directory sync"
            self._directory.sync()
            self.current = new
            self.in_doubt = False
        except BaseException as e:
            raise PoisonedError(stage) from e
        self._allocate_spare()

    def _write_spare(self, new: Superblock) -> None:
        data = new.encode()
        spare, self._spare = self._spare, None
        try:
            if spare is None or len(spare) < len(data):
                if spare is not None:
                    spare.close()
                spare = self._directory.create(fmt.SUPERBLOCK_SPARE_NAME)
            spare.write_at(0, data)
            spare.sync()
        except BaseException:
            # A sync that failed is not repeated on the same file: the next one is new.
            with contextlib.suppress(OSError):
                self._directory.unlink(fmt.SUPERBLOCK_SPARE_NAME)
            raise
        finally:
            if spare is not None:
                spare.close()

    def _allocate_spare(self) -> None:
        """Blocks for the next one, so that space can be given back on a full disk. Best effort."""
        room = self.current.encoded_bytes + fmt.PAGE_BYTES
        room += -room % fmt.PAGE_BYTES
        try:
            spare = self._directory.create(fmt.SUPERBLOCK_SPARE_NAME)
        except OSError:
            return
        try:
            spare.write_at(0, bytes(room))
        except OSError:
            spare.close()
        else:
            self._spare = spare

    def remove_files(self, names: Iterable[str]) -> list[str]:
        """Unlinks what no superblock names. What fails is tried again at the next open; so is all of it
        while nobody knows which superblock is in force."""
        if self.in_doubt:
            return []
        removed = []
        for name in names:
            try:
                self._directory.unlink(name)
                removed.append(name)
            except OSError as e:
                log.info("%s could not be removed: %s", name, e)
        return removed

    def close(self) -> None:
        if self._spare is not None:
            self._spare.close()
            self._spare = None
