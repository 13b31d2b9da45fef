"""The power is cut under a replica that checkpoints, on real file systems: the state is that of the
acknowledged commands, whichever half of the checkpoint was done."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmapwal import SnapshotError, SyncMethod, recover

from ..filesystems.conftest import Filesystem, Maker, Require
from . import machines
from .cuts import Cut, Tally, Writer, clones_of, place_for_clones, shut_down

pytestmark = pytest.mark.power

METHODS = [m.value for m in SyncMethod]
COMMANDS = 4000
CLONES_OF_A_LIFE = 4


def noted(notes: bytes, sign: bytes) -> list[int]:
    lines = notes[: notes.rfind(b"\n") + 1].splitlines()
    return [int(line[1:]) for line in lines if line.startswith(sign)]


class Counts:
    """What cuts there were, each checked when it is counted; one counts when a checkpoint was in flight."""

    def __init__(self, what: str, tally: Tally) -> None:
        self.what, self._tally = what, tally
        self.cuts = self.besides = 0

    def take(self, path: Path, cut: Cut, before: int = 0) -> int:
        """How many commands there are. `before`: how many there were when the writer began."""
        durable = max(noted(cut.before, b"-"), default=before)
        begun = max(noted(cut.after, b"+"), default=before)
        checkpoint = max(noted(cut.before, b"C"), default=0)
        machine = machines.Chain()
        with recover(path, machine) as replica:
            assert durable <= machine.count <= begun, f"{self.what}: {machine.count}, {durable} to {begun}"
            assert machine.fold == machines.fold_of(machine.count)
            assert replica.gap_op is None
            assert replica.last_applied_op in {machine.count, None}
            paired = replica.journal.pairing
            assert (paired[0] if paired else 0) == replica.journal.snapshot_op >= checkpoint
            assert replica.journal.verify().ok
            if replica.journal.remaining_capacity == 0:  # cut when the submits waited for the checkpoint
                replica.checkpoint()
            count = replica.submit(machines.payload(machine.count + 1))
            replica.checkpoint()
        again = machines.Chain()
        with recover(path, again) as replica:
            assert (again.count, again.fold) == (count, machines.fold_of(count))
            assert len(replica.journal) == 0
        turns = noted(cut.before, b"c")
        if turns and len(turns) == len(noted(cut.after, b"c")) and len(turns) > len(noted(cut.after, b"C")):
            self.cuts += 1
        else:
            self.besides += 1
        return count

    def tell(self) -> None:
        self._tally(f"cuts of {self.what}, a checkpoint in flight", self.cuts)
        self._tally(f"cuts of {self.what}, besides", self.besides)


def into_a_checkpoint(chance: random.Random, turn: int) -> Callable[[Writer], bytes]:
    """Waits for the beginning of that turn, and then a part of what one takes."""
    pause_s = chance.choice([0.0, chance.uniform(0, 0.003), chance.uniform(0, 0.02)])

    def wait(writer: Writer) -> bytes:
        writer.wait_for(b"c%d\n" % turn)
        time.sleep(pause_s)
        return writer.noted

    return wait


def cut_a_life(
    filesystem: Filesystem, errors: Path, method: str, chance: random.Random, *how: str
) -> tuple[Path, Cut]:
    path = filesystem.path / "j"
    writer = Writer(errors, "machines", path, COMMANDS, method, *how)
    wait = into_a_checkpoint(chance, chance.randrange(2, 12))
    return path, shut_down(filesystem, writer, lambda: wait(writer))


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_shut_down_under_a_checkpoint_the_state_is_that_of_all_that_was_acknowledged(
    make: Maker, tmp_path: Path, kind: str, power_cycles: int, tally: Tally
) -> None:
    filesystem, chance = make(kind), random.Random(f"checkpoint {kind}")
    counts, count = Counts(f"{kind}, checkpoints, by shutdown", tally), 0
    while counts.cuts < power_cycles:  # it goes on with what was found
        method = METHODS[(counts.cuts + counts.besides) % len(METHODS)]
        path, cut = cut_a_life(filesystem, tmp_path / "errors", method, chance)
        count = counts.take(path, cut, count)
    counts.tell()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_shut_down_under_snapshots_that_are_not_synced_it_is_caught(
    make: Maker, tmp_path: Path, kind: str, tally: Tally
) -> None:
    chance = random.Random(f"unsynced {kind}")
    for _ in range(8):
        path, cut = cut_a_life(make(kind), tmp_path / "errors", "auto", chance, "unsynced")
        try:
            Counts(f"{kind}, unsynced snapshots", tally).take(path, cut)
        except SnapshotError:
            return
    pytest.fail("nobody misses what was not synced")


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_of_the_disk_at_any_instant_of_a_checkpoint_the_state_is_that_of_all_that_was_acknowledged(
    tmp_path: Path, disks: Path, require: Require, kind: str, power_cycles: int, tally: Tally
) -> None:
    chance = random.Random(f"checkpoint clones {kind}")
    counts, lives = Counts(f"{kind}, checkpoints, by clone", tally), 0
    with place_for_clones(disks) as outer:
        while counts.cuts < power_cycles:
            method = METHODS[lives % len(METHODS)]
            lives += 1

            def arguments(path: Path, method: str = method) -> tuple[object, ...]:
                return "machines", path, COMMANDS, method

            turns = sorted(chance.sample(range(2, 20), CLONES_OF_A_LIFE))
            waits = [into_a_checkpoint(chance, turn) for turn in turns]
            for cut, path in clones_of(kind, outer, require, tmp_path / "errors", arguments, waits):
                counts.take(path, cut)
    counts.tell()
