"""repair: what verifies stays, what does not is left out and nothing else; the damaged files stay beside."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmapwal import (
    CorruptionError,
    Durability,
    Journal,
    JournalError,
    LockedError,
    MissingOpError,
    RepairReport,
    inspect,
    repair,
)
from mmapwal import format as fmt
from mmapwal.storage import Directory, MemoryDirectory
from mmapwal.testing import (
    CrashDisk,
    FaultDirectory,
    When,
    assert_crash_safe,
    every_fault,
)

from .files import (
    Frame,
    Home,
    bytes_of,
    change_frame,
    cut,
    entry_frames,
    flip,
    frames_of,
    put,
    read,
    settle,
    superblock_of,
    write,
)

SIZES: dict[str, Any] = {"slots": 1024, "segment_bytes": 16384}


def use(journal: Journal, chance: random.Random, count: int) -> None:
    """Whatever one does with a journal."""
    for _ in range(count):
        last = journal.last_op or 0
        what = chance.randrange(12)
        if what < 7:
            journal.append(chance.randbytes(chance.randrange(700)))
        elif what < 9:
            journal.append_many(
                [chance.randbytes(chance.randrange(400)) for _ in range(chance.randrange(1, 9))]
            )
        elif what == 9 and last > journal.snapshot_op + 20:
            first = chance.randrange(journal.snapshot_op + 1, last)
            journal.drain(first, first + 3)
        elif what == 10 and last > journal.snapshot_op:
            journal.truncate_from(max(journal.snapshot_op + 1, last - chance.randrange(4)))
        elif what == 11 and chance.random() < 0.3:
            journal.set_snapshot_op(max(journal.snapshot_op, last - 200))
            journal.compact(wait=True)


def live(journal: Journal) -> dict[int, bytes]:
    return {e.op: bytes(e.payload) for e in journal}


def opened(place: Home | CrashDisk) -> dict[int, bytes]:
    """As whoever needs it finds it: it opens, is sound, takes appends, and opens again."""

    def directory() -> Directory:
        return place if isinstance(place, CrashDisk) else place.directory()

    with Journal("j", storage=directory()) as journal:
        found = live(journal)
        assert journal.verify().ok
        op = journal.append(b"goes on")
    with Journal("j", storage=directory()) as journal:
        assert live(journal) == found | {op: b"goes on"}
        journal.truncate_from(op)
    assert inspect(directory()).ok
    return found


def hit(directory: Directory, frame: Frame, chance: random.Random) -> None:
    kind = chance.randrange(3) if frame.length and frame.op else 0  # what a GAP skips is a hole
    if kind == 0:
        flip(directory, frame.name, frame.at + chance.randrange(fmt.FRAME_BYTES))
    elif kind == 1:
        flip(directory, frame.name, frame.payload_at + chance.randrange(frame.length))
    else:
        write(directory, frame.name, frame.at, bytes(frame.bytes))


# --- what is dropped, and what stays ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25))
def test_after_random_damage_all_that_was_not_hit_is_there_and_the_rest_is_named(
    home: Home, seed: int, tally: Callable[[str, int], None]
) -> None:
    chance = random.Random(seed)
    with home.open(**SIZES) as journal:
        use(journal, chance, 300)
        before = live(journal)
    directory = home.directory()
    if seed % 3 == 0:
        directory.unlink(fmt.INDEX_NAME)
    frames = frames_of(directory)
    newest = entry_frames(directory)
    wrong = [frames[n] for n in sorted(chance.sample(range(len(frames)), chance.randrange(1, 15)))]
    for frame in wrong:
        hit(directory, frame, chance)
    if seed % 4 == 1:  # a file is gone, or cut
        name = chance.choice([r.name for r in superblock_of(directory).segments])
        there = [f for f in frames if f.name == name]
        if chance.random() < 0.5 or not there:
            directory.unlink(name)
            wrong += there
        else:
            at = chance.choice(there).at
            cut(directory, name, at)
            wrong += [f for f in there if f.at + f.bytes > at]
    hit_places = {(f.name, f.at) for f in wrong}
    files = bytes_of(directory)
    told = repair(home.directory(), dry_run=True)
    assert bytes_of(directory) == files, "a dry run changes nothing"
    report = repair(home.directory())
    assert (report.problems, report.dropped) == (told.problems, told.dropped)
    assert report.changed
    covered = [(d.segment, d.offset, d.offset + d.length) for d in report.dropped]
    for frame in frames:
        is_dropped = any(n == frame.name and a <= frame.at < b for n, a, b in covered)
        assert is_dropped == ((frame.name, frame.at) in hit_places), frame
    for aside in report.broken:
        assert files[aside.partition(".broken")[0]] == read(directory, aside)
    after = opened(home)
    lost = {op for op in before if (newest[op].name, newest[op].at) in hit_places}
    assert {op: p for op, p in after.items() if op not in lost} == {
        op: p for op, p in before.items() if op not in lost
    }
    assert not set(after) - set(before)
    for op in {d.op for d in report.dropped if d.op} & lost:
        assert op not in after, "an older entry came back"
    tally("journals damaged at random and repaired")


def test_a_damaged_entry_does_not_fall_back_to_the_one_that_it_replaced(home: Home) -> None:
    with home.open(**SIZES) as journal:
        journal.append_many([b"old %d" % n for n in range(1, 10)])
        journal.append(b"new 5", op=5, replace=True)
        journal.append(b"more")
    directory = home.directory()
    frame = entry_frames(directory)[5]
    flip(directory, frame.name, frame.payload_at)
    (dropped,) = repair(home.directory()).dropped
    assert (dropped.op, dropped.segment, dropped.offset, dropped.length) == (
        5,
        frame.name,
        frame.at,
        frame.bytes,
    )
    with Journal(home.path, storage=home.directory()) as journal:
        with pytest.raises(MissingOpError):
            journal.read(5)
        assert journal.append(b"five again", op=5) == 5
        assert bytes(journal.read(5)) == b"five again"


def test_of_two_good_frames_that_do_not_follow_each_other_the_first_is_left_out(home: Home) -> None:
    """A lost write: the block shows an older valid state."""
    with home.open(**SIZES) as journal:
        journal.append_many([b"a" * 90, b"b" * 90, b"c" * 90])
        directory = home.directory()
        frame = entry_frames(directory)[2]
        old = read(directory, frame.name)[frame.at : frame.at + frame.bytes]
        journal.truncate_from(2)
    with Journal(home.path, storage=home.directory()) as journal:
        journal.append_many([b"x" * 90, b"y" * 90, b"z" * 90])
    directory = home.directory()
    frames = entry_frames(directory)
    # The same place cannot be had again, so a frame is made that is right by itself.
    victim = frames[3]
    assert old
    data = bytearray(read(directory, victim.name))
    header = bytearray(data[victim.at : victim.at + fmt.FRAME_BYTES])
    header[24:32] = (1234).to_bytes(8, "little")  # another timestamp
    salt = fmt.segment_salt(superblock_of(directory).uuid, 1)
    header[:4] = fmt.crc32c(bytes(header[4:]), salt).to_bytes(4, "little")
    write(directory, victim.name, victim.at, bytes(header))
    (dropped,) = repair(home.directory()).dropped
    assert (dropped.offset, dropped.length) == (victim.at, victim.bytes)
    assert opened(home) == {1: b"a" * 90, 2: b"x" * 90, 4: b"z" * 90}


@pytest.mark.parametrize("what", ["missing", "header", "cut", "empty"])
def test_a_segment_file_that_is_gone_or_broken_loses_what_was_in_it_alone(home: Home, what: str) -> None:
    with home.open(**SIZES) as journal:
        for n in range(1, 101):
            journal.append(b"%d" % n * 200)
        before = live(journal)
    directory = home.directory()
    name = superblock_of(directory).segments[1].name
    inside = [f for f in entry_frames(directory).values() if f.name == name]
    if what == "missing":
        directory.unlink(name)
    elif what == "header":
        flip(directory, name, 20)
    elif what == "cut":
        cut(directory, name, inside[3].at + 10)
    else:
        put(directory, name, b"")
    lost = {"header": [], "cut": inside[3:]}.get(what, inside)
    report = repair(home.directory())
    assert (report.broken == ()) == (what == "missing")
    ops = {f.op for f in lost}
    assert opened(home) == {op: p for op, p in before.items() if op not in ops}


@pytest.mark.parametrize("row", range(3))
def test_a_segment_file_that_is_gone_loses_what_was_in_it_alone_whatever_epochs_are_around(
    home: Home, row: int
) -> None:
    """What stands for it must not be older than what is before it, nor of the epoch before where a new one
    began within."""
    before: dict[int, bytes] = {}
    for _ in range(4):
        with home.open(**SIZES) as journal:
            journal.append_many([b"%d" % n * 200 for n in range(20)])
            before = live(journal)
    directory = home.directory()
    name = superblock_of(directory).segments[row].name
    lost = {f.op for f in entry_frames(directory).values() if f.name == name}
    directory.unlink(name)
    repair(home.directory())
    assert opened(home) == {op: payload for op, payload in before.items() if op not in lost}


@pytest.mark.parametrize("kind", ["mapped"], indirect=True)
@pytest.mark.parametrize("what", ["missing", "header"])
def test_a_segment_of_which_nothing_was_used_yet_is_made_anew_and_nothing_is_lost(
    home: Home, what: str
) -> None:
    with home.open(**SIZES) as journal:
        for n in range(1, 101):
            journal.append(b"%d" % n * 200)
        settle(journal)
        before = live(journal)
    directory = home.directory()
    name = superblock_of(directory).segments[-1].name
    assert all(f.name != name for f in frames_of(directory))
    if what == "missing":
        directory.unlink(name)
    else:
        flip(directory, name, 20)
    report = repair(home.directory())
    assert (report.changed, report.dropped) == (True, ())
    assert opened(home) == before


@pytest.mark.parametrize("kind", ["mapped", "memory"], indirect=True)
def test_what_was_written_behind_a_damaged_end_and_never_synced_stays_as_well(home: Home) -> None:
    with home.open(durability=Durability.OS, **SIZES) as journal:
        journal.append_many([b"a" * 90, b"b" * 90, b"c" * 90])
        journal.sync()
        journal.append(b"d" * 90)
        killed_home = home.after_kill()
    frame = entry_frames(killed_home.directory())[3]
    flip(killed_home.directory(), frame.name, frame.payload_at)
    (dropped,) = repair(killed_home.directory()).dropped
    assert (dropped.op, dropped.length) == (3, frame.bytes)
    assert opened(killed_home) == {1: b"a" * 90, 2: b"b" * 90, 4: b"d" * 90}


# --- when it has nothing to do, or cannot -------------------------------------------------------------


def test_a_sound_journal_is_left_as_it_is(home: Home) -> None:
    with home.open(**SIZES) as journal:
        use(journal, random.Random(1), 100)
    before = bytes_of(home.directory())
    assert repair(home.directory()) == RepairReport((), (), (), changed=False)
    assert bytes_of(home.directory()) == before


def test_a_torn_tail_is_no_damage(home: Home) -> None:
    with home.open(**SIZES) as journal:
        journal.append_many([b"a", b"b"])
        copy = home.after_kill()
    directory = copy.directory()
    if fmt.INDEX_NAME in directory.names():
        directory.unlink(fmt.INDEX_NAME)
    frame = entry_frames(directory)[2]
    flip(directory, frame.name, frame.at)
    assert not repair(copy.directory()).changed


@pytest.mark.parametrize("what", ["damaged", "gone"])
def test_without_a_superblock_there_is_nothing_to_go_by(home: Home, what: str) -> None:
    with home.open(**SIZES) as journal:
        journal.append(b"x")
    directory = home.directory()
    if what == "gone":
        directory.unlink(fmt.SUPERBLOCK_NAME)
    else:
        flip(directory, fmt.SUPERBLOCK_NAME, 50)
    before = bytes_of(directory)
    with pytest.raises(CorruptionError, match=r"superblock"):
        repair(home.directory())
    assert bytes_of(home.directory()) == before


@pytest.mark.parametrize("kind", ["mapped"], indirect=True)
def test_a_journal_that_is_open_is_not_repaired(home: Home, tmp_path: Path) -> None:
    with home.open(**SIZES) as journal:
        journal.append(b"x")
        for dry_run in (True, False):
            with pytest.raises(LockedError):
                repair(home.path, dry_run=dry_run)
    with pytest.raises(FileNotFoundError):
        repair(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        repair(tmp_path / "empty")
    assert os.listdir(tmp_path / "empty") == []  # noqa: PTH208


@pytest.mark.parametrize("kind", ["mapped", "memory"], indirect=True)
def test_a_journal_that_would_not_open_afterwards_is_left_as_it_is(home: Home) -> None:
    """Behind the damage two live entries want one slot, which nobody sees before that is left out."""
    with home.open(slots=16, segment_bytes=16384) as journal:
        for n in range(10):
            journal.append(b"%d" % n)
    directory = home.directory()
    frames = entry_frames(directory)
    change_frame(directory, frames[10], op=17)
    flip(directory, frames[5].name, frames[5].payload_at)
    before = bytes_of(directory)
    with pytest.raises(CorruptionError, match="slot"):
        repair(home.directory())
    assert bytes_of(home.directory()) == before


@pytest.mark.parametrize("kind", ["mapped", "memory"], indirect=True)
def test_an_index_that_is_wrong_is_made_again_and_nothing_is_dropped(home: Home) -> None:
    with home.open(**SIZES) as journal:
        journal.append_many([b"a", b"b", b"c"])
        lsn = entry_frames(home.directory())[1].lsn
        at = fmt.PAGE_BYTES + 3 * fmt.SLOT_BYTES
        write(home.directory(), fmt.INDEX_NAME, at, lsn.to_bytes(8, "little"))
    directory = home.directory()  # sealed with it
    assert not inspect(directory).ok
    report = repair(home.directory())
    assert (report.changed, report.dropped, report.broken) == (True, (), ())
    assert opened(home) == {1: b"a", 2: b"b", 3: b"c"}


def test_a_second_repair_keeps_the_files_of_the_first(home: Home) -> None:
    with home.open(**SIZES) as journal:
        journal.append_many([b"%d" % n * 9 for n in range(1, 30)])
    kept = []
    for op in (3, 20):
        directory = home.directory()
        frame = entry_frames(directory)[op]
        flip(directory, frame.name, frame.at)
        kept += repair(home.directory()).broken
    assert kept == ["segment-0000000000000001-00000000.broken", "segment-0000000000000001-00000001.broken"]
    directory = home.directory()
    assert set(kept) <= set(directory.names())
    assert set(opened(home)) == set(range(1, 30)) - {3, 20}
    assert set(kept) <= set(home.directory().names())


def test_files_kept_before_under_the_same_name_stay_as_they_are(home: Home) -> None:
    """As when the power went behind the copy of an earlier try."""
    with home.open(**SIZES) as journal:
        journal.append_many([b"%d" % n * 9 for n in range(1, 30)])
    directory = home.directory()
    frame = entry_frames(directory)[3]
    flip(directory, frame.name, frame.at)
    kept = {f"{frame.name}.broken": b"of the first try", f"{frame.name}.broken-2": b"of the second"}
    for name, data in kept.items():
        put(directory, name, data)
    damaged_file = read(directory, frame.name)
    assert repair(home.directory()).broken == (f"{frame.name}.broken-3",)
    directory = home.directory()
    assert {name: read(directory, name) for name in kept} == kept
    assert read(directory, f"{frame.name}.broken-3") == damaged_file


# --- when the power goes, and calls fail --------------------------------------------------------------


def damaged(directory: Directory) -> dict[int, bytes]:
    """Makes a journal with damage in two segments; what has to be there when it is repaired."""
    with Journal("j", storage=directory, clock=lambda: 1, **SIZES) as journal:
        for n in range(1, 61):
            journal.append(b"%d" % n * 200)
        before = live(journal)
    for op in (5, 6, 40):
        frame = entry_frames(directory)[op]
        file = directory.open(frame.name, writable=True)
        file.write_sync_at(frame.payload_at, b"?")
        file.close()
    return {op: payload for op, payload in before.items() if op not in {5, 6, 40}}


def test_a_power_cut_at_any_step_leaves_the_damaged_journal_or_the_repaired_one() -> None:
    expected: dict[int, bytes] = {}
    files: dict[str, bytes] = {}

    def scenario(disk: CrashDisk, acknowledge: Callable[..., None]) -> None:
        expected.update(damaged(disk))
        files.update(bytes_of(disk))
        acknowledge("damaged")
        repair(disk)
        acknowledge("repaired")

    def check(disk: CrashDisk, acknowledged: list[str]) -> None:
        if not acknowledged:
            return
        if "repaired" in acknowledged:
            asides = [n for n in disk.names() if n.endswith(".broken")]
            assert len(asides) == 2
            for aside in asides:
                assert read(disk, aside) == files[aside.partition(".broken")[0]]
        else:
            repair(disk)
        assert opened(disk) == expected

    assert_crash_safe(scenario, check, max_states=600)


def test_what_was_repaired_survives_also_where_it_was_only_just_copied_to() -> None:
    """The name of its directory may not be durable there."""
    source = MemoryDirectory()
    expected = damaged(source)

    def scenario(disk: CrashDisk, acknowledge: Callable[..., None]) -> None:
        for name, data in bytes_of(source).items():
            disk.create(name).write_sync_at(0, data)
        disk.sync()
        repair(disk)
        acknowledge("repaired")

    def check(disk: CrashDisk, acknowledged: list[str]) -> None:
        if acknowledged:
            assert opened(disk) == expected

    assert_crash_safe(scenario, check, max_states=200)


@pytest.mark.parametrize("when", [When.BEFORE, When.AFTER, When.SHORT])
@pytest.mark.parametrize("kind", ["memory"], indirect=True)
def test_whatever_call_fails_a_second_try_repairs_it(home: Home, make_home: Any, when: When) -> None:
    for fault in every_fault(error=errno.ENOSPC, when=when):
        place = make_home(f"j {fault.nth}")
        expected = damaged(place.directory())
        before = bytes_of(place.directory())
        try:
            repair(FaultDirectory(place.directory(), fault))
        except (OSError, JournalError) as e:
            if isinstance(e, OSError):
                after = bytes_of(place.directory())
                assert {n: d for n, d in after.items() if n != fmt.SUPERBLOCK_SPARE_NAME} == {
                    n: d for n, d in before.items() if n != fmt.SUPERBLOCK_SPARE_NAME
                }, "nothing has changed"
            cause = e if isinstance(e, OSError) else e.__cause__
            assert isinstance(cause, OSError)
            assert cause.errno == errno.ENOSPC
        place.directory().close()
        repair(place.directory())
        assert opened(place) == expected
