"""A block device of which every write and flush is known, and can be made to fail.

A loop device on a file that a process of our own serves (fuse_server.py). Whatever happens to that process
or to a test, nothing hangs: the server ends after its time, and then every request is an error.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from .torn_images import Event, TornImages, copy_sparse, read_log

BTRFS_FORGET = 0x50009405  # _IOW(0x94, 5, 4096 bytes): all devices that are not mounted
LIFE_S = 300
IMAGE_MIB = {"ext4": 64, "xfs": 320, "btrfs": 256, None: 4}  # xfs refuses less than 300
MAKE = {  # blocks of 4 KiB everywhere
    "ext4": "mkfs.ext4 -q -F -m 0 -b 4096 -E lazy_itable_init=0,lazy_journal_init=0 -U {}",
    "xfs": "mkfs.xfs -q -f -m uuid={}",
    "btrfs": "mkfs.btrfs -q -f -U {}",
}
PATIENCE_S = 30


@contextmanager
def fuse_disk(kind: str | None, where: Path, *, old: tuple[Path, UUID] | None = None) -> Iterator[FuseDisk]:
    """A disk with a new file system of that kind on it, or blank, or with what is in an `old` image; all in
    memory, below `where`, which is made. At the end it is gone, whatever became of the test. After LIFE_S
    seconds every request to it is an error."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("a disk of our own needs root and /dev/fuse")
    if kind is not None and not shutil.which(f"mkfs.{kind}"):
        pytest.skip(f"mkfs.{kind} is not installed")
    where.mkdir(exist_ok=True)
    uuid = uuid4() if old is None else old[1]
    with ExitStack() as stack:
        _run("mount", "-t", "tmpfs", "-o", "size=4g", "tmpfs", where)
        stack.callback(_run, "umount", "-l", where)
        image = where / "image"
        if old is not None:
            copy_sparse(old[0], image)
        else:
            with image.open("wb") as f:
                f.truncate(IMAGE_MIB[kind] << 20)
            if kind is not None:
                _run(*MAKE[kind].format(uuid).split(), image)
                _run("fallocate", "--dig-holes", image)
        yield FuseDisk(where, uuid, stack)


class FuseDisk:
    """The device at `device`; its contents in the file `image`, as they were at first in `base`; what was
    done to it in `log`. `notes` is a file for the test's own use: the log says how long it was each time."""

    def __init__(self, where: Path, uuid: UUID, stack: ExitStack) -> None:
        """`where` holds the image already. What is made goes away with the stack."""
        self.where, self.uuid = where, uuid
        self.image, self.base, self.log = where / "image", where / "base", where / "disk.log"
        self.notes, served = where / "notes", where / "disk"
        copy_sparse(self.image, self.base)
        self.notes.touch()
        served.touch()
        script = Path(__file__).with_name("fuse_server.py")
        self._server = subprocess.Popen(
            [sys.executable, script, served, self.image, self.log, self.notes, str(LIFE_S)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        stack.callback(self._end)
        self._heard()
        try:
            done = self._run("losetup", "--direct-io=on", "--find", "--show", served)
        finally:  # the loop device keeps it; no other program is to stumble over a dead one
            self._run("umount", "-l", served)
        self.device = Path(done.stdout.decode().strip())
        stack.callback(self._run, "losetup", "-d", self.device)

    # --- what it is told to do

    def fail(self, on: str, needle: bytes = b"", times: int = -1) -> None:
        """A "read" or "write" of data in which `needle` is, or a "flush", is EIO now: so many times."""
        self._order(do="fail", on=on, needle=needle.hex(), times=times)

    def failures(self) -> int:
        """How many requests failed since the disk was last healed."""
        return self._order(do="count")

    def heal(self) -> int:
        """All goes well again. How many requests failed."""
        return self._order(do="heal")

    def hang(self, life_s: int) -> None:
        """Answers nothing and nobody any more, until its time is over: so many seconds from now."""
        self._tell(do="hang", life_s=life_s)

    def kill(self) -> None:
        """The disk is gone; who waits for it, or comes to it later, gets an error."""
        self._server.kill()
        self._server.wait(PATIENCE_S)

    def _tell(self, **order: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order).encode() + b"\n")
        self._server.stdin.flush()

    def _order(self, **order: object) -> int:
        self._tell(**order)
        return int(self._heard())

    def _heard(self) -> bytes:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()  # the server's own clock ends this
        assert line, "the disk died"
        return line

    # --- the file system on it

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """Mounted for the time of the block; unmounted when nothing uses it any more."""
        at = self.where / "mounted"
        at.mkdir(exist_ok=True)
        with _mounted(self._run, self.device, at=at):
            yield at

    # --- a power cut

    @cached_property
    def events(self) -> list[Event]:
        """All that was written and flushed, until it was first asked for."""
        return read_log(self.log)

    @cached_property
    def _torn(self) -> TornImages:
        return TornImages(self.base, self.events, self.uuid)

    @property
    def torn(self) -> int:
        """Of how many sectors the last image had not the newest version."""
        return self._torn.torn

    def make_image(
        self, image: Path, instant: int, chance: random.Random, *, trusted: int | None = None
    ) -> None:
        """The disk as a cut just before that event could leave it. Instants come in order. `trusted`: as
        TornImages.make() takes it."""
        self._torn.make(image, instant, chance, trusted=trusted)

    @contextmanager
    def after_cut(self, instant: int, chance: random.Random, *, trusted: int | None = None) -> Iterator[Path]:
        """The file system on such an image, mounted. The disk itself is mounted no more."""
        image, at = self.where / "torn", self.where / "after"
        at.mkdir(exist_ok=True)
        self.make_image(image, instant, chance, trusted=trusted)
        with _mounted(_run, "-o", "loop", image, at=at):
            yield at

    # --- how it ends

    def _run(self, *command: str | Path) -> subprocess.CompletedProcess[bytes]:
        """Who waits for a disk that hangs cannot be killed. But the disk can be."""
        return _run(*command, rescue=self.kill)

    def _end(self) -> None:
        for pipe in (self._server.stdin, self._server.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            self._server.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()


@contextmanager
def _mounted(run: Callable[..., object], *what: str | Path, at: Path) -> Iterator[None]:
    run("mount", *what, at)
    try:
        yield
        gc.collect()
        run("umount", at)
    except BaseException:  # its traceback may hold the journal, and so the mount
        run("umount", "-l", at)
        raise
    finally:
        _forget_btrfs_devices()


def _forget_btrfs_devices() -> None:
    """An image that is older than one that was seen before would not be mounted."""
    with suppress(FileNotFoundError):
        control = os.open("/dev/btrfs-control", os.O_RDWR)
        try:
            fcntl.ioctl(control, BTRFS_FORGET, bytearray(4096))
        finally:
            os.close(control)


def _run(
    *command: str | Path, rescue: Callable[[], None] = lambda: None
) -> subprocess.CompletedProcess[bytes]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            rescue()
            out, err = process.communicate(timeout=PATIENCE_S)
    if process.returncode != 0:
        raise OSError(f"{' '.join(map(str, command))}: {err.decode().strip()}")
    return subprocess.CompletedProcess(command, 0, out, err)
