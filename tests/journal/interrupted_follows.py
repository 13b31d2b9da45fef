"""Run by test_signals.py: the main thread follows what another appends, and a handler raises into it.

Arguments: path, seconds, seed. Prints counts as JSON; any other end is a failure.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from typing import Any

from mmapwal import Durability, Journal, following

INTERRUPTS_MIN = 500  # on a slow machine it goes on until then
BATCH = 64
ROWS = 8  # so that it often looks for what comes next


class HitError(Exception):
    """What the handler raises."""


class Given:
    """How many entries the follower has."""

    count = 0


def hit(_number: int, _frame: Any) -> None:
    raise HitError


def main(path: str, seconds: float, seed: int) -> None:
    choose = random.Random(seed)
    following.ROWS = ROWS
    signal.signal(signal.SIGALRM, hit)
    journal = Journal(path, slots=4096, segment_bytes=1 << 18, durability=Durability.OS)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # the thread's, not the main one's
    ended = threading.Event()
    given = Given()
    appender = threading.Thread(target=append, args=(journal, given, ended))
    appender.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    entries, interrupted = journal.follow(timeout=0.05), 0
    end = time.monotonic() + seconds
    stopping = done = False
    while not done:
        if not stopping and time.monotonic() > end and interrupted >= INTERRUPTS_MIN:
            ended.set()
            appender.join()
            stopping = True
        try:
            if not stopping:
                signal.setitimer(signal.ITIMER_REAL, choose.uniform(2e-5, 2e-3))
            for entry in entries:
                given.count += 1
                if entry.op != given.count:
                    raise SystemExit(f"op {entry.op} instead of {given.count}, by {interrupted} interrupts")
            done = stopping
        except HitError:
            interrupted += 1
    assert given.count == journal.last_op, (given.count, journal.last_op)
    print(json.dumps({"interrupted": interrupted, "entries": given.count}))
    journal.close()


def append(journal: Journal, given: Given, ended: threading.Event) -> None:
    while not ended.is_set():
        journal.append(b"one")
        journal.sync()
        journal.append_many([b"many"] * BATCH)
        journal.sync()
        if (last := journal.last_op or 0) > journal.snapshot_op + 2048:
            while given.count < last - 1024 and not ended.is_set():
                time.sleep(0.001)
            journal.set_snapshot_op(min(last - 1024, given.count))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
