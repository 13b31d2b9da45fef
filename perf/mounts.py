"""File systems of each kind, made in image files below a folder, mounted, and removed afterwards.

Needs root, loop devices and the mkfs tools. Everything is undone in reverse order, whatever happens;
SIGTERM and SIGHUP end the program by SystemExit, so they are undone then too. A loop device detaches
itself when its mount goes.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

MIB = 1 << 20
KINDS = ("ext4", "xfs", "btrfs", "tmpfs", "overlayfs")
IMAGE_MIB = 512
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}


class CannotMountError(Exception):
    """Says what is missing: root, a tool, a loop device, the file system."""


def _run(*command: str | Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        raise CannotMountError(f"{command[0]}: {e.strerror}") from e
    if done.returncode != 0:
        raise CannotMountError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _unmount(point: Path) -> None:
    gc.collect()  # mappings that are garbage keep a mount busy
    done = subprocess.run(["umount", point], capture_output=True, text=True, check=False)
    if done.returncode != 0:  # still busy: it goes with the process
        print(f"{done.stderr.strip()}; detached", file=sys.stderr)
        subprocess.run(["umount", "-l", point], check=True)


class Mounter:
    """Mounts below one folder; what it made goes away with the stack."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack

    def _mount(self, name: str, *options: str | Path) -> Path:
        point = self._folder / name
        point.mkdir()
        _run("mount", *options, point)
        self._stack.callback(_unmount, point)
        return point

    def _image(self, kind: str, name: str) -> Path:
        if shutil.which(MAKE[kind][0]) is None:
            raise CannotMountError(f"{MAKE[kind][0]} is not installed")
        image = self._folder / f"{name}.image"
        self._stack.callback(image.unlink, missing_ok=True)
        with image.open("wb") as file:  # written, so that the file below has no blocks to find later
            for _ in range(IMAGE_MIB):
                file.write(bytes(MIB))
        _run(*MAKE[kind], image)
        return self._mount(name, "-t", kind, "-o", "loop", image)

    def mount(self, kind: str) -> Path:
        """A new file system of this kind; where it is mounted. CannotMountError."""
        if kind == "tmpfs":
            return self._mount(kind, "-t", "tmpfs", "-o", f"size={IMAGE_MIB}m", "tmpfs")
        if kind == "overlayfs":  # over an ext4 of its own
            base = self._image("ext4", "overlay-base")
            layers = {f"{layer}dir": base / layer for layer in ("lower", "upper", "work")}
            for path in layers.values():
                path.mkdir()
            options = ",".join(f"{name}={path}" for name, path in layers.items())
            return self._mount(kind, "-t", "overlay", "-o", options, "overlay")
        return self._image(kind, kind)


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """A file system of this kind, below `folder`. CannotMountError says why not."""
    if os.geteuid() != 0:
        raise CannotMountError("mounting needs root")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    with ExitStack() as stack:
        yield Mounter(folder, stack).mount(kind)


def kinds(text: str) -> Sequence[str]:
    """The value of an option: names with commas between them, or "all"."""
    names = KINDS if text == "all" else tuple(text.split(","))
    for name in names:
        if name not in KINDS:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(KINDS)}")
    return names
