"""What a journal was asked to do, what it answered, and which contents may therefore be found later.

A Story drives a journal and tells the crash explorer what it is about to do and what is promised.
`accepted` turns those notes into the contents that a recovery may show: each action is there or not, as a
whole; what was answered is there; what was only written may be lost, the last first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmapwal import Durability, Journal, JournalError
from mmapwal.storage import Directory
from mmapwal.testing import CrashDisk

OPTIONS: dict[str, Any] = {"slots": 16, "segment_bytes": 16384}
OP_MAX = 2**63 - 1

DONE = {Durability.SYNC: "durable", Durability.OS: "written", Durability.BUFFERED: "buffered"}

Note = tuple[str, Any]


@dataclass(frozen=True)
class Contents:
    """A journal as its user sees it: op -> (payload, kind), the watermark, the user's bytes."""

    entries: dict[int, tuple[bytes, int]] = field(default_factory=dict)
    watermark: int = 0
    user_data: bytes = b""

    def next_op(self) -> int:
        return max([self.watermark, *self.entries]) + 1

    def with_entries(self, new: dict[int, tuple[bytes, int]]) -> Contents:
        return replace(self, entries={**self.entries, **new})

    def without(self, first: int, last: int) -> Contents:
        return replace(self, entries={op: e for op, e in self.entries.items() if not first <= op <= last})

    def with_watermark(self, op: int) -> Contents:
        return replace(self.without(1, op), watermark=op)

    def drained(self, first: int, last: int) -> Contents:
        if any(op < first for op in self.entries):
            return self.without(first, last)
        return self.with_watermark(max(last, self.watermark))

    def describe(self) -> str:
        entries = ", ".join(f"{op}:{len(p)}x{p[:3]!r}" for op, (p, _) in sorted(self.entries.items()))
        return f"[{entries}] above {self.watermark}" + (f", user {self.user_data!r}" * bool(self.user_data))


Change = Callable[[Contents], Contents]


class Expected:
    """The contents that may be found, as the notes go by."""

    def __init__(self) -> None:
        self.chain = [Contents()]  # what is promised, then what may be there too, in order
        self.ghosts: list[Change] = []  # appends that failed: their frames may lie behind the tail
        self._begun: Change | None = None

    @property
    def now(self) -> Contents:
        return self.chain[-1]

    def take(self, note: Note) -> None:
        match note:
            case ("begin", change):
                self._begun = change
                self.chain.append(change(self.now))
            case ("durable", _):
                self.chain, self.ghosts = self.chain[-1:], []
            case ("synced", _):
                self.chain = self.chain[-1:]
            case ("written", _):
                self.ghosts = []
            case ("found", contents):
                self.chain, self.ghosts = [contents], []
            case ("refused", _):
                self.chain.pop()
            case ("failed", _):
                self.chain.pop()
                assert self._begun is not None
                self.ghosts.append(self._begun)
            case ("buffered", _) | ("unclear", _):
                pass
            case _:
                raise ValueError(note)

    @property
    def accepted(self) -> list[Contents]:
        return [*self.chain, *(ghost(contents) for ghost in self.ghosts for contents in self.chain)]


def accepted(notes: Sequence[Note]) -> list[Contents]:
    expected = Expected()
    for note in notes:
        expected.take(note)
    return expected.accepted


def contents_of(journal: Journal) -> Contents:
    entries = {e.op: (bytes(e.payload), e.kind) for e in journal}
    found = Contents(entries, journal.snapshot_op, journal.user_data)
    assert len(journal) == len(entries)
    assert journal.first_op == min(entries, default=None)
    assert journal.last_op == max(entries, default=None)
    assert all(op > found.watermark for op in entries)
    return found


