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
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.aside import uninterrupted
from mmapwal.disposal import Disposal
from mmapwal.errors import (
    BusyError,
    ClosedError,
    DuplicateOpError,
    ExhaustedError,
    ForkedError,
    JournalError,
    JournalFullError,
    PayloadTooLargeError,
    PoisonedError,
    StaleOpError,
)
from mmapwal.opening import Durability, Opening, Options, check_empty
from mmapwal.page import ProgressPage
from mmapwal.preparing import NO_SPACE, Preparer
from mmapwal.recovery import Scanned
from mmapwal.segment import SegmentTable
from mmapwal.storage import Directory, SyncMethod
from mmapwal.superblock import Seal, SegmentRecord, Superblock
from mmapwal.threads import start_thread
from mmapwal.turn import Turn, refuse_reentry

__all__ = ["Durability", "Engine", "Options"]

log = logging.getLogger("mmapwal")
T = TypeVar("T")

ABANDON_WAIT_S = 2.0
BUFFER_BYTES = 128 << 10  # two of them fit into a processor's own cache
STAGES = {
    lib.MW_STAGE_WRITE: "the write of a commit",
    lib.MW_STAGE_SYNC: "the sync of a commit",
    lib.MW_STAGE_WRITE_SYNC: "the write and sync of a commit",
    lib.MW_STAGE_INDEX: "a store into the index",
}
_DURABILITY = {Durability.SYNC: lib.MW_SYNC, Durability.OS: lib.MW_OS, Durability.BUFFERED: lib.MW_BUFFERED}


