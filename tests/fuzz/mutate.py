"""Bytes that drive a mutation of valid files, and make the checksums right again.

The same bytes make the same mutation, whoever draws them: hypothesis, atheris, or a random generator.
Shorter ones, and zeros, mean less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from mmapwal import JournalError
from mmapwal import format as fmt
from mmapwal._native import lib
from mmapwal.superblock import Superblock

from .images import LIVES, SNAPSHOTS, Grown, Image, frames_in, grown, segment_of

T = TypeVar("T")

TARGETS = ("segment", "index", "superblock", "snapshot", "all")
MUTATIONS_MAX = 4
FILE_BYTES_MAX = 1 << 20
ODD = (
    0, 1, 2, 7, 8, 55, 56, 57, 63, 64, 65, 511, 512, 4095, 4096, 4097, 8192, 12288, 16384,
    2**15 - 1, 2**15, 2**16 - 1, 2**20, 2**31 - 1, 2**31, 2**32 - 57, 2**32 - 1, 2**32, 2**32 + 1,
    2**62, 2**63 - 2, 2**63 - 1, 2**63, 2**64 - 4096, 2**64 - 8, 2**64 - 1,
)  # fmt: skip


class Source:
    """Reads choices off the input; an input that is used up gives zeros."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, bound: int) -> int:
        """0 .. bound - 1."""
        width = max(1, (bound - 1).bit_length() + 7 >> 3)
        taken = self._data[self._at : self._at + width]
        self._at += width
        return int.from_bytes(taken, "little") % bound

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]


