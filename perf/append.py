"""What an append costs beside the disk: the journal against raw loops in C, sqlite3, and its own C call.

Durable: one entry of 256 bytes a call, and 64 a call. The raw loops write the bytes that the frames
take, wholly in C, each write timed there; the journal's calls are timed one by one in Python, and
nothing is subtracted. Between the two is the same C append by a direct cffi call, of payloads that were
joined before (what framing takes behind each wait for the disk, whoever calls) and that are joined for it
(the least in Python). Buffered: nanoseconds a call against such a direct call.
"""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from operator import countOf
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    MIB,
    PAYLOAD_BYTES,
    Report,
    SqliteLog,
    finish,
    frame_bytes,
    interleave,
    machine,
    make_room,
    options,
    percentiles,
    pyplot,
    random_bytes,
    rates,
    ratios,
    save,
    time_all,
    time_each,
    workspace,
)
from raw import Method, RawFile, Timing, raw_file

from mmapwal import Durability, Journal
from mmapwal._native import ffi, lib
from mmapwal.format import FIRST_LSN, PAGE_BYTES, SLOT_BYTES
from mmapwal.storage import MappedStorage, SystemDirectory

BATCH = 64
RAW = {
    "pwrite + fdatasync": Method.FDATASYNC,
    "pwritev2(RWF_DSYNC)": Method.RWF_DSYNC,
    "pwrite, O_DSYNC": Method.O_DSYNC,
}
JOURNAL, SQLITE = "journal", "sqlite3 WAL FULL"
JOINED, JOINING = "direct call, joined before", "join and direct call"
WARM = 4  # calls before each timed stretch: what the one before left behind is not its successor's
SLOTS = 65_536  # the journal's default
BUFFER_BYTES = 1 << 20
ZEROS = bytes(MIB)
PACKED = struct.Struct("Q")

Contender = Callable[[], Timing]
Results = dict[str, list[Timing]]


def raw_round(file: RawFile, data: bytes, count: int) -> Timing:
    file.run(data, WARM)
    return file.run(data, count)


def python_round(call: Callable[[Any], object], argument: object, count: int) -> Timing:
    for _ in range(WARM):
        call(argument)
    return time_each(call, argument, count)


def journal_round(journal: Journal, payload: bytes, batch: int, count: int) -> Timing:
    make_room(journal, (WARM + count) * batch)
    if batch == 1:
        return python_round(journal.append, payload, count)
    return python_round(journal.append_many, [payload] * batch, count)


def direct_rounds(writer: DirectWriter, payload: bytes, batch: int, count: int) -> dict[str, Contender]:
    """The same C append by a direct call, of what was joined before, and of what has to be."""

    def timed(call: Callable[[Any], object], argument: object) -> Timing:
        writer.make_room()
        return python_round(call, argument, count)

    joined = partial(writer.append_joined, len(payload), batch)
    return {
        JOINED: partial(timed, joined, payload * batch),
        JOINING: partial(timed, writer.append_many, [payload] * batch),
    }


def sqlite_round(sqlite: SqliteLog, payload: bytes, batch: int, count: int) -> Timing:
    if batch == 1:
        return python_round(sqlite.append, payload, count)
    return python_round(sqlite.append_many, [payload] * batch, count)


def durable(folder: Path, batch: int, rounds: int, count: int) -> Results:
    """All contenders in turns, `batch` entries a call; `count` calls a round."""
    payload = random_bytes(PAYLOAD_BYTES)
    frames = random_bytes(frame_bytes(PAYLOAD_BYTES) * batch)
    contenders: dict[str, Contender] = {}
    with ExitStack() as stack:
        for at, (name, method) in enumerate(RAW.items()):
            file = stack.enter_context(raw_file(folder / f"raw{at}", method, 32 * MIB))
            contenders[name] = partial(raw_round, file, frames, count)
        journal = stack.enter_context(Journal(folder / f"journal{batch}"))
        room = 2 * rounds * (WARM + count) * len(frames) // MIB * MIB + 4 * MIB
        path = folder / f"direct{batch}"
        writer = stack.enter_context(closing(DirectWriter(path, SLOTS, room, durability=lib.MW_SYNC)))
        sqlite = stack.enter_context(closing(SqliteLog(folder / f"sqlite{batch}")))
        contenders[JOURNAL] = partial(journal_round, journal, payload, batch, count)
        contenders |= direct_rounds(writer, payload, batch, count)
        contenders[SQLITE] = partial(sqlite_round, sqlite, payload, batch, count)
        return interleave(contenders, rounds)


def fastest_raw(results: Results) -> str:
    return min(RAW, key=lambda name: percentiles(results[name])["p50"])


