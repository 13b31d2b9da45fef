"""mmapwal verify: reads everything and names each problem."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from mmapwal.cli import output
from mmapwal.inspection import inspect


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="check every frame, read-only",
        description="Reads and checks every frame. Takes no lock, writes nothing, and also works on a "
        "journal that refuses to open. Exit code 0 when all is well, else 1 and a line for each problem.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the journal's folder")
    parser.add_argument("--json", action="store_true", help="one object: ok, counters, problems")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    progress = output.Progress("verifying")
    try:
        report = inspect(args.directory, progress=progress)
    finally:
        progress.close()
    if args.json:
        output.json_line({"ok": report.ok} | dataclasses.asdict(report))
        return 0 if report.ok else 1
    for problem in report.problems:
        output.line(output.problem_text(problem))
    if not report.ok:
        output.error(f"{args.directory}: {len(report.problems)} problem(s)")
        return 1
    output.line(
        f"ok: {output.count_text(report.entries)} entries in {output.count_text(report.frames)} frames, "
        f"{output.bytes_text(report.scanned_bytes)} read"
    )
    return 0
