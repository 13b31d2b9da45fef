"""What the demo journals: the metadata of a folder tree, read once, as entries in a fixed order."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mmapwal.cli.demo_machines import CATALOG_KIND, USAGE_KIND


class Submission(NamedTuple):
    """One entry to be submitted."""

    kind: int
    payload: bytes


@dataclass
class Tree:
    """The entries of one tree. `counts` by type; `unreadable` folders are named, not entered;
    `vanished` is what was listed and then gone."""

    entries: list[Submission] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0
    vanished: int = 0


def collect(root: str) -> Tree:
    """Reads all metadata below `root`; symbolic links are named and never followed.

    Each path makes a catalog entry, each file one more for its type. OSError when `root` itself
    cannot be listed.
    """
    tree = Tree()
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            names = os.listdir(os.path.join(root, folder) if folder else root)  # noqa: PTH118, PTH208
        except OSError:
            if not folder:
                raise
            tree.unreadable += 1
            continue
        for name in sorted(names, key=os.fsencode):
            path = f"{folder}/{name}" if folder else name
            try:
                info = os.lstat(os.path.join(root, path))  # noqa: PTH118  # Path would be ten times as slow
            except OSError:
                tree.vanished += 1
                continue
            if stat.S_ISDIR(info.st_mode):
                folders.append(path)
            tree.counts[_type(info.st_mode)] += 1
            tree.entries.extend(_submissions(path, info))
    return tree


def _submissions(path: str, info: os.stat_result) -> Iterator[Submission]:
    facts = {
        "path": path,
        "type": _type(info.st_mode),
        "mode": info.st_mode,
        "size": info.st_size,
        "mtime_ns": info.st_mtime_ns,
    }
    yield Submission(CATALOG_KIND, _encode(facts))
    if stat.S_ISREG(info.st_mode):
        suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122
        yield Submission(USAGE_KIND, _encode({"suffix": suffix, "size": info.st_size}))


def _type(mode: int) -> str:
    types = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
    return types.get(stat.S_IFMT(mode), "other")


def _encode(facts: dict[str, Any]) -> bytes:
    """The same bytes for the same facts; bytes of a name that are not UTF-8 become \\udcXX."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode("ascii")


def save(entries: Iterable[Submission], path: Path) -> None:
    """Hands the entries to the child: one a line, the kind and the payload, which has no newline."""
    with path.open("wb") as file:
        file.writelines(b"%d %b\n" % entry for entry in entries)


def load(path: Path) -> list[Submission]:
    """What save() wrote."""
    entries = []
    with path.open("rb") as file:
        for line in file:
            kind, _, payload = line.rstrip(b"\n").partition(b" ")
            entries.append(Submission(int(kind), payload))
    return entries
