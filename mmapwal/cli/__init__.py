"""The command line. One module a subcommand; each has add(subparsers) and run(args) -> exit code.

Exit codes: 0 fine; 1 a problem was found, or the demo found a difference; 2 wrong usage, or the
journal could not be opened or written; 130 interrupted; 141 whoever read the output went away.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from mmapwal.cli import append, backup, compact, demo, dump, output, repair, stat, tail, verify
from mmapwal.cli.opening import CannotRunError
from mmapwal.errors import CorruptionError, JournalError, LockedError

__all__ = ["main"]

EXIT_CANNOT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. `argv` without the program's name; None: sys.argv.

    Errors that a user or a disk can cause become one line on standard error.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as e:  # argparse has said what there is to say
        return e.code if isinstance(e.code, int) else EXIT_CANNOT
    try:
        code: int = args.run(args)
        output.flush()
    except KeyboardInterrupt:
        output.error("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_BROKEN_PIPE
    except (JournalError, OSError, CannotRunError) as e:
        _settle_stdout()
        output.error(_message(e))
        return EXIT_CANNOT
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmapwal",
        description="A durable journal: what was acknowledged survives kill -9 and a power cut.",
        epilog="exit codes: 0 fine; 1 a problem was found; 2 wrong usage or the journal cannot be used",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (append, dump, tail, stat, verify, repair, compact, backup, demo):
        module.add(commands)
    return parser


def _version() -> str:
    try:
        return version("mmapwal")
    except PackageNotFoundError:
        return "unknown"


def _message(error: Exception) -> str:
    if isinstance(error, CorruptionError):
        return f"damaged: {error}"
    if isinstance(error, OSError) and error.strerror:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        return f"{name}: {error.strerror}" if name else error.strerror
    if isinstance(error, LockedError):
        return f"{error}: tail, stat, verify and backup can look at it meanwhile"
    cause = f" ({error.__cause__})" if isinstance(error.__cause__, OSError) else ""
    return f"{error or type(error).__name__}{cause}"


def _settle_stdout() -> None:
    """What cannot be written now (a full disk) must not fail again when the interpreter ends."""
    try:
        output.flush()
    except OSError:
        _silence_stdout()


def _silence_stdout() -> None:
    """Nobody reads any more: what is still buffered goes nowhere."""
    try:
        fd = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)
