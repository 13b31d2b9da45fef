"""Two threads find bit for bit what one finds, wherever they part and whatever is wrong with the journal."""

from __future__ import annotations

import errno
import threading
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmapwal import Durability, Journal, JournalFullError, MemoryDirectory, recovery
from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.index import SlotIndex, slot_pointer
from mmapwal.recovery import RecoveryRow, Scanned, decide, scan_journal, split_row
from mmapwal.segment import Segment, SegmentTable

from ..journal.files import (
    after_kill,
    change_frame,
    change_superblock,
    flip,
    frames_of,
    superblock_of,
    write,
)

SLOTS = 64
SEGMENT_BYTES = 16384


def table_of(directory: MemoryDirectory) -> SegmentTable:
    superblock = superblock_of(directory)
    return SegmentTable(Segment(directory, superblock.uuid, r) for r in superblock.segments)


def scan(directory: MemoryDirectory, threads: int, told: list[tuple[int, int]] | None = None) -> Scanned:
    superblock = superblock_of(directory)
    index = SlotIndex.open(directory, superblock.uuid, superblock.slot_count)
    durable = 0 if index is None else index.progress()[1]

    def progress(done: int, total: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        if told is not None:
            told.append((done, total))

    return scan_journal(table_of(directory), superblock, durable, progress, threads)


def slots_of(found: Scanned) -> tuple[bytes, tuple[int, int, int]]:
    """All slots as the index would get them, and their summary."""
    older, newer = found.slots[0], found.slots[-1]
    merged = np.zeros_like(older)
    out = ffi.new("struct mw_summary *")
    pointers = [slot_pointer(s) for s in (merged, older, newer)]
    assert lib.mw_slots_merge(*pointers, len(merged), out) == 0
    summary = ffi.new("struct mw_summary *")
    assert lib.mw_slots_summary(pointers[0], len(merged), summary) == 0
    assert ffi.buffer(out)[:] == ffi.buffer(summary)[:]
    return merged.tobytes(), (out.live, out.first_op, out.last_op)


def told_by(found: Scanned) -> dict[str, Any]:
    plain = {f.name: getattr(found, f.name) for f in fields(Scanned) if f.name != "slots"}
    return plain | {"slots": slots_of(found), "row": decide(found.finding)}


class Parted:
    """scan_journal parts at `row` from now on, however short the journal is, and counts what it did."""

    def __init__(self, patch: pytest.MonkeyPatch, row: int) -> None:
        self.joined = self.given_up = 0
        scan_split = recovery._scan_split

        def counted(*args: Any) -> Scanned | None:
            found = scan_split(*args)
            self.joined += found is not None
            self.given_up += found is None
            return found

        patch.setattr(recovery, "SPLIT_MIN_BYTES", 0)
        patch.setattr(recovery, "is_resident", lambda segments: True)
        patch.setattr(recovery, "split_row", lambda table, proven: row)
        patch.setattr(recovery, "_scan_split", counted)


def assert_the_same(directory: MemoryDirectory) -> set[int]:
    """Every place to part; the number of those at which what two threads found was joined."""
    alone = told_by(scan(directory, 1))
    joined = set()
    for row in range(1, len(superblock_of(directory).segments)):
        with pytest.MonkeyPatch.context() as patch:
            parted = Parted(patch, row)
            told: list[tuple[int, int]] = []
            found = scan(directory, 2, told)
        assert told_by(found) == alone, f"parted before segment {row}"
        assert [d for d, _ in told] == sorted({d for d, _ in told})
        assert told[-1][0] == told[-1][1]
        if parted.joined:
            joined.add(row)
    return joined


def lived(durability: Durability, steps: list[tuple[str, int]]) -> MemoryDirectory:
    """What a kill leaves of a life of these steps."""
    directory = MemoryDirectory()
    options: dict[str, Any] = {"storage": directory, "slots": SLOTS, "segment_bytes": SEGMENT_BYTES}
    journal = Journal("j", durability=durability, **options)
    for what, n in steps:
        last = journal.last_op or journal.snapshot_op
        try:
            if what == "append":
                journal.append(bytes([n % 251]) * (n * 7 % 2900))
            elif what == "gap":
                journal.append(b"behind a gap", op=last + 1 + n % 9)
            elif what == "replace" and len(journal):
                ops = [e.op for e in journal]
                journal.append(b"again" * (100 + n % 400), op=ops[n % len(ops)], replace=True)
            elif what == "batch":
                journal.append_many([bytes(n * k % 1500) for k in range(1 + n % 6)])
            elif what == "truncate" and last > journal.snapshot_op + 1:
                journal.truncate_from(last - n % 2)
            elif what == "watermark" and len(journal):
                journal.set_snapshot_op(min(last, journal.snapshot_op + 1 + n % 8))
            elif what == "killed":
                directory, old = after_kill(directory), journal
                old.close()
                options["storage"] = directory
                journal = Journal("j", durability=durability, **options)
        except JournalFullError:
            journal.set_snapshot_op(last)
    left = after_kill(directory)
    journal.close()
    return left


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["append"] * 5 + ["batch"] * 3 + ["replace", "gap", "truncate", "watermark", "killed"]
        ),
        st.integers(0, 1000),
    ),
    min_size=5,
    max_size=60,
)
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["flip", "hole", "link", "op", "epoch", "old epoch", "unfinished", "durable"]),
        st.integers(0, 10**6),
    ),
    max_size=3,
)


