"""How many durable writes this machine makes a second: every way to sync, by size and batch.

Stands alone: it needs the C compiler and numpy, not the journal. Every cell is a C loop that writes
`batch` records of `size` bytes and makes them durable together; all ways of one size and batch are
run in turns, A B C A B C, and held against pwrite + fdatasync of the same turn.
"""

from __future__ import annotations

import sys
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


def measure(folder: Path, rounds: int, count: int) -> list[dict[str, Any]]:
    """One dict a cell: way, size, batch, syncs and records a second, latency, ratio to the reference."""
    cells: list[dict[str, Any]] = []
    with ExitStack() as stack:
        files: dict[str, RawFile] = {}
        for at, (name, (method, how, _)) in enumerate(WAYS.items()):
            try:
                files[name] = stack.enter_context(raw_file(folder / f"file{at}", method, **how))
            except OSError as e:  # fallocate is refused on some file systems
                print(f"{name}: {e}", file=sys.stderr)
        for size in SIZES:
            for batch in BATCHES:
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
    for batch in BATCHES:
        here = [c for c in cells if c["batch"] == batch]
        sizes = [s for s in SIZES if any(c["bytes"] == s for c in here)]
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


def main() -> int:
    args = options(__doc__).parse_args()
    rounds = args.rounds or (3 if args.quick else 15)
    count = 8 if args.quick else 24
    with workspace(args.dir) as folder:
        report = Report("fsync.py", machine(folder))
        cells = measure(folder, rounds, count)
    report.extra["cells"] = cells
    for name in WAYS:
        cell = [c for c in cells if c["way"] == name and c["bytes"] == 256 and c["batch"] == 1]
        if cell and name != REFERENCE:
            report.add(f"256 bytes: {name} / {REFERENCE}", cell[0]["ratio"])
    report.notes += table(cells)
    return finish(report, args, picture)


if __name__ == "__main__":
    sys.exit(main())
