"""Journal: the face of it all. The work is done by the engine, the reader, removal and compaction."""

from __future__ import annotations

import os
import struct
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from operator import countOf
from types import TracebackType
from typing import Any, Self

from typing_extensions import Buffer

from mmapwal import compaction, removal
from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.arguments import check_op, integer, kinds_column, out_of_range
from mmapwal.backup import BackupReport, backup_in_use, backup_open
from mmapwal.engine import Engine
from mmapwal.errors import (
    ClosedError,
    CorruptionError,
    PayloadTooLargeError,
    PoisonedError,
)
from mmapwal.following import Following
from mmapwal.inspection import inspect, inspect_open
from mmapwal.observer import Observer, ObservingReader
from mmapwal.opening import Durability, Options
from mmapwal.reader import DrainedEntries, Reader
from mmapwal.reading import Reading
from mmapwal.recovery import RecoveryReport
from mmapwal.stats import JournalStats, take_stats
from mmapwal.storage import Directory, SyncMethod, SystemDirectory
from mmapwal.syncing import BackgroundSync
from mmapwal.turn import refuse_reentry
from mmapwal.verify import VerifyReport

__all__ = ["Journal", "JournalStats"]

LENGTH = struct.Struct("Q")
Progress = Callable[[int, int], None]
_EVEN = int(lib.MW_EVEN)


