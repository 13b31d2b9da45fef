"""Run by test_under_threads.py: threads do all that a journal offers while the file system fails under them.

Arguments: path; when faulthandler is enabled ("never", "before" or "after"); "sparse" for an index that has
holes. It writes a line when all is under way, and goes on until it is sent one and no append works any more.
Then it tells as JSON what was acknowledged and how each way ended, and, sent a line, how an append ends.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmapwal import BusyError, Journal, JournalError
from mmapwal import format as fmt

# The entries of a segment take more than one page of the index.
SIZES: dict[str, Any] = {"slots": 1 << 16, "segment_bytes": 1 << 21}
FIRST = 400
WRITERS = 3
LINGER_S = 30


def payload(writer: int, number: int) -> bytes:
    return (b"writer %d, number %d; " % (writer, number) * 30)[: 30 + number * 97 % 500]


class Crowd:
    """Threads, each of which does one thing again and again, and how that ended."""

    def __init__(self, journal: Journal, reader: Journal) -> None:
        self.journal = journal
        self.told: list[tuple[int, int, int]] = []  # op, writer, number; as they are acknowledged
        self.ended: dict[str, Counter[str]] = {}
        self._numbers = [0] * (WRITERS + 1)
        self._stop = threading.Event()
        ways: dict[str, Callable[[int], Any]] = {
            "copy": lambda n: journal.copy(1 + n % FIRST),
            "read": lambda n: bytes(journal.read(1 + n % FIRST)),
            "headers": lambda n: journal.headers(copy=True),
            "payloads": lambda n: sum(1 for _ in journal.payloads(1, FIRST)),
            "entries": lambda n: sum(1 for _ in journal.entries(1, FIRST)),
            "columns": lambda n: journal.columns(),
            "follow": lambda n: sum(1 for _ in journal.follow(timeout=0)),
            "readonly copy": lambda n: reader.copy(1 + n % FIRST),
            "readonly follow": lambda n: sum(1 for _ in reader.follow(timeout=0)),
            "verify": lambda n: journal.verify(),
            "stats": lambda n: journal.stats(),
            "compact": lambda n: journal.compact(),
            "user data": lambda n: journal.set_user_data(b"%d" % n),
            "append_many": self._append_many,
        }
        ways |= {f"append {w}": lambda n, w=w: self._append(w) for w in range(1, WRITERS + 1)}
        self._ways = ways
        self._threads = [threading.Thread(target=self._work, args=(name,)) for name in ways]

    def _next(self, writer: int) -> int:
        self._numbers[writer] += 1
        return self._numbers[writer]

    def _append(self, writer: int) -> None:
        number = self._next(writer)
        self.told.append((self.journal.append(payload(writer, number)), writer, number))

    def _append_many(self, _: int) -> None:
        numbers = [self._next(0) for _ in range(3)]
        ops = self.journal.append_many([payload(0, n) for n in numbers])
        self.told.extend((op, 0, n) for op, n in zip(ops, numbers, strict=True))

    def _work(self, name: str) -> None:
        self.ended[name] = Counter()
        n = 0
        while not self._stop.is_set():
            n += 1
            try:
                self._ways[name](n)
                self.ended[name]["well"] += 1
            except BusyError:
                time.sleep(0.001)
            except (OSError, JournalError) as e:
                self.ended[name][type(e).__name__] += 1
                time.sleep(0.001)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        while len(self.ended) < len(self._ways) or not all(c["well"] for c in self.ended.values()):
            time.sleep(0.001)

    def stop(self) -> None:
        """When each append has failed, after a while all the same."""
        bound = time.monotonic() + LINGER_S
        while not all(set(c) - {"well"} for n, c in self.ended.items() if n.startswith("append")):
            time.sleep(0.01)
            if time.monotonic() > bound:
                break
        self._stop.set()
        for thread in self._threads:
            thread.join()


def opened(path: Path, how: list[str]) -> Journal:
    with Journal(path, **SIZES) as journal:
        for number in range(FIRST):
            journal.append(payload(9, number))
    if "sparse" in how:  # as a copy of it may be
        subprocess.run(["fallocate", "--dig-holes", path / fmt.INDEX_NAME], check=True)
    return Journal(path)


def outcome_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (OSError, JournalError) as e:
        return type(e).__name__
    return "well"


def end_with(error: threading.ExceptHookArgs) -> None:
    """What no thread may meet ends all."""
    threading.__excepthook__(error)
    os._exit(1)


def main(path: Path, faults: str, *how: str) -> None:
    threading.excepthook = end_with
    if faults == "before":
        faulthandler.enable()
    journal = opened(path, list(how))
    crowd = Crowd(journal, Journal(path, readonly=True))
    if faults == "after":
        faulthandler.enable()
    crowd.start()
    before = list(crowd.told)
    print("under way", flush=True)
    sys.stdin.readline()
    crowd.stop()
    poisoned = str(journal.poisoned or "")
    print(
        json.dumps({"before": before, "told": crowd.told, "ended": crowd.ended, "poisoned": poisoned}),
        flush=True,
    )
    sys.stdin.readline()
    print(outcome_of(lambda: journal.append(b"afterwards")), flush=True)
    os._exit(0)  # nothing of it can be closed in order


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
