"""Files that nobody names any more go in the background, step by step, and no view suffers from it."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmapwal import MemoryDirectory, extras
from mmapwal.disposal import Disposal
from mmapwal.storage import SystemDirectory

WAIT_S = 60.0
BYTES = 5 * extras.STEP_BYTES + 1000


class Removing(MemoryDirectory):
    """Writes down what goes, and stops before it while `hold` is closed."""

    def __init__(self, *, concurrent: bool = True) -> None:
        super().__init__()
        self.concurrent = concurrent
        self.gone: list[str] = []
        self.threads: set[int] = set()
        self.begun = threading.Event()
        self.hold = threading.Event()
        self.hold.set()
        self.error: Exception | None = None

    def discard(self, name: str) -> None:
        self.begun.set()
        self.threads.add(threading.get_ident())
        assert self.hold.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        self.gone.append(name)


def test_files_go_in_order_on_another_thread_and_wait_waits_for_all() -> None:
    directory = Removing()
    disposal = Disposal(directory)
    assert not disposal.wait()
    directory.hold.clear()
    disposal.add(["a", "b"])
    disposal.add(["c"])
    assert directory.begun.wait(WAIT_S)
    assert disposal.pending == 3
    assert directory.gone == []
    directory.hold.set()
    assert disposal.wait() or directory.gone == ["a", "b", "c"]
    assert directory.gone == ["a", "b", "c"]
    assert disposal.pending == 0
    assert threading.get_ident() not in directory.threads
    disposal.add(["d"])  # its thread had ended
    disposal.wait()
    assert directory.gone[-1] == "d"


def test_where_no_threads_are_wanted_files_go_at_once() -> None:
    directory = Removing(concurrent=False)
    Disposal(directory).add(["a", "b"])
    assert directory.gone == ["a", "b"]
    assert directory.threads == {threading.get_ident()}


def test_a_directory_that_cannot_discard_unlinks() -> None:
    directory = MemoryDirectory()
    directory.create("a")
    Disposal(directory).add(["a"])
    assert directory.names() == []


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_file_that_cannot_be_removed_keeps_no_other(
    *, concurrent: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mmapwal")
    directory = Removing(concurrent=concurrent)
    directory.error = OSError(errno.EIO, "planted")
    disposal = Disposal(directory)
    disposal.add(["a"])
    disposal.wait()
    directory.error = None
    disposal.add(["b"])
    disposal.wait()
    assert directory.gone == ["b"]
    assert "a could not be removed" in caplog.text


def test_stop_waits_for_the_one_under_way_and_leaves_the_rest() -> None:
    directory = Removing()
    directory.hold.clear()
    disposal = Disposal(directory)
    disposal.add(["a", "b", "c"])
    assert directory.begun.wait(WAIT_S)
    stopper = threading.Thread(target=disposal.stop)
    stopper.start()
    while not disposal._stopped:
        pass
    directory.hold.set()
    stopper.join(WAIT_S)
    assert not stopper.is_alive()
    assert directory.gone == ["a"]
    disposal.add(["d"])
    assert not disposal.wait()
    assert directory.gone == ["a"]


# --- on real files ------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[SystemDirectory]:
    with SystemDirectory(tmp_path / "d") as made:
        yield made


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths that files were cut to."""
    lengths: list[int] = []
    cut = os.ftruncate

    def ftruncate(fd: int, length: int) -> None:
        lengths.append(length)
        cut(fd, length)

    monkeypatch.setattr(os, "ftruncate", ftruncate)
    return lengths


def make(directory: SystemDirectory, name: str = "f") -> None:
    storage = directory.create(name)
    storage.write_at(0, b"x" * BYTES)
    storage.close()


def test_a_long_file_is_freed_from_its_end_in_steps(directory: SystemDirectory, cuts: list[int]) -> None:
    make(directory)
    directory.discard("f")
    assert directory.names() == []
    assert cuts == [n * extras.STEP_BYTES for n in (5, 4, 3, 2, 1, 0)]


def test_a_view_keeps_its_file_whole(directory: SystemDirectory, cuts: list[int]) -> None:
    make(directory)
    storage = directory.open("f")
    view = storage.view()
    storage.close()  # a mapping alone holds it
    directory.discard("f")
    assert directory.names() == []
    assert cuts == []
    assert bytes(view) == b"x" * BYTES


def test_a_file_that_another_process_has_open_is_left_whole(
    directory: SystemDirectory, cuts: list[int]
) -> None:
    make(directory)
    script = "import sys; f = open(sys.argv[1], 'rb'); print('open', flush=True); sys.stdin.read(1)\n"
    script += "print(len(f.read()))"
    command = [sys.executable, "-c", script, str(directory.path / "f")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        directory.discard("f")
        found, _ = child.communicate("x", timeout=WAIT_S)
    assert int(found) == BYTES
    assert cuts == []


def test_another_name_of_the_file_keeps_it_whole(directory: SystemDirectory, cuts: list[int]) -> None:
    make(directory)
    (directory.path / "copy").hardlink_to(directory.path / "f")
    directory.discard("f")
    assert directory.names() == ["copy"]
    assert cuts == []
    assert (directory.path / "copy").stat().st_size == BYTES


def test_what_is_not_there_is_told_and_a_link_goes_without_its_target(
    directory: SystemDirectory, cuts: list[int]
) -> None:
    with pytest.raises(FileNotFoundError):
        directory.discard("nothing")
    make(directory)
    (directory.path / "link").symlink_to("f")
    directory.discard("link")
    assert directory.names() == ["f"]
    assert cuts == []


def test_blocks_are_copied_whole_or_not_at_all(
    directory: SystemDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel cuts short within a block is not counted; what it refuses is left to a write."""
    results: list[int | OSError] = [4096, 3000, OSError(errno.EXDEV, "another device")]

    def copy_file_range(*_: int) -> int:
        result = results.pop(0)
        if isinstance(result, OSError):
            raise result
        return result

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    assert extras.copy_blocks(0, 0, 8192, 16384) == 4096
    results[:] = [OSError(errno.EOPNOTSUPP, "not here")]
    assert extras.copy_blocks(0, 0, 8192, 16384) == 0
    results[:] = [8192, 0]
    assert extras.copy_blocks(0, 0, 8192, 16384) == 8192
