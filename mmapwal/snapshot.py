"""Snapshots of a state machine: one file each, written in stages whose errors name the stage.

A snapshot is a header and the data behind it, in ``snapshot-<op, 20 digits>``. It is written to that
name with ``.tmp`` behind it, synced, renamed, and the directory synced: under its own name a file is
always whole, so one that does not verify is damaged, and is never silently passed over.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from typing_extensions import Buffer

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.arguments import integer
from mmapwal.errors import (
    ClosedError,
    IncompatibleFormatError,
    PersistStage,
    SnapshotCorruptError,
    SnapshotError,
    SnapshotPersistError,
)
from mmapwal.storage import Directory, Storage, SystemDirectory

__all__ = ["Snapshot", "SnapshotStore", "kept_snapshot", "snapshot_name"]

_NAME = re.compile(r"snapshot-([0-9]{20})")
_TEMPORARY_NAME = re.compile(r"snapshot-[0-9]{20}\.tmp")
_HEADER_BYTES = fmt.SNAPSHOT_HEADER.itemsize
_CRC_BYTES = 4
_TIME_MAX = 2**63 - 1


class Snapshot(NamedTuple):
    """The state of a machine after ``op``, as it lies on the disk.

    ``op`` is the last op that is in it, 0 for the state before the first one. ``data`` is a read-only
    slice of the file's mapping, never a copy; it stays right for as long as it is held, also when the
    file is replaced or removed. ``created_at`` is in nanoseconds since the Unix epoch, ``checksum``
    the CRC32C of ``data``.
    """

    op: int
    data: memoryview
    created_at: int
    checksum: int


def snapshot_name(op: int) -> str:
    """The file name of the snapshot of `op`."""
    return f"snapshot-{op:020d}"


def copy_of(data: Buffer) -> bytes:
    """The bytes as they are now: the caller may change its buffer afterwards."""
    return data if type(data) is bytes else memoryview(data).tobytes()


class _Attempt:
    """One save: all that is needed to write it again."""

    def __init__(self, op: int, data: bytes, created_at: int, number: int) -> None:
        self.op = op
        self.data = data
        self.created_at = created_at
        self.number = number
        self.checksum = fmt.crc32c(data)
        self.name = snapshot_name(op)
        self.temporary = f"{self.name}.tmp"
        self.view: memoryview | None = None

    def header(self) -> bytes:
        head: Any = np.zeros((), fmt.SNAPSHOT_HEADER)
        head["magic"], head["version"] = fmt.SNAPSHOT_MAGIC, fmt.FORMAT_VERSION
        head["op"], head["created_at_ns"] = self.op, self.created_at
        head["length"], head["data_crc"] = len(self.data), self.checksum
        head["crc"] = fmt.crc32c(head.tobytes()[:-_CRC_BYTES])
        return bytes(head.tobytes())


class SnapshotStore:
    """The snapshots in one directory. All methods may be called from several threads.

    `path` is a directory, made with mode 0700 if it is missing (its parent must exist), and its name
    made durable. With `storage` the files live there instead, `path` only names them in messages, and
    the name of that directory is the caller's to make durable. `keep` is how many of the newest
    snapshots a save leaves behind, at least 1. Temporary files of saves that did not finish are
    removed. One process at a time may have a directory open: recover() keeps it under the journal's lock.

    Raises OSError; TypeError and ValueError for a bad `keep`. Blocks for one directory sync.
    """

    protected_op: int | None
    """The op that a superblock is paired with: its snapshot is never pruned."""

    def __init__(
        self, path: str | os.PathLike[str], *, storage: Directory | None = None, keep: int = 2
    ) -> None:
        self._keep = integer("keep", keep, 1, fmt.OP_MAX)
        self._label = os.fspath(path)
        self._guard = threading.Lock()
        self._closed = False
        self._attempts = 0
        self._saved: dict[int, int] = {}  # op -> number of the attempt that its file is from
        self._renamable: _Attempt | None = None  # whose finished temporary file is there
        self.protected_op = None
        self._directory = SystemDirectory(path) if storage is None else storage
        try:
            if storage is None:
                self._directory.sync_parent()
            self._remove_temporaries()
        except BaseException:
            if storage is None:
                self._directory.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the directory, also one that was given. Views stay right. Twice is fine."""
        with self._guard:
            self._closed = True
            self._directory.close()

    # --- saving -----------------------------------------------------------------------------------

    def save(self, op: int, data: Buffer, *, created_at: int | None = None) -> Snapshot:
        """Makes a snapshot durable, replacing one of the same op atomically; then prunes.

        `op` is 0 .. 2**63-1, `created_at` nanoseconds since the Unix epoch, None for now. `data` is
        copied before anything else, so the caller may change it at once.

        Returns the snapshot, its data a read-only slice of the new file's mapping. Blocks for the
        write, one file sync and one directory sync.

        Raises SnapshotPersistError, which names the stage and can be resumed; TypeError and
        ValueError for bad arguments; ClosedError. Replacing the snapshot of ``protected_op`` by other
        bytes breaks its pairing until the superblock is paired again: SnapshotCoordinator never does.
        """
        op = integer("op", op, 0, fmt.OP_MAX)
        when = time.time_ns() if created_at is None else created_at
        when = integer("created_at", when, -_TIME_MAX - 1, _TIME_MAX)
        with self._guard:
            self._refuse_if_closed()
            self._attempts += 1
            attempt = _Attempt(op, copy_of(data), when, self._attempts)
            return self._persist(attempt)

    def _resume(self, attempt: _Attempt, stage: PersistStage) -> None:
        with self._guard:
            self._refuse_if_closed()
            if self._saved.get(attempt.op, 0) > attempt.number:
                return  # a later save of this op is there: an older state must not replace it
            self._persist(attempt, rename_again=stage is PersistStage.RENAME)

    def _persist(self, attempt: _Attempt, *, rename_again: bool = False) -> Snapshot:
        """All four stages; with `rename_again` from the rename on, if its temporary file is there."""
        if not (rename_again and self._rename_finished(attempt)):
            self._write(attempt)
            with self._stage(attempt, PersistStage.RENAME):
                self._directory.rename(attempt.temporary, attempt.name)
        self._renamable = None
        with self._stage(attempt, PersistStage.DIR_SYNC):
            self._directory.sync()
        self._saved[attempt.op] = attempt.number
        with contextlib.suppress(OSError):
            self._prune(attempt.op)
        view, attempt.view = attempt.view, None
        if view is None:
            raise SnapshotError(f"{self._label}/{attempt.name}: written without a mapping")
        return Snapshot(attempt.op, view[_HEADER_BYTES:], attempt.created_at, attempt.checksum)

    def _write(self, attempt: _Attempt) -> None:
        """WRITE and SYNC, always to a file that is new: one whose sync failed is thrown away."""
        storage: Storage | None = None
        try:
            with self._stage(attempt, PersistStage.WRITE):
                self._remove_temporaries()
                storage = self._directory.create(attempt.temporary)
                storage.write_at(0, attempt.header())
                storage.write_at(_HEADER_BYTES, attempt.data)
                attempt.view = storage.view().toreadonly()  # here, where a failure is still harmless
            with self._stage(attempt, PersistStage.SYNC):
                storage.sync()
                storage.close()
        except BaseException:
            attempt.view = None
            with contextlib.suppress(OSError):
                if storage is not None:
                    storage.close()
            with contextlib.suppress(OSError):
                self._directory.unlink(attempt.temporary)
            raise
        self._renamable = attempt

    def _rename_finished(self, attempt: _Attempt) -> bool:
        """Renames the temporary file that an earlier try has left; False when it is gone."""
        if self._renamable is not attempt:
            return False
        with self._stage(attempt, PersistStage.RENAME):
            try:
                self._directory.rename(attempt.temporary, attempt.name)
            except FileNotFoundError:
                return False
        return True

    @contextlib.contextmanager
    def _stage(self, attempt: _Attempt, stage: PersistStage) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            message = f"snapshot of op {attempt.op} in {self._label}: {e}"
            raise SnapshotPersistError(stage, message, partial(self._resume, attempt, stage)) from e

    # --- loading ----------------------------------------------------------------------------------

    def ops(self) -> list[int]:
        """The ops of the snapshots that are there, ascending; damaged ones too. OSError, ClosedError."""
        self._refuse_if_closed()
        found = (_NAME.fullmatch(name) for name in self._directory.names())
        return sorted(op for match in found if match and (op := int(match[1])) <= fmt.OP_MAX)

    def load(self) -> Snapshot | None:
        """The newest snapshot, checked; None when there is none. Its data is not copied.

        Raises SnapshotCorruptError when the newest is damaged, and never falls back to an older one;
        IncompatibleFormatError when a newer mmapwal wrote it; OSError, ClosedError. Blocks for reading
        the file once.
        """
        with self._guard:
            ops = self.ops()
            return read_snapshot(self._directory, ops[-1], self._label) if ops else None

    def load_paired(self, op: int, checksum: int) -> Snapshot:
        """The snapshot that a superblock names by op and checksum, whatever else is there.

        Raises SnapshotError when it is missing, SnapshotCorruptError when it is damaged or is another
        one, IncompatibleFormatError, OSError, TypeError, ValueError, ClosedError. Blocks for reading
        the file once.
        """
        op = integer("op", op, 0, fmt.OP_MAX)
        checksum = integer("checksum", checksum, 0, 2**32 - 1)
        with self._guard:
            self._refuse_if_closed()
            return _read_paired(self._directory, op, checksum, self._label)

    # --- removing ---------------------------------------------------------------------------------

    def prune(self) -> None:
        """Removes all but the newest `keep`, and never that of ``protected_op``.

        A file that cannot be removed is left to the next time. OSError when the directory cannot be
        read; ClosedError.
        """
        with self._guard:
            self._prune()

    def _prune(self, saved_op: int | None = None) -> None:
        """`saved_op` was just saved: newer ones, of checkpoints that did not happen, must not oust it."""
        for op in self.ops()[: -self._keep]:
            if op not in {self.protected_op, saved_op}:
                with contextlib.suppress(OSError):
                    self._directory.unlink(snapshot_name(op))
                self._saved.pop(op, None)

    def _remove_temporaries(self) -> None:
        self._renamable = None
        for name in self._directory.names():
            if _TEMPORARY_NAME.fullmatch(name):
                with contextlib.suppress(OSError):
                    self._directory.unlink(name)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ClosedError(f"{self._label}: the snapshot store is closed")


