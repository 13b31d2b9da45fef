"""What the scripts share: options, interleaved rounds, the table of targets, JSON, PNG, the machine.

Needs numpy only; matplotlib with --png, psutil where it is installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from raw import Timing

if TYPE_CHECKING:
    from mmapwal import Journal

FRAME_BYTES = 56  # header of a frame; docs/FORMAT.md
MIB = 1 << 20
T = TypeVar("T")
PAYLOAD_BYTES = 256


def frame_bytes(payload_bytes: int) -> int:
    """What an entry takes in a segment."""
    return (FRAME_BYTES + payload_bytes + 7) & ~7


def random_bytes(count: int) -> bytes:
    return random.Random(1).randbytes(count)


# --- options --------------------------------------------------------------------------------------


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="the report as JSON; - for standard output")
    parser.add_argument("--png", metavar="FILE", type=Path, help="a picture (needs matplotlib)")
    parser.add_argument(
        "--dir", metavar="DIR", type=Path, default=Path(), help="where the files go, below it (default: .)"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: to see that it runs")
    parser.add_argument("--rounds", type=int, metavar="N", help="instead of the script's own number")
    parser.add_argument("--no-check", action="store_true", help="exit 0 also when a target is missed")
    return parser


@contextmanager
def workspace(parent: Path) -> Iterator[Path]:
    """A new directory below `parent`, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="mmapwal-perf-", dir=parent.absolute()) as folder:
        yield Path(folder)


# --- rounds ---------------------------------------------------------------------------------------


