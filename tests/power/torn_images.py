"""What a disk may hold after its power was cut: built from the log of what was written and flushed.

All that was written before the last flush is there. Of each sector written after it, any version that it
has had since may be there, whatever became of the others.

What is not torn is the file system's own blocks that name it: the superblocks of ext4 and btrfs and the
blocks that xfs writes back in place have one checksum over the whole, and a file system that finds one torn
is not mounted (tried: "invalid superblock checksum", and xfs "metadata CRC error" when its log is replayed,
since the torn block has the newest LSN already). They are there in one version or another, as a whole.
"""

from __future__ import annotations

import errno
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from .fuse_server import FLUSH, RECORD, WRITE

SECTOR_BYTES = 512
BLOCK_BYTES = 4096


class Event(NamedTuple):
    """A write, or a flush, which has no data. `noted`: how long the notes were when it came."""

    kind: int
    offset: int
    data: bytes
    noted: int


def read_log(path: Path) -> list[Event]:
    """All that was written and flushed, in order."""
    log, at, events = path.read_bytes(), 0, []
    while at < len(log):
        kind, length, offset, noted = RECORD.unpack_from(log, at)
        at += RECORD.size + length
        events.append(Event(kind, offset, log[at - length : at], noted))
    return events


class TornImages:
    """Images of one disk, each of a later instant than the one before."""

    def __init__(self, base: Path, events: Sequence[Event], uuid: UUID) -> None:
        """`base`: the disk before the first event; it is used up. `uuid`: the file system's."""
        self._settled, self._events, self._uuid = base, events, uuid.bytes
        self._next = 0  # the first event that is not settled
        self.torn = 0  # sectors and blocks of which the last image had not the newest version

    def make(self, image: Path, instant: int, chance: random.Random, *, trusted: int | None = None) -> None:
        """The disk just before event `instant`. Of the flushes before `trusted` (None: all before the
        instant) the disk tells the truth, of later ones it lies."""
        self._settle(self._last_flush(instant if trusted is None else trusted))
        versions: defaultdict[tuple[int, int], list[bytes]] = defaultdict(list)
        for event in self._events[self._next : instant]:
            for offset, data in self._split(event):
                versions[offset, len(data)].append(data)
        self.torn = 0
        copy_sparse(self._settled, image)
        with image.open("r+b", buffering=0) as f:
            for offset, data in self._chosen(versions, chance):
                f.seek(offset)
                f.write(data)

    def _last_flush(self, instant: int) -> int:
        return next((n for n in range(instant - 1, -1, -1) if self._events[n].kind == FLUSH), 0)

    def _settle(self, until: int) -> None:
        assert until >= self._next or until == 0, "the images come in order"
        with self._settled.open("r+b", buffering=0) as f:
            for event in self._events[self._next : until]:
                if event.kind == WRITE:
                    f.seek(event.offset)
                    f.write(event.data)
        self._next = max(self._next, until)

    def _split(self, event: Event) -> Iterator[tuple[int, bytes]]:
        """What of it is written whole or not at all."""
        data, at = event.data, 0
        while at < len(data):
            step = SECTOR_BYTES
            if (event.offset + at) % BLOCK_BYTES == 0 and self._uuid in data[at : at + BLOCK_BYTES // 2]:
                step = BLOCK_BYTES
            yield event.offset + at, data[at : at + step]
            at += step

    def _chosen(
        self, versions: dict[tuple[int, int], list[bytes]], chance: random.Random
    ) -> Iterator[tuple[int, bytes]]:
        """Few or many; all, none, one, and all but one often enough."""
        rate = chance.choice([0, 1, chance.random(), chance.random(), chance.random()])
        odd = chance.choice(list(versions)) if versions and chance.random() < 0.5 else None
        for (offset, length), written in versions.items():
            if (chance.random() < rate) is ((offset, length) != odd):
                version = -1 if chance.random() < 0.5 else chance.randrange(len(written))
                self.torn += version not in {-1, len(written) - 1}
                yield offset, written[version]
            else:
                self.torn += 1


def copy_sparse(source: Path, target: Path) -> None:
    """The same bytes, and the same holes."""
    with source.open("rb", buffering=0) as old, target.open("wb", buffering=0) as new:
        new.truncate(os.fstat(old.fileno()).st_size)
        at = 0
        while True:
            try:
                at = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError as e:
                if e.errno != errno.ENXIO:  # no more of it
                    raise
                return
            end = os.lseek(old.fileno(), at, os.SEEK_HOLE)
            new.seek(at)
            while at < end:
                at += os.sendfile(new.fileno(), old.fileno(), at, end - at)
