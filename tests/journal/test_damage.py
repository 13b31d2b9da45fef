"""Damaged files: a torn tail is cut, durably; damage of what was acknowledged refuses and changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmapwal import CorruptionError, Durability, Journal, MemoryDirectory, RecoveryRow, inspect
from mmapwal import format as fmt

from .files import (
    ROOM,
    SMALL,
    Frame,
    Home,
    after_kill,
    bytes_of,
    change_frame,
    contents_of,
    entry_frames,
    flip,
    frames_of,
    killed,
    put,
    read,
    refused,
    without_index,
    write,
)

KEEPS_INDEX = pytest.mark.parametrize("kind", ["mapped", "memory"], indirect=True)
"""Storages that leave the index behind when the process is killed; plain files lose it."""

PAYLOADS = {1: b"first" * 8, 2: b"second__" * 30, 3: b"third___" * 5, 4: b"fourth__" * 9, 5: b"fifth_" * 11}


def filled(home: Home, **options: Any) -> Journal:
    journal = home.open(**(SMALL | options))
    for payload in PAYLOADS.values():
        journal.append(payload)
    return journal


def up_to(op: int) -> dict[int, tuple[bytes, int]]:
    return {n: (p, 0) for n, p in PAYLOADS.items() if n <= op}


# --- a torn tail --------------------------------------------------------------------------------------

Damage = Callable[[Any, Frame], None]
DAMAGES: dict[str, Damage] = {
    "first byte": lambda d, f: flip(d, f.name, f.at),
    "op": lambda d, f: flip(d, f.name, f.at + 16),
    "length": lambda d, f: flip(d, f.name, f.at + 40),
    "length, high byte": lambda d, f: flip(d, f.name, f.at + 43),
    "length, checksum right": lambda d, f: change_frame(d, f, length=f.length + 8),
    "length of zero, checksum right": lambda d, f: change_frame(d, f, length=0),
    "type": lambda d, f: flip(d, f.name, f.at + 54),
    "payload, first byte": lambda d, f: flip(d, f.name, f.payload_at),
    "payload, last byte": lambda d, f: flip(d, f.name, f.payload_at + f.length - 1, 1),
    "header of zeros": lambda d, f: write(d, f.name, f.at, bytes(fmt.FRAME_BYTES)),
    "payload of zeros": lambda d, f: write(d, f.name, f.payload_at, bytes(f.length)),
    "all zeros": lambda d, f: write(d, f.name, f.at, bytes(f.bytes)),
    "noise": lambda d, f: write(d, f.name, f.at, random.Random(5).randbytes(f.bytes)),
    "half of it": lambda d, f: write(d, f.name, f.at + f.bytes // 2, bytes(f.bytes - f.bytes // 2)),
}
parametrize_damages = pytest.mark.parametrize("damage", DAMAGES)


@parametrize_damages
def test_a_torn_tail_is_cut_and_the_cut_is_durable(home: Home, damage: str) -> None:
    left = without_index(killed(home, journal=filled(home)))
    DAMAGES[damage](left.directory(), entry_frames(left.directory())[5])
    journal = left.open()
    assert contents_of(journal) == up_to(4)
    torn = damage not in {"header of zeros", "all zeros"}  # zeros are where nothing was written
    assert journal.report.outcome is (RecoveryRow.TORN if torn else RecoveryRow.CLEAN)
    for _ in range(2):  # killed again, nothing was appended: cut it stays, and nothing more is cut
        left = killed(left, journal)
        journal = left.open()
        assert contents_of(journal) == up_to(4)
        assert journal.report.outcome in {RecoveryRow.TORN, RecoveryRow.CLEAN}
    assert journal.append(b"instead") == 5
    wanted = up_to(4) | {5: (b"instead", 0)}
    left = killed(left, journal)
    assert contents_of(left.open()) == wanted


@parametrize_damages
def test_of_entries_that_no_sync_covered_all_behind_the_damage_is_cut(home: Home, damage: str) -> None:
    left = without_index(killed(home, filled(home, durability=Durability.OS)))
    DAMAGES[damage](left.directory(), entry_frames(left.directory())[3])
    journal = left.open()
    assert contents_of(journal) == up_to(2)
    assert journal.append(b"three") == 3
    journal.close()
    assert contents_of(left.open()) == up_to(2) | {3: (b"three", 0)}


@pytest.mark.parametrize("length", [1, 7, 8, 55, 56, 57, 400, 5000])
def test_garbage_behind_the_tail_is_cut(home: Home, length: int) -> None:
    left = killed(home, filled(home))
    last = frames_of(left.directory())[-1]
    garbage = random.Random(length).randbytes(length)
    write(left.directory(), last.name, last.at + last.bytes, garbage)
    journal = left.open()
    assert contents_of(journal) == up_to(5)
    assert journal.report.outcome is RecoveryRow.TORN
    journal.append(b"six")
    journal.close()
    assert contents_of(left.open()) == up_to(5) | {6: (b"six", 0)}


@given(st.binary(min_size=1, max_size=300), st.integers(0, 300), st.booleans())
@settings(max_examples=100)
def test_no_garbage_behind_the_tail_harms_what_was_acknowledged(
    garbage: bytes, gap: int, like_a_frame: bool
) -> None:
    directory = MemoryDirectory()
    with Journal("j", storage=directory, **SMALL) as journal:
        for payload in PAYLOADS.values():
            journal.append(payload)
        left = after_kill(directory)
    last = frames_of(left)[-1]
    if like_a_frame:
        data = read(left, last.name)[last.at : last.at + fmt.FRAME_BYTES]
        garbage = data[: len(garbage)] + garbage
    write(left, last.name, last.at + last.bytes + gap, garbage)
    with Journal("j", storage=left) as journal:
        assert contents_of(journal) == up_to(5)
        journal.append(b"six")
        left = after_kill(left)
    with Journal("j", storage=left) as journal:
        assert contents_of(journal) == up_to(5) | {6: (b"six", 0)}


# --- frames of an older epoch -------------------------------------------------------------------------


def test_what_a_cut_left_behind_never_comes_back(home: Home) -> None:
    """What is appended instead has the very length of what was lost, so that the frames that lie behind
    it, still whole, follow on it."""
    left = without_index(killed(home, filled(home, durability=Durability.OS, clock=lambda: 1)))
    flip(left.directory(), (f := entry_frames(left.directory())[3]).name, f.payload_at)
    assert all(f.op in entry_frames(left.directory()) for f in frames_of(left.directory()))
    journal = left.open(durability=Durability.OS, clock=lambda: 1)
    assert journal.append(PAYLOADS[3]) == 3
    left = without_index(killed(left, journal))
    journal = left.open(durability=Durability.OS)
    assert contents_of(journal) == up_to(3)
    journal.append(PAYLOADS[4])
    left = without_index(killed(left, journal))
    assert contents_of(left.open()) == up_to(4)


def test_the_very_bytes_that_were_cut_are_no_frame_of_the_present(home: Home) -> None:
    """The bad frame is made whole again behind the journal's back: it is older than the cut."""
    left = without_index(killed(home, filled(home)))
    frame = entry_frames(left.directory())[5]
    flip(left.directory(), frame.name, frame.payload_at)
    journal = left.open()
    left = killed(left, journal)
    flip(left.directory(), frame.name, frame.payload_at)
    journal = left.open()
    assert contents_of(journal) == up_to(4)
    assert journal.report.outcome is RecoveryRow.TORN


