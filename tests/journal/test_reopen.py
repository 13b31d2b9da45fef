"""Opening again, after a clean close and after a kill: all is there, and the journal goes on where it was."""

from __future__ import annotations

import errno
import time
from typing import Any

import pytest

from mmapwal import Durability, Journal, RecoveryRow, opening
from mmapwal import format as fmt
from mmapwal.index import SlotIndex

from .files import (
    SMALL,
    Home,
    bytes_of,
    contents_of,
    entry_frames,
    flip,
    frames_of,
    killed,
    killed_at_rest,
    put,
    read,
    refused,
    settle,
    superblock_of,
    without_index,
    write,
)


def filled(home: Home, **options: Any) -> Journal:
    """Some of everything: gaps, a replaced op, a batch, an empty payload, a watermark, two segments."""
    journal = home.open(**(SMALL | options), clock=iter(range(10**6)).__next__)
    journal.append_many([b"a" * 3000, b"b" * 3000, b"c" * 3000])
    journal.append(b"d", op=9, kind=4)
    journal.append(b"e" * 4000, op=6)
    journal.append(b"b again", op=2, kind=7, replace=True)
    journal.append(b"", op=11)
    journal.set_snapshot_op(1)
    return journal


FILLED = {2: (b"b again", 7), 3: (b"c" * 3000, 0), 6: (b"e" * 4000, 0), 9: (b"d", 4), 11: (b"", 0)}


def state_of(journal: Journal) -> dict[str, Any]:
    """What must not differ from one open to the next."""
    stats = journal.stats()
    return {
        "contents": contents_of(journal),
        "headers": journal.headers().tolist(),
        "watermark": journal.snapshot_op,
        "room": journal.remaining_capacity,
        "written": journal.written_lsn,
        "durable": journal.durable_lsn,
        "sizes": (journal.slots, journal.segment_bytes, journal.uuid),
        "pairing": journal.pairing,
        "user data": journal.user_data,
        "bytes": (stats.live_bytes, stats.dead_bytes, stats.entries, stats.removals),
    }


def test_a_clean_close_leaves_a_sealed_journal_that_opens_without_a_scan(home: Home) -> None:
    journal = filled(home)
    journal.set_user_data(b"term")
    journal.pair_snapshot(1, 77)
    before = state_of(journal)
    assert before["contents"] == FILLED
    journal.close()
    journal = home.open()
    assert state_of(journal) == before
    report = journal.report
    assert report.outcome is RecoveryRow.SEALED
    assert (report.frames, report.entries, report.scanned_bytes) == (0, 0, 0)
    assert (report.cut_bytes, report.rewritten_bytes, report.removed_files) == (0, 0, ())
    assert report.tail_lsn == before["written"]
    assert journal.verify().ok


def test_reopening_after_a_kill_rebuilds_the_index(home: Home) -> None:
    journal = filled(home)
    before = state_of(journal)
    left = killed(home, journal)
    journal = left.open()
    assert journal.report.outcome is RecoveryRow.CLEAN
    assert journal.report.entries == 7
    assert state_of(journal) == before
    report = journal.verify()
    assert report.ok, report.problems


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_reopening_restores_the_write_position(home: Home, how: str) -> None:
    journal = filled(home)
    before = journal.written_lsn
    last = frames_of(home.directory())[-1]
    if how == "closed":
        journal.close()
    else:
        home = killed(home, journal)
    journal = home.open()
    assert journal.written_lsn == journal.durable_lsn == before
    assert journal.append(b"the next one") == 12
    new = frames_of(home.directory())[-1]
    assert (new.op, new.lsn) == (12, before)
    assert (new.name, new.at) == (last.name, last.at + last.bytes)
    assert contents_of(journal) == FILLED | {12: (b"the next one", 0)}


@pytest.mark.parametrize("how", ["closed", "killed", "in turn"])
def test_a_journal_that_is_opened_again_and_again_stays_as_it_is(home: Home, how: str) -> None:
    journal = filled(home)
    before = state_of(journal)
    epoch = journal.stats().epoch
    for n in range(6):
        if how == "killed" or (how == "in turn" and n % 2):
            home = killed(home, journal)
        else:
            journal.close()
        journal = home.open()
        assert state_of(journal) == before
        assert journal.stats().epoch == epoch + n + 1


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_each_life_adds_its_entries(home: Home, how: str) -> None:
    journal = home.open(**SMALL)
    for life in range(1, 9):
        journal.append(b"life %d" % life)
        if how == "killed":
            home = killed(home, journal)
        else:
            journal.close()
        journal = home.open()
        assert contents_of(journal) == {n: (b"life %d" % n, 0) for n in range(1, life + 1)}


