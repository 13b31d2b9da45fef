"""Tasks of an event loop append: in order, durable when told, many to a sync; the loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from mmapwal import (
    AsyncJournal,
    BusyError,
    ClosedError,
    DuplicateOpError,
    Durability,
    Journal,
    JournalFullError,
    PayloadTooLargeError,
    StaleOpError,
)

from .files import Contents, Home, contents_of, killed
from .watched import WAIT_S, Gate, Task, Watched, held_up

EACH_INLINE = pytest.mark.parametrize("inline", [False, True], ids=["threaded", "inline"])
EACH_DURABILITY = pytest.mark.parametrize("durability", list(Durability))


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Runs it in a loop of its own, and not for ever."""
    return asyncio.run(asyncio.wait_for(main, WAIT_S))


async def told(*awaitables: Awaitable[Any]) -> list[Any]:
    """What each came to: its result, or its error."""
    return await asyncio.wait_for(asyncio.gather(*awaitables, return_exceptions=True), WAIT_S)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT_S)


@contextmanager
def concurrent(open_on: Callable[..., Journal], **options: Any) -> Iterator[tuple[Watched, Journal]]:
    """A journal in memory, where the committer's calls are watched, and whose committer is a thread."""
    directory = Watched()
    directory.concurrent = True
    with open_on(directory, **options) as journal:
        yield directory, journal


def is_commit(call: Any) -> bool:
    return call.kind == "write_sync" and call.name.startswith("segment")


@EACH_INLINE
@EACH_DURABILITY
def test_ops_are_in_the_order_of_the_calls_and_a_kill_loses_nothing_that_was_told(
    home: Home, durability: Durability, inline: bool
) -> None:
    journal = home.open(slots=1024, segment_bytes=16384, durability=durability)
    wanted: Contents = {}

    async def main() -> None:
        async with AsyncJournal(journal, inline=inline) as appends:
            for round_ in range(1, 5):
                first = len(wanted) + 1
                calls: list[Awaitable[Any]] = []
                expected: list[Any] = []
                for n in range(first, first + 60, 3):
                    expected += [n, range(n + 1, n + 3)]
                    calls.append(appends.append(b"%d" % n * round_ * 5, kind=round_))
                    calls.append(appends.append_many([b"a%d" % n, bytearray(b"b%d" % n)], kind=7))
                    wanted[n] = (b"%d" % n * round_ * 5, round_)
                    wanted[n + 1], wanted[n + 2] = (b"a%d" % n, 7), (b"b%d" % n, 7)
                assert await told(*calls) == expected
                if durability is Durability.BUFFERED:
                    await appends.sync()
                with killed(home, journal).open() as left:
                    assert contents_of(left) == wanted
                    assert left.verify().ok
            assert appends.pending == 0

    run(main())
    assert contents_of(journal) == wanted
    journal.close()
    assert contents_of(home.open()) == wanted


@EACH_INLINE
@pytest.mark.parametrize("durability", [Durability.SYNC, Durability.OS])
def test_tasks_that_append_at_once_share_commits(home: Home, durability: Durability, inline: bool) -> None:
    journal = home.open(slots=4096, durability=durability)

    async def main() -> None:
        async with AsyncJournal(journal, inline=inline) as appends:

            async def one(n: int) -> int:
                return await appends.append(b"%d" % n)

            await appends.append(b"first")
            before = journal._engine.state().commits
            assert await told(*(one(n) for n in range(500))) == list(range(2, 502))
            assert journal._engine.state().commits - before <= 25

    run(main())