@pytest.mark.parametrize("lives", [2, 5])
def test_frames_of_several_lives_that_lie_over_each_other_do_not_mix(home: Home, lives: int) -> None:
    journal = home.open(**SMALL, durability=Durability.OS, clock=lambda: 1)
    journal.append(b"kept")
    for life in range(lives):
        for n in range(6):
            journal.append(b"life %d entry %d" % (life, n))
        home = without_index(killed(home, journal))
        second = entry_frames(home.directory())[2]
        flip(home.directory(), second.name, second.at)  # the whole life is lost
        journal = home.open(durability=Durability.OS, clock=lambda: 1)
        assert contents_of(journal) == {1: (b"kept", 0)}


# --- damage of what was acknowledged ------------------------------------------------------------------


@parametrize_damages
@pytest.mark.parametrize("how", ["killed", "killed, index gone"])
def test_damage_in_the_middle_refuses_to_open_and_changes_nothing(home: Home, damage: str, how: str) -> None:
    """Also when the damaged field is the length."""
    left = killed(home, filled(home))
    if how != "killed":
        without_index(left)
    frame = entry_frames(left.directory())[3]
    DAMAGES[damage](left.directory(), frame)
    error = refused(left)
    assert (error.segment, error.offset, error.lsn) == (frame.name, frame.at, frame.lsn)
    assert error.op in {None, 3}
    assert "durable" in error.reason
    again = refused(left)
    assert str(again) == str(error)
    report = inspect(left.directory())
    assert [(p.segment, p.lsn) for p in report.problems] == [(frame.name, frame.lsn)]


