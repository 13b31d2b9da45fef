"""A disk that answers EIO under real file systems: all are told, and nothing acknowledged is lost.

Who works on a mount is a function of its own: a journal that a frame still holds keeps its mapping, and with
it the mount.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mmapwal import Journal, JournalError, PoisonedError, SyncMethod, opening
from mmapwal import format as fmt

from .fuse_disk import FuseDisk, fuse_disk
from .torn_images import read_log

pytestmark = pytest.mark.power

KINDS = ["ext4", "xfs", "btrfs"]
METHODS = [m.value for m in SyncMethod]
SIZES: dict[str, Any] = {"slots": 1024, "segment_bytes": 64 << 10}
BAD = b"a sector that will not be written; "
LONG = BAD * 500  # some pages, most of which no later commit touches
THREADS = 8
Tally = Callable[[str, int], None]
Run = Callable[..., subprocess.CompletedProcess[str]]


def good(op: int) -> bytes:
    return (b"entry %d; " % op * 200)[: 100 + op * 37 % 900]


def contents(journal: Journal) -> dict[int, bytes]:
    return {entry.op: bytes(entry.payload) for entry in journal}


def append_good(journal: Journal, count: int) -> dict[int, bytes]:
    """What is acknowledged."""
    first = (journal.last_op or 0) + 1
    for op in range(first, first + count):
        assert journal.append(good(op)) == op
    return {op: good(op) for op in range(first, first + count)}


def found_after_cut(disk: FuseDisk, instant: int) -> dict[int, bytes]:
    """What a journal shows after a cut just before that event, opened twice."""
    with disk.after_cut(instant, random.Random(instant)) as path:
        return found_twice(path / "j")


def found_twice(path: Path) -> dict[int, bytes]:
    with Journal(path) as journal:
        found = contents(journal)
        report = journal.verify()
        assert report.ok, report.problems
    with Journal(path) as journal:
        assert contents(journal) == found
    return found


# --- writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_write_is_told_by_one_sync_and_then_the_cache_shows_what_the_disk_has_not(
    tmp_path: Path, kind: str
) -> None:
    """What the kernel does, and why no sync may be tried again."""
    old, new = b"o" * 4096, BAD.ljust(4096, b"n")
    with fuse_disk(kind, tmp_path) as disk:
        with disk.mounted() as path:
            fd = os.open(path / "f", os.O_RDWR | os.O_CREAT)
            try:
                os.write(fd, old * 4)
                os.fsync(fd)
                disk.fail("write", BAD, times=1)
                os.pwrite(fd, new, 4096)
                with pytest.raises(OSError, match="Input/output"):
                    os.fdatasync(fd)
                os.fdatasync(fd)
                assert os.pread(fd, 4096, 4096) == new
            finally:
                os.close(fd)
        with disk.mounted() as path:
            assert (path / "f").read_bytes() == old * 4


def append_bad(journal: Journal) -> list[tuple[str, str]]:
    """Threads that append at the same time; what each was told."""
    barrier = threading.Barrier(THREADS)
    told: list[tuple[str, str]] = []

    def append() -> None:
        barrier.wait(60)
        try:
            told.append(("op", str(journal.append(BAD * 20))))
        except (OSError, JournalError) as e:
            told.append((type(e).__name__, repr(e.__cause__)))

    threads = [threading.Thread(target=append) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return told


def assert_poisoned(journal: Journal) -> None:
    assert journal.poisoned is not None
    for call in (lambda: journal.append(b"more"), journal.sync, lambda: journal.drain(1, 2)):
        with pytest.raises(PoisonedError) as caught:
            call()
        assert caught.value.stage == journal.poisoned.stage
        assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("on", ["write", "flush"])
def test_a_sync_that_fails_acknowledges_nothing_poisons_and_is_told_to_every_waiter(
    tmp_path: Path, kind: str, method: str, on: str, tally: Tally
) -> None:
    def live(path: Path) -> dict[int, bytes]:
        with Journal(path, sync_method=SyncMethod(method), **SIZES) as journal:
            acknowledged = append_good(journal, 20)
            disk.fail(on, BAD if on == "write" else b"", times=1 if on == "write" else -1)
            told = append_bad(journal)
            assert disk.heal() >= 1
            assert [name for name, _ in told] == ["PoisonedError"] * THREADS
            assert len({cause for _, cause in told}) == 1
            assert_poisoned(journal)
        return acknowledged

    with fuse_disk(kind, tmp_path) as disk:
        with disk.mounted() as path:
            acknowledged = live(path / "j")
            instant = len(read_log(disk.log))
        for at in (instant, len(disk.events)):
            found = found_after_cut(disk, at)
            assert found.items() >= acknowledged.items()
            assert {found[op] for op in found.keys() - acknowledged.keys()} <= {BAD * 20}
    tally(f"failed commits on {kind}", 1)


def fail_and_open_again(disk: FuseDisk, method: str, path: Path) -> tuple[dict[int, bytes], int]:
    """A commit fails once, and the journal is opened again while the cache lies, and appended to. What it
    showed and acknowledged, and how many entries of that were in the cache only."""
    with Journal(path, sync_method=SyncMethod(method), **SIZES) as journal:
        append_good(journal, 20)
        disk.fail("write", BAD, times=1)
        with pytest.raises(PoisonedError):
            journal.append(LONG)
        assert disk.heal() == 1
    with Journal(path, sync_method=SyncMethod(method)) as journal:
        shown = contents(journal)
        lied = sum(payload == LONG for payload in shown.values())
        return shown | append_good(journal, 20), lied


def promised_and_found(disk: FuseDisk, method: str) -> tuple[dict[int, bytes], dict[int, bytes], int]:
    """The same, and what is there after a cut."""
    with disk.mounted() as path:
        promised, lied = fail_and_open_again(disk, method, path / "j")
        instant = len(read_log(disk.log))
    return promised, found_after_cut(disk, instant), lied


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_opened_again_while_the_cache_lies_what_it_shows_and_acknowledges_survives_a_cut(
    tmp_path: Path, kind: str, method: str, tally: Tally
) -> None:
    with fuse_disk(kind, tmp_path) as disk:
        promised, found, lied = promised_and_found(disk, method)
        assert found == promised
        tally(f"entries of {kind} that only the cache had", lied)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recovery_that_believes_the_cache_is_caught(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "rewrite_unproven", lambda *_: ({}, 0))
    with fuse_disk(kind, tmp_path) as disk:
        try:
            promised, found, lied = promised_and_found(disk, "fdatasync")
        except JournalError:  # refused after the cut: a block below what was acknowledged is missing
            return
        assert lied
        assert found != promised


@pytest.mark.parametrize("kind", KINDS)
def test_a_superblock_that_cannot_be_written_is_an_error_and_the_change_has_not_happened(
    tmp_path: Path, kind: str
) -> None:
    def live(path: Path) -> dict[int, bytes]:
        with Journal(path, **SIZES) as journal:
            acknowledged = append_good(journal, 20)
            disk.fail("write", fmt.SUPERBLOCK_MAGIC, times=1)
            with pytest.raises(OSError, match="Input/output"):
                journal.set_snapshot_op(5)
            assert disk.heal() == 1
            assert journal.poisoned is None
            assert journal.snapshot_op == 0
            assert contents(journal) == acknowledged
            journal.truncate_from(19)
            return {op: acknowledged[op] for op in range(1, 19)} | append_good(journal, 3)

    with fuse_disk(kind, tmp_path) as disk:
        with disk.mounted() as path:
            acknowledged = live(path / "j")
            instant = len(read_log(disk.log))
        assert found_after_cut(disk, instant) == acknowledged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_file_system_that_turns_read_only_under_the_writer_loses_nothing(
    tmp_path: Path, kind: str, method: str
) -> None:
    def live(path: Path) -> dict[int, bytes]:
        with Journal(path, sync_method=SyncMethod(method), **SIZES) as journal:
            acknowledged = append_good(journal, 20)
            turn_read_only(disk, path)
            for _ in range(2):
                with pytest.raises((OSError, PoisonedError)):
                    journal.append(BAD)
                with pytest.raises((OSError, PoisonedError)):
                    journal.set_snapshot_op(3)
            for op, payload in acknowledged.items():
                with suppress(OSError):  # xfs reads no more
                    assert journal.copy(op) == payload
        with pytest.raises((OSError, JournalError)):
            Journal(path)
        return acknowledged

    with fuse_disk(kind, tmp_path) as disk:
        with disk.mounted() as path:
            acknowledged = live(path / "j")
            instant = len(read_log(disk.log))
            disk.heal()
        assert found_after_cut(disk, instant) == acknowledged


def turn_read_only(disk: FuseDisk, path: Path) -> None:
    """What file systems do when they cannot write their own log."""
    disk.fail("write")
    for number in range(20):
        try:
            fd = os.open(path.with_name(f"f{number}"), os.O_RDWR | os.O_CREAT)
        except OSError as e:
            assert e.errno in {errno.EROFS, errno.EIO}
            return
        with pytest.raises(OSError, match=r"Input/output|Read-only"):
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    pytest.fail("it is still written to")


# --- reading ------------------------------------------------------------------------------------------

WRITER = """
import os, sys
from mmapwal import Journal
journal = Journal(sys.argv[1], slots=1024, segment_bytes=65536)
for op in range(1, 101):
    journal.append(sys.argv[2].encode() * 50 if op == 50 else b"%d " % op * 700)
