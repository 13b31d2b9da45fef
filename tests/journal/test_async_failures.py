"""Tasks that append while the disk fails, the journal or the loop is closed, or the process forks: everybody
is told, nothing hangs, nothing leaks."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from mmapwal import (
    AsyncJournal,
    ClosedError,
    Durability,
    ForkedError,
    Journal,
    JournalError,
    MemoryDirectory,
    PoisonedError,
    SyncMethod,
    aio,
)
from mmapwal._native import lib
from mmapwal.testing import Fault, FaultDirectory, When

from .files import Home, after_kill, contents_of
from .test_async import EACH_INLINE, concurrent, is_commit, run, told, turns, until
from .watched import WAIT_S, Gate, Task, Watched, held_up

EACH_WHEN = pytest.mark.parametrize("when", [When.BEFORE, When.SHORT, When.AFTER])


def is_write(call: Any) -> bool:
    return call.kind in {"write", "write_sync"} and call.name.startswith("segment")


class Full:
    """A journal whose disk can be filled, and whose commits can be held up."""

    def __init__(self, open_on: Callable[..., Journal], durability: Durability, when: When) -> None:
        self.when = when
        self.memory = MemoryDirectory()
        self.faulty = FaultDirectory(self.memory, Fault(1 << 30))
        self.disk = Watched(self.faulty, SyncMethod.FDATASYNC)
        self.disk.concurrent = True
        self.journal = open_on(self.disk, durability=durability, slots=256, segment_bytes=1 << 20)

    def fill(self, kinds: Any = ("write", "create", "truncate"), times: int | None = None) -> None:
        self.faulty.plan = Fault(kinds=kinds, error=errno.ENOSPC, when=self.when, times=times)

    def empty(self) -> None:
        self.faulty.plan.lift()

    def killed(self) -> Any:
        with Journal("j", storage=after_kill(self.memory)) as left:
            assert left.verify().ok
            return contents_of(left)


@EACH_WHEN
@EACH_INLINE
@pytest.mark.parametrize("durability", [Durability.SYNC, Durability.OS])
@pytest.mark.parametrize("superblock_too", [False, True])
def test_a_commit_without_space_fails_for_all_in_it_and_behind_it_and_never_comes_back(
    open_on: Callable[..., Journal], durability: Durability, when: When, inline: bool, superblock_too: bool
) -> None:
    full = Full(open_on, durability, when)
    journal = full.journal
    wanted = {1: (b"one", 0)}

    async def main() -> None:
        async with AsyncJournal(journal, inline=inline, max_pending=10) as appends:
            assert await appends.append(b"one") == 1
            for _ in range(10):  # so many outcomes of both kinds are told
                full.fill(times=None if superblock_too else 1)
                full.disk.on = gate = Gate(is_write)
                calls = [appends.append(b"no")]
                if inline:
                    gate.open()
                else:
                    await until(gate.reached)
                calls += [appends.append(b"no %d" % n * 10) for n in range(7)]
                gate.open()
                results = await told(*calls)
                assert [type(r) for r in results] == [OSError] * 8
                assert len({id(r) for r in results}) == 8
                assert {r.errno for r in results} == {errno.ENOSPC}
                assert journal.poisoned is None
                if not superblock_too:
                    assert full.killed() == wanted
                full.empty()
                op = len(wanted) + 1
                assert await told(appends.append(b"yes"), appends.append(b"yes")) == [op, op + 1]
                wanted[op] = wanted[op + 1] = (b"yes", 0)
                assert contents_of(journal) == wanted
                assert full.killed() == wanted

    run(main())
    assert contents_of(journal) == wanted


@EACH_INLINE
def test_an_epoch_that_cannot_be_paid_after_a_full_disk_poisons_and_that_is_told(
    open_on: Callable[..., Journal], inline: bool
) -> None:
    """What was written without space may be found after all, so it is not said that it will not."""
    full = Full(open_on, Durability.SYNC, When.AFTER)
    journal = full.journal

    def fail(call: Any) -> None:
        if call.kind == "write" and call.name.startswith("segment"):
            raise OSError(errno.ENOSPC, "full")
        if call.kind == "dir_sync":
            raise OSError(errno.EIO, "the directory")

    async def main() -> None:
        async with AsyncJournal(journal, inline=inline) as appends:
            await appends.append(b"one")
            full.disk.on = fail
            results = await told(*(appends.append(b"no") for _ in range(4)))
            assert [type(r) for r in results] == [PoisonedError] * 4
            full.disk.on = lambda call: None
            with pytest.raises(PoisonedError):
                await appends.append(b"no")

    run(main())


@EACH_INLINE
def test_an_epoch_that_is_owed_is_begun_first_and_does_not_block_the_loop(
    open_on: Callable[..., Journal], inline: bool
) -> None:
    full = Full(open_on, Durability.SYNC, When.BEFORE)
    journal = full.journal

    async def main() -> None:
        async with AsyncJournal(journal, inline=inline) as appends:
            await appends.append(b"one")
            full.fill()
            assert [type(r) for r in await told(appends.append(b"no"))] == [OSError]
            assert journal._engine.state().epoch_owed
            full.empty()
            calls = [appends.append(b"%d" % n) for n in range(5)]
            if not inline:
                assert not any(c.done() for c in calls)
            assert await told(*calls) == [2, 3, 4, 5, 6]
            assert not journal._engine.state().epoch_owed

    run(main())


def test_outcomes_that_are_not_taken_for_long_stay_those_of_whom_they_are(
    open_on: Callable[..., Journal],
) -> None:
    """Commits fail and succeed in turn while the loop does something else."""
    full = Full(open_on, Durability.SYNC, When.BEFORE)
    journal = full.journal

    async def main() -> None:
        async with AsyncJournal(journal) as appends:
            await appends.append(b"one")
            calls, payloads = [], []
            for n in range(10):
                for name in ("no", "yes"):
                    if name == "no":
                        full.fill(times=1)
                    payloads.append(b"%s %d" % (name.encode(), n))
                    calls.append(appends.append(payloads[-1]))
                    Task(journal.sync).finish()
                    full.empty()
                    Task(journal._engine.start_epoch).result()
            results = await told(*calls)
        for payload, result in zip(payloads, results, strict=True):
            if isinstance(result, int):
                assert journal.read(result) == payload
            else:
                assert type(result) is OSError
        there = {bytes(e.payload) for e in journal.entries(2)}
        assert there == {p for p, r in zip(payloads, results, strict=True) if isinstance(r, int)}
        assert [type(r) for r in results[:4]] == [OSError, int, OSError, int]

    run(main())


@pytest.mark.parametrize("durability", list(Durability))
def test_a_failed_commit_tells_every_task_and_thread_the_one_cause(
    open_on: Callable[..., Journal], durability: Durability
) -> None:
    async def main(directory: Watched, journal: Journal) -> None:
        async with AsyncJournal(journal, max_pending=10) as appends:
            assert await appends.append(b"one") == 1
            directory.on = gate = Gate(is_write)
            first = asyncio.ensure_future(appends.append(b"first"))
            flushed = Task(journal.sync) if durability is Durability.BUFFERED else None
            await until(gate.reached)
            tasks = [appends.append(b"%d" % n) for n in range(16)]
            threads = [Task(lambda: journal.append(b"x")) for _ in range(4)]
            syncs = [asyncio.create_task(appends.sync()) for _ in range(2)]
            await asyncio.sleep(0.02)
            gate.open(OSError(errno.EIO, "the disk is gone"))
            results = await told(first, *tasks, *syncs)
            errors = results if durability is not Durability.BUFFERED else results[-2:]
            errors += [
                await asyncio.to_thread(t.finish) for t in threads if durability is not Durability.BUFFERED
            ]
            if flushed is not None:
                errors.append(await asyncio.to_thread(flushed.finish))
            assert [type(e) for e in errors] == [PoisonedError] * len(errors)
            assert len({id(e) for e in errors}) == len(errors)
            assert {id(e.__cause__) for e in errors} == {id(errors[0].__cause__)}
            assert "the disk is gone" in str(errors[0].__cause__)
            directory.on = lambda call: None
            calls = len(directory.calls)
            with pytest.raises(PoisonedError):
                await appends.append(b"no")
            assert len(directory.calls) == calls

    with concurrent(open_on, durability=durability) as (directory, journal):
        run(main(directory, journal))


def test_nothing_is_written_after_a_poison_from_outside(open_on: Callable[..., Journal]) -> None:
    """Not even the second half of a commit that lies in two segments."""

    async def main(directory: Watched, journal: Journal) -> None:
        journal._engine.prepare_segment()
        async with AsyncJournal(journal) as appends:
            directory.on = gate = Gate(is_commit)
            calls = [appends.append(b"first")]
            await until(gate.reached)
            calls += [appends.append(bytes(3000)) for _ in range(5)]
            second = Gate(is_commit)
            directory.on = second
            gate.open()
            await until(second.reached)
            directory.calls.clear()
            journal._engine.poison("a test", OSError(errno.EIO, "outside"))
            second.open()
            results = await told(*calls)
            assert results[0] == 1
            assert [type(r) for r in results[1:]] == [PoisonedError] * 5
        journal.close()
        assert [call for call in directory.calls if call[0] == "write_sync"] == []

    with concurrent(open_on, slots=64, segment_bytes=16384) as (directory, journal):
        run(main(directory, journal))


def test_an_index_that_cannot_be_stored_to_poisons_instead_of_killing(
    run_python: Callable[..., Any], tmp_path: Path
) -> None:
    """SIGBUS on the committer's thread is answered like on any other."""
    script = """
import asyncio, os, sys
from mmapwal import AsyncJournal, Journal, PoisonedError
from mmapwal.storage import SystemDirectory
from mmapwal.testing import InterposedDirectory

class Cut(InterposedDirectory):
    armed = False
    def intercept(self, call):
        if self.armed and call.kind.startswith("write") and call.name.startswith("segment"):
            os.truncate(sys.argv[1] + "/index", 0)
        return call.run()

async def main():
    directory = Cut(SystemDirectory(sys.argv[1]))
    journal = Journal("j", storage=directory)
    async with AsyncJournal(journal) as appends:
        await appends.append(b"one")
        directory.armed = True
        results = await asyncio.gather(*(appends.append(b"x") for _ in range(5)), return_exceptions=True)
        assert type(results[0]) is PoisonedError, results
        assert {type(r) for r in results} <= {PoisonedError, OSError}, results
    journal.close()

asyncio.run(asyncio.wait_for(main(), 60))
"""
    done = run_python(script, tmp_path / "j")
    assert done.returncode == 0, done.stderr


