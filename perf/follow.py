"""What following costs, and how soon one sees: readers in other processes, durable entries of 256 bytes.

How soon: from the return of an append to the moment at which the loop of a reader has the entry; and, as a
measure of what the machine needs for it, the moment at which a reader runs that only waits, and looks at
nothing. What it costs the writer: its durable appends with readers that follow, against none, in short
turns, so that what the disk does meanwhile falls on both; and, as a measure of what any work beside it
costs, with a process that only gives its processor back (sched_yield). Catching up: follow() over what is
there, against entries() over the same.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
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
    ratios,
    time_each,
    workspace,
)

from mmapwal import Journal
from mmapwal._native import ffi, lib
from mmapwal.observer import LOOK_S

READERS = (0, 1, 4, 16)
YIELDS = "yields"
TURN = 150  # appends: the disk is about the same all the time that one round of turns takes
TURNS = 10  # of each contender in a round
SETTLE_S = 0.002  # who was told to begin has begun
LATENCY_US = 30.0
UNDISTURBED = 0.95
CATCH_UP = 1.0

Pipe = Any  # multiprocessing's Connection: between processes that are spawned


def _follow(pipe: Pipe, path: str) -> None:
    """A reader's process: when it saw each of so many entries from an op on. Between two turns it sleeps."""
    clock = time.perf_counter_ns
    with Journal(path, readonly=True) as journal:
        pipe.send(None)
        for first, count in iter(pipe.recv, None):
            pipe.send(None)
            pipe.send([clock() for _ in islice(journal.follow(first), count)])


def _wake(pipe: Pipe, path: str) -> None:
    """A process that only waits as a follower does: when it ran again after each of so many appends."""
    clock, wait = time.perf_counter_ns, lib.mw_follow_wait
    timeout_ns = int(LOOK_S * 1e9)
    with Journal(path, readonly=True) as journal:
        pipe.send(None)
        for _, count in iter(pipe.recv, None):
            page = journal._engine.follow_page()
            assert page is not None
            pipe.send(None)
            word = page.word()
            woken: list[int] = []
            while len(woken) < count:
                wait(page.native, word, timeout_ns, 0, 1, ffi.NULL)
                now, seen = clock(), word
                word = page.word()
                if word != seen:
                    woken.append(now)
            pipe.send(woken)


def _yield(pipe: Pipe, _path: str) -> None:
    """A process that does nothing, but does not sleep while it is its turn."""
    pipe.send(None)
    for _ in iter(pipe.recv, None):
        pipe.send(None)
        while not pipe.poll():
            for _ in range(64):
                os.sched_yield()
        pipe.recv()


@contextmanager
def processes(work: Callable[[Pipe, str], None], path: Path, count: int) -> Iterator[list[Pipe]]:
    """So many that wait for their turn; None ends them."""
    spawn = mp.get_context("spawn")
    ends = [spawn.Pipe() for _ in range(count)]
    started = [spawn.Process(target=work, args=(theirs, str(path)), daemon=True) for _, theirs in ends]
    for process in started:
        process.start()
    pipes = [ours for ours, _ in ends]
    for pipe in pipes:
        pipe.recv()
    yield pipes
    for pipe, process in zip(pipes, started, strict=True):
        pipe.send(None)
        process.join()


def begin(pipes: Sequence[Pipe], turn: object) -> None:
    for pipe in pipes:
        pipe.send(turn)
    for pipe in pipes:
        pipe.recv()
    time.sleep(SETTLE_S)


def latency(journal: Journal, reader: Pipe, count: int) -> list[float]:
    """Microseconds from the return of each append to its sight, one reader; it sleeps in between."""
    make_room(journal, count)
    payload = random_bytes(PAYLOAD_BYTES)
    clock, returned = time.perf_counter_ns, [0] * count
    begin([reader], ((journal.last_op or 0) + 1, count))
    for i in range(count):
        journal.append(payload)
        returned[i] = clock()
        time.sleep(0.0005)
    return [(saw - back) / 1000 for saw, back in zip(reader.recv(), returned, strict=True)]


def appends(journal: Journal, readers: Sequence[Pipe]) -> float:
    """Appends a second of one turn."""
    make_room(journal, TURN)
    begin(readers, ((journal.last_op or 0) + 1, TURN))
    rate = time_each(journal.append, random_bytes(PAYLOAD_BYTES), TURN).rate
    if any(len(reader.recv()) != TURN for reader in readers):
        raise RuntimeError("a reader has not seen all")
    return rate


def appends_beside(journal: Journal, busy: Sequence[Pipe]) -> float:
    make_room(journal, TURN)
    begin(busy, True)
    rate = time_each(journal.append, random_bytes(PAYLOAD_BYTES), TURN).rate
    for pipe in busy:
        pipe.send(False)
    return rate


def walk(entries: Any) -> float:
    """Entries a second."""
    start = time.perf_counter_ns()
    count = sum(1 for _ in entries)
    return count * 1e9 / (time.perf_counter_ns() - start)


def medians(samples: Sequence[Sequence[float]]) -> list[float]:
    return [float(np.median(sample)) for sample in samples]


def measure(report: Report, folder: Path, rounds: int, scale: int) -> None:
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(folder / "journal", slots=1 << 18))
        readers = stack.enter_context(processes(_follow, folder / "journal", max(READERS)))
        busy = stack.enter_context(processes(_yield, folder / "journal", 1))
        waits = stack.enter_context(processes(_wake, folder / "journal", 1))
        lags = interleave(
            {
                name: partial(latency, journal, reader, 200 * scale)
                for name, reader in (("follows", readers[0]), ("waits", waits[0]))
            },
            max(3, rounds // 2),
        )
        contenders = {str(n): partial(appends, journal, readers[:n]) for n in READERS}
        contenders[YIELDS] = partial(appends_beside, journal, busy)
        turns = interleave(contenders, rounds * TURNS)
        there = stack.enter_context(Journal(folder / "there", slots=1 << 18))
        fill(there, 50_000 * scale)
        reader = stack.enter_context(Journal(folder / "there", readonly=True))
        walks = {
            "entries()": lambda: walk(there.entries()),
            "follow()": lambda: walk(reader.follow(timeout=0)),
        }
        speeds = interleave(walks, rounds)
    woken = "calibration: woken behind the append, who only waits"
    seen = medians(lags["follows"])
    report.add("seen behind the append", seen, "us", target=LATENCY_US, at_least=False, limit=woken)
    report.add(woken, medians(lags["waits"]), "us", at_least=False)
    yields = "calibration: appends beside one that only yields / none"
    for n in READERS[1:]:
        name = f"appends with {n} who follow{'s' if n == 1 else ''} / none"
        target, limit = (UNDISTURBED, yields) if n == 1 else (None, None)
        report.add(name, ratios(turns[str(n)], turns["0"]), target=target, limit=limit)
    report.add(yields, ratios(turns[YIELDS], turns["0"]))
    report.add("catching up / entries()", ratios(speeds["follow()"], speeds["entries()"]), target=CATCH_UP)
    alone = [float(np.percentile(lag, 99)) for lag in lags["follows"]]
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
