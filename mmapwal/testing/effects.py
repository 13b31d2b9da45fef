"""What a crash disk writes down: one record for each effect, and the image that a crash leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

SECTOR_BYTES = 512
ROOT = 0
NO_HANDLE = -1


class EffectKind(Enum):
    """What was done. WRITE with a SYNC_RANGE behind it is one write_sync_at()."""

    CREATE = "create"
    MKDIR = "mkdir"
    RENAME = "rename"
    UNLINK = "unlink"
    WRITE = "write"
    STORE = "store"
    TRUNCATE = "truncate"
    SYNC = "sync"
    SYNC_RANGE = "sync_range"
    SYNC_FAILED = "sync_failed"
    DIR_SYNC = "dir_sync"
    PARENT_SYNC = "parent_sync"


@dataclass(frozen=True, slots=True)
class Effect:
    """One effect on a crash disk.

    `name` is the file's path when it was opened, `target` the new name of a rename. `offset` and
    `length` are in bytes, `data` is what was written. `node` numbers the file (or, for effects on
    names, the file that the name stands for), `folder` the directory, `handle` the open storage.
    """

    kind: EffectKind
    name: str
    node: int
    folder: int = ROOT
    handle: int = NO_HANDLE
    offset: int = 0
    length: int = 0
    data: bytes = field(default=b"", repr=False)
    target: str = ""

    def __str__(self) -> str:
        text = f"{self.kind.value} {self.name or '.'}"
        if self.target:
            return f"{text} -> {self.target}"
        if self.kind is EffectKind.TRUNCATE:
            return f"{text} to {self.length} bytes"
        if self.kind in {EffectKind.WRITE, EffectKind.STORE, EffectKind.SYNC_RANGE}:
            return f"{text} [{self.offset}, {self.offset + self.length})"
        return text


@dataclass(frozen=True, slots=True)
class Image:
    """All that is on a disk: names of each directory, bytes of each file. `root_kept`: whether the
    directory itself is durable, or made anew."""

    folders: dict[int, dict[str, int]]
    files: dict[int, bytes]
    root_kept: bool = False


def join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