# --- the end ------------------------------------------------------------------------------------------


@EACH_INLINE
@pytest.mark.parametrize("after", [0, 1, 3, 10])
def test_a_journal_that_is_closed_under_way_tells_everyone_what_became_of_it(
    home: Home, inline: bool, after: int
) -> None:
    journal = home.open(slots=4096, segment_bytes=16384)
    acknowledged: dict[int, bytes] = {}

    async def main() -> None:
        appends = AsyncJournal(journal, inline=inline, max_pending=20)

        async def one(n: int) -> None:
            payload = b"%d" % n * 20
            acknowledged[await appends.append(payload)] = payload

        tasks = [asyncio.create_task(one(n)) for n in range(100)]
        await turns(after)
        closing = Task(journal.close)
        results = await told(*tasks)
        assert {type(r) for r in results} <= {type(None), ClosedError}
        await asyncio.to_thread(closing.result)
        with pytest.raises(ClosedError):
            await appends.append(b"no")
        await asyncio.wait_for(appends.close(), WAIT_S)

    run(main())
    found = home.open()
    assert found.report.outcome.value == "sealed"
    assert {e.op: bytes(e.payload) for e in found} == acknowledged


def test_a_close_tells_those_whom_it_makes_durable_itself(open_on: Callable[..., Journal]) -> None:
    async def main(directory: Watched, journal: Journal) -> None:
        async with AsyncJournal(journal, inline=True) as appends:
            await appends.append(b"one")
            directory.on = gate = Gate(is_commit)
            thread = Task(lambda: journal.append(b"two"))
            await until(gate.reached)
            calls = [appends.append(b"three"), appends.append(b"four")]  # committed in the next turn
            closing = Task(journal.close)
            while not journal._engine.state().closed:
                time.sleep(0.001)
            opening = threading.Timer(0.05, gate.open)  # while the loop waits for the disk
            opening.start()
            assert await told(*calls) == [3, 4]
            assert thread.result() == 2
            closing.result()
            opening.join()

    with concurrent(open_on) as (directory, journal):
        run(main(directory, journal))


