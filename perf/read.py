"""What a read costs: by op, random and hot; iteration, checked; and how near the check is to memory.

One journal of a million live entries of 256 bytes, 2**20 slots, 16 MiB segments, warm. The absolute
figures stand beside calibration loops of the same interpreter, so that a slow machine shows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
from common import (
    MIB,
    PAYLOAD_BYTES,
    Report,
    check_segments,
    fill,
    finish,
    interleave,
    machine,
    map_segments,
    number,
    options,
    ratios,
    shuffled,
    workspace,
)
from raw import read_bandwidth

from mmapwal import Durability, Journal
from mmapwal._native import lib

SLOTS = 1 << 20
SEGMENT_BYTES = 16 * MIB
HOT_OPS = 64
READS = 50_000


def time_reads(call: Callable[[int], object], ops: Sequence[int]) -> float:
    """Nanoseconds a call; the loop is in it."""
    start = time.perf_counter_ns()
    for op in ops:
        call(op)
    return (time.perf_counter_ns() - start) / len(ops)


def time_iteration(iterate: Callable[[], object], count: int) -> float:
    """Entries a second, in the loop that a user would write."""
    start = time.perf_counter_ns()
    seen = 0
    for _ in iterate():  # type: ignore[attr-defined]
        seen += 1
    elapsed = time.perf_counter_ns() - start
    assert seen == count, f"{seen} entries instead of {count}"
    return seen * 1e9 / elapsed


def time_slices(count: int) -> float:
    view = memoryview(bytes(4096)).toreadonly()
    start = time.perf_counter_ns()
    for _ in range(count):
        view[256:512]
    return (time.perf_counter_ns() - start) / count


def time_empty_calls(count: int) -> float:
    call = lib.mw_crc32c_best
    start = time.perf_counter_ns()
    for _ in range(count):
        call()
    return (time.perf_counter_ns() - start) / count


def time_empty_loop(ops: Sequence[int]) -> float:
    start = time.perf_counter_ns()
    for _ in ops:
        pass
    return (time.perf_counter_ns() - start) / len(ops)


def check_content(journal: Journal, ops: Sequence[int]) -> None:
    """Fast and wrong would be no figure at all."""
    for op in ops[:1000]:
        assert int.from_bytes(journal.read(op)[:8], "little") == op


def measure(folder: Path, entries: int, rounds: int) -> dict[str, list[float]]:
    """All in turns. The ops of one round are not those of the one before."""
    path = folder / "journal"
    with Journal(path, slots=SLOTS, segment_bytes=SEGMENT_BYTES, durability=Durability.OS) as journal:
        fill(journal, entries)
    fresh = cycle([shuffled(1, entries, READS, seed) for seed in range(3 * (rounds + 1))])
    hot_ops = [1 + i % HOT_OPS for i in range(READS)]
    with Journal(path) as journal:
        check_content(journal, next(fresh))
        segments = map_segments(path)
        memory = np.ones(256 * MIB, np.uint8)
        contenders: dict[str, Callable[[], float]] = {
            "random": lambda: time_reads(journal.read, next(fresh)),
            "hot": partial(time_reads, journal.read, hot_ops),
            "get": lambda: time_reads(journal.get, next(fresh)),
            "copy": lambda: time_reads(journal.copy, next(fresh)),
            "payloads": partial(time_iteration, journal.payloads, entries),
            "entries": partial(time_iteration, journal.entries, entries),
            "slice": partial(time_slices, READS),
            "empty call": partial(time_empty_calls, READS),
            "empty loop": partial(time_empty_loop, hot_ops),
            "memory": partial(read_bandwidth, memory),
            "scan": partial(check_segments, segments),
            "mapped": lambda: float(np.mean([read_bandwidth(s) for s in segments])),
        }
        return interleave(contenders, rounds)


def main() -> int:
    args = options(__doc__).parse_args()
    entries = 100_000 if args.quick else 1_000_000
    rounds = args.rounds or (3 if args.quick else 9)
    with workspace(args.dir) as folder:
        report = Report("read.py", machine(folder))
        m = measure(folder, entries, rounds)
    report.add("read(op), random", m["random"], "ns", target=700, aim=550, at_least=False)
    report.add(f"read(op), hot ({HOT_OPS} ops)", m["hot"], "ns", aim=300, at_least=False)
    report.add("get(op), random", m["get"], "ns", at_least=False)
    report.add("copy(op), random, checked", m["copy"], "ns", at_least=False)
    million = {name: [v / 1e6 for v in m[name]] for name in ("payloads", "entries")}
    report.add("payloads(), checked", million["payloads"], "M/s", target=3, aim=4.5)
    report.add("entries(), checked", million["entries"], "M/s", target=1.2, aim=2)
    report.add("check in C / memory bandwidth", ratios(m["scan"], m["memory"]), aim=0.55)
    giga = {name: [v / 1e9 for v in m[name]] for name in ("scan", "memory", "mapped")}
    report.add("check of all frames in C", giga["scan"], "GB/s")
    report.add("calibration: memory, read once", giga["memory"], "GB/s")
    report.add("calibration: segment mappings, read once", giga["mapped"], "GB/s")
    report.add("calibration: slice of a memoryview", m["slice"], "ns", at_least=False)
    report.add("calibration: empty cffi call", m["empty call"], "ns", at_least=False)
    report.add("calibration: empty loop", m["empty loop"], "ns", at_least=False)
    floor = [a + b for a, b in zip(m["slice"], m["empty call"], strict=True)]
    report.add("read(op), random / (slice + empty call)", ratios(m["random"], floor))
    report.notes.append(f"{number(entries)} live entries of {PAYLOAD_BYTES} bytes, {SLOTS} slots")
    return finish(report, args)


if __name__ == "__main__":
    sys.exit(main())
