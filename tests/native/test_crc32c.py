"""CRC32C is CRC32C: by the instruction, by the tables, and as others compute it."""

from __future__ import annotations

import ctypes
import errno
import mmap
from pathlib import Path
from typing import Any

import crc32c as reference
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmapwal import format
from mmapwal._native import ffi, lib

LIBC = ctypes.CDLL(None)
STREAM = 1024
LONGEST = 4096
NOISE = bytes((i * i * 31 + i * 7 + (i >> 8)) & 255 for i in range(8 * STREAM))
SEEDS = st.one_of(st.sampled_from([0, 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
ALL_WAYS = {"portable": lib.MW_CRC32C_PORTABLE, "instruction": lib.MW_CRC32C_INSTRUCTION,
            "fold": lib.MW_CRC32C_FOLD, "wide": lib.MW_CRC32C_FOLD_WIDE}  # fmt: skip


def has(way: int) -> bool:
    return bool(lib.mw_crc32c_by(way, 0, b"", 0, ffi.new("uint32_t *")) == 0)


WAYS = {name: way for name, way in ALL_WAYS.items() if has(way)}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def crc_by(way: int, seed: int, data: Any, length: int) -> int:
    out = ffi.new("uint32_t *")
    assert lib.mw_crc32c_by(way, seed, data, length, out) == 0
    return int(out[0])


def flags_of_the_processor() -> set[str]:
    return set(Path("/proc/cpuinfo").read_text().split())


def test_the_best_way_that_the_processor_has_is_taken() -> None:
    flags = flags_of_the_processor()
    wanted = {"portable"}
    if flags & {"sse4_2", "crc32"}:
        wanted.add("instruction")
        if {"avx2", "pclmulqdq", "vpclmulqdq"} <= flags:
            wanted.add("fold")
            if {"avx512f", "avx512vl"} <= flags:
                wanted.add("wide")
    assert set(WAYS) == wanted
    assert lib.mw_crc32c_best() == max(WAYS.values())


@pytest.mark.parametrize("way", [-1, lib.MW_CRC32C_FOLD_WIDE + 1])
def test_a_way_that_is_not_there_is_refused(way: int) -> None:
    assert lib.mw_crc32c_by(way, 0, b"", 0, ffi.new("uint32_t *")) == -errno.ENOTSUP


@every_way
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_the_known_answers_of_rfc_3720_come_out(way: int, data: bytes, expected: int) -> None:
    assert crc_by(way, 0, data, len(data)) == expected
    assert lib.mw_crc32c(0, data, len(data)) == expected


@every_way
def test_every_length_up_to_4096_at_every_alignment_agrees_with_the_reference(way: int) -> None:
    memory = ffi.new("uint8_t[]", LONGEST + 64)
    ffi.memmove(memory, NOISE, LONGEST + 64)
    for length in range(LONGEST + 1):
        at = (length + length // 64) % 64  # each remainder of 64 with each alignment
        seed = length * 0x9E3779B1 % 2**32
        assert crc_by(way, seed, memory + at, length) == reference.crc32c(NOISE[at : at + length], seed), (
            length
        )


@every_way
def test_every_alignment_with_every_short_length(way: int) -> None:
    memory = ffi.new("uint8_t[]", 512)
    ffi.memmove(memory, NOISE, 512)
    for length in range(300):
        for at in range(0, 64, 7):
            assert crc_by(way, 7, memory + at, length) == reference.crc32c(NOISE[at : at + length], 7)


@every_way
def test_nothing_is_read_behind_the_end(way: int) -> None:
    """The page behind the last byte cannot be read."""
    with mmap.mmap(-1, 2 * mmap.PAGESIZE) as area:
        area[:] = NOISE[: 2 * mmap.PAGESIZE]
        start = ffi.cast("uint8_t *", ffi.from_buffer(area))
        behind = ctypes.c_void_p(int(ffi.cast("uintptr_t", start)) + mmap.PAGESIZE)
        assert LIBC.mprotect(behind, mmap.PAGESIZE, 0) == 0
        for length in [*range(600), LONGEST]:
            at = mmap.PAGESIZE - length
            expected = reference.crc32c(NOISE[at : mmap.PAGESIZE])
            assert crc_by(way, 0, start + at, length) == expected


@every_way
@given(
    length=st.one_of(st.integers(0, 100), st.integers(0, 7 * STREAM), st.sampled_from([256, 3 * STREAM])),
    at=st.integers(0, 63),
    seed=SEEDS,
)
def test_any_length_from_any_place_with_any_seed_agrees_with_the_reference(
    way: int, length: int, at: int, seed: int
) -> None:
    memory = ffi.new("uint8_t[]", NOISE)
    assert crc_by(way, seed, memory + at, length) == reference.crc32c(NOISE[at : at + length], seed)


@given(st.binary(min_size=56, max_size=56), SEEDS)
def test_the_checksum_of_a_header_is_that_of_all_behind_the_first_four_bytes(
    header: bytes, salt: int
) -> None:
    frame = ffi.new("struct mw_frame *")
    ffi.memmove(frame, header, len(header))
    assert lib.mw_frame_crc(frame, salt) == reference.crc32c(header[4:], salt)


@given(st.binary(max_size=5 * STREAM), SEEDS)
def test_the_way_that_is_taken_agrees_alone_and_guarded(data: bytes, seed: int) -> None:
    expected = reference.crc32c(data, seed)
    assert lib.mw_crc32c(seed, data, len(data)) == expected
    guarded = ffi.new("uint32_t *")
    assert lib.mw_crc32c_guarded(seed, data, len(data), guarded) == 0
    assert guarded[0] == expected


@given(st.binary(max_size=300), st.data())
def test_a_checksum_continues_over_a_cut_at_any_place(data: bytes, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data)))
    whole = lib.mw_crc32c(0, data, len(data))
    assert lib.mw_crc32c(lib.mw_crc32c(0, data[:at], at), data[at:], len(data) - at) == whole


@given(st.binary(min_size=1, max_size=4 * STREAM), st.data())
def test_any_flipped_bit_changes_the_checksum(data: bytes, draw: st.DataObject) -> None:
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    assert format.crc32c(flipped) != format.crc32c(data)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_every_kind_of_buffer_is_taken(kind: type) -> None:
    assert format.crc32c(kind(b"123456789")) == 0xE3069283