@EACH_INLINE
def test_close_waits_for_every_outcome_and_can_be_cancelled_and_called_again(
    open_on: Callable[..., Journal], inline: bool
) -> None:
    async def main(directory: Watched, journal: Journal) -> None:
        appends = AsyncJournal(journal, inline=inline, max_pending=2)
        calls = [appends.append(b"%d" % n) for n in range(7)]
        if not inline:
            directory.on = gate = Gate(is_commit)
        closing = asyncio.create_task(appends.close())
        await turns(1)
        with pytest.raises(ClosedError):
            appends.append(b"no")
        with pytest.raises(ClosedError):
            await appends.sync()
        closing.cancel()
        await asyncio.wait([closing], timeout=WAIT_S)
        assert closing.cancelled()
        again = [asyncio.create_task(appends.close()) for _ in range(3)]
        await turns(3)
        if not inline:
            assert not any(t.done() for t in again)
            gate.open()
        assert await told(*again) == [None] * 3
        assert await told(*calls) == list(range(1, 8))
        await appends.close()
        assert await asyncio.to_thread(journal.append, b"journal goes on") == 8

    with concurrent(open_on) as (directory, journal):
        run(main(directory, journal))


def test_close_waits_for_appends_whose_way_is_being_made(open_on: Callable[..., Journal]) -> None:
    async def main(directory: Watched, journal: Journal) -> None:
        appends = AsyncJournal(journal)
        await told(*(appends.append(b"%d" % n) for n in range(1, 6)))
        with held_up(directory, lambda call: call.kind == "rename", lambda: journal.truncate_from(4)):
            calls = [asyncio.ensure_future(appends.append(b"new %d" % n)) for n in range(3)]
            calls[0].cancel()
            closing = asyncio.create_task(appends.close())
            await asyncio.sleep(0.01)
            assert not closing.done()
        assert (await told(*calls, closing))[1:] == [4, 5, None]

    with concurrent(open_on) as (directory, journal):
        run(main(directory, journal))


