"""Runs a scenario on a crash disk, and a check on what a crash at each place of it would leave."""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
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

    def explore(self, seed: int, max_states: int | None) -> None:
        """Shares out what may be checked, and again what was left over by places that had fewer states,
        until it is used up or no place has more."""
        room = self._room(max_states)
        budget = sum(room.values()) if max_states is None else max_states
        for turn in itertools.count():
            if not room or len(self._seen) >= budget:
                return
            shares = _shared_out(room, budget - len(self._seen), random.Random(f"{seed}:{turn}"))
            for count, point in self._points(shares):
                rng = random.Random(f"{seed}:{turn}:{count}")
                found, ended = self._explore_point(point, count, rng, shares[count])
                room[count] -= found
                if ended or room[count] == 0:
                    del room[count]

    def _points(self, wanted: Container[int]) -> Iterator[tuple[int, Point]]:
        """The crashes after so many effects, each good until the next is asked for."""
        replay = self.disk._replay()
        for count in range(len(self.effects) + 1):
            if count:
                replay.apply(self.effects[count - 1])
            if count in wanted:
                yield count, Point(replay)

    def _room(self, max_states: int | None) -> dict[int, int]:
        """How many states of each place are to be checked at most: all, or as many as a sample may have."""
        sample = EXHAUSTIVE_MAX if max_states is None else sys.maxsize
        sizes = ((count, point.state_count) for count, point in self._points(range(len(self.effects) + 1)))
        return {count: size if size <= EXHAUSTIVE_MAX else sample for count, size in sizes}

    def _explore_point(self, point: Point, count: int, rng: random.Random, allowed: int) -> tuple[int, bool]:
        """Checks so many states that were not checked before. How many there were, and whether all are
        known now; where they are sampled, whether new ones are rare."""
        acknowledged = self.acknowledged(count)
        whole = point.state_count <= EXHAUSTIVE_MAX
        limit = EXHAUSTIVE_MAX if whole else allowed * 4
        found = 0
        for choice in point.choices(rng, limit, mixed=point.state_count > allowed):
            self.states += 1
            key = (point.key(choice), len(acknowledged))
            if key in self._seen:
                continue
            if found == allowed:
                return found, False
            self._seen.add(key)
            found += 1
            error = self._try(point, choice, acknowledged)
            if error is not None:
                self._fail(point, choice, count, error)
        self.exhaustive += whole
        return found, True

    def _try(self, point: Point, choice: Choice, acknowledged: list[Any]) -> Exception | None:
        state = self.disk._state(point, choice)
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


def _shared_out(room: dict[int, int], left: int, rng: random.Random) -> dict[int, int]:
    """How many states each place may use. Those that can be tried whole come first, if that leaves half."""
    small = {count: size for count, size in room.items() if size <= EXHAUSTIVE_MAX}
    used = sum(small.values())
    if used * 2 > left:
        return _shared_evenly(room, left, rng)
    large = {count: size for count, size in room.items() if count not in small}
    return small | _shared_evenly(large, left - used, rng)


def _shared_evenly(room: dict[int, int], left: int, rng: random.Random) -> dict[int, int]:
    """To each as much as to any other, but to none more than it has room for. Where there is not one for
    each, some have one."""
    if left < len(room):
        return dict.fromkeys(rng.sample(list(room), left), 1)
    shares: dict[int, int] = {}
    for count in sorted(room, key=room.__getitem__):
        shares[count] = min(room[count], left // (len(room) - len(shares)))
        left -= shares[count]
    return shares


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
    max_states: int | None = 2000,
    disk: CrashDisk | None = None,
) -> CrashStats:
    """Runs `scenario(disk, acknowledge)` once, and `check(state, acknowledged)` for crashes in it.

    The scenario works on the disk as on any Directory, and calls ``acknowledge(what)`` when something
    is promised: the values, in order, are what the check gets for a crash after that. (What is only
    intended can be told in the same way, if the check can tell the two apart.) The check recovers from
    `state`, a CrashDisk, and raises when a promise is broken or the recovery fails.

    A crash is tried after every effect; of each the states that `CrashDisk.crash_states` tells of.
    `max_states` is how many are checked in all; the same state with the same promises is checked once. They
    are shared out evenly among the effects, and what one has no use for goes to the others. Of an effect with
    no more than 4096 states (12 unsynced sectors and names, each changed once) every one is tried, unless
    the states of all such effects together are more than `max_states` (more than half of it, where there
    are larger effects too); then it is sampled if it has more than its share. Larger ones always are. None:
    every state of an effect that has no more than 4096, and up to 4096 of any other. `seed` chooses samples.
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