class Journal(Reading):
    """A durable journal in a directory, with one writer.

    `path` is made if it is missing and `create`; the directory belongs to the journal. `slots` (65,536)
    bounds the live entries, `segment_bytes` (16 MiB) is the size of a segment file, and
    `commit_align_bytes` (0, 512 or 4096) keeps commits from sharing a sector: the three are fixed when
    the journal is made, and IncompatibleFormatError tells when others are asked for later.
    `sync_interval_ms` syncs in the background, for Durability.OS and BUFFERED; a failure poisons like any
    other, a full disk is tried again. `clock` gives timestamps in nanoseconds. `progress` (done, total, in
    bytes) is told during a long recovery. `storage` is where the files live; None: the real ones below
    `path`; one that allows no background threads (MemoryDirectory()) cannot have `sync_interval_ms`.
    `verify_reads` checks the payload at each read(), as copy(), iteration and columns() always do: an open
    after a clean close reads none of them.

    `readonly` takes no lock, makes nothing, and sees what another process makes durable. Reads and follow()
    work as ever; what writes raises ReadonlyError. The first read by op goes through all frames once, for
    slots of its own (32 bytes each). With `create`, a directory without a journal is an empty one until
    somebody makes it; nobody need be writing. Where it may, it stores one word in the page of the index, to
    be woken.

    Raises LockedError (another writer has it), CorruptionError (acknowledged data is damaged; nothing
    was changed), IncompatibleFormatError, JournalError (the directory holds something else),
    ExhaustedError (a number that only grows is used up: `readonly` reads it), FileNotFoundError (nothing
    there, and not `create`), ValueError or TypeError (a choice is out of range), OSError. Opening blocks:
    after an unclean end it reads everything; ``report`` tells.

    All methods may be called from several threads at once. Use it as a context manager, or call close().
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        create: bool = True,
        readonly: bool = False,
        durability: Durability = Durability.SYNC,
        sync_method: SyncMethod = SyncMethod.AUTO,
        slots: int | None = None,
        segment_bytes: int | None = None,
        max_payload_bytes: int = 64 << 20,
        commit_align_bytes: int | None = None,
        sync_interval_ms: float | None = None,
        verify_reads: bool = False,
        clock: Callable[[], int] = time.time_ns,
        progress: Progress | None = None,
        storage: Directory | None = None,
    ) -> None:
        durability, sync_method = Durability(durability), SyncMethod(sync_method)
        if slots is not None:
            integer("slots", slots, 1, fmt.SLOTS_MAX)
        if segment_bytes is not None:
            low, high = fmt.SEGMENT_BYTES_MIN, fmt.SEGMENT_BYTES_MAX
            integer("segment_bytes", segment_bytes, low, high, fmt.PAGE_BYTES)
        if commit_align_bytes is not None and commit_align_bytes not in fmt.ALIGN_CHOICES:
            raise ValueError(f"commit_align_bytes is 0, 512 or 4096; not {commit_align_bytes}")
        integer("max_payload_bytes", max_payload_bytes, 0, fmt.PAYLOAD_BYTES_MAX)
        if storage is not None and not isinstance(storage, Directory):
            raise TypeError(f"storage must be a Directory, such as MemoryDirectory(), not {storage!r}")
        syncs = sync_interval_ms is not None and durability is not Durability.SYNC
        if sync_interval_ms is not None:
            _check_interval(sync_interval_ms, readonly, storage if syncs else None)
        directory = storage
        if directory is None:
            directory = SystemDirectory(path, create=create and not readonly)
        self.path = directory.path if isinstance(directory, SystemDirectory) else None
        self.directory = directory
        options = Options(
            create=create, durability=durability, sync_method=sync_method, slots=slots,
            segment_bytes=segment_bytes, align_bytes=commit_align_bytes, progress=progress,
        )  # fmt: skip
        try:
            self._engine, self._reader = _opened(directory, options, verify_reads, readonly)
        except BaseException as e:
            if isinstance(e, CorruptionError):
                e.directory = str(directory)
            if storage is None:
                directory.close()
            raise
        engine = self._engine
        self._max_payload_bytes = max_payload_bytes
        self._max_batch_bytes = max(fmt.frame_bytes(max_payload_bytes), engine.superblock.segment_bytes)
        self._clock = None if clock is time.time_ns else clock
        self._flags = lib.MW_NOW if self._clock is None else 0
        self._native_append = lib.mw_append
        self._append_next = lib.mw_append_next
        self._native_append_many = lib.mw_append_many
        self._writer = engine.writer
        self._syncing = BackgroundSync()
        self._finalizer = weakref.finalize(self, _abandoned, engine, self._reader, self._syncing)
        self._finalizer.atexit = False
        try:
            engine.start_preparing()
            if sync_interval_ms is not None and syncs:
                self._syncing.start(engine, sync_interval_ms)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<mmapwal.Journal {self.directory}>"

    def close(self) -> None:
        """Makes all that was appended durable, seals the journal, and lets it go. Blocks for that;
        waits for appends under way. Twice is fine; in a forked child it does nothing.

        OSError or PoisonedError when the last sync fails; the journal is let go nevertheless. One that
        is poisoned already is let go without a seal and without an error. Views stay right. BusyError, and
        it stays open, from a signal handler or finaliser that came into a call that is changing the journal:
        have the handler raise SystemExit, or set a flag, and close it where that is caught.
        """
        if not self._engine.forked:
            refuse_reentry(self._engine.structure)
            self._syncing.stop()
            self._reader.close(ClosedError("the journal is closed"))
            try:
                self._engine.close()
            finally:
                if self._engine.closed:  # an interrupt may have left that for the next close
                    self._finalizer.detach()
        else:
            self._finalizer.detach()

    # --- writing ----------------------------------------------------------------------------------

    def append(
        self, payload: Buffer, *, op: int | None = None, kind: int = 0, timestamp: int | None = None,
        replace: bool = False,
    ) -> int:  # fmt: skip
        """Appends one entry and returns its op. At return it is as durable as the journal's `durability`
        says. The payload is copied; any C-contiguous buffer, 0 bytes too.

        `op` None is the next above last_op and snapshot_op; one below last_op fills a gap; one that is
        live needs `replace`. `kind` is 0 .. 32,767; `timestamp` None asks the clock.

        Before a byte is written: DuplicateOpError, StaleOpError, JournalFullError (the slot still holds
        another live op), PayloadTooLargeError, ValueError or TypeError, ExhaustedError, BusyError (as in
        close()), and OSError when there is no space (nothing happened). PoisonedError when the write or sync
        failed: outcome unknown. ClosedError, ForkedError. Blocks for one sync, which appends of other threads
        share.
        """
        if (
            op is None
            and timestamp is None
            and not replace
            and type(payload) is bytes
            and self._clock is None
        ):
            length = len(payload)  # the common case, short
            if length <= self._max_payload_bytes and type(kind) is int and 0 <= kind <= fmt.KIND_MAX:
                done = self._append_next(self._writer, payload, length, kind)
                if done > 0:
                    return done  # type: ignore[no-any-return]
                args: tuple[Any, ...] = (self._writer, payload, length, kind)
                return self._append_again(done, self._append_next, args, fmt.frame_bytes(length), 0)
        data = self._data(payload)
        length = len(data)
        flags = self._flags
        op = 0 if op is None else check_op(op)
        if replace:
            flags |= lib.MW_REPLACE
        if timestamp is not None:
            flags &= ~lib.MW_NOW
        else:
            timestamp = self._clock() if self._clock is not None else 0
        try:
            done = self._native_append(self._writer, data, length, op, kind, timestamp, flags)
        except (OverflowError, TypeError) as e:
            raise out_of_range(e, kind, timestamp) from None
        if done > 0:
            return done  # type: ignore[no-any-return]
        args = (self._writer, data, length, op, kind, timestamp, flags)
        return self._append_again(done, self._native_append, args, fmt.frame_bytes(length), op)

    def append_many(
        self, payloads: Iterable[Buffer], *, first_op: int | None = None, kind: int = 0,
        kinds: Iterable[int] | None = None,
    ) -> range:  # fmt: skip
        """Appends entries with consecutive ops from `first_op` as one batch: after a crash all of them
        are there or none. Returns their ops; an empty batch writes nothing. `kind` is for all, or
        `kinds` one each. A batch with its frames is bounded by what one payload may take, or a segment:
        PayloadTooLargeError says by how much. Else as append().
        """
        joined, lengths, even, count, total = self._join(payloads)
        column = ffi.NULL if kinds is None else kinds_column(kinds, count)
        first = 0 if first_op is None else check_op(first_op, "first_op")
        if not count:
            self._engine.check_usable()
            start = first or int(self._state().next_op)
            return range(start, start)
        timestamp = 0 if self._clock is None else self._clock()
        args = (
            self._writer, joined, lengths, column, count, first, kind, timestamp, self._flags | even,
        )  # fmt: skip
        try:
            done = self._native_append_many(*args)
        except (OverflowError, TypeError) as e:
            raise out_of_range(e, kind, None) from None
        if done <= 0:
            done = self._append_again(done, self._native_append_many, args, total, first)
        return range(done, done + count)

    def _join(self, payloads: Iterable[Buffer]) -> tuple[bytes, bytes, int, int, int]:
        """A batch in one piece, the packed length of each and 0, or the one that all have and MW_EVEN; how
        many, and what their frames take at most."""
        parts: list[Any] = list(payloads)
        count = len(parts)
        if countOf(map(type, parts), bytes) != count:
            parts = [p if type(p) is bytes else self._bytes(p) for p in parts]
        joined = b"".join(parts)
        length = len(parts[0]) if count else 0
        if length * count == len(joined) and countOf(map(len, parts), length) == count:
            lengths, even = LENGTH.pack(length), _EVEN
        else:
            lengths, even = struct.pack(f"{count}Q", *map(len, parts)), 0  # half the time of an array
        total = len(joined) + (fmt.FRAME_BYTES + 7) * count
        if len(joined) > self._max_payload_bytes or total > self._max_batch_bytes:
            total = self._check_batch([len(p) for p in parts])
        return joined, lengths, even, count, total

    def _check_batch(self, lengths: list[int]) -> int:
        """What the batch takes; PayloadTooLargeError."""
        longest = max(lengths)
        if longest > self._max_payload_bytes:
            raise PayloadTooLargeError(f"{longest} bytes; max_payload_bytes is {self._max_payload_bytes}")
        total = sum(map(fmt.frame_bytes, lengths))
        if total > self._max_batch_bytes:
            over = total - self._max_batch_bytes
            raise PayloadTooLargeError(
                f"the batch takes {total} bytes, {over} more than one may: {self._max_batch_bytes}"
            )
        return total

    def _append_again(
        self, code: int, call: Callable[..., int], args: tuple[Any, ...], frame_bytes: int, op: int
    ) -> int:
        """As long as something is in the way that the C helper cannot take out of it."""
        while code <= 0:
            self._engine.make_way(code, frame_bytes, op)
            code = call(*args)
        return code

    def _data(self, payload: Any) -> bytes:
        """The payload of one entry. TypeError, ValueError, PayloadTooLargeError."""
        data = payload if type(payload) is bytes else self._bytes(payload)
        if len(data) > self._max_payload_bytes:
            raise PayloadTooLargeError(f"{len(data)} bytes; max_payload_bytes is {self._max_payload_bytes}")
        return data

    def _bytes(self, payload: Any) -> bytes:
        """The payload of any other type. Copied here already: an exception would otherwise keep the
        caller's buffer exported."""
        try:
            view = memoryview(payload)
        except TypeError:
            raise TypeError(
                f"a payload is an object with the buffer protocol, not {type(payload).__name__}"
            ) from None
        if not view.c_contiguous:
            raise ValueError("a payload is C-contiguous")
        if view.nbytes > self._max_payload_bytes:
            raise PayloadTooLargeError(f"{view.nbytes} bytes; max_payload_bytes is {self._max_payload_bytes}")
        return view.tobytes()

    def sync(self) -> int:
        """Makes all that was appended before durable; returns the durable LSN. Blocks.

        PoisonedError when the sync fails; OSError when buffered entries find no space: they stay
        buffered, and sync() may be called again. ClosedError, ForkedError.
        """
        return self._engine.sync()

    # --- following --------------------------------------------------------------------------------

    def follow(
        self, from_op: int | None = None, *, timeout: float | None = None, written: bool = False
    ) -> Following:
        """The entries from `from_op` on, as they become durable, in that order: what is there, and then what
        comes. None: from the first there is. Waits for the next; ends when nothing came for `timeout` seconds
        (0: does not wait; below 0: ValueError). `written`: also what is only written, with Durability.OS and
        BUFFERED.

        Works in the writer's process and, with `readonly`, in any other, whatever the writer does: rotation,
        compaction, a crash, another life. An entry that is replaced comes again; drained ones that were not
        given yet do not come. The payloads are slices of the mapping, checked.

        Raises StaleOpError when `from_op`, or what comes next, is at or below the watermark, also where no
        entry was (a snapshot was installed); its ``first_op`` is the first that can be followed.
        TruncatedError when something already given, or below `from_op`, was removed by truncate_from(), or
        was written and lost, with the first such op. After either the iterator goes on: above the watermark,
        with what was appended since. Entries are taken up to some thousand at a time, and what was taken
        comes first: also when it was truncated meanwhile.
        CorruptionError, OSError; PoisonedError behind the last that is durable; ClosedError. Each iterator
        is for one thread at a time; there may be many."""
        first = None if from_op is None else check_op(from_op, "from_op")
        return Following(self._engine, first, timeout, written=written, owner=self)

    # --- shrinking --------------------------------------------------------------------------------

    def set_snapshot_op(self, op: int) -> None:
        """Moves the watermark: ops up to it are gone. Durable at return, constant time on the disk.

        It only grows (else ValueError) and may lie above last_op. BusyError while another shrinking
        operation is under way. OSError, ExhaustedError: nothing happened. PoisonedError, ClosedError,
        ForkedError.
        """
        removal.set_watermark(self._engine, check_op(op, low=0))

    def drain(self, first: int, last: int) -> DrainedEntries:
        """Takes the ops first .. last out, durably, all or none, and returns those that lived, by op,
        made lazily on mappings held from now on. The watermark moves to `last` only if no live op lies
        below `first`: where one does and `last` is the newest op, the next append takes `first` again, and
        a follower is given that too. ValueError when first > last; other errors as set_snapshot_op(). The
        space comes back with compact() and when no view holds the mapping."""
        first, last = check_op(first, "first"), check_op(last, "last")
        if first > last:
            raise ValueError(f"first is {first}, above last, {last}")
        return removal.drain(self._engine, self._reader, first, last)

    def truncate_from(self, op: int) -> int:
        """Removes all ops from `op` on, durably, all or none; how many lived. They never come back, and
        the ops can be appended again. ValueError at or below the watermark, which stays where it is;
        other errors as set_snapshot_op()."""
        return removal.truncate_from(self._engine, check_op(op))

    def compact(self, *, wait: bool = False) -> int:
        """Gives back the space of what is not live; bytes freed. Blocks for the disk; appends and reads
        go on. The segment that is being written keeps its size.

        At return the journal is durably without them; the files themselves go in the background, gently,
        since freeing blocks can hold up every sync on the device. `wait` returns when they are gone;
        close(), and an append that finds no space, wait for that too. BusyError, OSError (nothing
        happened), PoisonedError."""
        return compaction.compact(self._engine, wait=wait)

    def pair_snapshot(self, op: int, checksum: int) -> None:
        """Records that the snapshot of this op and checksum is the journal's, and moves the watermark to
        `op`, by one superblock. For SnapshotCoordinator; the snapshot is durable already. Errors as
        set_snapshot_op()."""
        integer("checksum", checksum, 0, 2**32 - 1)
        removal.set_watermark(self._engine, check_op(op, low=0), checksum=checksum)

    def set_user_data(self, data: bytes) -> None:
        """Keeps up to 128 bytes for the user in the superblock (a Raft term and vote), durable at return.
        ValueError when longer; OSError, ExhaustedError, BusyError (close()): nothing happened; PoisonedError,
        ClosedError, ForkedError."""
        if len(data) > fmt.USER_DATA_BYTES_MAX:
            raise ValueError(f"{len(data)} bytes of user data; at most {fmt.USER_DATA_BYTES_MAX} fit")
        self._engine.check_usable()
        refuse_reentry(self._engine.structure)
        with self._engine.structure:
            self._engine.check_usable()
            self._engine.change(replace(self._engine.superblock, user_data=bytes(data)), lambda: None)

    # --- state ------------------------------------------------------------------------------------

    def _state(self) -> Any:
        return self._engine.state()

    def __len__(self) -> int:
        return int(self._state().live)

    def __bool__(self) -> bool:
        return True

    @property
    def first_op(self) -> int | None:
        """The lowest live op."""
        return int(self._state().first_op) or None

    @property
    def last_op(self) -> int | None:
        """The highest live op."""
        return int(self._state().last_op) or None

    @property
    def snapshot_op(self) -> int:
        """The watermark: ops up to it are gone. 0: none."""
        return int(self._state().watermark)

    @property
    def remaining_capacity(self) -> int:
        """How many consecutive automatic appends would find a free slot."""
        return self._engine.remaining()

    @property
    def written_lsn(self) -> int:
        """All below it is with the kernel."""
        return int(self._state().written_lsn)

    @property
    def durable_lsn(self) -> int:
        """All below it is durable."""
        return int(self._state().durable_lsn)

    @property
    def poisoned(self) -> PoisonedError | None:
        """Why the journal refuses everything, or None."""
        return self._engine.poisoned() if self._state().poison_stage else None

    @property
    def report(self) -> RecoveryReport:
        """What opening found and did."""
        return self._engine.report

    @property
    def pairing(self) -> tuple[int, int] | None:
        """(op, checksum) of the snapshot that the superblock is paired with."""
        return self._engine.superblock.pairing

    @property
    def user_data(self) -> bytes:
        """What set_user_data() keeps."""
        return self._engine.superblock.user_data

    @property
    def slots(self) -> int:
        """How many entries can live at once, gaps in the ops counted."""
        return self._engine.superblock.slot_count

    @property
    def segment_bytes(self) -> int:
        """The size of a segment file."""
        return self._engine.superblock.segment_bytes

    @property
    def uuid(self) -> bytes:
        """16 random bytes that every file of the journal carries."""
        return self._engine.superblock.uuid

    @property
    def durability(self) -> Durability:
        """What an append has done when it returns."""
        return self._engine.options.durability

    @property
    def sync_method(self) -> SyncMethod:
        """The one in use; never AUTO."""
        return self._engine.sync_method

    def stats(self) -> JournalStats:
        """Counters and sizes at one moment. Walks the slots: about a millisecond for 65,536."""
        return take_stats(self._engine)

    @property
    def readonly(self) -> bool:
        """Whether it was opened to be read only."""
        return isinstance(self._engine, Observer)

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Checks the superblock and the segments under their names, every durable frame, the index against
        them, and the paired snapshot where recover() keeps it, while the journal goes on. Blocks while it
        reads everything. Changes nothing. A segment that the disk fails to read is a problem; OSError when a
        file cannot be opened, or another one not be read; ClosedError also when the journal is closed
        meanwhile. `readonly`: as inspect()."""
        if self.readonly:
            return inspect(self.directory, progress)
        self._engine.check_usable()
        return inspect_open(self._engine, progress)

    def backup(
        self, destination: str | os.PathLike[str] | Directory, progress: Progress | None = None
    ) -> BackupReport:
        """Copies the journal, with its paired snapshot where recover() keeps it, into a directory, made if
        missing (its parent must exist), which opens by itself: `Journal(destination)`. Has all that was
        appended before the call, and is durable at return. Appends, reads and changes of structure go on.

        Blocks are shared where the file system can (xfs, btrfs). A directory that has an earlier backup of
        this journal, opened since at most `readonly`, takes what is new; segments that are there stay. A
        crash leaves there what was there before, or the new backup.

        All that is copied is checked: CorruptionError, or SnapshotError, says what is damaged or missing.
        LockedError while another backup goes to that directory; IncompatibleFormatError when it holds another
        journal, JournalError when it was opened as a journal since, lies inside this one, or is paired with
        another snapshot of the same op (this one went on from an older copy). OSError: nothing has changed
        for who opens the directory; PoisonedError, ClosedError, ForkedError. `progress(done, total)` in
        bytes. A Directory that is given is closed. `readonly`: has what a recovery would find, also while
        another process recovers; JournalError when the journal changes faster than it can be looked at.
        """
        if self.readonly:
            return backup_in_use(self.directory, destination, progress)
        self._engine.check_usable()
        return backup_open(self._engine, destination, progress)


def _check_interval(interval_ms: float, readonly: bool, storage: Directory | None) -> None:
    if not 0 < interval_ms <= threading.TIMEOUT_MAX * 1000:
        raise ValueError(f"sync_interval_ms is above 0, and not endless; not {interval_ms}")
    if readonly:
        raise ValueError("sync_interval_ms, and readonly: there is nothing to sync")
    if storage is not None and not storage.concurrent:
        raise ValueError(f"{storage} allows no background thread: no sync_interval_ms there")


def _opened(
    directory: Directory, options: Options, verify_reads: bool, readonly: bool
) -> tuple[Engine, Reader]:
    if readonly:
        observer = Observer(directory, options)
        return observer, ObservingReader(observer, verify_reads=verify_reads)
    engine = Engine(directory, options)
    return engine, Reader(engine, verify_reads=verify_reads)


def _abandoned(engine: Engine, reader: Reader, syncing: BackgroundSync) -> None:
    if engine.forked:
        return
    syncing.cancel()
    engine.abandon(syncing.stop)
    if reader.closed is None:  # close() was not even begun
        warnings.warn(f"journal {engine.directory} was not closed", ResourceWarning, stacklevel=2)
