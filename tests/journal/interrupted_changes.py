"""Run by test_signals.py: signals whose handler raises hit appends, drains, truncations, watermarks,
compactions and closes at random.

Arguments: path, seconds, seed. Prints counts as JSON; any other end is a failure.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from mmapwal import Journal

INTERRUPTS_MIN, CHANGES_MIN = 21, 51  # on a slow machine it goes on until then
SIZES: dict[str, Any] = {"slots": 4096, "segment_bytes": 1 << 14}


class AlarmError(Exception):
    """What the handler raises."""


class Handler:
    """Raises once for each time that it is armed."""

    armed = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.armed:
            self.armed = False
            raise AlarmError


class Life:
    """What has to be there, and what may be: what was interrupted is unclear until somebody looks."""

    def __init__(self, path: str, seed: int) -> None:
        self._path = path
        self._chance = random.Random(seed)
        self._must: dict[int, bytes] = {}
        self._may: dict[int, bytes] = {}
        self.changes = 0

    def open(self) -> Journal:
        return Journal(self._path, **SIZES)

    def chance(self, share: float) -> bool:
        return self._chance.random() < share

    def _unclear(self, wanted: Callable[[int], bool]) -> None:
        self._may.update({op: self._must.pop(op) for op in list(self._must) if wanted(op)})

    def _gone(self, wanted: Callable[[int], bool]) -> None:
        for op in [op for op in self._may if wanted(op)]:
            del self._may[op]

    def change(self, journal: Journal) -> None:
        low = journal.snapshot_op
        last, what = max(self._must, default=low), self._chance.randrange(10)
        if what < 5:
            self._append(journal, max(last, low, *self._may, 0) + 1)
        elif what < 7:
            self._drain(journal, self._chance.randrange(low + 1, max(last, low) + 2))
        elif what == 7:
            to = max(low, last - 60)
            self._unclear(lambda op: op <= to)
            journal.set_snapshot_op(to)
            self._gone(lambda op: op <= to)
        elif what == 8 and last > low:
            cut = self._chance.randrange(max(low + 1, last - 5), last + 1)
            self._unclear(lambda op: op >= cut)
            journal.truncate_from(cut)
            self._gone(lambda op: op >= cut)
        else:
            journal.compact()
        self.changes += 1

    def _append(self, journal: Journal, first: int) -> None:
        batch = [b"%d" % self._chance.getrandbits(60) * 9 for _ in range(self._chance.randrange(1, 20))]
        self._may.update(zip(range(first, first + len(batch)), batch, strict=True))
        for op in journal.append_many(batch, first_op=first):
            self._must[op] = self._may.pop(op)

    def _drain(self, journal: Journal, first: int) -> None:
        self._unclear(lambda op: first <= op <= first + 4)
        for entry in journal.drain(first, first + 4):
            if self._may[entry.op] != entry.payload:
                raise SystemExit(f"op {entry.op} was drained with what it never had")
        self._gone(lambda op: first <= op <= first + 4)

    def look(self) -> None:
        """What became of what was unclear."""
        with self.open() as journal:
            found = {e.op: bytes(e.payload) for e in journal}
            if not journal.verify().ok:
                raise SystemExit(f"{journal.verify()}")
        lost = [op for op, payload in self._must.items() if found.get(op) != payload]
        invented = [op for op, p in found.items() if p not in (self._must.get(op), self._may.get(op))]
        if lost or invented:
            raise SystemExit(f"lost {lost[:9]}, invented {invented[:9]}, of {len(found)}")
        self._must = found
        self._may.clear()


def main(path: str, seconds: float, seed: int) -> dict[str, int]:
    handler, deadline, life = Handler(), time.monotonic() + seconds, Life(path, seed)
    signal.signal(signal.SIGALRM, handler)
    me, chance = threading.get_ident(), random.Random(seed)
    interrupted = lives = 0

    def goes_on() -> bool:
        return time.monotonic() < deadline or interrupted < INTERRUPTS_MIN or life.changes < CHANGES_MIN

    def kill() -> None:
        while goes_on():
            time.sleep(chance.random() * 0.006)
            signal.pthread_kill(me, signal.SIGALRM)

    killer = threading.Thread(target=kill)
    killer.start()
    while goes_on():
        journal, stays = life.open(), True
        while stays and goes_on():
            try:
                handler.armed = True
                while goes_on():
                    life.change(journal)
                handler.armed = False
            except AlarmError:
                interrupted += 1
                stays = life.chance(0.8)
        while not journal._engine.closed:
            try:
                handler.armed = life.chance(0.5)
                journal.close()
                handler.armed = False
            except AlarmError:
                interrupted += 1
        life.look()
        lives += 1
    killer.join()
    life.look()
    return {"changes": life.changes, "interrupted": interrupted, "lives": lives}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))))
