"""A full disk is a clear error. Nothing acknowledged is lost, and when space returns the work goes on."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmapwal import (
    Durability,
    Journal,
    PersistStage,
    SnapshotPersistError,
    SyncMethod,
    recover,
)

from .conftest import Filesystem

pytestmark = pytest.mark.root

SIZES: dict[str, Any] = {"slots": 4096, "segment_bytes": 256 << 10}
KIB = 1 << 10


def payload(op: int) -> bytes:
    return (b"op %d " % op * 4096)[: 16 * KIB]


def append_until_full(journal: Journal) -> int:
    """The highest op that was acknowledged."""
    acknowledged = journal.last_op or 0
    with pytest.raises(OSError) as caught:
        for op in range(acknowledged + 1, 4096):
            assert journal.append(payload(op)) == op
            acknowledged = op
    assert caught.value.errno == errno.ENOSPC
    return acknowledged


def settle(journal: Journal) -> None:
    """No segment is in the making: what it takes of a disk and gives back would be anyone's guess."""
    bound = time.monotonic() + 60
    while (
        not (state := journal._engine.state()).targets
        and state.stage_room <= (SIZES["segment_bytes"] - 4096) // 2
    ):
        assert time.monotonic() < bound
        time.sleep(0.005)


def assert_whole(journal: Journal, first: int, last: int) -> None:
    assert [entry.op for entry in journal] == list(range(first, last + 1))
    assert all(bytes(entry.payload) == payload(entry.op) for entry in journal)


def assert_no_space(error: OSError) -> None:
    """What fits on a disk that is all but full is its own affair; what does not fit has one name."""
    assert error.errno == errno.ENOSPC


def test_an_append_that_finds_no_space_fails_clearly_and_goes_on_when_there_is_some(
    filesystem: Filesystem, place: Path, method: SyncMethod
) -> None:
    with Journal(place / "j", sync_method=method, **SIZES) as journal:
        journal.append(payload(1))
        with filesystem.full(leave=1024 * KIB):
            last = append_until_full(journal)
            assert journal.poisoned is None
            assert_whole(journal, 1, last)
            assert append_until_full(journal) == last  # again and again the same
        for op in range(last + 1, last + 40):
            assert journal.append(payload(op)) == op
        assert_whole(journal, 1, last + 39)
    with Journal(place / "j") as journal:
        assert_whole(journal, 1, last + 39)
        assert journal.verify().ok


@pytest.mark.parametrize("durability", [Durability.OS, Durability.BUFFERED], ids=lambda d: d.value)
def test_what_was_only_written_or_buffered_is_there_after_space_returned(
    filesystem: Filesystem, place: Path, method: SyncMethod, durability: Durability
) -> None:
    with Journal(place / "j", sync_method=method, durability=durability, **SIZES) as journal:
        with filesystem.full(leave=1024 * KIB):
            last = append_until_full(journal)
            assert_whole(journal, 1, last)
        journal.sync()
        assert journal.append(payload(last + 1)) == last + 1
    with Journal(place / "j") as journal:
        assert_whole(journal, 1, last + 1)


def test_a_journal_is_closed_and_opened_on_a_full_disk_without_a_loss(
    filesystem: Filesystem, place: Path, method: SyncMethod
) -> None:
    journal = Journal(place / "j", sync_method=method, **SIZES)
    with filesystem.full(leave=1024 * KIB):
        last = append_until_full(journal)
        journal.close()
        try:
            with Journal(place / "j", sync_method=method) as journal:
                assert_whole(journal, 1, last)
        except OSError as e:  # opening replaces the superblock
            assert_no_space(e)
    with Journal(place / "j", sync_method=method) as journal:
        assert_whole(journal, 1, last)
        assert journal.append(payload(last + 1)) == last + 1


def test_a_journal_gives_its_own_space_back_on_a_disk_too_full_for_a_segment(
    filesystem: Filesystem, place: Path, method: SyncMethod
) -> None:
    with Journal(place / "j", sync_method=method, **SIZES) as journal:
        for op in range(1, 100):
            journal.append(payload(op))
        settle(journal)
        with filesystem.full(leave=192 * KIB):
            last = append_until_full(journal)
            journal.set_snapshot_op(last - 2)
            assert journal.compact() > 4 * SIZES["segment_bytes"]
            filesystem.settle()
            for op in range(last + 1, last + 20):
                assert journal.append(payload(op)) == op
            assert_whole(journal, last - 1, last + 19)
    with Journal(place / "j") as journal:
        assert_whole(journal, last - 1, last + 19)


