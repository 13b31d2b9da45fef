"""The demo's two state machines: a catalog of paths, and usage by file type.

A state machine is told each entry once, in order, and can write down its whole state and take it up
again. It knows nothing of files, crashes or threads: that is the journal's work. What apply returns
goes to whoever submitted the entry.
"""

from __future__ import annotations

import json
from typing import Any

from mmapwal import Entry, MuxStateMachine

CATALOG_KIND = 1
USAGE_KIND = 2


class Catalog:
    """Path -> what is known about it: type, size in bytes, mode, mtime in nanoseconds."""

    def __init__(self) -> None:
        self.paths: dict[str, dict[str, Any]] = {}

    def apply(self, entry: Entry) -> int:
        facts = json.loads(bytes(entry.payload))
        self.paths[facts.pop("path")] = facts
        return entry.op

    def snapshot(self) -> bytes:
        return json.dumps(self.paths).encode()

    def restore(self, snapshot: memoryview) -> None:
        self.paths = json.loads(bytes(snapshot))


class Usage:
    """File type, which is the name's suffix -> how many files, how many bytes."""

    def __init__(self) -> None:
        self.types: dict[str, list[int]] = {}

    def apply(self, entry: Entry) -> int:
        facts = json.loads(bytes(entry.payload))
        total = self.types.setdefault(facts["suffix"], [0, 0])
        total[0] += 1
        total[1] += facts["size"]
        return entry.op

    def snapshot(self) -> bytes:
        return json.dumps(self.types).encode()

    def restore(self, snapshot: memoryview) -> None:
        self.types = json.loads(bytes(snapshot))


def mux(catalog: Catalog, usage: Usage) -> MuxStateMachine:
    """One machine to the journal: each entry goes to the one that its kind names."""
    return MuxStateMachine({"catalog": ([CATALOG_KIND], catalog), "usage": ([USAGE_KIND], usage)})