def test_a_commit_wakes_the_loop_once(
    open_on: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    woken = []
    wake = AsyncJournal._woken

    def counted(self: AsyncJournal) -> None:
        woken.append(self.pending)
        wake(self)

    monkeypatch.setattr(AsyncJournal, "_woken", counted)

    async def main(directory: Watched, journal: Journal) -> None:
        directory.on = gate = Gate(is_commit)
        async with AsyncJournal(journal) as appends:
            calls = [appends.append(b"%d" % n) for n in range(5)]
            await until(gate.reached)
            calls += [appends.append(b"%d" % n) for n in range(5, 200)]
            gate.open()
            assert await told(*calls) == list(range(1, 201))
        assert len(woken) <= journal._engine.state().commits <= 4
        assert woken[0] == 200

    with concurrent(open_on, slots=1024, segment_bytes=1 << 20) as (directory, journal):
        run(main(directory, journal))


def test_what_is_submitted_while_a_thread_commits_is_committed_next(
    open_on: Callable[..., Journal],
) -> None:
    async def main(directory: Watched, journal: Journal) -> None:
        async with AsyncJournal(journal) as appends:
            await appends.append(b"one")
            directory.on = gate = Gate(is_commit)
            thread = Task(lambda: journal.append(b"two"))
            await until(gate.reached)
            calls = [asyncio.ensure_future(appends.append(b"three"))]
            await turns(3)
            calls.append(asyncio.ensure_future(appends.append(b"four")))
            await turns(3)
            gate.open()
            assert await told(*calls) == [3, 4]
            assert thread.result() == 2

    with concurrent(open_on) as (directory, journal):
        run(main(directory, journal))


def test_nobody_is_told_before_the_sync_is_done(open_on: Callable[..., Journal]) -> None:
    async def main(directory: Watched, journal: Journal) -> None:
        directory.on = gate = Gate(is_commit)
        async with AsyncJournal(journal) as appends:
            call = asyncio.ensure_future(appends.append(b"one"))
            await until(gate.reached)
            await turns(20)
            assert not call.done()
            assert 1 not in journal
            gate.open()
            assert await told(call) == [1]
            assert 1 in journal

    with concurrent(open_on) as (directory, journal):
        run(main(directory, journal))


@EACH_INLINE
@pytest.mark.parametrize("max_pending", [1, 2, 7])
def test_no_more_than_max_pending_are_staged_and_the_rest_waits_in_order(
    home: Home, inline: bool, max_pending: int
) -> None:
    journal = home.open(slots=1024, segment_bytes=16384)

    async def main() -> None:
        async with AsyncJournal(journal, inline=inline, max_pending=max_pending) as appends:
            calls: list[Awaitable[Any]] = []
            for n in range(1, 100):
                calls.append(appends.append(b"%d" % n * 30))
                assert len(appends._pending) <= max_pending
                assert appends.pending == n
            done = asyncio.gather(*calls)
            while not done.done():
                assert len(appends._pending) <= max_pending
                await asyncio.sleep(0)
            assert await done == list(range(1, 100))
            assert appends.pending == 0

    run(main())
    assert contents_of(journal) == {n: (b"%d" % n * 30, 0) for n in range(1, 100)}


@EACH_INLINE
@pytest.mark.parametrize("max_pending", [2, 100])
def test_a_cancelled_task_holds_up_nobody_and_unwrites_nothing(
    home: Home, inline: bool, max_pending: int
) -> None:
    """Cancelled at any moment: before it began, waiting its turn, staged, under way, done."""
    journal = home.open(slots=4096, segment_bytes=16384)

    async def main() -> None:
        known = 0
        async with AsyncJournal(journal, inline=inline, max_pending=max_pending) as appends:
            for after in range(12):

                async def one(n: int, after: int = after) -> int:
                    return await appends.append(b"%d of %d" % (n, after))

                tasks = [asyncio.create_task(one(n)) for n in range(6)]
                await turns(after)
                staged = {bytes(e.payload) for e in journal.entries(known + 1)}
                tasks[3].cancel()
                results = await told(*tasks)
                others = [r for n, r in enumerate(results) if n != 3]
                assert others == sorted(others)
                assert all(type(r) is int for r in others)
                await appends.append(b"last")
                found = {e.op: bytes(e.payload) for e in journal.entries(known + 1)}
                payloads = list(found.values())
                in_order = [b"%d of %d" % (n, after) for n in range(6) if n != 3]
                assert [p for p in payloads if not p.startswith(b"3")] == [*in_order, b"last"]
                if isinstance(results[3], int):
                    assert found[results[3]] == b"3 of %d" % after
                else:
                    assert isinstance(results[3], asyncio.CancelledError)
                assert staged <= set(payloads)
                known = max(found)
        assert [e.op for e in journal] == list(range(1, known + 1))

    run(main())


def test_an_append_that_is_cancelled_while_it_waits_its_turn_is_not_made(
    open_on: Callable[..., Journal],
) -> None:
    async def main(directory: Watched, journal: Journal) -> None:
        directory.on = gate = Gate(is_commit)
        async with AsyncJournal(journal, max_pending=1) as appends:
            calls = [asyncio.ensure_future(appends.append(b"%d" % n)) for n in range(4)]
            await until(gate.reached)
            calls[0].cancel()  # staged: made all the same
            calls[2].cancel()
            gate.open()
            results = await told(*calls)
            assert [type(r) for r in results] == [asyncio.CancelledError, int, asyncio.CancelledError, int]
            assert (results[1], results[3]) == (2, 3)
        assert contents_of(journal) == {1: (b"0", 0), 2: (b"1", 0), 3: (b"3", 0)}

    with concurrent(open_on) as (directory, journal):
        run(main(directory, journal))


# --- what is in the way -------------------------------------------------------------------------------


async def waits_without_blocking(calls: list[Awaitable[Any]]) -> asyncio.Future[Any]:
    """The loop turns while the calls make no progress."""
    gathered = asyncio.gather(*calls, return_exceptions=True)
    for _ in range(5):
        await asyncio.sleep(0.002)
        assert not gathered.done()
    return gathered


def test_a_segment_that_must_be_made_holds_up_its_appends_but_not_the_loop(
    open_on: Callable[..., Journal],
) -> None:
    async def main(directory: Watched, journal: Journal) -> None:
        async with AsyncJournal(journal) as appends:
            assert await told(*(appends.append(bytes(1000)) for _ in range(5))) == [1, 2, 3, 4, 5]
            with journal._engine.structure:  # nobody makes a segment; RLock, so the loop's thread must not
                calls = [appends.append(b"%d" % n * 800) for n in range(20)]
                gathered = await waits_without_blocking(calls)
            assert await asyncio.wait_for(gathered, WAIT_S) == list(range(6, 26))

    with concurrent(open_on, slots=64) as (directory, journal):
        run(main(directory, journal))
        assert [bytes(p) for p in journal.payloads(6)] == [b"%d" % n * 800 for n in range(20)]


def test_a_removal_by_another_thread_holds_up_appends_but_not_the_loop(
    open_on: Callable[..., Journal],
) -> None:
    async def main(directory: Watched, journal: Journal) -> None:
        async with AsyncJournal(journal) as appends:
            await told(*(appends.append(b"%d" % n) for n in range(1, 6)))
            renamed = lambda call: call.kind == "rename"  # noqa: E731
            with held_up(directory, renamed, lambda: journal.truncate_from(4)) as removal:
                calls = [appends.append(b"new %d" % n) for n in range(3)]
                gathered = await waits_without_blocking(calls)
            assert removal.result() == 2
            assert await asyncio.wait_for(gathered, WAIT_S) == [4, 5, 6]
        assert [bytes(p) for p in journal.payloads()] == [b"1", b"2", b"3", b"new 0", b"new 1", b"new 2"]

    with concurrent(open_on) as (directory, journal):
        run(main(directory, journal))


# --- errors before anything is written ----------------------------------------------------------------


@EACH_INLINE
def test_every_error_of_an_append_arrives_and_nothing_is_written(home: Home, inline: bool) -> None:
    journal = home.open(slots=8, max_payload_bytes=1000)
    journal.append_many([b"%d" % n for n in range(1, 7)])
    journal.set_snapshot_op(2)
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (DuplicateOpError, {"op": 4}),
        (StaleOpError, {"op": 2}),
        (JournalFullError, {"op": 11}),
        (PayloadTooLargeError, {"payload": bytes(1001)}),
        (ValueError, {"kind": 1 << 15}),
        (ValueError, {"kind": -1}),
        (TypeError, {"kind": "7"}),
        (ValueError, {"op": 0}),
        (ValueError, {"op": 1 << 63}),
        (TypeError, {"op": "7"}),
        (TypeError, {"op": True}),
        (TypeError, {"payload": "text"}),
        (ValueError, {"payload": memoryview(bytes(10))[::2]}),
    ]

    async def main() -> None:
        async with AsyncJournal(journal, inline=inline) as appends:
            for error, arguments in wrong:
                payload = arguments.get("payload", b"x")
                rest = {name: value for name, value in arguments.items() if name != "payload"}
                with pytest.raises(error) as expected:
                    journal.append(payload, **rest)
                with pytest.raises(error) as raised:
                    await appends.append(payload, **rest)
                assert type(raised.value) is type(expected.value)
                if "kind" not in rest:
                    assert str(raised.value) == str(expected.value)
                if "op" in rest:
                    rest["first_op"] = rest.pop("op")
                with pytest.raises(error):
                    await appends.append_many([payload], **rest)
            assert journal.written_lsn == written
            assert await appends.append_many([]) == range(7, 7)
            assert await appends.append(b"7", op=7, kind=3) == 7  # nothing is in its way

    written = journal.written_lsn
    run(main())
    assert [e.op for e in journal] == [3, 4, 5, 6, 7]


