"""A journal against a model: any calls in any order, reopened cleanly and after kills, views held over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmapwal import (
    DuplicateOpError,
    Durability,
    Journal,
    JournalFullError,
    MemoryDirectory,
    StaleOpError,
)
from mmapwal import format as fmt

SLOTS = 12
PAYLOADS = st.builds(
    lambda size, fill: bytes([fill]) * size,
    st.sampled_from([0, 1, 8, 100, 900, 1500, 4000, 11_000, 20_000]),
    st.integers(1, 255),
)
KINDS = st.integers(0, 5)


class Model(RuleBasedStateMachine):
    """`live` is what the journal has to show: op -> (payload, kind)."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = MemoryDirectory()
        self.live: dict[int, tuple[bytes, int]] = {}
        self.watermark = 0
        self.views: list[tuple[memoryview, bytes]] = []

    @initialize(durability=st.sampled_from(list(Durability)), align=st.sampled_from([0, 0, 0, 512]))
    def create(self, durability: Durability, align: int) -> None:
        self.options: dict[str, Any] = {"durability": durability}
        self.journal = Journal(
            "j", storage=self.directory, slots=SLOTS, segment_bytes=16384, commit_align_bytes=align,
            **self.options,
        )  # fmt: skip

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.journal.close()
        for view, wanted in self.views:
            assert bytes(view) == wanted

    # --- what has to happen

    def next_op(self) -> int:
        return max([self.watermark, *self.live]) + 1

    def refusal(self, first: int, count: int, *, replace: bool) -> type[Exception] | None:
        """The error for an append of these ops, or None. Only the first that is met is raised."""
        taken = {op % SLOTS: op for op in self.live}
        if count > SLOTS:
            return JournalFullError
        for op in range(first, first + count):
            if op <= self.watermark:
                return StaleOpError
            now = taken.get(op % SLOTS, op)
            if now != op:
                return JournalFullError
            if op in self.live and not replace:
                return DuplicateOpError
        return None

    def op(self, near: int) -> int:
        return max(1, self.watermark + near)

    # --- writing

    @rule(payload=PAYLOADS, kind=KINDS)
    def append(self, payload: bytes, kind: int) -> None:
        op = self.next_op()
        if (error := self.refusal(op, 1, replace=False)) is not None:
            with pytest.raises(error):
                self.journal.append(payload, kind=kind)
        else:
            assert self.journal.append(payload, kind=kind) == op
            self.live[op] = (payload, kind)

    @rule(near=st.integers(-3, 20), payload=PAYLOADS, kind=KINDS, replace=st.booleans())
    def append_at(self, near: int, payload: bytes, kind: int, replace: bool) -> None:
        op = self.op(near)
        if (error := self.refusal(op, 1, replace=replace)) is not None:
            with pytest.raises(error):
                self.journal.append(payload, op=op, kind=kind, replace=replace)
        else:
            assert self.journal.append(payload, op=op, kind=kind, replace=replace) == op
            self.live[op] = (payload, kind)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), payload=PAYLOADS, kind=KINDS)
    def replace(self, data: st.DataObject, payload: bytes, kind: int) -> None:
        op = data.draw(st.sampled_from(sorted(self.live)))
        assert self.journal.append(payload, op=op, kind=kind, replace=True) == op
        self.live[op] = (payload, kind)

    @rule(
        payloads=st.lists(PAYLOADS.filter(lambda p: len(p) < 5000), max_size=5),
        near=st.none() | st.integers(-2, 15),
        kind=KINDS,
    )
    def append_many(self, payloads: list[bytes], near: int | None, kind: int) -> None:
        first = self.next_op() if near is None else self.op(near)
        given = None if near is None else first
        error = self.refusal(first, len(payloads), replace=False) if payloads else None
        if error is not None:
            with pytest.raises(error):
                self.journal.append_many(payloads, first_op=given, kind=kind)
        else:
            done = self.journal.append_many(payloads, first_op=given, kind=kind)
            assert done == range(first, first + len(payloads))
            self.live |= {first + n: (p, kind) for n, p in enumerate(payloads)}

    @rule()
    def sync(self) -> None:
        assert self.journal.sync() == self.journal.written_lsn

    # --- shrinking

    @rule(near=st.integers(-3, 20), length=st.integers(0, 8))
    def drain(self, near: int, length: int) -> None:
        first = self.op(near)
        last = first + length
        removed = {op: e for op, e in self.live.items() if first <= op <= last}
        moves = not any(op < first for op in self.live)
        drained = self.journal.drain(first, last)
        assert {e.op: (bytes(e.payload), e.kind) for e in drained} == removed
        self.views += [(e.payload, removed[e.op][0]) for e in drained]
        self.live = {op: e for op, e in self.live.items() if op not in removed}
        if moves:
            self.watermark = max(self.watermark, last)

    @rule(near=st.integers(-2, 20))
    def truncate_from(self, near: int) -> None:
        op = self.op(near)
        if op <= self.watermark:
            with pytest.raises(ValueError, match="watermark"):
                self.journal.truncate_from(op)
            return
        removed = [o for o in self.live if o >= op]
        assert self.journal.truncate_from(op) == len(removed)
        for o in removed:
            del self.live[o]

    @rule(near=st.integers(-2, 15))
    def set_snapshot_op(self, near: int) -> None:
        op = self.watermark + near
        if op < self.watermark:
            with pytest.raises(ValueError, match=r".*"):
                self.journal.set_snapshot_op(op)
            return
        self.journal.set_snapshot_op(op)
        self.watermark = op
        self.live = {o: e for o, e in self.live.items() if o > op}

    @rule()
    def compact(self) -> None:
        assert self.journal.compact() >= 0

    # --- the end, and again

    def open(self) -> None:
        self.journal = Journal("j", storage=self.directory, **self.options)

    @rule(durability=st.sampled_from(list(Durability)))
    def reopen(self, durability: Durability) -> None:
        self.journal.close()
        self.options["durability"] = durability
        self.open()
        assert self.journal.report.outcome.value == "sealed"

    @rule(sync=st.booleans(), index=st.booleans())
    def reopen_after_a_kill(self, sync: bool, index: bool) -> None:
        if self.options["durability"] is Durability.BUFFERED or sync:
            self.journal.sync()
        left = copy.deepcopy(self.directory)
        left.close()
        if not index:
            left.unlink(fmt.INDEX_NAME)
        self.journal.close()
        self.directory = left
        self.open()
        assert self.journal.report.outcome.value in {"clean", "unfinished batch"}

    # --- looking

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def hold_a_view(self, data: st.DataObject) -> None:
        op = data.draw(st.sampled_from(sorted(self.live)))
        self.views.append((self.journal.read(op), self.live[op][0]))

    @rule()
    def verify(self) -> None:
        report = self.journal.verify()
        assert report.ok, report.problems

    @invariant()
    def shows_the_model(self) -> None:
        if not hasattr(self, "journal"):
            return
        journal = self.journal
        assert {e.op: (bytes(e.payload), e.kind) for e in journal} == self.live
        assert (len(journal), journal.snapshot_op) == (len(self.live), self.watermark)
        assert (journal.first_op, journal.last_op) == (
            min(self.live, default=None),
            max(self.live, default=None),
        )
        room = 0
        while self.refusal(self.next_op() + room, 1, replace=False) is None and room < SLOTS:
            room += 1
        assert journal.remaining_capacity == room
        for op in range(max(0, self.watermark - 2), self.watermark + 22):
            assert (op in journal) == (op in self.live)
        for op, (payload, _) in self.live.items():
            assert journal.copy(op) == payload

    @invariant()
    def views_keep_their_bytes(self) -> None:
        for view, wanted in self.views[-30:]:
            assert bytes(view) == wanted


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
