"""A journal that another process writes, or nobody: looked at without its lock, changing none of its facts.

All that is believed of it are the superblock, the frames below what is durable, and the progress that the
index page publishes. The slots of the index are the writer's: a recovery may be filling them. Whoever reads
by op gets slots of his own, made of the frames at the first such read and kept up from then on.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.columns import Room
from mmapwal.engine import Engine, Options
from mmapwal.errors import ClosedError, CorruptionError, JournalError, MissingOpError, ReadonlyError
from mmapwal.index import SlotIndex, published_page
from mmapwal.opening import check_sizes, refuse_strangers
from mmapwal.page import ProgressPage
from mmapwal.reader import Reader
from mmapwal.recovery import RecoveryReport, RecoveryRow
from mmapwal.segment import Segment, SegmentSet, SegmentTable
from mmapwal.storage import Directory, FileStorage, MemoryDirectory, SyncMethod
from mmapwal.superblock import Superblock, read_superblock
from mmapwal.walking import Walk

__all__ = ["Observer", "ObservingReader"]

LOOK_S = 0.5  # so often the index is looked for under its name: it may be another file by now
LOOKS = 100  # at a superblock whose segments are gone again when they are looked for
FRAME_ROWS = 4096
_NOBODY = Superblock(
    uuid=bytes(16), slot_count=1, segment_bytes=fmt.SEGMENT_BYTES_MIN, align_bytes=0, sequence=0
)


class Observer(Engine):
    """What an engine is to readers and followers; to all others it says ReadonlyError."""

    def __init__(self, directory: Directory, options: Options) -> None:
        if getattr(directory, "_storage", None) is FileStorage:
            raise ValueError("FileStorage shows nothing of what others write: readonly is by mapping")
        self.directory = directory
        self.options = options
        self.structure = threading.RLock()
        self.forked = self.closed = False
        self.hear_of_forks()
        self.report = RecoveryReport(RecoveryRow.OBSERVED)
        self.sync_method = SyncMethod.FDATASYNC
        self.segments = SegmentSet(directory, _NOBODY.uuid, ())
        self._superblock = _NOBODY
        self._proven = (_NOBODY, 0)  # how far that proves; of many segments it takes a while to tell
        self._page: ProgressPage | None = None
        self._page_at = float("-inf")
        self._page_file: object = None  # which it is in
        self._limit = 0
        self._slots_at = 0  # below it, the slots have what the frames say
        self._slots_of = _NOBODY  # the superblock as of which
        self._slots_seen: tuple[ProgressPage | None, int | None] = (None, None)  # and a page, and its word
        # Those that the slots are of: a follower in another thread may have taken over a newer superblock.
        self.read_segments = SegmentSet(directory, _NOBODY.uuid, ())
        self.index = self._blank = _private_index(1)
        self.writer = _closed_writer(self._blank)
        if not self.look():
            if not options.create:
                raise FileNotFoundError(errno.ENOENT, "no journal here", str(directory))
            refuse_strangers(directory)  # nobody could make one

    # --- what there is ------------------------------------------------------------------------------

    @property
    def superblock(self) -> Superblock:
        return self._superblock

    def look(self) -> bool:
        """Whether there is a journal; takes over the superblock in force and the index page."""
        self.check_followed()
        page, now = self._page, time.monotonic()
        if page is None or now - self._page_at > LOOK_S:
            with self.structure:
                self._page_at = now
                self._read_superblock()
                self._open_page()
        elif page.superblock_sequence() > self._superblock.sequence:
            self._read_superblock()
        return self._superblock is not _NOBODY

    def look_again(self, table: SegmentTable) -> bool:
        with self.structure:
            if self.segments.table is table:
                self._read_superblock()
            return self.segments.table is not table

    def _read_superblock(self) -> None:
        with self.structure:
            self.check_followed()
            old, new = self._superblock, read_superblock(self.directory)
            if new is None:
                return
            if old is _NOBODY:
                check_sizes(self.directory, new, self.options)
                self.segments = SegmentSet(self.directory, new.uuid, new.segments)
                self.read_segments = SegmentSet(self.directory, new.uuid, ())
                self.read_segments.held = self.segments.held
            elif new.uuid != old.uuid:
                raise JournalError(f"{self.directory}: another journal has taken the place of this one")
            elif new.sequence == old.sequence:
                return
            else:
                self.segments.follow(new.segments)
            if new.epoch != old.epoch:  # as Engine does: what is written is mapped anew
                self.segments.unmap(new.epoch_start_lsn)
            self._superblock = new

    def _open_page(self) -> None:
        """The index may be another file by now."""
        if self._superblock is not _NOBODY:
            superblock = self._superblock
            self._page_file = self._index_file()
            self._page = published_page(self.directory, superblock.uuid, superblock.slot_count)

    def _index_file(self) -> object:
        identity = getattr(self.directory, "identity", None)
        return None if identity is None else identity(fmt.INDEX_NAME)

    def look_anew(self) -> bool:
        """Also of a journal that is not there yet. OSError, JournalError as look()."""
        self.check_followed()
        if self._index_file() == self._page_file:
            return False
        with self.structure:
            self._page_at = float("-inf")
            self.look()
        return True

    def follow_page(self) -> ProgressPage | None:
        return self._page

    def published(self) -> tuple[int, int]:
        """What the page says, or the superblock where that knows more: nobody may be writing. What was
        written and not synced is only believed of a page that knows of the superblock: of this life."""
        page, superblock = self._page, self._superblock
        written, durable = (0, 0) if page is None else page.progress()
        if page is not None and page.superblock_sequence() < superblock.sequence:
            written = 0
        if superblock is not _NOBODY:
            proven = self._proven
            if proven[0] is not superblock:
                proven = self._proven = superblock, superblock.proven_lsn
            durable = max(durable, proven[1])
        self._limit = durable = max(self._limit, durable)  # another page begins at nothing
        return max(written, durable), durable

    def check_followed(self) -> None:
        if self.closed:
            raise ClosedError("the journal is closed")

    # --- slots of our own ---------------------------------------------------------------------------

    def refresh(self) -> None:
        """The slots are as all that was durable when this was called. CorruptionError, OSError."""
        seen = self._seen_now()
        if seen is not None and seen == self._slots_seen and self._slots_of is self._superblock:
            return
        reopened = False
        last: Superblock | None = None
        with self.structure:
            for tries_left in reversed(range(LOOKS)):
                if not self.look():
                    return
                page, superblock, table = self._page, self._superblock, self.segments.table
                word = page.word() if page is not None else None
                limit = self.published()[1]
                noted = page.superblock_sequence() if page is not None else superblock.sequence
                if noted < superblock.sequence and not reopened:  # the page may be of a life before
                    reopened = True
                    self._page_at = float("-inf")
                elif noted <= superblock.sequence or superblock is last:
                    # Neither knows of what the other does not, unless the files were copied one by one.
                    try:
                        if self._catch_up(superblock, table, limit):
                            self._slots_seen = page, word
                            return
                    except CorruptionError:
                        if not (tries_left and self.look_again(table)):
                            raise
                        reopened = False
                last = superblock
        raise JournalError(f"{self.directory}: the superblock changes faster than it can be read")

    def _seen_now(self) -> tuple[ProgressPage, int] | None:
        page = self._page
        if page is None or time.monotonic() - self._page_at > LOOK_S:
            return None
        return page, page.word()

    def _catch_up(self, superblock: Superblock, table: SegmentTable, limit: int) -> bool:
        """What is there is stored before anything is taken out, and the segments follow last: a read beside
        it finds each live op, and a slot that it saw is another one once its frame is not there. False: a
        signal handler has read meanwhile and gone further, so all has to be looked at once more."""
        if self.index is self._blank or self.index.slot_count != superblock.slot_count:
            self.index = _private_index(superblock.slot_count)
            self._slots_at, self._slots_of = 0, superblock
            self.read_segments.follow(superblock.segments)
        before = self._slots_of
        known = {record.name for record in before.segments}
        reached = limit = min(limit, superblock.next_base_lsn)
        for segment in table.segments:
            start = segment.record.base_lsn
            if segment.record.name in known:  # else a gap may span the place
                start = max(start, self._slots_at)
            if start < min(limit, segment.record.next_base_lsn):
                reached = max(reached, self._fill(table, segment, start, limit))
        if superblock is not before:
            self._take_out(before, superblock, table, limit)
        if self._slots_of is not before:
            self._slots_at = 0
            return False
        if superblock is not before:
            self.read_segments.follow(superblock.segments)
            if superblock.epoch != before.epoch:
                self.read_segments.unmap(superblock.epoch_start_lsn)
        self._slots_at, self._slots_of = max(self._slots_at, reached), superblock
        return True

    def _take_out(self, before: Superblock, superblock: Superblock, table: SegmentTable, limit: int) -> None:
        """Slots of what is removed, and of frames that are not there any more."""
        slots: Any = np.frombuffer(
            ffi.buffer(self.index.slots, self.index.slot_count * fmt.SLOT_BYTES), fmt.SLOT
        )
        lsns, ops = slots["lsn"], slots["op"]
        dead = ops <= superblock.watermark
        for row in superblock.removals:
            dead |= (ops >= row.first) & (ops <= row.last) & (lsns < row.below_lsn)
        present = {s.record.name for s in table.segments}
        for record in before.segments:
            if record.name not in present:
                inside = (lsns >= record.base_lsn) & (lsns < record.next_base_lsn)
                for (
                    segment
                ) in table.segments:  # a new generation, or a longer one in the place of a blank one
                    there = segment.record
                    if there.base_lsn < record.next_base_lsn and record.base_lsn < there.next_base_lsn:
                        inside &= ~np.isin(lsns, self._frames_in(superblock, table, segment, limit))
                dead |= inside
        lsns[dead] = 0

    def _frames_in(
        self, superblock: Superblock, table: SegmentTable, segment: Segment, limit: int
    ) -> npt.NDArray[Any]:
        """The LSNs of the entries that a segment has."""
        self._map(table, segment)
        walk, room = Walk(segment, superblock, past_gaps=True, watermark=0), Room(FRAME_ROWS)
        parts, at = [], segment.record.base_lsn
        while count := walk.run(at, limit, room.native, FRAME_ROWS):
            parts.append(room.lsn[:count].copy())
            at = int(walk.native.lsn)
        if (error := walk.error()) is not None:
            raise error
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)

    def _fill(self, table: SegmentTable, segment: Segment, start: int, limit: int) -> int:
        """Stores the entries from a frame on into the slots; the LSN that was reached, behind the limit where
        a gap spans that."""
        self._map(table, segment)
        walk = Walk(
            segment,
            self._superblock,
            slots=self.index.slots,
            slot_count=self.index.slot_count,
            past_gaps=True,
        )
        walk.run(start, limit)
        if (error := walk.error()) is not None:
            raise error
        return int(walk.native.lsn)

    def _map(self, table: SegmentTable, segment: Segment) -> None:
        if not segment.is_mapped and self.segments.count_mapping():
            self.segments.bound_mappings()
        table.map(table.row(segment.record.base_lsn))

    def state(self) -> Any:
        """As an engine's, of what is durable."""
        self.look_anew()
        with self.structure:
            self.refresh()
            live, first_op, last_op = self.index.summary()
            written, durable = self.published()
        watermark = self._superblock.watermark
        return ffi.new(
            "struct mw_state *",
            {
                "live": live, "first_op": first_op, "last_op": last_op,
                "next_op": max(last_op, watermark) + 1, "watermark": watermark,
                "written_lsn": written, "durable_lsn": durable, "epoch": self._superblock.epoch,
                "closed": self.closed,
            },
        )  # fmt: skip

    # --- what is not for readers --------------------------------------------------------------------

    def start_preparing(self) -> None:
        """Nothing is."""

    def check_usable(self) -> None:
        raise self.error(lib.MW_E_CLOSED)

    def error(self, code: int, op: int | None = None) -> Exception:
        if code == lib.MW_E_CLOSED and not self.closed:
            return ReadonlyError(f"{self.directory} was opened to be read only")
        return super().error(code, op)

    def pay_epoch(self) -> None:
        """None is owed."""

    def remaining(self) -> int:
        raise self.error(lib.MW_E_CLOSED)

    # --- the end ------------------------------------------------------------------------------------

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        page = self._page
        if page is not None:
            page.stir()
        self.directory.close()

    def abandon(self, others_end: Callable[[], None]) -> None:
        self.close()

    def in_child(self) -> None:
        """What is only read is the child's as well. One of the parent's threads may have held a lock."""
        self.structure = threading.RLock()
        self.segments.after_fork()
        self.read_segments.after_fork()


