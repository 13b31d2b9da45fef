"""What a journal is made of, opened and held together: the superblock, the segments, the index, the
C writer, and the lock that orders every change of structure. Journal is its face."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.errors import (
    ClosedError,
    CorruptionError,
    DuplicateOpError,
    ForkedError,
    IncompatibleFormatError,
    JournalError,
    JournalFullError,
    PayloadTooLargeError,
    PoisonedError,
    StaleOpError,
)
from mmapwal.index import SlotIndex
from mmapwal.recovery import (
    REFUSED,
    RecoveryReport,
    RecoveryRow,
    Scanned,
    Stopwatch,
    decide,
    refuse,
    rewrite_unproven,
    scan_journal,
)
from mmapwal.segment import SegmentSet, make_segment
from mmapwal.storage import Directory, SyncMethod
from mmapwal.superblock import Seal, SegmentRecord, Superblock, SuperblockFile, read_superblock

__all__ = ["Durability", "Engine", "Options"]

log = logging.getLogger("mmapwal")
T = TypeVar("T")

SLOTS_DEFAULT = 65_536
SEGMENT_BYTES_DEFAULT = 16 << 20
BUFFER_BYTES = 1 << 20
STAGES = {
    lib.MW_STAGE_WRITE: "the write of a commit",
    lib.MW_STAGE_SYNC: "the sync of a commit",
    lib.MW_STAGE_WRITE_SYNC: "the write and sync of a commit",
    lib.MW_STAGE_INDEX: "a store into the index",
}


class Durability(Enum):
    """What an append has done when it returns."""

    SYNC = "sync"
    OS = "os"
    BUFFERED = "buffered"


_DURABILITY = {Durability.SYNC: lib.MW_SYNC, Durability.OS: lib.MW_OS, Durability.BUFFERED: lib.MW_BUFFERED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the caller of Journal chose; None: what the journal was made with, or the default."""

    create: bool = True
    durability: Durability = Durability.SYNC
    sync_method: SyncMethod = SyncMethod.AUTO
    slots: int | None = None
    segment_bytes: int | None = None
    align_bytes: int | None = None
    progress: Callable[[int, int], None] | None = None


