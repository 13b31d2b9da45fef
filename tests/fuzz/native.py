"""The functions of the C helper that read what is on the disk, called with any bytes.

Frames lie where a read past their end fails, and arrays are as long as they say: under AddressSanitizer
(`.ci/sanitize`) a byte too far ends the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mmapwal import format as fmt
from mmapwal._native import ffi, lib

from ..native.frames import Ground
from .images import LIVES, grown
from .mutate import ODD, Source, repair_segment

ROWS = 24
GROUND_BYTES = 1 << 16
_NEVER = 2**64 - 1


class Bytes:
    """A segment's frames, mutated, and slots of which some name them."""

    def __init__(self, source: Source, ground: Ground) -> None:
        self.source = source
        life = grown(source.below(LIVES))
        self.superblock = life.superblock
        record = source.pick(self.superblock.segments)
        data = bytearray(life.image[record.name])
        for _ in range(source.below(6)):
            at = source.below(len(data))
            width = source.pick((1, 4, 8))
            data[at : at + width] = (source.pick(ODD) % 2 ** (8 * width)).to_bytes(width, "little")
        self.base, self.salt = record.base_lsn, fmt.segment_salt(self.superblock.uuid, record.id)
        if source.below(4):
            repair_segment(data, self.salt, source.below(3))
        frames = bytes(data[fmt.PAGE_BYTES :][:GROUND_BYTES])
        self.capacity = max(64, len(frames) - 8 * source.below(40) * source.below(40)) & ~7
        self.frames = ground.put(frames[: self.capacity].ljust(self.capacity, b"\0"))
        self.slot_count = source.pick((1, 3, 16))
        self.slots = self.make_slots()

    def place(self) -> int:
        return self.source.pick((self.base + 8 * self.source.below(2048), self.source.pick(ODD)))

    def make_slots(self) -> Any:
        """Of the journal's own index, some fields of them odd."""
        slots = ffi.new("struct mw_slot[]", self.slot_count)
        scan = self.scan_struct(slots)
        assert lib.mw_scan(scan) == 0
        for _ in range(self.source.below(5)):
            slot = slots[self.source.below(self.slot_count)]
            match self.source.below(3):
                case 0:
                    slot.lsn = self.place()
                case 1:
                    slot.op = self.source.pick((self.source.below(64), self.source.pick(ODD)))
                case _:
                    slot.length = self.source.pick(ODD) % 2**32
        return slots

    def scan_struct(self, slots: Any = ffi.NULL) -> Any:
        superblock = self.superblock
        scan = ffi.new("struct mw_scan *")
        scan.frames, scan.base_lsn, scan.capacity = self.frames, self.base, self.capacity
        scan.lsn = scan.batch_lsn = self.base
        scan.link = scan.batch_link = scan.salt = self.salt
        scan.limit_lsn = self.source.pick((_NEVER, self.place()))
        scan.epoch, scan.epoch_start_lsn = superblock.epoch, superblock.epoch_start_lsn
        scan.watermark = superblock.watermark if self.source.below(2) else 0
        scan.slots, scan.slot_count = slots, self.slot_count
        return scan


def scan(b: Bytes) -> None:
    slots = ffi.new("struct mw_slot[]", b.slot_count)
    found = b.scan_struct(slots)
    assert lib.mw_scan(found) == 0
    assert b.base <= found.batch_lsn <= found.lsn <= b.base + b.capacity
    assert found.entry_count <= found.frame_count <= b.capacity // fmt.FRAME_BYTES
    for slot in slots:
        if slot.lsn:
            assert b.base <= slot.lsn < b.base + b.capacity
            assert slot.op <= found.last_op
            assert fmt.frame_bytes(slot.length) <= b.base + b.capacity - slot.lsn
    assert lib.mw_hunt(found) == 0


