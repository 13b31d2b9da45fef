"""follow(): the entries in the order in which they become durable, whatever the writer does meanwhile."""

from __future__ import annotations

import errno
import itertools
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest

from mmapwal import (
    AsyncJournal,
    ClosedError,
    CorruptionError,
    Durability,
    Entry,
    Journal,
    PoisonedError,
    StaleOpError,
    TruncatedError,
    following,
    observer,
)
from mmapwal import format as fmt
from mmapwal.segment import SegmentTable
from tests.conftest import Home

from .files import write

SMALL: dict[str, Any] = {"slots": 256, "segment_bytes": 16384}


def fill(journal: Journal, count: int, tag: bytes = b"entry") -> None:
    for n in range(count):
        journal.append(tag + b" %d " % n * (n % 40 + 1), kind=n)


Take = Callable[[following.Follower], Iterator[Entry] | None]
TAKES: dict[str, Take] = {
    "looks": following.Follower.take,
    "woken": lambda follower: follower.take_next(0),  # what came since is taken in C, if that is all
}


@pytest.fixture(params=TAKES)
def take(request: pytest.FixtureRequest) -> Take:
    return TAKES[request.param]


AllOf = Callable[[following.Follower], list[int]]


@pytest.fixture
def all_of(take: Take) -> AllOf:
    return lambda follower: [e.op for entries in iter(partial(take, follower), None) for e in entries]


def ops(entries: Any) -> list[int]:
    return [entry.op for entry in entries]


def plain(entries: Any) -> list[tuple[int, bytes, int, int]]:
    return [(e.op, bytes(e.payload), e.kind, e.timestamp) for e in entries]


@pytest.fixture
def journal(home: Home) -> Journal:
    return home.open(**SMALL)