@KEEPS_INDEX
@parametrize_damages
def test_a_damaged_last_entry_that_the_index_proves_refuses(home: Home, damage: str) -> None:
    left = killed(home, filled(home))
    frame = entry_frames(left.directory())[5]
    DAMAGES[damage](left.directory(), frame)
    error = refused(left)
    assert (error.segment, error.lsn) == (frame.name, frame.lsn)


@parametrize_damages
def test_a_damaged_last_entry_that_the_seal_proves_refuses_when_it_is_scanned(
    home: Home, damage: str
) -> None:
    filled(home).close()
    without_index(home)
    frame = entry_frames(home.directory())[5]
    DAMAGES[damage](home.directory(), frame)
    error = refused(home)
    assert (error.segment, error.lsn) == (frame.name, frame.lsn)


@parametrize_damages
def test_a_damaged_entry_that_the_next_one_proves_refuses(home: Home, damage: str) -> None:
    """The next frame's durable LSN is the only evidence."""
    journal = home.open(**SMALL)
    journal.append(b"one" * 20)
    journal.append(b"two")
    left = without_index(killed(home, journal))
    first = entry_frames(left.directory())[1]
    DAMAGES[damage](left.directory(), first)
    assert refused(left).lsn == first.lsn


@parametrize_damages
def test_a_damaged_entry_that_the_start_of_the_epoch_proves_refuses(home: Home, damage: str) -> None:
    journal = filled(home)
    left = killed(home, journal)
    journal = left.open()  # the epoch starts behind the fifth
    left = without_index(killed(left, journal))
    frame = entry_frames(left.directory())[5]
    DAMAGES[damage](left.directory(), frame)
    assert refused(left).lsn == frame.lsn


def test_a_damaged_entry_that_a_removal_proves_refuses(home: Home) -> None:
    journal = filled(home, durability=Durability.OS)
    journal.truncate_from(5)
    left = without_index(killed(home, journal))
    frame = entry_frames(left.directory())[4]
    flip(left.directory(), frame.name, frame.at)
    assert refused(left).lsn == frame.lsn


@pytest.mark.parametrize("op", [1, 3])
def test_a_damaged_entry_of_a_segment_that_was_left_refuses(home: Home, op: int) -> None:
    """An END is durable before the next segment takes a frame; with Durability.OS nothing else is."""
    journal = home.open(**SMALL, durability=Durability.OS)
    for n in range(7):
        journal.append(b"%d" % n * 4000)
    left = without_index(killed(home, journal))
    frame = entry_frames(left.directory())[op]
    flip(left.directory(), frame.name, frame.at)
    assert refused(left).segment == frame.name


def test_every_byte_of_an_acknowledged_frame_matters() -> None:
    directory = MemoryDirectory()
    with Journal("j", storage=directory, **SMALL) as journal:
        journal.append(b"one")
        journal.append(b"sixteen bytes___" * 2)
        journal.append(b"three")
        left = after_kill(directory)
    frame = entry_frames(left)[2]
    assert frame.bytes == fmt.FRAME_BYTES + 32  # no padding: that is in no checksum
    before = bytes_of(left)
    for at in range(frame.at, frame.at + frame.bytes):
        for mask in (0x01, 0x80):
            flip(left, frame.name, at, mask)
            with pytest.raises(CorruptionError) as raised:
                Journal("j", storage=left)
            assert (raised.value.segment, raised.value.lsn) == (frame.name, frame.lsn)
            flip(left, frame.name, at, mask)
    assert bytes_of(left) == before
    with Journal("j", storage=left) as journal:
        assert len(journal) == 3


def test_padding_is_not_part_of_an_entry(home: Home) -> None:
    left = killed(home, filled(home))
    frame = entry_frames(left.directory())[5]
    assert frame.length % 8
    flip(left.directory(), frame.name, frame.at + frame.bytes - 1)
    assert contents_of(left.open()) == up_to(5)