def interleave(contenders: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Runs A B C A B C; one round of each first, which is thrown away."""
    results: dict[str, list[T]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            result = run()
            if number:
                results[name].append(result)
    return results


def time_each(call: Callable[[Any], object], argument: object, count: int) -> Timing:
    """`count` calls, each between two readings of the clock. Nothing is subtracted."""
    ns = [0] * count
    clock = time.perf_counter_ns
    start = clock()
    for i in range(count):
        before = clock()
        call(argument)
        ns[i] = clock() - before
    return Timing(np.array(ns, np.uint64), clock() - start)


def time_all(call: Callable[[Any], object], argument: object, count: int) -> float:
    """Nanoseconds a call, of `count` calls in a bare loop: the loop itself is in it."""
    start = time.perf_counter_ns()
    for _ in range(count):
        call(argument)
    return (time.perf_counter_ns() - start) / count


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Round by round, so that what slows a whole round down falls out."""
    return [a / b for a, b in zip(over, under, strict=True)]


def rates(timings: Sequence[Timing]) -> list[float]:
    return [t.rate for t in timings]


def percentiles(timings: Sequence[Timing]) -> dict[str, float]:
    """Microseconds, over all rounds together."""
    ns = np.concatenate([t.ns for t in timings])
    points = np.percentile(ns, [50, 90, 99, 99.9]) / 1000
    return dict(zip(("p50", "p90", "p99", "p99.9"), (round(float(p), 1) for p in points), strict=True))


# --- the report -----------------------------------------------------------------------------------


@dataclass
class Row:
    """One figure: a sample a round. `target` must hold, `aim` is where it is to go next; `limit` names the
    row that says what bounds it on this machine."""

    name: str
    samples: list[float]
    unit: str = "x"
    target: float | None = None
    aim: float | None = None
    at_least: bool = True
    limit: str | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def digits(self) -> int:
        return 4 if self.unit == "x" else 3

    @property
    def shown(self) -> str:
        return f"{number(self.median, self.digits)} {self.unit}"

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile over the rounds."""
        low, high = np.percentile(self.samples, [25, 75])
        return float(low), float(high)

    @property
    def best(self) -> float:
        """The round that was disturbed least."""
        return max(self.samples) if self.at_least else min(self.samples)

    @property
    def bound(self) -> float | None:
        """What it is held against: the target, or the aim where there is none."""
        return self.target if self.target is not None else self.aim

    def meets(self, bound: float | None) -> bool | None:
        if bound is None:
            return None
        return self.median >= bound if self.at_least else self.median <= bound

    def as_dict(self) -> dict[str, Any]:
        low, high = self.spread
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "quartiles": [low, high],
            "best": self.best,
            "samples": self.samples,
            "target": self.target,
            "limit": self.limit,
            "aim": self.aim,
            "at_least": self.at_least,
            "meets_target": self.meets(self.target),
            "meets_aim": self.meets(self.aim),
        }


def number(value: float, digits: int = 3) -> str:
    """As many digits as mean something."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, digits - 1 - max(0, int(np.floor(np.log10(abs(value))))))}f}"


@dataclass
class Report:
    """Rows with or without a target, notes, and whatever else belongs into the JSON."""

    script: str
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def add(
        self,
        name: str,
        samples: Sequence[float],
        unit: str = "x",
        *,
        target: float | None = None,
        aim: float | None = None,
        at_least: bool = True,
        limit: str | None = None,
    ) -> Row:
        row = Row(name, [float(s) for s in samples], unit, target, aim, at_least, limit)
        self.rows.append(row)
        return row

    def add_latencies(self, title: str, results: Mapping[str, Sequence[Timing]]) -> None:
        """Below the table, and for the picture: the median rate of each, and the latency of every call."""
        self.notes.append(title)
        for name, timings in results.items():
            shown = "  ".join(f"{p} {v:8.1f}" for p, v in percentiles(timings).items())
            self.notes.append(f"  {name:22} {number(float(np.median(rates(timings)))):>9}  {shown}")
        self.extra["rates"] = {name: rates(timings) for name, timings in results.items()}
        self.extra["latency_us"] = {name: percentiles(timings) for name, timings in results.items()}

    def row(self, name: str) -> Row:
        return next(r for r in self.rows if r.name == name)

    @property
    def missed(self) -> list[Row]:
        return [r for r in self.rows if r.meets(r.target) is False]

    def told(self, row: Row) -> str:
        """What it is, and what bounds it here."""
        told = f"{row.name}: {row.shown}"
        return told if row.limit is None else f"{told}; {row.limit}: {self.row(row.limit).shown}"

    def text(self) -> str:
        width = max((len(r.name) for r in self.rows), default=0)
        head = f"{'':{width}}  {'median':>10}  {'quartiles':>19}  {'best':>8}  {'target':>9}  {'aim':>9}"
        lines = [machine_line(self.machine), "", head]
        for r in self.rows:
            low, high = (number(v, r.digits) for v in r.spread)
            spread, best = (f"{low} .. {high}", number(r.best, r.digits)) if len(r.samples) > 1 else ("", "")
            sign = ">=" if r.at_least else "<="
            bounds = [f"{sign} {number(b)}" if b is not None else "" for b in (r.target, r.aim)]
            verdict = {None: "", True: "ok", False: "MISSED"}[r.meets(r.target)]
            ahead = {None: "", True: "aim met", False: "aim not met"}[r.meets(r.aim)]
            words = ", ".join(w for w in (verdict, ahead) if w)
            lines.append(
                f"{r.name:{width}}  {r.shown:>10}  {spread:>19}  {best:>8}"
                f"  {bounds[0]:>9}  {bounds[1]:>9}  {words}".rstrip()
            )
        return "\n".join([*lines, "", *self.notes])

    def as_dict(self) -> dict[str, Any]:
        return {
            "script": self.script,
            "machine": self.machine,
            "rows": [r.as_dict() for r in self.rows],
            "notes": self.notes,
            **self.extra,
        }


def finish(
    report: Report, args: argparse.Namespace, picture: Callable[[Report, Path], None] | None = None
) -> int:
    """Prints, writes what was asked for; the exit status."""
    report.extra.setdefault("resources", resources())
    plain = sys.stderr if args.json == "-" else sys.stdout
    print(report.text(), file=plain)
    if args.json == "-":
        json.dump(report.as_dict(), sys.stdout, indent=1)
        print()
    elif args.json:
        Path(args.json).write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    if args.png is not None:
        (picture or bars)(report, args.png)
    for row in report.missed:
        print(f"target missed: {report.told(row)}", file=sys.stderr)
    return 1 if report.missed and not args.no_check else 0


# --- pictures -------------------------------------------------------------------------------------


def pyplot() -> Any:
    """matplotlib, set up for a small file without a screen; imported only here."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot().close(figure)


def band(axes: Any, at: Sequence[float], samples: Sequence[Sequence[float]], label: str) -> None:
    """A line through the medians, and the quartiles around it."""
    axes.plot(at, [np.median(s) for s in samples], "o-", ms=4, label=label)
    low, high = (np.percentile(samples, q, axis=1) for q in (25, 75))
    axes.fill_between(at, low, high, alpha=0.2)


def bars(report: Report, path: Path) -> None:
    """Every row with a target or an aim, as a share of it: what reaches the line holds it."""
    rows = [r for r in report.rows if r.bound is not None]
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.32 * len(rows)))
    for at, row in enumerate(reversed(rows)):
        bound = row.bound
        assert bound is not None
        shares = sorted(v / bound if row.at_least else bound / v for v in (row.median, *row.spread))
        held = row.median >= bound if row.at_least else row.median <= bound
        colour = "tab:blue" if held else "tab:orange" if row.target is None else "tab:red"
        axes.barh(at, shares[1], color=colour, alpha=0.7)
        axes.plot([shares[0], shares[2]], [at, at], color="black", linewidth=1)
        axes.text(0.02, at, f"{number(row.median)} {row.unit}", va="center", color="white")
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [r.name for r in reversed(rows)])
    axes.set_xlabel("share of the target (of the aim where there is none); longer is better")
    axes.set_title(report.script, loc="left")
    save(figure, path)


# --- the machine ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mount:
    """Where a path lives: the file system's type, its source and its device number."""

    type: str
    source: str
    device: str  # major:minor
    point: str


def mount_of(path: Path) -> Mount:
    """From /proc/self/mountinfo: the longest mount point above `path`, and the last mounted on it."""
    wanted = str(path.resolve())
    best: Mount | None = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        fields, tail = before.split(), after.split()
        point = fields[4].encode().decode("unicode_escape")
        inside = wanted == point or wanted.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best.point)):
            best = Mount(tail[0], tail[1], fields[2], point)
    if best is None:
        raise OSError(f"no mount holds {wanted}")
    return best


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def machine(path: Path) -> dict[str, Any]:
    """What a number depends on, beside the code."""
    mount = mount_of(path)
    queue = Path("/sys/dev/block") / mount.device / "queue"
    cache = queue / "write_cache"
    fua = queue / "fua"
    return {
        "kernel": platform.release(),
        "file_system": mount.type,
        "device": mount.source,
        "write_cache": cache.read_text().strip() if cache.exists() else None,
        "fua": fua.read_text().strip() == "1" if fua.exists() else None,
        "cpus": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """One line for a reader."""
    flush = {"write back": "with flushes", "write through": "no flushes needed"}.get(
        str(facts["write_cache"]), "write cache unknown"
    )
    return (
        f"Linux {facts['kernel']}, {facts['file_system']} ({flush}), {facts['cpus']} CPUs "
        f"({facts['processor']}), {facts['memory_gib']} GiB, Python {facts['python']}, "
        f"load {facts['load_average']}"
    )


def resources() -> dict[str, Any]:
    """Memory and I/O of this process so far, where psutil is installed."""
    try:
        psutil = importlib.import_module("psutil")
    except ImportError:
        return {}
    process = psutil.Process()
    memory, io, cpu = process.memory_full_info(), process.io_counters(), process.cpu_times()
    return {
        "rss_bytes": memory.rss,
        "private_bytes": memory.uss,
        "written_bytes": io.write_bytes,
        "read_bytes": io.read_bytes,
        "user_s": cpu.user,
        "system_s": cpu.system,
    }


# --- peers and input ------------------------------------------------------------------------------


class SqliteLog:
    """The same work in sqlite3: a table, WAL, synchronous=FULL, one transaction a call."""

    def __init__(self, path: Path) -> None:
        self._db: Any = sqlite3.connect(path, isolation_level=None)
        self._prepare()

    def _prepare(self) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE log (op INTEGER PRIMARY KEY, payload BLOB)")

    def append(self, payload: bytes) -> None:
        self._db.execute("INSERT INTO log (payload) VALUES (?)", (payload,))

    def append_many(self, payloads: Sequence[bytes]) -> None:
        self._db.execute("BEGIN")
        self._db.executemany("INSERT INTO log (payload) VALUES (?)", ((p,) for p in payloads))
        self._db.execute("COMMIT")

    def close(self) -> None:
        self._db.close()


def numbered_payloads(first_op: int, count: int, size: int = PAYLOAD_BYTES) -> list[bytes]:
    """Payloads that begin with their op, so that a reader can tell them apart."""
    rest = random_bytes(size - 8)
    return [op.to_bytes(8, "little") + rest for op in range(first_op, first_op + count)]


def fill(journal: Journal, count: int, batch: int = 1000) -> None:
    """Appends `count` entries in batches, and makes them durable."""
    first = (journal.last_op or 0) + 1
    for op in range(first, first + count, batch):
        journal.append_many(numbered_payloads(op, min(batch, first + count - op)))
    journal.sync()


def make_room(journal: Journal, entries: int) -> None:
    """Where fewer would fit, everything so far is taken as snapshotted. Not to be timed."""
    if journal.remaining_capacity < entries:
        journal.set_snapshot_op(journal.last_op or 0)
        journal.compact()


def shuffled(first: int, last: int, count: int, seed: int) -> list[int]:
    """`count` ops of first .. last in random order, as Python ints."""
    generator = np.random.default_rng(seed)
    ops: NDArray[np.int64] = generator.integers(first, last + 1, count)
    return list(ops.tolist())


# --- the check in C, without the journal around it --------------------------------------------------
# mmapwal is imported where it is used: fsync.py does without it.


def map_segments(path: Path) -> list[NDArray[np.uint8]]:
    """A fresh read-only mapping of each segment of a journal."""
    names = sorted(p for p in path.glob("segment-*") if p.suffix != ".tmp")
    return [np.memmap(name, np.uint8, "r") for name in names]


def check_segments(segments: Sequence[NDArray[np.uint8]]) -> float:
    """Checks every frame by the C helper's scan; bytes of frames a second."""
    from mmapwal._native import ffi, lib
    from mmapwal.format import PAGE_BYTES, SEGMENT_HEADER

    scans = []
    for segment in segments:
        header = np.frombuffer(segment[: SEGMENT_HEADER.itemsize], SEGMENT_HEADER)[0]
        base, capacity, salt = (int(header[f]) for f in ("base_lsn", "capacity", "salt"))
        scan = ffi.new("struct mw_scan *")
        scan.frames = ffi.cast("uint8_t *", segment.ctypes.data + PAGE_BYTES)
        scan.base_lsn = scan.lsn = scan.batch_lsn = base
        scan.capacity = capacity
        scan.limit_lsn = base + capacity
        scan.epoch = 2**32 - 1
        scan.epoch_start_lsn = 2**64 - 1  # frames of every epoch are taken
        scan.salt = scan.link = salt
        scans.append((scan, base))
    start = time.perf_counter_ns()
    for scan, _ in scans:
        lib.mw_scan(scan)
    elapsed = time.perf_counter_ns() - start
    for scan, _ in scans:
        assert scan.stop in {lib.MW_STOP_END, lib.MW_STOP_BLANK, lib.MW_STOP_LIMIT}, f"stopped: {scan.stop}"
    return float(sum(scan.lsn - base for scan, base in scans)) * 1e9 / elapsed
