"""A disk in memory that writes down every effect, and can tell what a crash would have left of them."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

from typing_extensions import Buffer

from mmapwal.errors import LockedError
from mmapwal.storage import SyncMethod
from mmapwal.testing.effects import NO_HANDLE, ROOT, SECTOR_BYTES, Effect, EffectKind, Image, join
from mmapwal.testing.states import EXHAUSTIVE_MAX, Choice, Point, Replay, StateKey

HALF_BYTES = SECTOR_BYTES // 2


def _error(code: int, name: str) -> OSError:
    return OSError(code, os.strerror(code), name)


class _File:
    """A file's bytes as a program sees them. `seen`: what the record knows of them, while shared."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.seen: bytearray | None = None
        self.sharer = NO_HANDLE

    def resize(self, length: int) -> None:
        kept = bytearray(length)  # a new one: views of the old keep it
        kept[: len(self.data)] = self.data[:length]
        self.data = kept

    def write(self, offset: int, data: bytes) -> None:
        if offset + len(data) > len(self.data):
            self.resize(offset + len(data))
        self.data[offset : offset + len(data)] = data


class _World:
    """What the directories of one disk share: files, names, the record."""

    def __init__(self, image: Image, sync_method: SyncMethod, damage: bool) -> None:
        self.image = image
        self.sync_method = sync_method
        self.damage = damage
        self.effects: list[Effect] = []
        self.files = {node: _File(data) for node, data in image.files.items()}
        self.folders = {node: dict(names) for node, names in image.folders.items()}
        self.locked: set[int] = set()
        self.process = 0
        self.handles = 0
        self.nodes = max([ROOT, *self.files, *self.folders])

    def node(self) -> int:
        self.nodes += 1
        return self.nodes

    def observe(self) -> None:
        """Writes down what was stored in shared mappings since the last look, in runs of sectors."""
        for node, file in self.files.items():
            if file.seen is not None and file.seen != file.data:
                self._observe(node, file, file.seen)

    def _observe(self, node: int, file: _File, seen: bytearray) -> None:
        changed = [
            at
            for at in range(0, len(seen), SECTOR_BYTES)
            if file.data[at : at + SECTOR_BYTES] != seen[at : at + SECTOR_BYTES]
        ]
        file.seen = bytearray(file.data)
        name = self.path_of(node)
        for at in changed:
            data = bytes(file.data[at : at + SECTOR_BYTES])
            self.effects.append(
                Effect(
                    EffectKind.STORE,
                    name,
                    node,
                    handle=file.sharer,
                    offset=at,
                    length=len(data),
                    data=data,
                )
            )

    def path_of(self, node: int) -> str:
        for folder, names in self.folders.items():
            for name, child in names.items():
                if child == node:
                    return name if folder == ROOT else join(self.path_of(folder), name)
        return f"unlinked file {node}"

    def record(self, effect: Effect) -> None:
        self.observe()
        self.effects.append(effect)


