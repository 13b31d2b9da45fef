"""compact: gives back the space of what is not live; what lives stays where it is, and views stay right."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from mmapwal import CorruptionError, Durability, Journal, PoisonedError
from mmapwal import format as fmt
from mmapwal._native import lib
from mmapwal.testing import Call, Fault, FaultDirectory

from .files import (
    SMALL,
    Contents,
    Home,
    after_kill,
    at_rest,
    bytes_of,
    contents_of,
    entry_frames,
    every_end,
    flip,
    frames_of,
    killed,
    making_none,
    refused,
    refused_call,
    settle,
    superblock_of,
    write,
)
from .watched import Gate, Task, Watched, held_up


def filled(home: Home, count: int = 40, **options: Any) -> Journal:
    """Thirteen entries a segment; the last one is begun."""
    journal = home.open(**({"slots": 256, "segment_bytes": 16384} | options))
    for n in range(1, count + 1):
        journal.append(b"%04d" % n * 220, kind=n)
    settle(journal)
    return journal


def entries(ops: Any) -> Contents:
    return {n: (b"%04d" % n * 220, n) for n in ops}


def thin_out(journal: Journal, kept: set[int]) -> None:
    """Takes all others out, in runs."""
    dead = sorted(set(range(1, (journal.last_op or 0) + 1)) - kept)
    for _, run in itertools.groupby(enumerate(dead), lambda at: at[1] - at[0]):
        ops = [op for _, op in run]
        journal.drain(ops[0], ops[-1])


def segments(home: Home) -> list[str]:
    return [r.name for r in superblock_of(home.directory()).segments]


# --- what it gives back -------------------------------------------------------------------------------


def test_segments_with_nothing_live_go(home: Home) -> None:
    journal = filled(home)
    before = segments(home)
    journal.set_snapshot_op(26)
    assert journal.compact(wait=True) == 2 * SMALL["segment_bytes"]
    assert segments(home) == before[2:]
    assert not set(before[:2]) & set(home.directory().names())
    for found in every_end(home, journal):
        assert contents_of(found) == entries(range(27, 41))


def test_live_entries_among_dead_ones_stay_where_they_are_and_gaps_lie_between(home: Home) -> None:
    kept = {3, 4, 9, 17, *range(29, 41)}
    journal = filled(home)
    lsns = {e: h.lsn for e in kept if (h := journal.header(e)) is not None}
    before = segments(home)
    thin_out(journal, kept)
    freed = journal.compact(wait=True)
    assert freed == 22 * fmt.frame_bytes(880)
    after = superblock_of(home.directory()).segments
    renewed = [r for r in after if r.generation == 1]
    assert [r.id for r in renewed] == [1, 2]  # the third is mostly alive
    assert all(r.name not in before for r in renewed)
    assert sum(f.type == lib.MW_GAP for f in frames_of(home.directory())) >= 4
    assert not {n for n in home.directory().names() if n.startswith("segment")} - {r.name for r in after}
    for found in every_end(home, journal):
        assert contents_of(found) == entries(kept)
        assert {op: found.header(op).lsn for op in kept} == lsns  # type: ignore[union-attr]
        report = found.verify()
        assert report.ok, report.problems


def test_compacting_twice_gains_nothing(home: Home) -> None:
    journal = filled(home)
    thin_out(journal, {3, 4, 9, 17, 36, 40})
    assert journal.compact(wait=True) > 0
    with at_rest(journal):
        before = bytes_of(home.directory())
        assert journal.compact(wait=True) == 0
        assert bytes_of(home.directory()) == before
    journal.drain(9, 9)  # a little more is dead: a gap grows
    assert journal.compact(wait=True) == fmt.frame_bytes(880)
    assert journal.compact(wait=True) == 0
    for found in every_end(home, journal):
        assert contents_of(found) == entries({3, 4, 17, 36, 40})


def test_gaps_of_gaps_are_joined(home: Home) -> None:
    kept = set(range(1, 41))
    journal = filled(home)
    rng = random.Random(7)
    while len(kept) > 8:
        op = rng.choice(sorted(kept - {40}))
        kept.remove(op)
        journal.drain(op, op)
        journal.compact()
        assert contents_of(journal) == entries(kept)
    frames = frames_of(home.directory())
    for one, two in itertools.pairwise(frames):
        assert not (one.type == two.type == lib.MW_GAP and one.name == two.name)
    for found in every_end(home, journal):
        assert contents_of(found) == entries(kept)
        assert found.verify().ok


def test_segments_that_are_mostly_live_are_left_as_they_are(home: Home) -> None:
    journal = filled(home)
    thin_out(journal, set(range(1, 41)) - {2, 15})
    with at_rest(journal):
        before = bytes_of(home.directory())
        assert journal.compact(wait=True) == 0
        after = bytes_of(home.directory())
    assert {n: d for n, d in after.items() if n.startswith("segment")} == {
        n: d for n, d in before.items() if n.startswith("segment")
    }


def test_the_segment_that_is_written_keeps_its_size(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append_many([b"x" * 500] * 10)
    journal.set_snapshot_op(10)
    name = segments(home)
    assert journal.compact() == 0
    assert segments(home) == name
    assert journal.append(b"y") == 11


def test_an_empty_journal_is_compacted_at_once(home: Home) -> None:
    journal = home.open(**SMALL)
    assert journal.compact() == 0
    journal.append(b"x")
    assert journal.compact() == 0
    assert contents_of(journal) == {1: (b"x", 0)}


def test_what_was_replaced_is_dead(home: Home) -> None:
    journal = home.open(slots=64, segment_bytes=16384)
    for n in range(60):
        journal.append(b"%d" % n * 500, op=n % 5 + 1, replace=True)
    assert journal.compact() > 2 * SMALL["segment_bytes"]
    for found in every_end(home, journal):
        assert contents_of(found) == {n % 5 + 1: (b"%d" % n * 500, 0) for n in range(55, 60)}


def test_what_was_truncated_is_dead(home: Home) -> None:
    journal = filled(home)
    journal.truncate_from(4)
    journal.append(b"four", op=4)
    assert journal.compact() > 20 * 880
    for found in every_end(home, journal):
        assert contents_of(found) == entries({1, 2, 3}) | {4: (b"four", 0)}


def test_batches_are_thinned_out_too(home: Home) -> None:
    journal = home.open(slots=256, segment_bytes=16384)
    for first in range(1, 41, 8):
        journal.append_many(
            [b"%04d" % n * 220 for n in range(first, first + 8)], kinds=range(first, first + 8)
        )
    kept = {1, 8, 9, 13, 16, 24, 25, 40}
    thin_out(journal, kept)
    assert journal.compact() > 0
    for found in every_end(home, journal):
        assert contents_of(found) == entries(kept)
        assert found.verify().ok


@pytest.mark.parametrize("align", [512, 4096])
def test_pads_are_dead(home: Home, align: int) -> None:
    journal = filled(home, commit_align_bytes=align)
    kept = {3, 20, 21, 40}
    thin_out(journal, kept)
    assert journal.compact() > 0
    for found in every_end(home, journal):
        assert contents_of(found) == entries(kept)


def test_a_segment_longer_than_others_is_given_back(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"long" * 50_000)
    journal.append(b"short")
    journal.append(b"long" * 50_000, op=9)
    journal.drain(1, 1)
    assert journal.compact() > 200_000
    for found in every_end(home, journal):
        assert contents_of(found) == {2: (b"short", 0), 9: (b"long" * 50_000, 0)}


@pytest.mark.parametrize("kind", ["mapped", "file"], indirect=True)
def test_the_bytes_that_are_freed_are_gone_from_the_disk(home: Home) -> None:
    journal = filled(home, segment_bytes=65536)

    def used() -> int:
        return sum(p.stat().st_blocks * 512 for p in home.path.iterdir() if p.is_file())

    for n in range(41, 141):
        journal.append(b"%04d" % n * 220, kind=n)
    settle(journal)
    before = used()
    thin_out(journal, {5, 6, 80, 140})
    freed = journal.compact(wait=True)
    assert before - used() >= freed * 0.8 - 4 * 4096


# --- what it leaves alone -----------------------------------------------------------------------------


def test_views_from_before_a_compaction_stay_right(home: Home) -> None:
    journal = filled(home)
    views = {e.op: e.payload for e in journal}
    rest = journal.entries()
    seen = [next(rest).op]
    thin_out(journal, {1, 13, 14, 40})
    journal.compact()
    for n in range(41, 80):
        journal.append(b"%04d" % n * 220, kind=n)
    journal.compact()
    assert {op: bytes(v) for op, v in views.items()} == {n: p for n, (p, _) in entries(range(1, 41)).items()}
    seen += [e.op for e in rest]
    assert {1, 13, 14, 40} <= set(seen)
    journal.close()
    assert {op: bytes(v) for op, v in views.items()} == {n: p for n, (p, _) in entries(range(1, 41)).items()}


def test_entries_appended_while_a_compaction_is_under_way_stay(open_on: Callable[..., Journal]) -> None:
    """Held up at each of its calls in turn, while others fill several segments."""
    for kind, wanted in (
        ("create", ".tmp"),
        ("sync", ".tmp"),
        ("rename", "segment"),
        ("rename", "superblock"),
    ):
        directory = Watched()
        directory.concurrent = True
        journal = open_on(directory, slots=1024)
        for n in range(1, 41):
            journal.append(b"%04d" % n * 220, kind=n)
        thin_out(journal, {3, 17, 40})

        def is_wanted(call: Call, kind: str = kind, part: str = wanted) -> bool:
            return call.kind == kind and part in call.name

        with held_up(directory, is_wanted, journal.compact) as compaction:
            for n in range(41, 50):
                journal.append(b"%04d" % n * 220, kind=n)
        assert compaction.result() > 0
        for n in range(50, 90):
            journal.append(b"%04d" % n * 220, kind=n)
        assert contents_of(journal) == entries({3, 17, *range(40, 90)})
        with at_rest(journal):
            left = after_kill(directory.inner)
        assert contents_of(open_on(left, slots=1024)) == entries({3, 17, *range(40, 90)})


def test_entries_that_fill_segments_between_two_steps_of_a_compaction_stay(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look at what lives and its sync."""
    journal = filled(home)
    thin_out(journal, {3, 17, 40})
    engine = journal._engine
    sync = engine.sync
    more = iter([range(41, 90)])

    def append_then_sync() -> int:
        for n in next(more, ()):
            assert Task(lambda n=n: journal.append(b"%04d" % n * 220, kind=n)).result() == n
        return sync()

    monkeypatch.setattr(engine, "sync", append_then_sync)
    journal.compact()
    monkeypatch.undo()
    for found in every_end(home, journal):
        assert contents_of(found) == entries({3, 17, *range(40, 90)})


