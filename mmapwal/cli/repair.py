"""mmapwal repair: leaves out what is damaged, so that a journal opens again."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from mmapwal import repair
from mmapwal.cli import output


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "repair",
        help="leave out what is damaged",
        description="Makes a journal that refuses to open for damage open again: what verifies stays, what "
        "does not is left out, and nothing else but older entries of an op that is left out. The files that "
        "change are copied aside first, as .broken. A backup, where there is one, may have what is left out "
        "here. Exit code 0 when nothing was wrong or all was repaired; with --dry-run 1 when something would "
        "be left out; 2 when it cannot be done, or not all: nothing mends the snapshot. Where the disk fails "
        "to read it is not done: the file and the byte are told; copy the files to another disk first (as "
        "ddrescue does), and repair the copy.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the journal's folder")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be left out")
    parser.add_argument(
        "--json", action="store_true", help="one object: changed, problems, dropped, broken, remaining"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    progress = output.Progress("checking")
    try:
        report = repair(args.directory, dry_run=args.dry_run, progress=progress)
    finally:
        progress.close()
    if args.json:
        output.json_line({"dry_run": args.dry_run} | dataclasses.asdict(report))
    else:
        _tell(report, dry_run=args.dry_run)
    if report.remaining:
        return 2
    return 1 if args.dry_run and report.problems else 0


def _tell(report: Any, *, dry_run: bool) -> None:
    if not report.problems:
        output.line("nothing is wrong")
        return
    for problem in report.remaining:
        output.error(f"cannot be repaired: {output.problem_text(problem)}")
    if len(report.remaining) == len(report.problems):
        return
    for dropped in report.dropped:
        output.line(output.problem_text(dropped))
    length = output.bytes_text(sum(d.length for d in report.dropped))
    verb = "would be left out" if dry_run else "left out"
    output.line(f"{len(report.dropped)} place(s) {verb}: {length}")
    for name in report.broken:
        output.line(f"kept: {name}")
