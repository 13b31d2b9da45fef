"""The files of a journal: made in steps, named by the superblock, refused when one is not what it says."""

from __future__ import annotations

import contextlib
import errno
import itertools
import struct
from typing import Any

import numpy as np
import pytest

from mmapwal import (
    IncompatibleFormatError,
    Journal,
    MemoryDirectory,
    PoisonedError,
    RecoveryRow,
    inspect,
)
from mmapwal import format as fmt
from mmapwal.testing import Call, Fault, FaultDirectory, InterposedDirectory, every_fault

from .files import (
    SMALL,
    Home,
    after_kill,
    bytes_of,
    contents_of,
    cut,
    flip,
    killed,
    put,
    read,
    refused,
    superblock_of,
    write,
)

ENTRIES = {n: (b"%d" % n * 3000, 0) for n in range(1, 10)}


def filled(home: Home) -> Journal:
    """Several segments."""
    journal = home.open(**SMALL)
    for payload, _ in ENTRIES.values():
        journal.append(payload)
    return journal


def ended(home: Home, how: str) -> Home:
    journal = filled(home)
    if how == "killed":
        return killed(home, journal)
    journal.close()
    return home


def segments(home: Home) -> list[str]:
    return [r.name for r in superblock_of(home.directory()).segments]


parametrize_ends = pytest.mark.parametrize("how", ["closed", "killed"])


# --- segments -----------------------------------------------------------------------------------------


@parametrize_ends
@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_deleted_segment_refuses(home: Home, number: int, how: str) -> None:
    home = ended(home, how)
    name = segments(home)[number]
    home.directory().unlink(name)
    error = refused(home)
    assert error.segment == name
    assert "not there" in error.reason
    assert name in {p.segment for p in inspect(home.directory()).problems}


@parametrize_ends
@pytest.mark.parametrize("number", [0, 1, -1])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 4095, 4096, 8000, 16383])
def test_a_segment_cut_short_refuses(home: Home, number: int, length: int, how: str) -> None:
    home = ended(home, how)
    name = segments(home)[number]
    cut(home.directory(), name, length)
    error = refused(home)
    assert error.segment == name
    assert str(length) in error.reason
    assert name in {p.segment for p in inspect(home.directory()).problems}


@parametrize_ends
@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_foreign_segment_refuses(home: Home, make_home: Any, number: int, how: str) -> None:
    """Of another journal that holds the same entries at the same places."""
    other = make_home("other")
    filled(other).close()
    home = ended(home, how)
    name = segments(home)[number]
    put(home.directory(), name, read(other.directory(), segments(other)[number]))
    error = refused(home)
    assert error.segment == name
    assert "another" in error.reason


@parametrize_ends
def test_segments_that_changed_places_refuse(home: Home, how: str) -> None:
    home = ended(home, how)
    one, two = segments(home)[:2]
    first, second = read(home.directory(), one), read(home.directory(), two)
    put(home.directory(), one, second)
    put(home.directory(), two, first)
    assert refused(home).segment == one


@parametrize_ends
@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_segment_of_zeros_refuses(home: Home, number: int, how: str) -> None:
    home = ended(home, how)
    name = segments(home)[number]
    put(home.directory(), name, bytes(16384))
    assert refused(home).segment == name


@parametrize_ends
def test_every_byte_of_a_segments_header_matters(home: Home, how: str) -> None:
    home = ended(home, how)
    name = segments(home)[1]
    for at in range(fmt.SEGMENT_HEADER.itemsize):
        flip(home.directory(), name, at, 0x10)
        assert refused(home).segment == name
        flip(home.directory(), name, at, 0x10)
    assert contents_of(home.open()) == ENTRIES


@parametrize_ends
def test_a_segment_of_a_newer_version_is_refused(home: Home, how: str) -> None:
    home = ended(home, how)
    name = segments(home)[0]
    raw = read(home.directory(), name)[: fmt.SEGMENT_HEADER.itemsize]
    header: Any = np.frombuffer(bytearray(raw), fmt.SEGMENT_HEADER)
    header["version"] = 2
    header["crc"] = fmt.crc32c(header.tobytes()[:-4])
    write(home.directory(), name, 0, header.tobytes())
    assert "version 2" in str(refused(home, IncompatibleFormatError))


def test_bytes_behind_a_segment_are_no_matter(home: Home) -> None:
    home = ended(home, "killed")
    name = segments(home)[0]
    put(home.directory(), name, read(home.directory(), name) + b"more" * 100)
    assert contents_of(home.open()) == ENTRIES


# --- the superblock -----------------------------------------------------------------------------------


