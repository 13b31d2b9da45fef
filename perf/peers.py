"""Others that keep entries durably, each with the settings under which an append that returned survives a
power cut. What is not installed is told by name, and left out.

Keys are the entries' numbers from 1: integers where the peer has them, else 8 bytes, big-endian.
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from common import SqliteLog

from mmapwal import Journal

MAP_BYTES = 4 << 30
SLOTS = 1 << 18


class Peer(Protocol):
    """`append` and `append_many` are durable at return, one transaction each. `read_each` and `iterate`
    look at every payload that is asked for; None where there is no such thing."""

    def append(self, payload: bytes) -> object: ...
    def append_many(self, payloads: Sequence[bytes]) -> object: ...
    def close(self) -> None: ...


def key_of(op: int) -> bytes:
    return op.to_bytes(8, "big")


def drain(payloads: Iterable[object]) -> None:
    deque(payloads, 0)


class Mmapwal:
    """Journal(): Durability.SYNC, SyncMethod.AUTO. Reads are views; iteration by payloads(), checked"""

    def __init__(self, folder: Path) -> None:
        self._journal = Journal(folder / "journal", slots=SLOTS)
        self.append, self.append_many = self._journal.append, self._journal.append_many
        self.close = self._journal.close

    def read_each(self, ops: Sequence[int]) -> None:
        drain(map(self._journal.read, ops))

    def iterate(self) -> None:
        drain(self._journal.payloads())

    def get(self, op: int) -> bytes:
        return self._journal.copy(op)


class Sqlite(SqliteLog):
    """sqlite3 of the standard library: journal_mode=WAL, synchronous=FULL, INTEGER PRIMARY KEY"""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "log.sqlite")

    def get(self, op: int) -> bytes:
        return bytes(self._db.execute("SELECT payload FROM log WHERE op = ?", (op,)).fetchone()[0])

    def read_each(self, ops: Sequence[int]) -> None:
        execute = self._db.execute
        for op in ops:
            execute("SELECT payload FROM log WHERE op = ?", (op,)).fetchone()

    def iterate(self) -> None:
        drain(self._db.execute("SELECT payload FROM log ORDER BY op"))


class Apsw(Sqlite):
    """apsw (its own SQLite): journal_mode=WAL, synchronous=FULL, INTEGER PRIMARY KEY"""

    def __init__(self, folder: Path) -> None:
        self._db = importlib.import_module("apsw").Connection(str(folder / "log.apsw"))
        self._prepare()


class Lmdb:
    """lmdb: sync=True, metasync=True, writemap=False (its defaults), MDB_APPEND; reads in one transaction
    with buffers=True"""

    def __init__(self, folder: Path) -> None:
        module = importlib.import_module("lmdb")
        self._env = module.open(str(folder / "lmdb"), map_size=MAP_BYTES, sync=True, metasync=True)
        self._op = 0

    def append(self, payload: bytes) -> None:
        self.append_many((payload,))

    def append_many(self, payloads: Sequence[bytes]) -> None:
        with self._env.begin(write=True) as transaction:
            for payload in payloads:
                self._op += 1
                transaction.put(key_of(self._op), payload, append=True)

    def get(self, op: int) -> bytes:
        with self._env.begin() as transaction:
            return bytes(transaction.get(key_of(op)))

    def read_each(self, ops: Sequence[int]) -> None:
        with self._env.begin(buffers=True) as transaction:
            get = transaction.get
            for op in ops:
                get(op.to_bytes(8, "big"))

    def iterate(self) -> None:
        with self._env.begin(buffers=True) as transaction:
            drain(transaction.cursor().iternext(keys=False, values=True))

    def close(self) -> None:
        self._env.close()


class ByKey:
    """What reads a key-value store whose keys are op numbers, big-endian."""

    _db: Any

    def get(self, op: int) -> bytes:
        return bytes(self._db.get(key_of(op)))

    def read_each(self, ops: Sequence[int]) -> None:
        get = self._db.get
        for op in ops:
            get(op.to_bytes(8, "big"))


class Rocksdict(ByKey):
    """rocksdict: raw mode, WriteOptions.sync = True, WriteBatch for 64"""

    def __init__(self, folder: Path) -> None:
        module = importlib.import_module("rocksdict")
        self._batch = module.WriteBatch
        self._options = module.WriteOptions()
        self._options.sync = True
        self._db = module.Rdict(str(folder / "rocksdict"), module.Options(raw_mode=True))
        self._op = 0

    def append(self, payload: bytes) -> None:
        self._op += 1
        self._db.put(key_of(self._op), payload, write_opt=self._options)

    def append_many(self, payloads: Sequence[bytes]) -> None:
        batch = self._batch(raw_mode=True)
        for payload in payloads:
            self._op += 1
            batch.put(key_of(self._op), payload)
        self._db.write(batch, write_opt=self._options)

    def iterate(self) -> None:
        drain(self._db.values())

    def close(self) -> None:
        self._db.close()


class Plyvel(ByKey):
    """plyvel (LevelDB): sync=True with every put and every write_batch"""

    def __init__(self, folder: Path) -> None:
        self._db = importlib.import_module("plyvel").DB(str(folder / "plyvel"), create_if_missing=True)
        self._op = 0

    def append(self, payload: bytes) -> None:
        self._op += 1
        self._db.put(key_of(self._op), payload, sync=True)

    def append_many(self, payloads: Sequence[bytes]) -> None:
        with self._db.write_batch(sync=True) as batch:
            for payload in payloads:
                self._op += 1
                batch.put(key_of(self._op), payload)

    def iterate(self) -> None:
        drain(self._db.iterator(include_key=False))

    def close(self) -> None:
        self._db.close()


class PlainFile:
    """a growing file: write, then fdatasync; the places in a list, reads by pread, nothing checked"""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / "plain", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._places: list[tuple[int, int]] = [(0, 0)]
        self._end = 0

    def append(self, payload: bytes) -> None:
        self.append_many((payload,))

    def append_many(self, payloads: Sequence[bytes]) -> None:
        data = b"".join(payloads)
        if os.write(self._fd, data) != len(data):
            raise OSError("short write")
        os.fdatasync(self._fd)
        for payload in payloads:
            self._places.append((len(payload), self._end))
            self._end += len(payload)

    def get(self, op: int) -> bytes:
        return os.pread(self._fd, *self._places[op])

    def read_each(self, ops: Sequence[int]) -> None:
        drain(map(self.get, ops))

    def iterate(self) -> None:
        view = memoryview(os.pread(self._fd, self._end, 0))
        drain(view[at : at + length] for length, at in self._places[1:])

    def close(self) -> None:
        os.close(self._fd)


class PersistQueue:
    """persist-queue's SQLiteQueue, auto_commit=True (its default): WAL, and FULL by SQLite's default. It
    pickles, commits every put by itself, and has no reading by key"""

    def __init__(self, folder: Path) -> None:
        self._queue = importlib.import_module("persistqueue").SQLiteQueue(str(folder / "queue"))
        self.append: Callable[[bytes], object] = self._queue.put
        self.close = self._queue.close

    def append_many(self, payloads: Sequence[bytes]) -> None:
        drain(map(self._queue.put, payloads))


class PersistFileQueue:
    """persist-queue's Queue: NOT DURABLE, an fsync once in 100 entries and none of its own bookkeeping. It
    pickles. No reading by key"""

    def __init__(self, folder: Path) -> None:
        path = str(folder / "file-queue")
        self._queue = importlib.import_module("persistqueue").Queue(path, tempdir=str(folder))
        self.append: Callable[[bytes], object] = self._queue.put

    def append_many(self, payloads: Sequence[bytes]) -> None:
        drain(map(self._queue.put, payloads))

    def close(self) -> None:  # it has none of its own
        self._queue.headf.close()
        self._queue.tailf.close()


PEERS: dict[str, type[Any]] = {
    "mmapwal": Mmapwal,
    "sqlite3": Sqlite,
    "apsw": Apsw,
    "lmdb": Lmdb,
    "rocksdict": Rocksdict,
    "plyvel": Plyvel,
    "plain file": PlainFile,
    "persist-queue": PersistQueue,
    "persist-queue, files": PersistFileQueue,
}
