"""The power goes at every effect: what was acknowledged is there, all else whole or gone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from mmapwal import Durability, SyncMethod
from mmapwal.testing import CrashDisk, assert_crash_safe

from . import scripts
from .conftest import Images
from .scripts import Script, parametrize_scripts
from .story import Story, check, told


def explore(
    images: Images, script: Script, max_states: int, disk: CrashDisk | None = None, **options: Any
) -> None:
    disk = disk or CrashDisk()
    labels = (f"a life that {script.__name__.replace('_', ' ')}", f"by {disk.best_sync_method().value}")
    with images.of(*labels) as counting, told(script, **options) as scenario:
        counted = counting(partial(check, **options))
        stats = assert_crash_safe(scenario, counted, disk=disk, max_states=max_states)
    assert stats.distinct > min(max_states, stats.points) / 2


@parametrize_scripts
def test_nothing_acknowledged_is_lost_and_nothing_else_is_found(
    script: Script, crash_states: int, images: Images
) -> None:
    explore(images, script, crash_states)


@parametrize_scripts
def test_the_same_where_a_commit_is_a_write_and_then_a_sync(
    script: Script, crash_states: int, images: Images
) -> None:
    explore(images, script, crash_states // 2, CrashDisk(sync_method=SyncMethod.FDATASYNC))


@parametrize_scripts
def test_the_same_where_a_commit_is_a_store_in_a_mapping_and_then_an_msync(
    script: Script, crash_states: int, images: Images
) -> None:
    explore(images, script, crash_states // 4, CrashDisk(sync_method=SyncMethod.MSYNC))


@parametrize_scripts
def test_aligned_commits_survive_sectors_that_are_damaged_while_they_are_written(
    script: Script, crash_states: int, images: Images
) -> None:
    explore(images, script, crash_states // 2, CrashDisk(damage=True), commit_align_bytes=512)


def test_without_alignment_a_damaged_sector_can_take_the_entry_before_with_it(
    crash_states: int, images: Images
) -> None:
    """The assumption that GUARANTEES states; and the proof that `damage` has teeth."""
    with pytest.raises(AssertionError, match="not safe"):
        explore(images, scripts.creates_and_appends, crash_states * 4, CrashDisk(damage=True))


# --- what is durable only after sync() ---------------------------------------------------------------------


def syncs_now_and_then(story: Story) -> None:
    for n in range(3):
        scripts.fill(story, 3, 1300, b"%d" % n)
        story.append_many([b"x" * 400, b"y"])
        if n != 1:
            story.sync()
    story.truncate_from(13)
    story.append(b"later")
    story.drain(1, 4)
    story.append(b"last")


@pytest.mark.parametrize("durability", [Durability.OS, Durability.BUFFERED])
@pytest.mark.parametrize("script", [syncs_now_and_then, *scripts.SCRIPTS], ids=lambda s: s.__name__)
def test_of_what_is_not_synced_only_the_last_is_lost(
    script: Script, durability: Durability, crash_states: int, images: Images
) -> None:
    explore(images, script, crash_states // 2, durability=durability)


@pytest.mark.parametrize("script", [syncs_now_and_then, scripts.dies_and_opens_again])
def test_the_same_of_what_is_stored_in_a_mapping_and_not_synced(
    script: Script, crash_states: int, images: Images
) -> None:
    disk = CrashDisk(sync_method=SyncMethod.MSYNC)
    explore(images, script, crash_states // 2, disk, durability=Durability.OS)