class Mutation:
    """One mutated image: `files`, what it was made of, and what was done, for who has to read it."""

    def __init__(self, data: bytes, target: str, *, repaired: bool) -> None:
        self.data = data
        self.source = source = Source(data)
        self.grown: Grown = grown(source.below(LIVES))
        self.target, self.repaired = target, repaired
        self.files: Image = dict(self.grown.image)
        self.log: list[str] = []
        self.touched: set[str] = set()
        self.stale_superblock = False
        for _ in range(1 + source.below(MUTATIONS_MAX)):
            self._mutate()
        self.touched = {n for n in self.touched if self.files.get(n) != self.grown.image.get(n)}
        self.mended: set[str] = set()
        """What has right checksums again, where they are looked for."""
        if repaired:
            self._repair()

    def __str__(self) -> str:
        return f"{self.target}{', repaired' * self.repaired}: {'; '.join(self.log)}"

    @property
    def is_past_checksums(self) -> bool:
        """Whether something was changed, and no checksum tells of it."""
        changed = self.touched & self.files.keys()
        return bool(changed) and changed <= self.mended

    # --- what is mutated

    def _names(self) -> list[str]:
        kinds = {
            "segment": lambda n: n.startswith("segment"),
            "index": lambda n: n == fmt.INDEX_NAME,
            "superblock": lambda n: n == fmt.SUPERBLOCK_NAME,
            "snapshot": lambda n: n.startswith(SNAPSHOTS),
            "all": lambda n: n != fmt.SUPERBLOCK_SPARE_NAME,
        }
        return sorted(n for n in self.files if kinds[self.target](n))

    def _mutate(self) -> None:
        names = self._names()
        if not names:
            return
        name = self.source.pick(names)
        data = bytearray(self.files[name])
        fields = {
            "segment": (self._frame_field, self._frame_moved, self._frame_removed, self._segment_field),
            "index": (self._index_field, self._slot_field, self._slots_swapped),
            "superblock": (self._superblock_field, self._row_field, self._rows_moved),
            "snapshot": (self._snapshot_field,),
        }
        bytewise = (
            self._bit, self._byte, self._zeroed, self._swapped, self._stale, self._cut, self._lengthened,
            self._gone, self._copied,
        )  # fmt: skip
        own: tuple[Callable[[str, bytearray], None], ...] = fields[kind_of(name)]
        # Fields three times as often as bytes where the checksums are made right.
        do = self.source.pick(bytewise + own * (6 if self.repaired else 2))
        self.log.append(f"{do.__name__.strip('_')} of {name}")
        do(name, data)
        if name in self.files and do != self._gone:
            self.files[name] = bytes(data)
        self.touched.add(name)

    # --- bytes of any file

    def _place(self, data: bytearray, step: int = 1) -> int:
        return self.source.below(max(1, len(data) // step)) * step

    def _bit(self, name: str, data: bytearray) -> None:
        if data:
            data[self._place(data)] ^= 1 << self.source.below(8)

    def _byte(self, name: str, data: bytearray) -> None:
        if data:
            data[self._place(data)] = self.source.below(256)

    def _zeroed(self, name: str, data: bytearray) -> None:
        at, length = self._place(data, 8), self.source.pick((8, 56, 64, 512, 4096))
        part = data[at : at + length]
        data[at : at + length] = bytes(len(part))

    def _swapped(self, name: str, data: bytearray) -> None:
        size = self.source.pick((8, 512, 4096))
        a, b = self._place(data, size), self._place(data, size)
        if abs(a - b) >= size and max(a, b) + size <= len(data):
            data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]

    def _stale(self, name: str, data: bytearray) -> None:
        """A part of the file, or all of it, as it was at an earlier time."""
        times = [image[name] for image in self.grown.earlier if name in image]
        if not times:
            return
        old, size = self.source.pick(times), self.source.pick((512, 4096, FILE_BYTES_MAX))
        at = self._place(data, size)
        self.stale_superblock |= name == fmt.SUPERBLOCK_NAME and size >= len(old)
        data[at : at + size] = old[at : at + size]

    def _cut(self, name: str, data: bytearray) -> None:
        del data[self._place(data, self.source.pick((1, 512, 4096))) :]

    def _lengthened(self, name: str, data: bytearray) -> None:
        data += bytes([self.source.below(256)]) * self.source.pick((1, 8, 512, 4096))

    def _gone(self, name: str, data: bytearray) -> None:
        del self.files[name]

    def _copied(self, name: str, data: bytearray) -> None:
        """A block of another file, or of another journal, at the same or another place."""
        other = grown(self.source.below(LIVES)).image if self.source.below(2) else self.grown.image
        from_data = other[self.source.pick(sorted(n for n in other if kind_of(n) == kind_of(name)) or [name])]
        size = self.source.pick((56, 512, 4096, FILE_BYTES_MAX))
        at = self._place(data, min(size, 512))
        start = at if self.source.below(2) else 0
        part = from_data[start : start + size]
        data[at : at + len(part)] = part

    # --- fields

    def _odd(self, old: int, width_bytes: int) -> int:
        """Another value: an interesting one, a neighbour, one bit of it, or any byte."""
        source = self.source
        value = source.pick(
            (source.pick(ODD), old + source.pick((1, -1, 8, -8, 4096, -4096)), old ^ 1 << source.below(64),
             old * 2, source.below(256))
        )  # fmt: skip
        return value % (1 << 8 * width_bytes)

    def _set(self, data: bytearray, dtype: np.dtype[Any], at: int, names: Sequence[str]) -> None:
        if at < 0 or at + dtype.itemsize > len(data):
            return
        name = self.source.pick(names)
        of, offset = dtype[name], (dtype.fields or {})[name][1]
        width = min(8, of.itemsize)
        old = int.from_bytes(data[at + offset : at + offset + width], "little")
        new = self._odd(old, width)
        data[at + offset : at + offset + width] = new.to_bytes(width, "little")
        self.log.append(f"{name} at {at}: {old} -> {new}")

    def _frame_at(self, data: bytearray) -> int:
        return self.source.pick(list(frames_in(bytes(data))) or [fmt.PAGE_BYTES])

    def _frame_field(self, name: str, data: bytearray) -> None:
        at = self._frame_at(data)
        self._set(data, fmt.FRAME, at, names_of(fmt.FRAME))

    def _frame_moved(self, name: str, data: bytearray) -> None:
        """A frame, of this segment or of another one, in the place of another or behind the last."""
        segments = sorted(n for n in self.files if n.startswith("segment"))
        source = bytearray(self.files[self.source.pick(segments)]) if self.source.below(2) else data
        at = self._frame_at(source)
        length = int.from_bytes(source[at + 40 : at + 44], "little")
        frame = source[at : at + fmt.frame_bytes(length)]
        places = list(frames_in(bytes(data))) or [fmt.PAGE_BYTES]
        to = self.source.pick([*places, places[-1] + len(frame)])
        if to + len(frame) <= len(data):
            data[to : to + len(frame)] = frame

    def _frame_removed(self, name: str, data: bytearray) -> None:
        """All behind a frame moves into its place."""
        at, length = self._frame_at(data), len(data)
        frame_bytes = fmt.frame_bytes(int.from_bytes(data[at + 40 : at + 44], "little"))
        del data[at : at + frame_bytes]
        data += bytes(length - len(data))

    def _segment_field(self, name: str, data: bytearray) -> None:
        self._set(data, fmt.SEGMENT_HEADER, 0, names_of(fmt.SEGMENT_HEADER))

    def _index_field(self, name: str, data: bytearray) -> None:
        if self.source.below(2):
            at = fmt.INDEX_PROGRESS_OFFSET + fmt.PROGRESS.itemsize * self.source.below(2)
            self._set(data, fmt.PROGRESS, at, names_of(fmt.PROGRESS))
        else:
            self._set(data, fmt.INDEX_HEADER, 0, names_of(fmt.INDEX_HEADER))

    def _slot_at(self, data: bytearray) -> int:
        return fmt.PAGE_BYTES + self._place(data[fmt.PAGE_BYTES :], fmt.SLOT_BYTES)

    def _slot_field(self, name: str, data: bytearray) -> None:
        self._set(data, fmt.SLOT, self._slot_at(data), names_of(fmt.SLOT))

    def _slots_swapped(self, name: str, data: bytearray) -> None:
        a, b, size = self._slot_at(data), self._slot_at(data), fmt.SLOT_BYTES
        if max(a, b) + size <= len(data):
            data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]

    def _superblock_field(self, name: str, data: bytearray) -> None:
        self._set(data, fmt.SUPERBLOCK_HEAD, 0, names_of(fmt.SUPERBLOCK_HEAD))

    def _rows(self, data: bytearray) -> list[tuple[int, str, np.dtype[Any]]]:
        """Where the rows of a superblock are, the field that counts them, and what they are."""
        if len(data) < fmt.SUPERBLOCK_HEAD.itemsize:
            return []
        head = head_of(data)
        return [
            (at + n * row.itemsize, count, row)
            for at, (count, row) in zip(fmt.superblock_places(head), fmt.SUPERBLOCK_LISTS, strict=False)
            for n in range(min(int(head[count]), 100))
            if at + (n + 1) * row.itemsize <= len(data)
        ]

    def _row_field(self, name: str, data: bytearray) -> None:
        rows = self._rows(data)
        if rows:
            at, _, dtype = self.source.pick(rows)
            self._set(data, dtype, at, names_of(dtype))

    def _rows_moved(self, name: str, data: bytearray) -> None:
        """A segment, removal or cut twice, gone, or in another's place; the counts follow."""
        rows = self._rows(data)
        if not rows:
            return
        at, counted, dtype = self.source.pick(rows)
        row = bytes(data[at : at + dtype.itemsize])
        count_at = (fmt.SUPERBLOCK_HEAD.fields or {})[counted][1]
        count = int.from_bytes(data[count_at : count_at + 4], "little")
        match self.source.below(3):
            case 0:
                del data[at : at + len(row)]
                count -= 1
            case 1:
                times = self.source.pick((1, 2, 100))
                data[at:at] = row * times
                count += times
            case _:
                to = self.source.pick([a for a, c, _ in rows if c == counted])
                data[at : at + len(row)], data[to : to + len(row)] = data[to : to + len(row)], row
        data[count_at : count_at + 4] = (count % 2**32).to_bytes(4, "little")
        data[12:16] = (superblock_bytes(data) % 2**32).to_bytes(4, "little")

    def _snapshot_field(self, name: str, data: bytearray) -> None:
        self._set(data, fmt.SNAPSHOT_HEADER, 0, names_of(fmt.SNAPSHOT_HEADER))

    # --- the checksums made right again

    def _repair(self) -> None:
        depth = self.source.below(3)
        try:
            superblock = Superblock.decode(self._sealed_superblock())
        except (ValueError, JournalError):  # another version, or what no checksum mends
            superblock = self.grown.superblock
        for name in sorted(self.touched & self.files.keys()):
            data = bytearray(self.files[name])
            match kind_of(name):
                case "segment":
                    record = segment_of(superblock, name)
                    segment_id = record.id if record is not None else int(name[8:24], 16)
                    mended = repair_segment(data, fmt.segment_salt(superblock.uuid, segment_id), depth)
                case "index":
                    mended = repair_index(data)
                case "snapshot":
                    mended = repair_snapshot(data)
                case _:
                    continue
            self.files[name] = bytes(data)
            if mended:
                self.mended.add(name)
        self.files |= {n: d for n, d in self._paired().items() if n in self.files}

    def _sealed_superblock(self) -> bytes:
        data = bytearray(self.files.get(fmt.SUPERBLOCK_NAME, b""))
        repair_superblock(data)
        return bytes(data)

    def _paired(self) -> Image:
        """The superblock, its checksum right, and the sums it has of the index and the snapshot, too."""
        data = bytearray(self.files.get(fmt.SUPERBLOCK_NAME, b""))
        if len(data) < fmt.SUPERBLOCK_HEAD.itemsize + 4:
            return {}
        head: Any = np.frombuffer(data, fmt.SUPERBLOCK_HEAD, 1)
        if fmt.INDEX_NAME in self.touched & self.files.keys():
            head["index_crc"] = fmt.crc32c(self.files[fmt.INDEX_NAME][fmt.PAGE_BYTES :])
        paired = f"{SNAPSHOTS}snapshot-{int(head['snapshot_op'][0]):020d}"
        if paired in self.touched & self.files.keys():
            head["snapshot_crc"] = fmt.crc32c(self.files[paired][fmt.SNAPSHOT_HEADER.itemsize :])
        del head
        if repair_superblock(data):
            self.mended.add(fmt.SUPERBLOCK_NAME)
        return {fmt.SUPERBLOCK_NAME: bytes(data)}