def test_nothing_is_dead_for_an_entry_that_is_not_durable(open_on: Callable[..., Journal]) -> None:
    """What takes an entry's place is synced before the entry goes."""
    directory = Watched()
    journal = open_on(directory, durability=Durability.OS, slots=64)
    for n in range(1, 31):
        journal.append(b"%04d" % n * 220)
    journal.sync()
    for n in range(1, 31):
        journal.append(b"new", op=n, replace=True)
    directory.calls.clear()
    tail = superblock_of(directory).segments[-1].name
    assert journal.compact() > 0
    assert journal.durable_lsn == journal.written_lsn
    calls = directory.calls
    synced = min(i for i, c in enumerate(calls) if c[0] == "sync" and c[1].startswith("segment"))
    renamed = calls.index(("rename", "superblock"))
    unlinked = min(
        i for i, c in enumerate(directory.calls) if c[0] == "unlink" and c[1].startswith("segment")
    )
    assert synced < renamed < unlinked
    assert tail.startswith("segment")


def test_a_compaction_that_dies_at_any_step_loses_nothing(open_on: Callable[..., Journal]) -> None:
    directory = Watched()
    journal = open_on(directory, slots=256)
    for n in range(1, 41):
        journal.append(b"%04d" % n * 220, kind=n)
    kept = {3, 4, 9, 17, 36, 40}
    thin_out(journal, kept)
    moments: list[Any] = []
    directory.on = lambda call: moments.append(after_kill(directory.inner))
    assert journal.compact() > 0
    moments.append(after_kill(directory.inner))
    directory.on = lambda call: None
    assert len(moments) > 15
    for disk in moments:
        with Journal("j", storage=disk) as left:
            assert contents_of(left) == entries(kept)
            names = {r.name for r in superblock_of(disk).segments}
            assert {n for n in disk.names() if n.startswith("segment")} == names
            left.compact()
            assert contents_of(left) == entries(kept)