def damage(directory: MemoryDirectory, what: str, n: int) -> None:
    frames = frames_of(directory)
    if not frames:
        return
    frame = frames[n % len(frames)]
    if what == "flip":
        flip(directory, frame.name, frame.at + n // 7 % frame.bytes)
    elif what == "hole":
        write(directory, frame.name, frame.at, bytes(frame.bytes))
    elif what == "link":
        change_frame(directory, frame, link=n)
    elif what == "op" and frame.op:
        change_frame(directory, frame, op=frame.op + (SLOTS if n % 2 else 1))
    elif what == "epoch":
        change_frame(directory, frame, epoch=frame.epoch + 1)
    elif what == "old epoch" and frame.epoch:
        change_frame(directory, frame, epoch=frame.epoch - 1)
    elif what == "unfinished":
        change_frame(directory, frame, flags=frame.flags ^ lib.MW_FLAG_MORE)
    elif what == "durable":
        change_frame(directory, frame, durable_lsn=n)


@given(
    durability=st.sampled_from([Durability.SYNC, Durability.OS]),
    steps=STEPS,
    wrongs=DAMAGE,
    watermark=st.booleans(),
)
def test_two_threads_find_what_one_finds_in_any_journal_parted_anywhere(
    durability: Durability, steps: list[tuple[str, int]], wrongs: list[tuple[str, int]], watermark: bool
) -> None:
    directory = lived(durability, steps)
    for what, n in wrongs:
        damage(directory, what, n)
    if watermark:  # what was below it comes back: conflicts
        change_superblock(directory, watermark=0)
    assert_the_same(directory)


def long() -> MemoryDirectory:
    """Four segments and more, every op again in a later one."""
    steps = [("append", 101 + n) for n in range(40)] + [("replace", n) for n in range(40)]
    return lived(Durability.SYNC, steps)


def test_a_sound_journal_is_joined_wherever_it_is_parted() -> None:
    directory = long()
    segments = superblock_of(directory).segments
    assert len(segments) > 4
    ended = [r for r in range(1, len(segments)) if segments[r].base_lsn <= scan(directory, 1).tail_lsn]
    assert assert_the_same(directory) == set(ended)


def test_an_epoch_that_goes_down_from_one_segment_to_the_next_stops_both_ways() -> None:
    directory = long()
    change_superblock(directory, epoch=9, epoch_start_lsn=superblock_of(directory).next_base_lsn)
    names = [r.name for r in superblock_of(directory).segments]
    link = 0
    for frame in [f for f in frames_of(directory) if f.name == names[0]]:
        fields = {"link": link} if link else {}
        link = renewed(directory, frame, epoch=9, **fields)
    alone = scan(directory, 1)
    assert alone.stop == lib.MW_STOP_OLD_EPOCH
    assert alone.stop_lsn == superblock_of(directory).segments[1].base_lsn
    assert assert_the_same(directory) == set()


def test_what_a_frame_of_the_first_thread_proves_counts() -> None:
    directory = long()
    first = superblock_of(directory).segments[0].name
    end = [f for f in frames_of(directory) if f.name == first][-1]
    assert end.type == lib.MW_END
    beyond = scan(directory, 1).tail_lsn + 8
    change_frame(directory, end, durable_lsn=beyond)
    found = scan(directory, 1)
    assert (found.proven_lsn, decide(found.finding)) == (beyond, RecoveryRow.LOST)
    assert 1 in assert_the_same(directory)


def renewed(directory: MemoryDirectory, frame: Any, **changed: int) -> int:
    """Changes the frame; the checksum of its header as it is now, for the next one's link."""
    change_frame(directory, frame, **changed)
    file = directory.open(frame.name)
    try:
        return int.from_bytes(file.read_at(frame.at, 4), "little")
    finally:
        file.close()


def test_what_lies_behind_a_torn_segment_is_not_in_the_slots() -> None:
    directory = long()
    frame = next(f for f in frames_of(directory) if f.name == superblock_of(directory).segments[1].name)
    flip(directory, frame.name, frame.payload_at)
    assert assert_the_same(directory) == {1}
    with pytest.MonkeyPatch.context() as patch:
        parted = Parted(patch, 3)
        found = scan(directory, 2)
    assert (parted.joined, parted.given_up) == (0, 1)
    lsns = np.frombuffer(slots_of(found)[0], fmt.SLOT)["lsn"]
    assert lsns.max() < found.stop_lsn


def test_two_live_ops_of_one_slot_on_both_sides_are_found() -> None:
    directory = MemoryDirectory()
    with Journal("j", storage=directory, slots=16, segment_bytes=SEGMENT_BYTES) as journal:
        for op in range(1, 31):
            if op > 16:
                journal.set_snapshot_op(op - 16)
            journal.append(bytes(2900))
        directory = after_kill(directory)
    change_superblock(directory, watermark=0)
    assert decide(scan(directory, 1).finding) is RecoveryRow.CONFLICT
    assert_the_same(directory)


def test_only_what_is_proven_is_before_the_place_where_threads_part() -> None:
    table = table_of(long())
    bases = [s.record.next_base_lsn for s in table.segments]
    assert split_row(table, 0) == 0
    assert split_row(table, bases[0] - 1) == 0
    assert split_row(table, bases[0]) == 1
    half = split_row(table, 2**63)
    assert abs(half - len(bases) / 2) <= 1
    assert split_row(table, bases[half - 1]) == half


@pytest.mark.parametrize("side", ["older", "newer"])
def test_a_disk_error_in_either_thread_is_raised_and_never_a_cut(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmapwal import segment

    directory = long()
    row = 2
    table_bases = [r.base_lsn for r in superblock_of(directory).segments]
    bad = table_bases[0] if side == "older" else table_bases[row + 1]

    class Failing:
        def __getattr__(self, name: str) -> Any:
            if name != "mw_scan":
                return getattr(lib, name)
            return lambda s: -errno.EIO if s.base_lsn == bad else lib.mw_scan(s)

    Parted(monkeypatch, row)
    monkeypatch.setattr(segment, "lib", Failing())
    with pytest.raises(OSError, match="reading the segment failed") as raised:
        scan(directory, 2)
    assert raised.value.errno == errno.EIO


def test_a_progress_callback_that_raises_ends_both_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = long()
    Parted(monkeypatch, 2)
    superblock = superblock_of(directory)

    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan_journal(table_of(directory), superblock, 0, progress, 2)
    assert not [t for t in threading.enumerate() if t.name.startswith("mmapwal-recovery")]


def test_what_the_page_cache_has_not_is_read_ahead_and_found_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = long()
    alone = told_by(scan(directory, 1))
    monkeypatch.setattr(recovery, "SPLIT_MIN_BYTES", 0)
    monkeypatch.setattr(recovery, "is_resident", lambda segments: False)
    told: list[tuple[int, int]] = []
    assert told_by(scan(directory, 2, told)) == alone
    assert told[-1][0] == told[-1][1]
