"""The lives whose effects are left out and swapped: together they do all that a journal does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from zlib import crc32

from mmapwal import Durability, SyncMethod
from mmapwal.testing import CrashDisk

from ..crash import scripts
from ..crash.scripts import Script
from ..crash.story import Story, check, told
from ..crash.test_checkpoint_crash import check_replica, submits_and_checkpoints
from ..crash.test_journal_crash import syncs_now_and_then
from ..crash.test_recovery_crash import dies_with_much_unsynced
from ..crash.test_second_crash import dies_in_a_compaction
from .effects import Mutant, Record

WRITE_AND_SYNC = partial(CrashDisk, sync_method=SyncMethod.FDATASYNC)


def dies_with_one_unsynced(story: Story) -> None:
    story.append(b"first" * 300)
    story.reopen(kill=True)
    story.append(b"second")


def _record(script: Script, disk: Callable[[], CrashDisk] = CrashDisk, **options: Any) -> Record:
    with told(script, **options) as scenario:
        return Record(scenario, partial(check, **options), disk())


@cache
def records() -> tuple[Record, ...]:
    unsynced = partial(_record, durability=Durability.OS)
    return (
        *map(_record, [*scripts.SCRIPTS, dies_in_a_compaction]),
        _record(scripts.appends_batches_over_a_rotation, WRITE_AND_SYNC),
        _record(scripts.dies_and_opens_again, WRITE_AND_SYNC),
        *map(unsynced, [syncs_now_and_then, dies_with_one_unsynced, dies_with_much_unsynced]),
        unsynced(scripts.dies_and_opens_again, commit_align_bytes=512),
        Record(submits_and_checkpoints, check_replica),
    )


@cache
def steps() -> tuple[tuple[str, list[Mutant]], ...]:
    """All automatic mutants, by the step of the protocol that they break. In an order that mixes the lives,
    and is the same each time."""
    by_name: defaultdict[str, list[tuple[int, Mutant]]] = defaultdict(list)
    for number, record in enumerate(records()):
        for mutant in record.mutants():
            by_name[mutant.name].append((crc32(f"{number}:{mutant.at}".encode()), mutant))
    return tuple(
        (name, [m for _, m in sorted(found, key=lambda f: f[0])]) for name, found in sorted(by_name.items())
    )
