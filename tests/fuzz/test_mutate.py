"""The mutator: where checksums are not made right again, a fuzzer tests them and nothing behind them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from mmapwal import IncompatibleFormatError, inspect
from mmapwal import format as fmt
from mmapwal._native import lib
from mmapwal.superblock import Superblock

from .images import LIVES, frames_in, grown, memory_of, segment_of
from .mutate import (
    TARGETS,
    Mutation,
    kind_of,
    repair_index,
    repair_segment,
    repair_snapshot,
    repair_superblock,
)

TRIES = 40
PAST_MIN = TRIES // 4  # the others change a length, or remove the file
OF_CHECKSUMS = (
    "its checksum is wrong", "its length does not fit", "the checksum of the header is wrong",
    "the checksum of its data is wrong", "the checksum of its header is wrong",
)  # fmt: skip


def without_checksums(name: str, data: bytearray) -> None:
    match kind_of(name):
        case "segment":
            data[fmt.SEGMENT_HEADER.itemsize - 4 : fmt.SEGMENT_HEADER.itemsize] = bytes(4)
            for at in frames_in(bytes(data)):
                frame: Any = np.frombuffer(data, fmt.FRAME, 1, at)
                frame["header_crc"] = frame["link"] = frame["lsn"] = 0
                if frame["type"][0] == lib.MW_ENTRY:
                    frame["payload_crc"] = 0
                del frame
        case "index":
            data[fmt.INDEX_CRC_OFFSET : fmt.INDEX_CRC_OFFSET + 4] = bytes(4)
            for n in range(2):
                at = fmt.INDEX_PROGRESS_OFFSET + (n + 1) * fmt.PROGRESS.itemsize
                data[at - 4 : at] = bytes(4)
        case "superblock":
            end = fmt.superblock_places(np.frombuffer(bytes(data), fmt.SUPERBLOCK_HEAD, 1)[0])[-1]
            data[end : end + 4] = bytes(4)
        case "snapshot":
            data[fmt.SNAPSHOT_HEADER.itemsize - 8 : fmt.SNAPSHOT_HEADER.itemsize] = bytes(8)


def mend(superblock: Superblock, name: str, data: bytearray) -> bool:
    match kind_of(name):
        case "segment":
            record = segment_of(superblock, name)
            assert record is not None
            return repair_segment(data, fmt.segment_salt(superblock.uuid, record.id), depth=2)
        case "index":
            return repair_index(data)
        case "superblock":
            return repair_superblock(data)
    return repair_snapshot(data)


@pytest.mark.parametrize("life", range(LIVES))
def test_of_every_file_of_every_life_the_checksums_are_made_as_they_were(life: int) -> None:
    it = grown(life)
    for name, data in it.image.items():
        record = segment_of(it.superblock, name)
        if name == fmt.SUPERBLOCK_SPARE_NAME or (kind_of(name) == "segment" and record is None):
            continue
        mended = bytearray(data)
        without_checksums(name, mended)
        assert mended != data or not any(data), name
        assert mend(it.superblock, name, mended), name
        assert mended == data, name


def test_the_lives_have_all_that_a_superblock_lists() -> None:
    superblocks = [grown(life).superblock for life in range(LIVES)]
    assert all(any(getattr(s, rows) for s in superblocks) for rows in ("segments", "removals", "cuts"))


@pytest.mark.parametrize("life", range(LIVES))
@pytest.mark.parametrize("target", TARGETS)
def test_what_was_changed_and_mended_is_refused_for_another_reason_than_a_checksum(
    target: str, life: int
) -> None:
    rng, past = random.Random(life), 0
    for _ in range(TRIES):
        mutation = Mutation(bytes([life]) + rng.randbytes(64), target, repaired=True)
        if not mutation.is_past_checksums:
            continue
        past += 1
        try:
            problems = inspect(memory_of(mutation.files)).problems
        except IncompatibleFormatError:
            continue
        told = [p.reason for p in problems if p.segment in mutation.mended]
        assert not [r for r in told if any(of in r for of in OF_CHECKSUMS)], str(mutation)
    assert past >= PAST_MIN
