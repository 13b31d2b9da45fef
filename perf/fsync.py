"""How many durable writes this machine makes a second: every way to sync, by size and batch.

Stands alone: it needs the C compiler and numpy, not the journal. Every cell is a C loop that writes
`batch` records of `size` bytes and makes them durable together; all ways of one size and batch are
run in turns, A B C A B C, and held against pwrite + fdatasync of the same turn.

With --file-systems, as root, the same on file systems of those kinds, each made in an image below --dir
and mounted by a loop device: with all of them and a size or two and a batch or two, a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

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
    workspace,
)
from mounts import CannotMountError, kinds, mounted
from raw import Method, RawFile, Timing, raw_file

SIZES = (64, 256, 1024, 4096, 65536)
BATCHES = (1, 8, 64, 512)
WRITE_BYTES_MAX = 4 * MIB
FILE_BYTES = 32 * MIB
REFERENCE = "pwrite + fdatasync"

# name, method, how the file is made, a pwrite for each record
WAYS: dict[str, tuple[Method, dict[str, Any], bool]] = {
    REFERENCE: (Method.FDATASYNC, {"prepared": FILE_BYTES}, False),
    "a pwrite each + fdatasync": (Method.FDATASYNC, {"prepared": FILE_BYTES}, True),
    "pwritev2(RWF_DSYNC)": (Method.RWF_DSYNC, {"prepared": FILE_BYTES}, False),
    "pwrite, O_DSYNC": (Method.O_DSYNC, {"prepared": FILE_BYTES}, False),
    "msync, zeros by 1 MiB": (Method.MSYNC, {"prepared": FILE_BYTES}, False),
    "msync, zeros by 4 KiB": (Method.MSYNC, {"prepared": FILE_BYTES, "step": 4096}, False),
    "only fallocated": (Method.FDATASYNC, {"prepared": FILE_BYTES, "fallocated": True}, False),
    "growing file": (Method.FDATASYNC, {"prepared": 0}, False),
}


def one_round(file: RawFile, data: bytes, count: int, batch: int, separate: bool) -> Timing:
    file.renew()
    file.run(data, 1, batch=batch, separate=separate)
    return file.run(data, count, batch=batch, separate=separate)


def measure_cell(
    files: dict[str, RawFile], size: int, batch: int, rounds: int, count: int
) -> dict[str, list[Timing]]:
    data = random_bytes(size * batch)
    contenders = {}
    for name, file in files.items():
        separate = WAYS[name][2]
        if separate and batch == 1:
            continue
        contenders[name] = partial(one_round, file, data, count, batch, separate)
    return interleave(contenders, rounds)


def measure(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One dict a cell: way, size, batch, syncs and records a second, latency, ratio to the reference."""
    rounds = args.rounds or (3 if args.quick else 15)
    count = 8 if args.quick else 24
    cells: list[dict[str, Any]] = []
    with ExitStack() as stack:
        files: dict[str, RawFile] = {}
        for at, (name, (method, how, _)) in enumerate(WAYS.items()):
            try:
                files[name] = stack.enter_context(raw_file(folder / f"file{at}", method, **how))
            except OSError as e:  # fallocate is refused on some file systems
                print(f"{name}: {e}", file=sys.stderr)
        for size in args.sizes:
            for batch in args.batches:
                if size * batch > WRITE_BYTES_MAX:
                    continue
                results = measure_cell(files, size, batch, rounds, count)
                reference = rates(results[REFERENCE])
                for name, timings in results.items():
                    syncs = rates(timings)
                    cells.append(
                        {
                            "way": name,
                            "bytes": size,
                            "batch": batch,
                            "syncs_s": syncs,
                            "us": percentiles(timings),
                            "ratio": ratios(syncs, reference),
                        }
                    )
    return cells


