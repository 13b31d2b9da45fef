"""The file system fails under threads that do all that a journal offers: each is told, nobody is killed, and
nothing acknowledged is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mmapwal import Journal

from . import crowded
from .conftest import Filesystem

pytestmark = pytest.mark.root

FAULTS = ["never", "before", "after"]  # when faulthandler is enabled: before the guard is armed, or behind
APPENDS = ["append_many", *(f"append {writer}" for writer in range(1, crowded.WRITERS + 1))]


class Crowd(NamedTuple):
    """The process, and what it told at its end."""

    process: subprocess.Popen[str]

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            pytest.fail(f"{self.process.wait()}: {self.process.stderr.read()}")
        return line.strip()

    def send(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@contextmanager
def crowd(path: Path, *arguments: str) -> Iterator[Crowd]:
    """When all is under way."""
    command = [sys.executable, "-W", "error", "-m", "tests.filesystems.crowded", str(path), *arguments]
    pipe = subprocess.PIPE
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=root) as process:
        try:
            crowd = Crowd(process)
            assert crowd.line() == "under way"
            yield crowd
        finally:
            process.kill()


def assert_all_there(path: Path, told: list[tuple[int, int, int]]) -> None:
    with Journal(path) as journal:
        assert journal.verify().ok
        for op, writer, number in told:
            assert journal.copy(op) == crowded.payload(writer, number)
        journal.append(b"goes on")


def told_by_a_crowd(path: Path, failure: Callable[[], AbstractContextManager[None]], *arguments: str) -> Any:
    """What it tells when the file system fails under it: every way to append has, and nobody was killed."""
    with crowd(path, *arguments) as running:
        with failure():
            running.send()
            found = json.loads(running.line())
        running.send()
        assert running.line() == "PoisonedError"
        assert running.process.wait(60) == 0
    assert all(set(found["ended"][way]) - {"well"} for way in APPENDS)
    return found


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])  # on tmpfs a look at a hole fills it
@pytest.mark.parametrize("faults", FAULTS)
def test_stores_into_an_index_with_holes_on_a_full_disk_poison_and_kill_nobody(
    make_filesystem: Callable[[str], Filesystem], kind: str, faults: str
) -> None:
    filesystem = make_filesystem(kind)
    path = filesystem.path / "j"
    found = told_by_a_crowd(path, filesystem.full, faults, "sparse")
    assert "a store into the index" in found["poisoned"]
    assert_all_there(path, found["told"])


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("faults", FAULTS)
def test_a_file_system_that_is_shut_down_under_threads_is_told_to_all_who_write_and_kills_nobody(
    make_filesystem: Callable[[str], Filesystem], kind: str, faults: str
) -> None:
    filesystem = make_filesystem(kind)
    path = filesystem.path / "j"
    found = told_by_a_crowd(path, lambda: nullcontext(filesystem.cut_power()), faults)
    assert found["poisoned"]
    filesystem.mount_again()
    assert_all_there(path, found["before"])
