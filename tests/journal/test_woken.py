"""What a follower that slept has when it is woken: taken in C, before it looks at anything, and never more or
other than it would have found by looking."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mmapwal import (
    ClosedError,
    CorruptionError,
    Durability,
    Entry,
    Journal,
    StaleOpError,
    TruncatedError,
    following,
)
from mmapwal import format as fmt
from mmapwal.reader import make_entry
from tests.conftest import Home

from .elsewhere import Writer, lose
from .files import write
from .watched import WAIT_S, Task

SMALL: dict[str, Any] = {"slots": 256, "segment_bytes": 16384}


@pytest.fixture
def journal(home: Home) -> Journal:
    return home.open(**SMALL)


AT_ONCE = [
    ("mapped", "own"),
    ("memory", "own"),
    ("mapped", "another"),
]  # who sees what is stored under a segment
EVERYBODY = [*AT_ONCE, ("file", "own")]
everybody = pytest.mark.parametrize(("kind", "who"), EVERYBODY, indirect=True)


@pytest.fixture
def who(request: pytest.FixtureRequest) -> str:
    """Whose follower it is: of the writer's own process, or as another's."""
    return str(request.param)


@pytest.fixture
def follow(home: Home, who: str) -> Any:
    """`follow(journal)`: a follower that has all there is."""

    def make(journal: Journal, from_op: int | None = None, *, written: bool = False) -> following.Follower:
        reader = journal
        if who == "another":
            reader = Journal(home.path, readonly=True)
            home._given.append(reader)
        follower = following.Follower(reader._engine, from_op, written=written)
        list(everything(follower))
        return follower

    return make


def everything(follower: following.Follower) -> Iterator[Entry]:
    while (entries := follower.take()) is not None:
        yield from entries


def woken(follower: following.Follower) -> list[tuple[int, bytes, int, int]] | None:
    """What is there when it wakes, none of it by looking; None: it has to look."""

    class LooksError(Exception):
        pass

    def looks() -> None:
        raise LooksError

    follower.take = looks  # type: ignore[method-assign]
    try:
        entries = follower.take_next(0)
        assert entries is not None
        return [(e.op, bytes(e.payload), e.kind, e.timestamp) for e in entries]
    except LooksError:
        return None
    finally:
        del follower.take


def stored(journal: Journal, first_op: int) -> list[tuple[int, bytes, int, int]]:
    return [(e.op, bytes(e.payload), e.kind, e.timestamp) for e in journal.entries(first_op)]


@everybody
def test_one_entry_or_many_are_there_without_a_look_each_as_it_is(journal: Journal, follow: Any) -> None:
    journal.append(b"before")
    follower = follow(journal)
    assert woken(follower) is None  # nothing came
    for first_op, count in ((2, 1), (3, 7), (10, 1), (11, 1), (12, 3)):
        for n in range(count):
            journal.append(os.urandom(50 * n + count), kind=n + 1, timestamp=10**18 + n)
        assert woken(follower) == stored(journal, first_op)
    assert woken(follower) is None
    assert follower.take() is None


@everybody
def test_what_is_only_written_is_there_for_who_asked_for_that_and_for_nobody_else(
    home: Home, follow: Any
) -> None:
    journal = home.open(durability=Durability.OS, **SMALL)
    journal.append(b"first")
    journal.sync()
    careful, hasty = follow(journal), follow(journal, written=True)
    journal.append(b"second")
    assert woken(careful) is None
    assert woken(hasty) == stored(journal, 2)
    journal.sync()
    assert woken(careful) == stored(journal, 2)
    assert woken(hasty) is None


@everybody
def test_what_was_given_when_written_counts_as_lost_until_it_is_known_to_be_durable(
    home: Home, follow: Any
) -> None:
    journal = home.open(durability=Durability.OS, **SMALL)
    journal.append(b"first")
    hasty = follow(journal, written=True)
    for n in range(4):
        journal.append(b"%d" % n)
        assert woken(hasty) == stored(journal, 2 + n)
        if n == 1:
            journal.sync()
    assert [op for _, op in hasty._unproven] == [4, 5]


@everybody
def test_what_is_cut_off_is_told_and_what_came_behind_it_only_then(journal: Journal, follow: Any) -> None:
    for n in range(10):
        journal.append(b"%d" % n)
    follower = follow(journal)
    journal.append(b"given to nobody")
    journal.truncate_from(8)
    journal.append(b"another 8")
    assert woken(follower) is None
    with pytest.raises(TruncatedError) as e:
        follower.take_next(0)
    assert e.value.op == 8
    assert [bytes(entry.payload) for entry in everything(follower)] == [b"another 8"]
    journal.append(b"only had by waking")
    assert woken(follower) == stored(journal, 9)
    journal.truncate_from(9)
    with pytest.raises(TruncatedError) as e:
        follower.take_next(0)
    assert e.value.op == 9


@everybody
def test_a_watermark_above_all_that_was_given_is_told_before_what_comes_behind_it(
    journal: Journal, follow: Any
) -> None:
    journal.append(b"x")
    follower = follow(journal)
    journal.set_snapshot_op(50)
    journal.append(b"behind it")
    assert woken(follower) is None
    with pytest.raises(StaleOpError) as e:
        follower.take_next(0)
    assert e.value.first_op == 51
    assert [entry.op for entry in everything(follower)] == [51]


@everybody
def test_a_drain_of_what_was_not_given_is_seen(journal: Journal, follow: Any) -> None:
    journal.append(b"x")
    follower = follow(journal)
    for n in range(6):
        journal.append(b"%d" % n)
    journal.drain(3, 5)
    assert woken(follower) is None
    assert [entry.op for entry in follower.take_next(0) or ()] == [2, 6, 7]
    journal.append(b"y")
    assert woken(follower) == stored(journal, 8)


@pytest.mark.parametrize("kind", ["mapped"], indirect=True)
def test_who_was_told_of_a_loss_gets_what_replaces_an_older_entry_too(
    start: Callable[..., Writer], home: Home
) -> None:
    writer = start("os")
    writer.append(3)
    writer.do("sync()")
    with Journal(home.path, readonly=True) as reader:
        hasty = following.Follower(reader._engine, None, written=True)
        writer.append(2)
        assert [e.op for e in everything(hasty)] == [1, 2, 3, 4, 5]
        writer.kill()
        lose(home.path, reader.durable_lsn)
        writer = start("os")
        with pytest.raises(TruncatedError) as e:
            hasty.take_next(0)
        assert e.value.op == 4
        assert hasty.take() is None  # it has gone over what was left, for what comes again
        writer.do("append(b'another', op=2, replace=True)")
        writer.do("append(b'new')")
        assert [(op, payload) for op, payload, *_ in woken(hasty) or ()] == [(2, b"another"), (4, b"new")]


@everybody
def test_who_asked_for_ops_from_one_on_gets_none_below_it(journal: Journal, follow: Any) -> None:
    for op in (1, 20):
        journal.append(b"%d" % op, op=op)
    follower = follow(journal, 10)
    for op in (5, 21, 9):
        journal.append(b"%d" % op, op=op)
    assert [op for op, *_ in woken(follower) or ()] == [21]
    journal.append(b"8", op=8)
    assert woken(follower) is None


@everybody
def test_into_the_next_segment_and_through_changes_of_structure_nothing_is_missed(
    journal: Journal, follow: Any
) -> None:
    choose, follower = random.Random(7), follow(journal)
    given, by_waking = [], 0
    for _ in range(400):
        for _ in range(choose.randrange(3)):
            journal.append(choose.randbytes(choose.randrange(900)))
        if choose.random() < 0.1:
            journal.set_snapshot_op(max(journal.snapshot_op, (journal.last_op or 0) - 20))
            if choose.random() < 0.3:
                journal.compact(wait=True)
        by_waking += (entries := woken(follower)) is not None
        given += [op for op, *_ in entries or ()]
        given += [e.op for e in everything(follower)]
    assert given == list(range(1, (journal.last_op or 0) + 1))
    assert by_waking > 150


@everybody
def test_a_life_that_is_over_is_not_followed_on_without_a_look(home: Home, follow: Any, who: str) -> None:
    journal = home.open(**SMALL)
    journal.append(b"x")
    follower = follow(journal)
    journal.append(b"of the old life")
    journal.close()
    again = home.open()
    again.append(b"of the new one")
    if who == "another":
        assert woken(follower) is None
        assert [bytes(e.payload) for e in everything(follower)] == [b"of the old life", b"of the new one"]
    else:
        with pytest.raises(ClosedError):
            follower.take_next(0)


@pytest.mark.parametrize(("kind", "who"), AT_ONCE, indirect=True)
def test_a_damaged_entry_is_not_taken_and_its_place_is_told(home: Home, follow: Any) -> None:
    journal = home.open(**SMALL)
    journal.append(b"good")
    follower = follow(journal)
    journal.append(b"good too")
    journal.append(b"damaged")
    header = journal.header(3)
    assert header is not None
    segment = journal._engine.segments.table.segments[0]
    offset = fmt.PAGE_BYTES + header.lsn - segment.record.base_lsn + fmt.FRAME_BYTES
    before = stored(journal, 2)
    write(journal._engine.directory, segment.record.name, offset, b"X")
    assert woken(follower) == before[:1]
    assert woken(follower) is None
    with pytest.raises(CorruptionError) as e:
        follower.take_next(0)
    assert (e.value.segment, e.value.op, e.value.lsn) == (segment.record.name, 3, header.lsn)


# --- between what a follower looks at and what it is woken by -----------------------------------------


@everybody
def test_who_had_looked_before_a_cut_is_told_of_it_before_what_came_behind_it(
    journal: Journal, follow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = follow(journal)
    for n in range(9):
        journal.append(b"%d" % n)
    list(everything(follower))
    journal.append(b"not given yet")
    checks = follower._check_watermark

    def another_thread_cuts() -> None:
        checks()
        monkeypatch.undo()
        journal.truncate_from(8)
        journal.append(b"another 8")
        if follower._engine is not journal._engine:
            follower._engine.look()

    monkeypatch.setattr(follower, "_check_watermark", another_thread_cuts)
    assert follower.take() is None
    with pytest.raises(TruncatedError) as e:
        list(follower.take_next(0) or ())
    assert e.value.op == 8
    assert [bytes(entry.payload) for entry in everything(follower)] == [b"another 8"]


@everybody
def test_a_removal_that_was_taken_over_and_is_not_announced_yet_counts(
    journal: Journal, follow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.append(b"x")
    follower = follow(journal)
    engine = journal._engine
    announce, published, threads = engine._note_superblock, follower._engine.published, []
    is_there, goes_on = threading.Event(), threading.Event()

    def late() -> None:
        is_there.set()
        assert goes_on.wait(WAIT_S)
        announce()

    def cuts() -> None:
        journal.append(b"removed")
        journal.truncate_from(2)

    def before_all_that() -> tuple[int, int]:
        told: tuple[int, int] = published()
        monkeypatch.setattr(follower._engine, "published", published)
        threads.append(Task(cuts))
        assert is_there.wait(WAIT_S)
        if follower._engine is not engine:
            follower._engine._read_superblock()
        return told

    monkeypatch.setattr(engine, "_note_superblock", late)
    monkeypatch.setattr(follower._engine, "published", before_all_that)
    assert follower.take() is None
    assert list(follower.take_next(0) or ()) == []
    goes_on.set()
    threads[0].result()
    assert list(everything(follower)) == []


@everybody
def test_what_a_signal_handler_raises_into_a_wake_up_loses_nothing(
    journal: Journal, follow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HitError(Exception):
        pass

    def hit(entry: Any) -> Entry:
        make_entry(entry)
        raise HitError

    journal.append(b"x")
    follower = follow(journal)
    journal.append(b"y")
    monkeypatch.setattr(following, "make_entry", hit)
    with pytest.raises(HitError):
        follower.take_next(0)
    monkeypatch.undo()
    assert woken(follower) == stored(journal, 2)


@everybody
def test_a_signal_handler_that_follows_on_meanwhile_takes_what_it_takes(
    journal: Journal, follow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.append(b"x")
    follower = follow(journal)
    for n in range(3):
        journal.append(b"%d" % n)
        waits, handled = follower.bell.wait, []

        def is_interrupted(*args: Any, waits: Any = waits, handled: list[int] = handled) -> None:
            waits(*args)
            monkeypatch.undo()
            handled += [e.op for e in follower.take_next(0) or ()]

        monkeypatch.setattr(follower.bell, "wait", is_interrupted)
        assert list(follower.take_next(0) or ()) == []
        assert handled == [2 + n]


@everybody
def test_a_follower_that_sleeps_keeps_nothing_of_what_was_compacted(journal: Journal, follow: Any) -> None:
    follower = follow(journal)
    for _ in range(200):
        journal.append(b"x" * 900)
        assert [e.op for e in everything(follower)] == [journal.last_op]
    last = journal.last_op or 0
    assert len(journal._engine.segments.table.segments) > 5
    list(journal.entries())
    journal.set_snapshot_op(last - 1)
    journal.compact(wait=True)
    assert follower.take_next(0) is None
    gc.collect()
    assert sum(length for length, _ in follower._engine.segments.held.held()) <= 16384
    assert sum(length for length, _ in journal._engine.segments.held.held()) <= 16384