@pytest.mark.parametrize("leave_kib", [0, 4, 8, 16, 64, 128, 192, 256, 288, 320, 400])
def test_a_journal_that_finds_no_space_at_any_step_of_being_made_is_made_later(
    filesystem: Filesystem, place: Path, leave_kib: int
) -> None:
    with filesystem.full(leave=leave_kib * KIB):
        try:
            with Journal(place / "j", **SIZES) as journal:
                journal.append(payload(1))
        except OSError as e:
            assert_no_space(e)
    with Journal(place / "j", **SIZES) as journal:
        first = (journal.last_op or 0) + 1
        assert first in {1, 2}
        for op in range(first, 31):
            assert journal.append(payload(op)) == op
        assert_whole(journal, 1, 30)


@pytest.mark.parametrize("leave_kib", [0, 4, 16, 64, 256])
def test_a_shrinking_operation_that_finds_no_space_has_not_happened(
    filesystem: Filesystem, place: Path, leave_kib: int
) -> None:
    with Journal(place / "j", **SIZES) as journal:
        for op in range(1, 101):
            journal.append(payload(op))
        journal.drain(20, 30)
        kept = {*range(1, 20), *range(31, 101)}
        steps: list[tuple[Callable[[], object], set[int]]] = [
            (journal.compact, set()),
            (lambda: journal.drain(50, 60), set(range(50, 61))),
            (lambda: journal.truncate_from(91), set(range(91, 101))),
            (lambda: journal.set_user_data(b"x" * 128), set()),
            (journal.compact, set()),
        ]
        with filesystem.full(leave=leave_kib * KIB):
            for shrink, removed in steps:
                try:
                    shrink()
                    kept -= removed
                except OSError as e:
                    assert_no_space(e)
                assert {entry.op for entry in journal} == kept
                assert journal.poisoned is None
        journal.compact()
        assert {entry.op for entry in journal} == kept
        journal.append(b"goes on")
    with Journal(place / "j") as journal:
        assert {entry.op for entry in journal} > kept
        assert journal.verify().ok


class Big:
    """A state of half a mebibyte."""

    def __init__(self) -> None:
        self.applied = 0

    def apply(self, entry: Any) -> None:
        self.applied += 1

    def snapshot(self) -> bytes:
        return self.applied.to_bytes(8, "little") * (64 * KIB)

    def restore(self, snapshot: memoryview) -> None:
        self.applied = int.from_bytes(snapshot[:8], "little")


def test_a_checkpoint_that_finds_no_space_says_so_and_is_finished_later(
    filesystem: Filesystem, place: Path, method: SyncMethod
) -> None:
    replica = recover(place / "j", Big(), sync_method=method, **SIZES)
    for op in range(1, 51):
        replica.submit(payload(op))
    with filesystem.full(leave=64 * KIB), pytest.raises(SnapshotPersistError) as caught:
        replica.checkpoint()
    assert caught.value.stage in {PersistStage.WRITE, PersistStage.SYNC}
    cause = caught.value.__cause__
    assert isinstance(cause, OSError)
    assert_no_space(cause)
    assert replica.journal.snapshot_op == 0
    caught.value.resume()
    assert replica.journal.snapshot_op == 50
    replica.submit(payload(51))
    assert replica.checkpoint().op == 51
    replica.close()
    again = Big()
    recover(place / "j", again, sync_method=method).close()
    assert again.applied == 51


def test_a_disk_without_any_space_at_all_does_not_poison(
    filesystem: Filesystem, place: Path, method: SyncMethod
) -> None:
    with Journal(place / "j", sync_method=method, **SIZES) as journal:
        acknowledged = 0
        with filesystem.full():
            try:
                for op in range(1, 60):
                    journal.append(payload(op))
                    acknowledged = op
            except OSError as e:
                assert_no_space(e)
            assert journal.poisoned is None
            assert_whole(journal, 1, acknowledged)
        for op in range(acknowledged + 1, 60):
            journal.append(payload(op))
        assert_whole(journal, 1, 59)