@pytest.fixture
def never_looks_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is not woken sleeps on."""
    monkeypatch.setattr(following, "LOOK_S", 3600)
    monkeypatch.setattr(observer, "LOOK_S", 3600)


# --- what comes, and in which order -------------------------------------------------------------------


def test_what_is_there_comes_whole_and_then_what_is_appended(journal: Journal) -> None:
    fill(journal, 200)
    following_ = journal.follow(timeout=0.01)
    assert plain(journal.follow(timeout=0)) == plain(journal.entries())
    seen = [next(following_) for _ in range(200)]
    journal.append_many([b"x", b"", b"z" * 5000])
    journal.append(b"last", kind=9)
    seen += list(following_)
    assert plain(seen) == plain(journal.entries())


@pytest.mark.parametrize("written", [False, True])
def test_who_is_not_behind_gets_each_as_it_is(journal: Journal, written: bool) -> None:
    following_, seen = journal.follow(timeout=0.01, written=written), []
    for n in range(150):
        journal.append(b"%d" % n * (n % 150), kind=n)
        seen.append(next(following_))
    assert plain(seen) == plain(journal.entries())


def test_the_order_is_that_of_the_commits_and_a_replaced_entry_comes_again(journal: Journal) -> None:
    for op in (5, 3, 9, 4):
        journal.append(b"%d" % op, op=op)
    journal.append(b"again", op=3, replace=True)
    assert ops(journal.follow(timeout=0)) == [5, 3, 9, 4, 3]
    assert ops(journal.follow(4, timeout=0)) == [5, 9, 4]
    assert ops(journal.follow(10, timeout=0)) == []


def test_one_that_begins_above_all_there_is_gets_what_comes_from_there_on(journal: Journal) -> None:
    fill(journal, 10)
    following_ = journal.follow(13, timeout=0.01)
    fill(journal, 5)
    assert ops(following_) == [13, 14, 15]


@pytest.mark.parametrize("wrong", [0, -1, "1", 2.0, True])
def test_an_op_that_is_none_is_refused_at_the_call(journal: Journal, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="from_op"):
        journal.follow(wrong)


@pytest.mark.parametrize("wrong", [float("nan"), -1, "1", b"1", True, [1]])
def test_a_timeout_that_is_none_is_refused_at_the_call(journal: Journal, wrong: Any) -> None:
    for follow in (journal.follow, AsyncJournal(journal).follow):
        with pytest.raises((TypeError, ValueError), match="timeout"):
            follow(timeout=wrong)
    assert ops(journal.follow(timeout=0.0)) == []


def test_views_of_followed_entries_stay_right_when_all_is_removed_and_compacted(journal: Journal) -> None:
    fill(journal, 200)
    expected = plain(journal.entries())
    held = list(journal.follow(timeout=0))
    journal.set_snapshot_op(200)
    journal.compact(wait=True)
    fill(journal, 200, b"other")
    journal.close()
    assert plain(held) == expected


@pytest.mark.usefixtures("never_looks_around")
def test_each_append_wakes_all_who_wait(journal: Journal) -> None:
    got: list[list[int]] = [[], [], []]
    step = [threading.Semaphore(0) for _ in got]

    def reads(number: int) -> None:
        for entry in journal.follow():
            got[number].append(entry.op)
            step[number].release()
            if entry.op == 100:
                return

    threads = [threading.Thread(target=reads, args=(n,), daemon=True) for n in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        journal.append(b"x")
        assert all(s.acquire(timeout=20) for s in step)
    for thread in threads:
        thread.join(20)
    assert got == [list(range(1, 101))] * 3


# --- what is durable, and what is written -------------------------------------------------------------


@pytest.mark.parametrize("durability", [Durability.OS, Durability.BUFFERED])
def test_only_what_is_durable_comes_unless_the_caller_asks_for_what_is_written(
    home: Home, durability: Durability
) -> None:
    with home.open(durability=durability, segment_bytes=4 << 20) as journal:
        durable, written = journal.follow(timeout=0), journal.follow(timeout=0, written=True)
        journal.append(b"1")
        if durability is Durability.BUFFERED:
            journal.append(b"2" * (1 << 20), op=5)  # more than is buffered
        assert ops(durable) == []
        assert ops(written) == ([1] if durability is Durability.OS else [1, 5])
        journal.sync()
        assert ops(journal.follow(timeout=0)) == ops(journal.entries())


def test_a_poisoned_journal_gives_all_that_is_durable_and_then_says_why_it_ends(journal: Journal) -> None:
    fill(journal, 20)
    following_ = journal.follow()
    assert next(following_).op == 1
    journal._engine.poison("a test", OSError(errno.EIO, "planned"))
    got = []
    with pytest.raises(PoisonedError, match="a test"):
        got.extend(e.op for e in following_)
    assert got == list(range(2, 21))


@pytest.mark.usefixtures("never_looks_around")
@pytest.mark.parametrize("how", ["close", "poison"])
def test_one_that_waits_is_told_when_the_journal_is_closed_or_poisoned(journal: Journal, how: str) -> None:
    told: list[type[Exception]] = []

    def waits() -> None:
        try:
            list(journal.follow())
        except (ClosedError, PoisonedError) as e:
            told.append(type(e))

    thread = threading.Thread(target=waits, daemon=True)
    thread.start()
    journal.append(b"x")
    if how == "close":
        journal.close()
    else:
        journal._engine.poison("a test", OSError(errno.EIO, "planned"))
    thread.join(20)
    assert told == [ClosedError if how == "close" else PoisonedError]


@pytest.mark.parametrize("kind", ["mapped", "memory"], indirect=True)
def test_a_damaged_entry_ends_it_with_its_place_behind_all_before_it(home: Home) -> None:
    journal = home.open(**SMALL)
    fill(journal, 20)
    frame = journal.header(10)
    assert frame is not None
    name = journal._engine.superblock.segments[0].name
    write(home.directory(), name, fmt.PAGE_BYTES + frame.lsn - fmt.FIRST_LSN + fmt.FRAME_BYTES, b"?")
    got: list[int] = []
    with pytest.raises(CorruptionError) as e:
        got.extend(e.op for e in journal.follow(timeout=0))
    assert got == list(range(1, 10))
    assert (e.value.segment, e.value.lsn, e.value.op) == (name, frame.lsn, 10)


# --- what is removed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [False, True])
def test_who_fell_behind_the_watermark_is_told_the_first_op_that_can_be_followed(
    journal: Journal, *, compact: bool
) -> None:
    fill(journal, 30)
    new, begun = journal.follow(timeout=0), journal.follow(timeout=0)
    got = [next(begun).op]
    fill(journal, 70)
    journal.set_snapshot_op(60)
    if compact:
        journal.compact(wait=True)
    for each in (new, begun):
        with pytest.raises(StaleOpError, match="watermark 60") as e:
            got.extend(e.op for e in each)
        assert e.value.first_op == 61
        assert ops(each) == list(range(61, 101))  # it goes on there
    assert got == list(range(1, 31))  # which had been taken together
    with pytest.raises(StaleOpError) as e:
        journal.follow(60)
    assert e.value.first_op == 61


@pytest.mark.parametrize("compact", [False, True])
def test_who_has_all_is_told_once_of_a_watermark_above_it(home: Home, *, compact: bool) -> None:
    """A snapshot was installed: what lies between has never been an entry here."""
    with home.open(**SMALL) as journal:
        nothing = journal.follow(timeout=0)
        assert ops(nothing) == []
        journal.append_many([b"x"] * 6)
        given, asked, above = (journal.follow(op, timeout=0) for op in (None, 7, 501))
        everybody = [given, asked, above]
        if home.kind == "mapped":  # as another process would
            reader = Journal(home.path, readonly=True)
            home._given.append(reader)
            everybody += [reader.follow(op, timeout=0) for op in (None, 7, 501)]
        for each in everybody:
            assert ops(each) == ([1, 2, 3, 4, 5, 6] if each in everybody[::3] else [])
        journal.set_snapshot_op(6)  # what all of them have
        assert [ops(each) for each in everybody] == [[]] * len(everybody)
        journal.set_snapshot_op(500)
        if compact:
            journal.compact(wait=True)
        for each in (nothing, *everybody):
            if each not in everybody[2::3]:
                with pytest.raises(StaleOpError, match="watermark 500") as e:
                    next(each)
                assert e.value.first_op == 501
            assert ops(each) == []
        journal.append(b"after")
        assert [ops(each) for each in (nothing, *everybody)] == [[501]] * (1 + len(everybody))
        journal.set_snapshot_op(900)
        journal.append(b"comes behind it")
        for each in (nothing, *everybody):
            with pytest.raises(StaleOpError, match=r"op 502 .* watermark 900"):
                next(each)
            assert ops(each) == [901]


def test_who_has_all_is_told_of_a_watermark_above_what_a_truncation_left(
    journal: Journal, all_of: AllOf, take: Take
) -> None:
    fill(journal, 10)
    follower = following.Follower(journal._engine, None, written=False)
    assert len(all_of(follower)) == 10
    journal.truncate_from(7)
    journal.set_snapshot_op(8)
    with pytest.raises(TruncatedError):
        take(follower)
    with pytest.raises(StaleOpError, match="op 7 is at or below the watermark 8"):
        take(follower)
    assert all_of(follower) == []


def test_a_watermark_at_or_below_what_was_given_out_of_order_is_told_to_nobody(
    journal: Journal, all_of: AllOf
) -> None:
    for op in (5, 3, 9, 4):
        journal.append(b"%d" % op, op=op)
    follower = following.Follower(journal._engine, None, written=False)
    assert all_of(follower) == [5, 3, 9, 4]
    for watermark in (2, 4, 6, 9):
        journal.set_snapshot_op(watermark)
        assert all_of(follower) == []


@pytest.mark.usefixtures("never_looks_around")
def test_who_waits_is_told_at_once_of_a_watermark_above_what_he_has(journal: Journal) -> None:
    journal.append(b"x")
    told: list[int | None] = []
    reads = journal.follow()
    assert next(reads).op == 1

    def waits() -> None:
        try:
            next(reads)
        except StaleOpError as e:
            told.append(e.first_op)

    thread = threading.Thread(target=waits, daemon=True)
    thread.start()
    journal.set_snapshot_op(500)
    thread.join(20)
    assert told == [501]


@pytest.mark.parametrize("compact", [False, True])
def test_who_keeps_up_sees_nothing_of_watermarks_drains_and_compactions(
    journal: Journal, all_of: AllOf, *, compact: bool
) -> None:
    follower = following.Follower(journal._engine, None, written=False)
    seen: list[int] = []
    for turn in range(30):
        fill(journal, 17)
        seen += all_of(follower)
        last = journal.last_op or 0
        if turn % 3 == 2:
            journal.drain(last - 5, last - 3)
        journal.set_snapshot_op(max(journal.snapshot_op, last - 40))
        if compact:
            journal.compact(wait=True)
    assert seen == list(range(1, 30 * 17 + 1))


@pytest.mark.parametrize("compact", [False, True])
def test_what_was_truncated_after_it_was_given_is_told_and_what_was_not_does_not_come(
    journal: Journal, all_of: AllOf, take: Take, *, compact: bool
) -> None:
    fill(journal, 50)
    given, behind = (following.Follower(journal._engine, None, written=False) for _ in range(2))
    assert all_of(given) == list(range(1, 51))
    journal.truncate_from(31)
    fill(journal, 3, b"new")
    journal.truncate_from(33)
    journal.truncate_from(34)  # nothing is there
    if compact:
        journal._engine.rotate()
        journal.compact(wait=True)
    fill(journal, 2, b"newer")
    with pytest.raises(TruncatedError) as e:
        take(given)
    assert e.value.op == 31
    assert all_of(given) == [31, 32, 33, 34]  # it goes on with what was appended since
    assert all_of(behind) == list(range(1, 35))
    assert plain(journal.follow(31, timeout=0)) == plain(journal.entries(31))


def test_of_many_truncations_who_was_away_is_told_the_lowest_that_matters(
    journal: Journal, all_of: AllOf
) -> None:
    fill(journal, 100)
    early, late = (following.Follower(journal._engine, None, written=False) for _ in range(2))
    all_of(early)
    for op in range(40, 40 + 2 * fmt.CUTS_MAX):
        journal.truncate_from(op)
        fill(journal, 10)
        if op == 50:
            all_of(late)
    assert len(journal._engine.superblock.cuts) == fmt.CUTS_MAX
    for follower, lowest, highest in ((early, 40, 40), (late, 40, 51)):  # of many, some are told as one
        with pytest.raises(TruncatedError) as e:
            all_of(follower)
        assert lowest <= e.value.op <= highest


def test_drained_entries_that_were_not_given_do_not_come(journal: Journal) -> None:
    fill(journal, 30)
    journal.drain(10, 20)
    assert ops(journal.follow(timeout=0)) == [*range(1, 10), *range(21, 31)]


# --- all of it at random, against what the journal holds ----------------------------------------------


class Woken:
    """follow() by one who slept each time, until there is nothing."""

    def __init__(self, journal: Journal) -> None:
        self._follower = following.Follower(journal._engine, None, written=False)
        self._rest: Iterator[Entry] = iter(())

    def __iter__(self) -> Iterator[Entry]:
        yield from self._rest
        for entries in iter(partial(self._follower.take_next, 0), None):
            self._rest = entries
            yield from entries


class Mirror:
    """What somebody makes of a journal who only follows it."""

    def __init__(self, journal: Journal, *, woken: bool = False) -> None:
        self.had_op = journal.snapshot_op  # the highest of which it knows what became
        self._entries: Iterable[Entry] = Woken(journal) if woken else journal.follow(timeout=0)
        self.entries: dict[int, bytes] = {}
        self.given = 0

    def catch_up(self, most: int = 10**9) -> None:
        for _ in range(20):  # each is told once
            try:
                for entry in itertools.islice(self._entries, most):
                    self.entries[entry.op] = bytes(entry.payload)
                    self.given += 1
                    self.had_op = max(self.had_op, entry.op)
                return
            except TruncatedError as e:
                self.had_op = min(self.had_op, e.op - 1)
                self.entries = {op: payload for op, payload in self.entries.items() if op < e.op}
            except StaleOpError as e:
                assert e.first_op is not None
                self.had_op = max(self.had_op, e.first_op - 1)
                self.entries = {op: payload for op, payload in self.entries.items() if op >= e.first_op}
        raise AssertionError("told again and again")


class Life:
    """A journal that is used at random, and who follows it: in this process, and readonly."""

    def __init__(self, home: Home, seed: int) -> None:
        self.home, self.random = home, random.Random(seed)
        self.journal = home.open(**SMALL)
        self.drained: set[int] = set()
        self.mirrors = self.in_process()
        self.readers: list[Journal] = []
        if home.kind == "mapped":  # as another process would
            self.readers = [Journal(home.path, readonly=True) for _ in range(3)]
            home._given.extend(self.readers)
            self.mirrors += [Mirror(reader, woken=reader is self.readers[0]) for reader in self.readers]

    def in_process(self) -> list[Mirror]:
        return [Mirror(self.journal), Mirror(self.journal, woken=True)]

    def step(self) -> None:
        r, journal = self.random, self.journal
        last, low = journal.last_op or 0, journal.snapshot_op
        what = r.choice(
            ["append"] * 6 + ["many", "replace", "gap", "drain", "cut", "mark", "compact", "reopen"]
        )
        if journal.remaining_capacity < 60:
            what = "mark"
        if what == "append":
            for _ in range(r.randrange(1, 20)):
                journal.append(r.randbytes(r.randrange(600)))
        elif what == "many":
            journal.append_many([r.randbytes(r.randrange(600)) for _ in range(r.randrange(1, 20))])
        elif what == "replace" and len(journal):
            op = r.choice([e.op for e in journal])
            journal.append(r.randbytes(50), op=op, replace=True)
        elif what == "gap":
            journal.append(b"gap", op=max(last, low) + r.randrange(2, 9))
        elif what == "drain" and last > low + 5:
            first = r.randrange(low + 1, last)
            self.drained |= {e.op for e in journal.drain(first, min(last, first + r.randrange(6)))}
        elif what == "cut" and last > low:
            journal.truncate_from(r.randrange(max(low + 1, last - 30), last + 1))
        elif what == "mark":
            journal.set_snapshot_op(r.randrange(low, max(low, last) + 3))
        elif what == "compact":
            journal.compact(wait=r.random() < 0.5)
        elif what == "reopen":
            self.reopen()

    def reopen(self) -> None:
        self.journal.close()
        self.journal = self.home.open()
        self.mirrors[:2] = self.in_process()  # the followers of its process end with it

    def check(self) -> None:
        expected = {e.op: bytes(e.payload) for e in self.journal}
        for mirror in self.mirrors:
            mirror.catch_up()
            assert mirror.had_op >= self.journal.snapshot_op
            seen = {op: p for op, p in mirror.entries.items() if op > self.journal.snapshot_op}
            assert {op: p for op, p in seen.items() if op in expected} == expected
            assert set(seen) - set(expected) <= self.drained
        for reader in self.readers:
            assert {e.op: bytes(e.payload) for e in reader} == expected
            state = len(reader), reader.first_op, reader.last_op, reader.snapshot_op, reader.durable_lsn
            mine = self.journal
            assert state == (len(mine), mine.first_op, mine.last_op, mine.snapshot_op, mine.durable_lsn)
            assert {op: bytes(reader.read(op)) for op in expected} == expected


@pytest.mark.parametrize("seed", range(12))
def test_who_only_follows_ends_with_what_the_journal_holds_whatever_is_done_to_it(
    home: Home, seed: int, tally: Callable[[str, int], None]
) -> None:
    life = Life(home, seed)
    for turn in range(150):
        life.step()
        for mirror in life.mirrors:
            if life.random.random() < 0.3:
                mirror.catch_up(most=life.random.randrange(30))
        if turn % 15 == 14:
            life.check()
    life.check()
    tally("entries followed through a random life", sum(m.given for m in life.mirrors))


# --- between two looks of a follower ------------------------------------------------------------------


def test_what_came_and_went_behind_the_look_at_how_far_the_journal_is_is_told(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, all_of: AllOf, take: Take
) -> None:
    engine = journal._engine
    follower = following.Follower(engine, None, written=False)
    fill(journal, 50)
    journal.append(b"above the watermark", op=120)
    assert len(all_of(follower)) == 51
    published = engine.published

    def before_much_happens() -> tuple[int, int]:
        monkeypatch.undo()
        told = published()
        for op in range(51, 111):
            journal.append(b"entry" * (op % 40 + 1), op=op)
        journal.set_snapshot_op(110)
        engine.rotate()
        journal.compact(wait=True)
        fill(journal, 5)
        return told

    monkeypatch.setattr(engine, "published", before_much_happens)
    assert take(follower) is None
    with pytest.raises(StaleOpError) as e:
        take(follower)
    assert e.value.first_op == 111
    assert all_of(follower) == [121, 122, 123, 124, 125]


def test_what_was_cut_off_while_its_segment_was_looked_up_does_not_come(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, take: Take
) -> None:
    """Nothing says any more that it was, once its segments are gone."""
    fill(journal, 20, b"old")
    follower = following.Follower(journal._engine, None, written=False)
    true_map = SegmentTable.map

    def meanwhile(table: SegmentTable, row: int) -> memoryview:
        monkeypatch.undo()
        view = true_map(table, row)
        journal.truncate_from(1)
        journal._engine.rotate()
        fill(journal, 3, b"new")
        journal.compact(wait=True)
        assert journal.stats().removals == 0
        return view

    monkeypatch.setattr(SegmentTable, "map", meanwhile)
    given = [bytes(e.payload) for _ in range(3) for e in take(follower) or ()]
    assert given == [bytes(e.payload) for e in journal]
