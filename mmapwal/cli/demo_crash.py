"""The demo's crash: starts the child, listens to what it acknowledges, kills it."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, cast

from mmapwal.cli.demo_check import Acknowledgement
from mmapwal.cli.demo_child import ACKNOWLEDGEMENT
from mmapwal.cli.demo_tree import Submission, save
from mmapwal.cli.opening import CannotRunError

SILENCE_S_MAX = 60

# The child imports what this process imports, and nothing from the folder that it is started in.
CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from mmapwal.cli.demo_child import main; sys.exit(main())"
)


def journal_until_killed(
    submitted: Sequence[Submission], work: Path, slots: int, chance: random.Random
) -> list[Acknowledgement]:
    """Lets a child journal the entries until it has acknowledged a random number of them, kills it
    there, and returns all that it acknowledged until it was dead.

    CannotRunError when the child ends by itself, or goes silent.
    """
    save(submitted, work / "submitted")
    kill_after = chance.randint(1, max(1, len(submitted) * 3 // 4)) if submitted else 0
    command = [sys.executable, "-P", "-c", CHILD, "journal", "submitted", str(slots)]
    command.append(json.dumps([os.path.abspath(p) for p in sys.path]))  # noqa: PTH100
    log = work / "child.log"
    with ExitStack() as stack:
        child = stack.enter_context(
            subprocess.Popen(
                command,
                cwd=work,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stack.enter_context(log.open("wb")),
            )
        )
        stack.callback(child.kill)
        acknowledged = []
        if kill_after == 0:
            child.kill()
        for message in _messages(cast(IO[bytes], child.stdout).fileno()):
            acknowledged.append(message)
            if len(acknowledged) == kill_after:
                child.kill()
        child.wait()
    if child.returncode != -signal.SIGKILL:
        said = log.read_text(errors="replace").strip().splitlines()
        raise CannotRunError(
            f"the child ended by itself ({child.returncode}): {said[-1] if said else 'no word'}"
        )
    return acknowledged


def _messages(fd: int) -> Iterator[Acknowledgement]:
    """What the child acknowledges, until it is dead. Each was one write, so none comes in halves."""
    rest = b""
    while True:
        if not select.select([fd], [], [], SILENCE_S_MAX)[0]:
            raise CannotRunError(f"the child has said nothing for {SILENCE_S_MAX} seconds")
        data = os.read(fd, 1 << 16)
        if not data:
            return
        data = rest + data
        whole = len(data) - len(data) % ACKNOWLEDGEMENT.size
        yield from map(Acknowledgement._make, ACKNOWLEDGEMENT.iter_unpack(data[:whole]))
        rest = data[whole:]
