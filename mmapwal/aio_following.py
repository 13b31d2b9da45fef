"""Following a journal on an event loop: one thread sleeps by the bell for all who follow, and wakes the loop
once, however many they are."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

from mmapwal.following import Bell, Followed, Follower, check_timeout
from mmapwal.observer import LOOK_S
from mmapwal.reader import Entry
from mmapwal.threads import start_thread

__all__ = ["AsyncFollowing", "Ringer"]


class Ringer:
    """Wakes those who follow one journal: on each loop by one thread."""

    def __init__(self, engine: Followed) -> None:
        self.engine = engine
        self._watches: dict[asyncio.AbstractEventLoop, _Watch] = {}

    @contextlib.contextmanager
    def hear(self) -> Iterator[asyncio.Event]:
        """An event of the running loop that is set whenever something may have come."""
        loop = asyncio.get_running_loop()
        for other in [other for other in list(self._watches) if other.is_closed()]:
            if (gone := self._watches.pop(other, None)) is not None:
                gone.bell.stop()  # those who slept there ended with it
        watch = self._watches.get(loop)
        if watch is None:
            watch = self._watches[loop] = _Watch(self.engine, loop)
        rung = asyncio.Event()
        watch.sleeping.add(rung)
        try:
            yield rung
        finally:
            watch.sleeping.discard(rung)
            if not watch.sleeping and self._watches.get(loop) is watch:
                del self._watches[loop]
                watch.bell.stop()


class _Watch:
    """Who sleeps on one loop, and the thread that sleeps by the bell for them until that is stopped."""

    def __init__(self, engine: Followed, loop: asyncio.AbstractEventLoop) -> None:
        self.sleeping: set[asyncio.Event] = set()
        self.bell = Bell(engine)
        self.bell.listen()
        self._loop = loop
        self._told = False  # the loop has not taken notice yet
        start_thread("follow", self._run)

    def _run(self) -> None:
        while not (self.bell.stopped or self._loop.is_closed()):
            # What fails here fails for those who follow as well, and is theirs to tell.
            with contextlib.suppress(OSError):
                self.bell.wait(LOOK_S)
                self.bell.listen()
            if not self._told:
                self._told = True
                try:
                    self._loop.call_soon_threadsafe(self._ring)
                except RuntimeError:  # the loop is closed
                    return

    def _ring(self) -> None:
        self._told = False
        for rung in self.sleeping:
            rung.set()


class AsyncFollowing:
    """AsyncJournal.follow(): an asynchronous iterator. After an error it goes on behind that."""

    def __init__(
        self, ringer: Ringer, from_op: int | None, timeout: float | None, *, written: bool, owner: object
    ) -> None:
        check_timeout(timeout)
        self._ringer = ringer
        self._owner = owner  # who closes the engine when nobody has him any more
        self._follower = Follower(ringer.engine, from_op, written=written)
        self._timeout = timeout
        self._rest: Iterator[Entry] = iter(())  # taken, and not given yet

    def __aiter__(self) -> AsyncIterator[Entry]:
        return self._entries()

    async def __anext__(self) -> Entry:
        async with contextlib.aclosing(self._entries()) as entries:
            return await anext(entries)

    async def _entries(self) -> AsyncGenerator[Entry, None]:
        loop = asyncio.get_running_loop()
        deadline = None
        rung: asyncio.Event | None = None
        with contextlib.ExitStack() as stack:
            while True:
                for entry in self._rest:
                    yield entry
                    deadline = None
                if rung is not None:
                    rung.clear()
                entries = self._follower.take()
                if entries is not None:
                    self._rest = entries
                    await asyncio.sleep(0)  # others have their turn
                    continue
                if rung is None:  # what is there needs no bell; with it, looked at once more
                    rung = stack.enter_context(self._ringer.hear())
                    continue
                if self._timeout is not None:
                    deadline = loop.time() + self._timeout if deadline is None else deadline
                    if loop.time() >= deadline:
                        if self._follower.is_over():
                            return
                        continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        await rung.wait()
