"""Negative controls: with a bug planted in the journal or on the seam, the explorer must find it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from mmapwal import Durability, SyncMethod, compaction, engine, opening, removal
from mmapwal.errors import PoisonedError
from mmapwal.storage import Directory
from mmapwal.superblock import Superblock, SuperblockFile
from mmapwal.testing import CrashDisk, Fault, FaultDirectory, assert_crash_safe

from . import scripts
from .mutants import RenameFirst, SkipEffect
from .scripts import Script
from .story import Note, Story, check, told

SEGMENT = r"^segment-[0-9a-f-]*$"
NEW_SEGMENT = r"^segment-.*\.tmp$"
Wrap = Callable[[Directory], Directory]


def is_caught(script: Script, max_states: int, disk: CrashDisk | None = None, **options: Any) -> None:
    """The bug lives in the scenario only: what it leaves is recovered by the right code."""
    with told(script, **options) as scenario, pytest.raises(AssertionError, match="not safe"):
        assert_crash_safe(scenario, check, disk=disk, max_states=max_states * 4)


# --- bugs on the seam ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [scripts.creates_and_appends, scripts.drains])
def test_commits_that_are_not_synced_are_caught(script: Script, crash_states: int) -> None:
    is_caught(script, crash_states, wrap=lambda d: SkipEffect(d, "write_sync"))


def test_commits_of_which_the_first_sector_is_synced_are_caught(crash_states: int) -> None:
    is_caught(
        scripts.creates_and_appends, crash_states, wrap=lambda d: SkipEffect(d, "write_sync", keep_bytes=1)
    )


def test_commits_that_are_written_and_not_synced_are_caught(crash_states: int) -> None:
    is_caught(
        scripts.creates_and_appends,
        crash_states,
        CrashDisk(sync_method=SyncMethod.FDATASYNC),
        wrap=lambda d: SkipEffect(d, "sync", SEGMENT),
    )


def syncs(story: Story) -> None:
    scripts.fill(story, 12, 1500)
    story.sync()


def test_a_sync_that_covers_the_last_segment_only_is_caught(crash_states: int) -> None:
    is_caught(
        syncs,
        crash_states,
        durability=Durability.OS,
        wrap=lambda d: SkipEffect(d, "sync", r"^segment-0000000000000001-"),
    )


@pytest.mark.parametrize("script", [scripts.creates_and_appends, scripts.compacts])
def test_new_segments_that_are_not_synced_are_caught(script: Script, crash_states: int) -> None:
    is_caught(script, crash_states, wrap=lambda d: SkipEffect(d, "sync", NEW_SEGMENT))


def test_rewritten_segments_that_are_not_synced_are_caught(crash_states: int) -> None:
    is_caught(scripts.compacts, crash_states, wrap=lambda d: SkipEffect(d, "sync", r"-0000000[1-9]\.tmp$"))


def test_a_superblock_that_is_not_synced_is_caught(crash_states: int) -> None:
    is_caught(scripts.moves_the_watermark, crash_states, wrap=lambda d: SkipEffect(d, "sync", "^superblock"))


def test_a_rename_before_the_files_sync_is_caught(crash_states: int) -> None:
    is_caught(scripts.moves_the_watermark, crash_states, wrap=lambda d: RenameFirst(d, "^superblock"))


@pytest.mark.parametrize("script", [scripts.creates_and_appends, scripts.moves_the_watermark])
def test_a_directory_that_is_not_synced_is_caught(script: Script, crash_states: int) -> None:
    is_caught(script, crash_states, wrap=lambda d: SkipEffect(d, "dir_sync"))


def test_a_directory_whose_own_name_is_not_synced_is_caught(crash_states: int) -> None:
    is_caught(scripts.creates_and_appends, crash_states, wrap=lambda d: SkipEffect(d, "sync_parent"))


def test_an_index_that_is_never_synced_costs_a_scan_and_loses_nothing(crash_states: int) -> None:
    """The control of the controls: this effect is not needed."""
    with told(scripts.closes_and_opens_again, wrap=lambda d: SkipEffect(d, "sync", "^index")) as scenario:
        assert_crash_safe(scenario, check, max_states=crash_states)


# --- bugs in the journal itself --------------------------------------------------------------------------


def test_removals_that_do_not_first_sync_what_was_appended_are_caught(crash_states: int) -> None:
    def removes(story: Story) -> None:
        scripts.fill(story, 4, 700)
        story.drain(2, 3)
        story.append(b"two again", op=2)

    is_caught(removes, crash_states, durability=Durability.OS, wrap=lambda d: SkipEffect(d, "sync", SEGMENT))


def test_a_watermark_that_moves_in_memory_only_is_caught(
    crash_states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(self: SuperblockFile, new: Superblock) -> None:
        self.current = new

    def moves(story: Story) -> None:
        scripts.fill(story, 4, 200)
        with monkeypatch.context() as patch:
            patch.setattr(SuperblockFile, "commit", commit)
            story.set_snapshot_op(3)

    is_caught(moves, crash_states)


def test_segments_that_go_before_the_superblock_says_so_are_caught(
    crash_states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(engine: engine.Engine, dropped: Sequence[Any], renewed: dict[int, Any], *rest: Any) -> None:
        gone = {r.id for r in dropped} | set(renewed)
        engine.remove_files([r.name for r in engine.superblock.segments if r.id in gone])
        right(engine, list(dropped), renewed, *rest)

    right = compaction._commit
    monkeypatch.setattr(compaction, "_commit", commit)
    is_caught(scripts.compacts, crash_states)


def test_a_truncation_that_hides_what_is_appended_later_is_caught(
    crash_states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(engine: engine.Engine, row: Any) -> int:
        return right(engine, replace(row, below_lsn=row.below_lsn + 4096))

    right = removal._commit_removal
    monkeypatch.setattr(removal, "_commit_removal", commit)
    is_caught(scripts.truncates_and_refills, crash_states)


# --- bugs of recovery: seen when the power goes again ------------------------------------------------------


def test_a_recovery_that_starts_no_new_epoch_is_caught(
    crash_states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two entries the first one's sector is lost, and it is appended again with the very same bytes:
    without an epoch the frame that the cut left behind would follow it."""

    def same_epoch(self: Superblock, start_lsn: int) -> Superblock:
        return replace(self, seal=None)

    def appends(story: Story) -> None:
        story.append(b"a" * 456)
        story.sync()
        story.append(b"b" * 456)
        story.append(b"c" * 456)

    def check_twice(disk: CrashDisk, notes: Sequence[Note]) -> None:
        def appends_again(story: Story) -> None:
            if len(story.expected.now.entries) == 1:
                story.append(b"b" * 456)

        with told(appends_again, notes, durability=Durability.OS) as again:
            assert_crash_safe(again, lambda d, more: check(d, [*notes, *more]), disk=disk, max_states=40)

    def explore() -> None:
        disk, notes = CrashDisk(), []  # type: tuple[CrashDisk, list[Note]]
        with told(appends, durability=Durability.OS) as scenario:
            scenario(disk, notes.append)
            for state in disk.crash_states(max_states=crash_states // 8):
                check_twice(state, notes)

    explore()
    monkeypatch.setattr(Superblock, "with_epoch", same_epoch)
    with pytest.raises(AssertionError, match="not safe"):
        explore()


def dies(story: Story) -> None:
    story.append(b"first" * 300)
    story.reopen(kill=True)
    story.append(b"second")


def test_a_recovery_that_believes_the_page_cache_is_caught(
    crash_states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "rewrite_unproven", lambda *_: ({}, 0))
    is_caught(dies, crash_states, durability=Durability.OS)


def test_a_recovery_that_rewrites_and_does_not_sync_is_caught(crash_states: int) -> None:
    is_caught(dies, crash_states, durability=Durability.OS, wrap=lambda d: SkipEffect(d, "sync", SEGMENT))


def dies_in_a_compaction(story: Story) -> None:
    """Behind the rename of the superblock, before it is durable; then opens again, and cleans up."""
    plan = Fault(1 << 30, kinds="dir_sync")
    story.wrap = lambda d: FaultDirectory(d, plan)
    story.reopen(kill=True)
    scripts.fill(story, 14, 2000)
    story.set_snapshot_op(12)
    plan.nth = plan.calls + 1
    with pytest.raises(PoisonedError, match="directory sync"):
        story.compact()
    story.wrap = lambda d: d
    story.reopen(kill=True)


def test_a_superblock_that_was_not_yet_durable_when_it_was_read_is_made_so_first(crash_states: int) -> None:
    with told(dies_in_a_compaction) as scenario:
        assert_crash_safe(scenario, check, max_states=crash_states)


def test_an_open_that_does_not_first_make_its_superblock_durable_is_caught(
    crash_states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(self: SuperblockFile, new: Superblock) -> None:
        if new != self.current:
            right(self, new)

    right = SuperblockFile.commit
    monkeypatch.setattr(SuperblockFile, "commit", commit)
    is_caught(dies_in_a_compaction, crash_states)
