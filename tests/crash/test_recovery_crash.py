"""The power goes during recovery, and again during the recovery from that: nothing is lost."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from mmapwal import Durability, SyncMethod
from mmapwal.testing import CrashDisk, assert_crash_safe

from . import scripts
from .conftest import Check, Images
from .scripts import Script
from .story import Note, Story, check, told


def opens_and_appends(story: Story) -> None:
    """What recovery shows stays, and so does what is appended then."""
    if len(story.expected.now.entries) < 16:
        story.append(b"second life")


def check_again(
    disk: CrashDisk, notes: Sequence[Note], *, last: Check, cuts: int, max_states: int, **options: Any
) -> None:
    """Recovers, with the power going at each effect of that, so many times one in the other; `last` is the
    check of what comes of it."""
    if cuts == 0:
        last(disk, notes)
        return

    def recheck(disk: CrashDisk, more: Sequence[Note]) -> None:
        inner = max(4, max_states // 8)
        check_again(disk, [*notes, *more], last=last, cuts=cuts - 1, max_states=inner, **options)

    with told(opens_and_appends, notes, **options) as scenario:
        seed = zlib.crc32(repr(sorted(disk.kept)).encode())
        assert_crash_safe(scenario, recheck, disk=disk, max_states=max_states, seed=seed)


def dies_with_a_torn_batch(story: Story) -> None:
    story.append(b"first" * 40)
    story.append_many([b"1" * 700, b"2" * 300, b"3" * 900])


def dies_after_removals(story: Story) -> None:
    scripts.fill(story, 7, 1800)
    story.drain(2, 3)
    story.truncate_from(6)
    story.append(b"six")
    story.compact()


def dies_with_much_unsynced(story: Story) -> None:
    scripts.fill(story, 3, 700)
    story.sync()
    scripts.fill(story, 8, 1500, b"g")


SCRIPTS = [dies_with_a_torn_batch, dies_after_removals, scripts.dies_and_opens_again]


def explore(
    images: Images,
    script: Script,
    states: int,
    *,
    cuts: int = 1,
    disk: CrashDisk | None = None,
    **options: Any,
) -> None:
    disk = disk or CrashDisk()
    with (
        images.of("recovery cut short", f"by {disk.best_sync_method().value}") as counting,
        told(script, **options) as scenario,
    ):
        last = counting(partial(check, **options))
        inner = partial(check_again, last=last, cuts=cuts, max_states=24, **options)
        assert_crash_safe(scenario, inner, disk=disk, max_states=states)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_a_crash_of_recovery_loses_nothing(script: Script, crash_states: int, images: Images) -> None:
    explore(images, script, crash_states // 10)


def test_a_crash_of_the_recovery_from_a_crash_of_recovery_loses_nothing(
    crash_states: int, images: Images
) -> None:
    explore(images, dies_with_a_torn_batch, crash_states // 25, cuts=2)


@pytest.mark.parametrize("durability", [Durability.OS, Durability.BUFFERED])
def test_a_crash_while_the_unsynced_tail_is_written_again_loses_nothing(
    durability: Durability, crash_states: int, images: Images
) -> None:
    explore(images, dies_with_much_unsynced, crash_states // 10, durability=durability)


def test_an_aligned_tail_that_is_damaged_while_it_is_written_again_is_not_lost(
    crash_states: int, images: Images
) -> None:
    explore(
        images,
        dies_with_much_unsynced,
        crash_states // 10,
        disk=CrashDisk(damage=True),
        commit_align_bytes=512,
        durability=Durability.OS,
    )


def test_the_same_where_a_commit_is_a_write_and_then_a_sync(crash_states: int, images: Images) -> None:
    explore(
        images, dies_with_a_torn_batch, crash_states // 10, disk=CrashDisk(sync_method=SyncMethod.FDATASYNC)
    )


def test_the_same_where_a_commit_is_a_store_in_a_mapping_and_then_an_msync(
    crash_states: int, images: Images
) -> None:
    explore(images, dies_with_a_torn_batch, crash_states // 20, disk=CrashDisk(sync_method=SyncMethod.MSYNC))


def test_a_clean_close_survives_a_crash_of_the_next_open(crash_states: int, images: Images) -> None:
    explore(images, scripts.closes_and_opens_again, crash_states // 10)
