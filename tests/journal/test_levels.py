"""Each durability level under kill -9 at random moments, and under a failure that many wait for."""

from __future__ import annotations

import errno
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmapwal import Durability, Journal, PoisonedError, SyncMethod
from mmapwal.testing import Call

from .watched import Gate, Task, Watched

THREADS = 16
KILLS = 6

# Each line: how many entries were acknowledged, and how many of them a sync had covered.
WRITER = """
import os, sys
from mmapwal import Durability, Journal
interval = float(sys.argv[3])
journal = Journal(sys.argv[1], slots=1 << 18, segment_bytes=65536, durability=Durability(sys.argv[2]),
                  sync_interval_ms=interval or None)
ends, synced = [], journal.last_op or 0
for n in range(synced + 1, 1 << 18):
    assert journal.append(b"entry %d" % n * (1 + n % 30)) == n
    if n % 37 == 0 and not interval and journal.durability is Durability.BUFFERED:
        journal.sync()
        synced = n
    os.write(1, b"%d %d\\n" % (n, synced))
"""


def killed_at_a_random_moment(path: Path, rng: random.Random, *options: object) -> tuple[int, int]:
    """How many entries the child had told of as acknowledged, and as synced."""
    command = [sys.executable, "-c", WRITER, str(path), *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(rng.random() * 0.15)
        child.kill()
        lines = [
            line for line in (first + child.stdout.read()).splitlines(keepends=True) if line[-1:] == b"\n"
        ]
    acknowledged, synced = map(int, lines[-1].split())
    return acknowledged, synced


@pytest.mark.parametrize("durability", list(Durability))
@pytest.mark.parametrize("interval_ms", [0, 2])
def test_killed_at_any_moment_each_level_keeps_what_it_promises(
    tmp_path: Path, durability: Durability, interval_ms: int
) -> None:
    """SYNC and OS: all that was acknowledged. BUFFERED: all before the last sync(). And never a hole."""
    rng = random.Random(17)
    path = tmp_path / "j"
    for _ in range(KILLS):
        acknowledged, synced = killed_at_a_random_moment(path, rng, durability.value, interval_ms)
        with Journal(path) as journal:
            found = len(journal)
            assert found >= (synced if durability is Durability.BUFFERED else acknowledged)
            assert [bytes(p) for p in journal.payloads()] == [
                b"entry %d" % n * (1 + n % 30) for n in range(1, found + 1)
            ]


# --- a failure that many wait for ---------------------------------------------------------------------

FAILING = [
    (Durability.SYNC, SyncMethod.DSYNC, "write_sync"),
    (Durability.SYNC, SyncMethod.FDATASYNC, "sync"),
    (Durability.OS, SyncMethod.FDATASYNC, "write"),
]


def held_up_by(disk: Watched, journal: Journal, kind: str) -> tuple[Gate, list[Task]]:
    """One thread is in the middle of its commit, all others are staged behind it."""
    gate = Gate(lambda c: c.name.startswith("segment") and c.kind == kind)
    disk.on = gate
    tasks = [Task(lambda: journal.append(b"first"))]
    gate.wait()
    for n in range(1, THREADS):
        staged = journal.stats().staged_bytes
        tasks.append(
            Task((lambda: journal.append_many([b"x"] * 3)) if n % 3 else lambda: journal.append(b"x"))
        )
        while journal.stats().staged_bytes == staged:
            pass
    return gate, tasks


@pytest.mark.parametrize(("durability", "method", "kind"), FAILING)
def test_when_a_commit_fails_all_16_threads_are_told_the_one_cause_and_none_hangs(
    open_on: Callable[..., Journal], durability: Durability, method: SyncMethod, kind: str
) -> None:
    for round_ in range(10):
        disk = Watched(sync_method=method)
        journal = open_on(disk, durability=durability, slots=256)
        for n in range(round_ + 1):
            journal.append(b"%d" % n)
        journal.sync()
        gate, tasks = held_up_by(disk, journal, kind)
        broken = OSError(errno.EIO, "broken")
        gate.open(broken)
        errors = [t.finish() for t in tasks]
        assert [type(e) for e in errors] == [PoisonedError] * THREADS
        assert {id(e.__cause__) for e in errors if e} == {id(broken)}
        assert [e.op for e in journal] == list(range(1, round_ + 2))
        journal.close()
        disk.on = lambda call: None
        found = open_on(disk, slots=256)
        assert [bytes(e.payload) for e in found][: round_ + 1] == [b"%d" % n for n in range(round_ + 1)]


def test_when_the_disk_is_full_all_16_threads_are_told_so_and_all_can_go_on(
    open_on: Callable[..., Journal],
) -> None:
    disk = Watched(sync_method=SyncMethod.FDATASYNC)
    journal = open_on(disk, slots=256)
    journal.append(b"there")
    for _ in range(10):
        gate, tasks = held_up_by(disk, journal, "write")
        gate.open(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        errors = [t.finish() for t in tasks]
        assert [type(e) for e in errors] == [OSError] * THREADS
        assert {e.errno for e in errors if isinstance(e, OSError)} == {errno.ENOSPC}
        assert journal.poisoned is None
        disk.on = lambda call: None
        last = journal.last_op or 0
        assert [journal.append(b"%d" % n) for n in range(3)] == [last + 1, last + 2, last + 3]
    journal.close()
    assert len(open_on(disk, slots=256)) == 31


def test_the_sync_that_fails_at_a_random_moment_of_16_threads_loses_nothing_that_was_acknowledged(
    open_on: Callable[..., Journal],
) -> None:
    rng = random.Random(3)
    for _ in range(10):
        disk = Watched()
        journal = open_on(disk, slots=4096, segment_bytes=1 << 20)
        left = itertools.count(rng.randrange(5, 40), -1)
        broken = OSError(errno.EIO, "broken")

        def fail(call: Call, left: Any = left, broken: OSError = broken) -> None:
            if call.name.startswith("segment") and call.kind == "write_sync" and next(left) <= 0:
                raise broken

        disk.on = fail
        acknowledged: dict[int, bytes] = {}

        def work(
            writer: int, journal: Journal = journal, acknowledged: dict[int, bytes] = acknowledged
        ) -> None:
            for n in itertools.count():
                payload = b"%d of %d" % (n, writer)
                acknowledged[journal.append(payload)] = payload

        tasks = [Task(lambda w=w: work(w)) for w in range(THREADS)]
        errors = [t.finish() for t in tasks]
        assert [type(e) for e in errors] == [PoisonedError] * THREADS
        assert {e.__cause__ for e in errors if e} == {broken}
        journal.close()
        disk.on = lambda call: None
        found = open_on(disk, slots=4096, segment_bytes=1 << 20)
        assert acknowledged.items() <= {e.op: bytes(e.payload) for e in found}.items()
