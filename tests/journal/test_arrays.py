"""Columns, arrays and headers: what numpy is lent, what is copied, and that neither ever dangles."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mmapwal import Columns, CorruptionError, Durability, Journal, reader
from mmapwal.columns import HEADERS, Collection

from .files import SMALL, Home, entry_frames, flip


def row(op: int, length: int = 24) -> bytes:
    return op.to_bytes(8, "little") * (length // 8)


def filled(home: Home, count: int, length: int = 24, **options: Any) -> Journal:
    journal = home.open(**{"slots": 4096, "segment_bytes": 16384, "durability": Durability.OS} | options)
    for first in range(1, count + 1, 50):
        journal.append_many([row(op, length) for op in range(first, min(first + 50, count + 1))])
    return journal


def ops_in(array: np.ndarray) -> list[int]:
    """Of rows by row(); every word of each is looked at."""
    words = np.ascontiguousarray(array).view("<u8")
    assert (words == words[:, :1]).all()
    return words[:, 0].tolist()


def all_ops(arrays: list[np.ndarray]) -> list[int]:
    return [op for array in arrays for op in ops_in(array)]


def lent(array: np.ndarray, view: memoryview) -> bool:
    return bool(np.shares_memory(array, np.frombuffer(view, np.uint8)))


# --- arrays ---------------------------------------------------------------------------------------------


def test_payloads_of_one_length_are_the_rows_of_an_array_on_the_mapping(home: Home) -> None:
    journal = filled(home, 100)
    array = journal.array(3, 90)
    assert array.shape == (88, 24) and array.dtype == np.uint8
    assert ops_in(array) == list(range(3, 91))
    assert lent(array[0], journal.read(3)) and lent(array[-1], journal.read(90))
    assert array.view("<u8").shape == (88, 3)
    assert lent(journal.array(3, 90, copy=False), journal.read(3))
    assert not lent(journal.array(3, 90, copy=True), journal.read(3))


def test_over_several_segments_there_is_an_array_for_each_and_one_by_a_copy(home: Home) -> None:
    journal = filled(home, 700)
    arrays = list(journal.arrays())
    assert len(arrays) == len({f.name for f in entry_frames(home.directory()).values()}) > 2
    assert all_ops(arrays) == list(range(1, 701))
    for array in arrays:
        assert lent(array, journal.read(ops_in(array)[0]))
    whole = journal.array()
    assert ops_in(whole) == list(range(1, 701))
    assert not any(lent(whole, journal.read(op)) for op in (1, 700))
    with pytest.raises(ValueError, match="without a copy"):
        journal.array(copy=False)


@pytest.mark.parametrize("aligned", [0, 512])
def test_gaps_replaced_ops_and_padding_only_make_more_arrays(home: Home, aligned: int) -> None:
    journal = filled(home, 60, commit_align_bytes=aligned, durability=Durability.SYNC)
    for op in (70, 71, 72):
        journal.append(row(op), op=op)
    journal.append(row(9), op=9, replace=True)
    journal.drain(30, 33)
    wanted = [*range(1, 30), *range(34, 61), 70, 71, 72]
    arrays = list(journal.arrays())
    assert all_ops(arrays) == wanted
    assert len(arrays) < 10
    assert ops_in(journal.array()) == wanted
    assert len(list(journal.arrays(1, 8))) == len(list(journal.arrays(70, 72))) == 1  # also evenly padded


def test_payloads_of_different_lengths_are_refused(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append_many([b"one", b"two", b"three"])
    assert journal.array(1, 2).tobytes() == b"onetwo"
    for call in (journal.array, lambda: list(journal.arrays()), lambda: journal.array(copy=True)):
        with pytest.raises(ValueError, match="3 and of 5 bytes"):
            call()


def test_lengths_that_fill_the_same_frame_are_different_lengths(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append_many([b"12345", b"1234567", b"12345"])
    with pytest.raises(ValueError, match="5 and of 7 bytes"):
        journal.array()


def test_empty_payloads_and_empty_ranges_have_their_shapes(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append_many([b""] * 5)
    assert journal.array().shape == (5, 0)
    assert journal.array(6).shape == (0, 0)
    assert list(journal.arrays(6)) == []
    assert len(journal.columns(6)) == len(journal.headers(6)) == 0
    assert journal.columns(6).views == ()


def test_one_row_is_an_array_at_the_very_end_of_a_segment_too(home: Home) -> None:
    journal = filled(home, 700)
    for op in range(1, 701):
        assert ops_in(journal.array(op, op, copy=False)) == [op]


@pytest.mark.parametrize("what", ["array", "copied array", "headers", "copied headers"])
def test_nothing_can_be_stored_into_what_is_lent_or_copied(home: Home, what: str) -> None:
    journal = filled(home, 10)
    call = journal.array if "array" in what else journal.headers
    array = call(copy=True) if "copied" in what else call()
    if what == "copied headers":  # the caller's own
        array["op"] = 0
    else:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert journal.headers()["op"].tolist() == list(range(1, 11))


LENDERS: dict[str, tuple[Callable[[Journal], Any], Callable[[Any], list[int]]]] = {
    "array": (lambda j: j.array(1, 100), ops_in),
    "part of an array": (lambda j: j.array(1, 100)[:, 8:], ops_in),
    "arrays": (lambda j: list(j.arrays(1, 100)), all_ops),
    "headers": (lambda j: j.headers(1, 100), lambda headers: headers["op"].tolist()),
    "columns": (
        lambda j: j.columns(1, 100),
        lambda columns: [int.from_bytes(columns.payload(r)[:8], "little") for r in range(len(columns))],
    ),
}


@pytest.mark.parametrize("way", LENDERS)
def test_what_was_lent_stays_right_when_all_is_replaced_compacted_unlinked_and_closed(
    home: Home, way: str
) -> None:
    journal = filled(home, 100)
    lend, ops_of = LENDERS[way]
    given = lend(journal)
    for op in range(1, 101):
        journal.append(b"\xff" * 24, op=op, replace=True)
    journal._engine.rotate()
    assert journal.compact() > 0
    assert ops_of(given) == list(range(1, 101))
    if home.kind == "mapped":
        assert journal.stats().held_bytes > 0
    journal.close()
    del journal
    gc.collect()
    assert ops_of(given) == list(range(1, 101))


def test_a_view_that_is_released_is_missed_by_nobody_else(home: Home) -> None:
    journal = filled(home, 10)
    columns, array = journal.columns(), journal.array()
    columns.views[0].release()
    journal.read(1).release()
    assert ops_in(array) == ops_in(journal.array()) == list(range(1, 11))
    assert [bytes(p) for p in journal.payloads()] == [row(op) for op in range(1, 11)]


@pytest.mark.parametrize("op", [1, 60, 700])
def test_an_array_with_a_damaged_row_is_refused(home: Home, op: int) -> None:
    journal = filled(home, 700)
    journal.sync()
    flip(
        home.directory(),
        entry_frames(home.directory())[op].name,
        entry_frames(home.directory())[op].payload_at,
    )
    for call in (journal.array, journal.columns, lambda: list(journal.arrays())):
        with pytest.raises(CorruptionError) as raised:
            call()
        assert raised.value.op == op


# --- columns --------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2], ids=["alone", "halves"])
def takers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """By how many threads columns of two rows and more are gathered; and those that did."""
    monkeypatch.setattr(reader, "threads_for", lambda _: request.param)
    monkeypatch.setattr(reader, "SPLIT_ROWS", 2)
    seen: set[int] = set()
    take = Collection.take

    def noting(*args: Any) -> int:
        seen.add(threading.get_ident())
        return take(*args)

    monkeypatch.setattr(Collection, "take", noting)
    return seen


def test_columns_are_what_the_entries_and_headers_say(
    home: Home, takers: set[int], request: pytest.FixtureRequest
) -> None:
    journal = home.open(slots=4096, segment_bytes=16384, durability=Durability.OS)
    for op in range(1, 900):
        journal.append(row(op, 8 * (op % 9)), op=op + op // 100, kind=op % 300, timestamp=-op)
    columns = journal.columns(5, 850)
    assert len(takers) == request.node.callspec.params["takers"]
    assert isinstance(columns, Columns)
    entries, headers = list(journal.entries(5, 850)), journal.headers(5, 850)
    assert len(columns) == len(entries) > 800
    assert columns.ops.tolist() == [e.op for e in entries]
    assert columns.kinds.tolist() == [e.kind for e in entries]
    assert columns.timestamps.tolist() == [e.timestamp for e in entries]
    assert columns.lengths.tolist() == [len(e.payload) for e in entries]
    assert columns.lsns.tolist() == headers["lsn"].tolist()
    assert columns.checksums.tolist() == headers["checksum"].tolist()
    assert [bytes(columns.payload(r)) for r in range(len(columns))] == [bytes(e.payload) for e in entries]
    assert 1 < len(columns.views) == len(set(columns.segments.tolist()))
    assert all(view.readonly for view in columns.views)


@pytest.mark.parametrize("seed", range(8))
def test_columns_have_each_live_op_once_and_in_order_wherever_gaps_are(
    home: Home, takers: set[int], seed: int
) -> None:
    chance = random.Random(seed)
    journal = home.open(slots=4096, segment_bytes=16384, durability=Durability.OS)
    width = chance.choice([900, 3000, 2**50])  # the last: few of a wide range
    ops = chance.sample(range(1, width + 1), 600)
    ops = [op for slot, op in {op % 4096: op for op in ops}.items()]
    if seed % 2:  # one half has no gaps, the other many
        ops = [op for op in ops if op > width // 2 or op % 7 == 0]
    for op in ops:
        journal.append(row(op, 8 * (op % 5)), op=op)
    first, last = sorted(chance.sample(range(1, width + 1), 2)) if seed % 3 else (1, width)
    columns = journal.columns(first, last)
    assert columns.ops.tolist() == sorted(op for op in ops if first <= op <= last)
    assert [bytes(columns.payload(r)) for r in range(len(columns))] == [
        row(op, 8 * (op % 5)) for op in columns.ops.tolist()
    ]


@pytest.mark.parametrize("op", [1, 350, 351, 700])
def test_columns_with_a_damaged_row_in_either_half_are_refused(home: Home, takers: set[int], op: int) -> None:
    journal = filled(home, 700)
    journal.sync()
    frame = entry_frames(home.directory())[op]
    flip(home.directory(), frame.name, frame.payload_at)
    with pytest.raises(CorruptionError) as raised:
        journal.columns()
    assert raised.value.op == op


@pytest.mark.usefixtures("takers")
def test_columns_of_few_ops_in_a_wide_range_take_little(home: Home) -> None:
    journal = home.open(**SMALL)
    for op in (3, 2**40, 2**62 + 1):
        journal.append(b"%d" % op, op=op)
    assert journal.columns().ops.tolist() == [3, 2**40, 2**62 + 1]
    assert [bytes(a) for a in map(np.ascontiguousarray, journal.arrays(3, 3))] == [b"3"]


@pytest.mark.usefixtures("takers")
def test_columns_are_of_what_lived_when_they_were_asked_for_whatever_fills_a_gap_meanwhile(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = home.open(**SMALL)
    for op in (3, 2**40):
        journal.append(b"%d" % op, op=op)
    look = journal._reader._range

    def look_and_append(first: int | None, last: int | None) -> object:
        found = look(first, last)
        journal.append(b"between", op=(journal.first_op or 0) + 2)
        return found

    monkeypatch.setattr(journal._reader, "_range", look_and_append)
    assert journal.columns().ops.tolist() == [3, 2**40]


# --- headers --------------------------------------------------------------------------------------------


def test_headers_are_lent_where_frames_of_one_length_lie_side_by_side(home: Home) -> None:
    journal = filled(home, 100)
    lent_ones, copied = journal.headers(2, 99), journal.headers(2, 99, copy=True)
    assert lent_ones.tolist() == copied.tolist()
    assert lent_ones.dtype.names == copied.dtype.names == HEADERS.names
    assert copied.dtype == HEADERS
    frame = entry_frames(home.directory())[2]
    columns = journal.columns(2, 2)
    assert lent(lent_ones, columns.views[0][frame.at : frame.at + 56])
    assert journal.headers(2, 99, copy=False).tolist() == copied.tolist()


def test_headers_of_uneven_frames_are_copied_or_refused(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append_many([b"1", b"22" * 10, b"3"])
    assert journal.headers().dtype == HEADERS
    assert journal.headers()["length"].tolist() == [1, 20, 1]
    with pytest.raises(ValueError, match="without a copy"):
        journal.headers(copy=False)


def test_headers_over_several_segments_are_copied_in_order(home: Home) -> None:
    journal = filled(home, 700)
    headers = journal.headers()
    assert headers.dtype == HEADERS
    assert headers["op"].tolist() == list(range(1, 701))
    with pytest.raises(ValueError, match="without a copy"):
        journal.headers(copy=False)
