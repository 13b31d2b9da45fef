"""Backups of a replica that is submitted to and checkpoints meanwhile, by its process and by another."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmapwal import Entry, JournalFullError, recover

BACKUP = """
import sys
from mmapwal import SystemDirectory
from mmapwal.backup import backup_in_use

for line in sys.stdin:
    with SystemDirectory(sys.argv[1]) as source:
        print(backup_in_use(source, line.strip()).snapshot_op, flush=True)
"""


class Ledger:
    """A state machine that has all that it was ever given, by op."""

    def __init__(self) -> None:
        self.entries: dict[int, str] = {}

    def apply(self, entry: Entry) -> int:
        self.entries[entry.op] = bytes(entry.payload).decode()
        return entry.op

    def snapshot(self) -> bytes:
        return json.dumps(list(self.entries.items())).encode()

    def restore(self, snapshot: memoryview) -> None:
        self.entries = dict(json.loads(bytes(snapshot)))


class Load:
    """Threads that submit, and one that checkpoints: snapshots are made, paired and pruned."""

    def __init__(self, path: Path) -> None:
        self.replica = recover(path, Ledger(), slots=512, segment_bytes=16384)
        self.acknowledged: dict[int, str] = {}
        self.checkpoints = 0
        self.errors: list[Exception] = []
        self._stop = threading.Event()
        work: list[Callable[[], None]] = [self._checkpoints, *[self._submits] * 2]
        self._threads = [threading.Thread(target=self._run, args=(each,)) for each in work]
        for thread in self._threads:
            thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            while not self._stop.is_set():
                work()
        except Exception as e:  # noqa: BLE001  # looked at in stop()
            self.errors.append(e)

    def _submits(self) -> None:
        number = len(self.acknowledged)
        payload = f"{threading.get_ident()} {number} " + "x" * (number % 700)
        try:
            self.acknowledged[self.replica.submit(payload.encode())] = payload
        except JournalFullError:
            time.sleep(0.001)

    def _checkpoints(self) -> None:
        self.replica.checkpoint()
        self.checkpoints += 1
        self._stop.wait(0.005)

    def await_checkpoint(self) -> None:
        """One that begins after the call, and more that is acknowledged."""
        enough, ops = self.checkpoints + 2, len(self.acknowledged)
        while not self.errors and (self.checkpoints < enough or len(self.acknowledged) == ops):
            time.sleep(0.005)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.replica.close()
        assert not self.errors


def check_backup(copy: Path, look: Path, before: dict[int, str], load: Load) -> None:
    """Recovers a copy of the backup, so that it stays one: what was acknowledged, and nothing else."""
    subprocess.run(["cp", "-r", copy, look], check=True)
    with recover(look, Ledger()) as replica:
        entries = dict(replica.machine.entries)  # type: ignore[attr-defined]
        assert replica.journal.verify().ok
    assert {op: entries.get(op) for op in before} == before
    assert sorted(entries) == list(range(1, len(entries) + 1))
    known = dict(load.acknowledged)
    assert all(entries[op] == known[op] for op in entries.keys() & known.keys())


def test_while_a_replica_checkpoints_each_backup_recovers_to_all_that_was_acknowledged_before_it_began(
    tmp_path: Path, tally: Callable[[str, int], None]
) -> None:
    load = Load(tmp_path / "j")
    other: Any = subprocess.Popen(
        [sys.executable, "-c", BACKUP, tmp_path / "j"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    paired: list[int] = []
    try:
        with other:
            for number in range(16):
                load.await_checkpoint()
                copy = tmp_path / (f"copy{number}" if number % 4 < 2 else "copy")
                before = dict(load.acknowledged)
                if number % 2:
                    paired.append(load.replica.journal.backup(copy).snapshot_op or 0)
                else:
                    print(copy, file=other.stdin, flush=True)
                    paired.append(int(other.stdout.readline()))
                check_backup(copy, tmp_path / f"look{number}", before, load)
            other.stdin.close()
    finally:
        load.stop()
    assert sorted(set(paired)) == paired  # another snapshot each time
    assert load.checkpoints > len(paired)
    tally("backups of a replica that checkpoints, each recovered", len(paired))
    tally("checkpoints meanwhile", load.checkpoints)