def background(open_on: Callable[..., Journal]) -> tuple[Watched, Gate, Journal]:
    """A journal with two dead segments, on a directory that allows threads and holds up unlinks."""
    directory = Watched()
    directory.concurrent = True
    journal = open_on(directory, slots=256)
    for n in range(1, 41):
        journal.append(b"%04d" % n * 220, kind=n)
    settle(journal)
    journal.set_snapshot_op(30)
    directory.on = gate = Gate(lambda c: c.kind == "unlink" and c.name.startswith("segment"))
    return directory, gate, journal


def test_neither_compact_nor_appends_nor_changes_wait_for_files_that_go(
    open_on: Callable[..., Journal],
) -> None:
    directory, gate, journal = background(open_on)
    assert Task(journal.compact).result() == 2 * SMALL["segment_bytes"]
    gate.wait()
    for n in range(41, 80):
        assert Task(lambda n=n: journal.append(b"%04d" % n * 220, kind=n)).result() == n
    Task(lambda: journal.set_snapshot_op(31)).result()
    assert contents_of(journal) == entries(range(32, 80))
    waits = Task(lambda: journal.compact(wait=True))
    waits.join(0.1)
    assert waits.is_alive()
    gate.open()
    waits.result()
    named = {r.name for r in superblock_of(directory).segments}
    assert {n for n in directory.names() if n.startswith("segment")} == named


