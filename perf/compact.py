"""How long compact() takes to drop a GiB of dead segments, and how long an append waits meanwhile.

A thread appends durably all the time: a second alone, then while the other thread compacts, then until
the files are gone, which compact() leaves to the background. Each round has a journal of its own.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import MIB, PAYLOAD_BYTES, Report, finish, machine, options, pyplot, random_bytes, save, workspace
from numpy.typing import NDArray

from mmapwal import Durability, Journal

ENTRY_BYTES = 4096
BATCH = 64
SEGMENT_BYTES = 16 * MIB
ROUNDS = 5
QUIET_S = 1.0


@dataclass(frozen=True)
class Round:
    """Milliseconds; `during` and `after` are the longest appends until compact() had returned and until
    the files were gone, `usual` is the p99 without a compaction before it."""

    compact: float
    gone: float
    usual: float
    alone: float
    during: float
    after: float
    freed: int


class Appender:
    """Appends until it is stopped, and knows when each append began and how long it took."""

    def __init__(self, journal: Journal) -> None:
        self._append: Callable[[bytes], int] = journal.append
        self._calls: list[tuple[int, int]] = []
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        payload, clock = random_bytes(PAYLOAD_BYTES), time.perf_counter_ns
        while not self._stop:
            before = clock()
            self._append(payload)
            self._calls.append((before, clock() - before))

    def stop(self) -> None:
        self._stop = True
        self._thread.join()

    def between(self, start_ns: int, end_ns: int) -> NDArray[np.float64]:
        """Milliseconds of the appends that were under way between two moments."""
        calls = np.array(self._calls, np.int64)
        under_way = (calls[:, 0] < end_ns) & (calls[:, 0] + calls[:, 1] > start_ns)
        milliseconds: NDArray[np.float64] = calls[under_way, 1] / 1e6
        return milliseconds


def fill(path: Path, slots: int, dead_bytes: int) -> int:
    """A closed journal with so many bytes; the last op."""
    batch = [random_bytes(ENTRY_BYTES)] * BATCH
    with Journal(path, slots=slots, segment_bytes=SEGMENT_BYTES, durability=Durability.OS) as journal:
        while journal.written_lsn < dead_bytes + SEGMENT_BYTES:
            journal.append_many(batch)
        return journal.last_op or 0


def measure(path: Path, dead_bytes: int) -> Round:
    slots = 1 << (dead_bytes // ENTRY_BYTES).bit_length()
    last = fill(path, slots, dead_bytes)
    clock = time.perf_counter_ns
    with Journal(path) as journal:
        for payload in journal.payloads():  # every segment is mapped, and in the page cache
            assert len(payload) == ENTRY_BYTES
        del payload
        journal.set_snapshot_op(last)
        appender = Appender(journal)
        try:
            time.sleep(0.3)
            quiet = clock()
            time.sleep(QUIET_S)
            start = clock()
            freed = journal.compact()
            returned = clock()
            journal.compact(wait=True)
            gone = clock()
            time.sleep(0.1)
        finally:
            appender.stop()
    shutil.rmtree(path)
    alone, during = appender.between(quiet, start), appender.between(start, returned)
    return Round(
        (returned - start) / 1e6, (gone - start) / 1e6, float(np.percentile(alone, 99)), float(alone.max()),
        float(during.max()), float(appender.between(returned, gone).max()), freed,
    )  # fmt: skip


def report_all(report: Report, rounds: list[Round]) -> None:
    def add(name: str, values: list[float], target: float | None = None) -> None:
        report.add(name, values, "ms", target=target, at_least=False)

    add("compact()", [r.compact for r in rounds], 100)
    add("longest append meanwhile, above the usual p99", [r.during - r.usual for r in rounds], 5)
    add("until the files are gone", [r.gone for r in rounds])
    add("longest append until then, above the usual p99", [r.after - r.usual for r in rounds])
    add("calibration: longest append of a second alone, above p99", [r.alone - r.usual for r in rounds])
    add("calibration: p99 of appends alone", [r.usual for r in rounds])
    report.notes.append(
        f"{rounds[0].freed // MIB:,} MiB dead in segments of {SEGMENT_BYTES // MIB} MiB, mapped and cached"
    )


def picture(report: Report, path: Path) -> None:
    """The rounds side by side: compact(), and the longest appends."""
    plt = pyplot()
    rows = [r for r in report.rows if not r.name.startswith("until")]
    figure, axes = plt.subplots(figsize=(7, 2.6))
    for at, row in enumerate(reversed(rows)):
        axes.plot(row.samples, [at] * len(row.samples), "o", alpha=0.5)
        if row.bound is not None:
            axes.plot([row.bound], [at], "|", color="black", markersize=16)
    axes.set_yticks(range(len(rows)), [r.name for r in reversed(rows)])
    axes.set_xlabel("ms, a point a round; |: the target")
    axes.set_xscale("symlog")
    axes.set_title("compact.py", loc="left")
    save(figure, path)


def main() -> int:
    args = options(__doc__).parse_args()
    with workspace(args.dir) as folder:
        report = Report("compact.py", machine(folder))
        dead = (128 if args.quick else 1024) * MIB
        rounds = [measure(folder / f"journal{n}", dead) for n in range(args.rounds or ROUNDS)]
    report_all(report, rounds)
    return finish(report, args, picture)


if __name__ == "__main__":
    sys.exit(main())
