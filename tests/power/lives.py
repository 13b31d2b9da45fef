"""Random lives of a journal, each known from its seed: what it holds after each step of it.

Run as a program it lives one. It notes on its standard output when a step begins, and when all up to a step
is durable: of a journal that is found later, the notes tell between which two steps it must be.
"""

from __future__ import annotations

import functools
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmapwal import Durability, Journal, SyncMethod
from mmapwal.storage import MemoryDirectory

from ..crash.story import OP_MAX, Contents

OPTIONS: dict[str, Any] = {"segment_bytes": 16384}
SIZES = [0, 1, 100, 100, 100, 400, 511, 512, 700, 2000, 5000]
BATCH_SIZES = [0, 100, 480, 700, 1500]  # most are torn between their entries
STEPS = {
    "append": 50, "append_many": 15, "fill": 5, "replace": 8, "truncate_from": 5, "drain": 4,
    "set_snapshot_op": 5, "compact": 3, "set_user_data": 2, "sync": 2, "reopen": 3,
}  # fmt: skip
APPENDS = {"append", "append_many", "fill", "replace"}
ONLY_APPENDS = {"append": 80, "append_many": 20}
STRUCTURE = {"truncate_from", "drain", "set_snapshot_op", "compact", "set_user_data", "reopen"}
DURABLE = STRUCTURE | {"sync"}
Step = tuple[str, Callable[[Journal], Any], Contents]
"""Its name, what is done, and what the journal holds after it."""


def slots_of(weights: dict[str, int]) -> int:
    """So few that the watermark has to move; enough where it never does."""
    return 128 if "set_snapshot_op" in weights else 1024


def options_of(seed: int, weights: dict[str, int]) -> dict[str, Any]:
    return OPTIONS | {"slots": slots_of(weights), "commit_align_bytes": [0, 512, 4096][seed % 3]}


def life(seed: int, steps: int, weights: dict[str, int]) -> list[Step]:
    """The steps of a life; the first one does nothing."""
    chance = random.Random(seed)
    done: list[Step] = [("open", lambda _: None, Contents())]
    for number in range(1, steps + 1):
        contents = done[-1][2]
        name = chance.choices(list(weights), list(weights.values()))[0]
        room = slots_of(weights) - (contents.next_op() - contents.watermark)
        if room < 8 and name in {"append", "append_many", "fill"}:
            name = "set_snapshot_op"
        done.append(_step(name, number, contents, chance))
    return done


def _payload(number: int, sizes: list[int], chance: random.Random) -> bytes:
    return (b"step %d " % number * 700)[: chance.choice(sizes)]


def _step(name: str, number: int, contents: Contents, chance: random.Random) -> Step:
    new, low = contents.next_op(), contents.watermark + 1
    op = chance.randint(max(low, new - 12), new)  # a live one, a gap, or the next
    kind, data = chance.randrange(9), _payload(number, SIZES, chance)
    match name:
        case "append":
            after = contents.with_entries({new: (data, kind)})
            return name, lambda j: j.append(data, kind=kind), after
        case "append_many":
            batch = [_payload(number, BATCH_SIZES, chance) + b"%d" % n for n in range(chance.randint(2, 6))]
            after = contents.with_entries({new + n: (d, kind) for n, d in enumerate(batch)})
            return name, lambda j: j.append_many(batch, kind=kind), after
        case "fill":
            after = contents.with_entries({new + 1: (data, kind)})
            return name, lambda j: j.append(data, op=new + 1, kind=kind), after
        case "replace":
            after = contents.with_entries({op: (data, kind)})
            return name, lambda j: j.append(data, op=op, kind=kind, replace=True), after
        case "truncate_from":
            return name, lambda j: j.truncate_from(op), contents.without(op, OP_MAX)
        case "drain":
            last = min(op + 3, OP_MAX)
            return name, lambda j: j.drain(op, last), contents.drained(op, last)
        case "set_snapshot_op":
            mark = max(contents.watermark, new - chance.randint(1, 60))
            return name, lambda j: j.set_snapshot_op(mark), contents.with_watermark(mark)
        case "set_user_data":  # it promises nothing about the entries before it
            after = replace(contents, user_data=data[:60])
            return name, lambda j: (j.sync(), j.set_user_data(data[:60])), after
        case "compact":
            return name, lambda j: j.compact(), contents
        case "sync":
            return name, lambda j: j.sync(), contents
    return name, lambda j: None, contents


@functools.cache
def rotating(seed: int, steps: int) -> frozenset[int]:
    """The numbers of those that go on in another segment, where each is written before the next begins."""
    disk, found = MemoryDirectory("life"), set()
    journal = Journal("life", storage=disk, **options_of(seed, STEPS))
    for number, (name, act, _) in enumerate(life(seed, steps, STEPS)):
        tail = journal._engine.state().tail_id
        act(journal)
        if name in APPENDS and journal._engine.state().tail_id != tail:
            found.add(number)
        if name == "reopen":
            journal.close()
            journal = Journal("life", storage=disk, **options_of(seed, STEPS))
    journal.close()
    return frozenset(found)


def between(notes: bytes) -> tuple[int, int]:
    """The step up to which all is durable, and the last one that has begun."""
    lines = notes[: notes.rfind(b"\n") + 1].split()
    begun = max((int(line[1:]) for line in lines if line.startswith(b"+")), default=0)
    return max((int(line[1:]) for line in lines if line.startswith(b"-")), default=0), begun


def live(
    path: Path, seed: int, numbers: range, weights: dict[str, int], *, unsynced: bool, **options: Any
) -> None:
    """The steps of these numbers, then dies. `unsynced`: takes for durable what is only written; whoever
    looks must find the loss."""
    options |= options_of(seed, weights)
    journal = Journal(path, **options)
    durable = options["durability"] is Durability.SYNC or unsynced
    steps = life(seed, numbers.stop - 1, weights)
    for number in numbers:
        name, act, _ = steps[number]
        os.write(1, b"+%d\n" % number)
        act(journal)
        if name == "reopen":
            journal.close()
            journal = Journal(path, **options)
        if durable or name in DURABLE:
            os.write(1, b"-%d\n" % number)
    if options["durability"] is Durability.BUFFERED:  # nothing else survives the death of the process
        journal.sync()
    os._exit(0)


if __name__ == "__main__":
    live(
        Path(sys.argv[1]), int(sys.argv[2]), range(int(sys.argv[3]), int(sys.argv[4])),
        ONLY_APPENDS if "only-appends" in sys.argv[7:] else STEPS, unsynced="unsynced" in sys.argv[7:],
        sync_method=SyncMethod(sys.argv[5]), durability=Durability[sys.argv[6]],
    )  # fmt: skip
