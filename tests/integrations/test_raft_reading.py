"""PySyncObj's log on a journal, read by position: as the list of all its entries, however it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mmapwal import MemoryDirectory
from mmapwal.integrations.pysyncobj import MmapJournal
from mmapwal.integrations.raft_log import READ_AHEAD_BYTES, READ_AHEAD_MIN, UNPACKERS_MAX

Entries = list[tuple[bytes, int, int]]
FIRST, COUNT = 7, 3000


@pytest.fixture(scope="module")
def entries() -> Entries:
    """Of more lengths than are remembered, and of many terms."""
    commands = (b"x" * (i * 7 % (UNPACKERS_MAX + 100)) + b"%d" % i for i in range(COUNT))
    return [(command, FIRST + i, 1 + i // 100) for i, command in enumerate(commands)]


@pytest.fixture(scope="module")
def log(entries: Entries) -> Iterator[MmapJournal]:
    log = MmapJournal(".", storage=MemoryDirectory(), slots=4096, segment_bytes=1 << 20)
    for entry in entries:
        log.add(*entry)
    yield log
    log._destroy()


@pytest.mark.parametrize("ahead", [READ_AHEAD_MIN, 1000], ids=["short messages before", "long ones"])
@pytest.mark.parametrize("start", [0, 1, 2900, COUNT - 1])
def test_a_slice_has_each_entry_once_whatever_was_read_ahead(
    log: MmapJournal, entries: Entries, start: int, ahead: int
) -> None:
    for read in (list, lambda part: part[:], lambda part: [part[place] for place in range(len(part))]):
        log.expect(ahead)
        assert read(log[start:]) == entries[start:]


def test_a_slice_that_is_read_twice_at_once_has_all_entries_both_times(
    log: MmapJournal, entries: Entries
) -> None:
    log.expect(READ_AHEAD_MIN)
    part = log[2900:]
    assert list(zip(part, part, strict=True)) == list(zip(entries[2900:], entries[2900:], strict=True))
    part = log[2900:]
    found = []
    for entry in part:
        found.append(entry)
        assert part[:60] == entries[2900:2960]
    assert found == entries[2900:]


def test_of_long_commands_no_more_are_read_ahead_than_some_megabytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = MmapJournal(".", storage=MemoryDirectory(), slots=256, segment_bytes=4 << 20)
    for idx in range(1, 41):
        log.add(bytes(READ_AHEAD_BYTES // 10), idx, 1)
    read = log.entries
    sizes: list[int] = []

    def noted(first: int, last: int) -> Entries:
        sizes.append(last - first + 1)
        return read(first, last)

    monkeypatch.setattr(log, "entries", noted)
    log.expect(4096)
    assert next(iter(log[:]))[1] == 1
    assert sizes[0] <= 10
    assert [entry[1] for entry in log[:]] == list(range(1, 41))
    log._destroy()


@pytest.mark.parametrize("taken", [1, 7, 8, 9, 500, COUNT])
def test_what_a_message_takes_of_a_slice_is_right_again_and_again(
    log: MmapJournal, entries: Entries, taken: int
) -> None:
    for start in range(0, COUNT, 700):
        part = log[start:]
        for place, entry in enumerate(part):  # as the library: it sums up lengths, and takes so many
            assert entry == entries[start + place]
            if place + 1 == taken:
                break
        assert part[:taken] == entries[start:][:taken]


@pytest.mark.parametrize("place", [-COUNT, -1, 0, 1, COUNT - 2, COUNT - 1])
def test_one_entry_is_the_same_by_itself_and_as_a_slice(
    log: MmapJournal, entries: Entries, place: int
) -> None:
    assert tuple(log[place]) == entries[place]
    assert list(log[place : place + 1]) == entries[place : place + 1]
    assert [log[place][1], log[place][2]] == list(entries[place][1:])


@pytest.mark.parametrize("place", [COUNT, -COUNT - 1, COUNT + 5])
def test_there_is_none_behind_the_last_and_before_the_first(log: MmapJournal, place: int) -> None:
    with pytest.raises(IndexError):
        log[place]
    assert list(log[place : place + 1]) == []


@pytest.mark.parametrize("ask", [lambda log: log[0], lambda log: log[-1]])
def test_of_a_log_that_was_cleared_nothing_is_read_any_more(ask: Callable[[MmapJournal], object]) -> None:
    log = MmapJournal(".", storage=MemoryDirectory())
    for idx in (1, 2, 3):
        log.add(b"x", idx, 1)
    log.clear()
    with pytest.raises(IndexError):
        ask(log)
    assert (len(log), list(log[:]), list(log[0:1])) == (0, [], [])
    log._destroy()