def median(samples: list[float]) -> float:
    return sorted(samples)[len(samples) // 2]


def table(cells: list[dict[str, Any]]) -> list[str]:
    """One block a batch: rows are ways, columns are sizes; records a second and, in brackets, the ratio."""
    lines: list[str] = []
    for batch in sorted({c["batch"] for c in cells}):
        here = [c for c in cells if c["batch"] == batch]
        sizes = sorted({c["bytes"] for c in here})
        lines += [f"records a second, {batch} in one sync (and syncs against {REFERENCE}):"]
        lines += ["  " + " " * 26 + "".join(f"{s:>10} bytes     " for s in sizes)]
        for way in WAYS:
            row = {c["bytes"]: c for c in here if c["way"] == way}
            if row:
                columns = (
                    f"{number(median(row[s]['syncs_s']) * batch):>12} ({median(row[s]['ratio']):.2f})  "
                    for s in sizes
                )
                lines += [f"  {way:26}" + " ".join(columns)]
        lines += [""]
    return lines


def picture(report: Report, path: Path) -> None:
    """Records a second by batch, for 256 bytes; syncs a second by size, for one record."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for way in WAYS:
        cells = [c for c in report.extra["cells"] if c["way"] == way]
        sizes = [c for c in cells if c["batch"] == 1]
        batches = [c for c in cells if c["bytes"] == 256]
        left.plot([c["bytes"] for c in sizes], [median(c["syncs_s"]) for c in sizes], "o-", ms=3, label=way)
        right.plot(
            [c["batch"] for c in batches], [median(c["syncs_s"]) * c["batch"] for c in batches], "o-", ms=3
        )
    for axes, title in ((left, "syncs a second, one record each"), (right, "records of 256 bytes a second")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_title(title, loc="left")
    left.set_xlabel("bytes of a record")
    left.set_ylim(bottom=0)
    right.set_xlabel("records in one sync")
    right.set_yscale("log")
    right.legend(*left.get_legend_handles_labels(), fontsize=6)
    save(figure, path)


def picture_of_kinds(report: Report, path: Path) -> None:
    """The rows of the table, with their quartiles."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.2 * len(report.rows)))
    for at, row in enumerate(reversed(report.rows)):
        axes.plot(row.spread, [at, at], color="tab:blue")
        axes.plot([row.median], [at], "o", ms=4, color="tab:blue")
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(report.rows)), [r.name for r in reversed(report.rows)], fontsize=6)
    axes.set_xlabel(f"syncs a second against {REFERENCE}")
    save(figure, path)


def add(report: Report, cells: list[dict[str, Any]], kind: str | None) -> None:
    """One row a way, for the size and batch nearest to the journal's usual: 256 bytes, one."""
    report.extra.setdefault("cells", []).extend(cells if kind is None else [c | {"on": kind} for c in cells])
    size = min({c["bytes"] for c in cells}, key=lambda s: abs(s - 256))
    batch = min(c["batch"] for c in cells)
    on = f"{kind}, " if kind else ""
    many = f"{batch} x " if batch > 1 else ""
    for cell in cells:
        if (cell["bytes"], cell["batch"]) == (size, batch) and cell["way"] != REFERENCE:
            report.add(f"{on}{many}{size} bytes: {cell['way']} / {REFERENCE}", cell["ratio"])
    report.notes += ([f"{kind}:"] if kind else []) + table(cells)


def numbers(text: str) -> Sequence[int]:
    """The value of an option: numbers above 0 with commas between them."""
    found = [int(n) for n in text.split(",")]
    if min(found) < 1:
        raise ValueError("above 0")
    return found


def main() -> int:
    parser = options(__doc__)
    listed = ",".join
    parser.add_argument("--sizes", type=numbers, default=SIZES, metavar="BYTES",
                        help=f"of a record (default: {listed(map(str, SIZES))})")  # fmt: skip
    parser.add_argument("--batches", type=numbers, default=BATCHES, metavar="N",
                        help=f"records in one sync (default: {listed(map(str, BATCHES))})")  # fmt: skip
    parser.add_argument("--file-systems", type=kinds, metavar="NAMES",
                        help="ext4,xfs,btrfs,tmpfs,overlayfs, some of them, or all; needs root")  # fmt: skip
    args = parser.parse_args()
    cannot: list[str] = []
    with workspace(args.dir) as folder:
        report = Report("fsync.py", machine(folder))
        if args.file_systems is None:
            add(report, measure(folder, args), None)
        for kind in args.file_systems or ():
            try:
                with mounted(kind, folder) as where:
                    add(report, measure(where, args), kind)
            except CannotMountError as e:
                cannot.append(f"{kind} cannot be measured: {e}")
    report.notes += cannot
    status = finish(report, args, picture_of_kinds if args.file_systems else picture)
    return status or (2 if cannot else 0)


if __name__ == "__main__":
    sys.exit(main())