def kept_snapshot(
    directory: Directory, pairing: tuple[int, int] | None, *, copy: bool = False
) -> Snapshot | None:
    """The paired snapshot of the journal in `directory`, which stays as it is; errors as of load_paired().
    None: it is paired with none, or they are not kept with it, and nobody knows where they are. `copy`: its
    data is not mapped."""
    if pairing is None or fmt.SNAPSHOTS_NAME not in directory.names():
        return None
    snapshots = directory.subdirectory(fmt.SNAPSHOTS_NAME)
    try:
        return _read_paired(snapshots, *pairing, f"{directory}/{fmt.SNAPSHOTS_NAME}", copy=copy)
    finally:
        snapshots.close()


def _read_paired(directory: Directory, op: int, checksum: int, label: str, *, copy: bool = False) -> Snapshot:
    snapshot = read_snapshot(directory, op, label, copy=copy)
    if snapshot.checksum != checksum:
        raise SnapshotCorruptError(
            f"{label}/{snapshot_name(op)}: its checksum is {snapshot.checksum:#010x}, "
            f"the journal is paired with {checksum:#010x}"
        )
    return snapshot


def read_snapshot(directory: Directory, op: int, label: str, *, copy: bool = False) -> Snapshot:
    """The snapshot of an op, checked; `label` names the directory. SnapshotError when it is missing,
    SnapshotCorruptError, IncompatibleFormatError, OSError."""
    name = snapshot_name(op)
    place = f"{label}/{name}"
    try:
        storage = directory.open(name)
    except FileNotFoundError as e:
        raise SnapshotError(f"{place}: the snapshot of op {op} is missing") from e
    try:
        head = _checked_header(place, op, bytes(storage.read_at(0, _HEADER_BYTES)))
        view = storage.read_at(0, len(storage)) if copy else storage.view().toreadonly()
    finally:
        storage.close()
    if int(head["length"]) != view.nbytes - _HEADER_BYTES:
        raise SnapshotCorruptError(
            f"{place}: {view.nbytes - _HEADER_BYTES} bytes of data where the header says {head['length']}"
        )
    data = view[_HEADER_BYTES:]
    checksum = _guarded_crc32c(data, name)
    if checksum != int(head["data_crc"]):
        raise SnapshotCorruptError(f"{place}: the checksum of its data is wrong")
    return Snapshot(op, data, int(head["created_at_ns"]), checksum)


