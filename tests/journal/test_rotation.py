"""Segments under load: left when they are full, the next one prepared ahead, reopened in every position."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmapwal import Durability, Journal, MemoryDirectory, preparing
from mmapwal import format as fmt
from mmapwal._native import lib
from mmapwal.segment import NewSegment
from mmapwal.superblock import SegmentRecord, Superblock
from mmapwal.testing import Call

from .files import (
    ROOM,
    SMALL,
    Home,
    after_kill,
    contents_of,
    entry_frames,
    frames_of,
    killed,
    making_none,
    superblock_of,
)
from .watched import WAIT_S, Gate, Task, Watched

FITS = (ROOM - fmt.FRAME_BYTES) // 4 - fmt.FRAME_BYTES  # four such payloads and an END fill a segment
FITS -= FITS % 8


def is_segment(call: Call) -> bool:
    return call.name.startswith("segment")


@pytest.mark.parametrize("how", ["closed", "killed"])
@pytest.mark.parametrize("durability", list(Durability))
def test_thousands_of_entries_go_over_tiny_segments(home: Home, durability: Durability, how: str) -> None:
    journal = home.open(slots=4096, segment_bytes=16384, durability=durability)
    wanted = {n: (b"%d " % n * (n % 40), n % 100) for n in range(1, 3001)}
    if durability is Durability.SYNC:
        for first in range(1, 3001, 10):
            batch = [wanted[n] for n in range(first, first + 10)]
            assert journal.append_many([p for p, _ in batch], kinds=[k for _, k in batch])[0] == first
    else:
        for n, (payload, kind) in wanted.items():
            assert journal.append(payload, kind=kind) == n
    assert journal.stats().segments >= 20
    journal.sync()
    if how == "killed":
        home = killed(home, journal)
    else:
        journal.close()
    journal = home.open()
    assert {e.op: (bytes(e.payload), e.kind) for e in journal} == wanted
    assert journal.verify().ok
    assert journal.append(b"goes on") == 3001


def test_every_segment_that_was_left_ends_with_an_end_frame(home: Home) -> None:
    journal = home.open(**SMALL)
    for n in range(14):
        journal.append(b"%d" % n * (1000 + 150 * n))
    frames = frames_of(home.directory())
    names = [r.name for r in superblock_of(home.directory()).segments]
    used = [n for n in names if any(f.name == n for f in frames)]
    assert len(used) >= 2
    for name in used:
        types = [f.type for f in frames if f.name == name]
        assert set(types[:-1]) <= {lib.MW_ENTRY}
        assert (types[-1] == lib.MW_END) == (name != used[-1])


def test_lsns_follow_from_segment_to_segment_and_only_grow(home: Home) -> None:
    journal = home.open(**SMALL)
    for n in range(14):
        journal.append(bytes(900 + n))
    segments = superblock_of(home.directory()).segments
    for one, two in itertools.pairwise(segments):
        assert two.base_lsn == one.base_lsn + one.capacity
        assert two.id > one.id
    lsns = journal.headers()["lsn"].tolist()
    assert lsns == sorted(set(lsns))
    for op, frame in entry_frames(home.directory()).items():
        record = next(r for r in segments if r.name == frame.name)
        header = journal.header(op)
        assert header is not None
        assert frame.lsn == header.lsn == record.base_lsn + frame.at - fmt.PAGE_BYTES


# --- prepared ahead -----------------------------------------------------------------------------------


def concurrent(**options: Any) -> Watched:
    directory = Watched(MemoryDirectory(), **options)
    directory.concurrent = True
    return directory


def test_the_next_segment_is_prepared_ahead_and_appends_do_not_wait_for_it(
    open_on: Callable[..., Journal],
) -> None:
    directory = concurrent()
    journal = open_on(directory)
    gate = Gate(lambda c: c.kind == "create" and is_segment(c) and len(journal) > 1)
    directory.on = gate
    for _ in range(3):
        journal.append(bytes(FITS))
    gate.wait()  # half full: someone begins to make the next
    journal.append(bytes(FITS))
    assert len(journal) == 4
    later = Task(lambda: journal.append(bytes(FITS)))  # this one needs it
    gate.open()
    assert later.result() == 5
    assert len(superblock_of(directory).segments) >= 2


def test_a_change_of_structure_does_not_wait_for_a_segment_in_the_making(
    open_on: Callable[..., Journal],
) -> None:
    directory = concurrent()
    journal = open_on(directory)
    journal.append(bytes(FITS))
    directory.on = gate = Gate(lambda c: c.kind == "sync" and c.name.endswith(".tmp"))
    for _ in range(2):
        journal.append(bytes(FITS))
    gate.wait()
    changes: list[Callable[[], object]] = [
        lambda: journal.set_user_data(b"term"),
        lambda: journal.set_snapshot_op(1),
        journal.compact,
        lambda: journal.append(bytes(FITS)),
    ]
    for change in changes:
        Task(change).result()
    gate.open()
    assert journal.append(bytes(FITS)) == 5


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that prepares segments makes one small step, and pauses for longer than any test."""
    monkeypatch.setattr(preparing, "STEP_BYTES", 1024)
    monkeypatch.setattr(preparing, "PAUSE_FIRST_S", 10 * WAIT_S)