@parametrize_ends
def test_a_superblock_that_is_gone_while_segments_are_there_refuses(home: Home, how: str) -> None:
    home = ended(home, how)
    home.directory().unlink(fmt.SUPERBLOCK_NAME)
    error = refused(home)
    assert error.segment == fmt.SUPERBLOCK_NAME
    assert "gone" in error.reason
    assert not inspect(home.directory()).ok
    home.directory().unlink(fmt.INDEX_NAME)
    refused(home)


def test_a_superblock_that_is_gone_while_the_index_is_there_refuses(home: Home) -> None:
    home = ended(home, "closed")
    for name in [*segments(home), fmt.SUPERBLOCK_NAME]:
        home.directory().unlink(name)
    refused(home)


@parametrize_ends
@pytest.mark.parametrize("length", [0, 1, 8, 291, 300])
def test_a_superblock_cut_short_refuses(home: Home, length: int, how: str) -> None:
    home = ended(home, how)
    cut(home.directory(), fmt.SUPERBLOCK_NAME, length)
    assert refused(home).segment == fmt.SUPERBLOCK_NAME
    assert not inspect(home.directory()).ok


@pytest.mark.parametrize("data", [bytes(4096), b"\xff" * 4096, b"text\n"])
def test_a_superblock_of_something_else_refuses(home: Home, data: bytes) -> None:
    home = ended(home, "killed")
    put(home.directory(), fmt.SUPERBLOCK_NAME, data)
    assert refused(home).segment == fmt.SUPERBLOCK_NAME


@parametrize_ends
@pytest.mark.parametrize("kind", ["memory"], indirect=True)
def test_every_byte_of_the_superblock_matters(home: Home, how: str) -> None:
    home = ended(home, how)
    directory = home.directory()
    length = int(np.frombuffer(read(directory, fmt.SUPERBLOCK_NAME), fmt.SUPERBLOCK_HEAD, 1)[0]["bytes"])
    for at in range(length):
        for mask in (0x01, 0x80):
            flip(directory, fmt.SUPERBLOCK_NAME, at, mask)
            refused(home)
            flip(directory, fmt.SUPERBLOCK_NAME, at, mask)
    assert contents_of(home.open()) == ENTRIES


@parametrize_ends
def test_a_directory_of_a_newer_format_version_is_refused(home: Home, how: str) -> None:
    home = ended(home, how)
    data = bytearray(read(home.directory(), fmt.SUPERBLOCK_NAME))
    struct.pack_into("<I", data, 8, 2)
    end = struct.unpack_from("<I", data, 12)[0] - 4
    struct.pack_into("<I", data, end, fmt.crc32c(bytes(data[:end])))
    put(home.directory(), fmt.SUPERBLOCK_NAME, bytes(data))
    assert "version 2" in str(refused(home, IncompatibleFormatError))
    with pytest.raises(IncompatibleFormatError):
        inspect(home.directory())


def test_a_superblock_of_an_earlier_epoch_refuses(home: Home) -> None:
    journal = filled(home)
    old = read(home.directory(), fmt.SUPERBLOCK_NAME)
    left = killed(home, journal)
    journal = left.open()
    journal.append(b"of the next epoch")
    left = killed(left, journal)
    put(left.directory(), fmt.SUPERBLOCK_NAME, old)
    assert "epoch" in refused(left).reason


@pytest.mark.parametrize("kind", ["mapped", "memory"], indirect=True)  # their index survives a kill
def test_a_superblock_from_before_the_last_segments_refuses(home: Home) -> None:
    """Of the same epoch: the index proves that more had been durable."""
    journal = home.open(**SMALL)
    for payload, _ in itertools.islice(ENTRIES.values(), 4):
        journal.append(payload)
    old = superblock_of(home.directory())
    for payload, _ in itertools.islice(ENTRIES.values(), 4, None):
        journal.append(payload)
    left = killed(home, journal)
    new = superblock_of(left.directory())
    assert len(new.segments) > len(old.segments)
    put(left.directory(), fmt.SUPERBLOCK_NAME, old.encode())
    assert "durable" in refused(left).reason


def test_the_spare_of_the_superblock_is_never_read(home: Home) -> None:
    home = ended(home, "killed")
    put(home.directory(), fmt.SUPERBLOCK_SPARE_NAME, read(home.directory(), fmt.SUPERBLOCK_NAME)[:-1])
    assert contents_of(home.open()) == ENTRIES


# --- making a journal ---------------------------------------------------------------------------------


class Died(BaseException):
    """The process is gone."""


