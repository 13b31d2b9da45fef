"""All at once, for as long as you like: threads that append, read, hold views, drain, truncate, move the
watermark, compact, verify, back up, follow, and at last close, under a checker."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mmapwal import (
    BusyError,
    ClosedError,
    Journal,
    JournalFullError,
    MissingOpError,
    StaleOpError,
    TruncatedError,
)

SIZES: dict[str, Any] = {"slots": 8192, "segment_bytes": 1 << 18}
KEPT = 3000  # behind the last op: what the watermark leaves
HELD = 200  # views


class Truth:
    """What was acknowledged, and what nobody has begun to remove."""

    def __init__(self) -> None:
        self.entries: dict[int, bytes] = {}
        self._ever: dict[int, list[bytes]] = {}  # of ops that were cut off and appended again
        self._guard = threading.Lock()
        self._appending = 0
        self._nobody = threading.Condition(self._guard)
        self._still = False

    @contextmanager
    def appending(self) -> Iterator[None]:
        """Not while a truncation is under way: nobody could say on which side an append was."""
        with self._nobody:
            self._nobody.wait_for(lambda: not self._still)
            self._appending += 1
        try:
            yield
        finally:
            with self._nobody:
                self._appending -= 1
                self._nobody.notify_all()

    @contextmanager
    def truncating(self) -> Iterator[None]:
        with self._nobody:
            self._nobody.wait_for(lambda: not self._still)
            self._still = True
            self._nobody.wait_for(lambda: self._appending == 0)
        try:
            yield
        finally:
            with self._nobody:
                self._still = False
                self._nobody.notify_all()

    def acknowledged(self, first: int, payloads: list[bytes]) -> None:
        with self._guard:
            for op, payload in enumerate(payloads, first):
                self.entries[op] = payload
                self._ever.setdefault(op, []).append(payload)

    @contextmanager
    def removing(self, wanted: Callable[[int], bool]) -> Iterator[dict[int, bytes]]:
        with self._guard:
            gone = {op: self.entries.pop(op) for op in list(self.entries) if wanted(op)}
        yield gone

    def last(self) -> int:
        with self._guard:
            return max(self.entries, default=0)

    def some(self, chance: random.Random) -> int | None:
        with self._guard:
            return chance.choice(list(self.entries)) if self.entries else None

    def was(self, op: int, payload: bytes) -> bool:
        """Whether the op has ever been acknowledged with that."""
        with self.truncating():  # what is appended is acknowledged by now
            return payload in self._ever.get(op, ())

    def times(self, op: int) -> int:
        """How often the op was acknowledged."""
        with self._guard:
            return len(self._ever.get(op, ()))

    def expected(self, op: int) -> bytes | None:
        with self._guard:
            return self.entries.get(op)


class Soak:
    """The threads, and what they found wrong."""

    def __init__(self, path: Path, seconds: float, seed: int) -> None:
        self.path = path
        self.journal = Journal(path / "j", **SIZES)
        self.truth = Truth()
        self.failures: list[str] = []
        self._over = False
        self.counts: dict[str, int] = {}
        self.deadline = time.monotonic() + seconds
        self._seed = itertools.count(seed * 1000)

    def run(self) -> None:
        works = (
            self.appends, self.appends, self.appends_many, self.reads, self.reads, self.holds, self.drains,
            self.truncates, self.shrinks, self.compacts, self.looks, self.backs_up, self.follows,
        )  # fmt: skip
        threads = [threading.Thread(target=self._repeat, args=(work,), name=work.__name__) for work in works]
        for thread in threads:
            thread.start()
        while time.monotonic() < self.deadline and not self.failures:
            time.sleep(0.05)
        self.journal.close()  # while they all go on
        self._over = True  # who finds nothing to do is not told by the journal
        for thread in threads:
            thread.join(60)
        self.failures += [f"{thread.name} hangs" for thread in threads if thread.is_alive()]

    def _repeat(self, work: Callable[[random.Random], None]) -> None:
        chance = random.Random(next(self._seed))
        name = work.__name__
        try:
            while not self.failures and not self._over:
                work(chance)
                self.counts[name] = self.counts.get(name, 0) + 1
        except ClosedError:
            if time.monotonic() < self.deadline and not self.failures:
                self.failures.append(f"{name}: closed too early")
        except Exception as e:  # noqa: BLE001  # told by the test
            self.failures.append(f"{name}: {type(e).__name__}: {e}")

    def _wrong(self, what: str) -> None:
        self.failures.append(what)

    # --- what they do -------------------------------------------------------------------------------

    def _payload(self, chance: random.Random) -> bytes:
        return chance.randbytes(chance.choice([0, 8, 100, 256, 1000, 5000]))

    def appends(self, chance: random.Random) -> None:
        payload = self._payload(chance)
        with self.truth.appending():
            try:
                op = self.journal.append(payload)
            except JournalFullError:
                return
            self.truth.acknowledged(op, [payload])

    def appends_many(self, chance: random.Random) -> None:
        batch = [self._payload(chance) for _ in range(chance.randrange(1, 20))]
        with self.truth.appending():
            try:
                ops = self.journal.append_many(batch)
            except JournalFullError:
                return
            self.truth.acknowledged(ops.start, batch)

    def reads(self, chance: random.Random) -> None:
        op = self.truth.some(chance)
        if op is None:
            return
        times, before = self.truth.times(op), self.truth.expected(op)
        try:
            how = chance.randrange(4)
            if how == 0:
                found = bytes(self.journal.read(op))
            elif how == 1:
                found = self.journal.copy(op)
            elif how == 2:
                found = bytes(self.journal[op].payload)
            else:
                found = next((bytes(p) for p in self.journal.payloads(op, op)), b"missing")
                if found == b"missing":
                    raise MissingOpError(op)
        except MissingOpError:
            there = before is not None and self.truth.expected(op) == before
            if there and self.truth.times(op) == times:  # else it went, and the next one is like it
                self._wrong(f"op {op} is missing")
            return
        if found not in (before, self.truth.expected(op)) and not self.truth.was(op, found):
            self._wrong(f"op {op} has other bytes")

    def holds(self, chance: random.Random) -> None:
        held = []
        for _ in range(HELD):
            op = self.truth.some(chance)
            if op is None:
                return
            try:
                view = self.journal.read(op)
            except MissingOpError:
                continue
            held.append((op, view, bytes(view)))
            time.sleep(0.001)
        for op, view, was in held:
            if view != was:
                self._wrong(f"a view of op {op} has changed")

    def drains(self, chance: random.Random) -> None:
        time.sleep(0.01)
        with self.truth.truncating():  # what is appended is acknowledged by now
            top = self.truth.last()
        first = max(1, top - chance.randrange(100, KEPT))
        last = first + chance.randrange(20)
        if last >= top - 50:
            return
        with self.truth.removing(lambda op: first <= op <= last) as gone:
            for entry in self._in_turn(lambda: self.journal.drain(first, last)):
                if gone.get(entry.op) != entry.payload:
                    self._wrong(f"op {entry.op} was drained with other bytes")

    def truncates(self, chance: random.Random) -> None:
        time.sleep(0.2)
        with self.truth.truncating():
            last = self.truth.last()
            cut = last - chance.randrange(30)
            if cut <= self.journal.snapshot_op or cut < 1:
                return
            with self.truth.removing(lambda op: op >= cut):
                self._in_turn(lambda: self.journal.truncate_from(cut))

    def shrinks(self, chance: random.Random) -> None:
        time.sleep(0.02)
        to = self.truth.last() - KEPT
        if to > self.journal.snapshot_op:
            with self.truth.removing(lambda op: op <= to):
                self._in_turn(lambda: self.journal.set_snapshot_op(to))

    def compacts(self, chance: random.Random) -> None:
        time.sleep(0.03)
        self._in_turn(lambda: self.journal.compact(wait=chance.random() < 0.3))

    def looks(self, chance: random.Random) -> None:
        report = self.journal.verify()
        if not report.ok:
            self._wrong(f"verify: {report.problems[0]}")
        self.journal.stats()
        ops = [entry.op for entry in self.journal.entries()]
        if ops != sorted(set(ops)):
            self._wrong("the entries are not in order")
        time.sleep(0.1)

    def backs_up(self, chance: random.Random) -> None:
        time.sleep(0.5)
        with self.truth.truncating():  # so that it can be said what has to be there
            before = dict(self.truth.entries)
            copy = self.path / "copy"
            self.journal.backup(copy)
        with Journal(copy) as journal:
            found = {e.op: bytes(e.payload) for e in journal}
        for file in [*copy.iterdir()]:
            file.unlink()
        copy.rmdir()
        still = {op: payload for op, payload in before.items() if self.truth.expected(op) == payload}
        if any(found.get(op) != payload for op, payload in still.items()):
            self._wrong("a backup has lost something")

    def follows(self, chance: random.Random) -> None:
        seen: dict[int, bytes] = {}
        entries = self.journal.follow(timeout=0.05)
        for _ in range(20):
            try:
                for entry in itertools.islice(entries, 500):
                    seen[entry.op] = bytes(entry.payload)
            except TruncatedError as e:
                seen = {op: payload for op, payload in seen.items() if op < e.op}
            except StaleOpError:
                seen.clear()
        for op, payload in seen.items():
            if self.truth.expected(op) != payload and not self.truth.was(op, payload):
                self._wrong(f"op {op} was followed with other bytes")

    def _in_turn(self, call: Callable[[], Any]) -> Any:
        """One shrinking operation at a time: the others wait."""
        while True:
            try:
                return call()
            except BusyError:
                time.sleep(0.001)


@pytest.mark.parametrize("seed", [1])
def test_whatever_threads_do_at_once_every_entry_is_right_and_no_view_changes(
    tmp_path: Path, soak_seconds: float, seed: int, tally: Callable[[str, int], None]
) -> None:
    soak = Soak(tmp_path, soak_seconds, seed)
    soak.run()
    assert soak.failures == []
    with Journal(tmp_path / "j") as journal:
        found = {e.op: bytes(e.payload) for e in journal}
        assert journal.verify().ok
        lost = {op for op, payload in soak.truth.entries.items() if found.get(op) != payload}
        assert not lost
    for name, count in soak.counts.items():
        tally(f"soak: {name}", count)
    assert min(soak.counts.get(name, 0) for name in ("appends", "appends_many", "reads")) > 20
