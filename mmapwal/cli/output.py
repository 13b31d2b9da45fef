"""What all subcommands print with: lines, JSON, tables, progress. Plain text; rich where it helps."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TextIO

from mmapwal.verify import Problem

SHORT_TEXT_CHARS = 72
PROGRESS_AFTER_S = 1.0
PROGRESS_EVERY_S = 0.2

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def line(text: str = "") -> None:
    """One line to standard output; what its encoding cannot say is escaped, never an error."""
    print(_speakable(text, sys.stdout))


def flush() -> None:
    if sys.stdout is not None:  # closed by whoever started us: print() then says nothing
        sys.stdout.flush()


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _speakable(text: str, stream: TextIO | None) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def json_line(value: dict[str, Any]) -> None:
    """One JSON object on one line, ASCII only: names that are not UTF-8 survive as \\udcXX."""
    print(json.dumps(value, separators=(",", ":")))


def error(text: str) -> None:
    """One line to standard error."""
    print(_speakable(f"mmapwal: {text}", sys.stderr), file=sys.stderr)


def iso_time(timestamp_ns: int) -> str:
    """Nanoseconds since the Unix epoch as ISO 8601, UTC, all nine digits."""
    seconds, ns = divmod(timestamp_ns, 1_000_000_000)
    return f"{(_EPOCH + timedelta(seconds=seconds)).strftime('%Y-%m-%dT%H:%M:%S')}.{ns:09d}Z"


def problem_text(problem: Problem) -> str:
    """What is wrong, and where, in a form that scripts can split."""
    op = "?" if problem.op is None else problem.op
    length = f" length {problem.length}" if problem.length else ""
    return f"{problem.segment} offset {problem.offset}{length} lsn {problem.lsn} op {op}: {problem.reason}"


def payload_text(payload: memoryview, limit_chars: int = SHORT_TEXT_CHARS) -> str:
    """The start of a payload on one line: as text when that is printable UTF-8, else as 0x and hex."""
    head = bytes(payload[: 4 * limit_chars])
    cut = len(payload) > len(head)
    text = _printable(head, cut=cut)
    if text is None:
        text = "0x" + bytes(payload[:limit_chars]).hex()
    if cut or len(text) > limit_chars:
        return text[: limit_chars - 1] + "…"
    return text


def _printable(head: bytes, *, cut: bool) -> str | None:
    try:
        text = head.decode()
    except UnicodeDecodeError as e:
        # The cut may have gone through a character: that alone does not make it binary.
        if not cut or e.start < len(head) - 3:
            return None
        text = head[: e.start].decode()
    return text if text.isprintable() else None


def count_text(value: int) -> str:
    return f"{value:,}"


def bytes_text(value: int) -> str:
    """12,345,678 bytes (11.8 MiB)"""
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{value:,} bytes" if unit == "B" else f"{value:,} bytes ({size:.1f} {unit})"


def table(title: str, rows: Iterable[Sequence[str]]) -> None:
    """Two columns, name and value, under a title."""
    rows = [(name, value) for name, value in rows]
    if is_terminal(sys.stdout) and _rich_table(title, rows):
        return
    line(title)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        line(f"  {name:<{width}}  {value}".rstrip())


def _rich_table(title: str, rows: Iterable[Sequence[str]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    # Text, not markup: a path may hold brackets.
    pretty = Table(title=Text(_speakable(title, sys.stdout)), show_header=False, title_justify="left")
    for name, value in rows:
        pretty.add_row(name, Text(_speakable(value, sys.stdout)))
    Console(file=sys.stdout).print(pretty)
    return True


class Progress:
    """A line on standard error that rewrites itself, on a terminal, once a second has gone by.

    Called with (done, total) in bytes; close() wipes the line.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._next = time.monotonic() + PROGRESS_AFTER_S
        self._shown = False
        self._terminal = is_terminal(sys.stderr)

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._terminal or now < self._next:
            return
        self._next = now + PROGRESS_EVERY_S
        self._shown = True
        percent = 100 * done // total if total else 100
        sys.stderr.write(f"\r\x1b[K{self._what}: {percent} % of {bytes_text(total)}")
        sys.stderr.flush()

    def close(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False
