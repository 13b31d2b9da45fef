"""The scan stops at the first frame that is not right and says why; it never reads past the segment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmapwal import format
from mmapwal._native import ffi, lib

from .frames import BASE, EPOCH, SALT, Chain, Ground

CAPACITY = 4096
SLOTS = 16
STOPS = {name: getattr(lib, name) for name in dir(lib) if name.startswith("MW_STOP_")}


@pytest.fixture(scope="module")
def ground() -> Iterator[Any]:
    ground = Ground(1 << 16)
    yield ground
    ground.close()


class Scan:
    """struct mw_scan over some bytes, with what it fills."""

    def __init__(self, ground: Any, raw: bytes, **fields: Any) -> None:
        capacity = fields.get("capacity", max(CAPACITY, len(raw)))
        self.raw = raw.ljust(capacity, b"\0")
        self.slots = ffi.new("struct mw_slot[]", SLOTS)
        at = ground.put(self.raw)
        removals = fields.pop("removals", [])
        self.removals = ffi.new("struct mw_removal[]", removals)
        self.c = ffi.new(
            "struct mw_scan *",
            {"frames": at, "base_lsn": BASE, "capacity": capacity, "limit_lsn": 2**63, "epoch": EPOCH}
            | {"slots": self.slots, "slot_count": SLOTS, "salt": SALT, "link": SALT, "lsn": BASE}
            | {"batch_lsn": BASE, "batch_link": SALT, "epoch_start_lsn": BASE}
            | {"removals": self.removals, "removal_count": len(removals)}
            | fields,
        )

    def run(self) -> str:
        result = lib.mw_scan(self.c)
        assert result == 0, result
        return next(name for name, value in STOPS.items() if value == self.c.stop)

    def hunt(self) -> int:
        assert lib.mw_hunt(self.c) == 0
        return int(self.c.frame_count)

    def live(self) -> dict[int, int]:
        return {s.op: s.lsn for s in self.slots if s.lsn != 0}


@pytest.fixture
def good() -> Any:
    """Three entries."""
    chain = Chain()
    for op in (1, 2, 3):
        chain.add(b"payload of op %d" % op, op=op, kind=op, timestamp_ns=-op, durable_lsn=BASE - op)
    return chain


def bad_frames() -> dict[str, tuple[str, dict[str, int]]]:
    """What is wrong with the fourth frame, and the stop that it has to lead to."""
    return {
        "the header's checksum": ("MW_STOP_HEADER", {"header_crc": 1}),
        "an LSN below its place": ("MW_STOP_PLACE", {"lsn": BASE}),
        "an LSN above its place": ("MW_STOP_PLACE", {"lsn": 2**64 - 8}),
        "a link to another frame": ("MW_STOP_LINK", {"link": 7}),
        "an older epoch": ("MW_STOP_OLD_EPOCH", {"epoch": EPOCH - 1}),
        "a newer epoch": ("MW_STOP_FUTURE_EPOCH", {"epoch": EPOCH + 1}),
        "a length past the segment": ("MW_STOP_LENGTH", {"length": CAPACITY}),
        "the greatest length": ("MW_STOP_LENGTH", {"length": 2**32 - 1}),
        "a gap past the segment": ("MW_STOP_LENGTH", {"length": CAPACITY, "type": lib.MW_GAP}),
        "the payload's checksum": ("MW_STOP_PAYLOAD", {"payload_crc": 1}),
        "a shorter length": ("MW_STOP_PAYLOAD", {"length": 3}),
        "type 0": ("MW_STOP_TYPE", {"type": 0}),
        "an unknown type": ("MW_STOP_TYPE", {"type": lib.MW_PAD + 1}),
        "op 0": ("MW_STOP_OP", {"op": 0}),
        "an op above the highest": ("MW_STOP_OP", {"op": 2**63}),
        "an op whose slot is taken": ("MW_STOP_CONFLICT", {"op": 2 + SLOTS}),
    }


@pytest.mark.parametrize(("stop", "fields"), bad_frames().values(), ids=bad_frames().keys())
def test_a_bad_frame_is_named_by_what_is_wrong_and_nothing_of_it_is_taken(
    ground: Any, good: Any, stop: str, fields: dict[str, int]
) -> None:
    bad = good.add(b"payload", **({"op": 4} | fields))
    good.add(b"behind the bad one", op=5)
    scan = Scan(ground, good.raw[:CAPACITY])
    assert scan.run() == stop
    assert (scan.c.lsn, scan.c.batch_lsn) == (bad.lsn, bad.lsn)
    assert scan.c.link == scan.c.batch_link == good.made[2].link
    assert (scan.c.frame_count, scan.c.entry_count) == (3, 3)
    assert scan.live() == {op: good.made[op - 1].lsn for op in (1, 2, 3)}


@pytest.mark.parametrize("stop", ["MW_STOP_LINK", "MW_STOP_PAYLOAD", "MW_STOP_CONFLICT"])
def test_the_op_of_a_bad_frame_is_told_when_its_header_can_be_believed(
    ground: Any, good: Any, stop: str
) -> None:
    fields = next(f for s, f in bad_frames().values() if s == stop)
    good.add(b"payload", **({"op": 4} | fields))
    scan = Scan(ground, good.raw)
    assert scan.run() == stop
    assert scan.c.op == fields.get("op", 4)


def test_an_op_is_not_told_of_a_header_that_cannot_be_believed(ground: Any, good: Any) -> None:
    good.add(b"payload", op=4, header_crc=1)
    scan = Scan(ground, good.raw)
    assert scan.run() == "MW_STOP_HEADER"
    assert scan.c.op == 0


def test_zeros_are_blank(ground: Any, good: Any) -> None:
    scan = Scan(ground, good.raw)
    assert scan.run() == "MW_STOP_BLANK"
    assert scan.c.lsn == good.lsn


def test_an_empty_segment_is_blank_at_its_base(ground: Any) -> None:
    scan = Scan(ground, b"")
    assert scan.run() == "MW_STOP_BLANK"
    assert (scan.c.lsn, scan.c.link, scan.c.frame_count) == (BASE, SALT, 0)


@pytest.mark.parametrize("at", range(format.FRAME_BYTES))
def test_one_byte_that_is_not_zero_is_not_blank(ground: Any, at: int) -> None:
    raw = bytearray(format.FRAME_BYTES)
    raw[at] = 1
    assert Scan(ground, bytes(raw)).run() != "MW_STOP_BLANK"


def test_an_end_frame_ends_the_segment_whatever_lies_behind(ground: Any, good: Any) -> None:
    end = good.add(type=lib.MW_END)
    good.add(b"never looked at", op=9)
    scan = Scan(ground, good.raw)
    assert scan.run() == "MW_STOP_END"
    assert (scan.c.lsn, scan.c.batch_lsn, scan.c.link) == (end.end, end.end, end.link)
    assert (scan.c.frame_count, scan.c.entry_count) == (4, 3)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_the_limit_stops_the_scan_at_a_frame_border(ground: Any, good: Any, kept: int) -> None:
    limit = BASE if kept == 0 else good.made[kept - 1].end
    scan = Scan(ground, good.raw, limit_lsn=limit)
    assert scan.run() == "MW_STOP_LIMIT"
    assert (scan.c.lsn, scan.c.entry_count) == (limit, kept)
    assert sorted(scan.live()) == [1, 2, 3][:kept]


def test_a_segment_full_to_its_last_byte_without_an_end_frame_stops_at_its_end(
    ground: Any, good: Any
) -> None:
    scan = Scan(ground, good.raw, capacity=len(good.raw))
    assert scan.run() == "MW_STOP_LENGTH"
    assert scan.c.lsn == good.lsn


@pytest.mark.parametrize("room", range(0, format.FRAME_BYTES, 8))
def test_a_rest_too_small_for_a_frame_is_not_read(ground: Any, good: Any, room: int) -> None:
    scan = Scan(ground, good.raw, capacity=len(good.raw) + room)
    assert scan.run() == "MW_STOP_LENGTH"


def test_gap_and_pad_are_passed_over_by_their_length(ground: Any) -> None:
    chain = Chain()
    chain.add(b"one", op=1)
    chain.add(type=lib.MW_GAP, length=200, payload_crc=0xBEEF)
    chain.add(b"two", op=2)  # linked to the last frame that the gap stands for
    chain.add(type=lib.MW_PAD, length=100)
    chain.add(b"three", op=3)
    scan = Scan(ground, chain.raw)
    assert scan.run() == "MW_STOP_BLANK"
    assert (scan.c.frame_count, scan.c.entry_count) == (5, 3)
    assert sorted(scan.live()) == [1, 2, 3]


def test_a_gap_made_by_the_helper_holds_the_chain_over_what_it_stands_for(ground: Any, good: Any) -> None:
    after = good.add(b"after", op=4)
    dead = good.made[0].raw + good.made[1].raw + good.made[2].raw
    last = ffi.from_buffer("struct mw_frame *", good.made[2].raw)
    gap = ffi.new("struct mw_frame *")
    lib.mw_make_gap(gap, last, BASE, len(dead), SALT, SALT)
    raw = bytes(ffi.buffer(gap)) + b"\xff" * (len(dead) - format.FRAME_BYTES) + after.raw
    scan = Scan(ground, raw)
    assert scan.run() == "MW_STOP_BLANK"
    assert scan.live() == {4: after.lsn}
    wider = ffi.new("struct mw_frame *")
    lib.mw_make_gap(wider, gap, BASE, len(dead), SALT, SALT)
    assert bytes(ffi.buffer(wider)) == bytes(ffi.buffer(gap))


@pytest.mark.parametrize("whole", [True, False])
def test_the_entries_of_a_batch_count_only_when_the_batch_is_whole(
    ground: Any, good: Any, whole: bool
) -> None:
    start = good.lsn
    good.add(b"a", op=4, flags=lib.MW_FLAG_MORE)
    good.add(b"b", op=5, flags=lib.MW_FLAG_MORE)
    good.add(b"c", op=6, **({} if whole else {"payload_crc": 1}))
    scan = Scan(ground, good.raw)
    assert scan.run() == ("MW_STOP_BLANK" if whole else "MW_STOP_PAYLOAD")
    assert scan.c.batch_lsn == (good.lsn if whole else start)
    assert scan.c.batch_link == good.made[-1 if whole else 2].link
    assert sorted(scan.live()) == ([1, 2, 3, 4, 5, 6] if whole else [1, 2, 3])


def test_a_conflict_inside_a_batch_names_its_op(ground: Any, good: Any) -> None:
    good.add(b"a", op=2 + SLOTS, flags=lib.MW_FLAG_MORE)
    good.add(b"b", op=5)
    scan = Scan(ground, good.raw)
    assert scan.run() == "MW_STOP_CONFLICT"
    assert scan.c.op == 2 + SLOTS


def test_of_two_frames_of_one_op_the_later_one_wins(ground: Any, good: Any) -> None:
    again = good.add(b"again", op=2, kind=9, timestamp_ns=99)
    scan = Scan(ground, good.raw)
    assert scan.run() == "MW_STOP_BLANK"
    slot = scan.slots[2]
    assert (slot.lsn, slot.op, slot.kind, slot.timestamp_ns, slot.length) == (again.lsn, 2, 9, 99, 5)


def test_ops_at_or_below_the_watermark_are_not_live(ground: Any, good: Any) -> None:
    scan = Scan(ground, good.raw, watermark=2)
    assert scan.run() == "MW_STOP_BLANK"
    assert sorted(scan.live()) == [3]


def test_a_removal_hides_the_frames_below_its_lsn_and_not_those_written_later(ground: Any, good: Any) -> None:
    below = good.lsn
    again = good.add(b"written again", op=2)
    scan = Scan(ground, good.raw, removals=[(2, 3, below)])
    assert scan.run() == "MW_STOP_BLANK"
    assert scan.live() == {1: BASE, 2: again.lsn}
    assert scan.c.hidden_count == 2


def test_the_highest_durable_lsn_of_good_frames_is_found(ground: Any, good: Any) -> None:
    good.add(op=4, durable_lsn=BASE + 8)
    good.add(op=5, durable_lsn=BASE)
    good.add(op=6, durable_lsn=BASE + 999, payload_crc=1)
    scan = Scan(ground, good.raw)
    assert scan.run() == "MW_STOP_PAYLOAD"
    assert scan.c.durable_lsn == BASE + 8


def test_epochs_may_rise_below_the_start_of_the_present_one_and_never_fall(ground: Any) -> None:
    chain = Chain()
    chain.add(op=1, epoch=1)
    chain.add(op=2, epoch=2)
    chain.add(op=3, epoch=1)
    scan = Scan(ground, chain.raw, epoch_start_lsn=BASE + 4096)
    assert scan.run() == "MW_STOP_OLD_EPOCH"
    assert (scan.c.entry_count, scan.c.last_epoch) == (2, 2)


def test_a_scan_that_continues_ends_where_one_that_never_stopped_does(ground: Any, good: Any) -> None:
    scan = Scan(ground, good.raw, limit_lsn=good.made[0].end)
    assert scan.run() == "MW_STOP_LIMIT"
    scan.c.limit_lsn = 2**63
    assert scan.run() == "MW_STOP_BLANK"
    assert (scan.c.lsn, scan.c.entry_count) == (good.lsn, 3)
    assert scan.c.link == good.made[-1].link


def test_a_frame_of_another_segment_does_not_pass(ground: Any) -> None:
    foreign = Chain(salt=SALT + 1)
    foreign.add(b"foreign", op=1)
    assert Scan(ground, foreign.raw).run() == "MW_STOP_HEADER"


@pytest.mark.parametrize("lsn", [0, BASE - 8, BASE + CAPACITY + 8, 2**64 - 8])
def test_a_start_outside_the_segment_is_refused(ground: Any, lsn: int) -> None:
    scan = Scan(ground, b"")
    scan.c.lsn = lsn
    assert lib.mw_scan(scan.c) == -22


class TestHunt:
    def test_good_frames_behind_a_bad_one_are_found_and_their_durable_lsn(
        self, ground: Any, good: Any
    ) -> None:
        bad = good.add(b"bad", op=4, header_crc=1)
        good.add(b"good", op=5, durable_lsn=BASE + 48)
        good.add(b"bad link, right header", op=6, link=1, durable_lsn=BASE + 40)
        scan = Scan(ground, good.raw)
        scan.c.lsn = bad.lsn
        assert scan.hunt() == 2
        assert scan.c.durable_lsn == BASE + 48
        assert scan.c.stop == lib.MW_STOP_NONE

    def test_a_copy_of_a_frame_in_another_place_is_not_counted(self, ground: Any, good: Any) -> None:
        scan = Scan(ground, bytes(8) + good.raw)
        assert scan.hunt() == 0

    def test_what_a_cut_left_behind_is_not_counted(self, ground: Any) -> None:
        chain = Chain()
        chain.add(op=1, epoch=EPOCH - 1, durable_lsn=BASE + 8)
        scan = Scan(ground, chain.raw)
        assert scan.hunt() == 0
        assert scan.c.durable_lsn == 0

    def test_a_frame_newer_than_the_superblock_is_told(self, ground: Any) -> None:
        chain = Chain()
        chain.add(op=1, epoch=EPOCH + 1)
        scan = Scan(ground, chain.raw)
        assert scan.hunt() == 0
        assert scan.c.stop == lib.MW_STOP_FUTURE_EPOCH


def test_every_stop_is_reached_by_a_test_above() -> None:
    reached = {stop for stop, _ in bad_frames().values()}
    reached |= {"MW_STOP_NONE", "MW_STOP_END", "MW_STOP_LIMIT", "MW_STOP_BLANK"}
    assert reached == set(STOPS)


# --- whatever the disk holds ----------------------------------------------------------------------------

FIELDS = {
    "type": st.integers(0, 5),
    "flags": st.integers(0, 3),
    "op": st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1)),
    "epoch": st.integers(EPOCH - 2, EPOCH + 1),
    "durable_lsn": st.integers(0, 2**64 - 1),
    "length": st.one_of(st.integers(0, 64), st.integers(0, CAPACITY), st.integers(0, 2**32 - 1)),
}


@st.composite
def segments(draw: st.DrawFn) -> bytes:
    """Frames with right checksums and odd fields, then some bytes changed, cut or made longer."""
    chain = Chain()
    for _ in range(draw(st.integers(0, 8))):
        some = draw(st.fixed_dictionaries({}, optional=FIELDS)) if draw(st.booleans()) else {}
        chain.add(draw(st.binary(max_size=40)), **({"op": len(chain.made) + 1} | some))
    raw = bytearray(chain.raw[: CAPACITY - draw(st.integers(0, 64)) * 8])
    for at in draw(st.lists(st.integers(0, max(0, len(raw) - 1)), max_size=2)) if raw else []:
        raw[at] ^= draw(st.integers(1, 255))
    return bytes(raw)


OPTIONS = st.fixed_dictionaries(
    {
        "epoch_start_lsn": st.integers(0, 80).map(lambda n: BASE + 8 * n),
        "watermark": st.integers(0, 5),
        "limit_lsn": st.one_of(st.just(2**63), st.integers(0, 100).map(lambda n: BASE + 8 * n)),
    }
)


@given(raw=st.one_of(segments(), st.binary(max_size=600)), room=st.integers(0, 16), options=OPTIONS)
def test_no_bytes_make_the_scan_read_past_the_segment_or_invent_an_entry(
    ground: Any, raw: bytes, room: int, options: dict[str, int]
) -> None:
    capacity = (len(raw) + 7) // 8 * 8 + 8 * room
    scan = Scan(ground, raw, capacity=capacity, **options)
    stop = scan.run()
    c = scan.c
    assert BASE <= c.batch_lsn <= c.lsn <= BASE + capacity
    assert c.entry_count <= c.frame_count <= capacity // format.FRAME_BYTES
    for op, lsn in scan.live().items():
        assert op > options["watermark"]
        assert BASE <= lsn < (c.lsn + 1 if stop == "MW_STOP_CONFLICT" else c.batch_lsn)
        at = lsn - BASE
        frame = ffi.from_buffer("struct mw_frame *", scan.raw[at : at + format.FRAME_BYTES])
        assert (frame.op, frame.type) == (op, lib.MW_ENTRY)
        assert at + format.frame_bytes(frame.length) <= capacity


@given(raw=st.one_of(segments(), st.binary(max_size=600)), options=OPTIONS)
def test_a_hunt_over_any_bytes_finds_every_frame_that_a_scan_of_them_took(
    ground: Any, raw: bytes, options: dict[str, int]
) -> None:
    scan = Scan(ground, raw, capacity=(len(raw) + 7) // 8 * 8, **options)
    scan.run()
    taken = scan.c.frame_count
    scan.c.lsn = BASE
    assert scan.hunt() >= taken


@given(raw=st.one_of(segments(), st.binary(max_size=600)), lsn=st.integers(0, 90))
def test_no_bytes_make_a_plan_or_a_check_read_past_the_segment(ground: Any, raw: bytes, lsn: int) -> None:
    raw = raw.ljust((len(raw) + 7) // 8 * 8, b"\0")
    at = ground.put(raw)
    slots = ffi.new("struct mw_slot[]", SLOTS)
    start = ffi.new("uint64_t *", BASE)
    link = ffi.new("uint32_t *", SALT)
    runs = ffi.new("struct mw_run[4]")
    planned = lib.mw_plan(at, BASE, BASE + len(raw), SALT, slots, SLOTS, start, link, runs, 4)
    assert planned == lib.MW_E_CORRUPT or 0 <= planned <= 4
    header = ffi.new("struct mw_frame *")
    place = BASE + 8 * lsn
    for to, room in ((ffi.NULL, 0), (ffi.new("uint8_t[64]"), 64), (ffi.new("uint8_t[1]"), 0)):
        checked = lib.mw_check_frame(at, BASE, len(raw), SALT, place, 1, header, to, room)
        assert checked in {0, lib.MW_E_CORRUPT}
