"""What following costs, and how soon one sees: readers in other processes, durable entries of 256 bytes.

How soon: from the return of an append to the moment at which the loop of a reader has the entry. What it
costs the writer: its durable appends with readers that follow, against none, taken in turn; and, as a measure
of what any work beside it costs, with a process that does nothing but give its processor back (sched_yield).
Catching up: follow() over what is there, against entries() over the same.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    PAYLOAD_BYTES,
    Report,
    bars,
    fill,
    finish,
    interleave,
    machine,
    make_room,
    options,
    random_bytes,
    rates,
    ratios,
    time_each,
    workspace,
)

from mmapwal import Journal

READERS = (0, 1, 4, 16)
LATENCY_US = 30.0
UNDISTURBED = 0.95
CATCH_UP = 1.0


def _follow(path: str, first: int, ready: Any, stop: Any, results: Any) -> None:
    """A reader's process: when it saw each entry."""
    clock = time.perf_counter_ns
    with Journal(path, readonly=True) as journal:
        entries = journal.follow(first, timeout=0.2)
        seen: list[int] = []
        ready.release()
        while not stop.is_set():
            for _ in entries:
                seen.append(clock())
        for _ in entries:
            seen.append(clock())
        results.put(seen)


def _idle(ready: Any, stop: Any) -> None:
    """A process that does nothing, but does not sleep."""
    ready.release()
    while not stop.is_set():
        os.sched_yield()


@contextmanager
def followers(path: Path, journal: Journal, count: int) -> Iterator[list[list[int]]]:
    """So many readers in processes of their own; behind the block, when each saw what was appended in it."""
    spawn = mp.get_context("spawn")
    ready, stop, results = spawn.Semaphore(0), spawn.Event(), spawn.Queue()
    first = (journal.last_op or 0) + 1
    args = (str(path), first, ready, stop, results)
    processes = [spawn.Process(target=_follow, args=args, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    seen: list[list[int]] = []
    try:
        yield seen
    finally:
        stop.set()
        seen.extend(results.get() for _ in processes)
        for process in processes:
            process.join()


def latency(path: Path, journal: Journal, count: int) -> list[float]:
    """Microseconds from the return of each append to its sight, one reader; it sleeps in between."""
    make_room(journal, count)
    payload = random_bytes(PAYLOAD_BYTES)
    clock, returned = time.perf_counter_ns, [0] * count
    with followers(path, journal, 1) as seen:
        for i in range(count):
            journal.append(payload)
            returned[i] = clock()
            time.sleep(0.0005)
    return [(saw - back) / 1000 for saw, back in zip(seen[0], returned, strict=True)]


def appends(path: Path, journal: Journal, readers: int, count: int) -> Any:
    make_room(journal, count)
    with followers(path, journal, readers) as seen:
        timing = time_each(journal.append, random_bytes(PAYLOAD_BYTES), count)
    if any(len(times) != count for times in seen):
        raise RuntimeError(f"{count} appended, {[len(times) for times in seen]} followed")
    return timing


def appends_beside_one_that_yields(journal: Journal, count: int) -> Any:
    make_room(journal, count)
    spawn = mp.get_context("spawn")
    ready, stop = spawn.Semaphore(0), spawn.Event()
    process = spawn.Process(target=_idle, args=(ready, stop), daemon=True)
    process.start()
    ready.acquire()
    timing = time_each(journal.append, random_bytes(PAYLOAD_BYTES), count)
    stop.set()
    process.join()
    return timing


def walk(entries: Any) -> float:
    """Entries a second."""
    start = time.perf_counter_ns()
    count = sum(1 for _ in entries)
    return count * 1e9 / (time.perf_counter_ns() - start)


def measure(report: Report, folder: Path, rounds: int, scale: int) -> None:
    with ExitStack() as stack:
        path = folder / "journal"
        journal = stack.enter_context(Journal(path, slots=1 << 18))
        lags = [latency(path, journal, 200 * scale) for _ in range(max(3, rounds // 2))]
        contenders = {str(n): partial(appends, path, journal, n, 300 * scale) for n in READERS}
        contenders["yields"] = partial(appends_beside_one_that_yields, journal, 300 * scale)
        timings = interleave(contenders, rounds)
        there = stack.enter_context(Journal(folder / "there", slots=1 << 18))
        fill(there, 50_000 * scale)
        reader = stack.enter_context(Journal(folder / "there", readonly=True))
        walks = {
            "entries()": lambda: walk(there.entries()),
            "follow()": lambda: walk(reader.follow(timeout=0)),
        }
        speeds = interleave(walks, rounds)
    medians = [float(np.median(lag)) for lag in lags]
    report.add("seen behind the append", medians, "us", target=LATENCY_US, at_least=False)
    for n in READERS[1:]:
        name = f"appends with {n} who follow{'s' if n == 1 else ''} / none"
        report.add(
            name,
            ratios(rates(timings[str(n)]), rates(timings[str(READERS[0])])),
            target=UNDISTURBED if n == 1 else None,
        )
    beside = ratios(rates(timings["yields"]), rates(timings[str(READERS[0])]))
    report.add("appends beside one that only yields / none", beside)
    report.add("catching up / entries()", ratios(speeds["follow()"], speeds["entries()"]), target=CATCH_UP)
    alone = [float(np.percentile(lag, 99)) for lag in lags]
    report.add("seen behind the append, p99", alone, "us", at_least=False)
    report.add("catching up", [s / 1e6 for s in speeds["follow()"]], "M/s")


def main() -> int:
    args = options(__doc__).parse_args()
    rounds = args.rounds or (3 if args.quick else 11)
    with workspace(args.dir) as folder:
        report = Report("follow.py", machine(folder))
        measure(report, folder, rounds, 1 if args.quick else 5)
    return finish(report, args, bars)


if __name__ == "__main__":
    sys.exit(main())
