"""repair: what a damaged entry had replaced does not come back, however much is damaged; what lives stays."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from mmapwal import Durability, Journal, inspect, repair
from mmapwal import format as fmt
from mmapwal._native import lib
from mmapwal.storage import Directory
from mmapwal.superblock import SuperblockFile

from .files import Frame, Home, bytes_of, entry_frames, flip, frames_of, put, read, superblock_of

SIZES: dict[str, Any] = {"slots": 1024, "segment_bytes": 16384, "durability": Durability.OS}
OLDER = "an older entry of an op that is left out"


def live(journal: Journal) -> dict[int, bytes]:
    return {e.op: bytes(e.payload) for e in journal}


def rot(directory: Directory, frames: Iterable[Frame]) -> None:
    for frame in frames:
        flip(directory, frame.name, frame.payload_at)


def repaired(home: Home) -> dict[int, bytes]:
    """What is there afterwards: it opens, is sound, and a compaction and another open change nothing."""
    with Journal(home.path, storage=home.directory()) as journal:
        found = live(journal)
        assert journal.verify().ok
        journal.compact(wait=True)
        assert live(journal) == found
    assert inspect(home.directory()).ok
    with Journal(home.path, storage=home.directory()) as journal:
        assert live(journal) == found
    return found


def replaced(home: Home, count: int, versions: int = 2) -> dict[int, bytes]:
    """A journal in which each op was replaced, and one more that was not. What lives."""
    with home.open(**SIZES) as journal:
        for version in range(versions):
            for op in range(1, count + 1):
                journal.append(b"op %d version %d" % (op, version), op=op, replace=version > 0)
        journal.append(b"the last")
        return live(journal)


@pytest.mark.parametrize("apart", [1, 2], ids=["neighbours", "apart"])
def test_of_any_number_of_damaged_entries_none_falls_back_to_what_it_had_replaced(
    home: Home, apart: int
) -> None:
    before = replaced(home, 300, versions=3)
    damaged = range(1, 301, apart)
    newest = entry_frames(home.directory())
    rot(home.directory(), (newest[op] for op in damaged))
    told = repair(home.directory(), dry_run=True)
    report = repair(home.directory())
    assert report.dropped == told.dropped
    assert repaired(home) == {op: payload for op, payload in before.items() if op not in damaged}


def test_neighbours_take_one_removal_and_no_other_segment_is_made_anew(home: Home) -> None:
    replaced(home, 300)
    newest = entry_frames(home.directory())
    rot(home.directory(), (newest[op] for op in range(1, 301)))
    report = repair(home.directory())
    assert all(d.reason != OLDER for d in report.dropped)
    superblock = superblock_of(home.directory())
    assert [(r.first, r.last) for r in superblock.removals] == [(1, 300)]
    renewed = {fmt.segment_name(r.id, 0) for r in superblock.segments if r.generation}
    assert renewed == {newest[op].name for op in range(1, 301)}


def test_a_removal_for_damaged_entries_hides_nothing_that_lives(home: Home) -> None:
    """Between the damaged ones lie ops of which only old entries are, and some that were replaced again."""
    with home.open(**SIZES) as journal:
        for op in range(1, 10):
            journal.append(b"old %d" % op)
        for op in (2, 3, 5, 6, 7):
            journal.append(b"new %d" % op, op=op, replace=True)
        newest = entry_frames(home.directory())
        journal.append(b"newer 6", op=6, replace=True)
        before = live(journal)
    rot(home.directory(), (newest[op] for op in (2, 3, 5, 6, 7)))
    repair(home.directory())
    assert [(r.first, r.last) for r in superblock_of(home.directory()).removals] == [(2, 3), (5, 5), (7, 7)]
    assert repaired(home) == {op: payload for op, payload in before.items() if op not in {2, 3, 5, 7}}


@pytest.mark.parametrize("drains", [0, 10, 64])
def test_where_removals_are_too_few_older_entries_are_left_out_and_told_and_their_files_kept(
    home: Home, drains: int
) -> None:
    replaced(home, 200)
    with Journal(home.path, storage=home.directory()) as journal:
        for n in range(drains):
            journal.drain(3 + 3 * n, 3 + 3 * n)
        journal.sync()
        before = live(journal)
    directory = home.directory()
    versions: dict[int, list[Frame]] = {}
    for frame in frames_of(directory):
        if frame.type == lib.MW_ENTRY:
            versions.setdefault(frame.op, []).append(frame)
    damaged = [op for op in range(1, 201) if op % 3 == 1]
    rot(directory, (versions[op][-1] for op in damaged))
    files = bytes_of(directory)
    told = repair(home.directory(), dry_run=True)
    assert bytes_of(home.directory()) == files
    report = repair(home.directory())
    assert (report.problems, report.dropped) == (told.problems, told.dropped)
    out = [d for d in report.dropped if d.reason == OLDER]
    assert len(out) == len(damaged) - (64 - drains)
    for d in out:
        older = versions[d.op or 0][0]
        assert (d.segment, d.offset, d.length) == (older.name, older.at, older.bytes)
    kept = {name.partition(".broken")[0] for name in report.broken}
    assert kept == {d.segment for d in report.dropped}
    for aside in report.broken:
        assert read(home.directory(), aside) == files[aside.partition(".broken")[0]]
    assert len(superblock_of(home.directory()).removals) == 64
    assert repaired(home) == {op: payload for op, payload in before.items() if op not in damaged}


def test_the_removals_go_to_the_ops_that_were_replaced_most(home: Home) -> None:
    """So that one that is replaced all the time does not have every segment made anew."""
    with home.open(**SIZES) as journal:
        for n in range(1, 401):
            journal.append(b"%d" % n * 20, op=n)
            if n > 1:
                journal.append(b"often %d" % n, op=401, replace=n > 2)
        for op in range(1, 400, 2):
            journal.append(b"once", op=op, replace=True)
        before = live(journal)
    newest = entry_frames(home.directory())
    damaged = [*range(1, 400, 2), 401]
    rot(home.directory(), (newest[op] for op in damaged))
    report = repair(home.directory())
    assert any(d.reason == OLDER for d in report.dropped)
    assert all(d.op != 401 or d.reason != OLDER for d in report.dropped)
    assert repaired(home) == {op: payload for op, payload in before.items() if op not in damaged}


def use(journal: Journal, chance: random.Random, ops: int) -> None:
    """Batches of new ops, and one after the other of them replaced."""
    for _ in range(300):
        if (journal.last_op or 0) < ops and chance.random() < 0.3:
            journal.append_many([chance.randbytes(chance.randrange(1, 120)) for _ in range(5)])
        else:
            op = chance.randrange(journal.snapshot_op + 1, ops + 6)
            journal.append(chance.randbytes(chance.randrange(1, 120)), op=op, replace=True)
    if chance.random() < 0.5 and journal.first_op:
        journal.drain(journal.first_op + 3, journal.first_op + 5)
    if chance.random() < 0.3:
        journal.set_snapshot_op(max(journal.snapshot_op, 4))


@pytest.mark.parametrize("seed", range(12))
def test_after_random_damage_of_replaced_entries_what_lives_is_what_was_not_hit(
    home: Home, seed: int, tally: Callable[[str, int], None]
) -> None:
    chance = random.Random(seed)
    ops = chance.choice([20, 100, 250])
    for _ in range(chance.randrange(1, 4)):  # each life an epoch
        with home.open(**SIZES) as journal:
            use(journal, chance, ops)
            before = live(journal)
    directory = home.directory()
    newest = entry_frames(directory)
    share = chance.choice([0.02, 0.3, 0.8])
    hit = [newest[max(newest)]]
    for frame in frames_of(directory):
        often = share if frame == newest.get(frame.op) else share / 5
        if frame.type == lib.MW_ENTRY and frame not in hit and chance.random() < often:
            hit.append(frame)
    rot(directory, hit)
    told = repair(home.directory(), dry_run=True)
    report = repair(home.directory())
    assert report.dropped == told.dropped
    assert {d.lsn for d in report.dropped if d.reason != OLDER} == {f.lsn for f in hit}
    lost = {f.op for f in hit if f == newest[f.op]}
    assert repaired(home) == {op: payload for op, payload in before.items() if op not in lost}
    tally("journals with replaced entries damaged at random and repaired")


@pytest.mark.parametrize("fails", [False, True])
def test_a_later_generation_that_an_old_superblock_does_not_name_stays_as_it_is(
    home: Home, monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    """The superblock may be an old one that was put back: what it does not name may be what was meant."""
    before = replaced(home, 20)
    directory = home.directory()
    rot(directory, [entry_frames(directory)[7]])
    record = superblock_of(directory).segments[0]
    later = fmt.segment_name(record.id, record.generation + 1)
    put(directory, later, b"not ours to touch" * 1000)
    if fails:
        monkeypatch.setattr(SuperblockFile, "commit", failing_commit)
        with pytest.raises(OSError, match="planted"):
            repair(home.directory())
        assert read(home.directory(), later) == b"not ours to touch" * 1000
        return
    repair(home.directory())
    assert read(home.directory(), later) == b"not ours to touch" * 1000
    assert repaired(home) == {op: payload for op, payload in before.items() if op != 7}


def failing_commit(*_: Any) -> None:
    raise OSError(errno.EIO, "planted")
