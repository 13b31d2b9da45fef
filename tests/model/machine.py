"""A journal and a plain model of it, through everything that a journal can go through."""

from __future__ import annotations

import copy
import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmapwal import (
    DuplicateOpError,
    Durability,
    Journal,
    JournalError,
    JournalFullError,
    PoisonedError,
    SnapshotCoordinator,
    SnapshotStore,
    StaleOpError,
    SyncMethod,
)
from mmapwal import format as fmt
from mmapwal.testing import Fault, FaultDirectory, When

from ..crash.story import DONE, OP_MAX, Change, Contents, Expected, close_dead
from .grounds import Ground

SLOTS = 12
SEGMENT_BYTES = fmt.SEGMENT_BYTES_MIN
SEGMENTS_MIN = 3
FILLER = b"fill" * 900
HELD_MAX = 25

PAYLOADS = st.builds(
    lambda size, fill: bytes([fill]) * size,
    st.sampled_from([0, 1, 8, 100, 456, 900, 1500, 4000, 11_000, 20_000]),
    st.integers(1, 255),
)
SMALL = PAYLOADS.filter(lambda p: len(p) < 5000)
KINDS = st.integers(0, 5)
FAULTS = st.builds(
    Fault,
    st.integers(1, 14),
    kinds=st.sampled_from([None, "sync", "write_sync", "write", "rename", "dir_sync"]),
    error=st.sampled_from([errno.EIO, errno.EIO, errno.ENOSPC]),
    when=st.sampled_from(list(When)),
    times=st.sampled_from([1, 1, 3]),
)


def never() -> Fault:
    """Strikes nothing."""
    fault = Fault()
    fault.lift()
    return fault


@dataclass(frozen=True)
class Shown(Contents):
    """What a journal shows, and the snapshot that it is paired with."""

    pairing: tuple[int, int] | None = None


def shown_by(journal: Journal) -> Shown:
    entries = {e.op: (bytes(e.payload), e.kind) for e in journal}
    return Shown(entries, journal.snapshot_op, journal.user_data, journal.pairing)


