"""mmapwal stat: what a journal holds, and what opening it found."""

from __future__ import annotations

import argparse
import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any

from mmapwal import Journal, LockedError
from mmapwal.cli import output
from mmapwal.cli.looking import look_into
from mmapwal.cli.opening import open_journal


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "stat",
        help="show what a journal holds",
        description="Shows the journal's counters, and what opening it finds and does: in memory, no file "
        "is changed, and nobody can write it meanwhile. Where another process writes it: what is durable.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the journal's folder")
    parser.add_argument(
        "--json", action="store_true", help="one object: journal, stats, report (null of one that is written)"
    )
    parser.set_defaults(run=run)


def _open(path: Path) -> Journal:
    try:
        return look_into(path)
    except LockedError:
        return open_journal(path, create=False, readonly=True)


def run(args: argparse.Namespace) -> int:
    with _open(args.directory) as journal:
        facts: dict[str, Any] = {
            "path": str(journal.path),
            "uuid": journal.uuid.hex(),
            "slots": journal.slots,
            "segment_bytes": journal.segment_bytes,
            "durability": journal.durability,
            "sync_method": journal.sync_method,
            "remaining_capacity": None if journal.readonly else journal.remaining_capacity,
            "paired_snapshot_op": journal.pairing[0] if journal.pairing else None,
        }
        parts: dict[str, dict[str, Any] | None] = {
            "journal": facts,
            "stats": dataclasses.asdict(journal.stats()),
            "report": None if journal.readonly else dataclasses.asdict(journal.report),
        }
    if args.json:
        output.json_line({name: _plain(part) for name, part in parts.items()})
        return 0
    titles = {
        "journal": f"journal {args.directory}",
        "stats": "holds (counters since it was opened)",
        "report": "opening it",
    }
    for name, part in parts.items():
        if part is not None:
            output.table(titles[name], [(_name(field), _text(field, v)) for field, v in part.items()])
    return 0


def _plain(value: Any) -> Any:
    """The same as what JSON knows."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _name(field: str) -> str:
    return field.removesuffix("_s").replace("_", " ")


def _text(field: str, value: Any) -> str:
    value = _plain(value)
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(field, v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(str(v) for v in value)
    if isinstance(value, float):
        return f"{value:.6f} s" if field == "seconds" or field.endswith("_s") else f"{value:g}"
    if field.endswith("_bytes"):
        return output.bytes_text(value)
    return output.count_text(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)