class Mortal(InterposedDirectory):
    """Dies before its nth effect, and after that nothing happens any more."""

    EFFECTS = frozenset({"create", "write", "write_sync", "truncate", "sync", "rename", "unlink",
                         "dir_sync", "sync_parent", "lock"})  # fmt: skip

    def __init__(self, inner: MemoryDirectory, life: int) -> None:
        super().__init__(inner)
        self.left = life

    def intercept(self, call: Call) -> Any:
        if call.kind in self.EFFECTS:
            self.left -= 1
        if self.left < 0 and call.kind != "close":
            raise Died
        return call.run()

    def close(self) -> None:
        pass

    @classmethod
    def opened(cls, inner: MemoryDirectory, life: int) -> Any:
        return contextlib.closing(Journal("j", storage=cls(inner, life), **SMALL))


def test_a_crash_at_every_step_of_making_a_journal_leaves_a_new_or_an_empty_one() -> None:
    outcomes = []
    for life in itertools.count():
        directory = MemoryDirectory()
        mortal = Mortal(directory, life)
        try:
            journal = Journal("j", storage=mortal, **SMALL)
        except Died:
            pass
        else:
            mortal.left = 1000
            journal.close()
            break
        left = after_kill(directory)
        with Journal("j", storage=left, **SMALL) as journal:
            outcomes.append(journal.report.outcome)
            assert (len(journal), journal.slots, journal.segment_bytes) == (0, 16, 16384)
            assert journal.append(b"x") == 1
        with Journal("j", storage=left) as journal:
            assert contents_of(journal) == {1: (b"x", 0)}
    made = [o is not RecoveryRow.CREATED for o in outcomes]
    assert made == sorted(made)
    assert sum(made) > 4
    assert len(made) - sum(made) > 4


def test_a_crash_at_every_step_up_to_the_third_segment_loses_nothing_acknowledged() -> None:
    payloads = [b"%d" % n * 2500 for n in range(10)]
    for life in itertools.count():
        directory = MemoryDirectory()
        acknowledged: list[int] = []
        with contextlib.suppress(Died, PoisonedError), Mortal.opened(directory, life) as journal:
            for payload in payloads:
                acknowledged.append(journal.append(payload))
            journal.close()
            break
        left = after_kill(directory)
        with Journal("j", storage=left, **SMALL) as journal:
            found = contents_of(journal)
            assert list(found) == list(range(1, len(found) + 1))
            assert len(found) >= len(acknowledged)
            assert all(found[op] == (payloads[op - 1], 0) for op in found)
            journal.append(b"behind")
        with Journal("j", storage=left) as journal:
            assert len(journal) == len(found) + 1
    assert life > 30


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_at_any_step_of_making_a_journal_leaves_a_new_or_an_empty_one(error: int) -> None:
    for fault in every_fault(error=error, times=None):
        directory = MemoryDirectory()
        try:
            journal = Journal("j", storage=FaultDirectory(directory, fault), **SMALL)
        except OSError as e:
            assert fault.struck
            assert e.errno == error
        else:
            fault.lift()
            journal.close()
        directory.close()
        with Journal("j", storage=directory, **SMALL) as journal:
            assert len(journal) == 0
            journal.append(b"x")
        with Journal("j", storage=directory) as journal:
            assert contents_of(journal) == {1: (b"x", 0)}


def test_a_failed_open_lets_the_lock_go() -> None:
    directory = MemoryDirectory()
    Journal("j", storage=directory, **SMALL).close()
    fault = Fault(kinds="sync")
    with pytest.raises(OSError, match="error"):
        Journal("j", storage=FaultDirectory(directory, fault))
    with Journal("j", storage=directory) as journal:
        journal.append(b"x")


def test_a_journal_is_made_before_any_segment_is(home: Home) -> None:
    journal = home.open(**SMALL)
    assert superblock_of(home.directory()).segments == ()
    assert not [n for n in home.directory().names() if n.startswith("segment")]
    journal.append(b"x")
    names = [n for n in home.directory().names() if n.startswith("segment")]
    assert names == segments(home)


def test_a_lock_file_and_a_snapshot_folder_are_no_reason_not_to_make_a_journal(home: Home) -> None:
    directory = home.directory()
    put(directory, fmt.LOCK_NAME, b"")
    directory.subdirectory(fmt.SNAPSHOTS_NAME)
    journal = home.open(**SMALL)
    assert journal.report.outcome is RecoveryRow.CREATED


def test_opening_and_closing_leaves_the_segments_as_they_are(home: Home) -> None:
    home = ended(home, "closed")
    before = {n: d for n, d in bytes_of(home.directory()).items() if n.startswith("segment")}
    home.open().close()
    after = {n: d for n, d in bytes_of(home.directory()).items() if n.startswith("segment")}
    assert after == before