def test_damage_that_no_scan_met_is_found_when_it_is_read(home: Home) -> None:
    """After a clean close nothing is scanned: copy(), iteration, header() and verify() look."""
    filled(home).close()
    frame = entry_frames(home.directory())[3]
    flip(home.directory(), frame.name, frame.payload_at)
    journal = home.open()
    assert journal.report.outcome is RecoveryRow.SEALED
    assert contents_of_op(journal, 2) == PAYLOADS[2]
    for call in (
        lambda: journal.copy(3),
        lambda: journal.header(3),
        lambda: list(journal),
        lambda: list(journal.payloads(3, 3)),
    ):
        with pytest.raises(CorruptionError) as raised:
            call()
        error = raised.value
        assert (error.segment, error.offset, error.lsn, error.op) == (frame.name, frame.at, frame.lsn, 3)
    assert bytes(journal.read(3)) != PAYLOADS[3]  # the fast way does not look, unless it is told to
    report = journal.verify()
    assert not report.ok
    assert [(p.segment, p.offset, p.lsn) for p in report.problems] == [(frame.name, frame.at, frame.lsn)]
    assert journal.append(b"goes on") == 6
    journal.close()
    checked = home.open(verify_reads=True)
    for call in (lambda: checked.read(3), lambda: checked[3], lambda: checked.get(3)):
        with pytest.raises(CorruptionError):
            call()
    assert contents_of_op(checked, 4) == PAYLOADS[4]


def contents_of_op(journal: Journal, op: int) -> bytes:
    assert bytes(journal.read(op)) == journal.copy(op) == bytes(journal[op].payload)
    return journal.copy(op)


def test_verify_reads_reads_all_that_is_whole(home: Home) -> None:
    journal = filled(home, verify_reads=True)
    assert contents_of(journal) == up_to(5)


# --- frames of other places ---------------------------------------------------------------------------


def test_a_misdirected_write_refuses(home: Home) -> None:
    """A frame with every checksum right, written where another one belongs."""
    journal = home.open(**SMALL)
    for n in range(5):
        journal.append(b"%d" % n * 40)
    left = killed(home, journal)
    frames = entry_frames(left.directory())
    data = read(left.directory(), frames[4].name)
    write(left.directory(), frames[2].name, frames[2].at, data[frames[4].at : frames[4].at + frames[4].bytes])
    assert refused(left).lsn == frames[2].lsn


def test_a_frame_inside_a_payload_is_no_frame(home: Home) -> None:
    """A payload that holds the bytes of a whole segment, frames and all."""
    journal = filled(home)
    inner = read(home.directory(), frames_of(home.directory())[0].name)[: fmt.PAGE_BYTES + 1200]
    journal.append(inner)
    journal.append(b"seven")
    left = killed(home, journal)
    assert contents_of(left.open()) == up_to(5) | {6: (inner, 0), 7: (b"seven", 0)}
    left = without_index(left.after_kill())
    # The frame around it is damaged: what is inside does not take its place.
    frame = entry_frames(left.directory())[6]
    flip(left.directory(), frame.name, frame.at)
    assert refused(left).lsn == frame.lsn


def test_the_rest_of_the_segment_replaced_by_that_of_an_older_time_refuses(home: Home) -> None:
    journal = filled(home)
    older = killed(home, journal)
    for n in range(6, 10):
        journal.append(b"%d" % n * 50)
    left = killed(home, journal)
    name = frames_of(left.directory())[0].name
    before = read(older.directory(), name)
    put(left.directory(), name, before)
    if home.kind == "file":  # without the index the older segment is whole by itself
        assert contents_of(left.open()) == up_to(5)
    else:
        assert "durable" in refused(left).reason


def test_damage_where_nothing_lives_any_more_refuses_too(home: Home) -> None:
    """The chain goes through dead frames: nobody can tell what a damaged one was."""
    journal = filled(home)
    journal.set_snapshot_op(3)
    left = killed(home, journal)
    frame = entry_frames(left.directory())[2]
    flip(left.directory(), frame.name, frame.payload_at)
    assert refused(left).lsn == frame.lsn


def test_a_journal_with_a_full_segment_of_garbage_behind_its_end_opens(home: Home) -> None:
    journal = home.open(**SMALL, durability=Durability.OS)
    for n in range(7):
        journal.append(b"%d" % n * 4000)
    left = killed(home, journal)
    ended = frames_of(left.directory())[2 + 1]
    assert ended.type == 3  # END
    at = ended.at + ended.bytes
    write(left.directory(), ended.name, at, random.Random(1).randbytes(ROOM + fmt.PAGE_BYTES - at))
    assert len(left.open()) == 7
