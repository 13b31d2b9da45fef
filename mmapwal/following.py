"""Following a journal: its entries in the order in which they become durable, from this process or another.

A follower reads frames, not the index: what it gives depends on the superblock, the frames and the published
progress alone. Whoever has nothing to read sleeps on a word of the index page, which the writer wakes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import chain
from struct import Struct
from typing import Any, Protocol

from mmapwal._native import ffi, lib
from mmapwal.columns import Gathered, Room
from mmapwal.errors import CorruptionError, StaleOpError, TruncatedError
from mmapwal.observer import LOOK_S
from mmapwal.page import ProgressPage
from mmapwal.reader import Entry, make_entry, slices_of
from mmapwal.segment import Segment, SegmentSet, SegmentTable
from mmapwal.superblock import Superblock
from mmapwal.walking import Walk

__all__ = ["Bell", "Followed", "Follower", "Following"]

ROWS = 2048
AHEAD_BYTES = 1 << 20  # who follows large entries need not wait for so many
NO_OP = 2**63  # above all there are
NOBODY_S = 0.02  # there is no page yet
SPIN_S = 0.0003  # to wake who sleeps costs the writer some 10 us, on virtual machines more
_TAKEN = Struct("=6QqQ")  # the end of struct mw_next
_NOT_YET: Iterator[Entry] = iter(())  # what could come next cannot be had now
POLL_S = 0.001  # the page cannot be stored to: nobody knows that one sleeps


class Followed(Protocol):
    """What an engine tells followers."""

    segments: SegmentSet

    @property
    def superblock(self) -> Superblock: ...
    def look(self) -> bool:
        """Takes over what has changed; whether there is a journal yet. After the progress was read."""

    def look_again(self, table: SegmentTable) -> bool:
        """A segment of that table is not where it was: whether there is another table now. Waits for a change
        of structure that is under way."""

    def look_anew(self) -> bool:
        """Whether the page is another one by now, that of an index made since: then that was taken over."""

    def follow_page(self) -> ProgressPage | None:
        """None: not there yet."""

    def published(self) -> tuple[int, int]:
        """(written, durable) LSN."""

    def check_followed(self) -> None:
        """Raises what ends a follower when it has all."""


class Bell:
    """What a follower waits by: the word of the index page that counts publications. What comes soon after
    the one before it is not slept for, so that a writer in a hurry need not wake anybody."""

    def __init__(self, engine: Followed) -> None:
        self._engine = engine
        self._word = 0
        self.stopped = False
        self._hurries = False  # the last one came within SPIN_S

    def listen(self) -> None:
        """Before a look at what is published: wait() ends when more is, from here on. OSError."""
        page = self._engine.follow_page()
        if page is not None:
            self._word = page.word()

    def wait(self, timeout_s: float, following: Any = ffi.NULL) -> None:
        """Blocks until something may have come, at most so long. A signal ends it. OSError. `following`
        (struct mw_next) is taken when something has."""
        page = self._engine.follow_page()
        if self.stopped:
            return
        if page is None:
            time.sleep(min(timeout_s, NOBODY_S))
            return
        soon_s = SPIN_S
        if self._hurries:
            if page.spin(self._word, min(timeout_s, SPIN_S), following):
                return
            soon_s = 0.0  # it was not
        if not self.stopped:
            longest_s = LOOK_S if page.writable else POLL_S
            self._hurries = page.wait(self._word, min(timeout_s, longest_s), soon_s, following)

    def stop(self) -> None:
        """Ends wait() in another thread, now and for ever."""
        self.stopped = True
        page = self._engine.follow_page()
        if page is not None:
            page.stir()


class Next:
    """What a follower that waits wants to have when it is woken: taken in C, by the walk that it was on, if
    nothing has changed but how far the journal is."""

    walk: Walk | None = None
    table: SegmentTable | None = None

    def __init__(self, room: Room, *, written: bool) -> None:
        self._room = room  # as long as C has its address
        self.native = ffi.new("struct mw_next *", {"out": room.native, "max": room.rows, "written": written})
        first = ffi.offsetof("struct mw_next", "count")
        self.taken = partial(_TAKEN.unpack_from, ffi.buffer(self.native), first)

    def forget(self) -> None:
        """What another superblock does not name is not kept for who only sleeps."""
        self.walk = self.table = None

    def prepare(self, walk: Walk, table: SegmentTable, lsn: int, from_op: int | None) -> memoryview:
        """Of the segment that the walk is over."""
        found, native = walk.native, self.native
        found.lsn, found.limit_lsn, found.from_op = lsn, lsn + AHEAD_BYTES, from_op
        found.past_gaps = False
        native.walk, native.superblock_sequence = found, walk.superblock.sequence
        native.count = 0
        return table.map(found.segment)


class Follower:
    """One reader of the stream. For one thread at a time."""

    def __init__(self, engine: Followed, from_op: int | None, *, written: bool) -> None:
        self._engine = engine
        self._written = written
        self._from_op = from_op
        self._at = 0  # LSN of the next frame; 0: not begun
        self._in = ""  # the segment in which that begins a frame
        self.bell = Bell(engine)
        self._sequence = 0  # of the superblock that was looked at
        self._epoch = 0
        self._proven_lsn = 0  # all below it is known to be durable
        self._again = (0, 0)  # below this LSN all was given, and only what is from this op on comes again
        self._highest_op = 0  # of what was given
        self._seen_op = 0  # watermark when all there was had been given, or what from_op stands for
        self._unproven: deque[tuple[int, int]] = deque()  # (LSN, op) given and not known to be durable
        self._room = Room(ROWS)
        self._chunk: Gathered
        self._payloads = slices_of(iter(lambda: self._chunk, None))
        self._walk: Walk | None = None
        self._next = Next(self._room, written=written)
        if engine.look():
            self._begin(engine.superblock)

    def take(self) -> Iterator[Entry] | None:
        """What comes next, at most some hundred, made when asked for; None: nothing yet. Does not wait."""
        self.bell.listen()
        watermark = self._engine.superblock.watermark  # what is appended from here on is above it
        written, durable = self._engine.published()
        if not self._engine.look():
            return None
        life = self._epoch
        self._take_over(self._engine.superblock, durable)
        self._check_watermark()
        if life != self._epoch:  # what was written may be of a life of the writer that is over
            written, durable = self._engine.published()
        limit, life = written if self._written else durable, self._epoch
        while self._at < limit:
            entries = self._take(limit)
            if entries is _NOT_YET:
                self._engine.check_followed()
                return None
            if entries is not None:
                return entries
            if self._epoch != life:
                limit, life = durable, self._epoch
        self._seen_op = max(self._seen_op, watermark)
        self._engine.check_followed()
        return None

    def take_next(self, timeout_s: float) -> Iterator[Entry] | None:
        """As take(), which had nothing, after a wait for what may come, at most so long."""
        walk, table, at = self._next.walk, self._next.table, self._at
        # By another superblock than was taken over, it would pass over what that has to tell.
        if walk is None or table is None or walk.superblock.sequence != self._sequence or at < self._again[0]:
            self.bell.wait(timeout_s)
            return self.take()
        view = self._next.prepare(walk, table, at, self._from_op)
        self.bell.wait(timeout_s, self._next.native)
        # From here to the entry as little as can be: who has slept finds nothing in the caches.
        count, lsn, durable_lsn, op, start, end, timestamp_ns, kind = self._next.taken()
        if count == 0 or self._at != at:  # a signal handler has followed on meanwhile
            return self.take()
        if self._written or count > 1:
            self._prove(durable_lsn)
            return self._taken(table, count, walk.native)
        entries = iter((make_entry((op, view[start:end], kind, timestamp_ns)),))
        self._highest_op = max(self._highest_op, op)
        self._at = lsn  # last: what a signal handler raises before it loses nothing
        return entries

    def is_over(self) -> bool:
        """After take() had nothing, for who does not wait any longer. False: take once more."""
        return not self._engine.look_anew()

    # --- changes of structure -----------------------------------------------------------------------

    def _begin(self, superblock: Superblock) -> None:
        """Who asks for what comes from an op on has what is below it."""
        if self._from_op is None:
            self._from_op = superblock.watermark + 1
        else:
            self._highest_op = self._from_op - 1
        self._seen_op = self._from_op - 1
        self._at = _first_lsn(superblock)
        self._sequence, self._epoch = superblock.sequence, superblock.epoch
        if self._from_op <= superblock.watermark:
            raise self._stale(self._from_op)

    def _take_over(self, superblock: Superblock, durable_lsn: int) -> None:
        """Of a superblock: what was cut off of what was given, and where to go on. `durable_lsn` was read
        before it."""
        if self._at == 0:
            self._begin(superblock)
        if superblock.epoch == self._epoch:
            self._prove(durable_lsn)
        if superblock.sequence != self._sequence:
            cuts = [self._lost_op(superblock), superblock.cut_since(self._sequence)]
            self._sequence, self._epoch = superblock.sequence, superblock.epoch
            self._next.forget()
            cut = min((op for op in cuts if op is not None and op <= self._highest_op), default=None)
            if cut is not None:
                self._from_op = min(self._from_op or cut, cut)
                self._highest_op = cut - 1
                raise TruncatedError(cut)
        self._proven_lsn = max(self._proven_lsn, durable_lsn)

    def _prove(self, durable_lsn: int) -> None:
        while self._unproven and self._unproven[0][0] < durable_lsn:
            self._unproven.popleft()

    def _lost_op(self, superblock: Superblock) -> int | None:
        """The lowest op that was given when it was written, and was not there when the writer came back. It
        goes on where that did, also if nothing was given there."""
        lives = superblock.epoch - self._epoch
        if not lives or not self._written:  # what was durable stays
            return None
        # Of several lives none says what the ones before kept.
        start = superblock.epoch_start_lsn if lives == 1 else self._proven_lsn
        lost = min((op for lsn, op in self._unproven if lsn >= start), default=None)
        again_lsn, again_op = self._again
        if self._at > start or self._at < again_lsn:
            # From the first frame on: nothing says where frames begin now. Who is told that all from an op on
            # is void gets what is left of it again, wherever it lies.
            ops = [op for op in (lost, again_op if self._at < again_lsn else None) if op is not None]
            self._again = start, min(ops, default=NO_OP)
            self._at = _first_lsn(superblock)
        if lost is not None:
            self._unproven.clear()
        return lost

    def _stale(self, op: int) -> StaleOpError:
        """It goes on above the watermark."""
        watermark = self._engine.superblock.watermark
        self._from_op = watermark + 1
        self._seen_op = watermark
        return StaleOpError(
            f"op {op} is at or below the watermark {watermark}: what follows begins above it",
            first_op=watermark + 1,
        )

    def _check_watermark(self) -> None:
        """What lies above all that was given and not above the watermark never comes: a snapshot has it. Told
        before what comes behind it."""
        had_op = max(self._highest_op, self._seen_op)
        if self._engine.superblock.watermark > had_op:
            raise self._stale(had_op + 1)

    # --- frames -------------------------------------------------------------------------------------

    def _take(self, limit: int) -> Iterator[Entry] | None:
        table = self._engine.segments.table
        row = table.row(self._at)
        if row < 0:
            self._pass_lost(table, limit)
            return None
        try:
            table.map(row)
        except CorruptionError:
            if not self._looked_again(table):
                raise
            return None
        segment, before = table.segments[row], self._walk
        walk = self._walk_over(segment)
        if walk is None:
            if not self._looked_again(table):
                if self._walk_over(segment) is None:
                    return _NOT_YET
                self._take_over(self._engine.superblock, 0)
            return None
        if segment.record.name != self._in:
            self._enter(segment, walk.superblock, before)
        found = walk.native
        found.from_op, found.segment = self._from_op, row
        again_lsn, again_op = self._again
        if self._at < again_lsn:
            found.from_op, limit = max(self._from_op or 0, again_op), min(limit, again_lsn)
        found.past_gaps = self._at < again_lsn
        count = walk.run(self._at, min(limit, self._at + AHEAD_BYTES), self._room.native, ROWS)
        self._next.walk, self._next.table = walk, table
        if count:
            return self._taken(table, count, found)
        error = walk.error()  # behind entries it comes the next time
        if error is not None:
            if not self._looked_again(table):  # a longer segment may have taken the place of a blank one
                raise error
            return None
        self._at = int(found.lsn)
        if found.stop == lib.MW_WALK_STALE:
            raise self._stale(int(found.op))
        if found.stop == lib.MW_WALK_GAP:
            self._lost()
            self._at = int(found.behind_lsn)
        elif found.stop == lib.MW_WALK_END or self._at >= segment.record.next_base_lsn:
            self._at = segment.record.next_base_lsn
        return None

    def _taken(self, table: SegmentTable, count: int, found: Any) -> Iterator[Entry]:
        """`found`: the struct mw_walk that filled so many rows."""
        self._highest_op = max(self._highest_op, int(found.highest_op))
        chunk = Gathered(table, self._room, count, True, int(found.stride))
        entries = self._given_one(chunk) if count == 1 else self._given(chunk)
        self._at = int(found.lsn)
        return entries

    def _looked_again(self, table: SegmentTable) -> bool:
        """Whether there is another table now; then it goes on by the superblock that has that."""
        if not self._engine.look_again(table):
            return False
        self._take_over(self._engine.superblock, 0)
        return True

    def _walk_over(self, segment: Segment) -> Walk | None:
        """As the superblock in force shows it. None: that does not name it, and hides nothing in it any more;
        one of the two is about to be replaced, by whoever holds the lock that look_again() waits for."""
        superblock, walk = self._engine.superblock, self._walk
        if walk is None or walk.segment is not segment or walk.superblock is not superblock:
            name = segment.record.name
            if all(record.name != name for record in superblock.segments):
                return None
            walk = self._walk = Walk(segment, superblock)
        return walk

    def _enter(self, segment: Segment, superblock: Superblock, before: Walk | None) -> None:
        """In a new generation of the segment, a gap may stand for what is before and behind the place."""
        base_lsn = segment.record.base_lsn
        if self._at > base_lsn:
            walk = Walk(segment, superblock, from_op=NO_OP, past_gaps=True)
            walk.run(base_lsn, self._at)
            found = walk.native
            if not found.failed and found.lsn > self._at:  # what is wrong there, the next walk tells
                if self._stop_of(before, int(found.lsn)) != lib.MW_WALK_LIMIT:
                    self._lost()
                self._at = int(found.lsn)
        self._in = segment.record.name

    def _stop_of(self, walk: Walk | None, to_lsn: int) -> int | None:
        """What stops a walk from here to an LSN, in a segment that is gone and still mapped: an entry
        (MW_WALK_FULL), its end, or nothing (MW_WALK_LIMIT). None: nobody knows any more."""
        if walk is None or not walk.segment.is_mapped:
            return None
        record = walk.segment.record
        if not record.base_lsn <= self._at < record.next_base_lsn:
            return None
        look = Walk(walk.segment, walk.superblock, from_op=self._from_op, watermark=0, removal_count=0)
        look.run(self._at, to_lsn, self._room.native, 0)
        return None if look.native.failed else int(look.native.stop)

    def _given_one(self, chunk: Gathered) -> Iterator[Entry]:
        """Who is not behind gets each by itself: in half the time without columns."""
        row = chunk.out.native
        op = row.op[0]
        if self._written:
            self._unproven.append((row.lsn[0], op))
        payload = chunk.table.map(row.segment[0])[row.start[0] : row.end[0]]
        return iter((Entry(op, payload, row.kind[0], row.timestamp_ns[0]),))

    def _given(self, chunk: Gathered) -> Iterator[Entry]:
        out, count = chunk.out, chunk.rows
        ops = out.op[:count].tolist()
        if self._written:
            self._unproven.extend(zip(out.lsn[:count].tolist(), ops, strict=True))
        self._chunk = chunk
        try:
            payloads = next(self._payloads)
        except StopIteration:  # an interrupt ended it
            self._payloads = slices_of(iter(lambda: self._chunk, None))
            payloads = next(self._payloads)
        kinds, timestamps = out.kind[:count].tolist(), out.timestamp_ns[:count].tolist()
        return map(make_entry, zip(ops, payloads, kinds, timestamps, strict=True))

    def _pass_lost(self, table: SegmentTable, limit: int) -> None:
        """The segment is gone, or its successor is not named yet by the superblock that was looked at."""
        if self._looked_again(table):
            return
        if self._walk is not None and self._stop_of(self._walk, 2**63) == lib.MW_WALK_END:
            self._at = self._walk.segment.record.next_base_lsn  # all that was in it had been given
            return
        later = [s.record.base_lsn for s in table.segments if s.record.base_lsn > self._at]
        self._lost()
        self._at = min([*later, limit])

    def _lost(self) -> None:
        """Frames are gone that were not given. No matter, if they were dead before they were looked for;
        where the watermark has moved since, entries can be among them."""
        watermark, (again_lsn, again_op) = self._engine.superblock.watermark, self._again
        if watermark > self._seen_op and not (self._at < again_lsn and again_op > watermark):
            raise self._stale(self._seen_op + 1)


def check_timeout(timeout: Any) -> None:
    """TypeError or ValueError for what is no timeout of a follower."""
    if timeout is None:
        return
    if not isinstance(timeout, int | float) or isinstance(timeout, bool):
        raise TypeError(f"timeout is a number of seconds or None, not {type(timeout).__name__}")
    if not timeout >= 0:  # nor nan
        raise ValueError(f"timeout is 0 or more; not {timeout}")


def _first_lsn(superblock: Superblock) -> int:
    return superblock.segments[0].base_lsn if superblock.segments else superblock.next_base_lsn


class Following:
    """Journal.follow(): an iterator, over what comes next. After an error it goes on behind that."""

    def __init__(
        self,
        engine: Followed,
        from_op: int | None,
        timeout: float | None,
        *,
        written: bool = False,
        owner: object = None,
    ) -> None:
        check_timeout(timeout)
        self._owner = owner  # who closes the engine when nobody has him any more
        self._follower = Follower(engine, from_op, written=written)
        self._timeout = timeout
        self._rest: Iterator[Entry] = iter(())  # taken, and not given yet

    def __iter__(self) -> Iterator[Entry]:
        return chain.from_iterable(self._batches())

    def __next__(self) -> Entry:
        for entry in self:
            return entry
        raise StopIteration

    def _batches(self) -> Iterator[Iterator[Entry]]:
        follower, timeout = self._follower, self._timeout
        yield self._rest
        deadline = wait_s = None
        while True:
            # Between the two lines nothing that a signal handler raises comes in: no turn of the loop.
            entries = follower.take() if wait_s is None else follower.take_next(wait_s)
            if entries is not None:
                self._rest = entries
                yield entries
                deadline = wait_s = None
            elif timeout is None:
                wait_s = LOOK_S
            else:
                now = time.monotonic()
                deadline = now + timeout if deadline is None else deadline
                wait_s = deadline - now if now < deadline else None
                if wait_s is None and follower.is_over():
                    return