def test_an_empty_journal_reopens_empty(home: Home) -> None:
    journal = home.open(**SMALL)
    assert journal.report.outcome is RecoveryRow.CREATED
    uuid = journal.uuid
    journal = (left := killed(home, journal)).open()
    assert (len(journal), journal.uuid, journal.report.outcome) == (0, uuid, RecoveryRow.CLEAN)
    journal.close()
    journal = left.open()
    assert (len(journal), journal.uuid, journal.report.outcome) == (0, uuid, RecoveryRow.SEALED)
    assert journal.append(b"x") == 1


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_a_journal_whose_entries_are_all_gone_keeps_its_place(home: Home, how: str) -> None:
    journal = home.open(**SMALL)
    journal.append_many([b"x"] * 5)
    journal.set_snapshot_op(5)
    journal.compact()
    before = journal.written_lsn
    if how == "closed":
        journal.close()
    else:
        home = killed(home, journal)
    journal = home.open()
    assert (len(journal), journal.snapshot_op) == (0, 5)
    assert journal.written_lsn >= before
    assert journal.append(b"y") == 6


# --- the index is derived -----------------------------------------------------------------------------


def rot(directory: Any, at: int) -> None:
    flip(directory, fmt.INDEX_NAME, at)


SPOILT: dict[str, Any] = {
    "gone": lambda d: d.unlink(fmt.INDEX_NAME),
    "empty": lambda d: put(d, fmt.INDEX_NAME, b""),
    "short": lambda d: put(d, fmt.INDEX_NAME, read(d, fmt.INDEX_NAME)[:-32]),
    "long": lambda d: put(d, fmt.INDEX_NAME, read(d, fmt.INDEX_NAME) + bytes(32)),
    "zeros": lambda d: put(d, fmt.INDEX_NAME, bytes(len(read(d, fmt.INDEX_NAME)))),
    "noise": lambda d: put(d, fmt.INDEX_NAME, b"\xa5" * len(read(d, fmt.INDEX_NAME))),
    "page of noise": lambda d: write(d, fmt.INDEX_NAME, 0, b"\x5a" * 4096),
    "magic": lambda d: rot(d, 0),
    "version": lambda d: rot(d, 8),
    "uuid": lambda d: rot(d, 20),
    "slot count": lambda d: rot(d, 33),
    "progress": lambda d: (rot(d, 64 + 8), rot(d, 96 + 8)),
    "a slot": lambda d: rot(d, 4096 + 32 * 3),
    "an empty slot": lambda d: rot(d, 4096 + 32 * 5),
    "all slots": lambda d: write(d, fmt.INDEX_NAME, 4096, b"\x77" * 512),
    "a length": lambda d: rot(d, 4096 + 32 * 3 + 24),
}


@pytest.mark.parametrize("how", ["closed", "killed"])
@pytest.mark.parametrize("spoilt", SPOILT)
def test_an_index_that_is_gone_or_rotten_is_rebuilt(home: Home, spoilt: str, how: str) -> None:
    journal = filled(home)
    before = state_of(journal)
    if how == "closed":
        journal.close()
    else:
        home = killed(home, journal)
    SPOILT[spoilt](home.directory())
    journal = home.open()
    assert journal.report.outcome in {RecoveryRow.CLEAN, RecoveryRow.SEALED}
    assert (journal.report.outcome is RecoveryRow.SEALED) == (spoilt == "progress" and how == "closed")
    assert state_of(journal) == before
    journal.append(b"behind")
    journal.close()
    journal = home.open()
    assert contents_of(journal) == FILLED | {12: (b"behind", 0)}
    assert journal.report.outcome is RecoveryRow.SEALED
    assert journal.verify().ok


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_an_index_from_another_journal_is_rebuilt(home: Home, make_home: Any, how: str) -> None:
    other = make_home("other")
    journal = filled(other)
    journal.append(b"more")
    journal.close()
    journal = filled(home)
    before = state_of(journal)
    if how == "closed":
        journal.close()
    else:
        home = killed(home, journal)
    put(home.directory(), fmt.INDEX_NAME, read(other.directory(), fmt.INDEX_NAME))
    journal = home.open()
    assert state_of(journal) == before
    assert journal.report.outcome is RecoveryRow.CLEAN


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_an_index_from_an_earlier_time_is_rebuilt(home: Home, how: str) -> None:
    journal = home.open(**SMALL)
    journal.append_many([b"x"] * 3)
    journal.close()
    earlier = read(home.directory(), fmt.INDEX_NAME)
    journal = home.open()
    journal.append(b"y", op=2, replace=True)
    journal.append(b"z")
    journal.set_snapshot_op(1)
    before = state_of(journal)
    if how == "closed":
        journal.close()
    else:
        home = killed(home, journal)
    put(home.directory(), fmt.INDEX_NAME, earlier)
    journal = home.open()
    assert state_of(journal) == before
    assert journal.report.outcome is RecoveryRow.CLEAN


