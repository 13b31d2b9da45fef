"""The bytes on disk, in one place. docs/FORMAT.md tells why they are as they are.

The structs of native/api.h are the same records; tests/unit/test_format.py holds the two together.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Any

import numpy as np

from mmapwal._native import ffi, lib

FORMAT_VERSION = 1
ALIGN_BYTES = 8  # of frames
PAGE_BYTES = 4096
FRAME_BYTES = 56
SLOT_BYTES = 32
PAYLOAD_OFFSET = PAGE_BYTES + FRAME_BYTES  # of the first frame's payload, in a segment
FIRST_LSN = 4096
OP_MAX = 2**63 - 1
KIND_MAX = 2**15 - 1
USER_DATA_BYTES_MAX = 128
SEGMENT_BYTES_MIN = 4 * PAGE_BYTES
SEGMENT_BYTES_MAX = 1 << 30
SLOTS_MAX = 1 << 32
PAYLOAD_BYTES_MAX = 1 << 30
CAPACITY_MAX = 1 << 32  # of one segment: a batch of the largest payload fits, whatever is behind it
LSN_MAX = 2**63 - 1
EPOCH_MAX = GENERATION_MAX = 2**32 - 2
SEQUENCE_MAX = SEGMENT_ID_MAX = 2**63 - 2
SEGMENTS_MAX = 1 << 20
ALIGN_CHOICES = (0, 512, 4096)
REMOVALS_MAX = 64
CUTS_MAX = 16
SUPERBLOCK_BYTES_MAX = 64 << 20

SEGMENT_MAGIC = b"MMWALSEG"
INDEX_MAGIC = b"MMWALIDX"
SUPERBLOCK_MAGIC = b"MMWALSUP"
SNAPSHOT_MAGIC = b"MMWALSNP"

SUPERBLOCK_NAME = "superblock"
SUPERBLOCK_SPARE_NAME = "superblock.tmp"
INDEX_NAME = "index"
LOCK_NAME = "lock"
SNAPSHOTS_NAME = "snapshots"
SEGMENT_NAME = re.compile(r"segment-[0-9a-f]{16}-[0-9a-f]{8}")
TEMPORARY_NAME = re.compile(r"(segment-[0-9a-f]{16}-[0-9a-f]{8}|index)\.tmp")

FRAME = np.dtype(
    [
        ("header_crc", "<u4"),
        ("payload_crc", "<u4"),
        ("lsn", "<u8"),
        ("op", "<u8"),
        ("timestamp_ns", "<i8"),
        ("durable_lsn", "<u8"),
        ("length", "<u4"),
        ("link", "<u4"),
        ("epoch", "<u4"),
        ("kind", "<u2"),
        ("type", "u1"),
        ("flags", "u1"),
    ]
)

SEGMENT_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("generation", "<u4"),
        ("uuid", "V16"),
        ("id", "<u8"),
        ("base_lsn", "<u8"),
        ("capacity", "<u8"),
        ("salt", "<u4"),
        ("crc", "<u4"),
    ]
)

SLOT = np.dtype(
    [
        ("lsn", "<u8"),
        ("op", "<u8"),
        ("timestamp_ns", "<i8"),
        ("length", "<u4"),
        ("kind", "<u2"),
        ("reserved", "<u2"),
    ]
)

PROGRESS = np.dtype(
    [
        ("written_lsn", "<u8"),
        ("durable_lsn", "<u8"),
        ("watermark", "<u8"),
        ("sequence", "<u4"),
        ("check", "<u4"),
    ]
)

INDEX_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("slot_bytes", "<u4"),
        ("uuid", "V16"),
        ("slot_count", "<u8"),
        ("salt", "<u4"),
        ("crc", "<u4"),
        ("reserved", "V16"),
        ("progress", PROGRESS, (2,)),
        ("wake", "<u4"),
        ("waiting", "<u4"),
        ("superblock_sequence", "<u8"),
    ]
)

INDEX_PROGRESS_OFFSET = 64  # all before it never changes
INDEX_CRC_OFFSET = 44

SUPERBLOCK_HEAD = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("bytes", "<u4"),
        ("sequence", "<u8"),
        ("uuid", "V16"),
        ("slot_count", "<u8"),
        ("segment_bytes", "<u8"),
        ("align_bytes", "<u4"),
        ("flags", "<u4"),
        ("watermark", "<u8"),
        ("next_segment_id", "<u8"),
        ("epoch_start_lsn", "<u8"),
        ("epoch", "<u4"),
        ("seal_link", "<u4"),
        ("seal_lsn", "<u8"),
        ("index_crc", "<u4"),
        ("snapshot_crc", "<u4"),
        ("snapshot_op", "<u8"),
        ("seal_live", "<u8"),
        ("seal_first_op", "<u8"),
        ("seal_last_op", "<u8"),
        ("segment_count", "<u4"),
        ("removal_count", "<u4"),
        ("user_bytes", "<u4"),
        ("cut_count", "<u4"),
        ("user", f"V{USER_DATA_BYTES_MAX}"),
    ]
)
SUPERBLOCK_SEALED = 1
SUPERBLOCK_PAIRED = 2

SUPERBLOCK_SEGMENT = np.dtype(
    [
        ("id", "<u8"),
        ("base_lsn", "<u8"),
        ("capacity", "<u8"),
        ("end_lsn", "<u8"),
        ("generation", "<u4"),
        ("reserved", "<u4"),
    ]
)

SUPERBLOCK_REMOVAL = np.dtype([("first", "<u8"), ("last", "<u8"), ("below_lsn", "<u8")])
SUPERBLOCK_CUT = np.dtype([("sequence", "<u8"), ("op", "<u8")])
# What is behind the head, in this order: the field that counts the rows, and what a row is.
SUPERBLOCK_LISTS = (
    ("segment_count", SUPERBLOCK_SEGMENT),
    ("removal_count", SUPERBLOCK_REMOVAL),
    ("cut_count", SUPERBLOCK_CUT),
)

SNAPSHOT_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("reserved", "<u4"),
        ("op", "<u8"),
        ("created_at_ns", "<i8"),
        ("length", "<u8"),
        ("data_crc", "<u4"),
        ("crc", "<u4"),
    ]
)


def crc32c(data: bytes | bytearray | memoryview, seed: int = 0) -> int:
    """CRC32C of `data`, continuing from `seed`."""
    plain = data if type(data) is bytes else ffi.from_buffer(data)
    return int(lib.mw_crc32c(seed, plain, len(data)))


def superblock_places(head: Any) -> tuple[int, ...]:
    """Where each of SUPERBLOCK_LISTS begins in a superblock with this head; behind them its checksum."""
    sizes = (int(head[count]) * row.itemsize for count, row in SUPERBLOCK_LISTS)
    return tuple(accumulate(sizes, initial=SUPERBLOCK_HEAD.itemsize))


def frame_bytes(payload_bytes: int) -> int:
    """What an entry takes in a segment: header, payload, and padding to 8 bytes."""
    return (FRAME_BYTES + payload_bytes + 7) & ~7


def journal_salt(uuid: bytes) -> int:
    """Seeds the checksums of the index page."""
    return crc32c(uuid)


def segment_salt(uuid: bytes, segment_id: int) -> int:
    """Seeds the header checksums of one segment's frames: a frame of another place does not pass."""
    return crc32c(segment_id.to_bytes(8, "little"), crc32c(uuid))


def segment_name(segment_id: int, generation: int) -> str:
    return f"segment-{segment_id:016x}-{generation:08x}"


def is_ours(name: str) -> bool:
    """Whether a file name is one that mmapwal gives, and so may be removed when nothing names it."""
    return bool(SEGMENT_NAME.fullmatch(name) or TEMPORARY_NAME.fullmatch(name))