@EACH_INLINE
def test_a_batch_has_a_kind_for_each_entry_and_wrong_ones_are_refused_at_the_call(
    home: Home, inline: bool
) -> None:
    journal = home.open(slots=8)

    async def main() -> None:
        async with AsyncJournal(journal, inline=inline) as appends:
            for kinds in ([1], [1, 2, 3], [1, -1], [1, 1 << 15]):
                with pytest.raises(ValueError, match="kind"):
                    appends.append_many([b"a", b"b"], kinds=kinds)
            with pytest.raises(TypeError, match="kind"):
                appends.append_many([b"a", b"b"], kinds=["1", 2])  # type: ignore[list-item]
            assert await appends.append_many([b"a", b"b"], kinds=[7, 2**15 - 1]) == range(1, 3)
            assert await appends.append_many([b"c"], kind=4) == range(3, 4)

    run(main())
    assert contents_of(journal) == {1: (b"a", 7), 2: (b"b", 2**15 - 1), 3: (b"c", 4)}


@EACH_INLINE
def test_an_error_of_one_is_not_that_of_those_beside_it(home: Home, inline: bool) -> None:
    journal = home.open(slots=64)

    async def main() -> None:
        async with AsyncJournal(journal, inline=inline) as appends:
            calls = [appends.append(b"a"), appends.append(b"b", op=1), appends.append(b"c"),
                     appends.append_many([b"d", b"e"], first_op=2), appends.append(b"f")]  # fmt: skip
            results = await told(*calls)
            assert [type(r) for r in results] == [int, DuplicateOpError, int, DuplicateOpError, int]

    run(main())
    assert contents_of(journal) == {1: (b"a", 0), 2: (b"c", 0), 3: (b"f", 0)}