def _checked_header(place: str, op: int, raw: bytes) -> Any:
    if len(raw) < _HEADER_BYTES:
        raise SnapshotCorruptError(f"{place}: only {len(raw)} bytes long")
    head: Any = np.frombuffer(raw, fmt.SNAPSHOT_HEADER, 1)[0]
    if bytes(head["magic"]) != fmt.SNAPSHOT_MAGIC:
        raise SnapshotCorruptError(f"{place}: not a snapshot")
    if int(head["version"]) != fmt.FORMAT_VERSION and not _is_rot_of_version(raw):
        raise IncompatibleFormatError(
            f"{place}: format version {head['version']}; this mmapwal reads version {fmt.FORMAT_VERSION}"
        )
    if fmt.crc32c(raw[:-_CRC_BYTES]) != int(head["crc"]):
        raise SnapshotCorruptError(f"{place}: the checksum of its header is wrong")
    if int(head["op"]) != op:
        raise SnapshotCorruptError(f"{place}: its header says op {head['op']}")
    return head


def _is_rot_of_version(raw: bytes) -> bool:
    """Whether the header is right but for its version: damage, and not the mark of another format."""
    head: Any = np.frombuffer(raw, fmt.SNAPSHOT_HEADER, 1).copy()
    head["version"] = fmt.FORMAT_VERSION
    return fmt.crc32c(head.tobytes()[:-_CRC_BYTES]) == int(head["crc"][0])


def _guarded_crc32c(data: memoryview, name: str) -> int:
    """CRC32C of a mapping: a page that cannot be read is an OSError, not the end of the process."""
    out = ffi.new("uint32_t *")
    result = lib.mw_crc32c_guarded(0, ffi.from_buffer(data), data.nbytes, out)
    if result < 0:
        raise OSError(-result, os.strerror(-result), name)
    return int(out[0])
