"""A process that writes to a file system whose power is cut: it is shut down, or its image is cloned at one
instant."""

from __future__ import annotations

import fcntl
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..filesystems.conftest import Filesystem, Require, made_and_removed

FICLONE = 0x40049409
OUTER_MIB = 3072
Tally = Callable[[str, int], None]


class Writer:
    """A module of this folder as a process; what it notes is read as it comes."""

    def __init__(self, notes: Path, module: str, *arguments: object) -> None:
        self._notes = notes
        self._errors = notes.with_suffix(".errors")
        command = [sys.executable, "-W", "error", "-m", f"tests.power.{module}", *map(str, arguments)]
        with notes.open("wb") as out, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=Path(__file__).parents[2])

    @property
    def noted(self) -> bytes:
        return self._notes.read_bytes()

    def wait_for(self, wanted: bytes) -> bytes:
        """All that is noted as soon as that is."""
        return self._wait(lambda noted: wanted in noted)

    def wait_for_more(self, more_bytes: int) -> bytes:
        """All that is noted when it is so much more than now, or the writer is through."""
        wanted_bytes = len(self.noted) + more_bytes
        return self._wait(lambda noted: len(noted) >= wanted_bytes or self.process.poll() == 0)

    def _wait(self, done: Callable[[bytes], bool]) -> bytes:
        deadline = time.monotonic() + 60
        while True:
            ended = self.process.poll() is not None  # before the look: it may end right behind it
            noted = self.noted
            if done(noted):
                return noted
            assert not ended, self._errors.read_text()
            assert time.monotonic() < deadline

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Cut(NamedTuple):
    """What was noted before the power went, and all that ever was."""

    before: bytes
    after: bytes


def shut_down(filesystem: Filesystem, writer: Writer, wait: Callable[[], bytes]) -> Cut:
    before = wait()  # what returns from now on may be lost: a sync in flight can say that it was done
    filesystem.cut_power()
    writer.kill()
    after = writer.noted
    filesystem.mount_again()
    return Cut(before, after)


@contextmanager
def place_for_clones(where: Path) -> Iterator[Path]:
    """An xfs that shares blocks, so that an image is cloned at one instant."""
    image, path = where / "outer.img", where / "outer"
    with image.open("wb") as f:
        f.truncate(OUTER_MIB << 20)
    path.mkdir()
    for command in (["mkfs.xfs", "-q", "-f", "-m", "reflink=1", image], ["mount", "-o", "loop", image, path]):
        subprocess.run(command, check=True)
    try:
        yield path
    finally:
        unmount(path)
        image.unlink()


def unmount(path: Path) -> None:
    """Views that a failed check holds keep a mount busy: it is detached then, and ends with them."""
    gc.collect()
    if subprocess.run(["umount", path], check=False, stderr=subprocess.DEVNULL).returncode != 0:
        subprocess.run(["umount", "-l", path], check=True)


def clone(image: Path, target: Path) -> None:
    with image.open("rb") as source, target.open("wb") as made:
        fcntl.ioctl(made, FICLONE, source.fileno())


@contextmanager
def mounted_clone(kind: str, image: Path) -> Iterator[Path]:
    path = image.with_suffix("")
    path.mkdir()
    option = ",nouuid" if kind == "xfs" else ""
    subprocess.run(["mount", "-o", f"loop{option}", image, path], check=True)
    try:
        yield path
    finally:
        unmount(path)
        image.unlink()
        if kind == "btrfs":  # or the next clone is taken for the same file system
            subprocess.run(["btrfs", "device", "scan", "--forget"], check=True, stdout=subprocess.DEVNULL)


def clones_of(
    kind: str,
    outer: Path,
    require: Require,
    notes: Path,
    arguments: Callable[[Path], tuple[object, ...]],
    waits: list[Callable[[Writer], bytes]],
) -> Iterator[tuple[Cut, Path]]:
    """Clones of the disk under a writer, one after each wait; each is mounted while it is looked at."""
    cuts: list[tuple[Cut, Path]] = []
    place = Path(tempfile.mkdtemp(dir=outer))
    (place / "original").mkdir()
    with made_and_removed(place / "original", require) as make:
        filesystem = make(kind)
        assert filesystem.image is not None
        writer = Writer(notes, *map(str, arguments(filesystem.path / "j")))
        try:
            for number, wait in enumerate(waits):
                before = wait(writer)
                target = place / f"clone-{number}.img"
                clone(filesystem.image, target)
                cuts.append((Cut(before, writer.noted), target))
        finally:
            writer.kill()
    if kind == "btrfs":
        subprocess.run(["btrfs", "device", "scan", "--forget"], check=True, stdout=subprocess.DEVNULL)
    for cut, image in cuts:
        with mounted_clone(kind, image) as path:
            yield cut, path / "j"
