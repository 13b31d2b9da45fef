"""Bad input: a clear typed error, nothing written, nothing lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmapwal import (
    ClosedError,
    IncompatibleFormatError,
    Journal,
    JournalError,
    MemoryDirectory,
    PayloadTooLargeError,
)

from .files import SMALL, Home, contents_of, refused, refused_call


@pytest.fixture
def journal(home: Home) -> Journal:
    journal = home.open(**SMALL)
    journal.append_many([b"one", b"two", b"three"])
    return journal


def goes_on(journal: Journal) -> None:
    """What was there is there, and more can be appended."""
    found = contents_of(journal)
    assert set(found) == {1, 2, 3}
    assert journal.append(b"four") == 4


# --- appending ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [0, -1, 2**63, 2**64, 2**100], ids=repr)
def test_an_op_out_of_range_is_refused(journal: Journal, op: int) -> None:
    for call in (lambda: journal.append(b"x", op=op), lambda: journal.append_many([b"x"], first_op=op)):
        assert "op" in str(refused_call(ValueError, journal, call))
    goes_on(journal)


@pytest.mark.parametrize("op", ["1", 1.0, b"1", True, [1], object()], ids=lambda v: type(v).__name__)
def test_an_op_that_is_no_int_is_refused(journal: Journal, op: Any) -> None:
    for call in (lambda: journal.append(b"x", op=op), lambda: journal.append_many([b"x"], first_op=op)):
        assert "op" in str(refused_call(TypeError, journal, call))
    goes_on(journal)


def test_a_batch_that_goes_beyond_the_largest_op_is_refused(journal: Journal) -> None:
    refused_call(ValueError, journal, lambda: journal.append_many([b"x"] * 3, first_op=2**63 - 2))
    goes_on(journal)


@pytest.mark.parametrize("payload", ["text", 5, None, [1], object(), {}], ids=lambda v: type(v).__name__)
def test_a_payload_that_is_no_buffer_is_refused(journal: Journal, payload: Any) -> None:
    for call in (lambda: journal.append(payload), lambda: journal.append_many([b"good", payload])):
        assert type(payload).__name__ in str(refused_call(TypeError, journal, call))
    goes_on(journal)


@pytest.mark.parametrize(
    "payload",
    [memoryview(b"abcdef")[::2], np.arange(6).reshape(2, 3).T, np.arange(9)[::-1], memoryview(b"ab")[::-1]],
)
def test_a_payload_that_is_not_contiguous_is_refused(journal: Journal, payload: Any) -> None:
    for call in (lambda: journal.append(payload), lambda: journal.append_many([b"good", payload])):
        assert "contiguous" in str(refused_call(ValueError, journal, call))
    goes_on(journal)


def test_a_payload_that_is_too_large_is_refused(home: Home) -> None:
    journal = home.open(**SMALL, max_payload_bytes=10)
    journal.append_many([b"one", b"two", b"three"])
    for call in (lambda: journal.append(bytes(11)), lambda: journal.append_many([b"", bytearray(11)])):
        assert isinstance(refused_call(PayloadTooLargeError, journal, call), ValueError)
    goes_on(journal)


@pytest.mark.parametrize("wrong", [-1, 2**15, 2**16, 2**31, 2**64, -(2**70)], ids=repr)
def test_a_kind_out_of_range_is_refused(journal: Journal, wrong: int) -> None:
    for call in (
        lambda: journal.append(b"x", kind=wrong),
        lambda: journal.append_many([b"x"], kind=wrong),
        lambda: journal.append_many([b"x", b"y"], kinds=[1, wrong]),
    ):
        assert "kind" in str(refused_call(ValueError, journal, call))
    goes_on(journal)


@pytest.mark.parametrize("wrong", ["1", 1.5, None, [1]], ids=repr)
def test_a_kind_that_is_no_int_is_refused(journal: Journal, wrong: Any) -> None:
    for call in (
        lambda: journal.append(b"x", kind=wrong),
        lambda: journal.append_many([b"x"], kind=wrong),
        lambda: journal.append_many([b"x", b"y"], kinds=[1, wrong]),
    ):
        assert "kind" in str(refused_call(TypeError, journal, call))
    goes_on(journal)


@pytest.mark.parametrize("kinds", [[], [1], [1, 2, 3]])
def test_kinds_of_another_number_than_payloads_are_refused(journal: Journal, kinds: list[int]) -> None:
    refused_call(ValueError, journal, lambda: journal.append_many([b"x", b"y"], kinds=kinds))
    goes_on(journal)


def test_kinds_are_counted_as_they_are_and_not_as_they_say(journal: Journal) -> None:
    class Boasting(list[int]):
        def __len__(self) -> int:
            return 3

    refused_call(ValueError, journal, lambda: journal.append_many([b"x"] * 3, kinds=Boasting([1])))
    refused_call(TypeError, journal, lambda: journal.append_many([b"x"], kinds=np.array([1.5], np.float32)))
    refused_call(ValueError, journal, lambda: journal.append_many([], kinds=[1]))
    goes_on(journal)


@pytest.mark.parametrize(
    ("timestamp", "error"),
    [(2**63, ValueError), (-(2**63) - 1, ValueError), (1.5, TypeError), ("1", TypeError), ([1], TypeError)],
)
def test_a_timestamp_that_is_no_64_bit_int_is_refused(
    journal: Journal, timestamp: Any, error: type[Exception]
) -> None:
    assert "timestamp" in str(refused_call(error, journal, lambda: journal.append(b"x", timestamp=timestamp)))
    goes_on(journal)


@pytest.mark.parametrize("tick", [2**63, 1.5, "now", None], ids=repr)
def test_a_clock_that_gives_no_64_bit_int_appends_nothing(home: Home, tick: Any) -> None:
    ticks = [tick, tick, 5]
    journal = home.open(**SMALL, clock=lambda: ticks.pop(0))
    refused_call((TypeError, ValueError), journal, lambda: journal.append(b"x"))
    refused_call((TypeError, ValueError), journal, lambda: journal.append_many([b"x"]))
    assert journal.append(b"x") == 1
    assert journal[1].timestamp == 5


def test_a_clock_that_raises_appends_nothing(home: Home) -> None:
    def clock() -> int:
        raise LookupError("no time")

    journal = home.open(**SMALL, clock=clock)
    refused_call(LookupError, journal, lambda: journal.append(b"x"))
    refused_call(LookupError, journal, lambda: journal.append_many([b"x"]))
    assert journal.append(b"x", timestamp=1) == 1


# --- shrinking ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "last"), [(3, 2), (5, 1), (0, 2), (-1, 2), (1, 2**63), (-5, -1)])
def test_a_drain_of_a_range_that_is_none_is_refused(journal: Journal, first: int, last: int) -> None:
    refused_call(ValueError, journal, lambda: journal.drain(first, last))
    goes_on(journal)


@pytest.mark.parametrize("call", ["drain", "truncate_from", "set_snapshot_op"])
@pytest.mark.parametrize("op", ["1", 1.0, None, True], ids=repr)
def test_shrinking_by_what_is_no_int_is_refused(journal: Journal, call: str, op: Any) -> None:
    arguments = (op, op) if call == "drain" else (op,)
    refused_call(TypeError, journal, lambda: getattr(journal, call)(*arguments))
    goes_on(journal)


def test_a_watermark_that_moves_backwards_is_refused(journal: Journal) -> None:
    journal.append_many([b"x"] * 5)
    journal.set_snapshot_op(4)
    refused_call(ValueError, journal, lambda: journal.set_snapshot_op(3))
    refused_call(ValueError, journal, lambda: journal.set_snapshot_op(0))
    refused_call(ValueError, journal, lambda: journal.pair_snapshot(3, 1))
    for op in (-1, 2**63):
        refused_call(ValueError, journal, lambda op=op: journal.set_snapshot_op(op))
    journal.set_snapshot_op(4)
    assert [e.op for e in journal] == [5, 6, 7, 8]


@pytest.mark.parametrize("op", [0, -1, 1, 2, 2**63])
def test_a_truncation_at_or_below_the_watermark_is_refused(journal: Journal, op: int) -> None:
    journal.set_snapshot_op(2)
    refused_call(ValueError, journal, lambda: journal.truncate_from(op))
    assert [e.op for e in journal] == [3]


def test_user_data_that_is_too_long_is_refused(journal: Journal) -> None:
    journal.set_user_data(b"u" * 128)
    refused_call(ValueError, journal, lambda: journal.set_user_data(b"u" * 129))
    assert journal.user_data == b"u" * 128
    goes_on(journal)


# --- opening ------------------------------------------------------------------------------------------

BAD_CHOICES: list[tuple[dict[str, Any], type[Exception]]] = [
    *(({"slots": s}, ValueError) for s in (0, -1, 2**32 + 1, 2**70)),
    *(({"slots": s}, TypeError) for s in ("16", 16.0, True, [16])),
    *(({"segment_bytes": s}, ValueError) for s in (0, -4096, 1, 4096, 12288, 16385, 20000, 2**31)),
    *(({"segment_bytes": s}, TypeError) for s in ("16384", 16384.0, False)),
    *(({"max_payload_bytes": s}, ValueError) for s in (-1, 2**31, 2**70)),
    *(({"max_payload_bytes": s}, TypeError) for s in ("1", 1.5, None)),
    *(({"commit_align_bytes": s}, ValueError) for s in (1, 511, 1024, 8192, -512)),
    *(({"sync_interval_ms": s}, ValueError) for s in (0, -1, -0.5, float("nan"))),
    *(({"durability": s}, ValueError) for s in ("never", 7, None)),
    *(({"sync_method": s}, ValueError) for s in ("pray", 7, None)),
]


@pytest.mark.parametrize(("choice", "error"), BAD_CHOICES, ids=repr)
def test_a_choice_out_of_range_is_refused_and_nothing_is_made(
    tmp_path: Path, choice: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        Journal(tmp_path / "j", **choice)
    assert not (tmp_path / "j").exists()
    with Journal(tmp_path / "j", **SMALL) as journal:
        journal.append(b"x")
    with pytest.raises(error):
        Journal(tmp_path / "j", **choice)


@pytest.mark.parametrize(
    "other", [{"slots": 17}, {"segment_bytes": 32768}, {"commit_align_bytes": 512}], ids=repr
)
def test_sizes_that_the_journal_was_not_made_with_are_refused(home: Home, other: dict[str, int]) -> None:
    journal = home.open(**SMALL)
    journal.append(b"x")
    journal.close()
    error = refused(home, IncompatibleFormatError, **other)
    assert next(iter(other)) in str(error)
    journal = home.open(**SMALL, commit_align_bytes=0)
    assert contents_of(journal) == {1: (b"x", 0)}
    assert (journal.slots, journal.segment_bytes) == (16, 16384)
    journal.close()
    home.open()


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"a file")
    with pytest.raises(OSError, match="j"):
        Journal(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == b"a file"
    with pytest.raises(NotADirectoryError):
        Journal(tmp_path / "j" / "below")


def test_a_path_whose_parent_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Journal(tmp_path / "missing" / "j")
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("path", [None, 5, 1.5], ids=repr)
def test_a_path_that_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(TypeError):
        Journal(path)


NOT_WRITABLE = """
import os, sys
from mmapwal import Journal
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for name in sys.argv[2:]:
    try:
        Journal(name)
    except PermissionError as e:
        print(name, type(e).__name__)
