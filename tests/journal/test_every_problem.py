"""verify and inspect tell of each damaged place, not only of the first."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from mmapwal import Journal, VerifyReport, inspect
from mmapwal import format as fmt

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