def names_of(dtype: np.dtype[Any]) -> tuple[str, ...]:
    return dtype.names or ()


def kind_of(path: str) -> str:
    if path.startswith(SNAPSHOTS):
        return "snapshot"
    return path.partition("-")[0].partition(".")[0]


def repair_segment(data: bytearray, salt: int, depth: int) -> bool:
    """Checksums of the header and of each frame that the lengths lead to; `depth` 1: links too, 2: places
    and payloads too. Whether there was a header to begin with."""
    header_bytes = fmt.SEGMENT_HEADER.itemsize
    if len(data) < header_bytes:
        return False
    data[header_bytes - 4 : header_bytes] = fmt.crc32c(data[: header_bytes - 4]).to_bytes(4, "little")
    base = int(np.frombuffer(data, fmt.SEGMENT_HEADER, 1)["base_lsn"][0])
    link = salt
    for at in frames_in(bytes(data)):
        frame: Any = np.frombuffer(data, fmt.FRAME, 1, at)
        length = int(frame["length"][0])
        if depth >= 1:
            frame["link"] = link
        if depth >= 2:
            frame["lsn"] = (base + at - fmt.PAGE_BYTES) % 2**64
        if int(frame["type"][0]) == lib.MW_ENTRY and depth >= 2:
            payload = data[at + fmt.FRAME_BYTES : at + fmt.FRAME_BYTES + length]
            frame["payload_crc"] = fmt.crc32c(bytes(payload))
        crc = fmt.crc32c(bytes(data[at + 4 : at + fmt.FRAME_BYTES]), salt)
        frame["header_crc"] = crc
        link = int(frame["payload_crc"][0]) if int(frame["type"][0]) == lib.MW_GAP else crc
        del frame
    return True


