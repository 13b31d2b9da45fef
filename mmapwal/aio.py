"""AsyncJournal: the same journal for asyncio. Entries are staged on the loop's thread, a thread of the C
helper commits them, and an eventfd wakes the loop once for all that a commit made certain."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import weakref
from asyncio import InvalidStateError
from asyncio import _get_running_loop as _running_loop  # None where none runs, instead of an error
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import Any, NamedTuple, Self

from typing_extensions import Buffer

from mmapwal import format as fmt
from mmapwal._native import ffi, lib
from mmapwal.aio_following import AsyncFollowing, Ringer
from mmapwal.arguments import check_kind, check_op, kinds_column, out_of_range
from mmapwal.engine import Engine
from mmapwal.errors import (
    BusyError,
    ClosedError,
    ForkedError,
    JournalError,
    PoisonedError,
)
from mmapwal.journal import LENGTH, Journal
from mmapwal.opening import Durability

__all__ = ["AsyncJournal"]

MANY = 128  # entries that are worth a commit before the loop has gone round


class _Request(NamedTuple):
    """An append that is not staged yet."""

    future: asyncio.Future[Any]
    args: tuple[Any, ...]  # of mw_submit_many, what follows the writer
    batch: int  # how many entries; 0: one, whose result is its op
    frame_bytes: int
    op: int


class AsyncJournal:
    """Awaitable appends to a journal, for one event loop of asyncio (or of anyio upon asyncio).

    Tasks that append at the same time share syncs. An append is staged when it is called, in the order of the
    calls, unless `max_pending` appends have no outcome yet: then it waits its turn. Cancelling an await never
    un-writes what was staged, and holds up nobody; an append that still waited its turn is not made.

    `inline` commits on the loop's own thread, once a turn of the loop: the lowest latency for one task, and
    it blocks the loop for one sync. Where the journal's directory allows no threads, it is always so.

    Other threads may use `journal` meanwhile; the AsyncJournal belongs to the loop that runs when it is first
    used. One at a time for a journal: BusyError for the second. close() leaves `journal` open. Use it as an
    async context manager, or await close(). ValueError when `max_pending` is below 1.
    """

    def __init__(self, journal: Journal, *, max_pending: int = 65_536, inline: bool = False) -> None:
        if not isinstance(journal, Journal):
            raise TypeError(f"journal is a Journal, not {type(journal).__name__}")
        if max_pending < 1:
            raise ValueError(f"max_pending is above 0; not {max_pending}")
        self.journal = journal
        self._engine: Engine = journal._engine
        self._writer = journal._writer
        self._ringer = Ringer(self._engine)
        self._flags, self._clock = journal._flags, journal._clock
        self._max_payload_bytes = journal._max_payload_bytes
        self._max_pending = max_pending
        self._room = 0  # as many may be staged by the common case; none before the start
        self._submit_next = lib.mw_submit_next
        self._inline = inline or not journal.directory.concurrent
        self._certain = journal.durability is Durability.BUFFERED  # as soon as it is staged
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: deque[tuple[asyncio.Future[Any], Any]] = deque()  # staged, with what it will give
        self._backlog: deque[_Request] = deque()  # what waits its turn
        self._unblocking = False  # what the first of them needs is under way
        self._telling = 0  # failures that are about to be told
        self._lost = False  # which outcome is whose
        self._outcomes = ffi.new("struct mw_outcome[]", lib.MW_OUTCOMES)
        self._taken = 0  # tickets that have their outcome
        self._due = False  # something is staged, and nobody was asked to commit it
        self._alone = True  # the last commit served one append
        self._closing = False
        self._event_fd = -1
        self._thread: int
        self._is_running: Callable[[], bool]
        self._settled: asyncio.Event  # nothing is pending; set while closing
        self._finalizer: weakref.finalize[..., AsyncJournal]

    def __repr__(self) -> str:
        return f"<mmapwal.AsyncJournal {self._engine.directory}>"

    async def __aenter__(self) -> Self:
        if not self.journal.readonly:
            self._start()
        return self

    async def __aexit__(
        self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def pending(self) -> int:
        """How many appends have no outcome yet: staged, or waiting their turn."""
        return len(self._pending) + len(self._backlog)

    # --- appending --------------------------------------------------------------------------------

    def append(self, payload: Buffer, *, op: int | None = None, kind: int = 0) -> Awaitable[int]:
        """Stages one entry. The awaitable gives its op when it is as durable as the journal's `durability`
        says. The payload is copied, any C-contiguous buffer. Blocks only where `inline` does.

        It is a future and staged already: await it, or gather() some; create_task() wants a coroutine.

        Arguments that cannot be taken raise at the call: TypeError, ValueError, PayloadTooLargeError; and
        RuntimeError when no loop runs, BusyError, ClosedError, ForkedError. What else Journal.append raises
        comes from the await.
        """
        if (
            op is None and len(self._pending) < self._room and not self._backlog
            and type(payload) is bytes and len(payload) <= self._max_payload_bytes
            and type(kind) is int and 0 <= kind <= fmt.KIND_MAX
            and get_ident() == self._thread and self._is_running()  # get_running_loop() is a system call
        ):  # fmt: skip  # the common case, short
            try:
                done = self._submit_next(self._writer, payload, len(payload), kind)
                if done > 0:
                    future: asyncio.Future[int] = asyncio.Future(loop=self._loop)
                    self._pending.append((future, done))
                    if not self._due or done % MANY == 0:
                        self._staged()
                    return future
            except BaseException:
                self._lose_count()
                raise
        data = self.journal._data(payload)
        return self._request(data, LENGTH.pack(len(data)), 0, fmt.frame_bytes(len(data)), op=op, kind=kind)

    def append_many(
        self, payloads: Iterable[Buffer], *, first_op: int | None = None, kind: int = 0,
        kinds: Iterable[int] | None = None,
    ) -> Awaitable[range]:  # fmt: skip
        """Stages entries with consecutive ops as one batch, all or none; the awaitable gives their ops. An
        empty batch writes nothing. Bounded as Journal.append_many(), else as append()."""
        joined, lengths, even, count, total = self.journal._join(payloads)
        column = ffi.NULL if kinds is None else kinds_column(kinds, count)
        if count:
            return self._request(
                joined, lengths, count, total, op=first_op, kind=kind, column=column, even=even
            )
        loop = self._start()
        self._engine.check_usable()
        first = int(self._engine.state().next_op) if first_op is None else check_op(first_op, "first_op")
        future: asyncio.Future[range] = loop.create_future()
        future.set_result(range(first, first))
        return future

    def _request(
        self,
        data: bytes,
        lengths: bytes,
        batch: int,
        frame_bytes: int,
        *,
        op: int | None,
        kind: int,
        column: Any = ffi.NULL,
        even: int = 0,
    ) -> asyncio.Future[Any]:
        """What is no common case goes by the queue, which is empty most of the time."""
        loop = self._start()
        first = 0 if op is None else check_op(op)
        check_kind(kind)
        timestamp = 0 if self._clock is None else self._clock()
        args = (
            data, lengths, column, batch or 1, first, kind, timestamp, self._flags | even
        )  # fmt: skip
        request = _Request(loop.create_future(), args, batch, frame_bytes, first)
        self._backlog.append(request)
        self._refill()
        return request.future

    def follow(
        self, from_op: int | None = None, *, timeout: float | None = None, written: bool = False
    ) -> AsyncFollowing:
        """As Journal.follow(), as an asynchronous iterator; also of a journal that is `readonly`. One thread
        sleeps for all who follow. What is there is checked on the loop, some hundred entries at a time."""
        if from_op is not None:
            from_op = check_op(from_op, "from_op")
        return AsyncFollowing(self._ringer, from_op, timeout, written=written, owner=self)

    async def sync(self) -> int:
        """Makes all that was appended before durable; the durable LSN. Errors as Journal.sync()."""
        loop = self._start()
        if self._backlog:
            await asyncio.wait([request.future for request in self._backlog])
        if self._inline:
            return self.journal.sync()
        return await loop.run_in_executor(None, self.journal.sync)

    async def close(self) -> None:
        """Waits for the outcome of every append, then ends the committer. The journal stays open. Appends
        that begin after the call get ClosedError. Twice is fine; so is one after one that was cancelled, and
        one when the loop is closed, which can be told nothing any more."""
        loop = self._loop
        if loop is not None and not loop.is_closed() and loop is not _running_loop():
            raise RuntimeError("the AsyncJournal belongs to another event loop")
        self._closing = True
        self._room = 0
        if loop is None or self._engine.forked:
            return
        if loop.is_closed():
            self._finalizer()
            return
        while self.pending or self._telling:
            self._settled.clear()
            self._turn()
            await self._settled.wait()
        if self._finalizer.alive:
            loop.remove_reader(self._event_fd)
            self._finalizer()

    # --- the loop ---------------------------------------------------------------------------------

    def _start(self) -> asyncio.AbstractEventLoop:
        """The loop, that of the first use."""
        if self._engine.forked:
            raise ForkedError("the writer belongs to the parent process")
        loop = asyncio.get_running_loop()
        if self._closing:
            raise ClosedError("the AsyncJournal is closed")
        if self._loop is not None:
            if self._loop is not loop:
                raise RuntimeError("the AsyncJournal belongs to another event loop")
            return loop
        self._settled = asyncio.Event()
        event_fd = self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            loop.add_reader(event_fd, self._woken)
            code = lib.mw_committer_start(self._writer, event_fd, not self._inline)
            if code == -errno.EBUSY:
                raise BusyError("the journal has another AsyncJournal")
            if code != 0:
                raise self._engine.error(code)
        except BaseException:
            loop.remove_reader(event_fd)
            os.close(event_fd)
            raise
        self._finalizer = weakref.finalize(self, _stop, self._engine, self._writer, event_fd)
        self._loop, self._thread, self._is_running = loop, get_ident(), loop.is_running
        if not self._certain and self._clock is None:
            self._room = self._max_pending
        return loop

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event_fd)
        self._take()

    def _staged(self) -> None:
        """One is staged, or many: when to commit? With all that this turn of the loop brings; at once where
        no others are about, or many are there already."""
        self._alone = self._alone and len(self._pending) == 1
        many, self._due = self._due, True
        if not self._inline and (self._alone or many):
            self._turn()
        elif not many:
            self._running.call_soon(self._turn)

    def _turn(self) -> None:
        """Has what is staged committed."""
        if not self._due:
            return
        try:
            if self._inline:
                lib.mw_committer_lead(self._writer)  # whatever it says, the outcomes say
            else:
                lib.mw_committer_kick(self._writer)
        except BaseException:  # of a signal handler
            self._running.call_soon(self._turn)
            raise
        self._due = False
        if self._inline:
            self._take()

    def _take(self) -> None:
        """Tells those whose outcome is known."""
        before = self._taken
        pending = self._pending
        rows = self._outcomes
        try:
            for i in range(max(0, lib.mw_outcomes(self._writer, rows))):
                ticket, result = rows[i].ticket, rows[i].result
                count, self._taken = ticket - self._taken, ticket
                if self._lost:
                    continue
                if result == 0:
                    for _ in range(count):
                        future, value = pending.popleft()
                        try:  # noqa: SIM105  # suppress() costs more than all the rest
                            future.set_result(value)
                        except InvalidStateError:  # cancelled: written all the same
                            pass
                else:
                    self._fail([pending.popleft() for _ in range(count)], result)
        except BaseException:
            self._lose_count()
            raise
        self._alone = self._taken - before == 1 and not pending
        self._refill()
        self._settle()

    def _settle(self) -> None:
        if self._closing and not (self.pending or self._telling):
            self._settled.set()

    def _lose_count(self) -> None:
        """An exception out of nowhere (of a signal handler, or no memory) where tickets are counted: whose an
        outcome is cannot be said any more, so nobody is told a success that may be another's."""
        self._lost = self._closing = True
        self._room = 0
        futures = [future for future, _ in self._pending] + [request.future for request in self._backlog]
        self._pending.clear()
        self._backlog.clear()
        for future in futures:
            _tell_error(
                future, JournalError("the loop was interrupted: the outcome of this append is unknown")
            )
        self._settle()

    def _fail(self, failed: list[tuple[asyncio.Future[Any], Any]], code: int) -> None:
        """Tells the error of a commit, each his own. After a clean failure what was written shall not come
        back, which takes a write of its own."""
        self._telling += 1
        if code <= lib.MW_E_DUPLICATE:
            self._tell_failure(failed, code, None)
        else:
            self._aside(self._engine.pay_epoch, partial(self._tell_failure, failed, code))

    def _tell_failure(
        self, failed: list[tuple[asyncio.Future[Any], Any]], code: int, error: BaseException | None
    ) -> None:
        self._telling -= 1
        if isinstance(error, PoisonedError):  # so what was written may come back after all
            code = lib.MW_E_POISONED
        for future, value in failed:
            op = value if isinstance(value, int) else value.start
            _tell_error(future, self._engine.error(code, op))
        self._settle()

    def _aside(self, work: Callable[[], None], then: Callable[[BaseException | None], None]) -> None:
        """Does what blocks off the loop, unless `inline`, and `then` tells how it ended."""

        def ended(done: asyncio.Future[None]) -> None:
            then(asyncio.CancelledError() if done.cancelled() else done.exception())

        if not self._inline:
            with contextlib.suppress(RuntimeError):  # the loop is about to be closed, and its threads ended
                self._running.run_in_executor(None, work).add_done_callback(ended)
                return
        error: BaseException | None = None
        try:
            work()
        except Exception as e:  # noqa: BLE001  # told
            error = e
        except BaseException as e:
            then(e)
            raise
        then(error)

    # --- what waits its turn ----------------------------------------------------------------------

    @property
    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("the AsyncJournal was not used yet")
        return self._loop

    def _refill(self) -> None:
        """Stages what waits, in order, as far as there is room and nothing is in the way."""
        backlog = self._backlog
        while backlog and not self._unblocking and len(self._pending) < self._max_pending:
            request = backlog[0]
            if request.future.done():  # cancelled before it was staged: not made
                backlog.popleft()
                continue
            try:
                done = lib.mw_submit_many(self._writer, *request.args)
                if done > 0:
                    backlog.popleft()
                    self._accept(request, done)
                    continue
            except (OverflowError, TypeError) as e:  # of the clock
                backlog.popleft()
                _tell_error(request.future, out_of_range(e, request.args[-3], request.args[-2]))
                continue
            except BaseException:
                self._lose_count()
                raise
            if done == -errno.EAGAIN:  # outcomes wait, so this comes again with them
                self._running.call_soon(self._take)
                return
            else:
                self._make_way(request, done)

    def _accept(self, request: _Request, first: int) -> None:
        value = range(first, first + request.batch) if request.batch else first
        if self._certain:
            request.future.set_result(value)
        else:
            self._pending.append((request.future, value))
            if not self._due or first % MANY == 0:
                self._staged()

    def _make_way(self, request: _Request, code: int) -> None:
        """A segment, an epoch, the end of a removal: off the loop. Any other code is the request's error."""
        work = partial(self._engine.make_way, code, request.frame_bytes, request.op)
        if self._inline or code not in self._engine.OBSTACLES:
            try:
                work()
            except Exception as e:  # noqa: BLE001  # told to who awaits
                self._backlog.popleft()
                _tell_error(request.future, e)
            except BaseException:
                self._lose_count()
                raise
        else:
            self._unblocking = True
            self._aside(work, partial(self._way_made, request))

    def _way_made(self, request: _Request, error: BaseException | None) -> None:
        self._unblocking = False
        if error is not None and self._backlog and self._backlog[0] is request:
            self._backlog.popleft()
            _tell_error(request.future, error)
        self._take()


def _tell_error(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _stop(engine: Engine, writer: Any, event_fd: int) -> None:
    """What was submitted is committed; then nobody writes to the eventfd any more."""
    if not engine.forked:
        lib.mw_committer_lead(writer)
        lib.mw_committer_stop(writer)
    os.close(event_fd)
