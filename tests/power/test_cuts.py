"""The power is cut under a journal that lives on a real file system: by shutting the file system down, and by
taking the disk as it is at one instant. Nothing acknowledged is lost, nothing is invented."""

from __future__ import annotations

import fcntl
import gc
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mmapwal import SyncMethod

from ..crash.story import Contents
from ..filesystems.conftest import Filesystem, Maker, made_and_removed
from . import crowd, lives
from .test_torn_sectors import recovered

pytestmark = pytest.mark.power

METHODS = [m.value for m in SyncMethod]
DURABILITIES = ["SYNC", "SYNC", "OS", "BUFFERED"]
STEPS = 400
CHANGES = {"truncate_from", "drain", "set_snapshot_op", "compact"}
CLONES_OF_A_LIFE = 5
FICLONE = 0x40049409
DISKS_MIB = 4096
OUTER_MIB = 3072
Tally = Callable[[str, int], None]


@pytest.fixture
def power_cycles(pytestconfig: pytest.Config) -> int:
    """How many cuts for each combination."""
    return int(pytestconfig.getoption("power_cycles"))


@pytest.fixture
def disks(tmp_path: Path, require: Callable[[object, str], None]) -> Iterator[Path]:
    """Where the disks are: in memory, so that only the file systems on them take time."""
    require(os.geteuid() == 0, "mounting needs root")
    path = tmp_path / "disks"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISKS_MIB}m", "tmpfs", path], check=True)
    yield path
    unmount(path)


@pytest.fixture
def make(disks: Path, require: Callable[[object, str], None]) -> Iterator[Maker]:
    """Makes file systems in image files."""
    (disks / "made").mkdir()
    with made_and_removed(disks / "made", require) as maker:
        yield maker


# --- who writes -----------------------------------------------------------------------------------------


class Writer:
    """A module of this folder as a process; what it notes is read as it comes."""

    def __init__(self, notes: Path, module: str, *arguments: object) -> None:
        self._notes = notes
        self._errors = notes.with_suffix(".errors")
        command = [sys.executable, "-W", "error", "-m", f"tests.power.{module}", *map(str, arguments)]
        with notes.open("wb") as out, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=Path(__file__).parents[2])

    @property
    def noted(self) -> bytes:
        return self._notes.read_bytes()

    def wait_for(self, wanted: bytes) -> bytes:
        """All that is noted as soon as that is."""
        return self._wait(lambda noted: wanted in noted)

    def wait_for_more(self, more_bytes: int) -> bytes:
        """All that is noted when it is so much more than now, or the writer is through."""
        wanted_bytes = len(self.noted) + more_bytes
        return self._wait(lambda noted: len(noted) >= wanted_bytes or self.process.poll() == 0)

    def _wait(self, done: Callable[[bytes], bool]) -> bytes:
        deadline = time.monotonic() + 60
        while True:
            ended = self.process.poll() is not None  # before the look: it may end right behind it
            noted = self.noted
            if done(noted):
                return noted
            assert not ended, self._errors.read_text()
            assert time.monotonic() < deadline

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Cut(NamedTuple):
    """What was noted before the power went, and all that ever was."""

    before: bytes
    after: bytes


class Counts:
    """What cuts there were, each checked when it is counted; one counts when an operation was in flight."""

    def __init__(self, what: str, tally: Tally, weights: dict[str, int] = lives.STEPS) -> None:
        self.what, self._tally, self._weights = what, tally, weights
        self.cuts = self.changing = self.besides = self.lost = 0

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
            self.changing += steps[begun][0] in CHANGES
        else:
            self.besides += 1

    def tell(self) -> None:
        self._tally(f"cuts of {self.what}, an operation in flight", self.cuts)
        self._tally(
            f"cuts of {self.what}: a truncation, drain, watermark or compaction in flight", self.changing
        )
        self._tally(f"cuts of {self.what}: besides, between two operations", self.besides)
        assert self.changing >= self.cuts // 5


def moment(seed: int, chance: random.Random) -> bytes:
    """The note of a step whose beginning is waited for: a change of structure in half of the cases."""
    steps = lives.life(seed, STEPS, lives.STEPS)
    numbers = range(10, STEPS)
    if chance.random() < 0.5:
        return b"+%d\n" % chance.choice([n for n in numbers if steps[n][0] in CHANGES])
    return b"+%d\n" % chance.choice(numbers)


# --- the file system is shut down -----------------------------------------------------------------------


