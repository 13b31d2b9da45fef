"""What the fuzzers found: one test each, small."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mmapwal import CorruptionError, Journal, JournalError, MemoryDirectory, inspect
from mmapwal import format as fmt
from mmapwal.index import rebuilt_slots
from mmapwal.superblock import Cut, Removal, Seal, SegmentRecord, Superblock, SuperblockFile

from .images import files_of, memory_of
from .mutate import repair_index

FULL = 2**64 - 1
GOOD = Superblock(
    uuid=bytes(range(16)), slot_count=16, segment_bytes=16384, align_bytes=0, sequence=7, watermark=5,
    next_segment_id=4, epoch=3, epoch_start_lsn=20000, pairing=(5, 1),
    seal=Seal(lsn=20480, link=1, index_crc=2, live=2, first_op=6, last_op=9),
    segments=(SegmentRecord(1, 4096, 12288), SegmentRecord(3, 16384, 12288)),
)  # fmt: skip
FIRST, SECOND = GOOD.segments
assert GOOD.seal is not None

CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "no slots": {"slot_count": 0},
    "too many slots": {"slot_count": fmt.SLOTS_MAX + 1},
    "small segments": {"segment_bytes": 4096},
    "segments of no whole pages": {"segment_bytes": 16385},
    "large segments": {"segment_bytes": 2**40},
    "an alignment nobody can choose": {"align_bytes": 8},
    "no epoch": {"epoch": 0},
    "the last epoch": {"epoch": 2**32 - 1},
    "the last sequence": {"sequence": FULL},
    "the last segment id": {"next_segment_id": FULL},
    "a watermark that is no op": {"watermark": 2**63, "seal": None},
    "a snapshot above the watermark": {"pairing": (6, 1)},
    "an epoch behind all segments": {"epoch_start_lsn": 30000},
    "an epoch before the first LSN": {"epoch_start_lsn": 0},
    "a segment twice": {"segments": (FIRST, FIRST)},
    "segments out of order": {"segments": (SECOND, FIRST)},
    "segments over each other": {"segments": (FIRST, replace(SECOND, base_lsn=16376))},
    "a segment without bytes": {"segments": (FIRST, replace(SECOND, capacity=0))},
    "a segment of no whole pages": {"segments": (FIRST, replace(SECOND, capacity=12290))},
    "an endless segment": {"segments": (FIRST, replace(SECOND, capacity=FULL - 4095))},
    "a segment at the end of all LSNs": {"segments": (FIRST, replace(SECOND, base_lsn=FULL - 7))},
    "a segment off the grid": {"segments": (FIRST, replace(SECOND, base_lsn=16387))},
    "an id that is still to come": {"segments": (FIRST, replace(SECOND, id=4))},
    "the last generation": {"segments": (FIRST, replace(SECOND, generation=2**32 - 1))},
    "an end outside its segment": {"segments": (replace(FIRST, end_lsn=16392), SECOND)},
    "a segment behind the last LSN": {"segments": (replace(FIRST, base_lsn=2**63 - 8192),)},
    "a seal that counts more than there are slots": {"seal": replace(GOOD.seal, live=17, last_op=99)},
    "a seal that counts more than its ops": {"seal": replace(GOOD.seal, live=5)},
    "a seal with ops below the watermark": {"seal": replace(GOOD.seal, first_op=5)},
    "a seal with ops and no entries": {"seal": replace(GOOD.seal, live=0)},
    "a seal behind all segments": {"seal": replace(GOOD.seal, lsn=28680)},
    "a seal before the epoch": {"seal": replace(GOOD.seal, lsn=19992)},
    "a removal of no op": {"removals": (Removal(0, 3, 16384),)},
    "a removal behind all segments": {"removals": (Removal(6, 7, 28680),)},
    "more removals than there is room for": {"removals": (Removal(6, 7, 16384),) * (fmt.REMOVALS_MAX + 1)},
    "a cut of no op": {"cuts": (Cut(7, 2**63),)},
    "a cut that is still to come": {"cuts": (Cut(8, 6),)},
    "more cuts than there is room for": {"cuts": (Cut(7, 6),) * (fmt.CUTS_MAX + 1)},
}


def test_a_superblock_that_a_journal_writes_is_read() -> None:
    assert Superblock.decode(GOOD.encode()) == GOOD


@pytest.mark.parametrize("fields", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_a_superblock_that_contradicts_itself_is_refused_though_its_checksum_is_right(
    fields: dict[str, Any],
) -> None:
    directory = MemoryDirectory()
    directory.create(fmt.SUPERBLOCK_NAME).write_at(0, replace(GOOD, **fields).encode())
    with pytest.raises(CorruptionError, match="contradicts itself"):
        Journal("j", storage=directory)
    assert not inspect(directory).ok


@pytest.mark.parametrize("fields", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_what_would_be_refused_when_it_is_read_is_not_written(fields: dict[str, Any]) -> None:
    directory = MemoryDirectory()
    new = replace(GOOD, **fields)
    file = SuperblockFile(directory, replace(GOOD, sequence=new.sequence - 1))
    with pytest.raises(JournalError, match=r"cannot go on|contradict itself"):
        file.commit(new)
    assert directory.names() == []


@pytest.mark.parametrize(
    ("field", "value"), [("flags", 4), ("user_bytes", 129), ("removal_count", fmt.REMOVALS_MAX + 1)]
)
def test_a_superblock_with_what_nobody_sets_is_refused(field: str, value: int) -> None:
    rows = bytes(value * fmt.SUPERBLOCK_REMOVAL.itemsize) if field == "removal_count" else b""
    body = bytearray(GOOD.encode()[:-4] + rows)
    head: Any = np.frombuffer(body, fmt.SUPERBLOCK_HEAD, 1)
    head[field], head["bytes"] = value, len(body) + 4
    del head
    with pytest.raises(ValueError, match=r"it has|65 removals"):
        Superblock.decode(bytes(body) + fmt.crc32c(bytes(body)).to_bytes(4, "little"))


def test_more_slots_than_there_is_memory_for_are_an_error_of_the_system() -> None:
    with pytest.raises(OSError, match="no memory"):
        rebuilt_slots(1 << 45)


def unsealed() -> MemoryDirectory:
    """A journal of a few entries, killed, its last segment not proven by anything but the index page."""
    directory = MemoryDirectory()
    with Journal("j", storage=directory, slots=16, segment_bytes=16384) as journal:
        journal.append_many([b"%d" % n * 40 for n in range(5)])
        left = copy.deepcopy(directory)
    left.close()
    return left


@pytest.mark.parametrize("back", [8, 40, 56, 64, 120])
def test_what_is_proven_may_end_within_a_frame(back: int) -> None:
    directory = unsealed()
    index = directory.open(fmt.INDEX_NAME, writable=True)
    page = bytearray(index.read_at(0, fmt.PAGE_BYTES))
    for n in range(2):
        progress: Any = np.frombuffer(page, fmt.PROGRESS, 1, fmt.INDEX_PROGRESS_OFFSET + 32 * n)
        progress["durable_lsn"] = progress["written_lsn"] - back if progress["written_lsn"][0] > back else 0
        del progress
    repair_index(page)
    index.write_at(0, page)
    with Journal("j", storage=directory) as journal:
        assert [bytes(p) for p in journal.payloads()] == [b"%d" % n * 40 for n in range(5)]
        assert journal.report.rewritten_bytes >= back


def sealed_with(change: Any) -> MemoryDirectory:
    """A journal that was closed, its index changed and sealed again."""
    directory = memory_of(files_of(unsealed()))
    Journal("j", storage=directory).close()
    storage = directory.open(fmt.INDEX_NAME, writable=True)
    slots = np.frombuffer(bytearray(storage.read_at(fmt.PAGE_BYTES, 16 * fmt.SLOT_BYTES)), fmt.SLOT)
    superblock = Superblock.decode(bytes(directory.open(fmt.SUPERBLOCK_NAME).read_at(0, 4096)))
    assert superblock.seal is not None
    seal = change(slots, superblock.seal)
    storage.write_at(fmt.PAGE_BYTES, slots.tobytes())
    seal = replace(seal, index_crc=fmt.crc32c(slots.tobytes()))
    directory.create(fmt.SUPERBLOCK_NAME).write_at(0, replace(superblock, seal=seal).encode())
    return directory


def longer(slots: Any, seal: Seal) -> Seal:
    slots["length"][2] += 8
    return seal


def another_kind(slots: Any, seal: Seal) -> Seal:
    slots["kind"][2] = 9
    return seal


def beyond_the_end(slots: Any, seal: Seal) -> Seal:
    slots["lsn"][2] = seal.lsn + 64
    return seal


def one_less(slots: Any, seal: Seal) -> Seal:
    return replace(seal, live=seal.live - 1)


def another_last_op(slots: Any, seal: Seal) -> Seal:
    return replace(seal, last_op=seal.last_op + 4)


@pytest.mark.parametrize(
    "change", [longer, another_kind, beyond_the_end, one_less, another_last_op], ids=lambda c: c.__name__
)
def test_verify_tells_of_an_index_and_a_seal_that_are_not_what_the_segments_say(change: Any) -> None:
    directory = sealed_with(change)
    report = inspect(directory)
    assert [p.segment for p in report.problems] == [fmt.INDEX_NAME]
    with Journal("j", storage=directory) as journal:
        assert journal.report.outcome.value == "sealed"
        assert [p.segment for p in journal.verify().problems] == [fmt.INDEX_NAME]