def gather(b: Bytes) -> None:
    source, rows = b.source, 1 + b.source.below(ROWS)
    ref = ffi.new("struct mw_segment_ref[1]")
    ref[0].base_lsn, ref[0].capacity, ref[0].frames, ref[0].salt = b.base, b.capacity, b.frames, b.salt
    table = ffi.new("struct mw_table *", {"refs": ref, "count": source.below(2) or 1})
    columns = ffi.new("struct mw_columns *")
    kept = {}
    for name, field in ffi.typeof("struct mw_columns").fields:
        kept[name] = ffi.new(f"{field.type.item.cname}[]", rows)
        setattr(columns, name, kept[name])
    cursor, taken = ffi.new("struct mw_cursor *"), ffi.new("uint64_t *")
    ops: Any = ffi.NULL
    count = 0
    if source.below(2):
        count = source.below(8)
        ops = ffi.new("uint64_t[]", [source.pick((source.below(64), source.pick(ODD))) for _ in range(count)])
        cursor.last_op = 2**63 - 1
    else:
        cursor.op = source.below(64)
        cursor.last_op = cursor.op + source.below(64)
    verify = source.below(2)
    for _ in range(80):  # a chunk each time, or an error that comes again
        got = lib.mw_gather(
            b.slots, b.slot_count, table, cursor, ops, count, taken, columns, rows, verify
        )  # fmt: skip
        assert got <= rows
        if got <= 0:
            assert got in {0, lib.MW_E_CORRUPT, lib.MW_E_TABLE}, got
            return
        for row in range(got):
            start, end = kept["start"][row], kept["end"][row]
            assert fmt.PAYLOAD_OFFSET <= start <= end <= fmt.PAGE_BYTES + b.capacity
            assert b.slots[kept["op"][row] % b.slot_count].op == kept["op"][row]
    raise AssertionError("the walk does not end")


def check_frame(b: Bytes) -> None:
    header = ffi.new("struct mw_frame *")
    for slot in b.slots:
        length = min(slot.length, 1 << 16)
        to = ffi.new("uint8_t[]", length) if b.source.below(2) else ffi.NULL
        room = length if to else 0
        place = slot.lsn if slot.lsn >= b.base else b.base  # the table has it
        rc = lib.mw_check_frame(
            b.frames, b.base, b.capacity, b.salt, place, slot.op, header, to, room
        )  # fmt: skip
        assert rc in {0, lib.MW_E_CORRUPT}, rc


def plan(b: Bytes) -> None:
    lsn, link = ffi.new("uint64_t *", b.base), ffi.new("uint32_t *", b.salt)
    runs = ffi.new("struct mw_run[4]")
    for _ in range(b.capacity // fmt.FRAME_BYTES + 2):
        end = b.base + b.capacity
        count = lib.mw_plan(b.frames, b.base, end, b.salt, b.slots, b.slot_count, lsn, link, runs, 4)
        if count <= 0:
            assert count in {0, lib.MW_E_CORRUPT}
            return
        assert all(b.base <= r.from_lsn <= r.last_lsn < r.to_lsn <= end for r in runs[0:count])
    raise AssertionError("the plan does not end")


def slots(b: Bytes) -> None:
    """Merge, clash, summary, copy and lookup of any two rings."""
    other, to = b.make_slots(), ffi.new("struct mw_slot[]", b.slot_count)
    count = b.source.below(b.slot_count + 1)
    summary = ffi.new("struct mw_summary *")
    assert lib.mw_slots_clash(b.slots, other, b.slot_count) in {0, 1}
    assert lib.mw_slots_merge(to, b.slots, other, count, summary) == 0
    taken = [to[i] for i in range(count) if to[i].lsn]
    assert summary.live == len(taken)
    assert summary.first_op == min((s.op for s in taken), default=0)
    assert summary.last_op == max((s.op for s in taken), default=0)
    for i in range(count):
        wanted = other[i] if other[i].lsn else b.slots[i]
        assert (to[i].lsn, to[i].op) == (wanted.lsn, wanted.op)
    assert lib.mw_slots_summary(to, b.slot_count, summary) == 0
    assert lib.mw_slots_copy(to, b.slots, b.slot_count) == 0
    assert bytes(ffi.buffer(to)) == bytes(ffi.buffer(b.slots))
    found = ffi.new("struct mw_slot *")
    op = b.source.pick((b.source.below(64), b.source.pick(ODD)))
    rc = lib.mw_lookup(b.slots, b.slot_count, op, found)
    assert rc == lib.MW_E_MISSING or (rc == 0 and found.op == op and found.lsn)


def progress(b: Bytes) -> None:
    page = ffi.new("struct mw_index_header *")
    raw = np.frombuffer(ffi.buffer(page), np.uint8)
    for _ in range(b.source.below(20)):
        raw[b.source.below(len(raw))] = b.source.below(256)
    for copy in page.progress:
        copy.check = fmt.crc32c(bytes(ffi.buffer(ffi.addressof(copy)))[:28], page.salt)
    out = ffi.new("struct mw_progress *")
    rc = lib.mw_progress_read(page, out)
    assert rc == lib.MW_E_MISSING or (rc == 0 and out.durable_lsn <= out.written_lsn)


TARGETS: dict[str, Callable[[Bytes], None]] = {
    "scan": scan, "gather": gather, "check_frame": check_frame, "plan": plan, "slots": slots,
    "progress": progress,
}  # fmt: skip