def report_durable(
    report: Report, title: str, results: Results, raw_target: float, sqlite_target: float
) -> None:
    """Ratios of rates, round by round; and of the medians and 99th percentiles over everything. The raw
    loop that was fastest in this run has the target."""
    mine, fastest = rates(results[JOURNAL]), fastest_raw(results)
    raw, sqlite = rates(results[fastest]), rates(results[SQLITE])
    direct = {name: f"calibration: {title} by {name} / raw {fastest}" for name in (JOINED, JOINING)}
    rival = f"calibration: {title}, raw {fastest} / {SQLITE}"
    for name in RAW:
        target, limit = (raw_target, direct[JOINING]) if name == fastest else (None, None)
        report.add(f"{title} / raw {name}", ratios(mine, rates(results[name])), target=target, limit=limit)
    for name, row in direct.items():
        report.add(row, ratios(rates(results[name]), raw))
    report.add(f"{title} / {SQLITE}", ratios(mine, sqlite), target=sqlite_target, limit=rival)
    report.add(rival, ratios(raw, sqlite))
    points = {name: percentiles(timings) for name, timings in results.items()}
    halves = {name: [float(np.median(t.ns)) for t in results[name]] for name in (fastest, JOURNAL)}
    report.add(f"{title}: p50 raw {fastest} / journal", ratios(halves[fastest], halves[JOURNAL]))
    report.add(f"{title}: p99 raw {fastest} / journal", [points[fastest]["p99"] / points[JOURNAL]["p99"]])
    report.extra.setdefault("latency_us", {})[title] = points
    report.notes += [f"{title}, microseconds a call (fastest raw: {fastest}):"]
    for name, values in points.items():
        shown = "  ".join(f"{p} {v:8.1f}" for p, v in values.items())
        report.notes += [f"  {name:22} {shown}"]
    report.notes += [""]


class DirectWriter:
    """The C helper's writer without the journal around it: the floor for what a buffered append costs.

    One segment of `room` bytes, long enough that no other is ever needed, and an index.
    """

    def __init__(self, path: Path, slots: int, room: int, durability: int = lib.MW_BUFFERED) -> None:
        self._directory = SystemDirectory(path)
        self._index = self._directory.create("index")
        for _ in range(0, PAGE_BYTES + slots * SLOT_BYTES, len(ZEROS)):  # written, as the journal's is
            self._index.append(ZEROS)
        self._page = ffi.from_buffer("uint8_t[]", self._index.shared())
        segment = self._directory.create("segment")
        for _ in range(0, PAGE_BYTES + room, len(ZEROS)):
            segment.append(ZEROS)
        segment.sync()
        segment.close()
        method = self._directory.best_sync_method()
        opened = self._directory.open("segment", writable=True, sync_method=method)
        assert isinstance(opened, MappedStorage)
        self._segment = opened
        self._writer = self._make(slots, room, durability)

    def _make(self, slots: int, room: int, durability: int) -> Any:
        config = ffi.new(
            "struct mw_config *",
            {
                "page": ffi.cast("struct mw_index_header *", self._page),
                "slots": ffi.cast("struct mw_slot *", self._page + PAGE_BYTES),
                "slot_count": slots,
                "lsn": FIRST_LSN,
                "buffer_bytes": BUFFER_BYTES,
                "epoch": 1,
                "durability": durability,
            },
        )
        writer = lib.mw_writer_new(config)
        if writer == ffi.NULL:
            raise MemoryError
        target = ffi.new(
            "struct mw_target *",
            {"id": 1, "base_lsn": FIRST_LSN, "capacity": room, "io": self._segment.native_io()},
        )
        assert lib.mw_writer_add_target(writer, target) == 0
        return ffi.gc(writer, lib.mw_writer_free)

    def time_append(self, payload: bytes, count: int) -> float:
        """Nanoseconds a call of mw_append_next, in a bare loop that looks at each result."""
        append, writer, size = lib.mw_append_next, self._writer, len(payload)
        start = time.perf_counter_ns()
        for _ in range(count):
            if append(writer, payload, size, 0) < 0:
                raise OSError("mw_append_next")
        return (time.perf_counter_ns() - start) / count

    def append_many(self, payloads: Sequence[bytes]) -> None:
        """The least that payloads of one length need: seen to be that, joined, one call."""
        count, length = len(payloads), len(payloads[0])
        if countOf(map(len, payloads), length) != count:
            raise ValueError(payloads)
        self.append_joined(length, count, b"".join(payloads))

    def append_joined(self, length: int, count: int, joined: bytes) -> None:
        size, flags = PACKED.pack(length), lib.MW_NOW | lib.MW_EVEN
        if lib.mw_append_many(self._writer, joined, size, ffi.NULL, count, 0, 0, 0, flags) < 0:
            raise OSError("mw_append_many")

    def make_room(self) -> None:
        """Takes all entries out of the index."""
        state = ffi.new("struct mw_state *")
        lib.mw_writer_state(self._writer, state)
        lib.mw_writer_set_watermark(self._writer, state.last_op)

    def close(self) -> None:
        lib.mw_writer_close(self._writer)
        self._segment.close()
        self._index.close()
        self._directory.close()