def in_the_making(directory: Watched) -> str:
    """Waits for a segment in the making that was begun; its name."""
    while not (
        names := [n for n in directory.inner.names() if n.endswith(".tmp") and n.startswith("segment")]
    ):
        pass
    while len(directory.inner.open(names[0])) < fmt.PAGE_BYTES + 1024:
        pass
    return names[0].removesuffix(".tmp")


@pytest.mark.usefixtures("slow_steps")
def test_who_needs_the_segment_in_the_making_takes_it_over_and_does_not_wait_for_its_pauses(
    open_on: Callable[..., Journal],
) -> None:
    directory = concurrent()
    journal = open_on(directory)
    for n in range(3):
        journal.append(b"%d" % n * FITS)
    name = in_the_making(directory)
    for n in range(3, 9):
        if directory.calls.count(("rename", name)) == 0:
            assert len(journal) == n
            journal.append(b"%d" % n * FITS)
    assert directory.calls.count(("create", name + ".tmp")) == 1
    assert directory.calls.count(("rename", name)) == 1
    data = bytes(directory.inner.open(name).view())
    assert len(data) == SMALL["segment_bytes"]
    assert set(data[-fmt.PAGE_BYTES :]) == {0}
    count = len(journal)
    journal.close()
    with Journal("j", storage=directory.inner) as again:
        assert contents_of(again) == {n + 1: (b"%d" % n * FITS, 0) for n in range(count)}


