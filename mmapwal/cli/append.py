"""mmapwal append: one entry a line from standard input."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmapwal import Durability, Journal, PayloadTooLargeError
from mmapwal.cli import output
from mmapwal.cli.opening import CannotRunError, integer, open_journal
from mmapwal.format import KIND_MAX, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN, SLOTS_MAX

READ_BYTES = 1 << 16
BATCH_BYTES_MAX = 1 << 20
LINE_BYTES_MAX = 64 << 20  # the journal's own default for a payload
BATCH_MAX = 1 << 16


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "append",
        help="append one entry a line from standard input",
        description="Appends each line of standard input, without its newline, as one entry, and prints "
        "the ops once they are durable. The journal is made when there is none. Lines that arrive "
        "together are committed together; a slow pipe is never waited for.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the journal's folder")
    parser.add_argument("--kind", type=integer(0, KIND_MAX), default=0, help="tag of the entries (default 0)")
    parser.add_argument(
        "--batch", type=integer(1, BATCH_MAX), default=64, help="entries a commit at most (default 64)"
    )
    parser.add_argument(
        "--slots",
        type=integer(1, SLOTS_MAX),
        help="how many entries can be live (default 65536); fixed when the journal is made",
    )
    parser.add_argument(
        "--segment-bytes",
        type=integer(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX),
        help="size of a segment file; fixed when the journal is made",
    )
    parser.add_argument(
        "--durability",
        choices=[d.value for d in Durability],
        default=Durability.SYNC.value,
        help="what a printed op has reached: the disk (sync, the default), the kernel (os), this process "
        "(buffered); the end of the input makes all of it durable",
    )
    parser.add_argument("--json", action="store_true", help="one object a batch: first_op, last_op, entries")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if sys.stdin is None:
        raise CannotRunError("standard input is closed")
    with open_journal(
        args.directory,
        slots=args.slots,
        segment_bytes=args.segment_bytes,
        durability=Durability(args.durability),
    ) as journal:
        bound = min(BATCH_BYTES_MAX, journal.segment_bytes // 4)
        for lines in _batches(sys.stdin.fileno(), args.batch, bound):
            for ops in _append(journal, lines, args.kind):
                _print(ops, as_json=args.json)
        journal.sync()
    return 0


def _append(journal: Journal, lines: list[bytes], kind: int) -> Iterator[range]:
    """In one commit; where only a part still fits, that part is kept and then JournalFullError."""
    while lines:
        fits = max(1, journal.remaining_capacity)
        yield journal.append_many(lines[:fits], kind=kind)
        lines = lines[fits:]


def _print(ops: range, *, as_json: bool) -> None:
    if as_json:
        output.json_line({"first_op": ops[0], "last_op": ops[-1], "entries": len(ops)})
    else:
        for op in ops:
            output.line(str(op))
    output.flush()


def _batches(fd: int, count_max: int, bytes_max: int) -> Iterator[list[bytes]]:
    """Full batches while input flows; what there is as soon as none waits. One line may be larger
    than `bytes_max`. Blocks for input. PayloadTooLargeError, after what came before such a line."""
    batch: list[bytes] = []
    size = 0
    for line in _lines(fd):
        too_long = line is not None and len(line) > LINE_BYTES_MAX
        if batch and (line is None or too_long or len(batch) == count_max or size + len(line) > bytes_max):
            yield batch
            batch, size = [], 0
        if too_long:
            raise PayloadTooLargeError(f"a line of more than {LINE_BYTES_MAX:,} bytes")
        if line is not None:
            batch.append(line)
            size += len(line)
    if batch:
        yield batch


def _lines(fd: int) -> Iterator[bytes | None]:
    """Lines without their newline; None where reading on would wait. A last line may lack the newline.
    Of a line above LINE_BYTES_MAX comes no more than shows that it is, and then nothing."""
    part = bytearray()
    while True:
        if not select.select([fd], [], [], 0)[0]:
            yield None
        chunk = os.read(fd, READ_BYTES)
        if not chunk:
            break
        first, *rest = chunk.split(b"\n")
        part += first
        if rest:
            yield bytes(part)
            yield from rest[:-1]
            part = bytearray(rest[-1])
        if len(part) > LINE_BYTES_MAX:
            break
    if part:
        yield bytes(part)