@contextmanager
def nothing_leaks() -> Iterator[None]:
    gc.collect()
    process = psutil.Process()
    before = process.num_fds(), threads()
    yield
    gc.collect()
    bound = time.monotonic() + WAIT_S  # threads of earlier tests may end meanwhile, ours a moment later
    while process.num_fds() > before[0] or threads() > before[1]:
        assert time.monotonic() < bound, (before, process.num_fds(), threads())
        time.sleep(0.01)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208  # also those that Python does not know


@EACH_INLINE
@pytest.mark.parametrize("close_first", ["appends", "journal", "neither"])
@pytest.mark.parametrize("under_way", [False, True])
def test_a_loop_that_is_closed_first_hangs_and_leaks_nothing(
    home: Home, inline: bool, close_first: str, under_way: bool
) -> None:
    with nothing_leaks():
        journal = home.open(slots=256)
        loop = asyncio.new_event_loop()
        left: list[AsyncJournal] = []

        async def main() -> None:
            appends = AsyncJournal(journal, inline=inline)
            assert await appends.append(b"one") == 1
            left.append(appends)
            if under_way:
                for n in range(5):
                    appends.append(b"%d" % n)

        loop.run_until_complete(asyncio.wait_for(main(), WAIT_S))
        loop.close()
        if close_first == "appends":
            run(left[0].close())
            run(left[0].close())
        if close_first != "neither":
            Task(journal.close).result()
        left.clear()
        gc.collect()
        assert len(journal) >= 1 if close_first != "journal" else True
        Task(journal.close).result()
        home._given.clear()
    found = home.open()
    assert found.report.outcome.value == "sealed"
    assert len(found) == (6 if under_way else 1)  # staged by the call: written all the same
    found.close()


@EACH_INLINE
def test_one_that_is_forgotten_with_its_journal_leaks_nothing(home: Home, inline: bool) -> None:
    async def main() -> None:
        appends = AsyncJournal(home.open(slots=256), inline=inline)
        home._given.clear()
        assert await appends.append(b"one") == 1

    with nothing_leaks(), pytest.warns(ResourceWarning, match="was not closed"):
        run(main())
        gc.collect()
    home.memory.close()
    assert len(home.open()) == 1


