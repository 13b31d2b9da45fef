"""The next segment, made while the present one fills.

Zeros are written in small steps, spread over the time that is left, and the kernel is told to begin
with each: one large write, or a sync of it, would make every commit beside it wait. Nothing is locked
between two steps, so whoever cannot wait takes the file over as it is and makes the rest at once.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from mmapwal import format as fmt
from mmapwal._native import lib
from mmapwal.errors import JournalError
from mmapwal.segment import NewSegment, SegmentSet
from mmapwal.storage import Directory, SyncMethod
from mmapwal.superblock import SegmentRecord, Superblock
from mmapwal.threads import start_thread

__all__ = ["Preparer"]

log = logging.getLogger("mmapwal")
T = TypeVar("T")

STEP_BYTES = 64 << 10  # 1 MiB: p99 of commits beside it 5 times as long; less: no better
PAUSE_FIRST_S = 0.001
PAUSE_MAX_S = 0.01
READY_SHARE = 0.75  # of the room that is left when it is begun
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Engine(Protocol):
    """What the one in engine.py does for it."""

    directory: Directory
    structure: threading.RLock
    writer: Any
    segments: SegmentSet
    sync_method: SyncMethod

    @property
    def superblock(self) -> Superblock: ...
    @property
    def in_doubt(self) -> bool: ...
    def state(self) -> Any: ...
    def check_usable(self) -> None: ...
    def flush(self) -> None: ...
    def tail_reserve(self) -> int: ...
    def records_with_ends(self) -> list[SegmentRecord]: ...
    def change(self, new: Superblock, apply: Callable[[], T]) -> T: ...
    def add_target(self, record: SegmentRecord) -> None: ...
    def remove_files(self, names: Iterable[str]) -> list[str]: ...
    def dispose(self, names: Iterable[str]) -> None: ...
    def made_room(self, error: OSError) -> bool: ...
    def poison(self, stage: str, cause: BaseException | None) -> None: ...


class Preparer:
    """Makes segments for one engine: ahead in the background, or now for who needs one."""

    def __init__(self, engine: Engine) -> None:
        self._engine: weakref.ref[Engine] = weakref.ref(engine)
        self._guard = threading.Lock()  # held for a step
        self._making: NewSegment | None = None  # set under `structure` too; whoever takes it out owns it
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    # --- now ----------------------------------------------------------------------------------------

    def prepare(self, engine: Engine, need_bytes: int = 0) -> None:
        """Engine.prepare_segment()."""
        with engine.structure:
            engine.check_usable()
            if engine.state().target_room == 0:
                engine.flush()
            plan = self._plan(engine, need_bytes)
            if plan is None:
                return
            record, prepared = plan
            try:
                self._make(engine, record)
            except OSError as e:
                if not engine.made_room(e):
                    raise
                self._make(engine, record)
            self._name(engine, record, prepared)
            engine.segments.bound_mappings()

    def _plan(self, engine: Engine, need_bytes: int) -> tuple[SegmentRecord, SegmentRecord | None] | None:
        """What is to be made, and the prepared one whose place it takes; None: there is room."""
        state, superblock = engine.state(), engine.superblock
        need = need_bytes + engine.tail_reserve() if need_bytes else 0
        if need and state.stage_room >= need:
            return None
        prepared = superblock.segments[-1] if state.targets else None
        if prepared is not None and prepared.capacity >= need:
            return None
        capacity = max(superblock.segment_bytes - fmt.PAGE_BYTES, need + -need % fmt.PAGE_BYTES)
        base = prepared.base_lsn if prepared is not None else superblock.next_base_lsn
        return SegmentRecord(superblock.next_segment_id, base, capacity), prepared

    def _make(self, engine: Engine, record: SegmentRecord) -> None:
        """The file under its name, durable; goes on with what was begun in the background."""
        with self._guard:
            making, self._making = self._making, None
        if making is None or making.record != record:
            if making is not None:
                making.discard()
            making = NewSegment(engine.directory, engine.superblock.uuid, record)
        try:
            while making.write_zeros():
                pass
            making.publish()
        except BaseException:
            making.discard()
            raise

    def _name(self, engine: Engine, record: SegmentRecord, prepared: SegmentRecord | None) -> None:
        """Lets the superblock name a segment that was made, in the place of one too small if there is."""
        dropped = False
        try:
            kept = [r for r in engine.records_with_ends() if r != prepared]
            new = replace(engine.superblock, segments=(*kept, record), next_segment_id=record.id + 1)
            with engine.segments.expecting(record, engine.sync_method):
                if prepared is not None:
                    dropped = True  # before the call: an interrupt may come right behind it
                    if lib.mw_writer_drop_target(engine.writer) != 0:  # it was begun meanwhile
                        dropped = False
                        engine.remove_files([record.name])
                        return
                engine.change(new, lambda: engine.add_target(record))
        except BaseException as e:
            named = {r.name for r in engine.superblock.segments}
            if dropped and prepared is not None and prepared.name in named and not engine.in_doubt:
                self._put_back(engine, prepared, e)
            if record.name not in named:
                engine.remove_files([record.name])
            raise
        if prepared is not None:
            engine.dispose([prepared.name])

    def _put_back(self, engine: Engine, prepared: SegmentRecord, reason: BaseException) -> None:
        """The superblock still names it, so the writer must have it, or the next would leave a hole."""
        state = engine.state()
        if state.targets or state.stage_id == prepared.id:
            return  # it was not dropped after all
        try:
            engine.add_target(prepared)
        except BaseException:
            engine.poison("putting a prepared segment back", reason)
            raise

    # --- ahead --------------------------------------------------------------------------------------

    def start(self, writer: Any) -> None:
        """Segments are made ahead from now on, until stop(). OSError: no thread can be had."""
        self._thread = start_thread("prepare", self._run, writer)

    def closing(self) -> None:
        """No further step is begun."""
        self._closing.set()

    def stop(self) -> None:
        """Waits for the step under way; the writer is closed."""
        self._closing.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self, writer: Any) -> None:
        pause = 0.02
        while lib.mw_writer_wait_wanted(writer) == 1 and not self._closing.is_set():
            engine = self._engine()
            if engine is None:
                return
            try:
                self._ahead(engine)
                pause = 0.02
            except (OSError, JournalError) as e:
                # Whoever needs the segment tries again and gets the error.
                log.info("preparing a segment failed: %s", e)
                del engine
                self._closing.wait(pause)
                pause = min(pause * 2, 1.0)

    def _ahead(self, engine: Engine) -> None:
        """Makes the next segment in steps, unless another takes it over or the journal is closed."""
        with engine.structure:  # begun by one at a time, or two would write one file
            engine.check_usable()
            plan = self._plan(engine, 0)
            if plan is None:
                return
            mine = NewSegment(engine.directory, engine.superblock.uuid, plan[0])
            with self._guard:
                self._making = mine
        room, start, pause = int(engine.state().stage_room), time.monotonic(), PAUSE_FIRST_S
        try:
            while (steps := self._step(mine)) > 0:
                if self._closing.wait(pause):
                    return
                filled = room - int(engine.state().stage_room)
                pause = self._pause(filled, room, time.monotonic() - start, steps)
            self.prepare(engine)
        finally:
            self._drop(mine)

    def _step(self, mine: NewSegment) -> int:
        """One step, the sync at the end too; how many are left. 0 also when another has taken it over."""
        with self._guard:
            if self._making is not mine:
                return 0
            try:
                if mine.write_zeros(STEP_BYTES):
                    return -(-mine.left_bytes // STEP_BYTES)
                mine.sync()
            except BaseException:
                self._making = None
                mine.discard()
                raise
            return 0

    @staticmethod
    def _pause(filled_bytes: int, room_bytes: int, seconds: float, steps: int) -> float:
        """Until the next step, so that the last one comes when READY_SHARE of the room is filled."""
        left = room_bytes * READY_SHARE - filled_bytes
        if filled_bytes < 0 or left <= 0:  # it went on in another segment, or there is no time
            return 0.0
        if filled_bytes == 0:
            return PAUSE_MAX_S
        return min(PAUSE_MAX_S, left / filled_bytes * seconds / steps)

    def give_back(self) -> None:
        """Lets go of the space of a segment in the making. The caller holds `structure`, so none is begun
        meanwhile."""
        with self._guard:
            making, self._making = self._making, None
            if making is not None:
                making.discard()

    def _drop(self, mine: NewSegment) -> None:
        with self._guard:
            if self._making is mine:
                self._making = None
                mine.discard()