@pytest.mark.parametrize("kind", ["mapped", "memory"], indirect=True)  # their index survives a kill
def test_an_index_from_a_later_time_proves_that_something_is_missing(home: Home) -> None:
    """Older segments were put back, the index was not."""
    journal = home.open(**SMALL)
    journal.append(b"one")
    earlier = killed(home, journal)
    journal.append(b"two")
    later = killed(home, journal)
    put(earlier.directory(), fmt.INDEX_NAME, read(later.directory(), fmt.INDEX_NAME))
    assert "durable" in refused(earlier).reason
    earlier.directory().unlink(fmt.INDEX_NAME)
    assert contents_of(earlier.open()) == {1: (b"one", 0)}


# --- what opening says and does -----------------------------------------------------------------------


def test_the_report_counts_what_was_scanned_and_how_long_it_took(home: Home) -> None:
    journal = filled(home)
    written = journal.written_lsn
    frames = frames_of(home.directory())
    left = killed_at_rest(home, journal)
    told: list[tuple[int, int]] = []
    report = left.open(progress=lambda done, total: told.append((done, total))).report
    assert (report.frames, report.entries) == (len(frames), sum(f.op > 0 for f in frames))
    assert report.scanned_bytes == sum(f.bytes for f in frames)
    assert report.tail_lsn == written
    assert report.cut_bytes == 0
    assert report.removed_files == ()
    assert set(report.seconds) >= {"superblock", "scan", "rewrite", "epoch", "index", "writer"}
    assert all(s >= 0 for s in report.seconds.values())
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1] == sum(s.capacity for s in superblock_of(left.directory()).segments)


def test_the_report_tells_what_was_cut(home: Home) -> None:
    journal = home.open(**SMALL, durability=Durability.OS)
    journal.append_many([b"x" * 100] * 3)
    journal.append_many([b"y" * 100] * 3)
    left = killed(home, journal)
    frames = entry_frames(left.directory())
    flip(left.directory(), frames[6].name, frames[6].at)
    report = left.open().report
    assert report.outcome is RecoveryRow.TORN
    assert report.tail_lsn == frames[4].lsn
    assert report.cut_bytes == frames[6].lsn - frames[4].lsn
    assert report.rewritten_bytes == frames[4].lsn - frames[1].lsn


def test_what_no_sync_had_covered_is_written_again_and_what_one_had_is_not(home: Home) -> None:
    """The page cache is not believed after an unclean end."""
    journal = home.open(**SMALL, durability=Durability.OS)
    journal.append(b"durable" * 50)
    durable = journal.sync()
    journal.append(b"written" * 50)
    journal.append(b"written too")
    left = killed(home, journal)
    written = left.directory()
    before = journal.written_lsn
    report = left.open().report
    proven = durable if home.kind != "file" else entry_frames(written)[2].lsn
    assert report.rewritten_bytes == before - proven
    left = left.after_kill()
    assert left.open().report.rewritten_bytes == 0  # the epoch that started there proves it now


@pytest.mark.parametrize("align", [512, 4096])
def test_an_aligned_commit_whose_padding_was_lost_is_cut_so_that_no_sector_is_shared(
    home: Home, align: int
) -> None:
    """The entry is whole, its padding begins in the same sector and ends in the next, and nobody was told."""
    journal = home.open(**SMALL, commit_align_bytes=align)
    journal.append(b"a")
    journal.append(b"b" * (align - 8 - fmt.FRAME_BYTES))
    left = without_index(killed_at_rest(home, journal))
    end = entry_frames(left.directory())[2]
    sector = end.at + end.bytes - (end.at + end.bytes) % align + align
    write(left.directory(), end.name, sector, bytes(align))
    journal = left.open()
    assert journal.report.outcome is RecoveryRow.UNFINISHED or journal.report.outcome is RecoveryRow.TORN
    assert contents_of(journal) == {1: (b"a", 0)}
    assert journal.written_lsn % align == 0
    before = len(read(left.directory(), end.name))
    assert journal.append(b"c") == 2
    place = entry_frames(left.directory())[2]
    assert place.lsn % align == 0
    assert len(read(left.directory(), end.name)) == before
    again = without_index(killed(left, journal)).open()
    assert contents_of(again) == {1: (b"a", 0), 2: (b"c", 0)}


