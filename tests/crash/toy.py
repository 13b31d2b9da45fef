"""A log of a few lines, right as it stands, in which each bug of a list can be planted."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Collection

from mmapwal.storage import Directory, Storage
from mmapwal.testing import CrashDisk

RECORD = struct.Struct("<II")
HEADER = b"toy log 1"
FIRST = 512

BUGS = {
    "records are not synced",
    "the directory is not synced",
    "the directory's own name is not synced",
    "renamed before its header is synced",
    "the length is believed without the checksum",
    "synced through another descriptor",
    "the record is synced without its last sector",
    "old file unlinked before the new name is durable",
    "renamed before the rewritten file is synced",
}


class ToyLog:
    def __init__(self, directory: Directory, bugs: Collection[str] = ()) -> None:
        assert set(bugs) <= BUGS
        self.directory, self.bugs = directory, bugs
        if "log" not in directory.names():
            self._make("log", [])
        self.storage: Storage = directory.open("log", writable=True)
        data = bytes(self.storage.read_at(0, len(self.storage)))
        assert data.startswith(HEADER), "a log without its header"
        self.records: list[bytes] = []
        self.end = FIRST
        while self.end + RECORD.size <= len(data):
            length, check = RECORD.unpack_from(data, self.end)
            record = data[self.end + RECORD.size : self.end + RECORD.size + length]
            if not length or len(record) < length:
                break
            if zlib.crc32(record) != check and "the length is believed without the checksum" not in bugs:
                break
            self.records.append(record)
            self.end += RECORD.size + length

    def _make(self, name: str, records: list[bytes]) -> None:
        new = self.directory.create(name + ".tmp")
        new.write_at(0, HEADER.ljust(FIRST, b"\0") + b"".join(map(packed, records)))
        early = (
            "renamed before the rewritten file is synced"
            if records
            else "renamed before its header is synced"
        )
        if early not in self.bugs:
            new.sync()
        if records and "old file unlinked before the new name is durable" in self.bugs:
            self.directory.unlink(name)
        self.directory.rename(name + ".tmp", name)
        if "the directory is not synced" not in self.bugs:
            self.directory.sync()
        if "the directory's own name is not synced" not in self.bugs:
            self.directory.sync_parent()
        new.close()

    def append(self, record: bytes) -> None:
        data = packed(record)
        if "records are not synced" in self.bugs:
            self.storage.write_at(self.end, data)
        elif "synced through another descriptor" in self.bugs:
            self.storage.write_at(self.end, data)
            self.directory.open("log", writable=True).sync()
        elif "the record is synced without its last sector" in self.bugs:
            self.storage.write_at(self.end, data)
            self.storage.write_sync_at(self.end, data[: 512 - self.end % 512])
        else:
            self.storage.write_sync_at(self.end, data)
        self.records.append(record)
        self.end += len(data)

    def rewrite(self, keep: Callable[[bytes], bool]) -> None:
        self._make("log", [r for r in self.records if keep(r)])
        self.__init__(self.directory, self.bugs)  # type: ignore[misc]


def packed(record: bytes) -> bytes:
    return RECORD.pack(len(record), zlib.crc32(record)) + record


def toy_records(sizes: Collection[int]) -> list[bytes]:
    return [bytes([n + 1]) * size for n, size in enumerate(sizes)]


def toy_scenario(
    bugs: Collection[str] = (), sizes: Collection[int] = (10, 600, 30)
) -> Callable[[CrashDisk, Callable[..., None]], None]:
    """Appends records of these sizes, drops the first by a rewrite, appends one more."""

    def scenario(disk: CrashDisk, acknowledge: Callable[..., None]) -> None:
        log = ToyLog(disk, bugs)
        for record in toy_records(sizes):
            log.append(record)
            acknowledge(record)
        log.rewrite(lambda record: record[0] != 1)
        log.append(b"last")
        acknowledge(b"last")

    return scenario


def toy_check(bugs: Collection[str] = ()) -> Callable[[CrashDisk, list[bytes]], None]:
    """All that was acknowledged is there in order, but the first record; at most one that was not."""

    def check(disk: CrashDisk, acknowledged: list[bytes]) -> None:
        found = [r for r in ToyLog(disk, bugs).records if r[0] != 1]
        wanted = [r for r in acknowledged if r[0] != 1]
        assert found[: len(wanted)] == wanted, "an acknowledged record is lost"
        assert len(found) <= len(wanted) + 1, "a record that was never appended"
        whole = [*toy_records((10, 600, 30)), b"last"]
        assert all(r in whole for r in found), "a record that was never appended"

    return check
