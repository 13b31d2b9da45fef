"""The power is cut under a journal that lives on a real file system: by shutting the file system down, and by
taking the disk as it is at one instant. Nothing acknowledged is lost, nothing is invented."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mmapwal import SyncMethod

from ..crash.story import Contents
from ..filesystems.conftest import Filesystem, Maker
from . import crowd, lives
from .cuts import Cut, Tally, Writer, clones_of, place_for_clones, shut_down
from .test_torn_sectors import recovered

pytestmark = pytest.mark.power

METHODS = [m.value for m in SyncMethod]
DURABILITIES = ["SYNC", "SYNC", "OS", "BUFFERED"]
STEPS = 400
CHANGES = {"truncate_from", "drain", "set_snapshot_op", "compact"}
CLONES_OF_A_LIFE = 5


class Counts:
    """What cuts there were, each checked when it is counted; one counts when an operation was in flight."""

    def __init__(self, what: str, tally: Tally, weights: dict[str, int] = lives.STEPS) -> None:
        self.what, self._tally, self._weights = what, tally, weights
        self.cuts = self.changing = self.rotating = self.besides = self.lost = 0

    def take(self, seed: int, cut: Cut, found: Contents, durability: str, *, may_lose: bool = False) -> None:
        steps = lives.life(seed, STEPS, self._weights)
        durable, begun_before = lives.between(cut.before)
        durable_after, begun = lives.between(cut.after)
        first = 0 if may_lose else durable
        at = next((n for n in range(begun, first - 1, -1) if steps[n][2] == found), None)
        story = ", ".join(name for name, _, _ in steps[max(0, durable - 3) : begun + 1])
        assert at is not None, (
            f"{self.what}, seed {seed}, {durability}: {found.describe()} is not what was there between steps "
            f"{durable} and {begun}: {story}"
        )
        self.lost += at < durable
        if begun == begun_before > durable_after:  # it had begun before the cut, and had not ended after it
            self.cuts += 1
            rotates = durability == "SYNC" and begun in lives.rotating(seed, STEPS)
            self.rotating += rotates
            self.changing += rotates or steps[begun][0] in CHANGES
        else:
            self.besides += 1

    def tell(self) -> None:
        self._tally(f"cuts of {self.what}, an operation in flight", self.cuts)
        self._tally(f"cuts of {self.what}: a change of structure in flight", self.changing)
        self._tally(f"cuts of {self.what}: a rotation in flight", self.rotating)
        self._tally(f"cuts of {self.what}: besides, between two operations", self.besides)
        assert self.changing >= self.cuts // 5


def moment(seed: int, chance: random.Random) -> bytes:
    """The note of a step whose beginning is waited for: in a third of the cases each a rotation, another
    change of structure, and any."""
    steps = lives.life(seed, STEPS, lives.STEPS)
    numbers = range(10, STEPS)
    pools = [
        [n for n in numbers if steps[n][0] in CHANGES],
        [n for n in numbers if n in lives.rotating(seed, STEPS)],
        numbers,
    ]
    return b"+%d\n" % chance.choice(chance.choice(pools) or numbers)


# --- the file system is shut down -----------------------------------------------------------------------


def cut_a_life(
    filesystem: Filesystem, errors: Path, seed: int, wanted: bytes, method: str, *how: str
) -> tuple[Cut, Contents]:
    path = filesystem.path / f"j{seed}"
    writer = Writer(errors, "lives", path, seed, 0, STEPS + 1, method, *how)
    cut = shut_down(filesystem, writer, lambda: writer.wait_for(wanted))
    found = recovered(path) if path.exists() else Contents()
    for file in path.glob("*"):
        file.unlink()
    return cut, found


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("method", METHODS)
def test_a_file_system_that_is_shut_down_comes_back_with_all_that_was_acknowledged(
    make: Maker, tmp_path: Path, kind: str, method: str, power_cycles: int, tally: Tally
) -> None:
    filesystem, chance = make(kind), random.Random(f"shutdown {kind} {method}")
    counts = Counts(f"{kind}, {method}, by shutdown", tally)
    while counts.cuts < power_cycles:
        seed = chance.randrange(1 << 32)
        durability = DURABILITIES[(counts.cuts + counts.besides) % len(DURABILITIES)]
        cut, found = cut_a_life(
            filesystem, tmp_path / "errors", seed, moment(seed, chance), method, durability
        )
        counts.take(seed, cut, found, durability)
    counts.tell()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_shut_down_under_a_journal_that_does_not_sync_it_is_caught(
    make: Maker, tmp_path: Path, kind: str, tally: Tally
) -> None:
    filesystem, chance = make(kind), random.Random(f"shutdown {kind} unsynced")
    counts = Counts(f"{kind}, unsynced, by shutdown", tally, lives.ONLY_APPENDS)
    for _ in range(5):
        seed = chance.randrange(1 << 32)
        wanted, how = b"+%d\n" % chance.randrange(40, STEPS), ("OS", "unsynced", "only-appends")
        cut, found = cut_a_life(filesystem, tmp_path / "errors", seed, wanted, "dsync", *how)
        counts.take(seed, cut, found, "unsynced", may_lose=True)
    assert counts.lost


# --- the disk as it is at one instant -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("method", METHODS)
def test_the_disk_as_it_is_at_any_instant_has_all_that_was_acknowledged(
    tmp_path: Path, disks: Path, require: Any, kind: str, method: str, power_cycles: int, tally: Tally
) -> None:
    chance = random.Random(f"clones {kind} {method}")
    counts, number = Counts(f"{kind}, {method}, by clone", tally), 0
    with place_for_clones(disks) as outer:
        while counts.cuts < power_cycles:
            seed = chance.randrange(1 << 32)
            number += 1
            durability = DURABILITIES[number % len(DURABILITIES)]
            wanted = sorted({moment(seed, chance) for _ in range(CLONES_OF_A_LIFE)}, key=lambda w: int(w[1:]))
            waits = [lambda writer, w=w: writer.wait_for(w) for w in wanted]

            def arguments(path: Path, seed: int = seed, durability: str = durability) -> tuple[object, ...]:
                return "lives", path, seed, 0, STEPS + 1, method, durability

            for cut, path in clones_of(kind, outer, require, tmp_path / "errors", arguments, waits):
                counts.take(seed, cut, recovered(path), durability)
    counts.tell()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_journal_that_does_not_sync_is_caught_by_the_disk_at_one_instant(
    tmp_path: Path, disks: Path, require: Any, kind: str, tally: Tally
) -> None:
    counts = Counts(f"{kind}, unsynced, by clone", tally, lives.ONLY_APPENDS)
    with place_for_clones(disks) as outer:

        def arguments(path: Path) -> tuple[object, ...]:
            return "lives", path, 7, 0, STEPS + 1, "dsync", "OS", "unsynced", "only-appends"

        waits = [lambda writer, n=n: writer.wait_for(b"+%d\n" % n) for n in range(50, STEPS, 70)]
        for cut, path in clones_of(kind, outer, require, tmp_path / "errors", arguments, waits):
            counts.take(7, cut, recovered(path), "unsynced", may_lose=True)
    assert counts.lost


# --- threads and tasks ----------------------------------------------------------------------------------


def told_of(noted: bytes) -> dict[int, tuple[int, int]]:
    lines = noted[: noted.rfind(b"\n") + 1].splitlines()
    return {int(op): (int(thread), int(number)) for op, thread, number in map(bytes.split, lines)}


def assert_crowd_is_whole(found: Contents, cut: Cut) -> None:
    """All that was told, batches whole, no op left out; of each no more than was told later, and one."""
    before, after = told_of(cut.before), told_of(cut.after)
    writers = {op: crowd.who(payload) for op, (payload, _) in found.entries.items()}
    assert writers.items() >= before.items()
    assert sorted(writers) == list(range(1, len(writers) + 1))
    for thread in range(crowd.THREADS):
        step = crowd.BATCH if thread == 0 else 1
        numbers = [number for _, (who, number) in sorted(writers.items()) if who == thread]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) % step == 0
        assert len(numbers) <= sum(who == thread for who, _ in after.values()) + step


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("who", ["threads", "tasks"])
def test_of_commits_that_many_share_the_disk_at_any_instant_has_all_that_was_told(
    tmp_path: Path, disks: Path, require: Any, kind: str, who: str, power_cycles: int, tally: Tally
) -> None:
    chance = random.Random(f"many {kind} {who}")
    cuts = 0
    with place_for_clones(disks) as outer:
        while cuts < power_cycles:
            method = METHODS[cuts // CLONES_OF_A_LIFE % len(METHODS)]
            how = method, chance.choice(["SYNC", "OS"])

            def arguments(path: Path, how: tuple[str, str] = how) -> tuple[object, ...]:
                return "crowd", path, *how, 600, who

            pauses = [chance.randrange(200, 4000) for _ in range(CLONES_OF_A_LIFE)]
            waits = [lambda writer, p=pause: writer.wait_for_more(p) for pause in pauses]
            for cut, path in clones_of(kind, outer, require, tmp_path / "errors", arguments, waits):
                assert_crowd_is_whole(recovered(path), cut)
                cuts += 1
    tally(f"cuts of {kind}, {who}, by clone", cuts)
