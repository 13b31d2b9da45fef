"""Torn and reordered sectors under real file systems: nothing acknowledged is lost, nothing is invented."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import pytest

from mmapwal import CorruptionError, Journal, SyncMethod

from ..crash.story import Contents, contents_of
from . import crowd, lives
from .fuse_disk import FuseDisk, fuse_disk
from .fuse_server import WRITE

pytestmark = pytest.mark.power

KINDS = ["ext4", "xfs", "btrfs"]
STEPS = 120
IMAGES_OF_A_LIFE = 20
RECOVERIES = 3
CROWD_ENTRIES = 60  # of each thread
Tally = Callable[[str, int], None]


class Life:
    """A life of a journal on a disk, and the images of the disk that a cut could have left."""

    def __init__(self, disk: FuseDisk, seed: int, method: str, durability: str = "SYNC", *how: str) -> None:
        """`how`: "only-appends", "unsynced"."""
        self.disk, self.seed = disk, seed
        weights = lives.ONLY_APPENDS if "only-appends" in how else lives.STEPS
        self.steps = lives.life(seed, STEPS, weights)
        with disk.mounted() as path, disk.notes.open("ab") as notes:
            for first, stop in [(0, STEPS // 2), (STEPS // 2, STEPS + 1)]:  # killed in between
                run_module("lives", path / "j", seed, first, stop, method, durability, *how, stdout=notes)
        self.notes = disk.notes.read_bytes()
        self._first = next(n for n, e in enumerate(disk.events) if e.noted)

    def instants(self, count: int, chance: random.Random) -> list[int]:
        """Instants, in order: a third anywhere, until all is unmounted; a third each while the structure is
        changed and while a batch is written, with something written that is not flushed."""
        anywhere = range(self._first, len(self.disk.events) + 1)
        pools: list[Sequence[int]] = [anywhere]
        for names in (lives.STRUCTURE, {"append_many"}):
            pool = [
                n for n in anywhere if self.disk.events[n - 1].kind == WRITE and self.in_flight(n) in names
            ]
            pools.append(pool or anywhere)
        return sorted(chance.choice(pools[n % 3]) for n in range(count))

    def in_flight(self, instant: int) -> str | None:
        """The name of the operation that had begun, and that nobody knows the end of."""
        durable, begun = self.known(instant)
        return self.steps[begun][0] if begun > durable else None

    def known(self, instant: int) -> tuple[int, int]:
        """Between which two steps the journal must be: all that was noted before the next event counts."""
        noted = self.disk.events[instant].noted if instant < len(self.disk.events) else len(self.notes)
        return lives.between(self.notes[:noted])

    def step_of(self, found: Contents, first: int, last: int) -> int | None:
        """The latest of the steps after which the journal held that."""
        return next((n for n in range(last, first - 1, -1) if self.steps[n][2] == found), None)

    def story(self, first: int, last: int) -> str:
        return f"seed {self.seed}: " + ", ".join(
            name for name, _, _ in self.steps[max(0, first - 3) : last + 1]
        )


def run_module(name: str, *arguments: object, stdout: IO[bytes]) -> None:
    command = [sys.executable, "-W", "error", "-m", f"tests.power.{name}", *map(str, arguments)]
    subprocess.run(command, stdout=stdout, cwd=Path(__file__).parents[2], timeout=120, check=True)


def recovered(path: Path) -> Contents:
    """What is there; it can be appended to, closed, and found again the same."""
    with Journal(path) as journal:
        found = contents_of(journal)
        report = journal.verify()
        assert report.ok, report.problems
        op = journal.append(b"goes on", kind=3)
        assert op == found.next_op()
    with Journal(path) as journal:
        assert journal.report.outcome.value == "sealed"
        assert contents_of(journal) == found.with_entries({op: (b"goes on", 3)})
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [m.value for m in SyncMethod])
def test_whatever_sectors_the_disk_had_written_by_then_all_that_was_acknowledged_is_there(
    tmp_path: Path, kind: str, method: str, power_cycles: int, tally: Tally
) -> None:
    chance = random.Random(f"torn {kind} {method}")
    images = torn = in_flight = changing = 0
    while images < power_cycles:
        durability = ["SYNC", "SYNC", "OS", "BUFFERED"][images // IMAGES_OF_A_LIFE % 4]
        with fuse_disk(kind, tmp_path) as disk:
            life = Life(disk, chance.randrange(1 << 32), method, durability)
            for instant in life.instants(min(IMAGES_OF_A_LIFE, power_cycles - images), chance):
                durable, begun = life.known(instant)
                with disk.after_cut(instant, chance) as path:
                    found = recovered(path / "j")
                assert life.step_of(found, durable, begun) is not None, (
                    f"{durability}, event {instant}: {found.describe()} is not what was there between steps "
                    f"{durable} and {begun}; {life.story(durable, begun)}"
                )
                images += 1
                torn += disk.torn > 0
                in_flight += begun > durable
                changing += life.in_flight(instant) in lives.STRUCTURE
    assert torn
    assert changing >= images // 3
    tally(f"torn images of {kind}, {method}", images)
    tally(f"torn images of {kind}, {method}: with an operation in flight", in_flight)
    tally(f"torn images of {kind}, {method}: with a change of structure in flight", changing)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_again_and_again_while_it_recovers_nothing_is_lost(
    tmp_path: Path, kind: str, power_cycles: int, tally: Tally
) -> None:
    chance = random.Random(f"again {kind}")
    with fuse_disk(kind, tmp_path / "first") as disk:
        life = Life(disk, chance.randrange(1 << 32), "auto")
        for instant in life.instants(max(1, power_cycles // 10), chance):
            durable, begun = life.known(instant)
            image = disk.where / "again"
            disk.make_image(image, instant, chance)
            for _ in range(RECOVERIES):
                with fuse_disk(kind, tmp_path / "second", old=(image, disk.uuid)) as second:
                    open_and_die(second, life.seed)
                    second.make_image(image, chance.randint(1, len(second.events)), chance)
            with (
                fuse_disk(kind, tmp_path / "second", old=(image, disk.uuid)) as second,
                second.mounted() as path,
            ):
                found = recovered(path / "j")
            assert life.step_of(found, durable, begun) is not None, (
                f"event {instant}: {found.describe()}; {life.story(durable, begun)}"
            )
            tally(f"cuts of recoveries on {kind}", RECOVERIES)


def open_and_die(disk: FuseDisk, seed: int) -> None:
    with disk.mounted() as path, disk.notes.open("ab") as notes:
        run_module("lives", path / "j", seed, STEPS, STEPS, "auto", "SYNC", stdout=notes)


# --- commits of many threads ----------------------------------------------------------------------------


def live_in_a_crowd(disk: FuseDisk, method: str) -> bytes:
    """What was noted."""
    with disk.mounted() as path, disk.notes.open("ab") as notes:
        run_module("crowd", path / "j", method, "SYNC", CROWD_ENTRIES, stdout=notes)
    return disk.notes.read_bytes()


def assert_crowd_is_whole(found: Contents, noted: bytes) -> None:
    """All that was acknowledged, batches whole, no op left out, and of each thread one more at most."""
    acknowledged = {int(op): (int(thread), int(n)) for op, thread, n in map(bytes.split, noted.splitlines())}
    writers = {op: crowd.who(payload) for op, (payload, _) in found.entries.items()}
    assert writers.items() >= acknowledged.items()
    assert sorted(writers) == list(range(1, len(writers) + 1))
    for thread in range(crowd.THREADS):
        numbers = [n for _, (who, n) in sorted(writers.items()) if who == thread]
        step = crowd.BATCH if thread == 0 else 1
        told = sum(who == thread for who, _ in acknowledged.values())
        assert numbers == list(range(len(numbers)))
        assert len(numbers) in {told, told + step}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dsync", "fdatasync"])
def test_of_commits_that_threads_share_none_that_was_acknowledged_is_lost_and_batches_are_whole(
    tmp_path: Path, kind: str, method: str, power_cycles: int, tally: Tally
) -> None:
    chance = random.Random(f"crowd {kind} {method}")
    images = 0
    while images < power_cycles:
        with fuse_disk(kind, tmp_path) as disk:
            notes = live_in_a_crowd(disk, method)
            unflushed = [
                n for n, e in enumerate(disk.events) if n and e.noted and disk.events[n - 1].kind == WRITE
            ]
            for instant in sorted(chance.choices(unflushed, k=min(IMAGES_OF_A_LIFE, power_cycles - images))):
                with disk.after_cut(instant, chance) as path:
                    found = recovered(path / "j")
                assert_crowd_is_whole(found, notes[: disk.events[instant].noted])
                images += 1
    tally(f"torn images of {kind}, {method}: threads", images)


# --- a disk that lies, a journal that does not sync -----------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dsync", "fdatasync"])
def test_a_disk_that_lies_about_flushes_is_found_out_or_only_the_last_is_lost(
    tmp_path: Path, kind: str, method: str, power_cycles: int, tally: Tally
) -> None:
    """Lives of appends only: a removal that the disk lied about is undone, and nothing can show it."""
    chance = random.Random(f"lies {kind} {method}")
    met: Counter[str] = Counter()
    while met.total() < power_cycles:
        with fuse_disk(kind, tmp_path) as disk:
            life = Life(disk, chance.randrange(1 << 32), method, "SYNC", "only-appends")
            lies = chance.randint(2, 40)
            for instant in life.instants(min(IMAGES_OF_A_LIFE, power_cycles - met.total()), chance):
                met[what_a_lie_does(life, instant, lies, chance)] += 1
    assert met["the last is lost"] + met["the journal found it out"] > 0, met
    for what, count in met.items():
        tally(f"lies of {kind}: {what}", count)


def what_a_lie_does(life: Life, instant: int, lies: int, chance: random.Random) -> str:
    """The flushes among the last so many events did nothing."""
    durable, begun = life.known(instant)
    try:
        with life.disk.after_cut(instant, chance, trusted=instant - lies) as path:
            try:
                found = recovered(path / "j")
            except CorruptionError:
                return "the journal found it out"
    except OSError:
        return "the file system found it out"
    step = life.step_of(found, 0, begun)
    assert step is not None, f"event {instant}: {found.describe()} never was; {life.story(durable, begun)}"
    return "the last is lost" if step < durable else "nothing is lost"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dsync", "msync"])
def test_a_journal_that_does_not_sync_is_caught(tmp_path: Path, kind: str, method: str) -> None:
    chance = random.Random(f"unsynced {kind} {method}")
    lost = 0
    with fuse_disk(kind, tmp_path) as disk:
        life = Life(disk, chance.randrange(1 << 32), method, "OS", "only-appends", "unsynced")
        for instant in life.instants(10, chance):
            durable, begun = life.known(instant)
            with disk.after_cut(instant, chance) as path:
                step = life.step_of(recovered(path / "j"), 0, begun)
            assert step is not None
            lost += step < durable
    assert lost