"""


def test_a_directory_that_cannot_be_written_is_refused(
    tmp_path: Path, run_python: Callable[..., Any]
) -> None:
    folder = tmp_path / "folder"
    (folder / "empty").mkdir(parents=True)
    with Journal(folder / "old", **SMALL) as journal:
        journal.append(b"x")
    before = {p: p.read_bytes() for p in (folder / "old").iterdir()}
    for path in (folder / "old", folder / "empty", folder):
        path.chmod(0o555)
    for path in before:
        path.chmod(0o444)
    try:
        done = run_python(NOT_WRITABLE, folder, "new", "empty", "old")
    finally:
        for path in (folder, folder / "empty", folder / "old"):
            path.chmod(0o755)
    assert done.stdout.split() == [word for n in ("new", "empty", "old") for word in (n, "PermissionError")]
    assert {p: p.read_bytes() for p in (folder / "old").iterdir()} == before
    assert sorted(os.listdir(folder)) == ["empty", "old"]  # noqa: PTH208
    assert os.listdir(folder / "empty") == []  # noqa: PTH208
    for path in before:
        path.chmod(0o644)
    with Journal(folder / "old") as journal:
        assert contents_of(journal) == {1: (b"x", 0)}


def test_a_directory_that_holds_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.mkdir()
    (path / "notes.txt").write_bytes(b"mine")
    with pytest.raises(JournalError, match=r"notes\.txt"):
        Journal(path)
    assert [(p.name, p.read_bytes()) for p in path.iterdir()] == [("notes.txt", b"mine")]


def test_files_that_are_not_ours_are_left_alone_in_a_journal(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"x")
    directory = home.directory()
    for name in ("notes.txt", "segment-1", "segment-zz.tmp", "superblock.old", "index.bak", ".hidden"):
        directory.create(name).close()
    names = set(directory.names())
    journal.compact()
    journal.close()
    journal = home.open()
    assert contents_of(journal) == {1: (b"x", 0)}
    assert names <= set(directory.names())


def test_without_create_a_journal_has_to_be_there(home: Home) -> None:
    with pytest.raises(FileNotFoundError):
        home.open(create=False)
    assert home.kind != "mapped" or not home.path.exists()
    assert home.kind == "mapped" or home.directory().names() == []
    home.open(**SMALL).close()
    home.open(create=False)


# --- after the end ------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Journal], Any]] = {
    "append": lambda j: j.append(b"x"),
    "append at": lambda j: j.append(b"x", op=9),
    "append_many": lambda j: j.append_many([b"x"]),
    "append_many of nothing": lambda j: j.append_many([]),
    "sync": lambda j: j.sync(),
    "read": lambda j: j.read(1),
    "read of a missing one": lambda j: j.read(99),
    "copy": lambda j: j.copy(1),
    "get": lambda j: j.get(1),
    "[]": lambda j: j[1],
    "in": lambda j: 1 in j,
    "iter": list,
    "payloads": lambda j: list(j.payloads()),
    "entries": lambda j: list(j.entries()),
    "header": lambda j: j.header(1),
    "headers": lambda j: j.headers(),
    "columns": lambda j: j.columns(),
    "array": lambda j: j.array(1, 1),
    "arrays": lambda j: list(j.arrays(1, 1)),
    "drain": lambda j: j.drain(1, 2),
    "truncate_from": lambda j: j.truncate_from(2),
    "set_snapshot_op": lambda j: j.set_snapshot_op(1),
    "pair_snapshot": lambda j: j.pair_snapshot(1, 5),
    "compact": lambda j: j.compact(),
    "set_user_data": lambda j: j.set_user_data(b"x"),
    "verify": lambda j: j.verify(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("durability", ["sync", "buffered"])
def test_a_closed_journal_refuses_everything(home: Home, call: str, durability: str) -> None:
    journal = home.open(**SMALL, durability=durability)
    journal.append_many([b"one", b"two", b"three"])
    journal.close()
    with pytest.raises(ClosedError):
        CALLS[call](journal)
    journal.close()
    with pytest.raises(ClosedError):
        CALLS[call](journal)
    goes_on(home.open())


def test_an_iterator_that_was_begun_before_the_close_is_told(home: Home) -> None:
    journal = home.open(slots=2048, segment_bytes=65536)
    journal.append_many([b"x"] * 1200)
    entries = iter(journal)
    next(entries)
    journal.close()
    with pytest.raises(ClosedError):
        list(entries)


def test_close_is_what_with_does_also_when_the_block_raises() -> None:
    directory = MemoryDirectory()
    with pytest.raises(LookupError), Journal("j", storage=directory, **SMALL) as journal:
        journal.append(b"x")
        raise LookupError
    with pytest.raises(ClosedError):
        journal.append(b"y")
    with Journal("j", storage=directory) as journal:
        assert contents_of(journal) == {1: (b"x", 0)}
        assert journal.report.outcome.value == "sealed"
