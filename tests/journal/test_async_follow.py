"""AsyncJournal.follow(): the same on an event loop."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mmapwal import (
    AsyncJournal,
    ClosedError,
    Entry,
    Journal,
    ReadonlyError,
    StaleOpError,
    TruncatedError,
    following,
    observer,
)
from tests.conftest import Home

SMALL: dict[str, Any] = {"slots": 256, "segment_bytes": 16384}


@pytest.fixture
def never_looks_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is not woken sleeps on."""
    for module in (following, observer):
        monkeypatch.setattr(module, "LOOK_S", 3600)
    monkeypatch.setattr("mmapwal.aio_following.LOOK_S", 3600)


async def ops(entries: AsyncIterator[Entry]) -> list[int]:
    return [entry.op async for entry in entries]


def followers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "mmapwal-follow"}


@pytest.mark.usefixtures("never_looks_around")
def test_all_tasks_that_follow_are_woken_by_each_commit_of_tasks_and_of_threads(home: Home) -> None:
    async def main() -> None:
        async with AsyncJournal(journal) as aj:

            async def follows() -> list[int]:
                got = []
                async for entry in aj.follow():
                    got.append(entry.op)
                    if entry.op == 60:
                        return got
                raise AssertionError("it ended")

            tasks = [asyncio.create_task(follows()) for _ in range(5)]
            for _ in range(30):
                await aj.append(b"from a task")
                await asyncio.to_thread(journal.append, b"from a thread")
            for got in await asyncio.wait_for(asyncio.gather(*tasks), 30):
                assert got == list(range(1, 61))

    journal = home.open(**SMALL)
    asyncio.run(main())


def test_it_ends_when_nothing_came_for_so_long_and_its_thread_ends_with_the_last_who_follows(
    home: Home,
) -> None:
    async def main() -> None:
        async with AsyncJournal(journal) as aj:
            before = followers()
            assert await ops(aj.follow(timeout=0)) == [1, 2, 3]
            entries = aj.follow(timeout=0.05)
            assert (await anext(entries)).op == 1
            assert await ops(entries) == [2, 3]
            for _ in range(200):
                if followers() <= before:
                    return
                await asyncio.sleep(0.05)
            raise AssertionError("the thread is still there")

    journal = home.open(**SMALL)
    journal.append_many([b"a", b"b", b"c"])
    asyncio.run(main())


def test_a_task_that_is_cancelled_while_it_follows_leaves_the_others_alone(home: Home) -> None:
    async def main() -> None:
        async with AsyncJournal(journal) as aj:
            entries = aj.follow()
            cancelled = asyncio.create_task(ops(aj.follow()))
            await aj.append(b"1")
            assert (await anext(entries)).op == 1
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            waiting = asyncio.ensure_future(anext(entries))
            await asyncio.sleep(0.01)
            await aj.append(b"2")
            assert (await asyncio.wait_for(waiting, 20)).op == 2

    journal = home.open(**SMALL)
    asyncio.run(main())


def test_after_an_error_it_goes_on_behind_what_was_removed(home: Home) -> None:
    async def main() -> None:
        async with AsyncJournal(journal) as aj:
            entries = aj.follow(timeout=0)
            assert await ops(entries) == list(range(1, 11))
            journal.truncate_from(6)
            with pytest.raises(TruncatedError) as cut:
                await ops(entries)
            assert cut.value.op == 6
            journal.append_many([b"x"] * 20)
            journal.set_snapshot_op(15)
            with pytest.raises(StaleOpError) as stale:
                await ops(entries)
            assert stale.value.first_op == 16
            assert await ops(entries) == list(range(16, 26))
            with pytest.raises(ValueError, match="from_op"):
                aj.follow(0)

    journal = home.open(**SMALL)
    journal.append_many([b"x"] * 10)
    asyncio.run(main())


@pytest.mark.usefixtures("never_looks_around")
def test_one_that_waits_is_told_when_the_journal_is_closed(home: Home) -> None:
    async def main() -> None:
        aj = AsyncJournal(journal)
        waiting = asyncio.create_task(ops(aj.follow()))
        await asyncio.sleep(0.05)
        await aj.close()
        journal.close()
        with pytest.raises(ClosedError):
            await asyncio.wait_for(waiting, 20)

    journal = home.open(**SMALL)
    asyncio.run(main())


@pytest.mark.parametrize("kind", ["mapped"], indirect=True)
def test_a_journal_that_is_only_read_is_followed_and_not_appended_to(home: Home) -> None:
    async def main(reader: Journal) -> None:
        async with AsyncJournal(reader) as aj:
            entries = aj.follow()
            for op in range(1, 30):
                await asyncio.to_thread(writer.append, b"x")
                assert (await asyncio.wait_for(anext(entries), 20)).op == op
            with pytest.raises(ReadonlyError):
                await aj.append(b"x")

    writer = home.open(**SMALL)
    with Journal(home.path, readonly=True) as reader:
        asyncio.run(main(reader))


def test_an_iterator_keeps_the_journal_that_nobody_else_has(tmp_path: Path) -> None:
    async def main() -> list[int]:
        entries = AsyncJournal(Journal(tmp_path / "j", readonly=True)).follow(timeout=0)
        gc.collect()
        return await ops(entries)

    with Journal(tmp_path / "j", **SMALL) as journal:
        journal.append_many([b"x"] * 20)
    with pytest.warns(ResourceWarning, match="not closed"):  # nobody could
        assert asyncio.run(main()) == list(range(1, 21))
        gc.collect()
