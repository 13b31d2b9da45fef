"""What a read costs: by op, random and hot; iteration, columns and arrays, all checked; how near the check
is to memory; and lmdb beside it, with the same ops and payloads, unchecked.

One journal of a million live entries of 256 bytes, 2**20 slots, 16 MiB segments, warm. The absolute
figures stand beside calibration loops of the same interpreter, so that a slow machine shows.
"""

from __future__ import annotations

import importlib
import mmap
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import count as counting
from itertools import cycle, repeat
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    MIB,
    PAYLOAD_BYTES,
    Report,
    check_segments,
    fill,
    finish,
    frame_bytes,
    interleave,
    machine,
    map_segments,
    number,
    numbered_payloads,
    options,
    ratios,
    shuffled,
    workspace,
)
from raw import read_bandwidth

from mmapwal import Durability, Journal
from mmapwal._native import lib
from mmapwal.columns import Collection
from mmapwal.format import FRAME_BYTES
from mmapwal.reader import COLUMN_ROWS
from mmapwal.threads import SecondThread

SLOTS = 1 << 20
SEGMENT_BYTES = 16 * MIB
HOT_OPS = 64
READS = 50_000


def time_reads(call: Callable[[Any], object], ops: Sequence[Any]) -> float:
    """Nanoseconds a call; the loop is in it."""
    start = time.perf_counter_ns()
    for op in ops:
        call(op)
    return (time.perf_counter_ns() - start) / len(ops)


def time_iteration(iterate: Callable[[], Iterable[object]], count: int) -> float:
    """Entries a second, in the loop that a user would write."""
    start = time.perf_counter_ns()
    seen = 0
    for _ in iterate():
        seen += 1
    elapsed = time.perf_counter_ns() - start
    assert seen == count, f"{seen} entries instead of {count}"
    return seen * 1e9 / elapsed


def time_whole(call: Callable[[], Any], count: int, *, parts: bool = False) -> float:
    """Entries a second of one call that gives them all; or an iterator of arrays."""
    start = time.perf_counter_ns()
    found = call()
    seen = sum(map(len, found)) if parts else len(found)
    elapsed = time.perf_counter_ns() - start
    assert seen == count, f"{seen} entries instead of {count}"
    return seen * 1e9 / elapsed


def least_read(journal: Journal) -> Callable[[int], memoryview]:
    """The least that a read by op has to do in the interpreter, if all lay in one segment that never goes:
    the loads of its slot, which tell that it is that op's and that nothing took its place meanwhile, and a
    slice."""
    slots, lsns, ops, lengths, *_ = journal._reader.plain
    view = memoryview(mmap.mmap(-1, 1 << 30)).toreadonly()

    def read(op: int) -> memoryview:
        slot = op % slots
        lsn = lsns[slot]
        if ops[slot] == op:
            length = lengths[slot]
            if lsns[slot] == lsn:
                start = lsn + FRAME_BYTES
                return view[start : start + length]
        raise LookupError(op)

    return read


def least_read_of_segments(journal: Journal) -> Callable[[int], memoryview]:
    """The same with the least that tells which segment it is: a dict by the upper bits of an LSN."""
    slots, lsns, ops, lengths, *_ = journal._reader.plain
    view = memoryview(mmap.mmap(-1, 1 << 30)).toreadonly()
    segments = dict.fromkeys(range(64), (view, -FRAME_BYTES))

    def read(op: int) -> memoryview:
        slot = op % slots
        lsn = lsns[slot]
        if ops[slot] == op:
            length = lengths[slot]
            view, shift = segments[lsn >> 24]
            if lsns[slot] == lsn:
                start = lsn - shift
                return view[start : start + length]
        raise LookupError(op)

    return read


def slices_of_one_segment(count: int) -> Iterator[memoryview]:
    """What payloads() has to make, once it knows where."""
    view = memoryview(bytes(MIB)).toreadonly()
    stride = frame_bytes(PAYLOAD_BYTES)
    made = [slice(at, at + PAYLOAD_BYTES) for at in range(0, MIB - stride, stride)]
    cut: Any = getitem
    return map(cut, repeat(view, count), cycle(made))


