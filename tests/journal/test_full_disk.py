"""A full disk: what cannot be written fails cleanly, nothing is lost, and the journal goes on when there
is space again."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from mmapwal import Durability, Journal, SyncMethod, repair
from mmapwal.testing import Fault, FaultDirectory, When

from .files import Contents, after_kill, contents_of
from .watched import Gate, Task, Watched

NO_SPACE = "No space left on device"
parametrize_when = pytest.mark.parametrize("when", [When.BEFORE, When.SHORT, When.AFTER])


class Full:
    """A journal whose writes and syncs are apart, on a disk that can be filled."""

    def __init__(
        self,
        open_on: Callable[..., Journal],
        durability: Durability = Durability.SYNC,
        when: When = When.BEFORE,
        **options: Any,
    ) -> None:
        self.disk = Watched(sync_method=SyncMethod.FDATASYNC)
        self.open_on = open_on
        self.when = when
        self.faulty = FaultDirectory(self.disk, Fault(1 << 30))
        self.journal = open_on(self.faulty, durability=durability, **options)

    def fill(self, kinds: Any = ("write", "create", "truncate"), *, error: int = errno.ENOSPC) -> Fault:
        self.faulty.plan = Fault(kinds=kinds, error=error, when=self.when, times=None)
        return self.faulty.plan

    def empty(self) -> None:
        self.faulty.plan.lift()

    def killed(self) -> Contents:
        """What another process finds after a kill at this moment."""
        with Journal("j", storage=after_kill(self.disk.inner)) as left:
            assert left.verify().ok
            return contents_of(left)


@parametrize_when
@pytest.mark.parametrize("durability", [Durability.SYNC, Durability.OS])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_an_append_without_space_appends_nothing_and_its_op_is_taken_by_the_next(
    open_on: Callable[..., Journal], durability: Durability, when: When, error: int
) -> None:
    full = Full(open_on, durability, when)
    journal = full.journal
    journal.append(b"one")
    full.fill(error=error)
    for n in range(3):
        with pytest.raises(OSError, match=r"\[Errno") as raised:
            journal.append(b"no room", kind=5)
        assert raised.value.errno == error
        assert raised.value.filename.startswith("superblock" if n else "segment")
        with pytest.raises(OSError, match=r"\[Errno"):
            journal.append_many([b"no", b"room"])
    assert journal.poisoned is None
    assert contents_of(journal) == {1: (b"one", 0)}
    assert journal.remaining_capacity == 15
    full.empty()
    assert journal.append(b"two") == 2
    assert journal.append_many([b"three", b"four"]) == range(3, 5)
    wanted = {1: (b"one", 0), 2: (b"two", 0), 3: (b"three", 0), 4: (b"four", 0)}
    assert contents_of(journal) == wanted
    journal.sync()
    assert full.killed() == wanted


@parametrize_when
@pytest.mark.parametrize("durability", [Durability.SYNC, Durability.OS])
@pytest.mark.parametrize("length", [1, 60, 200, 300])
def test_what_failed_never_comes_back_behind_what_was_appended_later(
    open_on: Callable[..., Journal], durability: Durability, when: When, length: int
) -> None:
    """Its frames may lie whole on the disk, and what is appended next may end where one of them begins."""
    full = Full(open_on, durability, when, clock=lambda: 1)
    journal = full.journal
    journal.append(b"one")
    full.fill()
    with pytest.raises(OSError, match=NO_SPACE):
        journal.append_many([b"failed " * 8] * 6)
    with pytest.raises(OSError, match=NO_SPACE):
        journal.append(b"failed too")
    full.empty()
    wanted = {1: (b"one", 0)}
    for _ in range(4):
        wanted[journal.append(b"x" * length)] = (b"x" * length, 0)
        journal.sync()
        assert full.killed() == wanted
    journal.close()
    found = open_on(full.disk)
    assert contents_of(found) == wanted


@parametrize_when
def test_a_kill_before_anything_else_was_appended_loses_nothing(
    open_on: Callable[..., Journal], when: When
) -> None:
    """Whether the failed append is there then is not promised; what was acknowledged is."""
    full = Full(open_on, when=when)
    full.journal.append(b"one")
    full.fill()
    with pytest.raises(OSError, match=NO_SPACE):
        full.journal.append(b"no room")
    found = full.killed()
    assert found.pop(1) == (b"one", 0)
    assert found in ({}, {2: (b"no room", 0)})


def test_what_failed_is_no_entry_where_a_repair_passes_over_the_seal_of_the_close(
    open_on: Callable[..., Journal],
) -> None:
    """Where not even the superblock found space, the epoch that says so comes with the seal."""
    full = Full(open_on, when=When.AFTER)
    for n in range(5):
        full.journal.append(b"good %d" % n)
    full.fill()
    with pytest.raises(OSError, match=NO_SPACE):
        full.journal.append(b"never happened")
    full.empty()
    full.journal.close()
    disk = full.disk.inner
    name = next(n for n in disk.names() if n.startswith("segment"))
    storage = disk.open(name, writable=True)
    at = bytes(storage.view()).index(b"good 0")
    storage.write_at(at, b"gone 0")
    assert repair(disk).dropped
    with Journal("j", storage=after_kill(disk)) as found:
        assert contents_of(found) == {n: (b"good %d" % (n - 1), 0) for n in range(2, 6)}


@parametrize_when
def test_buffered_entries_stay_staged_and_sync_raises_until_there_is_space(
    open_on: Callable[..., Journal], when: When
) -> None:
    full = Full(open_on, Durability.BUFFERED, when)
    journal = full.journal
    journal.append(b"one")
    journal.sync()
    full.fill()
    for n in range(2, 6):
        assert journal.append(b"%d" % n) == n
    for _ in range(3):
        with pytest.raises(OSError, match=NO_SPACE):
            journal.sync()
    assert journal.poisoned is None
    assert len(journal) == 5
    assert journal.copy(1) == b"one"
    with pytest.raises(OSError, match=NO_SPACE):
        journal.append(b"6")
    assert len(journal) == 5
    full.empty()
    assert journal.append(b"6") == 6
    journal.sync()
    wanted = {1: (b"one", 0)} | {n: (b"%d" % n, 0) for n in range(2, 7)}
    assert contents_of(journal) == wanted
    assert full.killed() == wanted
    journal.close()
    assert contents_of(open_on(full.disk)) == wanted


def test_a_buffered_entry_that_cannot_be_handed_over_cannot_be_read_yet(
    open_on: Callable[..., Journal],
) -> None:
    """A view is always of the mapping."""
    full = Full(open_on, Durability.BUFFERED)
    journal = full.journal
    journal.append(b"one")
    journal.sync()
    journal.append(b"two")
    full.fill()
    for call in (lambda: journal.read(2), lambda: journal.copy(2), lambda: journal[2], lambda: list(journal)):
        with pytest.raises(OSError, match=NO_SPACE):
            call()
    assert journal.copy(1) == b"one"
    full.empty()
    assert journal.copy(2) == b"two"


@pytest.mark.parametrize("durability", list(Durability))
@pytest.mark.parametrize("kinds", ["create", "write", ("write", "create", "truncate")])
def test_no_space_for_a_segment_fails_the_append_that_needs_it_and_harms_nothing(
    open_on: Callable[..., Journal], durability: Durability, kinds: Any
) -> None:
    full = Full(open_on, durability)
    journal = full.journal
    journal.append(bytes(6000))
    journal.sync()
    full.fill(kinds)
    for _ in range(2):
        with pytest.raises(OSError, match=NO_SPACE):
            journal.append(bytes(8000))  # only in the next segment
    assert journal.poisoned is None
    assert len(journal) == 1
    if kinds == "create":
        assert journal.append(b"fits in the old one") == 2
    full.empty()
    op = journal.append(bytes(8000))
    journal.sync()
    assert op == len(journal)
    assert [len(p) for p, _ in full.killed().values()][-1] == 8000
    names = [n for n in full.disk.names() if n.endswith(".tmp") and n.startswith("segment")]
    assert not names


@pytest.mark.parametrize("when", [When.BEFORE, When.AFTER])
def test_a_first_append_without_space_for_a_segment_leaves_an_empty_journal(
    open_on: Callable[..., Journal], when: When
) -> None:
    full = Full(open_on, when=when)
    full.fill("create")
    with pytest.raises(OSError, match=NO_SPACE):
        full.journal.append(b"x")
    assert (len(full.journal), full.journal.poisoned) == (0, None)
    assert full.killed() == {}
    full.empty()
    assert full.journal.append(b"x") == 1
    assert full.killed() == {1: (b"x", 0)}


def test_no_space_while_a_segment_is_prepared_ahead_is_no_matter_until_it_is_needed(
    open_on: Callable[..., Journal],
) -> None:
    disk = Watched()
    disk.concurrent = True
    journal = open_on(disk, slots=64)
    journal.append(bytes(1000))
    gate = Gate(lambda c: c.kind == "create" and c.name.startswith("segment"))
    disk.on = gate
    journal.append(bytes(8000))
    gate.wait()
    gate.open(OSError(errno.ENOSPC, NO_SPACE))
    assert journal.append(bytes(1000)) == 3
    assert journal.append(bytes(8000)) == 4
    assert journal.poisoned is None


def test_all_threads_of_a_group_that_found_no_space_are_told_and_nothing_of_it_is_there(
    open_on: Callable[..., Journal],
) -> None:
    """The group in flight and all staged behind it fail; the op counter goes back."""
    full = Full(open_on)
    journal = full.journal
    journal.append(b"one")
    gate = Gate(lambda c: c.kind == "write" and c.name.startswith("segment"))
    full.disk.on = gate
    tasks = [Task(lambda: journal.append(b"first"))]
    gate.wait()
    for n in range(4):
        staged = journal.stats().staged_bytes
        tasks.append(Task(lambda n=n: journal.append(b"%d" % n)))
        while journal.stats().staged_bytes == staged:
            pass
    gate.open(OSError(errno.ENOSPC, NO_SPACE))
    errors = [t.finish() for t in tasks]
    assert all(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in errors)
    assert journal.poisoned is None
    assert contents_of(journal) == {1: (b"one", 0)}
    assert journal.append(b"two") == 2
    assert full.killed() == {1: (b"one", 0), 2: (b"two", 0)}


@pytest.mark.parametrize("durability", list(Durability))
def test_shrinking_goes_on_after_an_append_found_no_space(
    open_on: Callable[..., Journal], durability: Durability
) -> None:
    """The way out of a full disk: the epoch that is owed is paid by whoever comes first."""
    calls: list[Callable[[Journal], Any]] = [
        lambda j: j.set_snapshot_op(2),
        lambda j: j.drain(1, 2),
        lambda j: j.truncate_from(2),
        lambda j: j.compact(),
        lambda j: j.set_user_data(b"x"),
        lambda j: j.close(),
    ]
    for call in calls:
        full = Full(open_on, durability, When.AFTER)
        journal = full.journal
        journal.append_many([b"one", b"two", b"three"])
        journal.sync()
        full.fill()
        with pytest.raises(OSError, match=NO_SPACE):
            journal.append(b"no room")
            journal.sync()
        full.empty()
        call(journal)
        with Journal("j", storage=after_kill(full.disk.inner)) as left:
            assert left.verify().ok
            before = contents_of(left)
        if call is not calls[-1]:
            wanted = contents_of(journal)
            op = journal.append(b"later")
            journal.sync()
            assert full.killed() == wanted | {op: (b"later", 0)}
        elif durability is not Durability.BUFFERED:
            assert before == {1: (b"one", 0), 2: (b"two", 0), 3: (b"three", 0)}
        else:
            assert before == {1: (b"one", 0), 2: (b"two", 0), 3: (b"three", 0), 4: (b"no room", 0)}


def test_no_space_on_close_is_raised_for_what_was_buffered_and_everything_is_let_go(
    open_on: Callable[..., Journal],
) -> None:
    full = Full(open_on, Durability.BUFFERED)
    full.journal.append(b"one")
    full.journal.sync()
    full.journal.append(b"two")
    full.fill("write")
    with pytest.raises(OSError, match=NO_SPACE):
        full.journal.close()
    full.journal.close()
    full.empty()
    found = open_on(full.disk)
    assert contents_of(found) == {1: (b"one", 0)}