class Engine:
    """One open journal. `structure` is held by whoever changes what exists; commits go on beside it."""

    def __init__(self, directory: Directory, options: Options) -> None:
        self.directory = directory
        self.options = options
        self.structure = threading.RLock()
        self.shrinking = Turn()
        self.forked = False
        self.writer: Any = None
        self._poisons: list[tuple[str, BaseException | None]] = []  # the first one counts
        self._poison_told = False
        self._poison_guard = threading.RLock()
        self._settled = False  # closed as far as the files go
        self.closed = False  # and all is let go
        self._preparer = Preparer(self)
        self.disposal = Disposal(directory)
        if fmt.SUPERBLOCK_NAME not in directory.names():
            check_empty(directory, options)  # before a lock file is left where no journal may be
        self.hear_of_forks()  # also one during a long recovery must let go of the lock
        directory.lock(fmt.LOCK_NAME)
        opening = Opening(directory, options)
        try:
            self._open(opening)
        except BaseException as e:
            opening.let_go()
            self._let_go()
            if isinstance(e, PoisonedError):  # nobody has the journal yet: the failure itself says more
                raise e.__cause__ or e from None
            raise

    def start_preparing(self) -> None:
        """Segments are made ahead from now on, where the directory allows threads."""
        if self.directory.concurrent:
            self._preparer.start(self.writer)

    def _open(self, opening: Opening) -> None:
        opening.run()
        self.report, self.sync_method = opening.report, opening.sync_method
        self._file, self.segments, self.index = opening.file, opening.segments, opening.index
        self.read_segments = self.segments  # those that the slots of the index are of
        self._start_writer(opening.found, opening.summary)
        opening.remove_strangers()
        opening.watch.lap("writer")

    def _start_writer(self, found: Scanned, summary: tuple[int, int, int]) -> None:
        superblock = self._file.current
        config = ffi.new(
            "struct mw_config *",
            {
                "summary": summary, "page": self.index.page, "slots": self.index.slots,
                "slot_count": superblock.slot_count,
                "watermark": superblock.watermark, "lsn": found.tail_lsn, "buffer_bytes": BUFFER_BYTES,
                "epoch": superblock.epoch, "link": found.link, "align_bytes": superblock.align_bytes,
                "durability": _DURABILITY[self.options.durability],
                "superblock_sequence": superblock.sequence,
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
                self.add_target(record)

    def add_target(self, record: SegmentRecord) -> None:
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

    def remaining(self) -> int:
        """How many consecutive automatic appends would find a free slot."""
        left = lib.mw_writer_remaining(self.writer)
        if left < 0:
            raise self.error(left)
        return int(left)

    # --- for followers (following.Followed) ---------------------------------------------------------

    def look(self) -> bool:
        if self._settled:
            raise ClosedError("the journal is closed")
        return True

    def look_again(self, table: SegmentTable) -> bool:
        with self.structure:
            return self.segments.table is not table

    def look_anew(self) -> bool:
        return False

    def follow_page(self) -> ProgressPage | None:
        return self.index.published

    def published(self) -> tuple[int, int]:
        return self.index.progress()

    def check_followed(self) -> None:
        self.check_usable()

    # --- errors -----------------------------------------------------------------------------------

    def poison(self, stage: str, cause: BaseException | None) -> None:
        self._mark_poisoned(stage, cause)
        self._tell_poison()

    def _mark_poisoned(self, stage: str, cause: BaseException | None) -> None:
        if not self._poisons:
            self._poisons.append((stage, cause))
        if self.writer is not None:
            code = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
            lib.mw_writer_poison(self.writer, -code)

    def _tell_poison(self) -> tuple[str, BaseException | None]:
        """The first failure; logged once. It is kept as long as the journal, so without its frames."""
        with self._poison_guard:  # the first who asks takes the cause, for all
            if not self._poisons:
                self._poisons.append(self._poison_of_writer())
            stage, cause = self._poisons[0]
            told, self._poison_told = self._poison_told, True
        if not told:
            log.error("the journal is poisoned by a failure in %s", stage, exc_info=cause)
        return stage, cause.with_traceback(None) if cause is not None else None

    def _poison_of_writer(self) -> tuple[str, BaseException]:
        """What ended it in C."""
        state = self.state()
        stage = STAGES.get(state.poison_stage, "an unknown stage")
        for segment in self.segments.table.segments:
            if (cause := segment.take_error()) is not None:
                return stage, cause
        tail = self.segments.by_id(state.tail_id)
        name = tail.record.name if tail is not None else None
        return stage, OSError(state.poison_errno, os.strerror(state.poison_errno), name)

    def poisoned(self) -> PoisonedError:
        """A new error each time, with the first cause."""
        stage, cause = self._tell_poison()
        error = PoisonedError(stage)
        error.__cause__ = cause
        return error

    def error(self, code: int, op: int | None = None) -> Exception:
        """What a result of the C helper is called in Python."""
        what = f"op {op}" if op else "the op"
        watermark = self.superblock.watermark
        match code:
            case lib.MW_E_POISONED:
                return self.poisoned()
            case lib.MW_E_DUPLICATE:
                return DuplicateOpError(f"{what} is live already")
            case lib.MW_E_STALE:
                return StaleOpError(f"{what} is at or below the watermark {watermark}")
            case lib.MW_E_FULL:
                full = f"the slot of {what} holds another op above the watermark {watermark}"
                return JournalFullError(f"{full}: a checkpoint, or set_snapshot_op(), frees slots")
            case lib.MW_E_BAD_OP if not op:
                return ExhaustedError(f"the journal cannot go on: op {fmt.OP_MAX} is the last")
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
        if code <= lib.MW_E_DUPLICATE:
            return JournalError(f"unexpected result {code} of the C helper")
        for segment in self.segments.table.segments:
            segment.take_error()  # told here; not to be taken for the cause of a later poison
        tail = self.segments.by_id(self.state().tail_id)
        return OSError(-code, os.strerror(-code), tail.record.name if tail is not None else None)

    # --- changes of structure ---------------------------------------------------------------------

    def change(self, new: Superblock, apply: Callable[[], T]) -> T:
        """Commits `new`, then lets memory follow by `apply`, which takes no lock that the caller may hold.
        The caller holds `structure`.

        OSError, BusyError: nothing has happened. Any exception after the commit began poisons the journal,
        since memory and disk may differ then. A signal handler's comes before it or behind it, where the
        directory allows threads.
        """
        if self._settled:
            raise ClosedError("the journal is closed")
        if self.state().poison_stage:
            raise self.poisoned()
        if new.sequence != self.superblock.sequence:
            raise BusyError("another change came into this one; nothing has happened")
        work: Callable[[], T] = partial(self._change, new, apply)
        if self.directory.concurrent:
            work = partial(uninterrupted, work)
        with contextlib.suppress(PoisonedError):  # told below, with the first cause
            try:
                return work()
            except OSError as e:
                if not self.made_room(e):
                    raise
            return work()
        raise self.poisoned()

    def _change(self, new: Superblock, apply: Callable[[], T]) -> T:
        """Nothing in here logs, or takes a lock that the main thread may hold while it waits for this."""
        before = self._file.current
        try:
            self._file.commit(new)
            self.segments.follow(self._file.current.segments)
            self._note_superblock()  # before frames come that only the new one has a segment for
            result = apply()
        except BaseException as e:
            if self._file.current is before and not self._file.in_doubt:
                raise
            stage, cause = "taking over the new superblock", e
            if isinstance(e, PoisonedError):
                stage, cause = e.stage, e.__cause__ or e
            self._mark_poisoned(stage, cause)
            raise PoisonedError(stage) from cause
        return result

    def _note_superblock(self) -> None:
        """Tells followers, in this process and others, that there is another one to read. OSError."""
        rc = lib.mw_writer_note_superblock(self.writer, self.superblock.sequence)
        if rc < 0:
            raise OSError(-rc, "a store into the index failed", fmt.INDEX_NAME)

    def made_room(self, error: OSError) -> bool:
        """Whether to try once more on a full disk: what is only made ahead or on its way out is gone now, and
        may have gone since the error. Without threads there is no such thing."""
        if is_full := error.errno in NO_SPACE and self.directory.concurrent:
            self._preparer.give_back()
            self.disposal.wait()
        return is_full

    def remove_files(self, names: Iterable[str]) -> list[str]:
        """Unlinks what no superblock names (SuperblockFile.remove_files), at once: the names may come
        again."""
        return self._file.remove_files(names)

    def dispose(self, names: Iterable[str]) -> None:
        """The same in the background, for files that a superblock has named: their names never come
        again. After the change that no longer names them."""
        if not self._file.in_doubt:
            self.disposal.add(names)

    @property
    def in_doubt(self) -> bool:
        """Nobody knows which superblock is in force."""
        return self._file.in_doubt

    def tail_reserve(self) -> int:
        """What stays free behind the last entry of a segment (stage.c's tail_reserve)."""
        align = self.superblock.align_bytes
        return fmt.FRAME_BYTES + (align + fmt.FRAME_BYTES if align else 0)

    def prepare_segment(self, need_bytes: int = 0) -> None:
        """Makes sure that a segment with room for `need_bytes` of frames is ready. Blocks for the disk.

        OSError: there is no room; the journal is as it was.
        """
        self._preparer.prepare(self, need_bytes)

    def records_with_ends(self) -> list[SegmentRecord]:
        """The segments, with the ends that have become durable. Closes those that were left; under
        `structure`."""
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
            if self._settled:
                raise ClosedError("the journal is closed")
            if not self.state().epoch_owed:
                return
            rc = lib.mw_sync(self.writer, lib.MW_SYNC_CLOSING)
            if rc != 0:
                raise self.error(rc)
            new = self.superblock.with_epoch(self.state().written_lsn)
            self.change(new, lambda: lib.mw_writer_set_epoch(self.writer, new.epoch))

    OBSTACLES = frozenset((lib.MW_E_NEED_SEGMENT, lib.MW_E_NEED_EPOCH, lib.MW_E_BARRIER))
    """Results of an append that make_way() takes out of the way."""

    def make_way(self, code: int, frame_bytes: int, op: int) -> None:
        """Does what the C helper cannot do by itself before an append of `frame_bytes` is staged: a segment,
        an epoch, waiting for a removal. Any other result is raised as the error that it is. Blocks."""
        if code in self.OBSTACLES:
            refuse_reentry(self.structure)
        if code == lib.MW_E_NEED_SEGMENT:
            self.prepare_segment(frame_bytes)
        elif code == lib.MW_E_NEED_EPOCH:
            self.start_epoch()
            if self.options.durability is Durability.BUFFERED:
                self.flush()
        elif code == lib.MW_E_BARRIER:
            with self.structure:
                pass
        else:
            self.pay_epoch()
            raise self.error(code, op)

    def pay_epoch(self) -> None:
        """Called by who is told that a write failed cleanly: nothing of it shall come back after a crash,
        not even before the next write. Where the superblock cannot be replaced it stays owed."""
        if self.options.durability is not Durability.BUFFERED and self.state().epoch_owed:
            try:
                self.start_epoch()
            except (OSError, ExhaustedError) as e:
                log.info("the epoch after a failed write has to wait: %s", e)

    def sync(self) -> int:
        """Makes all that was appended durable; the durable LSN."""
        self._run(lambda: lib.mw_sync(self.writer, lib.MW_SYNC_STAGED))
        return int(self.state().durable_lsn)

    def flush(self, below_lsn: int = 2**64 - 1) -> None:
        """Hands what is staged below the LSN to the kernel."""
        self._run(lambda: lib.mw_flush(self.writer, below_lsn))

    def _run(self, call: Callable[[], int]) -> None:
        while (rc := call()) == lib.MW_E_NEED_EPOCH:
            self.start_epoch()
        if rc < 0:
            raise self.error(rc)

    # --- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Syncs, seals, lets go. The failure of the sync is raised after everything is let go. An
        interrupted close can be called again: it goes on where it was."""
        if self.forked or self.closed:
            return
        failure: Exception | None = None
        with self.shrinking.hold(wait=True):  # a compaction ends first; it works outside `structure`
            with self.structure:
                if not self._settled:
                    failure = self._settle_files()
                    self._settled = True
            self._let_go()
        if failure is not None:
            raise failure

    def _settle_files(self) -> Exception | None:
        self._preparer.closing()
        lib.mw_writer_close(self.writer)
        try:
            if not self.state().poison_stage:
                self._run(lambda: lib.mw_sync(self.writer, lib.MW_SYNC_STAGED | lib.MW_SYNC_CLOSING))
                self._seal()
        except (OSError, JournalError) as e:
            return e
        return None

    def _seal(self) -> None:
        """A seal saves the next open a scan; without one nothing is lost, so a failure is only told."""
        try:
            state = self.state()
            self.index.sync()
            seal = Seal(
                lsn=int(state.written_lsn), link=int(state.link), index_crc=self.index.crc(),
                live=int(state.live), first_op=int(state.first_op), last_op=int(state.last_op),
            )  # fmt: skip
            superblock = self.superblock
            if state.epoch_owed:  # or what failed before would be a frame again where the seal is lost
                superblock = superblock.with_epoch(seal.lsn)
            new = replace(superblock, seal=seal, segments=tuple(self.records_with_ends()))
            self.change(new, lambda: None)
        except (OSError, JournalError) as e:
            log.warning("%s was closed without a seal, the next open will scan: %s", self.directory, e)

    def _let_go(self) -> None:
        self._preparer.closing()
        if self.writer is not None:
            lib.mw_writer_close(self.writer)  # from here on it touches no file
            lib.mw_committer_stop(self.writer)
        self._preparer.stop()
        self.disposal.wait()
        steps: list[Callable[[], None]] = []
        if hasattr(self, "segments"):
            steps += (s.stop_writing for s in self.segments.table.segments)
        if hasattr(self, "index"):
            steps += (self.index.close, self._file.close)
        for step in (*steps, self.directory.close):
            try:
                step()
            except OSError as e:  # all that was promised is synced by now
                log.info("closing %s: %s", self.directory, e)
        self.closed = True

    def abandon(self, others_end: Callable[[], None]) -> None:
        """Garbage collected without close(): nothing is synced, as after a kill. The lock is free when no
        thread is at work any more, or it would go on in the files of the next owner; `others_end` waits for
        those that are not the engine's. This waits for it, but not for ever: the collector runs anywhere,
        also where its thread holds a lock that the work needs."""
        if self.forked or self.closed or self.writer is None:
            return
        self._preparer.closing()
        at_work = threading.current_thread().name.startswith("mmapwal-")  # maybe within a commit
        dropping = None
        if self.directory.concurrent:
            with contextlib.suppress(OSError):  # no thread can be had
                dropping = start_thread("abandon", self._drop, others_end)
        if not at_work and dropping is not None:
            dropping.join(ABANDON_WAIT_S)
        elif not at_work:
            self._drop(others_end)

    def _drop(self, others_end: Callable[[], None]) -> None:
        lib.mw_writer_close(self.writer)
        lib.mw_committer_stop(self.writer)
        self._preparer.stop()
        others_end()
        self.disposal.stop()
        self.directory.close()

    def hear_of_forks(self) -> None:
        """in_child() is called from now on."""
        _engines.add(self)

    def in_child(self) -> None:
        """After a fork: the writer is the parent's."""
        self.forked = True
        self.structure = threading.RLock()  # one of the parent's threads may have held it
        if self.writer is not None:
            lib.mw_writer_fork(self.writer)
        self.directory.after_fork()


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for engine in list(_engines):
        with contextlib.suppress(OSError):
            engine.in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
