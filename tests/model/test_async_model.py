"""An AsyncJournal against what was promised: tasks that share commits, cancelled at random, poisoned, killed,
their power cut."""

from __future__ import annotations

import asyncio
import copy
import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mmapwal import AsyncJournal, Durability, Journal, JournalError
from mmapwal import format as fmt
from mmapwal.testing import Fault, FaultDirectory, When

from ..crash.story import close_dead
from .grounds import CrashGround, Ground, MappedGround, MemoryGround
from .machine import never

SLOTS = 24
ROOM = 8  # of live and pending entries, before the watermark moves
SIZES = st.sampled_from([1, 8, 100, 456, 1500, 4000])
FAULTS = st.builds(
    Fault,
    st.integers(1, 6),
    kinds=st.sampled_from(["sync", "write_sync", "write", "rename", "dir_sync"]),
    error=st.sampled_from([errno.EIO, errno.ENOSPC]),
    when=st.sampled_from(list(When)),
)


@dataclass
class Asked:
    """One append: what it gives to write, and who is told."""

    payloads: tuple[bytes, ...]
    future: asyncio.Future[Any]


class AsyncMachine(RuleBasedStateMachine):
    """`acked`: what was told to be there, `synced` those of it that a sync has covered, `unknown`: what may
    be there, all of it or nothing. Each payload begins with a number of its own, which only grows."""

    ground_of: Callable[[], Ground]

    def __init__(self) -> None:
        super().__init__()
        self.acked: dict[int, bytes] = {}
        self.synced: set[int] = set()
        self.asked: list[Asked] = []
        self.unknown: list[tuple[bytes, ...]] = []
        self.number = 0
        self.watermark = 0
        self.dead: list[Journal] = []
        self.fault: Fault | None = None

    @initialize(
        durability=st.sampled_from(list(Durability)),
        inline=st.booleans(),
        pending=st.sampled_from([1, 3, 1000]),
    )
    def create(self, durability: Durability, inline: bool, pending: int) -> None:
        self.ground = type(self).ground_of()
        self.loop = asyncio.new_event_loop()
        self.durability = durability
        self.choices = {"inline": inline, "max_pending": pending}
        self.open()

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        for future in self.forget():
            future.cancel()
        self.run(self.appends.close())
        for journal in (self.journal, *self.dead):
            close_dead(journal)
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.ground.close()

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    # --- opening, and what it has to show

    def open(self) -> None:
        directory = self.ground.directory()
        self.faults = FaultDirectory(directory, never())
        storage = self.faults if self.ground.fails else directory
        self.journal = Journal(
            "j", storage=storage, durability=self.durability, slots=SLOTS, segment_bytes=fmt.SEGMENT_BYTES_MIN
        )
        self.appends = AsyncJournal(self.journal, **self.choices)

    def check(self, promised: dict[int, bytes]) -> None:
        """After an open: all that was promised, nothing that nobody asked for, in the order of the calls."""
        found = {e.op: bytes(e.payload) for e in self.journal}
        missing = {op: p[:9] for op, p in promised.items() if found.get(op) != p}
        assert not missing, f"lost: {missing}, found are {[(op, p[:9]) for op, p in found.items()]}"
        numbers = [number_of(p) for p in found.values()]
        assert numbers == sorted(set(numbers)), f"not in the order of the calls: {numbers}"
        known = set(self.acked.values())
        for op, payload in found.items():
            batch = next((b for b in self.unknown if payload in b), None)
            assert payload in known or batch is not None, f"op {op} was not asked for: {payload[:9]!r}"
            if batch is not None and payload not in known:
                first = op - batch.index(payload)
                there = tuple(found.get(o) for o in range(first, first + len(batch)))
                assert there == batch or first <= self.watermark, "a part of a batch"
        self.acked, self.synced, self.unknown = found, set(found), []

    # --- asking

    alive = precondition(lambda self: self.journal.poisoned is None)

    def payload(self, size: int) -> bytes:
        self.number += 1
        return (b"%d." % self.number).ljust(size, b"x")

    def make_room(self, count: int) -> None:
        if len(self.acked) + len(self.asked) + count > ROOM:
            self.settle()
            if self.journal.poisoned is None and self.acked:
                op = max(self.acked)
                self.journal.set_snapshot_op(op)
                self.watermark = op
                self.acked.clear()
                self.synced.clear()

    @alive
    @rule(sizes=st.lists(SIZES, min_size=1, max_size=4))
    def append(self, sizes: list[int]) -> None:
        self.make_room(len(sizes))

        async def ask() -> None:
            for size in sizes:
                payload = self.payload(size)
                self.asked.append(Asked((payload,), asyncio.ensure_future(self.appends.append(payload))))

        if self.journal.poisoned is None:
            self.with_fault(ask)

    @alive
    @rule(sizes=st.lists(SIZES, min_size=1, max_size=3))
    def append_many(self, sizes: list[int]) -> None:
        self.make_room(len(sizes))

        async def ask() -> None:
            payloads = tuple(self.payload(size) for size in sizes)
            future = asyncio.ensure_future(self.appends.append_many(payloads))
            self.asked.append(Asked(payloads, future))

        if self.journal.poisoned is None:
            self.with_fault(ask)

    def with_fault(self, ask: Callable[[], Any]) -> None:
        """A fault strikes while these are asked for, and what has to be done for them."""
        if self.fault is not None and self.ground.fails:
            self.faults.plan, self.fault = self.fault, None
            self.run(ask())
            self.settle()
            self.faults.plan = never()
        else:
            self.run(ask())

    @precondition(lambda self: self.fault is None)
    @rule(fault=FAULTS)
    def arm(self, fault: Fault) -> None:
        self.fault = copy.copy(fault)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Who asked goes away; what was staged is written all the same."""
        at = data.draw(st.integers(0, len(self.asked) - 1))
        self.asked[at].future.cancel()

    @rule(turns=st.integers(1, 3))
    def let_the_loop_turn(self, turns: int) -> None:
        async def turn() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.run(turn())

    @rule()
    def settle(self) -> None:
        """Everyone is told; and what each was told is so."""
        if self.asked:
            self.run(asyncio.wait([a.future for a in self.asked]))
        for asked in self.asked:
            self.told(asked)
        self.asked = []

    def told(self, asked: Asked) -> None:
        if asked.future.cancelled():
            self.unknown.append(asked.payloads)
            return
        error = asked.future.exception()
        if error is not None:
            note(f"told: {error!r}")
            assert isinstance(error, (JournalError, OSError)), error
            self.unknown.append(asked.payloads)
            return
        first = asked.future.result()
        ops = first if isinstance(first, range) else range(first, first + 1)
        for op, payload in zip(ops, asked.payloads, strict=True):
            assert op not in self.acked, f"op {op} was given twice"
            self.acked[op] = payload

    @alive
    @rule()
    def sync(self) -> None:
        self.settle()
        if self.journal.poisoned is None:
            self.run(self.appends.sync())
            self.synced = set(self.acked)

    # --- the end, and again

    def forget(self) -> list[asyncio.Future[Any]]:
        """Nobody waits any more: who was not told yet. What they asked for is unknown."""
        waiting = [a for a in self.asked if not a.future.done()]
        for asked in self.asked:
            if asked.future.done():
                self.told(asked)
        self.unknown += [a.payloads for a in waiting]
        self.asked = []
        return [a.future for a in waiting]

    @alive
    @rule()
    def reopen(self) -> None:
        self.settle()
        self.run(self.appends.close())
        self.journal.close()
        self.open()
        self.check(self.acked)

    @rule()
    def kill(self) -> None:
        """The process dies, not the machine."""
        if not self.choices["inline"] and self.journal.directory.concurrent:
            self.settle()  # files cannot be copied at one moment beside a thread that writes
        written = self.durability is Durability.OS and self.journal.poisoned is None
        self.lose(self.ground.kill, keeps_written=written)

    @precondition(lambda self: self.ground.has_power)
    @rule(data=st.data())
    def cut_the_power(self, data: st.DataObject) -> None:
        def cut() -> None:
            note(f"lost: {self.ground.cut(data, self.ground.effects())}")

        self.lose(cut, keeps_written=False)

    def lose(self, die: Callable[[], None], *, keeps_written: bool) -> None:
        """What was told to be durable is there afterwards; of the rest anything may be."""
        waiting = self.forget()
        kept = keeps_written or self.durability is Durability.SYNC
        promised = {op: p for op, p in self.acked.items() if kept or op in self.synced}
        die()
        for future in waiting:  # what the dead one does and tells from now on reaches nothing
            future.cancel()
        self.run(self.appends.close())
        self.dead.append(self.journal)
        close_dead(self.journal)
        self.unknown += [(p,) for op, p in self.acked.items() if op not in promised]
        self.acked = promised
        self.open()
        self.check(promised)

    # --- looking

    @invariant()
    def what_was_told_is_there(self) -> None:
        if hasattr(self, "journal") and self.journal.poisoned is None:
            for op, payload in self.acked.items():
                assert self.journal.copy(op) == payload
            assert len(self.journal) >= len(self.acked)


def number_of(payload: bytes) -> int:
    return int(payload.partition(b".")[0])


GROUNDS: dict[str, tuple[Callable[[], Ground], int]] = {
    "memory": (MemoryGround, 4),
    "mapped": (lambda: MappedGround(concurrent=True), 8),
    "crash disk": (CrashGround, 2),
}


@pytest.mark.parametrize("ground", GROUNDS)
def test_what_tasks_were_told_is_so_whatever_is_cancelled_fails_or_dies(
    ground: str,
    pytestconfig: pytest.Config,
    tally: Callable[[str, int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "mmapwal")
    make, share = GROUNDS[ground]
    lives = max(1, int(pytestconfig.getoption("fuzz_inputs")) // share)

    class Machine(AsyncMachine):
        ground_of = staticmethod(make)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=lives, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    tally(f"lives of a model of tasks, {ground}", lives)
