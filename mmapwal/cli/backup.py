"""mmapwal backup: a copy of a journal that opens by itself, also while another process writes it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from mmapwal import BackupReport, LockedError, SystemDirectory
from mmapwal.backup import backup_in_use
from mmapwal.cli import output
from mmapwal.cli.looking import look_into


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "backup",
        help="copy a journal, also one that is in use",
        description="Copies all entries, and the paired snapshot, to a directory that opens by "
        "itself. A journal that another process writes is copied beside it; any other one is opened, and "
        "recovered, in memory first: none of its files is changed. A directory that has an earlier backup "
        "takes what is new, unless it was opened since to write: stat, dump, tail and verify only look.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the journal's folder")
    parser.add_argument("destination", metavar="DESTINATION", type=Path, help="made if missing")
    parser.add_argument("--json", action="store_true", help="one object: what the backup holds")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    progress = output.Progress(f"copying {args.directory}")
    try:
        report = _back_up(args.directory, args.destination, progress)
    finally:
        progress.close()
    if args.json:
        output.json_line(dataclasses.asdict(report))
        return 0
    snapshot = "" if report.snapshot_op is None else f", the snapshot of op {report.snapshot_op}"
    output.line(
        f"{args.destination}: {report.segments} segments{snapshot}; {output.bytes_text(report.copied_bytes)} "
        f"copied, {report.kept_segments} segments were there"
    )
    return 0


def _back_up(path: Path, destination: Path, progress: output.Progress) -> BackupReport:
    try:
        with look_into(path) as journal:
            return journal.backup(destination, progress)
    except LockedError:
        with SystemDirectory(path, create=False) as source:
            return backup_in_use(source, destination, progress)