class ObservingReader(Reader):
    """Looks what is published before each read."""

    _engine: Observer

    def __init__(self, engine: Observer, *, verify_reads: bool) -> None:
        super().__init__(engine, verify_reads=verify_reads)
        self._index = engine.index

    def _plain_below(self, lsn: int) -> None:
        super()._plain_below(0)

    def _look(self) -> None:
        if self.closed is not None:
            raise self.closed
        self._engine.refresh()
        if self._engine.index is not self._index:
            with self._engine.structure:
                self._take_over()
                self._index = self._engine.index

    # What is not there may be in the journal of a writer who made a new index.

    def locate(self, op: int) -> tuple[memoryview, int, int, int, int]:
        self._look()
        try:
            return super().locate(op)
        except MissingOpError:
            if not self._engine.look_anew():
                raise
        self._look()
        return super().locate(op)

    def find(self, op: int) -> tuple[SegmentTable, int, int, int] | None:
        self._look()
        found = super().find(op)
        if found is None and self._engine.look_anew():
            self._look()
            found = super().find(op)
        return found

    def _range(self, first: int | None, last: int | None) -> tuple[int, int, Any]:
        self._engine.look_anew()
        self._look()
        return super()._range(first, last)

    # Another thread may take over a newer superblock meanwhile: what looks wrong is looked at again while it
    # cannot.

    def _map(self, table: SegmentTable, row: int) -> None:
        engine = self._engine
        try:
            super()._map(table, row)
        except CorruptionError:
            with engine.structure:
                engine.look_again(engine.segments.table)
                self._look()
                if self.segments.table is table:
                    raise

    def _stray(self, op: int, lsn: int) -> None:
        with self._engine.structure:
            self._look()
            super()._stray(op, lsn)

    def _recover_gather(self, rc: int, table: SegmentTable, cursor: Any) -> SegmentTable:
        with self._engine.structure:
            self._look()
            found = self._engine.index.lookup(int(cursor.op))
            if self.segments.table is not table or found is None or found[0] != int(cursor.lsn):
                return self.segments.table
            return super()._recover_gather(rc, table, cursor)


def _private_index(slot_count: int) -> SlotIndex:
    return SlotIndex.create(MemoryDirectory(), bytes(16), slot_count)


def _closed_writer(index: SlotIndex) -> Any:
    """Says to each call that it is closed."""
    writer = lib.mw_writer_new(
        ffi.new("struct mw_config *", {"page": index.page, "slots": index.slots, "slot_count": 1, "epoch": 1})
    )
    if writer == ffi.NULL:
        raise OSError(errno.ENOMEM, "no memory for a writer")
    writer = ffi.gc(writer, lib.mw_writer_free)
    lib.mw_writer_close(writer)
    return writer