def test_a_fork_leaves_the_committer_to_the_parent(home: Home) -> None:
    journal = home.open()

    def child(appends: AsyncJournal) -> None:
        """In the forked process; an exception is a failure."""
        fds = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for call in (appends.append, lambda payload: appends.append(payload, op=9)):
            with pytest.raises(ForkedError):
                call(b"no")

        async def elsewhere() -> None:
            with pytest.raises(ForkedError):
                await appends.sync()

        run(elsewhere())
        appends._finalizer()
        assert len(os.listdir("/proc/self/fd")) == fds - 1  # noqa: PTH208
        journal.close()

    async def main() -> None:
        async with AsyncJournal(journal) as appends:
            assert await appends.append(b"a") == 1
            calls = [appends.append(b"b"), appends.append(b"c")]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
                pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    signal.alarm(30)
                    child(appends)
                    code = 0
                except BaseException as e:  # noqa: BLE001
                    os.write(2, repr(e).encode())
                finally:
                    os._exit(code)
            _, status = await asyncio.to_thread(os.waitpid, pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            assert await told(*calls) == [2, 3]
            assert await appends.append(b"d") == 4

    run(main())
    assert len(journal) == 4


class Interrupt(BaseException):
    """What a signal handler raises."""


class Interrupting:
    """The C helper, with one call of a function interrupted: before it, or behind it."""

    def __init__(self, name: str, nth: int, when: str) -> None:
        self._name, self._left, self._when = name, nth, when

    def __getattr__(self, name: str) -> Any:
        function = getattr(lib, name)
        return partial(self._call, function) if name == self._name else function

    def _call(self, function: Any, *args: Any) -> Any:
        self._left -= 1
        if self._left == 0 and self._when == "before":
            raise Interrupt
        result = function(*args)
        if self._left == 0 and self._when == "behind":
            raise Interrupt
        return result


@EACH_INLINE
@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize(
    "name", ["submit_next", "submit_many", "outcomes", "committer_kick", "committer_lead"]
)
def test_an_interrupt_on_the_loop_hangs_nobody_and_tells_nobody_the_success_of_another(
    open_on: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch, inline: bool, when: str, name: str
) -> None:
    async def main(journal: Journal) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)  # it was told in vain
        appends = AsyncJournal(journal, inline=inline, max_pending=5)
        acknowledged: dict[int, bytes] = {}

        async def one(task: int) -> None:
            for n in range(3):
                payload = b"%d %d" % (task, n)
                op = await appends.append(payload)
                assert op in journal  # durable
                acknowledged[op] = payload

        tasks = [asyncio.create_task(one(n)) for n in range(12)]
        await turns(3)
        closing = asyncio.create_task(appends.close())
        results = await told(*tasks)
        assert {type(r) for r in results} <= {type(None), JournalError, ClosedError, Interrupt}
        assert all(t in {type(None), Interrupt} for t in map(type, await told(closing)))
        assert await told(appends.close()) == [None]
        for op, payload in acknowledged.items():
            assert journal.read(op) == payload

    for nth in range(1, 8):
        with monkeypatch.context() as patch, concurrent(open_on, slots=64) as (_, journal):
            patch.setattr(aio, "lib", Interrupting(f"mw_{name}", nth, when))
            run(main(journal))


def test_an_append_that_is_interrupted_behind_its_staging_ends_it_all(
    open_on: Callable[..., Journal],
) -> None:
    """Its outcome would be taken for that of the next one."""

    async def main(directory: Watched, journal: Journal) -> None:
        directory.on = gate = Gate(is_commit)
        appends = AsyncJournal(journal)
        call = appends.append(b"one")
        await until(gate.reached)
        appends._submit_next = Interrupting("mw_submit_next", 1, "behind").mw_submit_next
        with pytest.raises(Interrupt):
            appends.append(b"interrupted")
        with pytest.raises(ClosedError):
            appends.append(b"no")
        assert [type(r) for r in await told(call)] == [JournalError]
        gate.open()
        await asyncio.wait_for(appends.close(), WAIT_S)
        assert await told(appends.close()) == [None]
        assert contents_of(journal) == {1: (b"one", 0), 2: (b"interrupted", 0)}

    with concurrent(open_on) as (directory, journal):
        run(main(directory, journal))
