"""A journal that another process writes, or nobody: looked at without its lock, changing none of its facts.

All that is believed of it are the superblock, the frames below what is durable, and the progress that the
index page publishes. The slots of the index are the writer's: a recovery may be filling them. Whoever reads
by op gets slots of his own, made of the frames at the first such read and kept up from then on.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.engine import Engine, Options
from mmapwal.errors import ClosedError, CorruptionError, JournalError, ReadonlyError
from mmapwal.index import SlotIndex, published_page
from mmapwal.opening import check_sizes
from mmapwal.page import ProgressPage
from mmapwal.reader import Reader
from mmapwal.recovery import RecoveryReport
from mmapwal.segment import Segment, SegmentSet, SegmentTable
from mmapwal.storage import Directory, FileStorage, MemoryDirectory, SyncMethod
from mmapwal.superblock import SegmentRecord, Superblock, read_superblock
from mmapwal.walking import Walk

__all__ = ["Observer", "ObservingReader"]

LOOK_S = 0.5  # so often the index is looked for under its name: it may be another file by now
LOOKS = 100  # at a superblock whose segments are gone again when they are looked for
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
        self.report = RecoveryReport()
        self.sync_method = SyncMethod.FDATASYNC
        self.segments = SegmentSet(directory, _NOBODY.uuid, ())
        self._superblock = _NOBODY
        self._page: ProgressPage | None = None
        self._page_at = float("-inf")
        self._limit = 0
        self._slots_at = 0  # below it, the slots have what the frames say
        self._slots_of = _NOBODY  # the superblock as of which
        self._word: int | None = None
        self.index = self._blank = _private_index(1)
        self.writer = _closed_writer(self._blank)
        if not self.look() and not options.create:
            raise FileNotFoundError(errno.ENOENT, "no journal here", str(directory))

    # --- what there is ------------------------------------------------------------------------------

    @property
    def superblock(self) -> Superblock:
        return self._superblock

    def look(self) -> bool:
        """Whether there is a journal; takes over the superblock in force and the index page."""
        if self.closed:
            raise ClosedError("the journal is closed")
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
            old, new = self._superblock, read_superblock(self.directory)
            if new is None:
                return
            if old is _NOBODY:
                check_sizes(self.directory, new, self.options)
                self.segments = SegmentSet(self.directory, new.uuid, new.segments)
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
            self._page = published_page(self.directory, superblock.uuid, superblock.slot_count)

    def follow_page(self) -> ProgressPage | None:
        return self._page

    def published(self) -> tuple[int, int]:
        """What the page says, or the superblock where that knows more: nobody may be writing."""
        page = self._page
        written, durable = (0, 0) if page is None else page.progress()
        if self._superblock is not _NOBODY:
            durable = max(durable, self._superblock.proven_lsn)
        self._limit = max(self._limit, durable)  # another page begins at nothing
        return max(written, self._limit), self._limit

    def check_followed(self) -> None:
        if self.closed:
            raise ClosedError("the journal is closed")

    # --- slots of our own ---------------------------------------------------------------------------

    def refresh(self) -> None:
        """The slots are as all that was durable when this was called. CorruptionError, OSError."""
        word = self._published_word()
        if word is not None and word == self._word:
            return
        with self.structure:
            if self._page is None:
                self.look()
            limit = self.published()[1]
            if not self.look():  # behind that: so the superblock is no older
                return
            if self.index.slot_count != self._superblock.slot_count or self._slots_of is _NOBODY:
                self.index = _private_index(self._superblock.slot_count)
                self._slots_at, self._slots_of = 0, self._superblock
            for _ in range(LOOKS):
                table = self.segments.table
                try:
                    self._catch_up(table, limit)
                    break
                except CorruptionError:
                    if not self.look_again(table):
                        raise
            self._word = word

    def _published_word(self) -> int | None:
        page = self._page
        if page is None or time.monotonic() - self._page_at > LOOK_S:
            return None
        return page.word()

    def _catch_up(self, table: SegmentTable, limit: int) -> None:
        superblock, before = self._superblock, self._slots_of
        again: list[Segment] = []
        if superblock is not before:
            names = {s.record.name for s in table.segments}
            gone = [r for r in before.segments if r.name not in names]
            self._clear(superblock, gone)
            ids = {r.id for r in gone}  # a new generation of it may be there
            again = [s for s in table.segments if s.record.id in ids]
        for segment in table.segments:
            record = segment.record
            start = record.base_lsn if segment in again else max(self._slots_at, record.base_lsn)
            if start < min(limit, record.next_base_lsn):
                self._fill(table, segment, start, limit)
        self._slots_at, self._slots_of = max(self._slots_at, limit), superblock

    def _clear(self, superblock: Superblock, gone: Iterable[SegmentRecord]) -> None:
        """Slots of what is removed, or was in segments that are not there any more."""
        slots: Any = np.frombuffer(
            ffi.buffer(self.index.slots, self.index.slot_count * fmt.SLOT_BYTES), fmt.SLOT
        )
        lsns, ops = slots["lsn"], slots["op"]
        dead = ops <= superblock.watermark
        for row in superblock.removals:
            dead |= (ops >= row.first) & (ops <= row.last) & (lsns < row.below_lsn)
        for record in gone:
            dead |= (lsns >= record.base_lsn) & (lsns < record.next_base_lsn)
        lsns[dead] = 0

    def _fill(self, table: SegmentTable, segment: Segment, start: int, limit: int) -> None:
        table.map(table.row(segment.record.base_lsn))
        walk = Walk(
            segment,
            self._superblock,
            slots=self.index.slots,
            slot_count=self.index.slot_count,
            past_gaps=True,
        )
        walk.run(start, limit)
        error = walk.error()
        if error is not None:
            raise error

    def state(self) -> Any:
        """As an engine's, of what is durable."""
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

    def abandon(self) -> None:
        self.close()

    def in_child(self) -> None:
        """What is only read is the child's as well."""


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
            self._index = self._engine.index
            self._take_over()

    def locate(self, op: int) -> tuple[memoryview, int, int, int, int]:
        self._look()
        return super().locate(op)

    def find(self, op: int) -> tuple[SegmentTable, int, int, int] | None:
        self._look()
        return super().find(op)

    def _range(self, first: int | None, last: int | None) -> tuple[int, int, Any]:
        self._look()
        return super()._range(first, last)

    def _map(self, table: SegmentTable, row: int) -> None:
        try:
            super()._map(table, row)
        except CorruptionError:
            if not self._engine.look_again(table):
                raise
            self._look()


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