class CrashStorage:
    """One opened file of a CrashDisk: `mmapwal.storage.Storage`. Refuses what a descriptor would."""

    def __init__(self, world: _World, node: int, name: str, writable: bool) -> None:
        world.handles += 1
        self._world = world
        self._process = world.process
        self._handle = world.handles
        self._node = node
        self._name = name
        self._writable = writable
        self._closed = False

    def _file(self, *, write: bool = False) -> _File:
        if self._closed or self._process != self._world.process or (write and not self._writable):
            raise _error(errno.EBADF, self._name)
        if write:
            self._world.observe()
        return self._world.files[self._node]

    def _record(self, kind: EffectKind, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        self._world.record(
            Effect(
                kind,
                self._name,
                self._node,
                handle=self._handle,
                offset=offset,
                length=length,
                data=data,
            )
        )

    def __len__(self) -> int:
        return len(self._file().data)

    def read_at(self, offset: int, length: int) -> memoryview:
        return memoryview(bytes(self._file().data[offset : offset + length]))

    def write_at(self, offset: int, data: Buffer) -> int:
        plain = memoryview(data).tobytes()
        file = self._file(write=True)
        file.write(offset, plain)
        if file.seen is not None:
            file.seen = bytearray(file.data)
        self._record(EffectKind.WRITE, offset, len(plain), plain)
        return len(plain)

    def write_sync_at(self, offset: int, data: Buffer) -> int:
        length = self.write_at(offset, data)
        self._record(EffectKind.SYNC_RANGE, offset, length)
        return length

    def append(self, data: Buffer) -> int:
        offset = len(self)
        self.write_at(offset, data)
        return offset

    def truncate(self, length: int) -> None:
        file = self._file(write=True)
        if length != len(file.data):
            file.resize(length)
            if file.seen is not None:
                file.seen = bytearray(file.data)
            self._record(EffectKind.TRUNCATE, length=length)

    def sync(self) -> None:
        self._file()
        self._record(EffectKind.SYNC)

    def fail_sync(self) -> None:
        """What a failed sync does: what was written and not synced stays uncertain, and no later sync
        covers it, until it is written again. FaultDirectory calls it."""
        self._file()
        self._record(EffectKind.SYNC_FAILED)

    def view(self) -> memoryview:
        return memoryview(self._file().data).toreadonly()

    def shared(self) -> memoryview:
        file = self._file(write=True)
        if file.seen is None:
            file.seen = bytearray(file.data)
        file.sharer = self._handle
        return memoryview(file.data)

    def close(self) -> None:
        self._closed = True


class _MappedCrashStorage(CrashStorage):
    """Opened with SyncMethod.MSYNC: what is written is stored in a shared mapping, and a sync is an msync.
    The kernel may write a page in the middle of a store: of each sector half can be there without the other.
    """

    def write_at(self, offset: int, data: Buffer) -> int:
        plain, shared = memoryview(data).cast("B"), self.shared()
        end = offset + len(plain)
        if end > len(shared):
            raise _error(errno.EFBIG, self._name)
        starts = range(offset - offset % HALF_BYTES, end, HALF_BYTES)
        for halves in (starts[0::2], starts[1::2]):
            for at in halves:
                first, last = max(at, offset), min(at + HALF_BYTES, end)
                shared[first:last] = plain[first - offset : last - offset]
            self._world.observe()
        return len(plain)


class CrashDisk:
    """A directory in memory that records all effects, and crashes.

    It keeps the Directory protocol: ``Journal("any", storage=CrashDisk())``. What a crash may leave is
    what DESIGN assumes of the machine: sectors of 512 bytes whole or not at all; those that no sync
    covered, sizes and names in any subset; changes of names in any order too, except that those of one
    file stay in order. A file's sync makes durable what was written *through the same storage
    object*, and the size, not the name; `write_sync_at` its own range and the size; a directory's sync
    all names in it. A sector of a shared mapping can be on the disk at any value that it had since
    its last sync (looked at whenever an effect is recorded, and in `observe`). With SyncMethod.MSYNC a
    write is stores in such a mapping, half of each sector first.

    sync_method: what SyncMethod.AUTO stands for on this disk.
    name_durable: whether the directory's own name is durable from the start. If not, all of it can be
        lost until `sync_parent` was called.
    damage: a sector that is being overwritten when the power goes may hold garbage too.

    For one thread. Nothing blocks. What is read and written is copied.
    """

    concurrent = False

    def __init__(
        self,
        *,
        sync_method: SyncMethod = SyncMethod.DSYNC,
        name_durable: bool = False,
        damage: bool = False,
    ) -> None:
        image = Image({ROOT: {}}, {}, root_kept=name_durable)
        self._begin(_World(image, sync_method, damage), ROOT, "", None)

    def _begin(self, world: _World, node: int, path: str, crash: tuple[Point, Choice] | None) -> None:
        self._world = world
        self._process = world.process
        self._node = node
        self._path = path
        self._crash = crash

    @classmethod
    def _make(
        cls, world: _World, node: int, path: str, crash: tuple[Point, Choice] | None = None
    ) -> CrashDisk:
        disk = cls.__new__(cls)
        disk._begin(world, node, path, crash)
        return disk

    def _story(self) -> tuple[list[str], list[str]]:
        return self._crash[0].describe(self._crash[1]) if self._crash else ([], [])

    def __str__(self) -> str:
        return f"<crash disk{' ' if self._path else ''}{self._path}>"

    # --- what happened, and what it can have come to

    @property
    def effects(self) -> tuple[Effect, ...]:
        """All that was done so far, first to last."""
        self._world.observe()
        return tuple(self._world.effects)

    @property
    def kept(self) -> tuple[str, ...]:
        """Of a state after a crash: the unsynced effects that are on this disk."""
        return tuple(self._story()[0])

    @property
    def lost(self) -> tuple[str, ...]:
        """Of a state after a crash: the unsynced effects that are not."""
        return tuple(self._story()[1])

    def observe(self) -> int:
        """Looks at the shared mappings; how many effects there are now."""
        self._world.observe()
        return len(self._world.effects)

    def kill(self) -> CrashDisk:
        """The process dies, the machine does not; returns the directory for the next process.

        Locks are let go; this object and the storages it has opened answer EBADF from now on, and stores
        into their mappings reach nothing. What was not synced can still be lost later, and no sync of
        the next process covers what this one wrote. Killing what is dead kills nobody.
        """
        world = self._world
        if self._process == world.process:
            world.observe()
            world.process += 1
            world.locked.clear()
            for file in world.files.values():
                file.data = bytearray(file.data)
                file.seen = None
        return CrashDisk._make(world, self._node, self._path)

    def _replay(self) -> Replay:
        """The state of the disk before the first effect; `Replay.apply` takes it further."""
        return Replay(self._world.image, damage=self._world.damage)

    def _state(self, point: Point, choice: Choice) -> CrashDisk:
        """The disk that a crash at `point` leaves with `choice`. Nothing of it is unsynced."""
        world = _World(point.image(choice), self._world.sync_method, self._world.damage)
        return CrashDisk._make(world, ROOT, "", (point, choice))

    def crash_states(
        self, after: int | None = None, *, seed: int = 0, max_states: int = EXHAUSTIVE_MAX
    ) -> Iterator[CrashDisk]:
        """Disks that a crash after the first `after` effects (None: all of them) may leave.

        Every one when there are no more than `max_states` (4096: with 12 unsynced sectors and names, each
        changed once, that is all of them; of more than 12 changes to names the orders are sampled); else
        a sample by `seed`, in which are always: nothing of what is unsynced, all of it, the newest effect
        alone and half done, each single sector, size or change of a name missing, and each of these alone.
        No two are the same. Each is a CrashDisk with a record of its own: a recovery can be crashed too.
        ValueError when there are not so many effects.
        """
        effects = self.effects
        count = len(effects) if after is None else after
        if not 0 <= count <= len(effects):
            raise ValueError(f"{count} effects asked for, there are {len(effects)}")
        replay = self._replay()
        for effect in effects[:count]:
            replay.apply(effect)
        point = Point(replay)
        seen: set[StateKey] = set()
        for choice in point.choices(random.Random(f"{seed}:{count}"), max_states):
            key = point.key(choice)
            if key not in seen:
                seen.add(key)
                yield self._state(point, choice)

    # --- the Directory protocol

    def _names(self) -> dict[str, int]:
        if self._process != self._world.process:
            raise _error(errno.EBADF, self._path)
        return self._world.folders[self._node]

    def _find(self, name: str) -> int:
        node = self._names().get(name)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return node

    def _find_file(self, name: str) -> int:
        node = self._find(name)
        if node in self._world.folders:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        return node

    def _record(self, kind: EffectKind, name: str, node: int, target: str = "") -> None:
        path = join(self._path, name)
        self._world.record(Effect(kind, path, node, folder=self._node, target=target))

    def _create(self, name: str) -> int:
        node = self._world.node()
        self._record(EffectKind.CREATE, name, node)
        self._world.files[node] = _File()
        self._names()[name] = node
        return node

    def create(self, name: str) -> CrashStorage:
        if name in self._names():
            self.unlink(name)
        return CrashStorage(self._world, self._create(name), join(self._path, name), writable=True)

    def open(
        self, name: str, *, writable: bool = False, sync_method: SyncMethod = SyncMethod.FDATASYNC
    ) -> CrashStorage:
        kind = _MappedCrashStorage if writable and sync_method is SyncMethod.MSYNC else CrashStorage
        return kind(self._world, self._find_file(name), join(self._path, name), writable)

    def names(self) -> list[str]:
        return sorted(self._names())

    def rename(self, old: str, new: str) -> None:
        node = self._find_file(old)
        if new in self._names():
            self._find_file(new)
        if old != new:
            self._record(EffectKind.RENAME, old, node, new)
            self._names()[new] = self._names().pop(old)

    def unlink(self, name: str) -> None:
        self._record(EffectKind.UNLINK, name, self._find_file(name))
        del self._names()[name]

    def sync(self) -> None:
        self._names()
        self._record(EffectKind.DIR_SYNC, "", self._node)

    def sync_parent(self) -> None:
        """For a subdirectory: the sync of the directory that it is in."""
        if self._node == ROOT:
            self._names()
            self._record(EffectKind.PARENT_SYNC, "", ROOT)
            return
        parent = next(n for n, names in self._world.folders.items() if self._node in names.values())
        path = self._path.rpartition("/")[0]
        self._world.record(Effect(EffectKind.DIR_SYNC, path, parent, folder=parent))

    def subdirectory(self, name: str) -> CrashDisk:
        node = self._names().get(name)
        if node is None:
            node = self._world.node()
            self._record(EffectKind.MKDIR, name, node)
            self._world.folders[node] = {}
            self._names()[name] = node
        elif node in self._world.files:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
        return CrashDisk._make(self._world, node, join(self._path, name))

    def lock(self, name: str) -> None:
        if name not in self._names():
            self._create(name)
        if self._node in self._world.locked:
            raise LockedError(f"{self}: it is open already")
        self._world.locked.add(self._node)

    def best_sync_method(self) -> SyncMethod:
        return self._world.sync_method

    def free_bytes(self) -> int | None:
        return None

    def after_fork(self) -> None:
        pass

    def close(self) -> None:
        """Lets go of the lock. The disk goes on: a journal can be opened on it again."""
        if self._process == self._world.process:
            self._world.locked.discard(self._node)