def test_a_change_on_a_full_disk_takes_the_space_of_a_segment_in_the_making(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(tmp_path / "j", slots=16, segment_bytes=16384) as journal:
        journal.append(b"one")
        engine = journal._engine
        commit = engine._file.commit
        full = True

        def commit_where_there_is_room(new: Superblock) -> None:
            if full or any(fmt.TEMPORARY_NAME.fullmatch(n) for n in engine.directory.names()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            commit(new)

        monkeypatch.setattr(engine._file, "commit", commit_where_there_is_room)
        with making_none(journal):
            with pytest.raises(OSError, match="No space"):  # nobody has anything to give back
                journal.set_snapshot_op(1)
            record = SegmentRecord(99, engine.superblock.next_base_lsn, 12288)
            engine._preparer._making = NewSegment(engine.directory, engine.superblock.uuid, record)
            full = False
            journal.set_snapshot_op(1)
        assert journal.snapshot_op == 1
        assert journal.append(b"two") == 2


def test_a_change_on_a_full_disk_is_tried_again_when_the_segment_in_the_making_found_it_full_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ask for space at once, a file system that looks for some says no to both at once, and the
    segment has let go of what it had before the change asks for it."""
    with Journal(tmp_path / "j", slots=16, segment_bytes=16384) as journal:
        journal.append(b"one")
        engine = journal._engine
        commit = engine._file.commit

        def commit_where_nothing_is_in_the_making(new: Superblock) -> None:
            making, engine._preparer._making = engine._preparer._making, None
            if making is not None:
                making.discard()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            commit(new)

        monkeypatch.setattr(engine._file, "commit", commit_where_nothing_is_in_the_making)
        with making_none(journal):
            record = SegmentRecord(99, engine.superblock.next_base_lsn, 12288)
            engine._preparer._making = NewSegment(engine.directory, engine.superblock.uuid, record)
            journal.set_snapshot_op(1)
        assert journal.snapshot_op == 1
        assert journal.append(b"two") == 2


@pytest.mark.usefixtures("slow_steps")
def test_a_close_leaves_nothing_of_a_segment_in_the_making_and_does_not_wait_for_it(
    open_on: Callable[..., Journal],
) -> None:
    directory = concurrent()
    journal = open_on(directory)
    for _ in range(3):
        journal.append(bytes(FITS))
    in_the_making(directory)
    Task(journal.close).result()
    named = {r.name for r in superblock_of(directory.inner).segments}
    assert {n for n in directory.inner.names() if n.startswith("segment")} == named


def test_two_who_make_the_next_segment_never_write_one_file(open_on: Callable[..., Journal]) -> None:
    """One is held up where it begins; the other goes on to the rename and waits a while for the first."""
    directory = concurrent()
    journal = open_on(directory)
    journal.append(b"0" * FITS)
    begun, go, created = threading.Event(), threading.Event(), threading.Event()
    me = threading.get_ident()

    def on(call: Call) -> None:
        if not is_segment(call) or (not call.name.endswith(".tmp") and call.kind != "rename"):
            return
        if threading.get_ident() != me and not begun.is_set():
            assert call.kind == "create"
            begun.set()
            go.wait(0.2)
        elif threading.get_ident() != me and call.kind == "write":
            created.set()
        elif threading.get_ident() == me and call.kind == "rename":
            go.set()
            created.wait(0.2)

    directory.on = on
    for n in range(1, 3):
        journal.append(b"%d" % n * FITS)
    assert begun.wait(WAIT_S)
    for n in range(3, 9):
        journal.append(b"%d" % n * FITS)
    for record in superblock_of(directory).segments:
        assert len(directory.inner.open(record.name)) == SMALL["segment_bytes"]
    assert contents_of(journal) == {n + 1: (b"%d" % n * FITS, 0) for n in range(9)}


def test_a_segment_is_named_by_the_superblock_before_it_takes_a_frame(
    open_on: Callable[..., Journal],
) -> None:
    directory = Watched()
    journal = open_on(directory)
    for _ in range(10):
        journal.append(bytes(FITS))
    for name in {n for k, n in directory.calls if k == "rename" and n.startswith("segment")}:
        calls = [call for call in directory.calls if call[1] in {name, "superblock", ""}]
        made = calls.index(("rename", name))
        steps = calls[made : calls.index(("write_sync", name))]
        assert steps == [("rename", name), ("dir_sync", ""), ("rename", "superblock"), ("dir_sync", "")]
        temporary = [call for call in directory.calls if call[1] == name + ".tmp"]
        assert temporary[-1] == ("sync", name + ".tmp")
        assert ("write", name + ".tmp") in temporary


def test_a_durable_append_is_one_call_and_changes_no_metadata(open_on: Callable[..., Journal]) -> None:
    directory = Watched()
    journal = open_on(directory)
    journal.append(b"x")
    name = superblock_of(directory).segments[0].name
    directory.calls.clear()
    for _ in range(15):
        journal.append(bytes(100))
    assert directory.calls == [("write_sync", name)] * 15
    lengths = {n: len(directory.inner.open(n)) for n in directory.inner.names()}
    assert lengths[name] == SMALL["segment_bytes"]


@pytest.mark.parametrize("durability", [Durability.OS, Durability.BUFFERED])
def test_an_end_is_durable_before_the_next_segment_takes_a_frame(
    open_on: Callable[..., Journal], durability: Durability
) -> None:
    directory = Watched()
    journal = open_on(directory, durability=durability)
    for _ in range(14):
        journal.append(bytes(FITS))
    journal.sync()
    calls = [c for c in directory.calls if c[1].startswith("segment") and not c[1].endswith(".tmp")]
    calls = [c for c in calls if c[0] in {"write", "sync"}]
    names = [n for n, _ in itertools.groupby(name for _, name in calls)]
    assert len(names) == len(set(names)) >= 3  # never back to one that was left
    for name in names[:-1]:
        assert [c for c in calls if c[1] == name][-1] == ("sync", name)


def test_a_larger_entry_takes_the_place_of_the_prepared_segment_under_a_new_id(
    open_on: Callable[..., Journal],
) -> None:
    directory = Watched()
    journal = open_on(directory)
    for _ in range(4):
        journal.append(bytes(FITS))
    journal.append(b"in the second")
    journal._engine.prepare_segment()
    prepared = superblock_of(directory).segments[-1]
    assert len(superblock_of(directory).segments) == 3
    journal.append(bytes(3 * ROOM))
    segments = superblock_of(directory).segments
    assert len(segments) == 3
    assert segments[-1].id > prepared.id
    assert segments[-1].base_lsn == prepared.base_lsn
    assert segments[-1].capacity > 3 * ROOM
    assert prepared.name not in directory.names()
    journal.append(b"behind")
    left = after_kill(directory.inner)
    assert [len(e.payload) for e in open_on(left)] == [FITS] * 4 + [13, 3 * ROOM, 6]


# --- every position -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "killed"])
@pytest.mark.parametrize("size", [FITS, FITS - 8, FITS + 8, 1000])
def test_reopening_in_every_position_of_a_segment(home: Home, size: int, how: str) -> None:
    """Just filled, END written, the first frame of the next: after each append it is opened again, and
    takes the next one there."""
    wanted: dict[int, tuple[bytes, int]] = {}
    journal = home.open(**SMALL)
    for n in range(1, 14):
        payload = bytes([n]) * size
        wanted[journal.append(payload)] = (payload, 0)
        if how == "killed":
            home = killed(home, journal)
        else:
            journal.close()
        journal = home.open()
        assert contents_of(journal) == wanted
    report = journal.verify()
    assert report.ok, report.problems


def test_killed_at_each_call_of_a_rotation_it_opens_with_all_that_was_acknowledged(
    open_on: Callable[..., Journal],
) -> None:
    """A copy of the disk at each call on it: between the END and the first frame of the next segment,
    between the segment's rename and the superblock, and so on."""
    directory = Watched()
    acknowledged: list[int] = []
    moments: list[tuple[MemoryDirectory, int, str]] = []

    def remember(call: Call) -> None:
        moments.append((after_kill(directory.inner), len(acknowledged), f"{call.kind} {call.name}"))

    journal = open_on(directory)
    directory.on = remember
    for n in range(9):
        acknowledged.append(journal.append(b"%d" % n * FITS))
    directory.on = lambda call: None
    assert len(moments) > 30
    for disk, promised, moment in moments:
        with Journal("j", storage=disk, **SMALL) as found:
            assert promised <= len(found) <= promised + 1, moment
            assert [e.op for e in found] == list(range(1, len(found) + 1))
            found.append(b"x" * FITS)
            again = after_kill(disk)
            count = len(found)
        with Journal("j", storage=again) as found:
            assert len(found) == count, moment


def test_a_group_over_two_segments_that_dies_between_them_keeps_its_first_part(
    open_on: Callable[..., Journal],
) -> None:
    """Entries of several threads staged behind a commit that is held up: they are one group, with an END
    in its middle; the process dies after the first part."""
    directory = Watched()
    journal = open_on(directory, slots=64)
    journal.append(bytes(FITS))
    journal.append(bytes(FITS))
    journal._engine.prepare_segment()
    directory.on = gate = Gate(lambda c: c.kind == "write_sync")
    tasks = [Task(lambda: journal.append(bytes(FITS)))]
    gate.wait()
    for n in range(4):
        staged = journal.stats().staged_bytes
        tasks.append(Task(lambda n=n: journal.append(b"%d" % n * 2000)))
        while journal.stats().staged_bytes == staged:
            pass
    moments: list[MemoryDirectory] = []
    directory.on = lambda call: moments.append(after_kill(directory.inner))
    gate.open()
    assert sorted(t.result() for t in tasks) == [3, 4, 5, 6, 7]
    directory.on = lambda call: None
    counts = []
    for disk in moments:
        with Journal("j", storage=disk) as found:
            counts.append(len(found))
            assert [e.op for e in found] == list(range(1, len(found) + 1))
            assert found.append(b"next") == counts[-1] + 1
    assert counts[0] == 3  # before the group is written
    assert any(3 < c < 7 for c in counts), counts  # the END and what lies before it, and nothing of the rest


@pytest.mark.parametrize("durability", list(Durability))
def test_a_segment_is_left_when_only_the_end_still_fits(home: Home, durability: Durability) -> None:
    journal = home.open(**SMALL, durability=durability)
    journal.append(bytes(ROOM - 3 * fmt.FRAME_BYTES))  # with its own header: room for END and 56 more
    journal.append(b"")  # takes the 56
    journal.append(b"")  # goes on in the next
    journal.sync()
    frames = entry_frames(home.directory())
    assert frames[1].name == frames[2].name != frames[3].name
    end = next(f for f in frames_of(home.directory()) if f.type == lib.MW_END)
    assert end.at + fmt.FRAME_BYTES == SMALL["segment_bytes"]
    assert [len(p) for p in killed(home, journal).open().payloads()] == [ROOM - 3 * fmt.FRAME_BYTES, 0, 0]
    journal.close()
    assert len(home.open()) == 3


def test_a_hundred_segments_are_read_at_random(home: Home) -> None:
    journal = home.open(slots=1024, segment_bytes=16384, durability=Durability.OS)
    for n in range(1, 401):
        journal.append(b"%d." % n * (FITS // 4))
    assert journal.stats().segments >= 90
    for op in (n * 7919 % 400 + 1 for n in range(400)):
        payload = b"%d." % op * (FITS // 4)
        assert bytes(journal.read(op)) == journal.copy(op) == payload
    assert [int(bytes(p[: bytes(p).index(b".")])) for p in journal.payloads()] == list(range(1, 401))