class State:
    """What the machine of a checkpoint has to say."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def apply(self, entry: Any) -> None:
        raise NotImplementedError

    def restore(self, snapshot: memoryview) -> None:
        raise NotImplementedError

    def snapshot(self) -> bytes:
        return self.data


class JournalMachine(RuleBasedStateMachine):
    """`expected` has what is promised, and what else may be found after a death; its last is shown now."""

    ground_of: Callable[[bool], Ground]

    def __init__(self) -> None:
        super().__init__()
        self.expected = Expected()
        self.expected.chain = [Shown()]
        self.base, self.notes = copy.deepcopy(self.expected), []
        self.held: list[tuple[Any, bytes]] = []
        self.snapshots: dict[tuple[int, int], bytes] = {}
        self.next_fault: Fault | None = None
        self.dead: list[Journal] = []
        self.saved = 0
        self.asked: deque[tuple[int, list[bytes], int]] = deque(maxlen=6)

    @initialize(
        durability=st.sampled_from(list(Durability)),
        align=st.sampled_from([0, 0, 0, 512]),
        damage=st.booleans(),
        method=st.sampled_from([SyncMethod.AUTO, SyncMethod.AUTO, SyncMethod.MSYNC]),
    )
    def create(self, durability: Durability, align: int, damage: bool, method: SyncMethod) -> None:
        self.ground = type(self).ground_of(damage and align > 0)
        self.options: dict[str, Any] = {
            "slots": SLOTS,
            "segment_bytes": SEGMENT_BYTES,
            "commit_align_bytes": align,
            "sync_method": method,
        }
        self.durability = durability
        self.open()
        self.refill()

    def teardown(self) -> None:
        if not hasattr(self, "journal"):
            return
        for journal in (self.journal, *self.dead):
            close_dead(journal)
        for view, wanted in self.held:
            assert bytes(view) == wanted, "what was lent has changed"
        self.ground.close()

    # --- the model

    @property
    def now(self) -> Shown:
        return self.expected.now  # type: ignore[return-value]

    def tell(self, kind: str, what: Any = None) -> None:
        self.expected.take((kind, what))
        self.notes.append((self.ground.effects(), (kind, what)))

    def refusal(self, first: int, count: int, *, replace: bool) -> type[Exception] | None:
        """The error for an append of these ops, or None. Only the first that is met is raised."""
        live, watermark = self.now.entries, self.now.watermark
        taken = {op % SLOTS: op for op in live}
        if count > SLOTS:
            return JournalFullError
        for op in range(first, first + count):
            if op <= watermark:
                return StaleOpError
            if taken.get(op % SLOTS, op) != op:
                return JournalFullError
            if op in live and not replace:
                return DuplicateOpError
        return None

    def act(
        self, change: Change, call: Callable[[], Any], *, success: str = "durable", failure: str = "refused",
        happened: Callable[[], bool] = lambda: False,
    ) -> Any:  # fmt: skip
        """Does it, and says what is to be expected from now on. None when it failed as it was made to."""
        self.tell("begin", change)
        fault, self.next_fault = self.next_fault, None
        if fault is not None and self.ground.fails:
            self.faults.plan = fault
        try:
            result = call()
        except (OSError, JournalError) as e:
            note(f"{type(e).__name__}: {e}")
            assert self.faults.plan.struck, "it failed, and nothing had struck"
            if self.journal.poisoned is not None:
                self.tell("unclear")
            else:
                self.tell("durable" if happened() else failure)
            return None
        finally:
            self.faults.plan = never()
        self.tell("unclear" if self.journal.poisoned is not None and success != "durable" else success)
        return result

    @property
    def is_poisoned(self) -> bool:
        return self.journal.poisoned is not None

    # --- opening

    def open(self) -> None:
        """Whatever fails at first, it opens in the end; what it shows was promised, or may be there."""
        fault, self.next_fault = self.next_fault, None
        while True:
            directory = self.ground.directory()
            self.faults = FaultDirectory(directory, fault if fault is not None else never())
            storage = self.faults if self.ground.fails else directory
            try:
                # A clock that stands: what is appended again has the very bytes of what was lost.
                self.journal = Journal(
                    "j", storage=storage, durability=self.durability, clock=lambda: 1, **self.options
                )
                break
            except (OSError, JournalError) as e:
                note(f"opening: {type(e).__name__}: {e}")
                assert fault is not None and fault.struck, f"it does not open: {e}"
                fault = None
                self.ground.kill()
        self.faults.plan = never()
        self.tell("found", self.find())
        self.check_snapshot()

    def find(self) -> Shown:
        found = shown_by(self.journal)
        assert found in self.expected.accepted, (
            f"recovery ({self.journal.report.outcome.value}) shows {found.describe()}\n  accepted is only "
            + "\n  or ".join(c.describe() for c in self.expected.accepted)
        )
        return found

    def refill(self) -> None:
        """Never fewer than three segments."""
        while not self.is_poisoned and len(self.journal._engine.superblock.segments) < SEGMENTS_MIN:
            op, now = None, self.now
            if self.refusal(now.next_op(), 1, replace=False) is not None:
                op = max(now.entries)
            number = op or now.next_op()
            self.act(
                lambda c, number=number: c.with_entries({number: (FILLER, 9)}),
                lambda op=op: self.journal.append(FILLER, op=op, kind=9, replace=op is not None),
                success=DONE[self.durability], failure="failed",
            )  # fmt: skip

    def store(self) -> SnapshotStore:
        directory = self.journal.directory.subdirectory(fmt.SNAPSHOTS_NAME)
        return SnapshotStore("snapshots", storage=directory)

    def check_snapshot(self) -> None:
        if self.journal.pairing is not None:
            with self.store() as store:
                snapshot = store.load_paired(*self.journal.pairing)
                assert snapshot.data == self.snapshots[self.journal.pairing]
                self.hold(snapshot.data, self.snapshots[self.journal.pairing])

    # --- writing

    alive = precondition(lambda self: not self.is_poisoned)

    @precondition(lambda self: self.ground.fails and self.next_fault is None)
    @rule(fault=FAULTS)
    def arm(self, fault: Fault) -> None:
        """One of the next calls of the disk fails, within the next thing that is done."""
        self.next_fault = copy.copy(fault)

    def append_entry(self, payload: bytes, op: int | None, kind: int, *, replace: bool) -> None:
        number = self.now.next_op() if op is None else op
        self.asked.append((number, [payload], kind))
        if (error := self.refusal(number, 1, replace=replace)) is not None:
            with pytest.raises(error):
                self.journal.append(payload, op=op, kind=kind, replace=replace)
            return
        done = self.act(
            lambda c: c.with_entries({number: (payload, kind)}),
            lambda: self.journal.append(payload, op=op, kind=kind, replace=replace),
            success=DONE[self.durability], failure="failed",
        )  # fmt: skip
        assert done in {None, number}

    @alive
    @rule(payload=PAYLOADS, kind=KINDS)
    def append(self, payload: bytes, kind: int) -> None:
        self.append_entry(payload, None, kind, replace=False)

    @alive
    @rule(near=st.integers(-3, 20), payload=PAYLOADS, kind=KINDS, replace=st.booleans())
    def append_at(self, near: int, payload: bytes, kind: int, replace: bool) -> None:
        self.append_entry(payload, max(1, self.now.watermark + near), kind, replace=replace)

    @alive
    @precondition(lambda self: self.now.entries)
    @rule(data=st.data(), payload=PAYLOADS, kind=KINDS)
    def replace_entry(self, data: st.DataObject, payload: bytes, kind: int) -> None:
        self.append_entry(payload, data.draw(st.sampled_from(sorted(self.now.entries))), kind, replace=True)

    @alive
    @rule(payloads=st.lists(SMALL, min_size=1, max_size=5), near=st.none() | st.integers(-2, 15), kind=KINDS)
    def append_many(self, payloads: list[bytes], near: int | None, kind: int) -> None:
        self.append_batch(payloads, near, kind)

    def append_batch(self, payloads: list[bytes], near: int | None, kind: int) -> None:
        first_op = None if near is None else max(1, self.now.watermark + near)
        first = self.now.next_op() if first_op is None else first_op
        self.asked.append((first, payloads, kind))
        if (error := self.refusal(first, len(payloads), replace=False)) is not None:
            with pytest.raises(error):
                self.journal.append_many(payloads, first_op=first_op, kind=kind)
            return
        done = self.act(
            lambda c: c.with_entries({first + n: (p, kind) for n, p in enumerate(payloads)}),
            lambda: self.journal.append_many(payloads, first_op=first_op, kind=kind),
            success=DONE[self.durability], failure="failed",
        )  # fmt: skip
        assert done in {None, range(first, first + len(payloads))}

    @alive
    @rule()
    def sync(self) -> None:
        self.act(lambda c: c, self.journal.sync, success="synced")

    # --- shrinking

    @alive
    @rule(near=st.integers(-3, 20), length=st.integers(0, 8))
    def drain(self, near: int, length: int) -> None:
        first = max(1, self.now.watermark + near)
        last = first + length
        removed = {op: e for op, e in self.now.entries.items() if first <= op <= last}
        drained = self.act(lambda c: c.drained(first, last), lambda: self.journal.drain(first, last))
        if drained is not None:
            assert {e.op: (bytes(e.payload), e.kind) for e in drained} == removed
            for entry in drained:
                self.hold(entry.payload, removed[entry.op][0])

    @alive
    @rule(near=st.integers(-2, 20), refill=st.lists(SMALL, max_size=2))
    def truncate_from(self, near: int, refill: list[bytes]) -> None:
        op = max(1, self.now.watermark + near)
        if op <= self.now.watermark:
            with pytest.raises(ValueError, match="watermark"):
                self.journal.truncate_from(op)
            return
        removed = sum(o >= op for o in self.now.entries)
        assert self.act(lambda c: c.without(op, OP_MAX), lambda: self.journal.truncate_from(op)) in {
            None,
            removed,
        }
        for payload in refill:
            if not self.is_poisoned:
                self.append_entry(payload, None, 7, replace=False)

    @alive
    @rule(above=st.integers(0, 15))
    def set_snapshot_op(self, above: int) -> None:
        op = self.now.watermark + above
        self.act(lambda c: c.with_watermark(op), lambda: self.journal.set_snapshot_op(op))
        if op:
            with pytest.raises((ValueError, PoisonedError)):
                self.journal.set_snapshot_op(self.now.watermark - 1)

    @alive
    @rule(above=st.integers(0, 9))
    def checkpoint(self, above: int) -> None:
        """A snapshot of what is there, paired."""
        op = self.now.watermark + above
        self.saved += 1
        data = b"state %d after op %d" % (self.saved, op)
        pairing = (op, fmt.crc32c(data))
        self.snapshots[pairing] = data
        if self.now.pairing is not None and self.now.pairing[0] == op:
            pairing = self.now.pairing  # it is kept as it is

        def run() -> None:
            with self.store() as store:
                SnapshotCoordinator(self.journal, store).checkpoint(State(data), op)

        self.act(
            lambda c: replace(c.with_watermark(op), pairing=pairing), run,
            happened=lambda: self.journal.pairing == pairing,
        )  # fmt: skip
        if not self.is_poisoned:
            self.check_snapshot()
            self.refill()

    @alive
    @rule(data=st.binary(max_size=fmt.USER_DATA_BYTES_MAX))
    def set_user_data(self, data: bytes) -> None:
        if self.durability is not Durability.SYNC:
            self.sync()
        if not self.is_poisoned:
            self.act(
                lambda c: replace(c, user_data=data),
                lambda: self.journal.set_user_data(data),
                success="synced",
            )

    @alive
    @rule()
    def compact(self) -> None:
        self.act(lambda c: c, lambda: self.journal.compact(wait=True), success="synced")
        self.refill()

    @alive
    @rule()
    def compact_by_too_many_removals(self) -> None:
        """A journal that has no row left for a removal compacts first, whatever there is to gain."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fmt, "REMOVALS_MAX", max(1, len(self.journal._engine.superblock.removals)))
            if len(self.now.entries) > 1:
                op = max(self.now.entries)
                self.act(lambda c: c.without(op, op), lambda: self.journal.drain(op, op))
        self.refill()

    # --- the end, and again

    @alive
    @rule(durability=st.sampled_from(list(Durability)))
    def reopen(self, durability: Durability) -> None:
        """A clean close; where that fails, what was not synced is unclear."""
        fault = self.next_fault
        closed = self.act(lambda c: c, lambda: self.journal.close() or True)
        self.durability = durability
        if not closed:
            self.ground.kill()
        self.open()
        if fault is None:  # one without a seal is scanned
            assert self.journal.report.outcome.value == "sealed"
        self.refill()

    @rule(durability=st.sampled_from(list(Durability)), index=st.booleans())
    def kill(self, durability: Durability, index: bool) -> None:
        """The process dies; the machine lives, and the page cache with it; the index may be lost."""
        self.dies(durability, index=index)
        self.refill()

    def dies(self, durability: Durability, *, index: bool = True) -> None:
        wanted = None
        if not self.is_poisoned and not self.expected.ghosts and self.durability is not Durability.BUFFERED:
            wanted = self.now  # what was written survives
        self.dead.append(self.journal)
        self.ground.kill()
        close_dead(self.journal)
        if not index:
            self.ground.directory().unlink(fmt.INDEX_NAME)
        self.durability = durability
        self.open()
        if wanted is not None:
            assert shown_by(self.journal) == wanted

    @precondition(lambda self: self.ground.has_power)
    @rule(
        data=st.data(),
        durability=st.sampled_from(list(Durability)),
        back=st.sampled_from([0, 0, 1, 2, 3, 4, 5, 7, 10, 20, 40]),
        closes=st.booleans(),
        then=st.sampled_from([None, "again", "another"]),
    )
    def cut_the_power(
        self, data: st.DataObject, durability: Durability, back: int, closes: bool, then: str | None
    ) -> None:
        """The machine dies, now or a few effects ago; what no sync covered may be there or not. `then`: the
        first that was lost is asked for again, with the same bytes, or another one; the process is killed."""
        if closes and not self.is_poisoned and back < 10:
            self.act(lambda c: c, self.journal.close)
        at = max(0, self.ground.effects() - back)
        note(f"lost: {self.ground.cut(data, at)}")
        close_dead(self.journal)
        self.expected = copy.deepcopy(self.base)
        for effects, told in self.notes:
            if effects <= at:
                self.expected.take(told)
        self.base, self.notes = copy.deepcopy(self.expected), []
        self.durability = durability
        self.open()
        if then == "again":
            next_op = self.now.next_op()
            lost_call = next((c for c in self.asked if c[0] == next_op), None)
            if lost_call is not None:
                self.append_batch(lost_call[1], None, lost_call[2])
        elif then == "another":
            self.append_entry(b"another", None, 0, replace=False)
        if then is not None:
            self.dies(self.durability)
        self.refill()

    # --- looking

    def hold(self, view: Any, wanted: bytes) -> None:
        assert bytes(view) == wanted
        self.held.append((view, wanted))

    @alive
    @precondition(lambda self: self.now.entries)
    @rule(data=st.data())
    def hold_some(self, data: st.DataObject) -> None:
        entries = self.now.entries
        op = data.draw(st.sampled_from(sorted(entries)))
        wanted = entries[op][0]
        self.hold(self.journal.read(op), wanted)
        self.hold(self.journal[op].payload, wanted)
        columns = self.journal.columns()
        self.hold(columns.payload(columns.ops.tolist().index(op)), wanted)
        for array in self.journal.arrays(op, op):
            self.hold(array[0], wanted)

    @alive
    @rule()
    def verify(self) -> None:
        report = self.journal.verify()
        assert report.ok, report.problems

    @precondition(lambda self: self.is_poisoned)
    @rule()
    def poisoned_refuses(self) -> None:
        for call in (
            lambda: self.journal.append(b"refused"), lambda: self.journal.append_many([b"refused"]),
            self.journal.sync, self.journal.compact, lambda: self.journal.drain(1, 1),
            lambda: self.journal.truncate_from(self.now.watermark + 1),
            lambda: self.journal.set_snapshot_op(self.now.watermark + 1), self.journal.verify,
        ):  # fmt: skip
            with pytest.raises(PoisonedError):
                call()

    @invariant()
    def shows_the_model(self) -> None:
        if not hasattr(self, "journal") or self.is_poisoned:
            return
        journal, now = self.journal, self.now
        entries = now.entries
        assert shown_by(journal) == now
        assert len(journal) == len(entries)
        ends = (min(entries, default=None), max(entries, default=None))
        assert (journal.first_op, journal.last_op) == ends
        room = 0
        while room < SLOTS and self.refusal(now.next_op() + room, 1, replace=False) is None:
            room += 1
        assert journal.remaining_capacity == room
        for op in range(max(0, now.watermark - 2), now.watermark + 22):
            assert (op in journal) == (op in entries)
        assert len(journal._engine.superblock.segments) >= SEGMENTS_MIN

    @invariant()
    def shows_it_in_every_way(self) -> None:
        if not hasattr(self, "journal") or self.is_poisoned:
            return
        journal, entries = self.journal, dict(sorted(self.now.entries.items()))
        payloads = [payload for payload, _ in entries.values()]
        assert [bytes(p) for p in journal.payloads()] == payloads
        columns = journal.columns()
        assert (columns.ops.tolist(), columns.kinds.tolist()) == (
            list(entries),
            [k for _, k in entries.values()],
        )
        assert [bytes(columns.payload(row)) for row in range(len(columns))] == payloads
        headers = journal.headers(copy=True)
        assert (headers["op"].tolist(), headers["length"].tolist()) == (
            list(entries),
            list(map(len, payloads)),
        )
        assert headers["checksum"].tolist() == [fmt.crc32c(p) for p in payloads]
        if len({len(p) for p in payloads}) == 1:
            rows = [bytes(row) for array in journal.arrays() for row in array]
            assert rows == payloads
            assert np.array_equal(journal.array(), np.array([list(p) for p in payloads], np.uint8))
        for op, (payload, kind) in entries.items():
            assert bytes(journal.read(op)) == journal.copy(op) == payload
            header = journal.header(op)
            assert header is not None
            assert (header.op, header.kind, header.length) == (op, kind, len(payload))

    @invariant()
    def what_was_lent_keeps_its_bytes(self) -> None:
        for view, wanted in self.held[-HELD_MAX:]:
            assert bytes(view) == wanted, "what was lent has changed"
