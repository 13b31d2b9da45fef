"""Following a journal on an event loop: one thread sleeps by the bell for all who follow, and wakes the loop
once, however many they are."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

from mmapwal.following import Bell, Followed, Follower
from mmapwal.observer import LOOK_S
from mmapwal.reader import Entry

__all__ = ["AsyncFollowing", "Ringer"]


class Ringer:
    """Wakes those who follow one journal on one loop."""

    def __init__(self, engine: Followed) -> None:
        self.engine = engine
        self._sleeping: set[asyncio.Event] = set()
        self._bell: Bell | None = None
        self._told = False  # the loop has not taken notice yet

    @contextlib.contextmanager
    def hear(self) -> Iterator[asyncio.Event]:
        """An event that is set whenever something may have come."""
        rung = asyncio.Event()
        self._sleeping.add(rung)
        try:
            if self._bell is None:
                self._bell = Bell(self.engine)
                self._bell.listen()
                args = self._bell, asyncio.get_running_loop()
                threading.Thread(target=self._watch, args=args, name="mmapwal-follow", daemon=True).start()
            yield rung
        finally:
            self._sleeping.discard(rung)
            if not self._sleeping and self._bell is not None:
                self._bell.stop()
                self._bell = None

    def _watch(self, bell: Bell, loop: asyncio.AbstractEventLoop) -> None:
        while bell is self._bell:
            # What fails here fails for those who follow as well, and is theirs to tell.
            with contextlib.suppress(OSError):
                bell.wait(LOOK_S)
                bell.listen()
            if not self._told:
                self._told = True
                try:
                    loop.call_soon_threadsafe(self._ring)
                except RuntimeError:  # the loop is closed
                    return

    def _ring(self) -> None:
        self._told = False
        for rung in self._sleeping:
            rung.set()


class AsyncFollowing:
    """AsyncJournal.follow(): an asynchronous iterator. After an error it goes on behind that."""

    def __init__(self, ringer: Ringer, from_op: int | None, timeout: float | None, *, written: bool) -> None:
        self._ringer = ringer
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
        with self._ringer.hear() as rung:
            while True:
                for entry in self._rest:
                    yield entry
                    deadline = None
                rung.clear()
                entries = self._follower.take()
                if entries is not None:
                    self._rest = entries
                    await asyncio.sleep(0)  # others have their turn
                    continue
                if self._timeout is not None:
                    deadline = loop.time() + self._timeout if deadline is None else deadline
                    if loop.time() >= deadline:
                        return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        await rung.wait()
