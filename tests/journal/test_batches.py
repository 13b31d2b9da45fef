"""Batches: all of a batch or nothing of it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import pytest

from mmapwal import AsyncJournal, Durability, Journal, PayloadTooLargeError
from mmapwal import format as fmt
from mmapwal._native import lib

from .files import (
    ROOM,
    SMALL,
    Home,
    change_frame,
    contents_of,
    entry_frames,
    flip,
    frames_of,
    killed,
    read,
    refused_call,
    write,
)

END_BYTES = fmt.FRAME_BYTES


def reopened(home: Home, journal: Journal, how: str) -> Journal:
    if how == "killed":
        return killed(home, journal).open()
    journal.close()
    return home.open()


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_a_batch_has_consecutive_ops_from_first_op_or_the_next_one(home: Home, how: str) -> None:
    journal = home.open(**SMALL)
    assert journal.append_many([b"a", b"b"], kind=4) == range(1, 3)
    assert journal.append_many([b"c"], first_op=9) == range(9, 10)
    assert journal.append_many([b"d", b"e", b"f"], first_op=5, kinds=[7, 0, 2**15 - 1]) == range(5, 8)
    assert journal.append_many([b"g"]) == range(10, 11)
    wanted = {
        1: (b"a", 4), 2: (b"b", 4), 5: (b"d", 7), 6: (b"e", 0), 7: (b"f", 2**15 - 1), 9: (b"c", 0),
        10: (b"g", 0),
    }  # fmt: skip
    assert contents_of(journal) == wanted
    assert contents_of(reopened(home, journal, how)) == wanted


@pytest.mark.parametrize("by", ["append_many", "a loop"])
@pytest.mark.parametrize(
    "lengths",
    # The first of them times their number is what they are together, or they are of one length.
    [(2, 1, 3), (2, 3, 1), (0, 0, 0), (5, 5, 5), (0,), (7,), (0, 1), (1, 0), (3, 3, 4)],
    ids=str,
)
def test_each_payload_of_a_batch_keeps_its_length(home: Home, lengths: tuple[int, ...], by: str) -> None:
    payloads: list[bytes | bytearray | memoryview] = [
        bytes([n + 1]) * length for n, length in enumerate(lengths)
    ]
    wanted = [bytes(p) for p in payloads]

    async def submit(journal: Journal, batch: list[bytes | bytearray | memoryview]) -> None:
        async with AsyncJournal(journal) as loop:
            await loop.append_many(batch)

    journal = home.open(**SMALL)
    for batch in (payloads, list(map(bytearray, payloads)), list(map(memoryview, payloads))):
        if by == "append_many":
            journal.append_many(batch)
        else:
            asyncio.run(submit(journal, batch))
    assert [bytes(p) for p in journal.payloads()] == wanted * 3
    assert [bytes(p) for p in killed(home, journal).open().payloads()] == wanted * 3


def test_kinds_may_be_any_sequence_and_win_over_kind(home: Home) -> None:
    import numpy as np

    journal = home.open(**SMALL)
    journal.append_many([b"", b""], kinds=(1, 2), kind=9)
    journal.append_many([b"", b""], kinds=range(3, 5))
    journal.append_many([b"", b""], kinds=np.array([5, 6]))
    assert [e.kind for e in journal] == [1, 2, 3, 4, 5, 6]


def test_an_empty_batch_writes_nothing(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"x")
    before = journal.stats()
    assert journal.append_many([]) == range(2, 2)
    assert journal.append_many(iter(()), first_op=7) == range(7, 7)
    assert journal.append_many([], kinds=[]) == range(2, 2)
    assert journal.stats() == before


def test_a_batch_is_one_commit(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"x")
    before = journal.stats()
    journal.append_many([b"entry"] * 10)
    after = journal.stats()
    assert (after.commits - before.commits, after.syncs - before.syncs) == (1, 1)
    assert after.appended_entries - before.appended_entries == 10


def test_payloads_may_come_from_a_generator_and_one_that_fails_appends_nothing(home: Home) -> None:
    def payloads(good: bool) -> Iterator[bytes]:
        yield b"one"
        yield b"two"
        if not good:
            raise LookupError("no more")

    journal = home.open(**SMALL)
    refused_call(LookupError, journal, lambda: journal.append_many(payloads(good=False)))
    assert journal.append_many(payloads(good=True)) == range(1, 3)


@pytest.mark.parametrize("how", ["closed", "killed"])
@pytest.mark.parametrize("spare", range(-8, 9, 8))
def test_a_batch_lies_in_one_segment_also_when_it_fills_it_to_the_last_byte(
    home: Home, spare: int, how: str
) -> None:
    """`spare`: bytes that are left of the segment when an END follows; below 0 the batch goes on to the
    next one."""
    journal = home.open(**SMALL)
    journal.append(b"before")
    last = ROOM - fmt.frame_bytes(6) - 2 * fmt.frame_bytes(1000) - END_BYTES - fmt.FRAME_BYTES - spare
    journal.append_many([b"a" * 1000, b"b" * 1000, b"c" * last])
    journal.append(b"behind")
    wanted = {1: b"before", 2: b"a" * 1000, 3: b"b" * 1000, 4: b"c" * last, 5: b"behind"}
    assert {e.op: bytes(e.payload) for e in journal} == wanted
    frames = entry_frames(home.directory())
    assert len({frames[op].name for op in (2, 3, 4)}) == 1
    assert (frames[1].name == frames[2].name) == (spare >= 0)
    journal = reopened(home, journal, how)
    assert {e.op: bytes(e.payload) for e in journal} == wanted


def test_a_batch_larger_than_a_segment_gets_a_longer_one(home: Home) -> None:
    journal = home.open(**SMALL)
    parts = [bytes([n]) * 5000 for n in range(10)]
    journal.append(b"before")
    journal.append_many(parts)
    journal.append(b"behind")
    frames = entry_frames(home.directory())
    assert len({frames[op].name for op in range(2, 12)}) == 1
    journal = killed(home, journal).open()
    assert [bytes(p) for p in journal.payloads(2, 11)] == parts


def test_a_batch_is_bounded_and_the_error_says_by_how_much(home: Home) -> None:
    bound = fmt.frame_bytes(30_008)
    assert bound % 16 == 0
    journal = home.open(**SMALL, max_payload_bytes=30_008)
    fits = bound // 2 - fmt.FRAME_BYTES
    error = refused_call(
        PayloadTooLargeError, journal, lambda: journal.append_many([bytes(fits), bytes(fits + 24)])
    )
    assert str(bound) in str(error)
    assert " 24 more " in str(error)
    journal.append_many([bytes(fits), bytes(fits)])
    journal.append_many([b""] * 10)


def test_small_max_payload_bytes_leave_a_batch_a_segment(home: Home) -> None:
    journal = home.open(slots=1024, segment_bytes=16384, max_payload_bytes=8)
    many = 16384 // fmt.frame_bytes(8)
    journal.append_many([b"12345678"] * many)
    refused_call(PayloadTooLargeError, journal, lambda: journal.append_many([b"12345678"] * (many + 1)))


# --- torn ---------------------------------------------------------------------------------------------


def torn(home: Home, journal: Journal) -> Home:
    """After a kill, without the index, which proves that all was durable."""
    left = killed(home, journal)
    left.directory().unlink(fmt.INDEX_NAME)
    return left


@pytest.mark.parametrize("damaged", range(3, 7))
def test_a_torn_batch_is_cut_wholly(home: Home, damaged: int) -> None:
    journal = home.open(**SMALL)
    journal.append(b"one")
    journal.append(b"two")
    journal.append_many([b"three" * 20, b"four" * 200, b"", b"six" * 5])
    left = torn(home, journal)
    flip(left.directory(), (f := entry_frames(left.directory())[damaged]).name, f.at + 20)
    journal = left.open()
    assert contents_of(journal) == {1: (b"one", 0), 2: (b"two", 0)}
    assert journal.report.outcome.value == "torn tail"
    assert journal.append(b"three again") == 3
    journal.close()
    assert contents_of(left.open()) == {1: (b"one", 0), 2: (b"two", 0), 3: (b"three again", 0)}


@pytest.mark.parametrize("kept", range(1, 4))
def test_a_batch_of_which_the_end_was_never_written_is_cut_wholly(home: Home, kept: int) -> None:
    journal = home.open(**SMALL)
    journal.append(b"one")
    journal.append_many([b"two" * 20, b"three" * 30, b"four", b"five"])
    left = torn(home, journal)
    frame = entry_frames(left.directory())[2 + kept]
    write(left.directory(), frame.name, frame.at, bytes(ROOM + fmt.PAGE_BYTES - frame.at))
    journal = left.open()
    assert contents_of(journal) == {1: (b"one", 0)}
    assert journal.report.outcome.value == "unfinished batch"
    assert journal.append_many([b"again"] * 4) == range(2, 6)
    assert contents_of(killed(left, journal).open()) == {1: (b"one", 0)} | dict.fromkeys(
        range(2, 6), (b"again", 0)
    )


def test_of_two_batches_the_second_is_cut_and_the_first_stays(home: Home) -> None:
    journal = home.open(**SMALL, durability=Durability.OS)
    journal.append_many([b"a"] * 3)
    journal.append_many([b"b"] * 3)
    left = torn(home, journal)
    frame = entry_frames(left.directory())[5]
    flip(left.directory(), frame.name, frame.payload_at)
    assert contents_of(left.open()) == dict.fromkeys((1, 2, 3), (b"a", 0))


def test_a_batch_that_replaces_nothing_when_it_is_torn(home: Home) -> None:
    """Entries of a torn batch must not hide older ones of the same ops either."""
    journal = home.open(**SMALL, durability=Durability.OS)
    journal.append_many([b"old"] * 4)
    journal.truncate_from(3)
    journal.append_many([b"new"] * 4)
    left = torn(home, journal)
    frame = entry_frames(left.directory())[5]
    flip(left.directory(), frame.name, frame.at)
    assert contents_of(left.open()) == {1: (b"old", 0), 2: (b"old", 0)}


def test_only_the_last_frame_of_a_batch_has_no_more_behind_it(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"alone")
    journal.append_many([b"x"] * 3)
    flags = [f.flags & lib.MW_FLAG_MORE for f in frames_of(home.directory())]
    assert flags == [0, 1, 1, 0]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_batch_larger_than_a_segment_is_torn_wholly_too(home: Home, count: int) -> None:
    journal = home.open(**SMALL)
    journal.append(b"one")
    journal.append_many([b"x" * (20_000 // count)] * count)
    left = torn(home, journal)
    frame = entry_frames(left.directory())[1 + count]
    flip(left.directory(), frame.name, frame.payload_at + frame.length - 1)
    journal = left.open()
    assert contents_of(journal) == {1: (b"one", 0)}
    journal.append_many([b"y" * (20_000 // count)] * count)
    journal.close()
    assert len(left.open()) == 1 + count


def test_a_flag_that_calls_for_more_where_nothing_more_is_takes_the_entry_with_it(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"one")
    journal.append(b"two")
    left = torn(home, journal)
    change_frame(left.directory(), entry_frames(left.directory())[2], flags=lib.MW_FLAG_MORE)
    assert contents_of(left.open()) == {1: (b"one", 0)}


def test_every_cut_of_the_file_leaves_whole_batches(home: Home) -> None:
    """The tail overwritten by zeros from any frame border, or from its middle."""
    journal = home.open(**SMALL, durability=Durability.OS)
    batches = [1, 3, 1, 2, 4]
    for size in batches:
        journal.append_many([b"entry of eight"] * size)
    whole = torn(home, journal)
    ends = set(itertools.accumulate(batches, initial=0))
    for op, frame in entry_frames(whole.directory()).items():
        for at in (frame.at, frame.at + 30, frame.payload_at + 3):
            left = whole.after_kill()
            data = read(left.directory(), frame.name)
            write(left.directory(), frame.name, at, bytes(len(data) - at))
            found = left.open()
            kept = max(end for end in ends if end < op)
            assert [e.op for e in found] == list(range(1, kept + 1))
            found.close()
