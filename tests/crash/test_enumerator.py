"""The states of the explorer against all that a plain enumeration finds, for random little histories."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mmapwal.testing import CrashDisk

SECTOR = 512
NAMES = ("a", "b")
Step = tuple[str, ...]
State = frozenset[tuple[str, bytes]]

STEPS = st.one_of(
    st.tuples(st.just("create"), st.sampled_from(NAMES)),
    st.tuples(st.just("write"), st.sampled_from(NAMES), st.sampled_from("01"), st.sampled_from("xyz")),
    st.tuples(st.just("sync"), st.sampled_from(NAMES)),
    st.sampled_from([("rename", "a", "b"), ("rename", "b", "a")]),
    st.tuples(st.just("unlink"), st.sampled_from(NAMES)),
    st.tuples(st.just("sync directory")),
)


class PlainFile:
    """Of each sector all values that may be on the disk, the last one as it is now."""

    def __init__(self) -> None:
        self.sectors: list[list[bytes]] = [[bytes(SECTOR)], [bytes(SECTOR)]]
        self.sizes = [0]

    def write(self, sector: int, value: bytes) -> None:
        self.sectors[sector].append(value * SECTOR)
        self.sizes.append(max(self.sizes[-1], (sector + 1) * SECTOR))

    def sync(self) -> None:
        self.sectors = [values[-1:] for values in self.sectors]
        self.sizes = self.sizes[-1:]

    def contents(self) -> Iterator[bytes]:
        for first, second in itertools.product(*self.sectors):
            yield from ((first + second)[:size] for size in self.sizes)


class PlainDisk:
    """What a crash can leave, by trying every part of the changes to names in every order."""

    def __init__(self) -> None:
        self.now: dict[str, PlainFile] = {}
        self.durable: dict[str, PlainFile] = {}
        self.changes: list[tuple[PlainFile, str, str]] = []  # whose, from which name, to which

    def do(self, step: Step) -> None:
        match step:
            case "create", name if name not in self.now:
                self._change(PlainFile(), "", name)
            case "write", name, sector, value if name in self.now:
                self.now[name].write(int(sector), value.encode())
            case "sync", name if name in self.now:
                self.now[name].sync()
            case "rename", old, new if old in self.now:
                self._change(self.now[old], old, new)
            case "unlink", name if name in self.now:
                self._change(self.now[name], name, "")
            case ("sync directory",):
                self.durable, self.changes = dict(self.now), []

    def _change(self, file: PlainFile, old: str, new: str) -> None:
        self.changes.append((file, old, new))
        _rename(self.now, file, old, new)

    def states(self) -> set[State]:
        found: set[State] = set()
        for names in self._names():
            files = list(dict.fromkeys(names.values()))
            for contents in itertools.product(*(file.contents() for file in files)):
                found.add(frozenset((name, contents[files.index(file)]) for name, file in names.items()))
        return found

    def _names(self) -> Iterator[dict[str, PlainFile]]:
        numbers = range(len(self.changes))
        for count in range(len(self.changes) + 1):
            for order in itertools.permutations(numbers, count):
                pairs = itertools.combinations(order, 2)
                if any(i > j and self.changes[i][0] is self.changes[j][0] for i, j in pairs):
                    continue  # what was done to one file stays in order
                names = dict(self.durable)
                for number in order:
                    _rename(names, *self.changes[number])
                yield names


def _rename(names: dict[str, PlainFile], file: PlainFile, old: str, new: str) -> None:
    if old and names.get(old) is file:
        del names[old]
    if new:
        names[new] = file


def do_on(disk: CrashDisk, step: Step, open_files: dict[str, Any]) -> None:
    """The same step; through one storage of each file, as what another one wrote no sync covers."""
    match step:
        case "create", name if name not in open_files:
            open_files[name] = disk.create(name)
        case "write", name, sector, value if name in open_files:
            open_files[name].write_at(int(sector) * SECTOR, value.encode() * SECTOR)
        case "sync", name if name in open_files:
            open_files[name].sync()
        case "rename", old, new if old in open_files:
            disk.rename(old, new)
            open_files[new] = open_files.pop(old)
        case "unlink", name if name in open_files:
            disk.unlink(name)
            del open_files[name]
        case ("sync directory",):
            disk.sync()


def image(disk: CrashDisk) -> State:
    return frozenset((name, disk.open(name).read_at(0, 1 << 20).tobytes()) for name in disk.names())


@given(st.lists(STEPS, max_size=11))
@settings(max_examples=300)
def test_the_explorer_has_every_state_that_a_plain_enumeration_has_and_no_other(steps: list[Step]) -> None:
    disk, plain = CrashDisk(name_durable=True), PlainDisk()
    open_files: dict[str, Any] = {}
    for step in steps:
        if len(plain.changes) == 5:  # all orders of more are too many
            plain.do(("sync directory",))
            disk.sync()
        plain.do(step)
        do_on(disk, step, open_files)
    wanted = plain.states()
    if len(wanted) <= 512:
        assert {image(state) for state in disk.crash_states()} == wanted


def test_of_twelve_changes_to_names_every_state_is_there() -> None:
    """Six files, each made and renamed: gone, under its first name, or under its second."""
    disk = CrashDisk(name_durable=True)
    for number in range(6):
        disk.create(f"f{number}.tmp")
        disk.rename(f"f{number}.tmp", f"f{number}")
    found = {tuple(state.names()) for state in disk.crash_states()}
    wanted = {
        tuple(sorted(name for name in names if name))
        for names in itertools.product(*(("", f"f{n}.tmp", f"f{n}") for n in range(6)))
    }
    assert found == wanted
