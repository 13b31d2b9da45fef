"""What the journal promises, on each file system and with each way to sync."""

from __future__ import annotations

import fcntl
import signal
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmapwal import (
    Durability,
    FileStorage,
    Journal,
    RecoveryRow,
    SyncMethod,
    SystemDirectory,
    recover,
    storage,
)

from .conftest import Filesystem

pytestmark = pytest.mark.root

Run = Callable[..., subprocess.CompletedProcess[str]]

SIZES: dict[str, Any] = {"slots": 512, "segment_bytes": 64 << 10}


def payload(op: int, length: int = 700) -> bytes:
    return (b"op %d " % op * (length // 4 + 1))[:length]


def append(journal: Journal, count: int, length: int = 700) -> None:
    for op in range((journal.last_op or journal.snapshot_op) + 1, (journal.last_op or 0) + 1 + count):
        assert journal.append(payload(op, length)) == op


def contents(journal: Journal) -> dict[int, bytes]:
    return {entry.op: bytes(entry.payload) for entry in journal}


def expected(*ops: range, length: int = 700) -> dict[int, bytes]:
    return {op: payload(op, length) for some in ops for op in some}


def test_what_was_appended_is_read_back_at_once_and_after_reopening(place: Path, method: SyncMethod) -> None:
    with Journal(place / "j", sync_method=method, **SIZES) as journal:
        append(journal, 20)
        assert list(journal.append_many([payload(op) for op in range(21, 31)])) == list(range(21, 31))
        journal.append(b"")
        assert contents(journal) == expected(range(1, 31)) | {31: b""}
        assert journal.durable_lsn == journal.written_lsn
    with Journal(place / "j", sync_method=method) as journal:
        assert journal.report.outcome is RecoveryRow.SEALED
        assert contents(journal) == expected(range(1, 31)) | {31: b""}
        append(journal, 5)
        assert [journal.copy(op) for op in range(32, 37)] == [payload(op) for op in range(32, 37)]
        assert journal.verify().ok


def test_segments_are_left_one_after_another_and_all_stay_readable(place: Path, method: SyncMethod) -> None:
    with Journal(place / "j", sync_method=method, **SIZES) as journal:
        append(journal, 400)
        journal.append(payload(401, 200_000))  # larger than a segment
        append(journal, 20)
        assert journal.stats().segments > 5
        assert journal.read(401) == payload(401, 200_000)
    with Journal(place / "j", sync_method=method) as journal:
        assert contents(journal) == expected(range(1, 422)) | {401: payload(401, 200_000)}
        assert journal.verify().ok


KILLED = """
import os, signal, sys
from mmapwal import Durability, Journal, SyncMethod
journal = Journal(sys.argv[1], sync_method=SyncMethod[sys.argv[2]], durability=Durability[sys.argv[3]])
for op in range(journal.last_op + 1, journal.last_op + 201):
    assert journal.append((b"op %d " % op * 176)[:700]) == op
os.write(1, b"%d" % journal.last_op)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("durability", ["SYNC", "OS"])
def test_a_killed_writer_loses_nothing_that_was_written(
    place: Path, method: SyncMethod, durability: str, run_python: Run
) -> None:
    Journal(place / "j", **SIZES).close()
    with Journal(place / "j", sync_method=method) as journal:
        append(journal, 10)
    for last in (210, 410):
        killed = run_python(KILLED, place / "j", method.name, durability)
        assert (killed.returncode, killed.stdout, killed.stderr) == (-signal.SIGKILL, str(last), "")
    with Journal(place / "j", sync_method=method) as journal:
        assert journal.report.outcome is not RecoveryRow.SEALED
        assert contents(journal) == expected(range(1, 411))
        append(journal, 10)
        assert journal.verify().ok
    with Journal(place / "j", sync_method=method) as journal:
        assert contents(journal) == expected(range(1, 421))


@pytest.mark.parametrize("durability", [Durability.OS, Durability.BUFFERED], ids=lambda d: d.value)
def test_a_sync_makes_durable_what_was_only_written_or_buffered(
    place: Path, method: SyncMethod, durability: Durability
) -> None:
    with Journal(place / "j", sync_method=method, durability=durability, **SIZES) as journal:
        append(journal, 150)
        assert contents(journal) == expected(range(1, 151))
        assert journal.sync() == journal.durable_lsn == journal.written_lsn
        append(journal, 3)
    with Journal(place / "j") as journal:
        assert contents(journal) == expected(range(1, 154))


def test_drained_entries_stay_readable_and_their_space_comes_back(place: Path, method: SyncMethod) -> None:
    with Journal(place / "j", sync_method=method, **SIZES) as journal:
        append(journal, 400)
        before = journal.stats().file_bytes
        drained = journal.drain(1, 350)
        assert journal.snapshot_op == 350
        assert journal.compact() > 0
        assert journal.stats().file_bytes < before / 2
        assert {e.op: bytes(e.payload) for e in drained} == expected(range(1, 351))
        assert contents(journal) == expected(range(351, 401))
        del drained
    with Journal(place / "j") as journal:
        assert contents(journal) == expected(range(351, 401))
        assert journal.verify().ok


def test_a_rewritten_segment_keeps_what_lives_and_gives_the_rest_back(
    place: Path, method: SyncMethod
) -> None:
    with Journal(place / "j", sync_method=method, **SIZES) as journal:
        append(journal, 400)
        view = journal.read(200)
        journal.drain(150, 199)
        journal.drain(201, 390)
        journal.set_snapshot_op(100)
        journal.compact()
        living = expected(range(101, 150), range(200, 201), range(391, 401))
        assert contents(journal) == living
        assert view == payload(200)  # of the mapping that was swapped away
        assert journal.verify().ok
        append(journal, 10)
    with Journal(place / "j") as journal:
        assert contents(journal) == living | expected(range(401, 411))
    on_disk = sum(f.stat().st_blocks * 512 for f in (place / "j").glob("segment-*"))
    assert on_disk < 401 * 700


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_live_runs_share_their_blocks_where_the_file_system_can(
    make_filesystem: Callable[[str], Filesystem], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[int] = []
    copy = storage.copy_blocks

    def copy_blocks(*args: int) -> int:
        shared.append(copy(*args))
        return shared[-1]

    monkeypatch.setattr(storage, "copy_blocks", copy_blocks)
    with Journal(make_filesystem(kind).path / "j", **SIZES) as journal:
        append(journal, 400)
        journal.drain(20, 80)
        journal.drain(110, 170)
        journal.compact()
        living = expected(range(1, 20), range(81, 110), range(171, 401))
        assert contents(journal) == living
        assert journal.verify().ok
        assert sum(shared) >= 8192 if kind != "ext4" else shared == []
        assert all(count % 4096 == 0 for count in shared)


FIEMAP, SYNC_FIRST, SHARED = 0xC020660B, 1, 0x2000  # linux/fiemap.h


def shared_bytes(file: Path) -> int:
    """Of a file: what lies in blocks that another file has as well."""
    count = 512
    asked = struct.pack("<QQIIII", 0, 2**64 - 1, SYNC_FIRST, 0, count, 0)
    room = bytearray(asked + bytes(56 * count))
    with file.open("rb") as f:
        fcntl.ioctl(f, FIEMAP, room)
    (found,) = struct.unpack_from("<I", room, 20)
    extents = [struct.unpack_from("<QQQQQI", room, 32 + 56 * n) for n in range(found)]
    return sum(length for _, _, length, _, _, flags in extents if flags & SHARED)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("in_use", [False, True])
def test_a_backup_shares_the_blocks_of_whole_segments_where_the_file_system_can(
    make_filesystem: Callable[[str], Filesystem], kind: str, *, in_use: bool
) -> None:
    place = make_filesystem(kind).path
    with Journal(place / "j", **SIZES) as journal:
        append(journal, 400)
        if in_use:
            with Journal(place / "j", readonly=True) as reader:
                reader.backup(place / "copy")
        else:
            journal.backup(place / "copy")
        left = sorted((place / "copy").glob("segment-*"))[:-1]
        assert len(left) > 3
        shared = [shared_bytes(segment) for segment in left]
        if kind == "ext4":
            assert sum(shared) == 0
        else:
            assert min(shared) >= 0.75 * SIZES["segment_bytes"]  # but the header and the last block
        append(journal, 10)  # into blocks that are shared
        living = contents(journal)
    with Journal(place / "copy") as copy:
        assert contents(copy) == expected(range(1, 401))
        copy.append(b"of the copy")
        assert copy.verify().ok
    with Journal(place / "j") as journal:
        assert contents(journal) == living
        assert journal.verify().ok


def test_what_was_truncated_never_comes_back(place: Path, method: SyncMethod) -> None:
    with Journal(place / "j", sync_method=method, **SIZES) as journal:
        append(journal, 300)
        assert journal.truncate_from(101) == 200
        assert journal.append(b"other", op=101) == 101
    with Journal(place / "j", sync_method=method) as journal:
        assert contents(journal) == expected(range(1, 101)) | {101: b"other"}
        assert (journal.snapshot_op, journal.last_op) == (0, 101)
        assert journal.verify().ok


class Sum:
    """A state machine that a second one can be compared with."""

    def __init__(self) -> None:
        self.ops: list[int] = []

    def apply(self, entry: Any) -> int:
        self.ops.append(entry.op)
        return len(self.ops)

    def snapshot(self) -> bytes:
        return struct.pack(f"<{len(self.ops)}q", *self.ops)

    def restore(self, snapshot: memoryview) -> None:
        self.ops = list(struct.unpack(f"<{len(snapshot) // 8}q", snapshot))


def test_a_state_machine_recovers_from_its_snapshot_and_what_came_after(
    place: Path, method: SyncMethod
) -> None:
    machine = Sum()
    replica = recover(place / "j", machine, sync_method=method, **SIZES)
    for op in range(1, 301):
        assert replica.submit(payload(op)) == op
        if op in {120, 260}:
            assert replica.checkpoint().op == op
    assert replica.journal.first_op == 261
    replica.close()
    again = Sum()
    replica = recover(place / "j", again, sync_method=method)
    assert again.ops == machine.ops == list(range(1, 301))
    assert replica.journal.stats().segments <= 3
    replica.close()


# --- what is particular to one kind ---------------------------------------------------------------------


def test_the_automatic_method_is_the_fastest_that_tells_a_full_disk_from_a_failed_sync(
    filesystem: Filesystem, place: Path
) -> None:
    """A store into a mapping only where the pages that were written cannot be missing: tmpfs."""
    fast = {"ext4": SyncMethod.DSYNC, "xfs": SyncMethod.DSYNC, "tmpfs": SyncMethod.MSYNC}
    with SystemDirectory(place) as directory:
        assert directory.best_sync_method() is fast.get(filesystem.kind, SyncMethod.FDATASYNC)
    with SystemDirectory(place, storage=FileStorage) as directory:
        assert directory.best_sync_method() is not SyncMethod.MSYNC


def test_segments_on_btrfs_are_not_copied_on_write(make_filesystem: Callable[[str], Filesystem]) -> None:
    btrfs = make_filesystem("btrfs")
    Journal(btrfs.path / "j", **SIZES).close()
    with Journal(btrfs.path / "j") as journal:
        append(journal, 1)
    segments = list((btrfs.path / "j").glob("segment-*"))
    assert segments
    for segment in segments:
        with segment.open("rb") as f:
            flags = struct.unpack("i", fcntl.ioctl(f, 0x80086601, bytes(4)))[0]  # FS_IOC_GETFLAGS
        assert flags & 0x00800000, segment  # FS_NOCOW_FL


@pytest.mark.parametrize("ending", ["closed", "killed"])
def test_a_journal_from_the_lower_layer_is_read_right_after_it_was_copied_up(
    make_filesystem: Callable[[str], Filesystem], ending: str, run_python: Run, method: SyncMethod
) -> None:
    """overlayfs: a descriptor that was opened for reading stays with the old file when another writes."""
    overlay = make_filesystem("overlayfs")
    assert overlay.lower is not None
    with Journal(overlay.lower / "j", **SIZES) as journal:
        append(journal, 10)
    last = 10
    if ending == "killed":
        assert run_python(KILLED, overlay.lower / "j", "AUTO", "SYNC").returncode == -signal.SIGKILL
        last = 210
    with Journal(overlay.path / "j", sync_method=method) as journal:
        assert contents(journal) == expected(range(1, last + 1))
        append(journal, 100)
        assert contents(journal) == expected(range(1, last + 101))
        assert journal.read(last + 1) == payload(last + 1)
        assert journal.verify().ok
    with Journal(overlay.path / "j") as journal:
        assert contents(journal) == expected(range(1, last + 101))
    with Journal(overlay.lower / "j") as journal:
        assert contents(journal) == expected(range(1, last + 1))
