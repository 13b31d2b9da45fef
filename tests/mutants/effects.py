"""Mutants made by themselves: of what a life does to the disk, one effect is left out, or two are swapped.

The life is run once, as it is. Then its record is changed, as if the journal had not asked for that effect,
or had asked for it one step later, and what a crash could leave of the changed record is recovered.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mmapwal.superblock import Superblock
from mmapwal.testing import CrashDisk, Effect, EffectKind
from mmapwal.testing.states import Point, Replay

Scenario = Callable[[CrashDisk, Callable[[Any], None]], object]
Check = Callable[[CrashDisk, Sequence[Any]], object]

LEFT_OUT = {
    EffectKind.WRITE,
    EffectKind.SYNC,
    EffectKind.SYNC_RANGE,
    EffectKind.RENAME,
    EffectKind.DIR_SYNC,
    EffectKind.PARENT_SYNC,
}
SYNCS = {EffectKind.SYNC, EffectKind.SYNC_RANGE, EffectKind.DIR_SYNC, EffectKind.PARENT_SYNC}
_FILES = (
    (re.compile(r"^superblock\.tmp$"), "superblock"),
    (re.compile(r"^segment-\w+-00000000\.tmp$"), "new segment"),
    (re.compile(r"^segment-\w+-\w+\.tmp$"), "new generation"),
    (re.compile(r"^segment-\w+-\w+$"), "segment"),
    (re.compile(r"^index"), "index"),
    (re.compile(r"^snapshots/.*"), "snapshot"),
)


class Record:
    """What one life did, and what it was promised on the way; with a name for the purpose of each effect."""

    def __init__(self, scenario: Scenario, check: Check, disk: CrashDisk | None = None) -> None:
        self.disk = CrashDisk() if disk is None else disk
        self.check = check
        self._notes: list[tuple[int, Any]] = []
        scenario(self.disk, lambda what: self._notes.append((self.disk.observe(), what)))
        self.effects = self.disk.effects
        self.purposes = list(_purposes(self.effects))
        self._shapes: list[Any] = []
        self._safe: set[Any] = set()  # states that were recovered, with what was promised then

    def shape(self, count: int) -> Any:
        """All that a crash after so many effects, or anything later, depends on."""
        if not self._shapes:
            replay = self.disk._replay()
            self._shapes.append(_shape(replay))
            for effect in self.effects:
                replay.apply(effect)
                self._shapes.append(_shape(replay))
        return self._shapes[count]

    def promised(self, count: int) -> list[Any]:
        return [what for at, what in self._notes if at <= count]

    def mutants(self) -> Iterator[Mutant]:
        for at, effect in enumerate(self.effects):
            if effect.kind in LEFT_OUT:
                yield Mutant(self, at, swapped=False)
        for at, pair in enumerate(zip(self.effects, self.effects[1:], strict=False)):
            if any(e.kind is not EffectKind.STORE for e in pair):
                yield Mutant(self, at, swapped=True)

    def explore(self, states: int) -> Exception | None:
        """How recovery fails after a crash in it, of so many states at each place; None: it does not."""
        replay = self.disk._replay()
        for count, effect in enumerate(self.effects, 1):
            replay.apply(effect)
            error = self.fails(Point(replay), count, states, f"{count}")
            if error is not None:
                return error
        return None

    def fails(self, point: Point, count: int, states: int, seed: str) -> Exception | None:
        """What the check says of the first bad one of so many states at a place."""
        promised = self.promised(count)
        for choice in point.choices(random.Random(seed), states * 4):
            key = (point.key(choice), len(promised))
            if key in self._safe:
                continue
            try:
                self.check(self.disk._state(point, choice), promised)
            except Exception as e:  # noqa: BLE001  # whatever it ends with is its verdict
                return e
            self._safe.add(key)
            states -= 1
            if states == 0:
                break
        return None


@dataclass(frozen=True)
class Mutant:
    """`swapped`: the effect at this place comes after the next one; else it is left out."""

    record: Record
    at: int
    swapped: bool

    @property
    def name(self) -> str:
        """The same for all that are the same step of the protocol."""
        first = self.record.purposes[self.at]
        return f"{first} after {self.record.purposes[self.at + 1]}" if self.swapped else f"no {first}"

    def effects(self) -> list[Effect]:
        effects = list(self.record.effects)
        if self.swapped:
            effects[self.at : self.at + 2] = reversed(effects[self.at : self.at + 2])
        else:
            del effects[self.at]
        return effects

    def explore(self, states: int) -> Verdict:
        """Crashes from the mutated place on, `states` at each, until one is not recovered right; or until
        nothing of the mutation can be seen any more."""
        record, at = self.record, self.at
        replay, shift = record.disk._replay(), 0 if self.swapped else 1
        differs = False
        for count, effect in enumerate(self.effects(), 1):
            try:
                replay.apply(effect)
            except KeyError:  # of a file that there is not yet
                return Verdict(impossible=True)
            if count + shift <= at:
                continue
            shape = _shape(replay)
            between = self.swapped and count == at + 1
            if between and (shape in map(record.shape, (at, at + 1, at + 2)) or self._is_unordered()):
                continue
            if not between and shape == record.shape(count + shift):
                break
            differs = True
            error = record.fails(Point(replay), count + shift, states, f"{at}:{count}")
            if error is not None:
                return Verdict(error=error)
        return Verdict(differs=differs)

    def _is_unordered(self) -> bool:
        """Neither of the two is a sync, so either alone can be on the disk in any case."""
        return not SYNCS.intersection(e.kind for e in self.record.effects[self.at : self.at + 2])


@dataclass(frozen=True)
class Verdict:
    """`error`: how recovery failed. `impossible`: no program could do that. `differs`: whether a crash can
    leave anything that it cannot leave of the right record."""

    error: Exception | None = None
    impossible: bool = False
    differs: bool = False


def _shape(replay: Replay) -> Any:
    folders = tuple(
        (n, tuple(f.durable.items()), tuple((c.kind, c.node, c.old, c.new) for c in f.changes))
        for n, f in replay.folders.items()
    )
    named = {node for f in replay.folders.values() for node in f.nodes()}
    files = tuple(
        (
            node,
            (file.key, file.size, tuple(s for s, _ in file.sizes)),
            tuple((n, tuple(v for v, _ in values)) for n, values in sorted(file.sectors.items())),
            tuple(sorted(file.owners.items())),
        )
        for node, file in replay.files.items()
        if node in named
    )
    return replay._root_kept, folders, files


def _purposes(effects: Sequence[Effect]) -> Iterator[str]:
    """What each effect does, to which kind of file; of a superblock also what it changes."""
    before: Superblock | None = None
    change = ""
    named: dict[int, str] = {}  # by folder: what the next sync of it is for
    for effect in effects:
        kind = effect.kind.value.replace("_", " ")
        file = next((name for pattern, name in _FILES if pattern.search(effect.name)), effect.name)
        if effect.kind is EffectKind.WRITE and not any(effect.data):
            file = f"zeros of {file}"
        elif effect.kind is EffectKind.WRITE and file == "superblock":
            after = Superblock.decode(effect.data)
            change, before = _change(before, after), after
        if file == "superblock" and effect.kind in {EffectKind.WRITE, EffectKind.SYNC, EffectKind.RENAME}:
            file = f"superblock ({change})"
        if effect.kind is EffectKind.DIR_SYNC:
            file = f"behind {named.pop(effect.folder, 'nothing new')}"
        elif effect.kind in {EffectKind.RENAME, EffectKind.MKDIR}:
            named[effect.folder] = f"{kind} {file}"
        yield f"{kind} {file}".strip()


def _change(before: Superblock | None, after: Superblock) -> str:
    if before is None:
        return "first"
    changed = [f.name for f in fields(after) if getattr(before, f.name) != getattr(after, f.name)]
    facts = ", ".join(n for n in changed if n not in {"sequence", "next_segment_id"}) or "same facts"
    return facts if after.segments else f"{facts}, no segment"