class Engine:
    """One open journal. `structure` is held by whoever changes what exists; commits go on beside it."""

    def __init__(self, directory: Directory, options: Options) -> None:
        self.directory = directory
        self.options = options
        self.structure = threading.RLock()
        self.shrinking = threading.Lock()
        self.report = RecoveryReport()
        self.forked = False
        self.writer: Any = None
        self._poison: tuple[str, BaseException | None] | None = None
        self._closing = threading.Event()
        self._preparer: threading.Thread | None = None
        self.index: SlotIndex
        self.segments: SegmentSet
        if fmt.SUPERBLOCK_NAME not in directory.names():
            self._check_empty()  # before a lock file is left in a directory that is not ours
        directory.lock(fmt.LOCK_NAME)
        try:
            self._open()
        except PoisonedError as e:  # nobody has the journal yet: the failure itself says more
            self._let_go()
            raise e.__cause__ or e from None
        except BaseException:
            self._let_go()
            raise
        _engines.add(self)
        if directory.concurrent:
            self._preparer = threading.Thread(
                target=_prepare_ahead, args=(weakref.ref(self), self.writer, self._closing),
                name="mmapwal-prepare", daemon=True,
            )  # fmt: skip
            self._preparer.start()

    # --- opening ----------------------------------------------------------------------------------

    def _open(self) -> None:
        watch = Stopwatch(self.report.seconds)
        superblock = read_superblock(self.directory)
        if superblock is None:
            superblock = self._create()
            created = True
        else:
            created = False
            self._file = SuperblockFile(self.directory, superblock)
        self._check_sizes(superblock)
        method = self.options.sync_method
        self.sync_method = self.directory.best_sync_method() if method is SyncMethod.AUTO else method
        self.segments = SegmentSet(self.directory, superblock.uuid, superblock.segments)
        for segment in self.segments.table.segments:
            segment.check()
        index = SlotIndex.open(self.directory, superblock.uuid, superblock.slot_count)
        watch.lap("superblock")
        seal = superblock.seal
        if seal is not None and index is not None and index.crc() == seal.index_crc:
            self.index = index
            watch.lap("index")
            row = self.segments.table.row(seal.lsn)
            found = Scanned(None, seal.lsn, seal.link, row, proven_lsn=seal.lsn)
            self.report.outcome = RecoveryRow.SEALED
        else:
            durable = 0 if index is None else index.progress()[1]
            found = scan_journal(self.segments.table, superblock, durable, self.options.progress)
            self.report.outcome = decide(found.finding)
            watch.lap("scan")
            if self.report.outcome in REFUSED:
                raise refuse(self.report.outcome, found, self.segments.table)
        self._settle(superblock, found, index, watch)
        if created:
            self.report.outcome = RecoveryRow.CREATED
        self._start_writer(found, seal if self.report.outcome is RecoveryRow.SEALED else None)
        self._remove_strangers()
        watch.lap("writer")

    def _check_empty(self) -> None:
        """Whether a journal may be made here."""
        names = [n for n in self.directory.names() if n not in {fmt.LOCK_NAME, fmt.SUPERBLOCK_SPARE_NAME}]
        if any(fmt.is_ours(n) or n == fmt.INDEX_NAME for n in names):
            raise CorruptionError(
                fmt.SUPERBLOCK_NAME, 0, 0, None, "it is gone, but segments or index are there"
            )
        if not self.options.create:
            raise FileNotFoundError(errno.ENOENT, "no journal here", str(self.directory))
        strangers = [n for n in names if n != fmt.SNAPSHOTS_NAME]
        if strangers:
            raise JournalError(f"{self.directory} holds something else: {', '.join(strangers[:3])}")

    def _create(self) -> Superblock:
        self._check_empty()
        superblock = Superblock(
            uuid=os.urandom(16),
            slot_count=self.options.slots or SLOTS_DEFAULT,
            segment_bytes=self.options.segment_bytes or SEGMENT_BYTES_DEFAULT,
            align_bytes=self.options.align_bytes or 0,
            sequence=0,
        )
        self.directory.sync_parent()
        self._file = SuperblockFile(self.directory, superblock)
        self._file.commit(superblock)
        return self._file.current

    def _check_sizes(self, superblock: Superblock) -> None:
        for name, wanted, is_ in (
            ("slots", self.options.slots, superblock.slot_count),
            ("segment_bytes", self.options.segment_bytes, superblock.segment_bytes),
            ("commit_align_bytes", self.options.align_bytes, superblock.align_bytes),
        ):
            if wanted is not None and wanted != is_:
                raise IncompatibleFormatError(f"{self.directory} was made with {name}={is_}, not {wanted}")

    def _settle(
        self, superblock: Superblock, found: Scanned, index: SlotIndex | None, watch: Stopwatch
    ) -> None:
        """Makes what was found the truth: the superblock durable, the tail proven, a new epoch there."""
        records = superblock.segments
        if found.slots is not None:
            # The superblock that was read may not have been durable: nothing is written before one is.
            self._file.commit(superblock)
            self.directory.sync_parent()
            self._remove_strangers()
            renewed, written = rewrite_unproven(self.directory, self.segments.table, superblock, found)
            self.report.rewritten_bytes = written
            records = tuple(
                replace(renewed.get(r.id, r), end_lsn=found.ends.get(r.id, r.end_lsn)) for r in records
            )
            watch.lap("rewrite")
        kept = [r for r in records if r.base_lsn <= found.tail_lsn]
        if self.report.outcome in {RecoveryRow.SEALED, RecoveryRow.CLEAN}:
            kept = list(records[: len(kept) + 1])  # the one prepared ahead is still blank
        self._file.commit(replace(superblock, segments=tuple(kept)).with_epoch(found.tail_lsn))
        if found.slots is None:
            self.directory.sync_parent()
        self.segments.follow(self._file.current.segments)
        watch.lap("epoch")
        self.index = index or SlotIndex.create(self.directory, superblock.uuid, superblock.slot_count)
        if found.slots is not None:
            self.index.fill(found.slots)
            found.slots = None
        report = self.report
        report.frames, report.entries, report.scanned_bytes = found.frames, found.entries, found.scanned_bytes
        report.tail_lsn, report.proven_lsn = found.tail_lsn, found.proven_lsn
        report.cut_bytes = found.stop_lsn - found.tail_lsn + found.torn_bytes if found.stop_lsn else 0
        watch.lap("index")

    def _start_writer(self, found: Scanned, seal: Seal | None) -> None:
        superblock = self._file.current
        summary = (seal.live, seal.first_op, seal.last_op) if seal is not None else self.index.summary()
        config = ffi.new(
            "struct mw_config *",
            {
                "summary": summary, "page": self.index.page, "slots": self.index.slots,
                "slot_count": superblock.slot_count,
                "watermark": superblock.watermark, "lsn": found.tail_lsn, "buffer_bytes": BUFFER_BYTES,
                "epoch": superblock.epoch, "link": found.link, "align_bytes": superblock.align_bytes,
                "durability": _DURABILITY[self.options.durability],
                "separate_sync": self.sync_method is SyncMethod.FDATASYNC,
            },
        )  # fmt: skip
        writer = lib.mw_writer_new(config)
        if writer == ffi.NULL:
            raise OSError(errno.EIO, "the index cannot be read", fmt.INDEX_NAME)
        self.writer = ffi.gc(writer, lib.mw_writer_free)
        # overlayfs copies a file up when it is opened for writing; a mapping made before keeps showing
        # the lower one. So what is written from now on is mapped through the descriptor that writes.
        self.segments.unmap(found.tail_lsn)
        for record in superblock.segments:
            if record.next_base_lsn > found.tail_lsn:
                self._add_target(record)

    def _add_target(self, record: SegmentRecord) -> None:
        segment = self.segments.by_id(record.id)
        if segment is None:
            raise JournalError(f"{record.name} is not open")
        io = segment.start_writing(self.sync_method)
        target = ffi.new(
            "struct mw_target *",
            {"id": record.id, "base_lsn": record.base_lsn, "capacity": record.capacity, "io": io,
             "salt": segment.salt},
        )  # fmt: skip
        rc = lib.mw_writer_add_target(self.writer, target)
        if rc < 0:
            raise OSError(-rc, "too many segments under way", record.name)

    def _remove_strangers(self) -> None:
        """Files of our own names that the superblock does not name. A failed unlink is no matter."""
        named = {r.name for r in self._file.current.segments}
        removed = [n for n in self.directory.names() if fmt.is_ours(n) and n not in named]
        self.report.removed_files += tuple(self.remove_files(removed))

    # --- state ------------------------------------------------------------------------------------

    @property
    def superblock(self) -> Superblock:
        return self._file.current

    def state(self) -> Any:
        """The writer's counters at one moment (struct mw_state)."""
        out = ffi.new("struct mw_state *")
        if lib.mw_writer_state(self.writer, out) != 0:
            raise ForkedError("the writer belongs to the parent process")
        return out

    def check_usable(self) -> None:
        """ForkedError, ClosedError or PoisonedError."""
        state = self.state()
        if state.closed:
            raise ClosedError("the journal is closed")
        if state.poison_stage:
            raise self.poisoned()

    # --- errors -----------------------------------------------------------------------------------

    def poison(self, stage: str, cause: BaseException | None) -> None:
        if self._poison is None:
            self._poison = (stage, cause)
        if self.writer is not None:
            code = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
            lib.mw_writer_poison(self.writer, -code)

    def poisoned(self) -> PoisonedError:
        """A new error each time, with the first cause."""
        if self._poison is None:
            state = self.state()
            cause: BaseException | None = next(
                (e for s in self.segments.table.segments if (e := s.take_error()) is not None), None
            )
            if cause is None:
                segment = self.segments.by_id(state.tail_id)
                name = segment.record.name if segment is not None else None
                cause = OSError(state.poison_errno, os.strerror(state.poison_errno), name)
            self._poison = (STAGES.get(state.poison_stage, "an unknown stage"), cause)
        error = PoisonedError(self._poison[0])
        error.__cause__ = self._poison[1]
        return error

    def error(self, code: int, op: int | None = None) -> Exception:
        """What a result of the C helper is called in Python."""
        what = f"op {op}" if op else "the op"
        watermark = self._file.current.watermark
        match code:
            case lib.MW_E_POISONED:
                return self.poisoned()
            case lib.MW_E_DUPLICATE:
                return DuplicateOpError(f"{what} is live already")
            case lib.MW_E_STALE:
                return StaleOpError(f"{what} is at or below the watermark {watermark}")
            case lib.MW_E_FULL:
                return JournalFullError(
                    f"the slot of {what} still holds another op above the watermark {watermark}"
                )
            case lib.MW_E_BAD_OP:
                return ValueError(f"an op is 1 .. {fmt.OP_MAX}")
            case lib.MW_E_BAD_KIND:
                return ValueError(f"a kind is 0 .. {fmt.KIND_MAX}")
            case lib.MW_E_TOO_LARGE:
                return PayloadTooLargeError("too large for a segment")
            case lib.MW_E_CLOSED:
                return ClosedError("the journal is closed")
            case lib.MW_E_FORKED:
                return ForkedError("the writer belongs to the parent process")
            case lib.MW_E_CORRUPT:
                return CorruptionError("?", 0, 0, op, "a frame does not verify")
        segment = self.segments.by_id(self.state().tail_id)
        return OSError(-code, os.strerror(-code), segment.record.name if segment is not None else None)

    # --- changes of structure ---------------------------------------------------------------------

    def change(self, new: Superblock, apply: Callable[[], T]) -> T:
        """Commits `new`, then lets memory follow by `apply`. The caller holds `structure`.

        OSError: nothing has happened. Any exception after the commit began poisons the journal, since
        memory and disk may differ then.
        """
        before = self._file.current
        try:
            self._file.commit(new)
            self.segments.follow(self._file.current.segments)
            result = apply()
        except PoisonedError as e:
            self.poison(e.stage, e.__cause__)
            raise self.poisoned() from e.__cause__
        except BaseException as e:
            if self._file.current is before and not self._file.in_doubt:
                raise
            self.poison("taking over the new superblock", e)
            raise self.poisoned() from e
        return result

    def remove_files(self, names: Iterable[str]) -> list[str]:
        """Unlinks what no superblock names. What fails is tried again at the next open; so is all of it
        while nobody knows which superblock is in force."""
        if self._file.in_doubt:
            return []
        removed = []
        for name in names:
            try:
                self.directory.unlink(name)
                removed.append(name)
            except OSError as e:
                log.info("%s could not be removed: %s", name, e)
        return removed

    def tail_reserve(self) -> int:
        """What stays free behind the last entry of a segment (stage.c's tail_reserve)."""
        align = self.superblock.align_bytes
        return fmt.FRAME_BYTES + (align + fmt.FRAME_BYTES if align else 0)

    def prepare_segment(self, need_bytes: int = 0) -> None:
        """Makes sure that a segment with room for `need_bytes` of frames is ready. Blocks for the disk.

        OSError: there is no room; the journal is as it was.
        """
        with self.structure:
            self.check_usable()
            if self.state().target_room == 0:
                self.flush()
            state, superblock = self.state(), self.superblock
            need = need_bytes + self.tail_reserve() if need_bytes else 0
            if need and state.stage_room >= need:
                return
            prepared = superblock.segments[-1] if state.targets else None
            if prepared is not None and prepared.capacity >= need:
                return
            capacity = max(superblock.segment_bytes - fmt.PAGE_BYTES, need + -need % fmt.PAGE_BYTES)
            base = prepared.base_lsn if prepared is not None else superblock.next_base_lsn
            record = SegmentRecord(superblock.next_segment_id, base, capacity)
            make_segment(self.directory, superblock.uuid, record)
            self._name_segment(record, prepared)
            self.segments.bound_mappings()

    def _name_segment(self, record: SegmentRecord, prepared: SegmentRecord | None) -> None:
        """Lets the superblock name a segment that was made, in the place of one too small if there is."""
        dropped = False
        try:
            kept = [r for r in self._with_ends() if r != prepared]
            new = replace(self.superblock, segments=(*kept, record), next_segment_id=record.id + 1)
            if prepared is not None:
                dropped = lib.mw_writer_drop_target(self.writer) == 0
                if not dropped:  # it was begun meanwhile
                    self.remove_files([record.name])
                    return
            self.change(new, lambda: self._add_target(record))
        except BaseException as e:
            named = {r.name for r in self.superblock.segments}
            if dropped and prepared is not None and prepared.name in named and not self._file.in_doubt:
                self._put_back(prepared, e)
            if record.name not in named:
                self.remove_files([record.name])
            raise
        if prepared is not None:
            self.remove_files([prepared.name])

    def _put_back(self, prepared: SegmentRecord, reason: BaseException) -> None:
        """The superblock still names it, so the writer must have it, or the next would leave a hole."""
        try:
            self._add_target(prepared)
        except BaseException:
            self.poison("putting a prepared segment back", reason)
            raise

    def _with_ends(self) -> list[SegmentRecord]:
        """The segments, with the ends that have become durable; those that were left are closed."""
        tail_id = self.state().tail_id
        records = []
        for record in self.superblock.segments:
            if record.end_lsn == 0 and record.id < tail_id:
                end = lib.mw_writer_ended(self.writer, record.id)
                if end > 0:
                    record = replace(record, end_lsn=end)  # noqa: PLW2901
                segment = self.segments.by_id(record.id)
                if segment is not None:
                    segment.stop_writing()
            records.append(record)
        return records

    def rotate(self) -> None:
        """Leaves the present segment, so that it can be compacted. Nothing when it is empty."""
        with self.structure:
            while True:
                state = self.state()
                record = next((r for r in self.superblock.segments if r.id == state.stage_id), None)
                if record is None or state.stage_room == record.capacity:
                    return
                self.prepare_segment()
                rc = lib.mw_writer_rotate(self.writer)
                if rc == 0:
                    return
                if rc == lib.MW_E_NEED_EPOCH:
                    self.start_epoch()
                elif rc != lib.MW_E_NEED_SEGMENT:
                    raise self.error(rc)

    def start_epoch(self) -> None:
        """After a write that failed cleanly: what lies behind the tail shall never come back."""
        with self.structure:
            if not self.state().epoch_owed:
                return
            rc = lib.mw_sync(self.writer, lib.MW_SYNC_CLOSING)
            if rc != 0:
                raise self.error(rc)
            new = self.superblock.with_epoch(self.state().written_lsn)
            self.change(new, lambda: lib.mw_writer_set_epoch(self.writer, new.epoch))

    def sync(self) -> int:
        """Makes all that was appended durable; the durable LSN."""
        self._run(lambda: lib.mw_sync(self.writer, lib.MW_SYNC_STAGED))
        return int(self.state().durable_lsn)

    def flush(self, below_lsn: int = 2**64 - 1) -> None:
        """Hands what is staged below the LSN to the kernel."""
        self._run(lambda: lib.mw_flush(self.writer, below_lsn))

    def _run(self, call: Callable[[], int]) -> None:
        rc = call()
        if rc == lib.MW_E_NEED_EPOCH:
            self.start_epoch()
            rc = call()
        if rc < 0:
            raise self.error(rc)

    # --- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Syncs, seals, lets go. The first failure of the sync is raised after everything is let go."""
        if self.forked or self._closing.is_set():
            return
        try:
            with self.structure:
                if self._closing.is_set():
                    return
                self._closing.set()
                lib.mw_writer_close(self.writer)
                if not self.state().poison_stage:
                    self._run(lambda: lib.mw_sync(self.writer, lib.MW_SYNC_STAGED | lib.MW_SYNC_CLOSING))
                    self._seal()
        finally:
            self._let_go()

    def _seal(self) -> None:
        """A seal saves the next open a scan; without one nothing is lost, so a failure is only told."""
        try:
            state = self.state()
            self.index.sync()
            seal = Seal(
                lsn=int(state.written_lsn), link=int(state.link), index_crc=self.index.crc(),
                live=int(state.live), first_op=int(state.first_op), last_op=int(state.last_op),
            )  # fmt: skip
            new = replace(self.superblock, seal=seal, segments=tuple(self._with_ends()))
            self.change(new, lambda: None)
        except (OSError, JournalError) as e:
            log.warning("%s was closed without a seal, the next open will scan: %s", self.directory, e)

    def _let_go(self) -> None:
        self._closing.set()
        if self._preparer is not None and self._preparer is not threading.current_thread():
            self._preparer.join()
        if hasattr(self, "segments"):
            for segment in self.segments.table.segments:
                segment.stop_writing()
        if hasattr(self, "index"):
            self.index.close()
        if hasattr(self, "_file"):
            self._file.close()
        self.directory.close()

    def abandon(self) -> None:
        """Garbage collected without close(): nothing is synced, as after a kill."""
        if not self.forked and not self._closing.is_set() and self.writer is not None:
            self._closing.set()
            lib.mw_writer_close(self.writer)
            self.directory.close()

    def in_child(self) -> None:
        """After a fork: the writer is the parent's."""
        self.forked = True
        if self.writer is not None:
            lib.mw_writer_fork(self.writer)
        self.directory.after_fork()


def _prepare_ahead(ref: weakref.ref[Engine], writer: Any, closing: threading.Event) -> None:
    """Runs in the background: makes the next segment when the present one is half full."""
    pause = 0.02
    while lib.mw_writer_wait_wanted(writer) == 1 and not closing.is_set():
        engine = ref()
        if engine is None:
            return
        try:
            engine.prepare_segment()
            pause = 0.02
        except (OSError, JournalError) as e:
            # Whoever needs the segment tries again and gets the error.
            log.info("preparing a segment failed: %s", e)
            del engine
            closing.wait(pause)
            pause = min(pause * 2, 1.0)


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for engine in list(_engines):
        with contextlib.suppress(OSError):
            engine.in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
