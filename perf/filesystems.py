"""Whether SyncMethod.AUTO is the best choice: the journal with AUTO against each method, in pairs, on
ext4, xfs, btrfs, tmpfs and overlayfs.

Each file system is made in an image below --dir and mounted by a loop device, so it needs root (exit
status 2 without). For each method two journals take turns, AUTO, method, AUTO, method, a few appends of
256 bytes each, one a call and 64 a call; the ratio of their rates is taken pair by pair.

AUTO is within 10 % of the best when it is within 10 % of each. So every method is held against AUTO by
itself, by the median of its own pairs, and nobody has to be declared the best first: the highest of
several noisy medians is too high, and AUTO would be held against luck. The method that AUTO stands for
is measured like the others; its ratio is 1 by nature, and shows the noise. Pairs are added until the
95 % confidence interval of the median lies on one side of 0.90, up to a limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from math import sqrt
from pathlib import Path
from typing import Any

from common import (
    PAYLOAD_BYTES,
    Report,
    finish,
    machine,
    make_room,
    options,
    pyplot,
    random_bytes,
    save,
    time_each,
    workspace,
)
from mounts import KINDS, CannotMountError, kinds, mounted

from mmapwal import Journal, SyncMethod

WITHIN = 0.90
METHODS = (SyncMethod.DSYNC, SyncMethod.FDATASYNC, SyncMethod.MSYNC)
CALLS = {"tmpfs": 1000}  # a stretch; where a call takes microseconds it needs more of them
USUAL_CALLS = 20
WARM = 4
BATCH = 64


def rate(journal: Journal, batch: int, calls: int) -> float:
    """Calls a second, of one stretch."""
    make_room(journal, (WARM + calls) * batch)
    payload = random_bytes(PAYLOAD_BYTES)
    call: Callable[[Any], object] = journal.append if batch == 1 else journal.append_many
    argument = payload if batch == 1 else [payload] * batch
    for _ in range(WARM):
        call(argument)
    return time_each(call, argument, calls).rate


def interval(samples: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the median, by order statistics: no shape is assumed."""
    ordered, n = sorted(samples), len(samples)
    low = max(0, int(n / 2 - 0.98 * sqrt(n)))
    return ordered[low], ordered[n - 1 - low]


def is_decided(samples: list[float]) -> bool:
    low, high = interval(samples)
    return high < WITHIN or low >= WITHIN


def measure(folder: Path, method: SyncMethod, batch: int, calls: int, pairs: tuple[int, int]) -> list[float]:
    """AUTO's rate over the method's, pair by pair; the order within a pair alternates. `pairs`: at least
    and at most."""
    with (
        closing(Journal(folder / "auto")) as auto,
        closing(Journal(folder / "method", sync_method=method)) as other,
    ):
        samples: list[float] = []
        rate(auto, batch, calls), rate(other, batch, calls)
        while len(samples) < pairs[0] or (len(samples) < pairs[1] and not is_decided(samples)):
            if len(samples) % 2:
                below = rate(other, batch, calls)
                samples.append(rate(auto, batch, calls) / below)
            else:
                samples.append(rate(auto, batch, calls) / rate(other, batch, calls))
    return samples


def chosen(folder: Path) -> SyncMethod:
    with closing(Journal(folder / "asked")) as journal:
        return journal.sync_method


def report_kind(report: Report, kind: str, where: Path, args: argparse.Namespace) -> None:
    pairs = args.rounds or (6 if args.quick else 40)
    auto = chosen(where)
    report.notes.append(f"on {kind} AUTO is {auto.name}")
    report.extra.setdefault("auto", {})[kind] = auto.name
    for method in METHODS:
        for batch, what in ((1, "append"), (BATCH, f"append_many({BATCH})")):
            calls = CALLS.get(kind, USUAL_CALLS)
            calls = max(USUAL_CALLS // 2, calls // (1 if batch == 1 else 10))
            with workspace(where) as folder:
                samples = measure(folder, method, batch, calls, (pairs, pairs if args.quick else 5 * pairs))
            itself = " (itself)" if method is auto else ""
            row = report.add(f"{kind}, {what}: AUTO / {method.name}{itself}", samples, target=WITHIN)
            low, high = interval(samples)
            report.extra.setdefault("confidence_95", {})[row.name] = [low, high]
            found = f"{row.median:.3f} ({low:.3f} .. {high:.3f}, {len(samples)} pairs)"
            print(f"  {row.name}: {found}", file=sys.stderr)


def picture(report: Report, path: Path) -> None:
    """Each median with its confidence interval; left of the line AUTO is too slow."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.28 * len(report.rows)))
    for at, row in enumerate(reversed(report.rows)):
        low, high = report.extra["confidence_95"][row.name]
        colour = "tab:blue" if row.median >= WITHIN else "tab:red"
        axes.plot([low, high], [at, at], color=colour)
        axes.plot([row.median], [at], "o", color=colour)
    axes.axvline(WITHIN, color="black", linestyle="--", linewidth=1)
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set_xscale("log")
    axes.set_yticks(range(len(report.rows)), [r.name for r in reversed(report.rows)])
    axes.set_xlabel("rate of AUTO over that of the method: median and its 95 % confidence interval")
    axes.set_title(report.script, loc="left")
    save(figure, path)


def main() -> int:
    parser = options(__doc__)
    parser.add_argument(
        "--file-systems", type=kinds, default=KINDS, metavar="NAMES",
        help=f"with commas between them (default: {','.join(KINDS)})",
    )  # fmt: skip
    args = parser.parse_args()
    cannot: list[str] = []
    with workspace(args.dir) as folder:
        report = Report("filesystems.py", machine(folder))
        for kind in args.file_systems:
            try:
                with mounted(kind, folder) as where:
                    report_kind(report, kind, where, args)
            except CannotMountError as e:
                cannot.append(f"{kind} cannot be measured: {e}")
    report.notes += cannot
    status = finish(report, args, picture if report.rows else lambda *_: None)
    for line in cannot:
        print(line, file=sys.stderr)
    return status or (2 if cannot else 0)


if __name__ == "__main__":
    sys.exit(main())
