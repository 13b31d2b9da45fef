"""mmapwal dump: prints what lives in a journal."""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmapwal import Entry
from mmapwal.cli import output
from mmapwal.cli.looking import look_into
from mmapwal.cli.opening import CannotRunError, integer
from mmapwal.format import OP_MAX


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "dump",
        help="print the live entries",
        description="Prints op, kind, time, length and the start of the payload of each live entry, by "
        "op. One that was not closed is recovered, in memory: no file is changed. Refuses while another "
        "process writes the journal (tail does not); none can meanwhile.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the journal's folder")
    parser.add_argument("--first", metavar="OP", type=integer(1, OP_MAX), help="from this op on")
    parser.add_argument("--last", metavar="OP", type=integer(1, OP_MAX), help="up to this op, inclusive")
    add_form(parser)
    parser.set_defaults(run=run)


def add_form(parser: argparse.ArgumentParser) -> None:
    """How entries are printed."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="whole payloads as they are, a newline after each")
    form.add_argument("--json", action="store_true", help="one object a line, the whole payload as base64")


def form_of(args: argparse.Namespace) -> Callable[[Entry], None]:
    return _raw if args.raw else _json if args.json else _text


def run(args: argparse.Namespace) -> int:
    if args.first is not None and args.last is not None and args.first > args.last:
        raise CannotRunError(f"--first {args.first} is above --last {args.last}")
    show = form_of(args)
    with look_into(args.directory) as journal:
        for entry in journal.entries(args.first, args.last):
            show(entry)
    return 0


def _raw(entry: Entry) -> None:
    output.flush()  # what was printed before goes first
    sys.stdout.buffer.write(entry.payload)
    sys.stdout.buffer.write(b"\n")


def _json(entry: Entry) -> None:
    output.json_line(
        {
            "op": entry.op,
            "kind": entry.kind,
            "timestamp": output.iso_time(entry.timestamp),
            "timestamp_ns": entry.timestamp,
            "length": len(entry.payload),
            "payload": base64.b64encode(entry.payload).decode(),
        }
    )


def _text(entry: Entry) -> None:
    time, length = output.iso_time(entry.timestamp), len(entry.payload)
    text = output.payload_text(entry.payload)
    output.line(f"{entry.op:>8} {entry.kind:>5}  {time}  {length:>8}  {text}".rstrip())
