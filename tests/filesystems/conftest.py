"""Small file systems of each kind, made in image files and mounted for the tests; nothing is left behind."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from mmapwal import SyncMethod

Require = Callable[[object, str], None]

MIB = 1 << 20
FS_IOC_SHUTDOWN = 0x8004587D
IMAGE_MIB = {"ext4": 64, "xfs": 320, "btrfs": 256}  # xfs refuses less than 300
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
KINDS = ["ext4", "xfs", "btrfs", "tmpfs", "overlayfs"]


class Filesystem(NamedTuple):
    """A mounted file system of its own."""

    kind: str
    path: Path
    lower: Path | None = None  # overlayfs: the layer that is only read
    image: Path | None = None

    def cut_power(self) -> None:
        """ext4 and xfs: nothing that is not on the disk by now will be there after mount_again()."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", 2))  # 2: flush nothing
        finally:
            os.close(fd)

    def mount_again(self) -> None:
        """What a machine does that gets its power back."""
        gc.collect()
        for command in (["umount", self.path], ["mount", "-o", "loop", str(self.image), self.path]):
            done = _run(*command)
            assert done.returncode == 0, done.stderr

    @contextmanager
    def full(self, *, leave: int = 0) -> Iterator[None]:
        """All space is taken but about `leave` bytes, until the end of the block."""
        ballast = self.path / "ballast"
        try:
            self._fill(ballast, leave)
            yield
        finally:
            ballast.unlink()
            self.settle()

    @staticmethod
    def _fill(ballast: Path, leave: int) -> None:
        with ballast.open("wb") as f:
            taken, step = 0, 64 * MIB
            while step >= 4096:
                try:
                    os.posix_fallocate(f.fileno(), taken, step)
                    taken += step
                except OSError:
                    step //= 2
            f.truncate(max(0, taken - leave))

    def settle(self) -> None:
        """btrfs gives space back when it commits."""
        subprocess.run(["sync", "-f", self.path], check=True)


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _detach(image: Path) -> None:
    for line in _run("losetup", "-j", image).stdout.splitlines():
        _run("losetup", "-d", line.split(":")[0])


class Maker:
    """Makes and mounts; what it made goes away with the stack."""

    def __init__(self, stack: ExitStack, where: Path, require: Require) -> None:
        self._stack, self._where, self._require = stack, where, require
        self._made = 0
        self.busy: list[Path] = []

    def _unmount(self, path: Path) -> None:
        """Views that a failed test holds keep a mount busy: it is then detached, and ends with them."""
        gc.collect()
        if _run("umount", path).returncode != 0:
            done = _run("umount", "-l", path)
            assert done.returncode == 0, done.stderr
            self.busy.append(path)

    def _mount(self, *command: str | Path, at: Path) -> Path:
        at.mkdir()
        done = _run("mount", *command, at)
        self._require(done.returncode == 0, f"mount refuses: {done.stderr.strip()}")
        self._stack.callback(self._unmount, at)
        return at

    def _image(self, kind: str, name: str) -> tuple[Path, Path]:
        self._require(shutil.which(MAKE[kind][0]), f"{MAKE[kind][0]} is not installed")
        image = self._where / f"{name}.img"
        with image.open("wb") as f:
            f.truncate(IMAGE_MIB[kind] * MIB)
        self._stack.callback(image.unlink)
        made = _run(*MAKE[kind], image)
        assert made.returncode == 0, made.stderr
        self._stack.callback(_detach, image)
        return self._mount("-o", "loop", image, at=self._where / name), image

    def __call__(self, kind: str) -> Filesystem:
        self._require(os.geteuid() == 0, "mounting needs root")
        self._made += 1
        name = f"{kind}-{self._made}"
        if kind == "tmpfs":
            path = self._mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", at=self._where / name)
            return Filesystem(kind, path)
        if kind == "overlayfs":
            base, _ = self._image("ext4", f"{name}-base")
            for layer in ("lower", "upper", "work"):
                (base / layer).mkdir()
            options = ",".join(f"{layer}dir={base / layer}" for layer in ("lower", "upper", "work"))
            path = self._mount("-t", "overlay", "-o", options, "overlay", at=self._where / name)
            return Filesystem(kind, path, base / "lower")
        path, image = self._image(kind, name)
        return Filesystem(kind, path, image=image)


@contextmanager
def made_and_removed(where: Path, require: Require) -> Iterator[Maker]:
    with ExitStack() as stack:
        maker = Maker(stack, where, require)
        yield maker
    assert str(where) not in Path("/proc/mounts").read_text()
    assert maker.busy or str(where) not in _run("losetup", "-a").stdout


@pytest.fixture
def make_filesystem(tmp_path: Path, require: Require) -> Iterator[Callable[[str], Filesystem]]:
    """`make_filesystem(kind)`: a new one, the test's own."""
    with made_and_removed(tmp_path, require) as make:
        yield make


@pytest.fixture(scope="session", params=KINDS)
def filesystem(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, require: Require
) -> Iterator[Filesystem]:
    """One of each kind, shared by all tests that take it."""
    with made_and_removed(tmp_path_factory.mktemp("filesystems"), require) as make:
        yield make(request.param)


@pytest.fixture
def place(filesystem: Filesystem, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory of the test's own on the file system, removed afterwards."""
    path = filesystem.path / f"test-{abs(hash(request.node.nodeid)):x}"
    path.mkdir()
    yield path
    gc.collect()
    shutil.rmtree(path)


@pytest.fixture(params=SyncMethod, ids=lambda m: m.value)
def method(request: pytest.FixtureRequest) -> SyncMethod:
    """Every way to make a commit durable."""
    return SyncMethod(request.param)
