"""Runs a scenario on a crash disk, and a check on what a crash at each place of it would leave."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmapwal.testing.disk import CrashDisk
from mmapwal.testing.states import EXHAUSTIVE_MAX, Choice, Point, StateKey

Scenario = Callable[[CrashDisk, Callable[..., None]], object]
Check = Callable[[CrashDisk, Sequence[Any]], object]

_SHRINK_CHECKS_MAX = 400
_SHOWN_EFFECTS = 12


@dataclass(frozen=True, slots=True)
class CrashStats:
    """What was explored. `points`: places where the power went; `states`: disks that were looked at;
    `distinct`: those that were checked, no two the same; `exhaustive_points`: places where every state was
    (of more than twelve unsynced changes of names in one directory, of a sample of their parts and orders);
    `seconds`, and how many of them the check took."""

    points: int
    states: int
    distinct: int
    exhaustive_points: int
    seconds: float
    check_seconds: float


class _Explorer:
    def __init__(self, disk: CrashDisk, notes: list[tuple[int, Any]], check: Check) -> None:
        self.disk = disk
        self.effects = disk.effects
        self._notes = notes
        self._check = check
        self._seen: set[tuple[StateKey, int]] = set()
        self.states = 0
        self.exhaustive = 0
        self.check_seconds = 0.0

    def acknowledged(self, count: int) -> list[Any]:
        return [what for at, what in self._notes if at <= count]

    def explore(self, seed: int, max_states: int) -> None:
        replay = self.disk.replay()
        total = len(self.effects) + 1
        for count in range(total):
            if count:
                replay.apply(self.effects[count - 1])
            left = max_states - len(self._seen)
            self._explore_point(Point(replay), count, seed, -(-left // (total - count)))

    def _explore_point(self, point: Point, count: int, seed: int, allowed: int) -> None:
        acknowledged = self.acknowledged(count)
        rng = random.Random(f"{seed}:{count}")
        limit = EXHAUSTIVE_MAX if point.state_count <= allowed * 16 else allowed * 4
        found = 0
        for choice in point.choices(rng, limit):
            if found >= allowed:
                return
            self.states += 1
            key = (point.key(choice), len(acknowledged))
            if key in self._seen:
                continue
            self._seen.add(key)
            found += 1
            error = self._try(point, choice, acknowledged)
            if error is not None:
                self._fail(point, choice, count, error)
        self.exhaustive += point.state_count <= limit

    def _try(self, point: Point, choice: Choice, acknowledged: list[Any]) -> Exception | None:
        state = self.disk.state(point, choice)
        began = time.perf_counter()
        try:
            self._check(state, list(acknowledged))
        except Exception as e:  # noqa: BLE001  # whatever the check ends with is its verdict
            return e
        finally:
            self.check_seconds += time.perf_counter() - began
        return None

    def _fail(self, point: Point, choice: Choice, count: int, error: Exception) -> None:
        choice, error = self._shrink(point, choice, count, error)
        raise AssertionError(self._report(point, choice, count, error)) from error

    def _shrink(self, point: Point, choice: Choice, count: int, error: Exception) -> tuple[Choice, Exception]:
        """Towards everything kept, and towards nothing kept; the one that is told in fewer words."""
        acknowledged = self.acknowledged(count)
        left = _SHRINK_CHECKS_MAX
        found: list[tuple[Choice, Exception]] = []
        for goal in (point.everything(), point.nothing()):
            best, why = choice, error
            changed = True
            while changed:
                changed = False
                for i, option in enumerate(goal):
                    if best[i] == option or left <= 0:
                        continue
                    left -= 1
                    smaller = (*best[:i], option, *best[i + 1 :])
                    e = self._try(point, smaller, acknowledged)
                    if e is not None:
                        best, why, changed = smaller, e, True
            found.append((best, why))
        return min(found, key=lambda f: min(map(len, point.describe(f[0]))))

    def _report(self, point: Point, choice: Choice, count: int, error: Exception) -> str:
        kept, lost = point.describe(choice)
        acknowledged = self.acknowledged(count)
        lines = [
            f"not safe against a crash after effect {count} of {len(self.effects)}: "
            f"{type(error).__name__}: {error}",
            f"acknowledged before it: {len(acknowledged)}"
            + (f", the last: {acknowledged[-1]!r:.200}" if acknowledged else ""),
        ]
        lines += _told("unsynced and lost:", lost, len(lost) > len(kept))
        lines += _told("unsynced and on the disk:", kept, len(kept) >= len(lost))
        first = max(0, count - _SHOWN_EFFECTS)
        lines.append("the last effects before the crash:")
        lines += [f"  #{i + 1} {e}" for i, e in enumerate(self.effects[first:count], first)]
        if count < len(self.effects):
            lines += ["what would have come next:", f"  #{count + 1} {self.effects[count]}"]
        return "\n".join(lines)


def _told(title: str, items: list[str], longer: bool) -> list[str]:
    """The shorter list whole; of the longer one, when it is long, how much it is."""
    if not items:
        return [f"{title} nothing"]
    if longer and len(items) > _SHOWN_EFFECTS:
        return [f"{title} everything else, {len(items)} effects"]
    return [title, *(f"  {item}" for item in items)]


def assert_crash_safe(
    scenario: Scenario,
    check: Check,
    *,
    seed: int = 0,
    max_states: int = 2000,
    disk: CrashDisk | None = None,
) -> CrashStats:
    """Runs `scenario(disk, acknowledge)` once, and `check(state, acknowledged)` for crashes in it.

    The scenario works on the disk as on any Directory, and calls ``acknowledge(what)`` when something
    is promised: the values, in order, are what the check gets for a crash after that. (What is only
    intended can be told in the same way, if the check can tell the two apart.) The check recovers from
    `state`, a CrashDisk, and raises when a promise is broken or the recovery fails.

    A crash is tried after every effect; of each the states that `CrashDisk.crash_states` tells of.
    `max_states` is how many are checked in all, and is shared out among the effects; the same state
    with the same promises is checked once. `seed` chooses the sample when they are more.
    `disk`: where to run, such as the state of an earlier crash; None: a new CrashDisk.

    AssertionError tells the shortest list of unsynced effects, kept or lost, with which the check still
    fails; what the check raised is its cause. Returns what was explored. An exception of the
    scenario is let through.
    """
    disk = CrashDisk() if disk is None else disk
    notes: list[tuple[int, Any]] = []
    began = time.perf_counter()

    def acknowledge(what: Any = None) -> None:
        notes.append((disk.observe(), what))

    scenario(disk, acknowledge)
    explorer = _Explorer(disk, notes, check)
    explorer.explore(seed, max_states)
    return CrashStats(
        points=len(explorer.effects) + 1,
        states=explorer.states,
        distinct=len(explorer._seen),
        exhaustive_points=explorer.exhaustive,
        seconds=time.perf_counter() - began,
        check_seconds=explorer.check_seconds,
    )
