"""What group commit gains: 1 .. 16 threads, one durable entry of 256 bytes a call each.

Against the journal with one thread, against the raw C loop that writes one at a time, and against a plain
leader with followers in C with as many threads, in C and called from Python. Then with one more thread that
keeps the interpreter busy: against the same journal whose leader goes back to Python for its write. What
others make of one turn of the interpreter a call is beside it: that plain group commit, a sleep, and the
journal when its caller does not let go of the interpreter at once.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    MIB,
    PAYLOAD_BYTES,
    Report,
    SqliteLog,
    band,
    finish,
    frame_bytes,
    interleave,
    machine,
    options,
    pyplot,
    random_bytes,
    rates,
    ratios,
    save,
    time_each,
    workspace,
)
from raw import Method, Timing, raw_file
from typing_extensions import Buffer

from mmapwal import Journal, Storage, SyncMethod, SystemDirectory

THREADS = (1, 2, 4, 8, 16)
RAW, SQLITE = "raw C, one at a time", "sqlite3, one thread"
FROM_PYTHON = (8, 16)  # threads that call the plain group commit
BUSY = FROM_PYTHON  # beside one more that burns the interpreter
BUSY_CALLS = {
    "group": "of the same group commit",
    "sleep": "that sleep",
    "held": "that hold on to it for 100 µs",
}
SLEEP_S = 100e-6  # as long as a commit
HOLD_NS = 100_000  # longer than the busy thread takes to wake up and to queue behind the others
# against one thread of its own; against the plain group commit in C; against sqlite3
TARGETS: dict[int, tuple[float | None, float | None, float | None]] = {
    1: (None, None, None),
    2: (None, None, None),
    4: (2.0, 1.10, 2.5),
    8: (None, 1.0, None),
    16: (5.0, 1.0, None),
}


def thread_round(append: Callable[[bytes], object], payload: bytes, threads: int, count: int) -> Timing:
    """Each thread appends `count` entries; from the first start to the last end."""
    ns = np.zeros((threads, count), np.uint64)
    spans: list[tuple[int, int]] = [(0, 0)] * threads
    errors: list[BaseException] = []
    start = threading.Barrier(threads)

    def work(who: int) -> None:
        try:
            start.wait()
            from_ns = time.perf_counter_ns()
            ns[who] = time_each(append, payload, count).ns
            spans[who] = (from_ns, time.perf_counter_ns())
        except Exception as e:  # noqa: BLE001  # raised below, in the thread that can be seen
            errors.append(e)
            start.abort()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return Timing(ns.ravel(), max(to for _, to in spans) - min(at for at, _ in spans))


class PythonFile:
    """A segment that is written through Python code, as any storage of a user's own is."""

    def __init__(self, file: Storage) -> None:
        self._file = file

    def __len__(self) -> int:
        return len(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write_sync_at(self, offset: int, data: Buffer) -> int:
        return self._file.write_sync_at(offset, data)


class PythonDirectory(SystemDirectory):
    """Whoever leads a commit has to come back to the interpreter for the write."""

    def open(
        self, name: str, *, writable: bool = False, sync_method: SyncMethod = SyncMethod.FDATASYNC
    ) -> Storage:
        file = super().open(name, writable=writable, sync_method=sync_method)
        return PythonFile(file) if writable and name.startswith("segment") else file


@contextmanager
def burning() -> Iterator[None]:
    """A thread that gives the interpreter away only when it is asked to."""
    stop = False

    def burn() -> None:
        while not stop:
            sum(range(100))

    thread = threading.Thread(target=burn)
    thread.start()
    try:
        yield
    finally:
        stop = True
        thread.join()


def busy_round(append: Callable[[bytes], object], payload: bytes, threads: int, count: int) -> Timing:
    with burning():
        return thread_round(append, payload, threads, count)


def asleep(_: bytes) -> None:
    time.sleep(SLEEP_S)


def held(append: Callable[[bytes], object], payload: bytes) -> None:
    """The busy thread wakes up meanwhile, finds the interpreter taken, and queues. Else it takes it back
    as soon as it is free: before the next one in the queue is awake."""
    append(payload)
    until = time.perf_counter_ns() + HOLD_NS
    while time.perf_counter_ns() < until:
        pass


def measure(folder: Path, rounds: int, count: int) -> dict[str, list[Timing]]:
    payload = random_bytes(PAYLOAD_BYTES)
    frame = random_bytes(frame_bytes(PAYLOAD_BYTES))
    with ExitStack() as stack:
        raw = stack.enter_context(raw_file(folder / "raw", Method.FDATASYNC, 32 * MIB))
        group = stack.enter_context(raw_file(folder / "group", Method.RWF_DSYNC, 32 * MIB))
        journal = stack.enter_context(Journal(folder / "journal", slots=1 << 20))
        sqlite = stack.enter_context(closing(SqliteLog(folder / "sqlite")))
        contenders: dict[str, Callable[[], Timing]] = {RAW: partial(raw.run, frame, count)}
        for n in THREADS:
            contenders[f"journal {n}"] = partial(thread_round, journal.append, payload, n, count)
            contenders[f"group {n}"] = partial(group.run_group, frame, n, count)
        called = {n: stack.enter_context(group.group(frame, n)) for n in FROM_PYTHON}
        for n in FROM_PYTHON:
            contenders[f"group from Python {n}"] = partial(thread_round, called[n], payload, n, count)
        contenders[SQLITE] = partial(time_each, sqlite.append, payload, count)
        storage = PythonDirectory(folder / "python")
        python = stack.enter_context(Journal(folder / "python", slots=1 << 20, storage=storage))
        few = max(5, count // 20)  # a turn of the interpreter takes 5 ms
        for n in BUSY:
            contenders[f"busy {n}"] = partial(busy_round, journal.append, payload, n, few)
            contenders[f"busy python {n}"] = partial(busy_round, python.append, payload, n, few)
            contenders[f"busy group {n}"] = partial(busy_round, called[n], payload, n, few)
            contenders[f"busy sleep {n}"] = partial(busy_round, asleep, payload, n, few)
            contenders[f"busy held {n}"] = partial(busy_round, partial(held, journal.append), payload, n, few)
        return interleave(contenders, rounds)


def picture(report: Report, path: Path) -> None:
    """Entries a second by threads."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5.5, 3.4))
    for kind, label in (("journal", "mmapwal, Python threads"), ("group", "plain leader and followers, C")):
        values = [report.extra["rates"][f"{kind} {n}"] for n in THREADS]
        band(axes, THREADS, values, label)
    for name, style in ((RAW, "--"), (SQLITE, ":")):
        axes.axhline(np.median(report.extra["rates"][name]), color="black", linestyle=style, lw=1, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(THREADS, [str(n) for n in THREADS])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("threads, one durable entry of 256 bytes a call each")
    axes.set_ylabel("entries a second")
    axes.legend(fontsize=7)
    save(figure, path)


def main() -> int:
    args = options(__doc__).parse_args()
    rounds = args.rounds or (4 if args.quick else 25)
    with workspace(args.dir) as folder:
        report = Report("threads.py", machine(folder))
        results = measure(folder, rounds, 60 if args.quick else 100)
    rate = {name: rates(timings) for name, timings in results.items()}
    for n in THREADS:
        own, plain, sqlite = TARGETS[n]
        mine = rate[f"journal {n}"]
        threads = f"{n} threads" if n > 1 else "one thread"
        if n > 1:
            report.add(f"{threads} / one thread", ratios(mine, rate["journal 1"]), target=own)
        report.add(f"{threads} / {RAW}", ratios(mine, rate[RAW]))
        python = f"calibration: {threads} of the same group commit called from Python / that in C"
        limit = python if n in FROM_PYTHON else None
        over = ratios(mine, rate[f"group {n}"])
        report.add(f"{threads} / plain group commit in C", over, target=plain, limit=limit)
        if n in FROM_PYTHON:
            called = rate[f"group from Python {n}"]
            report.add(python, ratios(called, rate[f"group {n}"]))
            report.add(f"{threads} / the same group commit called from Python", ratios(mine, called))
        report.add(f"{threads} / {SQLITE}", ratios(mine, rate[SQLITE]), target=sqlite)
    for n in BUSY:
        names = {
            kind: f"calibration: {n} threads {what} and a busy interpreter / led from Python"
            for kind, what in BUSY_CALLS.items()
        }
        name = f"{n} threads and a busy interpreter / the same led from Python"
        led = rate[f"busy python {n}"]
        report.add(name, ratios(rate[f"busy {n}"], led), target=2.5, limit=names["sleep"])
        for kind, name in names.items():
            report.add(name, ratios(rate[f"busy {kind} {n}"], led))
    report.add_latencies("entries a second, and microseconds a call:", results)
    return finish(report, args, picture)


if __name__ == "__main__":
    sys.exit(main())
