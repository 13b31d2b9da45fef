"""Planted bugs on the seam: a directory that leaves out some of the effects it is asked for."""

from __future__ import annotations

import re
from typing import Any

from mmapwal.storage import Directory
from mmapwal.testing import Call, InterposedDirectory


class SkipEffect(InterposedDirectory):
    """Does not do calls of one kind on files whose name matches, and says that it did.

    A write_sync without its sync is a write. `keep_bytes`: so many bytes of a write_sync are synced, as
    by an msync of the first page only. Calls that were left out are counted in `skipped`.
    """

    def __init__(self, inner: Directory, kind: str, pattern: str = "", *, keep_bytes: int = 0) -> None:
        super().__init__(inner)
        self.kind, self.pattern, self.keep_bytes = kind, re.compile(pattern), keep_bytes
        self.skipped = 0

    def wrap_directory(self, inner: Directory) -> SkipEffect:
        return SkipEffect(inner, self.kind, self.pattern.pattern, keep_bytes=self.keep_bytes)

    def intercept(self, call: Call) -> Any:
        if call.kind != self.kind or not self.pattern.search(call.name):
            return call.run()
        self.skipped += 1
        if call.kind != "write_sync":
            return None
        assert call.storage is not None
        done = call.storage.write_at(call.offset, call.data)
        if self.keep_bytes:
            call.storage.write_sync_at(call.offset, call.data[: self.keep_bytes])
        return done


class RenameFirst(InterposedDirectory):
    """Renames a file before what was written to it is synced: the sync comes after the rename."""

    def __init__(self, inner: Directory, pattern: str) -> None:
        super().__init__(inner)
        self.pattern = re.compile(pattern)
        self._late: dict[str, Any] = {}

    def wrap_directory(self, inner: Directory) -> RenameFirst:
        return RenameFirst(inner, self.pattern.pattern)

    def intercept(self, call: Call) -> Any:
        if call.kind == "sync" and self.pattern.search(call.name) and call.storage is not None:
            self._late[call.name] = call.storage
            return None
        if call.kind == "close" and call.name in self._late:
            return None
        result = call.run()
        if call.kind == "dir_sync":
            for storage in self._late.values():
                storage.sync()
                storage.close()
            self._late.clear()
        return result