def time_gathering(journal: Journal, count: int) -> float:
    """Entries a second of what columns(), arrays() and payloads() begin with: found and checked, in C."""
    start = time.perf_counter_ns()
    seen = sum(chunk.rows for chunk in journal._reader.chunks(None, None, verify=True))
    elapsed = time.perf_counter_ns() - start
    assert seen == count, f"{seen} entries instead of {count}"
    return seen * 1e9 / elapsed


def time_writing(count: int) -> float:
    """Entries a second of what columns() has to give besides: fresh memory of 46 bytes a row, written by two
    threads, a chunk at a time."""
    start = time.perf_counter_ns()
    columns = [c for c in vars(Collection(count)._whole).values() if isinstance(c, np.ndarray)]

    def write(first: int, end: int) -> None:
        for at in range(first, end, COLUMN_ROWS):
            for column in columns:
                column[at : min(at + COLUMN_ROWS, end)] = 1

    with SecondThread("perf") as second:
        other = second.submit(write, count // 2, count)
        write(0, count // 2)
        other.result()
    return count * 1e9 / (time.perf_counter_ns() - start)


class Lmdb:
    """The same payloads under the same ops, read in one long transaction, without copies."""

    def __init__(self, path: Path, entries: int) -> None:
        lmdb = importlib.import_module("lmdb")
        self._env = lmdb.open(str(path), map_size=4 << 30, sync=False, subdir=False)
        with self._env.begin(write=True) as txn:
            for first in range(1, entries + 1, 1000):
                payloads = numbered_payloads(first, min(1000, entries + 1 - first))
                for op, payload in enumerate(payloads, first):
                    txn.put(op.to_bytes(8, "big"), payload, append=True)
        self._txn = self._env.begin(buffers=True)

    def time_reads(self, ops: Sequence[int]) -> float:
        """As time_reads(); the keys are made before the clock starts."""
        return time_reads(self._txn.get, [op.to_bytes(8, "big") for op in ops])

    def cursor(self) -> Any:
        return self._txn.cursor()

    def close(self) -> None:
        self._txn.abort()
        self._env.close()


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
    seeds = counting()
    hot_ops = [1 + i % HOT_OPS for i in range(READS)]

    def fresh() -> list[int]:
        return shuffled(1, entries, READS, next(seeds))

    with Journal(path) as journal, closing(Lmdb(folder / "lmdb", entries)) as peer:
        check_content(journal, fresh())
        least, least_of_segments = least_read(journal), least_read_of_segments(journal)
        segments = map_segments(path)
        memory = np.ones(256 * MIB, np.uint8)
        contenders: dict[str, Callable[[], float]] = {
            "random": lambda: time_reads(journal.read, fresh()),
            "lmdb random": lambda: peer.time_reads(fresh()),
            "hot": partial(time_reads, journal.read, hot_ops),
            "lmdb hot": partial(peer.time_reads, hot_ops),
            "get": lambda: time_reads(journal.get, fresh()),
            "copy": lambda: time_reads(journal.copy, fresh()),
            "payloads": partial(time_iteration, journal.payloads, entries),
            "lmdb cursor": partial(time_iteration, peer.cursor, entries),
            "entries": partial(time_iteration, journal.entries, entries),
            "columns": partial(time_whole, journal.columns, entries),
            "arrays": partial(time_whole, journal.arrays, entries, parts=True),
            "headers": partial(time_whole, journal.headers, entries),
            "gathering": partial(time_gathering, journal, entries),
            "writing": partial(time_writing, entries),
            "least": lambda: time_reads(least, fresh()),
            "least hot": partial(time_reads, least, hot_ops),
            "slices": partial(time_iteration, partial(slices_of_one_segment, entries), entries),
            "least of segments": lambda: time_reads(least_of_segments, fresh()),
            "slice": partial(time_slices, READS),
            "empty call": partial(time_empty_calls, READS),
            "empty loop": partial(time_empty_loop, hot_ops),
            "memory": partial(read_bandwidth, memory),
            "scan": partial(check_segments, segments),
            "mapped": lambda: float(np.mean([read_bandwidth(s) for s in segments])),
        }
        return interleave(contenders, rounds)


def frame_rate(scanned: Sequence[float]) -> list[float]:
    """Entries a second of the check in C, of its bytes a second."""
    return [v / frame_bytes(PAYLOAD_BYTES) for v in scanned]


def main() -> int:
    args = options(__doc__).parse_args()
    entries = 100_000 if args.quick else 1_000_000
    rounds = args.rounds or (3 if args.quick else 9)
    with workspace(args.dir) as folder:
        report = Report("read.py", machine(folder))
        m = measure(folder, entries, rounds)
    one = "calibration: a read if all lay in one segment"
    told = "calibration: the same and a dict that tells the segment / lmdb get"
    made = "calibration: frames only checked and slices only made / lmdb cursor"
    hot = f"hot ({HOT_OPS} ops)"
    random, hottest = f"{one}, random", f"{one}, {hot}"
    report.add("read(op), random", m["random"], "ns", target=550, at_least=False, limit=random)
    report.add(f"read(op), {hot}", m["hot"], "ns", target=300, at_least=False, limit=hottest)
    report.add("lmdb get, buffers=True, random", m["lmdb random"], "ns", at_least=False)
    report.add(f"lmdb get, buffers=True, {hot}", m["lmdb hot"], "ns", at_least=False)
    against = ratios(m["random"], m["lmdb random"])
    report.add("read(op) / lmdb get, random", against, target=0.35, at_least=False, limit=told)
    report.add("get(op), random", m["get"], "ns", at_least=False)
    report.add("copy(op), random, checked", m["copy"], "ns", at_least=False)
    iterated = ("payloads", "entries", "lmdb cursor", "columns", "arrays", "headers")
    million = {name: [v / 1e6 for v in m[name]] for name in iterated}
    report.add("payloads(), checked", million["payloads"], "M/s", target=4.5)
    report.add("lmdb cursor, unchecked", million["lmdb cursor"], "M/s")
    cursor = ratios(m["payloads"], m["lmdb cursor"])
    report.add("payloads() / lmdb cursor", cursor, target=2, limit=made)
    report.add("entries(), checked", million["entries"], "M/s", target=2)
    report.add("columns(), checked", million["columns"], "M/s")
    report.add("arrays(), checked", million["arrays"], "M/s")
    report.add("headers(), copied", million["headers"], "M/s")
    check = frame_rate(m["scan"])
    report.add("arrays() / check in C", ratios(m["arrays"], check))
    report.add("columns() / check in C", ratios(m["columns"], check))
    report.add("calibration: rows gathered in C / check in C", ratios(m["gathering"], check))
    report.add("calibration: columns only written / check in C", ratios(m["writing"], check))
    report.add("check in C / memory bandwidth", ratios(m["scan"], m["memory"]), target=0.55)
    giga = {name: [v / 1e9 for v in m[name]] for name in ("scan", "memory", "mapped")}
    report.add("check of all frames in C", giga["scan"], "GB/s")
    report.add("calibration: memory, read once", giga["memory"], "GB/s")
    report.add("calibration: segment mappings, read once", giga["mapped"], "GB/s")
    report.add(random, m["least"], "ns", at_least=False)
    report.add(hottest, m["least hot"], "ns", at_least=False)
    report.add(f"{one} / lmdb get", ratios(m["least"], m["lmdb random"]), at_least=False)
    report.add(told, ratios(m["least of segments"], m["lmdb random"]), at_least=False)
    least = [1 / (1 / a + 1 / b) for a, b in zip(check, m["slices"], strict=True)]
    report.add(made, ratios(least, m["lmdb cursor"]))
    report.add("calibration: slice of a memoryview", m["slice"], "ns", at_least=False)
    report.add("calibration: empty cffi call", m["empty call"], "ns", at_least=False)
    report.add("calibration: empty loop", m["empty loop"], "ns", at_least=False)
    floor = [a + b for a, b in zip(m["slice"], m["empty call"], strict=True)]
    report.add("read(op), random / (slice + empty call)", ratios(m["random"], floor))
    report.notes.append(f"{number(entries)} live entries of {PAYLOAD_BYTES} bytes, {SLOTS} slots")
    return finish(report, args)


if __name__ == "__main__":
    sys.exit(main())
