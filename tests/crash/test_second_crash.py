"""The power goes, the journal is opened, and the power goes again; and disks that lie about their syncs."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mmapwal import CorruptionError, Durability, PoisonedError
from mmapwal.storage import Directory
from mmapwal.testing import Call, CrashDisk, Fault, FaultDirectory, InterposedDirectory, assert_crash_safe

from . import scripts
from .story import Story, check, contents_of, opened, told


class LyingDirectory(InterposedDirectory):
    """Says that it has synced files whose name matches, and has not."""

    def __init__(self, inner: Directory, pattern: str) -> None:
        super().__init__(inner)
        self.pattern = re.compile(pattern)

    def intercept(self, call: Call) -> Any:
        if not self.pattern.search(call.name):
            return call.run()
        if call.kind == "write_sync":
            assert call.storage is not None
            return call.storage.write_at(call.offset, call.data)
        return None if call.kind == "sync" else call.run()


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
        assert_crash_safe(scenario, check, max_states=crash_states * 4)


def test_what_a_cut_left_behind_does_not_come_back_when_the_power_goes_again(crash_states: int) -> None:
    """Of two entries the first one's sector is lost, and it is appended again with the very same bytes:
    without an epoch the frame that the cut left behind would follow it."""

    def appends(story: Story) -> None:
        story.append(b"a" * 456)
        story.sync()
        story.append(b"b" * 456)
        story.append(b"c" * 456)

    def appends_again(story: Story) -> None:
        if len(story.expected.now.entries) == 1:
            story.append(b"b" * 456)

    disk, notes = CrashDisk(), []  # type: tuple[CrashDisk, list[Note]]
    with told(appends, durability=Durability.OS) as scenario:
        scenario(disk, notes.append)
        for state in disk.crash_states(max_states=crash_states // 8):
            with told(appends_again, notes, durability=Durability.OS) as again:
                assert_crash_safe(again, lambda d, more: check(d, [*notes, *more]), disk=state, max_states=40)


def test_an_index_that_is_never_synced_costs_a_scan_and_loses_nothing(crash_states: int) -> None:
    with told(scripts.closes_and_opens_again, wrap=lambda d: LyingDirectory(d, "^index")) as scenario:
        assert_crash_safe(scenario, check, max_states=crash_states)


def test_of_a_disk_that_lies_about_flushes_only_the_last_is_lost_and_a_gap_is_refused() -> None:
    """Each entry takes sectors of its own. A header that is there behind a lost entry proves that it had been
    durable."""
    payloads = [bytes([n]) * (512 * n - 56) for n in (1, 2, 3, 4)]
    headers = [4096 + 512 * before for before in (0, 1, 3, 6)]
    disk = CrashDisk()

    def appends(story: Story) -> None:
        for payload in payloads:
            story.append(payload)

    with told(appends, wrap=lambda d: LyingDirectory(d, r"^segment-[0-9a-f-]*$")) as scenario:
        scenario(disk, lambda _: None)
        states = list(disk.crash_states(max_states=1000))
    found: set[int | None] = set()
    for state in states:
        kept = {int(at) for text in state.kept for at in re.findall(r"^segment\S* bytes \[(\d+)", text)}
        try:
            with opened(state) as journal:
                entries = [payload for payload, _ in contents_of(journal).entries.values()]
        except CorruptionError:
            found.add(None)
            assert any(text.startswith("segment-") for text in state.lost)
            continue
        found.add(len(entries))
        assert entries == payloads[: len(entries)]
        assert not kept.intersection(headers[len(entries) + 1 :])
    assert found == {None, 0, 1, 2, 3, 4}
