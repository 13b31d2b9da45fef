"""What a journal costs as it grows: appends, reads and the process's own memory with 1 M live entries
and with 10 M, in turns. Memory is what is private to the process; the page cache is not in it."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from common import (
    MIB,
    Report,
    finish,
    interleave,
    machine,
    number,
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

from mmapwal import Durability, Journal

PAYLOAD_BYTES = 64
BATCH = 1024
APPENDS = 300  # a round
READS = 20_000
ROUNDS = 20

# In a process of its own: opens, appends, reads, and says what it has that is no file's.
CHILD = """
import random, sys
import psutil
from mmapwal import Journal
with Journal(sys.argv[1]) as journal:
    ops = random.Random(1).sample(range(1, journal.last_op), 20_000)
    for op in ops:
        journal.read(op)
    for _ in range(100):
        journal.append(bytes(64))
    memory = psutil.Process().memory_info()
    print(memory.rss - memory.shared)
"""


class Size(NamedTuple):
    """A journal of one size."""

    path: Path
    entries: int
    private_mib: float


def fill(path: Path, entries: int) -> Size:
    payloads = [random_bytes(PAYLOAD_BYTES)] * BATCH
    slots = 1 << (entries + ROUNDS * APPENDS * 10).bit_length()
    with Journal(path, slots=slots, durability=Durability.BUFFERED) as journal:
        for _ in range(-(-entries // BATCH)):
            journal.append_many(payloads)
    child = [sys.executable, "-c", CHILD, str(path)]
    private = int(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    return Size(path, entries, private / MIB)


def measure(report: Report, small: Size, large: Size, rounds: int) -> None:
    names = {s: f"{s.entries:,}" for s in (small, large)}
    with Journal(small.path) as one, Journal(large.path) as other:
        journals = {small: one, large: other}
        rng, payload = random.Random(2), random_bytes(PAYLOAD_BYTES)
        for size, journal in journals.items():  # every page of index and segments is there
            for _ in journal.payloads():
                pass
            report.notes.append(f"{names[size]} entries: {journal.stats().segments} segments")

        def read(size: Size) -> float:
            ops = iter([rng.randrange(1, size.entries) for _ in range(READS)])
            call = journals[size].read
            return time_all(lambda _: call(next(ops)), None, READS)

        reads = interleave({"small": lambda: read(small), "large": lambda: read(large)}, rounds)
        appends = interleave(
            {
                "small": lambda: time_each(one.append, payload, APPENDS),
                "large": lambda: time_each(other.append, payload, APPENDS),
            },
            rounds,
        )
    slower = ratios(rates(appends["small"]), rates(appends["large"]))
    report.add("time of a durable append, large / small", slower, target=1.2, at_least=False)
    ratio = ratios(reads["large"], reads["small"])
    report.add("read(op), random, large / small", ratio, target=1.5, at_least=False)
    for name, size in (("small", small), ("large", large)):
        report.add(f"read(op), random, {names[size]}", reads[name], "ns")
        report.add(f"private memory, {names[size]}", [size.private_mib], "MiB")
        tails = percentiles(appends[name])
        cells = "  ".join(f"{k} {number(v)}" for k, v in tails.items())
        report.notes.append(f"{names[size]} entries, durable append, microseconds: {cells}")
    grown = large.private_mib / small.private_mib
    report.add("private memory, large / small", [grown], target=1.2, at_least=False)


def picture(report: Report, path: Path) -> None:
    """The ratios, round by round."""
    plt = pyplot()
    rows = [r for r in report.rows if r.bound is not None]
    figure, axes = plt.subplots(figsize=(7, 2))
    for at, row in enumerate(reversed(rows)):
        axes.plot(row.samples, [at] * len(row.samples), "o", alpha=0.5)
        axes.plot([row.bound], [at], "|", color="black", markersize=16)
    axes.set_yticks(range(len(rows)), [r.name for r in reversed(rows)])
    axes.set_xlabel("cost with ten times as many entries, a point a round; |: the target")
    axes.set_title("scale.py", loc="left")
    save(figure, path)


def main() -> int:
    args = options(__doc__).parse_args()
    entries = 100_000 if args.quick else 1_000_000
    with workspace(args.dir) as folder:
        report = Report("scale.py", machine(folder))
        small, large = (fill(folder / f"journal{n}", n) for n in (entries, entries * 10))
        measure(report, small, large, args.rounds or ROUNDS)
    return finish(report, args, picture)


if __name__ == "__main__":
    sys.exit(main())
