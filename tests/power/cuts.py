"""A process that writes to a file system whose power is cut: it is shut down, or its image is cloned at one
instant."""

from __future__ import annotations

import fcntl
import gc
import os
import select
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
PIPE_BYTES = 1 << 20  # more than a writer notes while nobody looks
ROOT = Path(__file__).parents[2]
Tally = Callable[[str, int], None]


class Writer:
    """A module of this folder as a process. What it notes comes through a pipe, so who waits for a note is
    woken by it, and takes no processor from the writer meanwhile."""

    def __init__(self, errors: Path, module: str, *arguments: object) -> None:
        self._errors = errors
        command = [sys.executable, "-W", "error", "-m", f"tests.power.{module}", *map(str, arguments)]
        with errors.open("wb") as to:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=to, bufsize=0, pipesize=PIPE_BYTES, cwd=ROOT
            )
        assert self._process.stdout is not None
        self._pipe = self._process.stdout
        os.set_blocking(self._pipe.fileno(), False)
        self._noted, self._ended = bytearray(), False

    @property
    def noted(self) -> bytes:
        """All that it has noted by now."""
        self._take()
        return bytes(self._noted)

    def _take(self) -> None:
        while not self._ended and (more := self._pipe.read(PIPE_BYTES)) is not None:
            self._noted += more
            self._ended = not more

    def wait_for(self, wanted: bytes) -> bytes:
        """All that is noted as soon as that is."""
        return self._wait(lambda noted: wanted in noted)

    def wait_for_more(self, more_bytes: int) -> bytes:
        """All that is noted when it is so much more than now, or the writer is through."""
        wanted_bytes = len(self.noted) + more_bytes
        return self._wait(lambda noted: len(noted) >= wanted_bytes or (self._ended and self._is_through()))

    def _is_through(self) -> bool:
        return self._process.wait() == 0

    def _wait(self, done: Callable[[bytes], bool]) -> bytes:
        deadline = time.monotonic() + 60
        while not done(noted := self.noted):
            assert not self._ended, self._errors.read_text()
            left_s = deadline - time.monotonic()
            assert left_s > 0
            select.select([self._pipe], [], [], left_s)
        return noted

    def kill(self) -> None:
        """It is gone, and all that it ever noted is there."""
        self._process.kill()
        self._process.wait()
        self._take()
        self._pipe.close()


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
    errors: Path,
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
        writer = Writer(errors, *map(str, arguments(filesystem.path / "j")))
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
