"""mmapwal tail: prints the last entries of a journal, also of one that is being written, and follows it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmapwal import Entry, Journal, StaleOpError, TruncatedError
from mmapwal.cli import output
from mmapwal.cli.dump import add_form, form_of
from mmapwal.cli.opening import CannotRunError, integer
from mmapwal.format import OP_MAX

LOOK_S = 0.2  # at a directory that is not there yet


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "tail",
        help="print the last entries, and follow",
        description="Prints the last entries that are durable, in the order in which they became so. Takes "
        "no lock: it works while another process writes the journal, and changes nothing. With -f it goes on "
        "with those that come, until it is interrupted; where entries were removed it says so on standard "
        "error and goes on behind them.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the journal's folder")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="wait for more; in a folder, for the journal too"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "-n", "--entries", metavar="N", type=integer(0, OP_MAX), default=10, help="this many (10)"
    )
    start.add_argument(
        "--from", dest="from_op", metavar="OP", type=integer(1, OP_MAX), help="all from this op on"
    )
    parser.add_argument(
        "--timeout", metavar="S", type=float, help="with -f: end when nothing came for so many seconds"
    )
    parser.add_argument("--written", action="store_true", help="also what is written and not durable yet")
    add_form(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.timeout is not None and not args.timeout >= 0:
        raise CannotRunError(f"--timeout {args.timeout} is below 0")
    if args.follow:
        _await(args.directory, args.timeout)
    show = form_of(args)
    with Journal(args.directory, readonly=True, create=args.follow) as journal:
        for entry in _entries(journal, args):
            show(entry)
            if args.follow:
                output.flush()
    return 0


def _await(directory: Path, timeout_s: float | None) -> None:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while not directory.is_dir() and (deadline is None or time.monotonic() < deadline):
        time.sleep(LOOK_S)


def _entries(journal: Journal, args: argparse.Namespace) -> Iterator[Entry]:
    from_op = args.from_op
    if from_op is None and journal.last_op is not None:
        from_op = max(journal.snapshot_op + 1, journal.last_op - args.entries + 1)
    following = None
    while True:
        try:
            if following is None:
                timeout = args.timeout if args.follow else 0
                following = journal.follow(from_op, timeout=timeout, written=args.written)
            yield from following
            return
        except StaleOpError as e:
            output.error(str(e))
            from_op = e.first_op
        except TruncatedError as e:
            output.error(str(e))
