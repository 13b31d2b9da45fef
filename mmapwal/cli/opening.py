"""How subcommands open a journal, and how they read numbers: with plain errors."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmapwal import Journal
from mmapwal.cli.output import Progress


class CannotRunError(Exception):
    """What was asked for cannot be done; the message is for the user. Exit code 2."""


def open_journal(path: Path, **options: Any) -> Journal:
    """Opens it with the sizes that it was made with, unless others are given. Blocks for its recovery.

    CannotRunError for options that make no sense; else what Journal raises.
    """
    progress = Progress(f"recovering {path}")
    try:
        return Journal(path, progress=progress, **options)
    except ValueError as e:
        raise CannotRunError(f"{path}: {e}") from e
    finally:
        progress.close()


def integer(low: int, high: int) -> Callable[[str], int]:
    """For argparse: an int from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in {low} .. {high}")
        return value

    return parse
