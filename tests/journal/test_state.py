"""What a journal says of itself: stats, verify, inspect; and what its views hold."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from mmapwal import ClosedError, Durability, Journal, SystemDirectory, inspect
from mmapwal import format as fmt

from .files import (
    SMALL,
    Home,
    bytes_of,
    entry_frames,
    flip,
    frames_of,
    killed,
    put,
    read,
    settle,
    superblock_of,
    write,
)


def filled(home: Home, **options: Any) -> Journal:
    journal = home.open(**(SMALL | options))
    for n in range(1, 11):
        journal.append(b"%d" % n * 700, kind=n)
    return journal


# --- stats --------------------------------------------------------------------------------------------


def test_stats_count_what_was_done_and_what_is_there(home: Home) -> None:
    journal = home.open(**SMALL)
    empty = journal.stats()
    assert (empty.entries, empty.first_op, empty.last_op, empty.snapshot_op) == (0, None, None, 0)
    assert (empty.commits, empty.syncs, empty.appended_entries, empty.appended_bytes) == (0, 0, 0, 0)
    assert (empty.live_bytes, empty.dead_bytes, empty.removals, empty.segments) == (0, 0, 0, 0)
    journal.append(b"x" * 100)
    journal.append_many([b"y" * 10] * 3)
    stats = journal.stats()
    assert (stats.entries, stats.first_op, stats.last_op) == (4, 1, 4)
    assert (stats.commits, stats.syncs, stats.appended_entries) == (2, 2, 4)
    assert stats.appended_bytes == stats.live_bytes == fmt.frame_bytes(100) + 3 * fmt.frame_bytes(10)
    assert (stats.dead_bytes, stats.staged_bytes, stats.segments) == (0, 0, 1)
    journal.drain(2, 2)
    journal.append(b"z" * 10, op=3, replace=True)
    stats = journal.stats()
    assert (stats.entries, stats.removals) == (3, 1)
    assert stats.live_bytes == fmt.frame_bytes(100) + 2 * fmt.frame_bytes(10)
    assert stats.dead_bytes == 2 * fmt.frame_bytes(10)
    assert stats.sequence == superblock_of(home.directory()).sequence
    assert stats.epoch == superblock_of(home.directory()).epoch


def test_stats_do_not_change_when_they_are_frozen(home: Home) -> None:
    journal = filled(home)
    stats = journal.stats()
    with pytest.raises(AttributeError):
        stats.entries = 5  # type: ignore[misc]


def test_file_bytes_is_what_the_files_take(home: Home) -> None:
    journal = filled(home)
    with journal._engine.structure:
        sizes = {n: len(d) for n, d in bytes_of(home.directory()).items()}
        stats, superblock = journal.stats(), superblock_of(home.directory())
    named = sum(size for n, size in sizes.items() if fmt.SEGMENT_NAME.fullmatch(n)) + sizes[fmt.INDEX_NAME]
    assert stats.file_bytes == named
    assert stats.segments == len(superblock.segments)


def test_a_journal_says_where_it_is(home: Home, tmp_path: Path) -> None:
    journal = home.open(**SMALL)
    assert journal.path == (home.path if home.kind == "mapped" else journal.path)
    assert (journal.path is None) == (home.kind == "memory")
    assert len(journal.uuid) == 16
    assert str(journal.directory) in repr(journal)
    assert journal.directory.subdirectory("snapshots") is not None


def test_two_journals_have_different_uuids(tmp_path: Path) -> None:
    with Journal(tmp_path / "a") as a, Journal(tmp_path / "b") as b:
        assert a.uuid != b.uuid


# --- verify and inspect -------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", list(Durability))
def test_verify_checks_all_that_is_durable_and_changes_nothing(home: Home, durability: Durability) -> None:
    journal = filled(home, durability=durability)
    journal.sync()
    settle(journal)
    told: list[tuple[int, int]] = []
    with journal._engine.structure:
        before = bytes_of(home.directory())
        report = journal.verify(lambda done, total: told.append((done, total)))
        frames = frames_of(home.directory())
        assert bytes_of(home.directory()) == before
    assert report.ok
    assert report.problems == ()
    assert report.frames == len(frames)
    assert report.entries == 10
    assert report.scanned_bytes == sum(f.bytes for f in frames)
    assert told == sorted(told)
    assert told[-1][0] <= told[-1][1]


@pytest.mark.parametrize("kind", ["mapped", "memory"], indirect=True)  # plain files are read from an image
@pytest.mark.parametrize("field", ["header", "payload"])
def test_verify_finds_damage_under_an_open_journal(home: Home, field: str) -> None:
    journal = filled(home)
    frame = entry_frames(home.directory())[4]
    flip(home.directory(), frame.name, frame.at if field == "header" else frame.payload_at + 5)
    report = journal.verify()
    assert not report.ok
    assert (report.problems[0].segment, report.problems[0].offset) == (frame.name, frame.at)
    assert report.problems[0].lsn == frame.lsn
    assert frame.name in str(report.problems[0])
    assert journal.append(b"goes on") == 11


@pytest.mark.parametrize("kind", ["mapped", "memory"], indirect=True)
def test_verify_finds_a_slot_that_names_another_frame(home: Home) -> None:
    journal = filled(home)
    lsn = entry_frames(home.directory())[3].lsn
    write(home.directory(), fmt.INDEX_NAME, fmt.PAGE_BYTES + 4 * fmt.SLOT_BYTES, lsn.to_bytes(8, "little"))
    report = journal.verify()
    assert [p.segment for p in report.problems] == [fmt.INDEX_NAME]
    assert report.problems[0].offset == fmt.PAGE_BYTES + 4 * fmt.SLOT_BYTES


@pytest.mark.parametrize("kind", ["mapped", "memory"], indirect=True)
def test_verify_tells_of_the_index_also_when_a_segment_is_added_meanwhile(home: Home) -> None:
    journal = filled(home)
    lsn = entry_frames(home.directory())[3].lsn
    write(home.directory(), fmt.INDEX_NAME, fmt.PAGE_BYTES + 4 * fmt.SLOT_BYTES, lsn.to_bytes(8, "little"))
    engine = journal._engine
    engine.prepare_segment()

    def adds_a_larger_one(done: int, total: int) -> None:
        before = engine.superblock.segments
        engine.prepare_segment(before[-1].capacity + 1)  # in the place of the one that has nothing yet
        assert engine.superblock.segments[:1] == before[:1] != engine.superblock.segments

    assert [p.segment for p in journal.verify(adds_a_larger_one).problems] == [fmt.INDEX_NAME]


def test_verify_tells_nothing_of_the_index_when_entries_are_removed_meanwhile(home: Home) -> None:
    journal = filled(home)
    assert journal.verify(lambda done, total: journal.truncate_from(8)).problems == ()


@pytest.mark.parametrize("kind", ["mapped", "file"], indirect=True)
def test_a_verify_beside_a_close_says_so_and_tells_of_no_damage(home: Home) -> None:
    journal = filled(home)
    settle(journal)
    assert len(journal._engine.segments.table.segments) == 2
    with pytest.raises(ClosedError):
        journal.verify(lambda done, total: journal.close())


@pytest.mark.parametrize("how", ["live", "closed", "killed"])
def test_inspect_reads_a_journal_without_its_lock_and_changes_nothing(home: Home, how: str) -> None:
    journal = filled(home)
    if how == "closed":
        journal.close()
    elif how == "killed":
        home = killed(home, journal)
    with journal._engine.structure:  # no segment gets its name; one may still be in the making

        def present() -> dict[str, bytes]:
            return {name: data for name, data in bytes_of(home.directory()).items() if name[-4:] != ".tmp"}

        before = present()
        report = inspect(home.directory())
        assert report.ok, report.problems
        assert report.entries == 10
        if home.kind == "mapped":
            assert inspect(home.path) == report
            assert inspect(str(home.path)) == report
        assert present() == before


def test_inspect_of_nothing_says_so(home: Home, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        inspect(home.directory())
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_inspect_tells_all_that_is_wrong_with_a_journal_that_refuses_to_open(home: Home) -> None:
    journal = home.open(slots=64, segment_bytes=16384)
    for n in range(1, 31):
        journal.append(b"%02d" % n * 1000)
    left = killed(home, journal)
    directory = left.directory()
    one, two, *_ = [r for r in superblock_of(directory).segments if r.end_lsn]
    frames = entry_frames(directory)
    first = next(f for f in frames.values() if f.name == one.name)
    second = next(f for f in frames.values() if f.name == two.name)
    for frame in (first, second):
        flip(directory, frame.name, frame.payload_at)
    report = inspect(directory)
    assert {(p.segment, p.lsn) for p in report.problems} == {(f.name, f.lsn) for f in (first, second)}


def test_inspect_tells_of_an_index_that_a_sealed_journal_should_not_have(home: Home) -> None:
    filled(home).close()
    assert inspect(home.directory()).ok
    # Its checksum is wrong, so nobody will believe it: no problem, but a scan at the next open.
    flip(home.directory(), fmt.INDEX_NAME, fmt.PAGE_BYTES + 100)
    assert inspect(home.directory()).ok
    put(home.directory(), fmt.SUPERBLOCK_NAME, read(home.directory(), fmt.SUPERBLOCK_NAME)[:50])
    assert [p.segment for p in inspect(home.directory()).problems] == [fmt.SUPERBLOCK_NAME]


# --- views --------------------------------------------------------------------------------------------


def test_views_outlive_the_journal(home: Home) -> None:
    given: dict[str, Any] = {"storage": home.directory()} if home.kind != "mapped" else {}
    journal = Journal(home.path, **SMALL, **given)
    for n in range(1, 11):
        journal.append(b"%d" % n * 700)
    views = [
        journal.read(3),
        journal[4].payload,
        *journal.payloads(5, 7),
        *(e.payload for e in journal.drain(1, 2)),
    ]
    journal.close()
    del journal
    gc.collect()
    for name in home.directory().names():
        home.directory().unlink(name)
    assert [bytes(v) for v in views] == [b"%d" % n * 700 for n in (3, 4, 5, 6, 7, 1, 2)]


def mapped_segments() -> int:
    return Path("/proc/self/maps").read_text().count("segment-")


def test_a_mapping_goes_with_its_last_view_and_not_before(tmp_path: Path) -> None:
    gc.collect()
    before = mapped_segments()
    journal = Journal(tmp_path / "j", **SMALL)
    for n in range(1, 15):
        journal.append(b"%d" % n * 800)
    names = [r.name for r in superblock_of(SystemDirectory(tmp_path / "j")).segments]
    view = journal.read(1)
    one = mapped_segments()
    assert one > before
    journal.set_snapshot_op(14)
    journal.compact(wait=True)
    assert not (tmp_path / "j" / names[0]).exists()
    assert names[0] in Path("/proc/self/maps").read_text()
    assert bytes(view) == b"1" * 800
    assert journal.stats().held_bytes == SMALL["segment_bytes"]
    del view
    gc.collect()
    assert names[0] not in Path("/proc/self/maps").read_text()
    assert journal.stats().held_bytes == 0
    journal.close()
    del journal
    gc.collect()
    assert mapped_segments() == before


def test_appending_into_a_mapped_segment_leaves_its_views_as_they_are(home: Home) -> None:
    journal = home.open(**SMALL)
    views = []
    for n in range(1, 16):
        journal.append(b"%d" % n * 20)
        views.append(journal.read(n))
        assert [bytes(v) for v in views] == [b"%d" % m * 20 for m in range(1, n + 1)]