@EACH_INLINE
def test_a_clock_of_ones_own_gives_the_timestamps(home: Home, inline: bool) -> None:
    clock = itertools.count(1000)
    journal = home.open(clock=lambda: next(clock))

    async def main() -> None:
        async with AsyncJournal(journal, inline=inline) as appends:
            await told(appends.append(b"a"), appends.append(b"b"), appends.append_many([b"c", b"d"]))

    run(main())
    assert [e.timestamp for e in journal] == [1000, 1001, 1002, 1002]


# --- sync, and others at the same journal -------------------------------------------------------------


@EACH_INLINE
@EACH_DURABILITY
def test_sync_makes_durable_what_was_appended_before_also_what_waited_its_turn(
    home: Home, durability: Durability, inline: bool
) -> None:
    journal = home.open(slots=1024, segment_bytes=16384, durability=durability)

    async def main() -> None:
        async with AsyncJournal(journal, inline=inline, max_pending=3) as appends:
            calls = [appends.append(b"%d" % n * 20) for n in range(50)]
            durable = await appends.sync()
            assert durable == journal.durable_lsn == journal.written_lsn
            with killed(home, journal).open() as left:
                assert len(left) == 50
            assert await told(*calls) == list(range(1, 51))

    run(main())


@EACH_DURABILITY
def test_threads_and_tasks_append_to_one_journal(home: Home, durability: Durability) -> None:
    journal = home.open(slots=4096, segment_bytes=16384, durability=durability)
    wanted: dict[int, bytes] = {}

    def thread(w: int) -> None:
        for n in range(60):
            payload = b"thread %d %d" % (w, n)
            wanted[journal.append(payload)] = payload

    async def main() -> None:
        async with AsyncJournal(journal) as appends:

            async def task(w: int) -> None:
                for n in range(60):
                    payload = b"task %d %d" % (w, n)
                    wanted[await appends.append(payload)] = payload

            threads = [Task(lambda w=w: thread(w)) for w in range(4)]
            assert (await told(*(task(w) for w in range(8)), appends.sync()))[:8] == [None] * 8
            for t in threads:
                await asyncio.to_thread(t.result)

    run(main())
    assert {e.op: bytes(e.payload) for e in journal} == wanted
    assert sorted(wanted) == list(range(1, 12 * 60 + 1))
    journal.sync()
    assert {e.op: bytes(e.payload) for e in killed(home, journal).open()} == wanted