class Story:
    """One or more lives of a journal on a disk."""

    def __init__(
        self,
        disk: CrashDisk,
        acknowledge: Callable[[Note], None],
        earlier: Sequence[Note] = (),
        *,
        wrap: Callable[[Directory], Directory] = lambda d: d,
        **options: Any,
    ) -> None:
        """`earlier`: the notes of lives before, on this disk or on the one that it was a crash of."""
        self.disk = disk
        self.wrap = wrap
        self._tell = acknowledge
        self._options = OPTIONS | options
        self._durability = self._options.get("durability", Durability.SYNC)
        self.expected = Expected()
        for note in earlier:
            self.expected.take(note)
        self.open()
        if not earlier:
            return
        try:
            self.note("found", find(self.journal, self.expected.accepted))
        except BaseException:
            close_dead(self.journal)
            raise

    def open(self) -> None:
        # A clock that stands: what is appended again after a crash has the very bytes of what was lost.
        self.journal = Journal("journal", storage=self.wrap(self.disk), clock=lambda: 1, **self._options)

    def note(self, kind: str, what: Any = None) -> None:
        self.expected.take((kind, what))
        self._tell((kind, what))

    def act(
        self, change: Change, call: Callable[[], Any], *, success: str = "durable", failure: str = "refused"
    ) -> Any:
        """Says what is to come, does it, says what came of it.

        A change of structure that failed without poison has not happened. A failed append has not
        happened either, for as long as the journal lives; if it dies before the next one, it may have.
        """
        self.note("begin", change)
        try:
            result = call()
        except (OSError, JournalError):
            self.note(failure if self.journal.poisoned is None else "unclear")
            raise
        self.note(success)
        return result

    # --- what a user does

    def append(self, payload: bytes, *, op: int | None = None, kind: int = 0, replace: bool = False) -> int:
        number = self.expected.now.next_op() if op is None else op
        done: int = self.act(
            lambda c: c.with_entries({number: (payload, kind)}),
            lambda: self.journal.append(payload, op=op, kind=kind, replace=replace),
            success=DONE[self._durability],
            failure="failed",
        )
        assert done == number
        return done

    def append_many(self, payloads: Sequence[bytes], *, first_op: int | None = None, kind: int = 0) -> range:
        first = self.expected.now.next_op() if first_op is None else first_op
        done: range = self.act(
            lambda c: c.with_entries({first + i: (p, kind) for i, p in enumerate(payloads)}),
            lambda: self.journal.append_many(payloads, first_op=first_op, kind=kind),
            success=DONE[self._durability],
            failure="failed",
        )
        assert done == range(first, first + len(payloads))
        return done

    def sync(self) -> None:
        self.journal.sync()
        self.note("synced")

    def drain(self, first: int, last: int) -> None:
        before = self.expected.now.entries
        removed = self.act(lambda c: c.drained(first, last), lambda: self.journal.drain(first, last))
        assert {e.op: (bytes(e.payload), e.kind) for e in removed} == {
            op: e for op, e in before.items() if first <= op <= last
        }

    def truncate_from(self, op: int) -> None:
        removed = self.act(lambda c: c.without(op, OP_MAX), lambda: self.journal.truncate_from(op))
        assert isinstance(removed, int)

    def set_snapshot_op(self, op: int) -> None:
        self.act(lambda c: c.with_watermark(op), lambda: self.journal.set_snapshot_op(op))

    def set_user_data(self, data: bytes) -> None:
        """It promises nothing about entries; but what was written before it is in order."""
        if self._durability is not Durability.SYNC:
            self.sync()
        self.act(
            lambda c: replace(c, user_data=data), lambda: self.journal.set_user_data(data), success="synced"
        )

    def compact(self) -> None:
        self.journal.compact()
        self.note("synced")

    # --- how a life ends

    def close(self) -> None:
        self.journal.close()
        self.note("durable")

    def kill(self) -> None:
        """The process dies: what it wrote is there, as long as the machine lives."""
        self.disk = self.disk.kill()
        close_dead(self.journal)

    def reopen(self, *, kill: bool = False) -> None:
        """A new life. What it shows stays: recovery has made it durable."""
        if kill:
            self.kill()
        else:
            self.close()
        self.open()
        self.note("found", find(self.journal, self.expected.accepted))


def close_dead(journal: Journal) -> None:
    with contextlib.suppress(OSError, JournalError):
        journal.close()


@contextlib.contextmanager
def told(
    script: Callable[[Story], None], earlier: Sequence[Note] = (), **options: Any
) -> Iterator[Callable[..., None]]:
    """The script as a scenario for assert_crash_safe; its journal is let go at the end."""
    stories: list[Story] = []

    def scenario(disk: CrashDisk, acknowledge: Callable[[Note], None]) -> None:
        stories.append(Story(disk, acknowledge, earlier, **options))
        script(stories[-1])

    try:
        yield scenario
    finally:
        for story in stories:
            close_dead(story.journal)


@contextlib.contextmanager
def opened(disk: CrashDisk, **options: Any) -> Iterator[Journal]:
    """A journal that is killed at the end. ``disk.kill()`` gives the disk after that."""
    journal = Journal("journal", storage=disk, **(OPTIONS | options))
    try:
        yield journal
    finally:
        disk.kill()
        close_dead(journal)


def find(journal: Journal, wanted: Sequence[Contents]) -> Contents:
    found = contents_of(journal)
    assert found in wanted, (
        f"{_fault_of(found, wanted)}: recovery ({journal.report.outcome.value}) shows "
        f"{found.describe()}\n  but accepted is only " + "\n  or ".join(c.describe() for c in wanted)
    )
    return found


def _fault_of(found: Contents, wanted: Sequence[Contents]) -> str:
    """In one word what is wrong: an entry or a watermark that each of the wanted has is not there, or one is
    there that none has; else what is there does not go together."""
    known = [set(c.entries.items()) for c in wanted]
    if set.intersection(*known) - set(found.entries.items()):
        return "lost"
    if set(found.entries.items()) - set.union(*known):
        return "invented"
    return "torn"


def check(disk: CrashDisk, notes: Sequence[Note], **options: Any) -> None:
    """Opens; what is there was promised or intended; opens again the same; takes appends; closes; the
    same again."""
    with opened(disk, **options) as journal:
        found = find(journal, accepted(notes))
    disk = disk.kill()
    with opened(disk, **options) as journal:
        find(journal, [found])
        if journal.remaining_capacity:
            op = journal.append(b"after the crash", kind=7)
            assert op == found.next_op()
            found = found.with_entries({op: (b"after the crash", 7)})
        find(journal, [found])
        journal.close()
    with opened(disk.kill(), **options) as journal:
        find(journal, [found])
        assert journal.report.outcome.value == "sealed"
        report = journal.verify()
        assert report.ok, report.problems
