"""Valid files of random lives: what the fuzzers mutate, and what they know about it."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mmapwal import Durability, Journal, JournalError, MemoryDirectory, Replica, recover
from mmapwal import format as fmt
from mmapwal.storage import Directory
from mmapwal.superblock import SegmentRecord, Superblock

Image = dict[str, bytes]
"""Path below the journal's directory -> the bytes of the file."""
Entry = tuple[bytes, int]

SLOTS = 16
SEGMENT_BYTES = 16384
LIVES = 24
SIZES = (0, 1, 8, 60, 400, 456, 900, 1400, 3000, 6000)
SNAPSHOTS = f"{fmt.SNAPSHOTS_NAME}/"


class Words:
    """A state machine whose state is all that it was given: op -> payload, as one snapshot."""

    def __init__(self) -> None:
        self.state = b""

    def apply(self, entry: Any) -> None:
        self.state += b"%d:%d;" % (entry.op, fmt.crc32c(bytes(entry.payload)))

    def snapshot(self) -> bytes:
        return self.state

    def restore(self, snapshot: memoryview) -> None:
        self.state = bytes(snapshot)


@dataclass
class Grown:
    """The files that a life left, what they looked like earlier, and what they hold."""

    image: Image
    contents: dict[int, Entry]
    watermark: int
    state: bytes
    """Of the state machine, once all entries are applied to it."""
    earlier: list[Image] = field(default_factory=list)
    appended: dict[int, set[Entry]] = field(default_factory=lambda: defaultdict(set))
    """All that was ever appended, by op."""

    @property
    def superblock(self) -> Superblock:
        return Superblock.decode(self.image[fmt.SUPERBLOCK_NAME])


def files_of(directory: Directory) -> Image:
    """Every file but the lock, those of the snapshots too."""
    image: Image = {}
    for name in directory.names():
        if name == fmt.SNAPSHOTS_NAME:
            below = directory.subdirectory(name)
            image |= {SNAPSHOTS + path: data for path, data in files_of(below).items()}
        elif name != fmt.LOCK_NAME:
            storage = directory.open(name)
            image[name] = bytes(storage.read_at(0, len(storage)))
            if not isinstance(directory, MemoryDirectory):
                storage.close()
    return image


def memory_of(image: Image) -> MemoryDirectory:
    """The files in memory."""
    directory = MemoryDirectory("fuzz")
    for path, data in image.items():
        into: Directory = directory
        if path.startswith(SNAPSHOTS):
            into = directory.subdirectory(fmt.SNAPSHOTS_NAME)
        into.create(path.rpartition("/")[2]).write_at(0, data)
    return directory


def write_files(image: Image, path: Path) -> None:
    """The files on a real file system."""
    for name, data in image.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def segment_of(superblock: Superblock, name: str) -> SegmentRecord | None:
    return next((s for s in superblock.segments if s.name == name), None)


def frames_in(data: bytes) -> Iterator[int]:
    """Where frames begin in a segment file, as their lengths say; nothing is believed."""
    at = fmt.PAGE_BYTES
    while at + fmt.FRAME_BYTES <= len(data) and any(data[at : at + fmt.FRAME_BYTES]):
        yield at
        at += fmt.frame_bytes(int(np.frombuffer(data, "<u4", 1, at + 40)[0]))


class _Life:
    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.directory = MemoryDirectory("fuzz")
        self.grown = Grown({}, {}, 0, b"")
        self.options = {"slots": SLOTS, "segment_bytes": SEGMENT_BYTES}
        self.options["commit_align_bytes"] = rng.choice([0, 0, 512])
        self.tag = 0
        self.replica: Replica

    def open(self) -> None:
        durability = self.rng.choice([Durability.SYNC, Durability.OS])
        self.replica = recover("j", Words(), storage=self.directory, durability=durability, **self.options)

    @property
    def journal(self) -> Journal:
        return self.replica.journal

    def payload(self) -> bytes:
        self.tag += 1
        return (b"%d." % self.tag * 3000)[: self.rng.choice(SIZES)]

    def append(self) -> None:
        journal, rng = self.journal, self.rng
        if not journal.remaining_capacity:
            self.replica.commit(fmt.OP_MAX)
            self.replica.checkpoint()
        payloads = [self.payload() for _ in range(rng.choice([1, 1, 1, 3]))]
        kind = rng.randrange(4)
        first = max(journal.last_op or 0, journal.snapshot_op) + 1
        for op, payload in enumerate(payloads, first):
            self.grown.appended[op].add((payload, kind))
        try:
            journal.append_many(payloads, kind=kind)
        except JournalError:  # no slot for all of them
            return

    def replace(self) -> None:
        journal = self.journal
        self.replica.commit(fmt.OP_MAX)
        if journal.last_op is not None and journal.last_op > journal.snapshot_op:
            entry = journal[journal.last_op]
            again = (bytes(entry.payload), entry.kind)
            self.grown.appended[entry.op].add(again)
            journal.append(again[0], op=entry.op, kind=again[1], replace=True)

    def truncate(self) -> None:
        """What the machine has not applied is cut off, and other entries take the ops."""
        journal = self.journal
        applied = self.replica.last_applied_op or 0
        if (journal.last_op or 0) > applied:
            journal.truncate_from(self.rng.randrange(applied, journal.last_op or 0) + 1)

    def step(self) -> None:
        match self.rng.randrange(14):
            case 0:
                self.truncate()
            case 1:
                self.replica.commit(fmt.OP_MAX)
                self.replica.checkpoint()
            case 2:
                self.replace()
            case 3:
                self.journal.compact()
            case _:
                self.append()

    def kill(self) -> None:
        self.journal.sync()
        left = copy.deepcopy(self.directory)
        left.close()
        self.replica.close()
        self.directory = left

    def run(self) -> Grown:
        for life in range(3):
            self.open()
            if life:
                self.grown.earlier.append(files_of(self.directory))
            for _ in range(self.rng.randrange(5, 20)):
                self.step()
            if life < 2:
                self.rng.choice([self.kill, self.replica.close])()
        self.grown.earlier.append(files_of(self.directory))
        self.append()
        while len(self.journal._engine.superblock.segments) < 3:
            self.append()
        self.journal.sync()
        journal = self.journal
        self.grown.contents = {e.op: (bytes(e.payload), e.kind) for e in journal}
        self.grown.watermark = journal.snapshot_op
        self.replica.commit(fmt.OP_MAX)
        self.grown.state = self.replica.machine.snapshot()  # type: ignore[assignment]
        if self.rng.random() < 0.5:
            self.replica.close()
            self.grown.image = files_of(self.directory)
        else:
            self.grown.image = files_of(self.directory)
            self.replica.close()
        return self.grown


@cache
def grown(number: int) -> Grown:
    """The files that life `number` left; all is durable, and half of them were closed."""
    return _Life(number).run()