def shut_down(filesystem: Filesystem, writer: Writer, wait: Callable[[], bytes]) -> Cut:
    before = wait()  # what returns from now on may be lost: a sync in flight can say that it was done
    filesystem.cut_power()
    writer.kill()
    after = writer.noted
    filesystem.mount_again()
    return Cut(before, after)


def cut_a_life(
    filesystem: Filesystem, notes: Path, seed: int, wanted: bytes, method: str, *how: str
) -> tuple[Cut, Contents]:
    path = filesystem.path / f"j{seed}"
    writer = Writer(notes, "lives", path, seed, 0, STEPS + 1, method, *how)
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
            filesystem, tmp_path / "notes", seed, moment(seed, chance), method, durability
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
        cut, found = cut_a_life(filesystem, tmp_path / "notes", seed, wanted, "dsync", *how)
        counts.take(seed, cut, found, "unsynced", may_lose=True)
    assert counts.lost


# --- the disk as it is at one instant -------------------------------------------------------------------


@contextmanager
def place_for_clones(where: Path) -> Iterator[Path]:
    """An xfs that shares blocks, so that an image is cloned at one instant."""
    image, path = where / "outer.img", where / "outer"
    with image.open("wb") as f:
        f.truncate(OUTER_MIB << 20)
    path.mkdir()
    for command in (["mkfs.xfs", "-q", "-f", "-m", "reflink=1", image], ["mount", "-o", "loop", image, path]):
        subprocess.run(command, check=True)
    try:
        yield path
    finally:
        unmount(path)
        image.unlink()


def unmount(path: Path) -> None:
    """Views that a failed check holds keep a mount busy: it is detached then, and ends with them."""
    gc.collect()
    if subprocess.run(["umount", path], check=False, stderr=subprocess.DEVNULL).returncode != 0:
        subprocess.run(["umount", "-l", path], check=True)


def clone(image: Path, target: Path) -> None:
    with image.open("rb") as source, target.open("wb") as made:
        fcntl.ioctl(made, FICLONE, source.fileno())


@contextmanager
def mounted_clone(kind: str, image: Path) -> Iterator[Path]:
    path = image.with_suffix("")
    path.mkdir()
    option = ",nouuid" if kind == "xfs" else ""
    subprocess.run(["mount", "-o", f"loop{option}", image, path], check=True)
    try:
        yield path
    finally:
        unmount(path)
        image.unlink()
        if kind == "btrfs":  # or the next clone is taken for the same file system
            subprocess.run(["btrfs", "device", "scan", "--forget"], check=True, stdout=subprocess.DEVNULL)


def clones_of(
    kind: str,
    outer: Path,
    require: Callable[[object, str], None],
    notes: Path,
    arguments: Callable[[Path], tuple[object, ...]],
    waits: list[Callable[[Writer], bytes]],
) -> Iterator[tuple[Cut, Path]]:
    """Clones of the disk under a writer, one after each wait; each is mounted while it is looked at."""
    cuts: list[tuple[Cut, Path]] = []
    place = Path(tempfile.mkdtemp(dir=outer))
    (place / "original").mkdir()
    with made_and_removed(place / "original", require) as make:
        filesystem = make(kind)
        assert filesystem.image is not None
        writer = Writer(notes, *map(str, arguments(filesystem.path / "j")))
        try:
            for number, wait in enumerate(waits):
                before = wait(writer)
                target = place / f"clone-{number}.img"
                clone(filesystem.image, target)
                cuts.append((Cut(before, writer.noted), target))
        finally:
            writer.kill()
    if kind == "btrfs":
        subprocess.run(["btrfs", "device", "scan", "--forget"], check=True, stdout=subprocess.DEVNULL)
    for cut, image in cuts:
        with mounted_clone(kind, image) as path:
            yield cut, path / "j"


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

            for cut, path in clones_of(kind, outer, require, tmp_path / "notes", arguments, waits):
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
        for cut, path in clones_of(kind, outer, require, tmp_path / "notes", arguments, waits):
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

            def arguments(path: Path, method: str = method) -> tuple[object, ...]:
                return "crowd", path, method, 600, who

            pauses = [chance.randrange(200, 4000) for _ in range(CLONES_OF_A_LIFE)]
            waits = [lambda writer, p=pause: writer.wait_for_more(p) for pause in pauses]
            for cut, path in clones_of(kind, outer, require, tmp_path / "notes", arguments, waits):
                assert_crowd_is_whole(recovered(path), cut)
                cuts += 1
    tally(f"cuts of {kind}, {who}, by clone", cuts)
