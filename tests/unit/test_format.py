"""The numpy records of mmapwal/format.py are the structs of native/api.h, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmapwal import format
from mmapwal._native import ffi, lib

RECORDS = {
    "mw_frame": format.FRAME,
    "mw_segment_header": format.SEGMENT_HEADER,
    "mw_slot": format.SLOT,
    "mw_progress": format.PROGRESS,
    "mw_index_header": format.INDEX_HEADER,
}

# What only Python writes: nothing to compare with, but the bytes must stay where FORMAT.md has them.
ONLY_PYTHON = {
    "superblock head": (format.SUPERBLOCK_HEAD, 160 + format.USER_DATA_BYTES_MAX),
    "superblock segment": (format.SUPERBLOCK_SEGMENT, 40),
    "superblock removal": (format.SUPERBLOCK_REMOVAL, 24),
    "snapshot header": (format.SNAPSHOT_HEADER, 48),
}

CONSTANTS = {
    "MW_FORMAT_VERSION": format.FORMAT_VERSION,
    "MW_FRAME_BYTES": format.FRAME_BYTES,
    "MW_PAGE_BYTES": format.PAGE_BYTES,
    "MW_SLOT_BYTES": format.SLOT_BYTES,
}


def leaves(dtype: np.dtype, at: int = 0) -> dict[str, tuple[int, int]]:
    """Offset and size of each field."""
    return {name: (at + dtype.fields[name][1], dtype.fields[name][0].itemsize) for name in dtype.names}


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_lies_where_the_struct_has_it_and_is_as_wide(name: str) -> None:
    struct = ffi.typeof(f"struct {name}")
    expected = {field: (kind.offset, ffi.sizeof(kind.type)) for field, kind in struct.fields}
    found = leaves(RECORDS[name])
    found.pop("padding", None)  # at the end of a struct the compiler's has no name
    assert found == expected
    assert RECORDS[name].itemsize == ffi.sizeof(struct)


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_has_the_sign_of_the_structs(name: str) -> None:
    for field, kind in ffi.typeof(f"struct {name}").fields:
        if kind.type.kind != "primitive":
            continue
        ours = RECORDS[name].fields[field][0]
        assert (ours.kind == "i") == kind.type.cname.startswith("int"), field


@pytest.mark.parametrize("name", CONSTANTS)
def test_the_constants_are_those_of_the_helper(name: str) -> None:
    assert getattr(lib, name) == CONSTANTS[name]


@pytest.mark.parametrize("name", ONLY_PYTHON)
def test_records_that_only_python_writes_keep_their_size(name: str) -> None:
    dtype, size = ONLY_PYTHON[name]
    assert dtype.itemsize == size


@pytest.mark.parametrize("dtype", [*RECORDS.values(), *(d for d, _ in ONLY_PYTHON.values())])
def test_records_have_no_hidden_padding_and_are_little_endian_and_aligned(dtype: np.dtype) -> None:
    at = 0
    for name in dtype.names:
        field, offset = dtype.fields[name][:2]
        assert offset == at, name
        assert field.base.byteorder in "<|=", name
        if field.kind in "iu":
            assert offset % field.itemsize == 0, name
        at += field.itemsize
    assert at == dtype.itemsize
    assert dtype.itemsize % 8 == 0


def test_the_frame_header_is_a_multiple_of_the_frame_alignment() -> None:
    assert format.FRAME.itemsize == format.FRAME_BYTES <= 64
    assert format.FRAME_BYTES % 8 == 0
    assert format.SLOT.itemsize == format.SLOT_BYTES
    assert format.PAGE_BYTES % format.SLOT_BYTES == 0


def test_the_limits_fit_the_fields_that_carry_them() -> None:
    assert np.iinfo("<u2").max >= format.KIND_MAX
    assert np.iinfo("<u8").max >= format.OP_MAX
    assert np.iinfo("<u4").max >= format.PAYLOAD_BYTES_MAX + format.FRAME_BYTES + 8
    assert np.iinfo("<u4").max >= format.SEGMENT_BYTES_MAX
    assert format.SEGMENT_BYTES_MIN > format.PAGE_BYTES + 2 * format.FRAME_BYTES
    assert format.FIRST_LSN > 0  # 0 is an empty slot


@given(st.one_of(st.integers(0, 1000), st.integers(0, format.PAYLOAD_BYTES_MAX)))
def test_python_and_the_helper_agree_on_what_an_entry_takes(payload_bytes: int) -> None:
    assert format.frame_bytes(payload_bytes) == lib.mw_frame_bytes(payload_bytes)
    assert format.frame_bytes(payload_bytes) >= format.FRAME_BYTES + payload_bytes


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_the_segments_of_a_journal_have_salts_of_their_own(uuid: bytes, one: int, other: int) -> None:
    assert (format.segment_salt(uuid, one) == format.segment_salt(uuid, other)) == (one == other)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_names_of_segments_are_known_as_ours_and_sort_by_id(number: int, generation: int) -> None:
    name = format.segment_name(number, generation)
    assert format.is_ours(name)
    assert format.is_ours(f"{name}.tmp")
    assert number == 0 or format.segment_name(number - 1, 2**32 - 1) < name


@pytest.mark.parametrize(
    "name",
    [
        *("superblock", "lock", "index", "snapshots", "notes.txt", "my.tmp", ".tmp", "index.tmp.tmp"),
        *("segment-1", "segment-0000000000000001", "segment-0000000000000001-00000000.bak"),
        *("Segment-0000000000000001-00000000", "segment-000000000000000G-00000000"),
        "segment-0000000000000001-00000000\n",
    ],
)
def test_files_of_other_names_are_never_taken_for_garbage(name: str) -> None:
    assert not format.is_ours(name)
