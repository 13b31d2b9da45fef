"""Numbers that only grow, at their ends: nothing is written that would be refused when it is read, the error
names what is used up, and all that was acknowledged can be read."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import pytest

from mmapwal import Durability, ExhaustedError, Journal, MemoryDirectory, SyncMethod, inspect, repair
from mmapwal import format as fmt
from mmapwal.backup import backup_in_use
from mmapwal.segment import encode_header
from mmapwal.storage import Directory
from mmapwal.testing import Fault, FaultDirectory, When

from .files import (
    ROOM,
    SMALL,
    Contents,
    Home,
    bytes_of,
    change_superblock,
    contents_of,
    entry_frames,
    flip,
    killed,
    put,
    read,
    refused,
    superblock_of,
)  # fmt: skip
from .watched import Watched

LAST_LSN = fmt.LSN_MAX // fmt.PAGE_BYTES * fmt.PAGE_BYTES  # that a segment may end at
LIVES = 8  # more than any of these numbers lasts
NEARLY: dict[str, dict[str, Any]] = {
    "epoch": {"epoch": fmt.EPOCH_MAX - 2},
    "sequence": {"sequence": fmt.SEQUENCE_MAX - 9},
    "next segment": {"next_segment_id": fmt.SEGMENT_ID_MAX - 2},
    "LSN": {"epoch_start_lsn": LAST_LSN - 2 * ROOM - 8, "seal": None},
}


def read_only(directory: Directory) -> Contents:
    """What who changes nothing finds."""
    copy = MemoryDirectory()
    for name, data in bytes_of(directory).items():
        put(copy, name, data)
    with Journal("j", storage=copy, readonly=True) as journal:
        return contents_of(journal)


def renewed(directory: Directory, generation: int) -> None:
    """The first segment, as if it had been rewritten so often."""
    superblock = superblock_of(directory)
    old, *others = superblock.segments
    new = replace(old, generation=generation)
    put(
        directory, new.name, encode_header(superblock.uuid, new) + read(directory, old.name)[fmt.PAGE_BYTES :]
    )
    change_superblock(directory, segments=(new, *others))


def use(home: Home, told: Contents) -> None:
    """Lives of a journal, until one is refused something."""
    for _ in range(LIVES):
        with home.open(**SMALL) as journal:
            for n in range(12):
                payload = b"%d" % n * 400
                told[journal.append(payload)] = payload, 0
            journal.set_snapshot_op(journal.last_op or 0)
            told.clear()
            told[journal.append(b"last")] = b"last", 0


@pytest.mark.parametrize("number", NEARLY)
def test_when_a_number_is_used_up_the_error_names_it_and_all_that_was_told_can_be_read(
    home: Home, number: str
) -> None:
    home.open(**SMALL).close()
    change_superblock(home.directory(), **NEARLY[number])
    told: Contents = {}
    with pytest.raises(ExhaustedError, match=f"cannot go on: {number} "):
        use(home, told)
    assert told
    assert read_only(home.directory()) == told
    assert inspect(home.directory()).ok


@pytest.mark.parametrize(
    ("number", "last"),
    [("epoch", fmt.EPOCH_MAX), ("sequence", fmt.SEQUENCE_MAX), ("sequence", fmt.SEQUENCE_MAX - 1)],
)
def test_an_open_that_needs_a_number_that_is_used_up_changes_nothing(
    home: Home, number: str, last: int
) -> None:
    home.open(**SMALL).close()
    change_superblock(home.directory(), **{number: last - (1 if number == "epoch" else 2)})
    with home.open() as journal:  # takes the next epoch, and two sequences with its first segment
        journal.append(b"one")
        unclean = killed(home, journal)
    assert getattr(superblock_of(unclean.directory()), number) == last
    assert number in str(refused(unclean, ExhaustedError))
    if home.kind != "file":  # which keeps to itself what is durable, until it is closed
        assert read_only(unclean.directory()) == {1: (b"one", 0)}


def test_a_recovery_that_needs_a_generation_that_is_used_up_changes_nothing(home: Home) -> None:
    with home.open(**SMALL, commit_align_bytes=512, durability=Durability.OS) as journal:
        journal.append(b"one")
        unclean = killed(home, journal)
    renewed(unclean.directory(), fmt.GENERATION_MAX)
    assert "generation" in str(refused(unclean, ExhaustedError))


def test_a_compaction_that_needs_a_generation_that_is_used_up_changes_nothing(home: Home) -> None:
    with home.open(**SMALL) as journal:
        journal.append_many([b"kept", *[b"x" * 2000] * 3])
        journal.append_many([b"x" * 2000] * 6)
        journal.drain(2, 4)
    renewed(home.directory(), fmt.GENERATION_MAX)
    with home.open() as journal:
        told, before = contents_of(journal), superblock_of(home.directory()).segments[0]
        with pytest.raises(ExhaustedError, match="generation"):
            journal.compact()
        assert superblock_of(home.directory()).segments[0] == before
        assert contents_of(journal) == told
        assert journal.verify().ok


def test_the_last_op_is_appended_read_and_removed_and_none_comes_behind_it(home: Home) -> None:
    with home.open(**SMALL) as journal:
        journal.append(b"last but one", op=fmt.OP_MAX - 1)
        assert journal.remaining_capacity == 1
        assert journal.append(b"last") == fmt.OP_MAX
        for append in (lambda: journal.append(b""), lambda: journal.append_many([b"", b""])):
            with pytest.raises(ExhaustedError, match=f"op {fmt.OP_MAX} is the last"):
                append()
        with pytest.raises(ValueError, match="an op is 1"):
            journal.append_many([b"", b""], first_op=fmt.OP_MAX)
    told = {fmt.OP_MAX - 1: (b"last but one", 0), fmt.OP_MAX: (b"last", 0)}
    for unclean in (False, True):
        with home.open() as journal:
            assert contents_of(journal) == told
            assert journal.verify().ok
            followed = journal.follow(1)
            assert [next(followed).op, next(followed).op] == list(told)
            if unclean:
                home = killed(home, journal)
    with home.open() as journal:
        assert journal.truncate_from(fmt.OP_MAX) == 1
        assert journal.append(b"again") == fmt.OP_MAX
        journal.set_snapshot_op(fmt.OP_MAX)
        assert (len(journal), journal.remaining_capacity) == (0, 0)
        with pytest.raises(ExhaustedError, match="op"):
            journal.append(b"")


def test_when_the_epoch_that_a_failed_write_needs_is_used_up_nothing_is_written_and_all_is_read() -> None:
    disk = Watched(sync_method=SyncMethod.FDATASYNC)
    faulty = FaultDirectory(disk, Fault(1 << 30))
    Journal("j", storage=disk.inner, **SMALL).close()
    change_superblock(disk.inner, epoch=fmt.EPOCH_MAX - 1)
    journal = Journal("j", storage=faulty)
    assert journal.append(b"one") == 1
    faulty.plan = Fault(kinds=("write",), error=errno.ENOSPC, when=When.SHORT, times=None)
    with pytest.raises(OSError, match="No space"):
        journal.append(b"two" * 100)
    faulty.plan.lift()
    with pytest.raises(ExhaustedError, match="epoch"):
        journal.append(b"two")
    assert contents_of(journal) == {1: (b"one", 0)}
    journal.close()
    assert read_only(disk.inner) == {1: (b"one", 0)}


def test_a_journal_whose_epochs_are_used_up_is_verified_and_repaired_and_not_backed_up() -> None:
    directory = MemoryDirectory()
    with Journal("j", storage=directory, **SMALL) as journal:
        journal.append_many([b"one", b"two", b"three"])
    seal = superblock_of(directory).seal
    assert seal is not None
    change_superblock(directory, epoch=fmt.EPOCH_MAX, epoch_start_lsn=seal.lsn)
    copy = MemoryDirectory("copy")
    with pytest.raises(ExhaustedError, match="epoch"):
        backup_in_use(directory, copy)
    assert bytes_of(copy) == {}
    two = entry_frames(directory)[2]
    flip(directory, two.name, two.payload_at)
    assert [p.op for p in inspect(directory).problems] == [2]
    assert repair(directory).changed
    assert inspect(directory).ok
    assert read_only(directory) == {1: (b"one", 0), 3: (b"three", 0)}


def test_more_segments_than_a_superblock_names_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmt, "SEGMENTS_MAX", 2)
    with Journal("j", storage=MemoryDirectory(), **SMALL) as journal:
        with pytest.raises(ExhaustedError, match="number of segments 3, and 2 is the last"):
            for _ in range(9):
                journal.append(bytes(4000))
        assert journal.verify().ok


def test_all_segments_that_a_superblock_may_name_fit_into_the_bytes_that_it_may_have() -> None:
    lists = zip((fmt.SEGMENTS_MAX, fmt.REMOVALS_MAX, fmt.CUTS_MAX), fmt.SUPERBLOCK_LISTS, strict=True)
    rows = sum(most * row.itemsize for most, (_, row) in lists)
    assert fmt.SUPERBLOCK_HEAD.itemsize + rows + 2 * fmt.PAGE_BYTES < fmt.SUPERBLOCK_BYTES_MAX