@EACH_INLINE
def test_a_second_one_at_a_journal_is_refused_until_the_first_is_closed(home: Home, inline: bool) -> None:
    journal = home.open()

    async def main() -> None:
        first, second = AsyncJournal(journal, inline=inline), AsyncJournal(journal, inline=inline)
        assert await first.append(b"a") == 1
        for _ in range(2):
            with pytest.raises(BusyError):
                await second.append(b"no")
            with pytest.raises(BusyError):
                async with second:
                    pass
            second = AsyncJournal(journal, inline=inline)
        await first.close()
        assert await second.append(b"b") == 2
        with pytest.raises(ClosedError):
            await first.append(b"no")
        await second.close()

    run(main())
    assert contents_of(journal) == {1: (b"a", 0), 2: (b"b", 0)}


@EACH_INLINE
def test_another_loop_is_refused(home: Home, inline: bool) -> None:
    journal = home.open()

    async def elsewhere(appends: AsyncJournal) -> None:
        for call in (lambda: appends.append(b"no"), lambda: appends.append(b"no", op=9), appends.close,
                     lambda: appends.append_many([b"no"]), appends.sync):  # fmt: skip
            with pytest.raises(RuntimeError, match="another event loop"):
                await call()

    async def main() -> None:
        async with AsyncJournal(journal, inline=inline) as appends:
            assert await appends.append(b"a") == 1
            await asyncio.to_thread(lambda: run(elsewhere(appends)))
            assert await appends.append(b"b") == 2

    run(main())
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncJournal(journal).append(b"no")
    assert contents_of(journal) == {1: (b"a", 0), 2: (b"b", 0)}


def test_anyio_on_asyncio_can_use_it(home: Home) -> None:
    journal = home.open()
    given: list[int] = []

    async def main() -> None:
        with anyio.fail_after(WAIT_S):
            async with AsyncJournal(journal) as appends, anyio.create_task_group() as group:

                async def one(n: int) -> None:
                    given.append(await appends.append(b"%d" % n))

                for n in range(20):
                    group.start_soon(one, n)

    anyio.run(main)
    assert sorted(given) == list(range(1, 21))


def test_max_pending_is_above_zero(home: Home) -> None:
    with pytest.raises(ValueError, match="max_pending"):
        AsyncJournal(home.open(), max_pending=0)
