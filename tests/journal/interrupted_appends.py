"""Run by test_signals.py: four threads append while signals whose handlers raise hit them at random.

Arguments: path, seconds, seed. Prints counts as JSON; any other end is a failure.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from mmapwal import Journal

THREADS = 4
INTERRUPTS_MIN, TOLD_MIN = 21, 101  # on a slow machine it goes on until then


class AlarmError(Exception):
    """What the handler of SIGALRM raises."""


class Handler:
    """Raises once for each time that it is armed, so that nothing is interrupted but what shall be."""

    def __init__(self) -> None:
        self.armed = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.armed:
            self.armed = False
            raise AlarmError if number == signal.SIGALRM else KeyboardInterrupt


class Appender:
    """What one thread submitted, and what it was told."""

    def __init__(self, journal: Journal, name: int) -> None:
        self._journal = journal
        self._name = name
        self._numbers = itertools.count()
        self.submitted: set[bytes] = set()
        self.told: dict[int, bytes] = {}

    def append(self) -> None:
        number = next(self._numbers)
        count = 1 if number % 5 else 7
        batch = [b"%d.%d.%d/%d" % (self._name, number, i, count) for i in range(count)]
        self.submitted.update(batch)
        if count == 1:
            self.told[self._journal.append(batch[0])] = batch[0]
        else:
            self.told.update(zip(self._journal.append_many(batch), batch, strict=True))
        if number % 97 == 0:
            self._journal.sync()

    def work(self, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            self.append()


def main(path: str, seconds: float, seed: int) -> dict[str, int]:
    handler, deadline, chance = Handler(), time.monotonic() + seconds, random.Random(seed)
    for number in (signal.SIGALRM, signal.SIGINT):
        signal.signal(number, handler)
    journal = Journal(path, slots=int((seconds + 10) * 100_000), segment_bytes=1 << 16)
    mine, *others = appenders = [Appender(journal, name) for name in range(THREADS)]
    interrupted, signals, over = 0, 0, threading.Event()

    def goes_on() -> bool:
        few = interrupted < INTERRUPTS_MIN or sum(len(each.told) for each in appenders) < TOLD_MIN
        return time.monotonic() < deadline or few

    def kill() -> None:  # in the other threads no handler runs: the signal ends what they wait in
        nonlocal signals
        while not over.wait(chance.random() * 0.002):
            signal.pthread_kill(chance.choice(targets), chance.choice([signal.SIGINT, signal.SIGALRM]))
            signals += 1

    threads = [threading.Thread(target=other.work, args=(goes_on,)) for other in others]
    for thread in threads:
        thread.start()
    targets = [threading.get_ident()] * 3 + [thread.ident or 0 for thread in threads]
    killer = threading.Thread(target=kill)
    killer.start()
    while goes_on():
        try:
            handler.armed = True
            mine.work(goes_on)
            handler.armed = False
        except (AlarmError, KeyboardInterrupt):
            interrupted += 1
    handler.armed = False
    over.set()
    for thread in (killer, *threads):
        thread.join(30)
    if any(thread.is_alive() for thread in threads) or journal.poisoned is not None:
        raise SystemExit(f"a thread hangs, or it is poisoned: {journal.poisoned}")
    journal.close()
    told = {op: payload for each in appenders for op, payload in each.told.items()}
    submitted = set().union(*(each.submitted for each in appenders))
    found = check(path, told, submitted)
    return {
        "signals": signals, "interrupted": interrupted, "acknowledged": len(told),
        "unknown, and there": found - len(told), "unknown, and not there": len(submitted) - found,
    }  # fmt: skip


def check(path: str, told: dict[int, bytes], submitted: set[bytes]) -> int:
    """How many there are. All that was told is there, nothing else than what was submitted, each once,
    batches whole."""
    with Journal(path) as journal:
        found = {e.op: bytes(e.payload) for e in journal}
        if not journal.verify().ok:
            raise SystemExit(f"{journal.verify()}")
    lost = [op for op, payload in told.items() if found.get(op) != payload]
    invented = set(found.values()) - submitted
    if lost or invented or len(set(found.values())) != len(found):
        raise SystemExit(f"lost {lost[:9]}, invented {list(invented)[:9]}, of {len(found)}")
    batches: dict[bytes, int] = defaultdict(int)
    for payload in found.values():
        name, _, whole = payload.rpartition(b"/")
        batches[name.rpartition(b".")[0] + b"/" + whole] += 1
    torn = [name for name, count in batches.items() if count != int(name.rpartition(b"/")[2])]
    if torn:
        raise SystemExit(f"batches are torn: {torn[:9]}")
    return len(found)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))))