def buffered(folder: Path, rounds: int, count: int) -> dict[str, list[float]]:
    """Nanoseconds an entry, all contenders in turns.

    The segments are long enough that none has to be prepared meanwhile, but for "default segments".
    """
    payload = random_bytes(PAYLOAD_BYTES)
    payloads = [payload] * BATCH
    calls = count // BATCH
    room = 2 * count * (rounds + 1) * frame_bytes(PAYLOAD_BYTES)
    long = 2 * room // MIB * MIB + 4 * MIB
    with ExitStack() as stack:
        journal, usual = (
            stack.enter_context(Journal(folder / name, segment_bytes=size, durability=Durability.BUFFERED))
            for name, size in (("long", long), ("usual", 16 * MIB))
        )
        writer = stack.enter_context(closing(DirectWriter(folder / "direct", SLOTS, long)))

        def in_journal(target: Journal, batch: int) -> float:
            make_room(target, count)
            if batch == 1:
                return time_all(target.append, payload, count)
            return time_all(target.append_many, payloads, calls) / batch

        def direct(batch: int) -> float:
            writer.make_room()
            if batch == 1:
                return writer.time_append(payload, count)
            return time_all(writer.append_many, payloads, calls) / batch

        contenders = {
            "direct": partial(direct, 1),
            "journal": partial(in_journal, journal, 1),
            "direct 64": partial(direct, BATCH),
            "journal 64": partial(in_journal, journal, BATCH),
            "default segments": partial(in_journal, usual, 1),
        }
        return interleave(contenders, rounds)


def report_buffered(report: Report, ns: dict[str, list[float]]) -> None:
    one, many = "the same by a direct cffi call", "the same by join and a direct cffi call"
    report.add("buffered append, one a call", ns["journal"], "ns", target=450, at_least=False, limit=one)
    report.add(one, ns["direct"], "ns", at_least=False)
    report.add("buffered append / direct", ratios(ns["journal"], ns["direct"]), target=2.2, at_least=False)
    name = f"buffered append_many({BATCH}), an entry"
    report.add(name, ns["journal 64"], "ns", target=120, at_least=False, limit=many)
    report.add(many, ns["direct 64"], "ns", at_least=False)
    report.add("buffered append_many(64) / direct", ratios(ns["journal 64"], ns["direct 64"]))
    report.add(
        "buffered append, segments of 16 MiB prepared meanwhile", ns["default segments"], "ns", at_least=False
    )


def picture(report: Report, path: Path) -> None:
    """Latencies of a durable append, one a call and 64 a call: how many finish within a time."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for at, (title, curves) in zip(axes, report.extra["curves"].items(), strict=True):
        for name, microseconds in curves.items():
            share = [i / (len(microseconds) - 1) for i in range(len(microseconds))]
            at.plot(microseconds, share, label=name, linewidth=2 if name == JOURNAL else 1)
        at.set_xscale("log", base=2)
        at.xaxis.set_major_formatter("{x:.0f}")
        at.set_title(title, loc="left")
        at.set_xlabel("microseconds a call")
    axes[0].set_ylabel("share of the calls")
    axes[1].legend(fontsize=6)
    save(figure, path)


def curve(timings: list[Timing]) -> list[float]:
    """Percentiles 0 .. 99, for the picture."""
    ns = sorted(int(v) for t in timings for v in t.ns)
    return [ns[(len(ns) - 1) * p // 100] / 1000 for p in range(100)]


def main() -> int:
    args = options(__doc__).parse_args()
    rounds = args.rounds or (6 if args.quick else 60)
    with workspace(args.dir) as folder:
        report = Report("append.py", machine(folder))
        curves: dict[str, dict[str, list[float]]] = {}
        plan = {
            "durable append": (1, 100, 0.93, 1.4),
            f"durable append_many({BATCH})": (BATCH, 30, 0.88, 2.5),
        }
        for title, (batch, count, raw_target, sqlite_target) in plan.items():
            results = durable(folder, batch, rounds, count)
            report_durable(report, title, results, raw_target, sqlite_target)
            curves[title] = {name: curve(timings) for name, timings in results.items()}
        report_buffered(report, buffered(folder, max(5, rounds // 3), 5_000))
    report.extra["curves"] = curves
    return finish(report, args, picture)


if __name__ == "__main__":
    sys.exit(main())
