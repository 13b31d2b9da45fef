"""What is removed from the log of a Raft node: what is left keeps its index."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mmapwal import MemoryDirectory, MissingOpError
from mmapwal.integrations.pysyncobj import JournalFailedError, MmapJournal
from mmapwal.testing import Call, InterposedDirectory

SMALL = {"slots": 256, "segment_bytes": 16384}


def entries(first: int, last: int, term: int = 1) -> list[tuple[bytes, int, int]]:
    return [(b"\x01%d" % idx + b"." * 400, idx, term) for idx in range(first, last + 1)]  # \x01: no operation


def add_all(log: MmapJournal, added: list[tuple[bytes, int, int]]) -> None:
    for entry in added:
        log.add(*entry)


def listed(log: Any) -> list[tuple[bytes, int, int]]:
    return [tuple(entry) for entry in log[:]]


class Clock:
    """The log's, which goes on by hand."""

    def __init__(self) -> None:
        self.now_s = time.monotonic()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("mmapwal.integrations.raft_log.time.monotonic", lambda: clock.now_s)
    return clock


class FullDirectory(InterposedDirectory):
    """While `full`, there is no space for what begins with `name`."""

    full = False
    name = ""

    def intercept(self, call: Call) -> Any:
        if self.full and call.kind in {"create", "write"} and call.name.startswith(self.name):
            raise OSError(errno.ENOSPC, "No space left on device", call.name)
        return call.run()


@pytest.fixture
def directory() -> FullDirectory:
    return FullDirectory(MemoryDirectory())


@pytest.fixture
def log(directory: FullDirectory) -> Iterator[MmapJournal]:
    log = MmapJournal(".", storage=directory, **SMALL)
    log._starting = False  # as after the first tick
    yield log
    directory.full = False
    log._destroy()


@pytest.mark.parametrize("last", [100, 90], ids=["all", "the last ones removed before"])
def test_each_index_has_its_entry_also_where_those_before_are_gone_and_giving_back_their_space_failed(
    log: MmapJournal, directory: FullDirectory, clock: Clock, last: int
) -> None:
    """The watermark has its superblock at hand; the next generation of a segment finds no space."""
    add_all(log, entries(1, 100))
    log.sync()
    log.deleteEntriesFrom(last)
    directory.full, directory.name = True, "segment"
    with pytest.raises(JournalFailedError, match="No space"):
        log.deleteEntriesTo(70)
    assert log.journal.snapshot_op == 70
    directory.full = False
    clock.now_s += 60
    assert listed(log) == entries(71, last)
    assert (log[0][1], log[-1][1], len(log)) == (71, last, last - 70)
    assert log[19:20] == entries(90, 90)
    assert log.takes_through > 70 + SMALL["slots"] - 16


def test_entries_that_are_gone_are_told_and_none_takes_their_indices(log: MmapJournal) -> None:
    add_all(log, entries(1, 10))
    held = log[:]
    log.deleteEntriesTo(5)
    with pytest.raises(MissingOpError):
        list(held)
    assert log.failure is None
    assert log.entries(6, 10) == entries(6, 10)
