"""CRC32C is CRC32C: by the instruction, by the tables, and as others compute it."""

from __future__ import annotations

import crc32c as reference
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmapwal import format
from mmapwal._native import ffi, lib

STREAM = 1024
NEAR_STREAMS = [n * STREAM + d for n in (0, 1, 2, 3, 4, 6, 7) for d in (-9, -8, -7, -1, 0, 1, 7, 8, 9)]
LENGTHS = st.one_of(st.integers(0, 100), st.sampled_from([n for n in NEAR_STREAMS if n >= 0]))
SEEDS = st.one_of(st.sampled_from([0, 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
NOISE = bytes((i * i * 31 + i * 7 + (i >> 8)) & 255 for i in range(8 * STREAM))


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
def test_the_known_answers_of_rfc_3720_come_out(data: bytes, expected: int) -> None:
    assert lib.mw_crc32c(0, data, len(data)) == expected
    assert lib.mw_crc32c_portable(0, data, len(data)) == expected


@given(length=LENGTHS, alignment=st.integers(0, 63), seed=SEEDS, start=st.integers(0, STREAM))
def test_instruction_tables_and_reference_agree_at_every_length_alignment_and_seed(
    length: int, alignment: int, seed: int, start: int
) -> None:
    memory = ffi.new("uint8_t[]", length + alignment + 1)
    data = NOISE[start : start + length]
    length = len(data)
    ffi.memmove(memory + alignment, data, length)
    expected = reference.crc32c(data, seed)
    assert lib.mw_crc32c(seed, memory + alignment, length) == expected
    assert lib.mw_crc32c_portable(seed, memory + alignment, length) == expected
    guarded = ffi.new("uint32_t *")
    assert lib.mw_crc32c_guarded(seed, memory + alignment, length, guarded) == 0
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


def test_the_instruction_is_used_where_the_processor_has_it() -> None:
    with open("/proc/cpuinfo") as f:  # noqa: PTH123
        words = f.read().split()
    assert bool(lib.mw_crc32c_hardware()) == ("sse4_2" in words or "crc32" in words)
