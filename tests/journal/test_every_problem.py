"""verify and inspect tell of each damaged place, not only of the first."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmapwal import Journal, SystemDirectory, VerifyReport, inspect
from mmapwal import format as fmt
from mmapwal.testing import Call, InterposedDirectory

from .files import Frame, Home, entry_frames, flip, frames_of, superblock_of, write

SIZES: dict[str, Any] = {"slots": 512, "segment_bytes": 16384}
IN_PLACE = pytest.mark.parametrize("kind", ["mapped", "memory"], indirect=True)  # what is open sees it

Damage = Callable[[Any, Frame], None]
DAMAGES: dict[str, Damage] = {
    "header": lambda d, f: flip(d, f.name, f.at + 20),
    "payload": lambda d, f: flip(d, f.name, f.payload_at + f.length // 2),
    "zeros": lambda d, f: write(d, f.name, f.at, bytes(f.bytes)),
}


def filled(home: Home, count: int = 150) -> Journal:
    journal = home.open(**SIZES)
    for n in range(1, count + 1):
        journal.append(b"%05d" % n * (n % 90 + 1))
    return journal


def places(report: VerifyReport) -> list[tuple[str, int, int]]:
    return [(p.segment, p.offset, p.length) for p in report.problems]


@IN_PLACE
@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damaged_entry_is_told_with_its_place_and_its_length_and_no_other(
    home: Home, damage: str
) -> None:
    journal = filled(home)
    frames = entry_frames(home.directory())
    wrong = [frames[op] for op in (1, 5, 40, 41, 90, 149)]
    for frame in wrong:
        DAMAGES[damage](home.directory(), frame)
    expected = [
        (wrong[0].name, wrong[0].at, wrong[0].bytes), (wrong[1].name, wrong[1].at, wrong[1].bytes),
        *((f.name, f.at, f.bytes) for f in wrong[2:]),
    ]  # fmt: skip
    if damage != "payload":  # two that are neighbours are one place: nothing says where the second begins
        expected[2:4] = [(wrong[2].name, wrong[2].at, wrong[2].bytes + wrong[3].bytes)]
    assert places(journal.verify()) == expected
    if damage == "payload":
        assert [p.op for p in journal.verify().problems] == [1, 5, 40, 41, 90, 149]


@pytest.mark.parametrize("seed", range(20))
def test_a_closed_journal_tells_of_all_that_is_damaged_at_random(home: Home, seed: int) -> None:
    chance = random.Random(seed)
    filled(home).close()
    directory = home.directory()
    if seed % 2:
        directory.unlink(fmt.INDEX_NAME)
    frames = frames_of(directory)
    wrong = sorted(chance.sample(range(len(frames)), chance.randrange(1, 12)))
    for number in wrong:
        frame = frames[number]
        kind = chance.choice(list(DAMAGES)) if frame.length else "header"
        DAMAGES[kind](directory, frame)
    told = inspect(directory)
    covered = [(p.segment, p.offset, p.offset + p.length) for p in told.problems]
    for number, frame in enumerate(frames):
        is_told = any(
            n == frame.name and a <= frame.at and frame.at + frame.bytes <= b for n, a, b in covered
        )
        assert is_told == (number in wrong), frame
    touched = {frames[number].name for number in wrong}
    assert {p.segment for p in told.problems} == touched
    assert told.frames < len(frames)


def test_missing_and_cut_segments_are_told_beside_damaged_entries_in_others(home: Home) -> None:
    filled(home).close()
    directory = home.directory()
    frames = frames_of(directory)
    names = [r.name for r in superblock_of(directory).segments]
    directory.unlink(names[0])
    first = next(f for f in frames if f.name == names[1])
    flip(directory, first.name, first.at)
    last = [f for f in frames if f.name == names[2]][-2]
    flip(directory, last.name, last.at)
    told = inspect(directory).problems
    assert [(p.segment, p.offset) for p in told] == [
        (names[0], 0), (names[1], first.at), (names[2], last.at)
    ]  # fmt: skip


# --- what the next open will find, told while the journal is open -------------------------------------


@IN_PLACE
@pytest.mark.parametrize("number", [0, 2, -1])
def test_an_open_journal_tells_of_a_segment_whose_header_is_damaged_on_the_disk(
    home: Home, number: int
) -> None:
    journal = filled(home)
    name = superblock_of(home.directory()).segments[number].name
    flip(home.directory(), name, 20)
    told = journal.verify()
    assert [(p.segment, p.offset, p.reason) for p in told.problems] == [
        (name, 0, "the checksum of the header is wrong")
    ]
    assert told.frames == sum(f.name != name for f in frames_of(home.directory()))


@pytest.mark.parametrize("kind", ["mapped", "file"], indirect=True)
def test_an_open_journal_tells_of_a_segment_that_is_missing(home: Home) -> None:
    journal = filled(home)
    name = superblock_of(home.directory()).segments[1].name
    home.directory().unlink(name)
    assert [(p.segment, p.reason) for p in journal.verify().problems] == [
        (name, "the superblock names it, but it is not there")
    ]


@pytest.mark.parametrize("is_there", [True, False])
def test_an_open_journal_tells_of_a_superblock_that_the_next_open_will_not_read(
    home: Home, is_there: bool
) -> None:
    journal = filled(home)
    assert journal.verify().ok
    if is_there:
        flip(home.directory(), fmt.SUPERBLOCK_NAME, 30)
    else:
        home.directory().unlink(fmt.SUPERBLOCK_NAME)
    told = journal.verify()
    assert [p.segment for p in told.problems] == [fmt.SUPERBLOCK_NAME]
    assert told.entries == 150


def test_an_open_journal_tells_of_a_superblock_that_is_older_than_it(home: Home) -> None:
    journal = filled(home)
    file = home.directory().open(fmt.SUPERBLOCK_NAME)
    old = bytes(file.read_at(0, len(file)))
    file.close()
    journal.set_snapshot_op(3)
    write(home.directory(), fmt.SUPERBLOCK_NAME, 0, old)
    assert [(p.segment, p.reason) for p in journal.verify().problems] == [
        (fmt.SUPERBLOCK_NAME, "it is not the one that this journal wrote last")
    ]


# --- a disk that fails to read --------------------------------------------------------------------------


class Unreadable(InterposedDirectory):
    """One segment cannot be read: not at all, or what is behind its first pages is gone once it is mapped."""

    path: Path
    segment = ""
    pages: int | None = None

    def intercept(self, call: Call) -> Any:
        if call.name != self.segment or call.kind not in {"read", "view"}:
            return call.run()
        if self.pages is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), call.name)
        result = call.run()
        if call.kind == "view":
            os.truncate(self.path / call.name, self.pages * fmt.PAGE_BYTES)
        return result


@pytest.mark.parametrize("pages", [None, 1, 2, 3])
@pytest.mark.parametrize("is_open", [True, False])
def test_of_a_segment_that_the_disk_fails_to_read_the_page_is_told_and_the_others_are_checked(
    tmp_path: Path, pages: int | None, is_open: bool
) -> None:
    path = tmp_path / "j"
    disk = Unreadable(SystemDirectory(path))
    with Journal(path, **SIZES, storage=disk) as journal:
        for n in range(1, 151):
            journal.append(b"%05d" % n * (n % 90 + 1))
        directory = SystemDirectory(path)
        wrong = entry_frames(directory)[149]
        disk.path, disk.segment, disk.pages = path, superblock_of(directory).segments[1].name, pages
        flip(directory, wrong.name, wrong.payload_at)
        told = journal.verify() if is_open else inspect(disk)
        assert [(p.segment, p.offset) for p in told.problems] == [
            (disk.segment, (pages or 0) * fmt.PAGE_BYTES), (wrong.name, wrong.at)
        ]  # fmt: skip
        assert "fails to read" in told.problems[0].reason
