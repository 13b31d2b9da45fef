"""How many states of a crashed disk a second are found, and how many of them a journal recovers from.

The life of a small journal, all in memory: appends, batches, rotations, removals, compactions. Its crashes
are explored with a check that does nothing, so that only finding and making the states is left, and with one
that opens the journal, reads and compares every entry, and closes it. No two states of a run are the same.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import Report, finish, interleave, machine, number, options, pyplot, save

from mmapwal import Durability, Journal
from mmapwal.testing import CrashDisk, CrashStats, assert_crash_safe

STATES = 20_000
RECOVERIES = 2_000
ROUNDS = 7
TARGET = 5_000  # a second, as they are found
SYNCED = "found, each append synced"
UNSYNCED = "found, much unsynced"
RECOVERED = "found, recovered, compared, closed"
TITLE = "distinct states a second"


def opened(disk: CrashDisk, durability: Durability = Durability.SYNC) -> Journal:
    return Journal("journal", storage=disk, slots=32, segment_bytes=16_384, durability=durability)


def payload(op: int) -> bytes:
    return b"%d" % op * (100 + op % 7 * 60)


def life(disk: CrashDisk, acknowledge: Callable[..., None], durability: Durability) -> None:
    """Ops from 1 on, without a gap below `removed`; tells what is acknowledged, and what may be removed."""
    with opened(disk, durability) as journal:
        for op in range(1, 41, 4):
            journal.append(payload(op))
            journal.append_many([payload(op + n) for n in (1, 2, 3)])
            if op % 12 == 1:
                journal.sync()
            acknowledge(("last", journal.last_op))
            if op % 8 == 5:
                acknowledge(("removed", op - 4))
                journal.set_snapshot_op(op - 4)
                journal.compact()


def recovered(disk: CrashDisk, acknowledged: Sequence[Any]) -> None:
    last, removed = (
        max((op for what, op in acknowledged if what == name), default=0) for name in ("last", "removed")
    )
    with opened(disk) as journal:
        found = {entry.op: bytes(entry.payload) for entry in journal}
    assert set(range(removed + 1, last + 1)) <= set(found)
    assert all(data == payload(op) for op, data in found.items())


class Run(NamedTuple):
    stats: CrashStats
    cpu_seconds: float


def explored(durability: Durability, check: Callable[..., object], states: int) -> Run:
    start = time.process_time()
    stats = assert_crash_safe(partial(life, durability=durability), check, max_states=states)
    return Run(stats, time.process_time() - start)


def report_all(report: Report, runs: dict[str, list[Run]]) -> None:
    for name, results in runs.items():
        rates = [run.stats.distinct / run.stats.seconds for run in results]
        report.add(name, rates, "/s", target=None if name == RECOVERED else TARGET)
    for name, results in runs.items():
        report.add(
            f"{name}, of the processor's time", [r.stats.distinct / r.cpu_seconds for r in results], "/s"
        )
    in_check = [run.stats.check_seconds / run.stats.seconds for run in runs[RECOVERED]]
    report.add("part of the time that recovering takes", in_check)
    report.notes.append(f"{TITLE}; of one run:")
    for name, results in runs.items():
        one = results[0].stats
        report.notes.append(
            f"  {name:36} {one.distinct:6,} distinct of {one.states:7,} looked at, at {one.points:4} places, "
            f"{one.exhaustive_points:3} of them wholly"
        )


def picture(report: Report, path: Path) -> None:
    """The rates, and the target of finding."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 1.8))
    rows = [report.row(name) for name in (RECOVERED, UNSYNCED, SYNCED)]
    for at, row in enumerate(rows):
        axes.barh(
            at, row.median, color="tab:red" if row.meets(row.target) is False else "tab:blue", alpha=0.7
        )
        axes.plot(row.spread, [at, at], color="black", linewidth=1)
        axes.text(0.02 * max(r.median for r in rows), at, number(row.median), va="center")
    axes.axvline(TARGET, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_xlabel(f"{TITLE}; the line: the target of finding them")
    axes.set_title(report.script, loc="left")
    save(figure, path)


def main() -> int:
    args = options(__doc__).parse_args()
    logging.getLogger("mmapwal").setLevel(logging.ERROR)  # of each recovery it tells
    scale = 10 if args.quick else 1

    def nothing(disk: CrashDisk, acknowledged: Sequence[Any]) -> None:
        pass

    report = Report("explore.py", machine(args.dir))
    contenders = {
        SYNCED: partial(explored, Durability.SYNC, nothing, STATES // scale),
        UNSYNCED: partial(explored, Durability.OS, nothing, STATES // scale),
        RECOVERED: partial(explored, Durability.SYNC, recovered, RECOVERIES // scale),
    }
    report_all(report, interleave(contenders, args.rounds or (3 if args.quick else ROUNDS)))
    return finish(report, args, picture)


if __name__ == "__main__":
    sys.exit(main())
