"""mmapwal compact: gives back the space of what is not live."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmapwal.cli import output
from mmapwal.cli.opening import open_journal


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "compact",
        help="give back the space of what is not live",
        description="Removes and rewrites segments that hold little or nothing live. All or nothing, "
        "also when the machine dies halfway. Refuses while another process writes the journal.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the journal's folder")
    parser.add_argument("--json", action="store_true", help="one object: freed_bytes, file_bytes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with open_journal(args.directory, create=False) as journal:
        freed = journal.compact()
        file_bytes = journal.stats().file_bytes
    if args.json:
        output.json_line({"freed_bytes": freed, "file_bytes": file_bytes})
    else:
        output.line(f"freed {output.bytes_text(freed)}, {output.bytes_text(file_bytes)} left")
    return 0
