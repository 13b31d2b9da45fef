"""What can be on the disk after a crash: the effects are replayed, and what no sync has covered is
held as groups of options, of which a state takes one each.

A group is a sector (its durable value, or any that it had since), the size of a file, or the names of
one directory (any part of what was done to them since the directory's last sync, in any order that
keeps what was done to one file in order). Only what a name can lead to is held.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from mmapwal.testing.effects import NO_HANDLE, ROOT, SECTOR_BYTES, Effect, EffectKind, Image, join

EXHAUSTIVE_MAX = 4096
_ORDERED_NAMES_MAX = 12
_SAMPLED_ORDERS = 128
_KEY_MASK = (1 << 64) - 1
_BLANK = bytes(SECTOR_BYTES)

Choice = tuple[int, ...]
"""One option's number for each group of a crash point."""


@dataclass(slots=True)
class _FileState:
    durable: bytearray
    size: int
    live: bytearray
    key: int = 0
    sectors: dict[int, list[tuple[bytes, int]]] = field(default_factory=dict)
    owners: dict[int, int] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def sector(self, number: int) -> bytes:
        at = number * SECTOR_BYTES
        return bytes(self.durable[at : at + SECTOR_BYTES]).ljust(SECTOR_BYTES, b"\0")

    def touch(self, first: int, last: int, handle: int, effect: int) -> None:
        """The sectors first..last may have a new live value: holds it, unsynced."""
        for number in range(first, last + 1):
            at = number * SECTOR_BYTES
            value = bytes(self.live[at : at + SECTOR_BYTES]).ljust(SECTOR_BYTES, b"\0")
            values = self.sectors.get(number)
            if values is None:
                if value == self.sector(number):
                    continue
                values = self.sectors[number] = []
            if not values or values[-1][0] != value:
                values.append((value, effect))
            self.owners[number] = handle

    def write(self, offset: int, data: bytes, handle: int, effect: int) -> None:
        end = offset + len(data)
        if end > len(self.live):
            self.live.extend(bytes(end - len(self.live)))
            self.sizes.append((end, effect))
        self.live[offset:end] = data
        if data:
            self.touch(offset // SECTOR_BYTES, (end - 1) // SECTOR_BYTES, handle, effect)

    def truncate(self, length: int, handle: int, effect: int) -> None:
        before = len(self.live)
        if length == before:
            return
        del self.live[length:]
        self.live.extend(bytes(length - len(self.live)))
        self.sizes.append((length, effect))
        if length < before:
            self.touch(length // SECTOR_BYTES, (before - 1) // SECTOR_BYTES, handle, effect)

    def sync(self, handle: int, first: int = 0, last: int | None = None) -> None:
        """What the handle wrote is durable, within sectors first..last, and the size."""
        for number in [n for n, owner in self.owners.items() if owner == handle]:
            if number >= first and (last is None or number <= last):
                self._settle(number)
        if self.sizes:
            self.size = len(self.live)
            self.sizes.clear()

    def _settle(self, number: int) -> None:
        value = self.sectors.pop(number)[-1][0]
        del self.owners[number]
        self.key += sector_key(number, value) - sector_key(number, self.sector(number))
        at = number * SECTOR_BYTES
        if at + SECTOR_BYTES > len(self.durable):
            self.durable.extend(bytes(at + SECTOR_BYTES - len(self.durable)))
        self.durable[at : at + SECTOR_BYTES] = value

    def content(self, size: int, sectors: list[tuple[int, bytes]]) -> bytes:
        data = self.durable[:size]
        data.extend(bytes(size - len(data)))
        for number, value in sectors:
            at = number * SECTOR_BYTES
            if at < size:
                data[at : at + SECTOR_BYTES] = value[: size - at]
        return bytes(data)


def sector_key(number: int, value: bytes) -> int:
    """Adds up over a file's sectors to a number that tells contents apart; blank ones count nothing."""
    return 0 if value == _BLANK else hash(b"%d:%b" % (number, value))


@dataclass(frozen=True, slots=True)
class _NameChange:
    effect: int
    kind: EffectKind
    node: int
    old: str
    new: str

    def apply(self, names: dict[str, int]) -> None:
        if self.old and names.get(self.old) == self.node:
            del names[self.old]
        if self.new:
            names[self.new] = self.node


_Reached = dict[tuple[int, frozenset[tuple[str, int]]], tuple[tuple[int, ...], dict[str, int]]]


@dataclass(slots=True)
class _FolderState:
    durable: dict[str, int]
    path: str
    changes: list[_NameChange] = field(default_factory=list)
    known: list[tuple[int, ...]] | None = None

    def change(self, change: _NameChange) -> None:
        self.changes.append(change)
        self.known = None

    def sync(self) -> None:
        self.durable = self.after(tuple(range(len(self.changes))))
        self.changes = []  # a new one: groups hold the old
        self.known = None

    def after(self, order: tuple[int, ...]) -> dict[str, int]:
        names = dict(self.durable)
        for i in order:
            self.changes[i].apply(names)
        return names

    def nodes(self) -> set[int]:
        return {*self.durable.values(), *(c.node for c in self.changes)}

    def orders(self) -> list[tuple[int, ...]]:
        """Parts and orders of the changes that leave different names; nothing first, all last."""
        if self.known is None:
            self.known = self._orders()
        return self.known

    def _orders(self) -> list[tuple[int, ...]]:
        count = len(self.changes)
        whole = tuple(range(count))
        if count > _ORDERED_NAMES_MAX:
            singles = [(i,) for i in whole] + [whole[:i] + whole[i + 1 :] for i in whole]
            return [(), *singles, *(whole[:i] for i in whole[2:-1]), *self._some_orders(), whole]
        return _all_orders(tuple(self.durable.items()), tuple(self.changes))

    def _some_orders(self) -> list[tuple[int, ...]]:
        rng = random.Random(len(self.changes))
        orders: list[tuple[int, ...]] = []
        for _ in range(_SAMPLED_ORDERS):
            order: tuple[int, ...] = ()
            for i in rng.sample(range(len(self.changes)), rng.randrange(2, len(self.changes))):
                if self._may_follow(order, i):
                    order = (*order, i)
            orders.append(order)
        return orders

    def _may_follow(self, order: tuple[int, ...], i: int) -> bool:
        node = self.changes[i].node
        return i not in order and all(j < i or self.changes[j].node != node for j in order)


@lru_cache(maxsize=32)
def _all_orders(
    names_before: tuple[tuple[str, int], ...], changes: tuple[_NameChange, ...]
) -> list[tuple[int, ...]]:
    """Kept, since an exploration goes over the record more than once."""
    whole = tuple(range(len(changes)))
    durable = dict(names_before)
    first_seen: dict[frozenset[tuple[str, int]], tuple[int, ...]] = {}
    nodes = [change.node for change in changes]
    barred = [sum(1 << j for j in whole[i:] if j == i or nodes[j] == nodes[i]) for i in whole]
    # Of each set of changes the names that it can leave, with one order that does: all of one size, then
    # those of one more.
    reached = {(0, frozenset(durable.items())): ((), durable)}  # type: _Reached
    while reached:
        following: _Reached = {}
        for (done, names), (order, present) in reached.items():
            first_seen.setdefault(names, order)
            for i in whole:
                if not done & barred[i]:
                    after = dict(present)
                    changes[i].apply(after)
                    key = done | 1 << i, frozenset(after.items())
                    following.setdefault(key, ((*order, i), after))
        reached = following
    names_after = dict(durable)
    for change in changes:
        change.apply(names_after)
    all_of_it = frozenset(names_after.items())
    none_of_it = frozenset(durable.items())
    between = [o for names, o in first_seen.items() if names not in {all_of_it, none_of_it}]
    return [(), *between, whole]


@dataclass(slots=True)
class _Group:
    """Options of one thing on the disk: number 0 is what is durable, the last one all that was done."""

    node: int
    sector: int | None
    options: int
    sector_values: list[tuple[bytes, int]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    orders: list[tuple[int, ...]] = field(default_factory=list)
    changes: list[_NameChange] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)

    @property
    def newest(self) -> int:
        """The last effect of those that it is made of; of the directory's own name -1."""
        if self.orders:
            return self.changes[-1].effect if self.changes else -1
        return (self.sizes or self.sector_values)[-1][1]

    def alone(self) -> list[int]:
        """Options that hold one unsynced effect."""
        return [i for i, o in enumerate(self.orders) if len(o) == 1] if self.orders else [self.options - 1]

    def missing(self) -> list[int]:
        """Options that lack one unsynced effect."""
        whole = len(self.orders[-1]) if self.orders else 0
        return [i for i, o in enumerate(self.orders) if len(o) == whole - 1] if self.orders else [0]


StateKey = tuple[bool, int, tuple[tuple[str, int, int], ...]]


class Point:
    """A crash at one place of the record. Good until the replay goes on."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self.groups = replay.groups()
        self._folders = {g.node: i for i, g in enumerate(self.groups) if g.orders}
        self._names: dict[tuple[int, int], dict[str, int]] = {}
        self._parts: dict[int, list[int]] = {}
        self._sizes: dict[int, int] = {}
        for i, group in enumerate(self.groups):
            if group.sizes:
                self._sizes[group.node] = i
            elif group.sector is not None:
                self._parts.setdefault(group.node, []).append(i)

    @property
    def state_count(self) -> int:
        return math.prod(g.options for g in self.groups)

    def nothing(self) -> Choice:
        return (0,) * len(self.groups)

    def everything(self) -> Choice:
        return tuple(g.options - 1 for g in self.groups)

    def newest(self) -> Iterator[Choice]:
        """The last effect without all that it may rely on, in a directory that is there; and everything, but
        of the last effect the first half of its sectors."""
        newest = max((g.newest for g in self.groups), default=-1)
        yield tuple((g.alone() or [0])[-1] if g.newest in {newest, -1} else 0 for g in self.groups)
        sectors = [i for i, g in enumerate(self.groups) if g.sector_values and g.newest == newest]
        behind = set(sectors[(len(sectors) + 1) // 2 :])
        if behind:
            yield tuple(g.options - 1 - (i in behind) for i, g in enumerate(self.groups))

    def choices(self, rng: random.Random, limit: int, *, mixed: bool = False) -> Iterator[Choice]:
        """Nothing, everything, the newest effect alone, and half done; then each sector, size and change of a
        name alone and each one missing; then every other one, when there are no more than `limit` (in random
        order if `mixed`), else random ones, at most `limit`. May repeat itself."""
        nothing, everything = self.nothing(), self.everything()
        yield nothing
        yield everything
        yield from self.newest()
        singles = [_with(everything, i, o) for i, g in enumerate(self.groups) for o in g.missing()]
        singles += [_with(nothing, i, o) for i, g in enumerate(self.groups) for o in g.alone()]
        rng.shuffle(singles)
        yield from singles
        if self.state_count > min(limit, EXHAUSTIVE_MAX):
            yield from (self._random(rng) for _ in range(limit))
        elif mixed:
            yield from map(self._numbered, _shuffled(rng, self.state_count))
        else:
            yield from itertools.product(*(range(g.options) for g in self.groups))

    def _numbered(self, number: int) -> Choice:
        options: list[int] = []
        for group in self.groups:
            number, option = divmod(number, group.options)
            options.append(option)
        return tuple(options)

    def _random(self, rng: random.Random) -> Choice:
        share = rng.choice((0.15, 0.5, 0.85))
        return tuple(
            rng.randrange(g.options)
            if g.options > 2 and rng.random() < 0.4
            else (g.options - 1 if rng.random() < share else 0)
            for g in self.groups
        )

    def _tree(self, choice: Choice) -> tuple[bool, dict[int, dict[str, int]], list[tuple[str, int]]]:
        """Whether the root is there, the names of each directory, the path and node of each file."""
        replay = self._replay
        own = self._folders.get(NO_HANDLE)
        if own is not None and choice[own] == 0:
            return False, {ROOT: {}}, []
        folders: dict[int, dict[str, int]] = {}
        files: list[tuple[str, int]] = []
        todo = [("", ROOT)]
        for path, node in todo:
            names = folders[node] = self._names_of(node, choice)
            for name, child in names.items():
                (todo if child in replay.folders else files).append((join(path, name), child))
        return True, folders, files

    def _names_of(self, node: int, choice: Choice) -> dict[str, int]:
        at = self._folders.get(node)
        if at is None:
            return self._replay.folders[node].durable
        names = self._names.get((at, choice[at]))
        if names is None:
            order = self.groups[at].orders[choice[at]]
            names = self._names[at, choice[at]] = self._replay.folders[node].after(order)
        return names

    def _size(self, node: int, choice: Choice) -> int:
        at = self._sizes.get(node)
        return self._replay.files[node].size if at is None else self.groups[at].sizes[choice[at]][0]

    def key(self, choice: Choice) -> StateKey:
        """The same for states that hold the same."""
        kept, folders, files = self._tree(choice)
        parts: list[tuple[str, int, int]] = []
        for path, node in files:
            total = self._replay.files[node].key
            for at in self._parts.get(node, ()):
                total += self.groups[at].keys[choice[at]]
            parts.append((path, self._size(node, choice), total & _KEY_MASK))
        return kept, len(folders), tuple(sorted(parts))

    def image(self, choice: Choice) -> Image:
        kept, folders, files = self._tree(choice)
        contents: dict[int, bytes] = {}
        for _, node in files:
            if node not in contents:
                sectors = [
                    (group.sector or 0, group.sector_values[choice[at] - 1][0])
                    for at in self._parts.get(node, ())
                    if choice[at] > 0
                    for group in (self.groups[at],)
                ]
                contents[node] = self._replay.files[node].content(self._size(node, choice), sectors)
        return Image({node: dict(names) for node, names in folders.items()}, contents, kept)

    def describe(self, choice: Choice) -> tuple[list[str], list[str]]:
        """The unsynced effects that are on the disk, and those that are not, as text."""
        kept: list[str] = []
        lost: list[str] = []
        for group, option in zip(self.groups, choice, strict=True):
            on_disk, gone = self._replay.describe(group, option)
            kept += on_disk
            lost += gone
        return kept, lost


def _with(choice: Choice, at: int, option: int) -> Choice:
    return (*choice[:at], option, *choice[at + 1 :])


def _shuffled(rng: random.Random, count: int) -> Iterator[int]:
    """0 .. count - 1 in random order. Made as they are taken: mostly few are."""
    moved: dict[int, int] = {}
    for last in range(count - 1, -1, -1):
        at = rng.randrange(last + 1)
        value = moved.get(at, at)
        moved[at] = moved.pop(last, last)
        yield value


class Replay:
    """Follows the record of a disk from the image that it began with."""

    def __init__(self, image: Image, *, damage: bool = False) -> None:
        self._damage = damage
        self._root_kept = image.root_kept
        self._effects: list[Effect] = []
        self.files: dict[int, _FileState] = {}
        self.folders: dict[int, _FolderState] = {}
        for node, data in image.files.items():
            state = self.files[node] = _FileState(bytearray(data), len(data), bytearray(data))
            for number in range(-(-len(data) // SECTOR_BYTES)):
                state.key += sector_key(number, state.sector(number))
        for node, names in image.folders.items():
            self.folders[node] = _FolderState(dict(names), "")
        for folder in image.folders.values():
            for name, child in folder.items():
                if child in self.folders:
                    self.folders[child].path = name

    def apply(self, effect: Effect) -> None:
        number = len(self._effects)
        self._effects.append(effect)
        match effect.kind:
            case EffectKind.WRITE | EffectKind.STORE:
                self.files[effect.node].write(effect.offset, effect.data, effect.handle, number)
            case EffectKind.TRUNCATE:
                self.files[effect.node].truncate(effect.length, effect.handle, number)
            case EffectKind.SYNC:
                self.files[effect.node].sync(effect.handle)
            case EffectKind.SYNC_RANGE:
                last = (effect.offset + effect.length - 1) // SECTOR_BYTES
                self.files[effect.node].sync(effect.handle, effect.offset // SECTOR_BYTES, last)
            case EffectKind.SYNC_FAILED:
                owners = self.files[effect.node].owners
                owners.update({n: NO_HANDLE for n, owner in owners.items() if owner == effect.handle})
            case EffectKind.DIR_SYNC:
                self.folders[effect.folder].sync()
            case EffectKind.PARENT_SYNC:
                self._root_kept = True
            case _:
                self._change_names(effect, number)

    def _change_names(self, effect: Effect, number: int) -> None:
        name = effect.name.rsplit("/", 1)[-1]
        old, new = "", name
        if effect.kind is EffectKind.CREATE:
            self.files[effect.node] = _FileState(bytearray(), 0, bytearray())
        elif effect.kind is EffectKind.MKDIR:
            self.folders[effect.node] = _FolderState({}, effect.name)
        elif effect.kind is EffectKind.RENAME:
            old, new = name, effect.target
        else:
            old, new = name, ""
        change = _NameChange(number, effect.kind, effect.node, old, new)
        self.folders[effect.folder].change(change)

    def groups(self) -> list[_Group]:
        """What is unsynced now, of all that a name can lead to."""
        groups: list[_Group] = []
        if not self._root_kept:
            groups.append(_Group(NO_HANDLE, None, 2, orders=[(), (0,)]))
        todo, done = [ROOT], {ROOT}
        for node in todo:
            folder = self.folders.get(node)
            if folder is None:
                groups += self._file_groups(node)
                continue
            if folder.changes:
                orders = folder.orders()
                groups.append(_Group(node, None, len(orders), orders=orders, changes=list(folder.changes)))
            fresh = folder.nodes() - done
            todo += sorted(fresh)
            done |= fresh
        return groups

    def _file_groups(self, node: int) -> Iterator[_Group]:
        file = self.files[node]
        if file.sizes:
            sizes = [(file.size, -1), *file.sizes]
            yield _Group(node, None, len(sizes), sizes=sizes)
        for number, written in sorted(file.sectors.items()):
            values = list(written)
            if self._damage:  # before the last, which stands for all that was written
                garbage = random.Random(f"{node}:{number}").randbytes(SECTOR_BYTES)
                values = [(garbage, NO_HANDLE), *written]
            base = sector_key(number, file.sector(number))
            keys = [0, *(sector_key(number, value) - base for value, _ in values)]
            yield _Group(node, number, len(values) + 1, sector_values=values, keys=keys)

    def describe(self, group: _Group, option: int) -> tuple[list[str], list[str]]:
        """Which unsynced effects of a group an option keeps, and which it loses."""
        if group.node == NO_HANDLE:
            text = ["the directory's own name"]
            return (text, []) if option else ([], text)
        if group.orders:
            changes = group.changes
            order = group.orders[option]
            kept = [f"#{changes[i].effect + 1} {self._effects[changes[i].effect]}" for i in order]
            lost = [
                f"#{c.effect + 1} {self._effects[c.effect]}" for i, c in enumerate(changes) if i not in order
            ]
            return kept, lost
        return self._describe_part(group, option)

    def _describe_part(self, group: _Group, option: int) -> tuple[list[str], list[str]]:
        name = next((e.name for e in reversed(self._effects) if e.node == group.node), f"file {group.node}")
        if group.sizes:
            what = f"{name}: size"
            steps = [(f"{size}", effect) for size, effect in group.sizes[1:]]
        else:
            at = (group.sector or 0) * SECTOR_BYTES
            what = f"{name}: bytes [{at}, {at + SECTOR_BYTES})"
            steps = [("garbage" if effect < 0 else "", effect) for _, effect in group.sector_values]
        if option == 0:
            return [], [f"{what}: all since its last sync (#{max(e for _, e in steps) + 1})"]
        label, effect = steps[option - 1]
        told = f"{what} {label} of #{effect + 1}".replace("  ", " ") if effect >= 0 else f"{what}: {label}"
        if option == group.options - 1:
            return [told], []
        return [], [f"{told} and nothing later"]