@pytest.mark.parametrize("align", [512, 4096])
def test_aligned_unproven_segments_are_written_as_a_new_generation(home: Home, align: int) -> None:
    journal = home.open(**SMALL, durability=Durability.OS, commit_align_bytes=align)
    journal.append(b"one")
    journal.sync()
    journal.append(b"two")
    names = [r.name for r in superblock_of(home.directory()).segments]
    left = killed(home, journal)
    journal = left.open()
    assert contents_of(journal) == {1: (b"one", 0), 2: (b"two", 0)}
    segments = superblock_of(left.directory()).segments
    assert segments[0].generation == 1
    assert segments[0].name not in names
    assert names[0] not in left.directory().names()
    journal.append(b"three")
    journal.close()
    assert contents_of(left.open()) == {1: (b"one", 0), 2: (b"two", 0), 3: (b"three", 0)}


def test_garbage_of_our_own_names_is_removed_and_reported(home: Home) -> None:
    journal = filled(home)
    journal.close()
    directory = home.directory()
    old = fmt.segment_name(superblock_of(directory).segments[0].id, 7)
    garbage = [old, fmt.segment_name(4711, 0), fmt.segment_name(3, 1) + ".tmp", "index.tmp"]
    for name in garbage:
        put(directory, name, b"left behind by a crash")
    journal = home.open()
    assert set(journal.report.removed_files) == set(garbage)
    assert not set(garbage) & set(directory.names())
    assert contents_of(journal) == FILLED


def test_an_open_that_is_sealed_breaks_the_seal_before_anything_is_appended(home: Home) -> None:
    journal = filled(home)
    journal.close()
    assert superblock_of(home.directory()).seal is not None
    journal = home.open()
    assert superblock_of(home.directory()).seal is None
    assert killed(home, journal).open().report.outcome is RecoveryRow.CLEAN


def test_an_open_that_fails_lets_go_of_the_index_when_the_filling_of_it_has_ended(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = killed(home, filled(home))
    done: list[str] = []
    fill, close = SlotIndex.fill, SlotIndex.close

    def slow(index: SlotIndex, *slots: Any) -> tuple[int, int, int]:
        time.sleep(0.05)
        summary = fill(index, *slots)
        done.append("filled")
        return summary

    def closed(index: SlotIndex) -> None:
        done.append("closed")
        close(index)

    def failing(*_: Any) -> Any:
        raise OSError(errno.EIO, "planted")

    with monkeypatch.context() as patch:
        patch.setattr(SlotIndex, "fill", slow)
        patch.setattr(SlotIndex, "close", closed)
        patch.setattr(opening, "rewrite_unproven", failing)
        with pytest.raises(OSError, match="planted"):
            left.open()
    assert done == ["filled", "closed"]
    assert contents_of(left.open()) == FILLED


def test_an_index_that_cannot_be_filled_is_an_error_of_the_open_and_the_next_one_finds_all(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = killed(home, filled(home))

    def failing(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "planted", fmt.INDEX_NAME)

    with monkeypatch.context() as patch:
        patch.setattr(SlotIndex, "fill", failing)
        with pytest.raises(OSError, match=f"planted.*{fmt.INDEX_NAME}"):
            left.open()
    assert contents_of(left.open()) == FILLED


def test_closing_changes_only_the_superblock_and_the_index(home: Home) -> None:
    journal = filled(home)
    settle(journal)
    before = bytes_of(home.directory())
    journal.close()
    after = bytes_of(home.directory())
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed <= {fmt.SUPERBLOCK_NAME, fmt.SUPERBLOCK_SPARE_NAME, fmt.INDEX_NAME}


@pytest.mark.parametrize("durability", list(Durability))
@pytest.mark.parametrize("align", [0, 512, 4096])
def test_every_life_may_have_another_durability(home: Home, durability: Durability, align: int) -> None:
    wanted = {}
    for life in range(1, 7):
        options = SMALL | {"commit_align_bytes": align} if life == 1 else {}
        journal = home.open(**options, durability=durability if life % 2 else Durability.SYNC)
        assert contents_of(journal) == wanted
        wanted[journal.append(b"life %d" % life)] = (b"life %d" % life, 0)
        wanted[journal.append(b"x" * 300)] = (b"x" * 300, 0)
        if life % 3 == 0:
            journal.sync()
            home = killed(home, journal)
        else:
            journal.close()
    assert contents_of(home.open()) == wanted
