"""A descriptor that several threads use."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["DIRECTORY_FLAGS", "Descriptor"]

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Descriptor:
    """Closed when nobody has this object any more, so never under one who uses it: `with` gives the number.
    OSError from making one."""

    def __init__(self, path: str | Path, flags: int, *, dir_fd: int | None = None) -> None:
        self._fd = os.open(path, flags, dir_fd=dir_fd)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *exc: object) -> None:
        pass

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)