def test_close_waits_for_the_files_that_go(open_on: Callable[..., Journal]) -> None:
    directory, gate, journal = background(open_on)
    journal.compact()
    gate.wait()
    closes = Task(journal.close)
    closes.join(0.1)
    assert closes.is_alive()
    gate.open()
    closes.result()
    named = {r.name for r in superblock_of(directory).segments}
    assert {n for n in directory.names() if n.startswith("segment")} == named


def test_killed_before_the_files_are_gone_the_next_open_removes_them(open_on: Callable[..., Journal]) -> None:
    directory, gate, journal = background(open_on)
    journal.compact()
    gate.wait()
    with making_none(journal):
        left = after_kill(directory.inner)
    gate.open()
    assert len(left.names()) > len(superblock_of(left).segments) + 2
    with Journal("j", storage=left) as found:
        assert contents_of(found) == entries(range(31, 41))
        named = {r.name for r in superblock_of(left).segments}
        assert {n for n in left.names() if n.startswith("segment")} == named
        assert len(found.report.removed_files) == 2


def test_an_append_without_space_waits_for_files_that_go(
    open_on: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, gate, journal = background(open_on)
    journal.compact()
    gate.wait()
    disposal = journal._engine.disposal
    wait = disposal.wait

    def on(call: Call) -> None:
        if call.kind == "create" and call.name.startswith("segment") and disposal.pending:
            raise OSError(errno.ENOSPC, "no space left")

    def wait_for_all() -> bool:
        gate.open()  # nothing goes before somebody waits for it
        return wait()

    directory.on = on
    monkeypatch.setattr(disposal, "wait", wait_for_all)
    try:
        for n in range(41, 80):
            assert journal.append(b"%04d" % n * 220, kind=n) == n
    finally:
        gate.open()
    assert disposal.pending == 0
    assert contents_of(journal) == entries(range(31, 80))


# --- failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mapped", "memory"], indirect=True)  # plain files are read from an image
@pytest.mark.parametrize("place", ["live payload", "live header", "dead header"])
def test_damage_is_found_and_not_copied(home: Home, place: str) -> None:
    journal = filled(home)
    thin_out(journal, {3, 4, 40})
    frames = entry_frames(home.directory())
    frame = frames[6 if place == "dead header" else 3]
    flip(home.directory(), frame.name, frame.payload_at if place == "live payload" else frame.at)
    error = refused_call(CorruptionError, journal, journal.compact)
    assert error.segment.startswith(frame.name[:24])
    assert journal.poisoned is None
    assert bytes(journal.read(4)) == b"0004" * 220
    assert journal.append(b"goes on") == 41


@pytest.mark.parametrize("kind", ["create", "write", "truncate", "sync"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_compaction_that_cannot_write_leaves_everything_as_it_was(
    open_on: Callable[..., Journal], kind: str, error: int
) -> None:
    fault = Fault(1 << 30, kinds=kind, error=error)
    watched = Watched()
    directory = FaultDirectory(watched, fault)
    journal = open_on(directory, slots=256)
    for n in range(1, 41):
        journal.append(b"%04d" % n * 220, kind=n)
    kept = {3, 4, 9, 17, 36, 40}
    thin_out(journal, kept)
    for nth in itertools.count(1):
        before = bytes_of(watched)
        fault.nth, fault.where = fault.calls + nth, None
        try:
            freed = journal.compact()
        except OSError as e:
            assert e.errno == error
            assert journal.poisoned is None
            assert {n: d for n, d in bytes_of(watched).items() if "tmp" not in n} == {
                n: d for n, d in before.items() if "tmp" not in n
            }
            assert contents_of(journal) == entries(kept)
        else:
            break
    assert freed > 0
    assert nth > 1
    assert contents_of(journal) == entries(kept)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("rename", "the superblock's rename"), ("dir_sync", "the superblock's directory sync")],
)
@pytest.mark.parametrize("after", [False, True])
def test_a_compaction_whose_superblock_is_in_doubt_poisons_and_keeps_both_generations(
    open_on: Callable[..., Journal], kind: str, stage: str, after: bool
) -> None:
    watched = Watched()
    journal = open_on(watched, slots=256)
    for n in range(1, 41):
        journal.append(b"%04d" % n * 220, kind=n)
    kept = {3, 4, 9, 17, 36, 40}
    thin_out(journal, kept)
    old = [r.name for r in superblock_of(watched).segments]
    in_doubt = False

    def fail(call: Call) -> None:
        nonlocal in_doubt
        if (call.kind, call.name) == ("rename", "superblock"):
            in_doubt = True
        if in_doubt and call.kind == kind:
            if after:
                call.run()
            in_doubt = False
            raise OSError(errno.EIO, "broken", call.name)

    watched.on = fail
    with pytest.raises(PoisonedError, match=stage) as raised:
        journal.compact()
    assert raised.value.stage == stage
    watched.on = lambda call: None
    assert set(old) <= set(watched.names())
    assert sum(n.endswith("-00000001") for n in watched.names()) == 3
    assert {e.op: bytes(e.payload) for e in journal} == {op: p for op, (p, _) in entries(kept).items()}
    journal.close()
    found = open_on(watched, slots=256)
    assert contents_of(found) == entries(kept)
    found.append(b"goes on")


def test_files_that_cannot_be_unlinked_are_removed_at_the_next_open(open_on: Callable[..., Journal]) -> None:
    watched = Watched()
    fault = Fault(kinds="unlink", times=None)
    journal = open_on(FaultDirectory(watched, fault), slots=256)
    for n in range(1, 41):
        journal.append(b"%04d" % n * 220, kind=n)
    old = {n for n in watched.names() if n.startswith("segment")}
    thin_out(journal, {3, 40})
    assert journal.compact() > 0
    assert old <= set(watched.names())
    assert contents_of(journal) == entries({3, 40})
    journal.close()
    found = open_on(watched, slots=256)
    assert set(found.report.removed_files) < old
    assert {n for n in watched.names() if n.startswith("segment")} == {
        r.name for r in superblock_of(watched).segments
    }


def test_a_gap_that_was_lost_is_not_taken_for_one(home: Home) -> None:
    """Zeros where a GAP should be, or another one, and the chain is broken."""
    journal = filled(home)
    thin_out(journal, {3, 4, 9, 17, 36, 40})
    journal.compact()
    gaps = [f for f in frames_of(home.directory()) if f.type == lib.MW_GAP]
    for gap, data in ((gaps[0], bytes(fmt.FRAME_BYTES)), (gaps[1], b"\x77" * fmt.FRAME_BYTES)):
        left = killed(home, journal)
        write(left.directory(), gap.name, gap.at, data)
        assert refused(left).lsn == gap.lsn


def test_what_lies_in_a_gap_is_no_matter(home: Home) -> None:
    """It is a hole; and what an old block has there is never looked at."""
    journal = filled(home)
    thin_out(journal, {3, 4, 9, 17, 36, 40})
    journal.compact()
    left = killed(home, journal)
    for gap in [f for f in frames_of(left.directory()) if f.type == lib.MW_GAP]:
        write(left.directory(), gap.name, gap.payload_at, random.Random(gap.lsn).randbytes(gap.length))
    assert contents_of(left.open()) == entries({3, 4, 9, 17, 36, 40})