def repair_index(data: bytearray) -> bool:
    """Of the page: the header's, and those of the progress. Whether there is a page."""
    if len(data) < fmt.INDEX_HEADER.itemsize:
        return False
    crc = fmt.crc32c(bytes(data[: fmt.INDEX_CRC_OFFSET]))
    data[fmt.INDEX_CRC_OFFSET : fmt.INDEX_CRC_OFFSET + 4] = crc.to_bytes(4, "little")
    salt = int(np.frombuffer(data, fmt.INDEX_HEADER, 1)["salt"][0])
    for n in range(2):
        at = fmt.INDEX_PROGRESS_OFFSET + n * fmt.PROGRESS.itemsize
        check = fmt.crc32c(bytes(data[at : at + 28]), salt)
        data[at + 28 : at + 32] = check.to_bytes(4, "little")
    return True


def head_of(data: bytearray) -> Any:
    return np.frombuffer(bytes(data), fmt.SUPERBLOCK_HEAD, 1)[0]


def superblock_bytes(data: bytearray) -> int:
    """How long a superblock has to be, by its counts."""
    return fmt.superblock_places(head_of(data))[-1] + 4


def repair_superblock(data: bytearray) -> bool:
    """Whether its length fits its contents: else nobody asks for the checksum."""
    if len(data) < fmt.SUPERBLOCK_HEAD.itemsize + 4:
        return False
    size = superblock_bytes(data)
    if not int(head_of(data)["bytes"]) == size <= len(data):
        return False
    data[size - 4 : size] = fmt.crc32c(bytes(data[: size - 4])).to_bytes(4, "little")
    return True


def repair_snapshot(data: bytearray) -> bool:
    """Whether there is a header."""
    header_bytes = fmt.SNAPSHOT_HEADER.itemsize
    if len(data) < header_bytes:
        return False
    crc = fmt.crc32c(bytes(data[header_bytes:]))
    data[header_bytes - 8 : header_bytes - 4] = crc.to_bytes(4, "little")
    data[header_bytes - 4 : header_bytes] = fmt.crc32c(bytes(data[: header_bytes - 4])).to_bytes(4, "little")
    return True
