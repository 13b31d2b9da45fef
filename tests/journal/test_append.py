"""Appending and reading, one entry at a time."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import pytest

from mmapwal import DuplicateOpError, Entry, ExhaustedError, MissingOpError, PayloadTooLargeError
from mmapwal import format as fmt

from .files import ROOM, SMALL, Home, contents_of, frames_of, killed, refused_call

OP_MAX = 2**63 - 1


def reopened(home: Home, journal: Any, how: str) -> Any:
    if how == "killed":
        return killed(home, journal).open()
    journal.close()
    return home.open()


parametrize_ends = pytest.mark.parametrize("how", ["closed", "killed"])


# --- ops ----------------------------------------------------------------------------------------------


def test_ops_are_given_from_one_on(home: Home) -> None:
    journal = home.open(**SMALL)
    assert [journal.append(b"%d" % n) for n in range(5)] == [1, 2, 3, 4, 5]


def test_an_empty_journal_is_empty_and_true(home: Home) -> None:
    journal = home.open(**SMALL)
    assert len(journal) == 0
    assert bool(journal)
    assert list(journal) == list(journal.payloads()) == []
    assert (journal.first_op, journal.last_op, journal.snapshot_op) == (None, None, 0)
    assert journal.remaining_capacity == SMALL["slots"]
    assert len(journal.headers()) == 0
    assert journal.header(1) is None


def test_the_next_op_is_above_last_op_and_snapshot_op(home: Home) -> None:
    journal = home.open(**SMALL)
    assert journal.append(b"", op=9) == 9
    assert journal.append(b"") == 10
    journal.append(b"", op=3)
    assert journal.append(b"") == 11
    journal.set_snapshot_op(20)
    assert journal.append(b"") == 21
    journal.truncate_from(21)
    assert journal.append(b"") == 21


@parametrize_ends
def test_ops_come_out_of_order_leave_gaps_and_fill_them(home: Home, how: str) -> None:
    journal = home.open(**SMALL)
    for op in (7, 3, 5, 12, 1):
        assert journal.append(b"op %d" % op, op=op, kind=op) == op
    assert [e.op for e in journal] == [1, 3, 5, 7, 12]
    assert (len(journal), journal.first_op, journal.last_op) == (5, 1, 12)
    assert 4 not in journal
    journal.append(b"op 4", op=4, kind=4)
    wanted = {op: (b"op %d" % op, op) for op in (1, 3, 4, 5, 7, 12)}
    assert contents_of(journal) == wanted
    journal = reopened(home, journal, how)
    assert contents_of(journal) == wanted
    assert journal.append(b"") == 13


def test_ops_may_be_anywhere_up_to_the_largest(home: Home) -> None:
    journal = home.open(**SMALL)
    far = [1, 2**32 + 2, 10**15 + 3, OP_MAX]  # all in slots of their own
    assert len({op % 16 for op in far}) == 4
    for op in far:
        journal.append(b"%d" % op, op=op)
    assert contents_of(journal) == {op: (b"%d" % op, 0) for op in far}
    assert [e.op for e in journal.entries(2, OP_MAX - 1)] == far[1:3]
    assert journal.remaining_capacity == 0
    refused_call(ExhaustedError, journal, lambda: journal.append(b"none is left"))


@parametrize_ends
def test_a_live_duplicate_is_refused_unless_replace_and_then_the_later_one_wins(home: Home, how: str) -> None:
    journal = home.open(**SMALL)
    for op in (1, 2, 3):
        journal.append(b"first %d" % op)
    refused_call(DuplicateOpError, journal, lambda: journal.append(b"second 2", op=2))
    assert bytes(journal.read(2)) == b"first 2"
    assert journal.append(b"second 2, longer than the first", op=2, kind=9, replace=True) == 2
    assert journal.append(b"third", op=2, kind=8, replace=True) == 2
    wanted = {1: (b"first 1", 0), 2: (b"third", 8), 3: (b"first 3", 0)}
    assert contents_of(journal) == wanted
    journal = reopened(home, journal, how)
    assert contents_of(journal) == wanted


@parametrize_ends
def test_of_a_hundred_replacements_the_last_one_is_there(home: Home, how: str) -> None:
    journal = home.open(**SMALL)
    for n in range(100):
        journal.append(b"%d" % n * 50, op=5, replace=True)
        assert bytes(journal.read(5)) == b"%d" % n * 50
        assert len(journal) == 1
    journal = reopened(home, journal, how)
    assert contents_of(journal) == {5: (b"99" * 50, 0)}


def test_replace_of_an_op_that_is_not_live_appends_it(home: Home) -> None:
    journal = home.open(**SMALL)
    assert journal.append(b"x", replace=True) == 1
    assert journal.append(b"y", op=4, replace=True) == 4
    assert contents_of(journal) == {1: (b"x", 0), 4: (b"y", 0)}


# --- payloads -----------------------------------------------------------------------------------------


@parametrize_ends
def test_an_entry_comes_back_with_its_payload_kind_and_timestamp(home: Home, how: str) -> None:
    ticks = iter(range(1000, 2000))
    journal = home.open(**SMALL, clock=lambda: next(ticks))
    journal.append(b"one", kind=7)
    journal.append(b"two", kind=0, timestamp=-5)
    journal.append(b"three", kind=2**15 - 1, timestamp=2**63 - 1)
    journal.append(b"four", timestamp=0)
    journal.append(b"five")
    wanted = [(1, b"one", 7, 1000), (2, b"two", 0, -5), (3, b"three", 2**15 - 1, 2**63 - 1)]
    wanted += [(4, b"four", 0, 0), (5, b"five", 0, 1001)]
    for _ in range(2):
        assert list(journal) == wanted
        assert [journal[op] for op in range(1, 6)] == wanted
        assert journal.headers()["timestamp"].tolist() == [w[3] for w in wanted]
        journal = reopened(home, journal, how)


def test_without_a_clock_of_the_user_an_entry_has_the_time_of_its_append(home: Home) -> None:
    import time

    journal = home.open(**SMALL)
    before = time.time_ns()
    journal.append(b"one")
    journal.append_many([b"two", b"three"])
    after = time.time_ns()
    stamps = [e.timestamp for e in journal]
    assert before <= stamps[0] <= stamps[1] == stamps[2] <= after


BUFFERS: dict[str, tuple[Any, bytes]] = {
    "bytes": (b"abc", b"abc"),
    "bytearray": (bytearray(b"abc"), b"abc"),
    "memoryview": (memoryview(b"xabcx")[1:4], b"abc"),
    "memoryview of words": (memoryview(array.array("I", [1, 2])), array.array("I", [1, 2]).tobytes()),
    "array": (array.array("d", [1.5, 2.5]), array.array("d", [1.5, 2.5]).tobytes()),
    "numpy": (np.arange(6, dtype="<u2").reshape(2, 3), np.arange(6, dtype="<u2").tobytes()),
    "numpy structured": (np.zeros(2, "<u4,<u8"), bytes(24)),
    "numpy empty": (np.zeros(0), b""),
    "numpy scalar": (np.float64(1.5), np.float64(1.5).tobytes()),
    "empty bytearray": (bytearray(), b""),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_any_contiguous_buffer_is_a_payload(home: Home, name: str) -> None:
    given, wanted = BUFFERS[name]
    journal = home.open(**SMALL)
    assert journal.append(given) == 1
    assert list(journal.append_many([given, b"between", given])) == [2, 3, 4]
    assert [bytes(p) for p in journal.payloads()] == [wanted, wanted, b"between", wanted]
    journal.close()
    assert [bytes(p) for p in home.open().payloads()] == [wanted, wanted, b"between", wanted]


@pytest.mark.parametrize("durability", ["sync", "os", "buffered"])
def test_a_payload_that_is_changed_after_the_append_does_not_change_the_entry(
    home: Home, durability: str
) -> None:
    journal = home.open(**SMALL, durability=durability)
    given = bytearray(b"before")
    journal.append(given)
    journal.append_many([given, memoryview(given)])
    given[:] = b"after!"
    journal.sync()
    assert [journal.copy(op) for op in (1, 2, 3)] == [b"before"] * 3
    given.append(0)  # nobody holds the buffer either


@parametrize_ends
def test_an_empty_payload_is_an_entry(home: Home, how: str) -> None:
    journal = home.open(**SMALL)
    journal.append(b"", kind=3)
    journal.append(b"x")
    journal.append_many([b"", b""])
    wanted = {1: (b"", 3), 2: (b"x", 0), 3: (b"", 0), 4: (b"", 0)}
    assert contents_of(journal) == wanted
    assert len(journal.read(1)) == 0
    assert contents_of(reopened(home, journal, how)) == wanted


@parametrize_ends
def test_payloads_of_every_length_near_the_alignment_come_back(home: Home, how: str) -> None:
    journal = home.open(slots=64, segment_bytes=16384)
    wanted = {}
    for length in [*range(33), 4039, 4040, 4041, 4096]:
        payload = bytes((length + n) % 251 + 1 for n in range(length))
        wanted[journal.append(payload)] = (payload, 0)
    assert contents_of(journal) == wanted
    assert contents_of(reopened(home, journal, how)) == wanted


@parametrize_ends
@pytest.mark.parametrize("length", [ROOM - 200, ROOM, ROOM * 3 + 5, 300_000])
def test_a_payload_larger_than_a_segment_gets_a_longer_one(home: Home, length: int, how: str) -> None:
    journal = home.open(**SMALL)
    payload = bytes(n * 7 % 256 for n in range(1000)) * (length // 1000 + 1)
    payload = payload[:length]
    journal.append(b"before")
    assert journal.append(payload) == 2
    journal.append(b"behind")
    wanted = {1: (b"before", 0), 2: (payload, 0), 3: (b"behind", 0)}
    assert contents_of(journal) == wanted
    assert len({f.name for f in frames_of(home.directory()) if f.op == 2}) == 1
    journal = reopened(home, journal, how)
    assert contents_of(journal) == wanted
    assert journal.segment_bytes == 16384
    journal.append_many([b"next"] * 3)
    assert journal.verify().ok


def test_max_payload_bytes_is_the_largest_that_is_taken(home: Home) -> None:
    journal = home.open(**SMALL, max_payload_bytes=100)
    journal.append(bytes(100))
    error = refused_call(PayloadTooLargeError, journal, lambda: journal.append(bytes(101)))
    assert "101" in str(error)
    assert "100" in str(error)
    refused_call(PayloadTooLargeError, journal, lambda: journal.append_many([b"", bytes(101)]))
    journal.append_many([bytes(100)] * 2)
    assert len(journal) == 3


def test_max_payload_bytes_of_zero_takes_empty_payloads_only(home: Home) -> None:
    journal = home.open(**SMALL, max_payload_bytes=0)
    journal.append(b"")
    refused_call(PayloadTooLargeError, journal, lambda: journal.append(b"x"))


def test_max_payload_bytes_may_differ_from_open_to_open(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(bytes(5000))
    journal.close()
    journal = home.open(max_payload_bytes=10)
    assert journal.copy(1) == bytes(5000)
    refused_call(PayloadTooLargeError, journal, lambda: journal.append(bytes(11)))


# --- reading ------------------------------------------------------------------------------------------


def test_every_way_of_reading_gives_the_same_entry(home: Home) -> None:
    journal = home.open(**SMALL, clock=lambda: 77)
    for n in range(1, 7):
        journal.append(b"payload %d" % n, kind=n)
    entry = journal[3]
    assert isinstance(entry, Entry)
    assert entry == (3, b"payload 3", 3, 77)
    assert journal.get(3) == entry == list(journal)[2] == next(journal.entries(3))
    assert journal.read(3) == journal.copy(3) == entry.payload == next(journal.payloads(3))
    header = journal.header(3)
    assert header is not None
    assert (header.op, header.length, header.kind, header.timestamp) == (3, 9, 3, 77)
    assert header.checksum == fmt.crc32c(b"payload 3")
    row = journal.headers(3, 3)[0]
    assert row.tolist() == (3, 9, 3, 77, header.lsn, header.checksum)
    assert header.lsn == next(f.lsn for f in frames_of(home.directory()) if f.op == 3)


def test_ranges_are_inclusive_and_may_reach_beyond_what_is_there(home: Home) -> None:
    journal = home.open(**SMALL)
    for op in (2, 3, 5, 8):
        journal.append(b"%d" % op, op=op)

    def ops(first: int | None = None, last: int | None = None) -> list[int]:
        found = [e.op for e in journal.entries(first, last)]
        assert [int(bytes(p)) for p in journal.payloads(first, last)] == found
        assert journal.headers(first, last)["op"].tolist() == found
        return found

    assert ops() == [2, 3, 5, 8]
    assert ops(3, 5) == [3, 5]
    assert ops(4) == [5, 8]
    assert ops(None, 4) == [2, 3]
    assert ops(4, 4) == ops(6, 7) == ops(9) == ops(None, 1) == ops(5, 3) == []
    assert ops(-10, OP_MAX) == ops(0, 2**70) == [2, 3, 5, 8]


@pytest.mark.parametrize(("first", "last"), [(2**64, None), (2**70, None), (None, 0), (None, -1), (-9, -2)])
def test_a_range_where_no_op_can_be_is_empty(home: Home, first: int | None, last: int | None) -> None:
    journal = home.open(**SMALL)
    journal.append_many([b"x"] * 3)
    assert list(journal.entries(first, last)) == list(journal.payloads(first, last)) == []
    assert len(journal.headers(first, last)) == 0


@pytest.mark.parametrize("op", [0, 4, 17, -1, -13, 2**63, 2**64, 2**70])  # 17 and -13: slots that are taken
def test_what_is_not_there_is_missing_and_nothing_else(home: Home, op: int) -> None:
    journal = home.open(**SMALL)
    journal.append_many([b"x"] * 3)
    assert op not in journal
    assert journal.get(op) is None
    assert journal.get(op, "default") == "default"
    for read in (journal.read, journal.copy, journal.__getitem__):
        with pytest.raises(MissingOpError, match=str(op)) as raised:
            read(op)
        assert isinstance(raised.value, KeyError)
    assert journal.header(op) is None


def test_what_is_no_op_is_not_in_the_journal(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append_many([b"x"] * 3)
    for thing in ("1", b"1", None, 1.5, [1], (1,), object()):
        assert thing not in journal


def test_the_previous_header_is_that_of_the_op_before_or_none(home: Home) -> None:
    journal = home.open(**SMALL)
    for op in (1, 2, 4):
        journal.append(b"%d" % op, op=op)
    second, fourth = journal.header(2), journal.header(4)
    assert second is not None and fourth is not None
    assert journal.previous_header(second) == journal.header(1)
    assert journal.previous_header(fourth) is None
    first = journal.previous_header(second)
    assert first is not None
    assert journal.previous_header(first) is None


def test_views_are_read_only(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"payload")
    views = [journal.read(1), journal[1].payload, next(iter(journal)).payload, next(journal.payloads())]
    views += [journal.drain(1, 1)[0].payload]
    for view in views:
        assert view.readonly
        with pytest.raises(TypeError):
            view[0] = 0


def test_a_view_is_a_slice_of_the_mapping_and_no_copy(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"payload")
    journal.append(b"another")
    one, two = journal.read(1), journal.read(2)
    a, b = np.frombuffer(one, "u1"), np.frombuffer(two, "u1")
    near = b.__array_interface__["data"][0] - a.__array_interface__["data"][0]
    assert near == fmt.frame_bytes(7)


def test_iteration_sees_more_entries_than_one_chunk_in_order(home: Home) -> None:
    journal = home.open(slots=4096, segment_bytes=65536)
    for first in range(1, 3001, 300):
        journal.append_many([b"%d" % n for n in range(first, first + 300)])
    assert [(e.op, bytes(e.payload)) for e in journal] == [(n, b"%d" % n) for n in range(1, 3001)]
    assert [int(bytes(p)) for p in journal.payloads(100, 2900)] == list(range(100, 2901))
    assert journal.headers()["op"].tolist() == list(range(1, 3001))


def test_entries_appended_while_iterating_disturb_nothing(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append_many([b"first"] * 5)
    seen = []
    for entry in journal:
        seen.append(entry.op)
        if len(journal) < 10:
            journal.append(b"meanwhile")
    assert seen == [1, 2, 3, 4, 5]