if sys.argv[3] == "closed":
    journal.close()
os._exit(0)
"""

# What each way to read gives: the number of entries, "EIO", or another error's name.
READER = """
import errno, json, sys
from mmapwal import Journal, JournalError

def told(call):
    try:
        return call()
    except OSError as e:
        return errno.errorcode.get(e.errno, str(e))
    except JournalError as e:
        return type(e).__name__

def read_all(journal):
    def copied(op):
        return journal.copy(op) == (sys.argv[2].encode() * 50 if op == 50 else b"%d " % op * 700)
    print(json.dumps({
        "copies": [told(lambda: copied(op)) for op in range(1, 101)],
        "iterated": told(lambda: sum(1 for _ in journal)),
        "payloads": told(lambda: sum(1 for _ in journal.payloads())),
        "columns": told(lambda: len(journal.columns().ops)),
        "headers": told(lambda: len(journal.headers(copy=True))),
        "header": told(lambda: journal.header(50).op),
        "verified": told(lambda: [(p.segment, p.reason) for p in journal.verify().problems]),
    }))

opened = told(lambda: Journal(sys.argv[1]))
if isinstance(opened, str):
    print(json.dumps({"opened": opened}))
else:
    read_all(opened)
    opened.close()
"""


def write_journal(disk: FuseDisk, run_python: Run, how: str) -> None:
    """And nothing of it stays in the cache."""
    with disk.mounted() as path:
        done = run_python(WRITER, path / "j", BAD.decode(), how)
        assert done.returncode == 0, done.stderr


def read_journal(run_python: Run, path: Path) -> dict[str, Any]:
    done = run_python(READER, path / "j", BAD.decode())
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"  # no signal has killed it
    found: dict[str, Any] = json.loads(done.stdout)
    return found


ALL_WELL = {
    "copies": [True] * 100, "iterated": 100, "payloads": 100, "columns": 100, "headers": 100, "header": 50,
    "verified": [],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_disk_fails_to_bring_is_an_error_from_all_that_is_guarded_and_is_there_when_it_is_well(
    tmp_path: Path, kind: str, run_python: Run
) -> None:
    with fuse_disk(kind, tmp_path) as disk:
        write_journal(disk, run_python, "closed")
        with disk.mounted() as path:
            disk.fail("read", BAD)
            found = read_journal(run_python, path)
            assert disk.heal()
            copies = found["copies"]
            assert copies[49] == "EIO"
            assert set(copies) == {True, "EIO"} and copies[0] is copies[99] is True
            for way in ("iterated", "payloads", "columns"):
                assert found[way] == "EIO", way
            assert found["headers"] in {100, "EIO"}
            assert found["header"] in {50, "EIO"}
            ((segment, reason),) = found["verified"]
            assert segment.startswith("segment-") and "fails to read" in reason
            assert read_journal(run_python, path) == ALL_WELL


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_from_a_view_is_outside_the_guard_and_kills(
    tmp_path: Path, kind: str, run_python: Run
) -> None:
    """As documented; and so the errors of the test before are ones that would have killed."""
    script = "import sys; from mmapwal import Journal; bytes(Journal(sys.argv[1]).read(50))"
    with fuse_disk(kind, tmp_path) as disk:
        write_journal(disk, run_python, "closed")
        with disk.mounted() as path:
            disk.fail("read", BAD)
            assert run_python(script, path / "j").returncode == -signal.SIGBUS


@pytest.mark.parametrize("kind", KINDS)
def test_a_repair_that_cannot_read_tells_the_place_and_leaves_nothing_out(
    tmp_path: Path, kind: str, run_python: Run
) -> None:
    script = "import sys; from mmapwal.cli import main; sys.exit(main(['repair', sys.argv[1]]))"
    with fuse_disk(kind, tmp_path) as disk:
        write_journal(disk, run_python, "closed")
        with disk.mounted() as path:
            names = sorted(os.listdir(path / "j"))  # noqa: PTH208
            disk.fail("read", BAD)
            done = run_python(script, path / "j")
            assert disk.heal()
            assert done.returncode == 2
            assert re.search(r"segment-\w+-\w+: Input/output error at byte \d+: ", done.stderr), done.stderr
            assert sorted(os.listdir(path / "j")) == names  # noqa: PTH208
            assert read_journal(run_python, path) == ALL_WELL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "needle", [BAD, fmt.SUPERBLOCK_MAGIC, fmt.SEGMENT_MAGIC], ids=["frame", "super", "head"]
)
def test_an_open_that_cannot_read_says_so_cuts_nothing_and_finds_all_when_the_disk_is_well(
    tmp_path: Path, kind: str, needle: bytes, run_python: Run
) -> None:
    with fuse_disk(kind, tmp_path) as disk:
        write_journal(disk, run_python, "killed")
        with disk.mounted() as path:
            disk.fail("read", needle)
            assert read_journal(run_python, path) == {"opened": "EIO"}
            assert disk.heal()
            assert read_journal(run_python, path) == ALL_WELL
