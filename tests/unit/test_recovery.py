"""The decision table of recovery: every finding meets exactly one row, and every row is met by a journal."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields

import pytest

from mmapwal import CorruptionError, Durability, Journal, MemoryDirectory, RecoveryRow
from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.index import SlotIndex
from mmapwal.recovery import REFUSED, STOP_REASONS, TABLE, Finding, Scanned, decide, scan_journal
from mmapwal.segment import Segment, SegmentTable

from ..journal.files import (
    SMALL,
    after_kill,
    bytes_of,
    change_frame,
    change_superblock,
    entry_frames,
    flip,
    put,
    read,
    superblock_of,
    write,
)

STOPS = {name: value for value, name in ffi.typeof("enum mw_stop").elements.items()}
BOOLEANS = [f.name for f in fields(Finding) if f.name != "stop"]
RECOVERED = set(RecoveryRow) - {RecoveryRow.OBSERVED}  # that is what a readonly open reports
FINDINGS = [
    Finding(stop, **dict(zip(BOOLEANS, values, strict=True)))
    for stop in STOPS.values()
    for values in itertools.product([False, True], repeat=len(BOOLEANS))
]
BLANK = {STOPS[f"MW_STOP_{n}"] for n in ("NONE", "END", "LIMIT", "BLANK")}


# --- the table ----------------------------------------------------------------------------------------


def test_the_findings_are_all_there_are() -> None:
    assert sorted(STOPS.values()) == list(range(14))
    assert BOOLEANS == ["batch_open", "proven_beyond_tail", "future_epoch"]
    assert len(FINDINGS) == len(set(FINDINGS)) == 14 * 2**3


@pytest.mark.parametrize("finding", FINDINGS, ids=repr)
def test_every_finding_meets_exactly_one_row(finding: Finding) -> None:
    met = [row for row, holds in TABLE if holds(finding)]
    assert met == [decide(finding)]


def test_every_row_is_in_the_table_once_and_met_by_a_finding() -> None:
    rows = [row for row, _ in TABLE]
    assert len(rows) == len(set(rows))
    assert set(rows) == RECOVERED - {RecoveryRow.CREATED, RecoveryRow.SEALED}
    assert {decide(f) for f in FINDINGS} == set(rows)


def test_the_rows_do_not_depend_on_their_order() -> None:
    for finding in FINDINGS:
        assert {row for row, holds in reversed(TABLE) if holds(finding)} == {decide(finding)}


def test_what_is_proven_beyond_the_tail_is_never_cut() -> None:
    assert {decide(f) for f in FINDINGS if f.proven_beyond_tail} <= REFUSED


def test_frames_of_a_later_epoch_are_never_cut() -> None:
    future = [f for f in FINDINGS if f.future_epoch or f.stop == STOPS["MW_STOP_FUTURE_EPOCH"]]
    assert {decide(f) for f in future} == {RecoveryRow.FUTURE}


def test_without_proof_a_bad_frame_is_a_torn_tail_whatever_is_wrong_with_it() -> None:
    bad = set(STOPS.values()) - BLANK - {STOPS["MW_STOP_FUTURE_EPOCH"], STOPS["MW_STOP_CONFLICT"]}
    assert len(bad) == 8
    for stop, batch_open in itertools.product(bad, [False, True]):
        assert decide(Finding(stop, batch_open, False, False)) is RecoveryRow.TORN


def test_where_the_frames_just_end_only_an_open_batch_is_cut() -> None:
    for stop in BLANK:
        assert decide(Finding(stop, False, False, False)) is RecoveryRow.CLEAN
        assert decide(Finding(stop, True, False, False)) is RecoveryRow.UNFINISHED


def test_every_bad_frame_has_its_reason() -> None:
    ends = {STOPS[f"MW_STOP_{n}"] for n in ("NONE", "END", "LIMIT")}
    assert set(STOP_REASONS) == set(STOPS.values()) - ends
    assert len(set(STOP_REASONS.values())) == len(STOP_REASONS)


# --- each row, by a journal that meets it -------------------------------------------------------------


def scanned(directory: MemoryDirectory) -> Scanned:
    superblock = superblock_of(directory)
    table = SegmentTable(Segment(directory, superblock.uuid, r) for r in superblock.segments)
    index = SlotIndex.open(directory, superblock.uuid, superblock.slot_count)
    return scan_journal(table, superblock, 0 if index is None else index.progress()[1])


def killed(durability: Durability = Durability.OS) -> MemoryDirectory:
    """What a kill leaves of a journal with two entries and a batch of three; nothing of it is proven,
    but that with Durability.SYNC the index and every frame prove all before them."""
    directory = MemoryDirectory()
    with Journal("j", storage=directory, **SMALL, durability=durability) as journal:
        journal.append(b"one")
        journal.append(b"two" * 30)
        journal.append_many([b"three", b"four" * 20, b"five"])
        return after_kill(directory)


def created() -> MemoryDirectory:
    return MemoryDirectory()


def sealed() -> MemoryDirectory:
    directory = MemoryDirectory()
    with Journal("j", storage=directory, **SMALL) as journal:
        journal.append(b"one")
    return directory


def unfinished() -> MemoryDirectory:
    directory = killed()
    frame = entry_frames(directory)[4]
    write(directory, frame.name, frame.at, bytes(1000))
    return directory


def torn() -> MemoryDirectory:
    directory = killed()
    frame = entry_frames(directory)[2]
    flip(directory, frame.name, frame.payload_at)
    return directory


def lost() -> MemoryDirectory:
    directory = killed(Durability.SYNC)
    frame = entry_frames(directory)[2]
    flip(directory, frame.name, frame.payload_at)
    return directory


def future() -> MemoryDirectory:
    directory = killed()
    old = read(directory, fmt.SUPERBLOCK_NAME)
    with Journal("j", storage=directory, durability=Durability.OS) as journal:
        journal.append(b"of the next epoch")
        directory = after_kill(directory)
    put(directory, fmt.SUPERBLOCK_NAME, old)
    return directory


def conflict() -> MemoryDirectory:
    directory = MemoryDirectory()
    with Journal("j", storage=directory, **SMALL) as journal:
        journal.append(b"one")
        journal.set_snapshot_op(1)
        journal.append(b"in the same slot", op=17)
        directory = after_kill(directory)
    change_superblock(directory, watermark=0)
    return directory


JOURNALS: dict[RecoveryRow, Callable[[], MemoryDirectory]] = {
    RecoveryRow.CREATED: created,
    RecoveryRow.SEALED: sealed,
    RecoveryRow.CLEAN: killed,
    RecoveryRow.UNFINISHED: unfinished,
    RecoveryRow.TORN: torn,
    RecoveryRow.LOST: lost,
    RecoveryRow.FUTURE: future,
    RecoveryRow.CONFLICT: conflict,
}
KEPT = {RecoveryRow.CREATED: 0, RecoveryRow.SEALED: 1, RecoveryRow.CLEAN: 5, RecoveryRow.UNFINISHED: 2,
        RecoveryRow.TORN: 1}  # fmt: skip


def test_there_is_a_journal_for_each_row() -> None:
    assert set(JOURNALS) == RECOVERED
    assert set(KEPT) == RECOVERED - REFUSED


@pytest.mark.parametrize("row", sorted(KEPT, key=lambda r: r.value), ids=lambda r: r.name)
def test_a_journal_that_meets_the_row_opens_and_reports_it(row: RecoveryRow) -> None:
    directory = JOURNALS[row]()
    if row in {r for r, _ in TABLE}:
        assert decide(scanned(directory).finding) is row
    with Journal("j", storage=directory, slots=16, segment_bytes=16384) as journal:
        assert journal.report.outcome is row
        assert [e.op for e in journal] == list(range(1, KEPT[row] + 1))
        assert journal.verify().ok


@pytest.mark.parametrize("row", sorted(REFUSED, key=lambda r: r.value), ids=lambda r: r.name)
def test_a_journal_that_meets_the_row_is_refused_and_nothing_changed(row: RecoveryRow) -> None:
    directory = JOURNALS[row]()
    assert decide(scanned(directory).finding) is row
    before = bytes_of(directory)
    with pytest.raises(CorruptionError) as raised:
        Journal("j", storage=directory)
    assert bytes_of(directory) == before
    reasons = {
        RecoveryRow.LOST: "payload is wrong, but all below LSN .* had been durable",
        RecoveryRow.FUTURE: "later epoch",
        RecoveryRow.CONFLICT: "same slot",
    }
    assert raised.match(reasons[row])
    with pytest.raises(CorruptionError):  # and so again: the lock is free, the damage still there
        Journal("j", storage=directory)


# --- every kind of bad frame, by a journal that has it ------------------------------------------------


def misplaced(directory: MemoryDirectory) -> None:
    """The frame of the first entry lies where that of the second was."""
    first, second = entry_frames(directory)[1], entry_frames(directory)[2]
    data = read(directory, first.name)[first.at : first.at + first.bytes]
    write(directory, second.name, second.at, data)


BAD: dict[str, Callable[[MemoryDirectory], None]] = {
    "MW_STOP_BLANK": lambda d: write(d, (f := entry_frames(d)[2]).name, f.at, bytes(f.bytes)),
    "MW_STOP_HEADER": lambda d: flip(d, (f := entry_frames(d)[2]).name, f.at + 40),
    "MW_STOP_PLACE": misplaced,
    "MW_STOP_LINK": lambda d: change_frame(d, entry_frames(d)[2], link=12345),
    "MW_STOP_OLD_EPOCH": lambda d: change_frame(d, (f := entry_frames(d)[2]), epoch=f.epoch - 1),
    "MW_STOP_FUTURE_EPOCH": lambda d: change_frame(d, (f := entry_frames(d)[2]), epoch=f.epoch + 1),
    "MW_STOP_LENGTH": lambda d: change_frame(d, entry_frames(d)[2], length=2**31),
    "MW_STOP_PAYLOAD": lambda d: flip(d, (f := entry_frames(d)[2]).name, f.payload_at + f.length - 1),
    "MW_STOP_TYPE": lambda d: change_frame(d, entry_frames(d)[2], type=5),
    "MW_STOP_CONFLICT": lambda d: change_frame(d, entry_frames(d)[2], op=17),
    "MW_STOP_OP": lambda d: change_frame(d, entry_frames(d)[2], op=2**63),
}


def test_there_is_a_bad_frame_for_each_reason_to_stop() -> None:
    assert {STOPS[name] for name in BAD} == set(STOP_REASONS)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_frame_stops_the_scan_at_its_place_for_its_reason(name: str) -> None:
    directory = killed()
    frame = entry_frames(directory)[2]
    BAD[name](directory)
    found = scanned(directory)
    assert (found.stop, found.stop_lsn, found.tail_lsn) == (STOPS[name], frame.lsn, frame.lsn)
    assert found.entries == found.frames == 1


@pytest.mark.parametrize("name", BAD)
def test_a_bad_frame_below_what_was_durable_is_refused_with_its_place_and_reason(name: str) -> None:
    directory = killed(Durability.SYNC)
    frame = entry_frames(directory)[2]
    BAD[name](directory)
    before = bytes_of(directory)
    with pytest.raises(CorruptionError) as raised:
        Journal("j", storage=directory)
    assert bytes_of(directory) == before
    error = raised.value
    assert (error.segment, error.offset, error.lsn) == (frame.name, frame.at, frame.lsn)
    assert STOP_REASONS[STOPS[name]].split()[-1] in error.reason
    assert error.segment in str(error)
    assert error.reason in str(error)


@pytest.mark.parametrize("name", sorted(set(BAD) - {"MW_STOP_FUTURE_EPOCH", "MW_STOP_CONFLICT"}))
def test_a_bad_frame_above_what_was_durable_is_cut(name: str) -> None:
    directory = killed()
    BAD[name](directory)
    with Journal("j", storage=directory) as journal:
        assert [e.op for e in journal] == [1]
        wanted = RecoveryRow.CLEAN if name == "MW_STOP_BLANK" else RecoveryRow.TORN
        assert journal.report.outcome is wanted


def test_the_op_is_told_when_the_header_can_be_believed() -> None:
    for name, op in (("MW_STOP_PAYLOAD", 2), ("MW_STOP_LINK", 2), ("MW_STOP_HEADER", None)):
        directory = killed(Durability.SYNC)
        BAD[name](directory)
        with pytest.raises(CorruptionError) as raised:
            Journal("j", storage=directory)
        assert raised.value.op == op


def test_an_error_while_scanning_is_raised_and_is_never_a_reason_to_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import errno

    from mmapwal import segment

    class Failing:
        def __getattr__(self, name: str) -> object:
            return (lambda scan: -errno.EIO) if name == "mw_scan" else getattr(lib, name)

    directory = torn()
    before = bytes_of(directory)
    monkeypatch.setattr(segment, "lib", Failing())
    with pytest.raises(OSError, match="reading the segment failed") as raised:
        Journal("j", storage=directory)
    assert raised.value.errno == errno.EIO
    assert bytes_of(directory) == before
