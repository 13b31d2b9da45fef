"""PySyncObj's log on a journal: it is the log that the library expects."""

from __future__ import annotations

import errno
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pysyncobj.journal import MemoryJournal

from mmapwal import (
    Directory,
    IncompatibleFormatError,
    Journal,
    JournalFullError,
    MemoryDirectory,
    MissingOpError,
    PayloadTooLargeError,
)
from mmapwal.integrations.pysyncobj import JournalFailedError, MmapJournal
from mmapwal.testing import Call, CrashDisk, InterposedDirectory, assert_crash_safe

from .conftest import Clock

SMALL = {"slots": 256, "segment_bytes": 65536}


@pytest.fixture
def open_log(tmp_path: Path) -> Iterator[Callable[..., MmapJournal]]:
    opened: list[MmapJournal] = []

    def open_(**options: Any) -> MmapJournal:
        while opened:
            opened.pop()._destroy()
        opened.append(MmapJournal(tmp_path / "log", **SMALL | options))
        return opened[-1]

    yield open_
    for log in opened:
        log._destroy()


def add_through(log: MmapJournal, last: int) -> None:
    """Entries from 1 on, each of its own number, of term 1."""
    for idx in range(1, last + 1):
        log.add(b"%d" % idx, idx, 1)


def listed(log: Any) -> list[tuple[bytes, int, int]]:
    return [tuple(entry) for entry in log[:]]


# --- the log --------------------------------------------------------------------------------------------

COMMANDS = st.binary(min_size=1, max_size=300)
PLACES = st.integers(-4, 12)
STEPS = st.one_of(
    st.tuples(st.just("add"), COMMANDS, st.integers(0, 3)),
    st.tuples(st.just("fill")),
    st.tuples(st.just("wrong"), st.sampled_from([-3, -1, 1, 300])),
    st.tuples(st.just("too long")),
    st.tuples(st.just("from"), PLACES),
    st.tuples(st.just("again")),
    st.tuples(st.just("to"), PLACES),
    st.tuples(st.just("load"), st.integers(0, 9)),
    st.tuples(st.just("load own"), st.integers(0, 12)),
    st.tuples(st.just("reopen")),
    st.tuples(st.just("term")),
)


class LogAndModel:
    """Does the same to a MmapJournal and to the library's log in memory."""

    def __init__(self) -> None:
        self.directory = MemoryDirectory()
        self.log = self._open()
        self.model = MemoryJournal()
        self.term = 1
        self.next = 1
        self.removed: list[tuple[bytes, int, int]] = []  # behind the last entry, until another comes there
        self._add(b"first", 1)

    def _open(self) -> MmapJournal:
        log = MmapJournal(".", storage=self.directory, **SMALL, max_payload_bytes=1000)
        log._starting = False  # as after the first tick
        return log

    def _add(self, command: bytes, idx: int) -> None:
        self.log.add(command, idx, self.term)
        self.model.add(command, idx, self.term)
        same = self.removed[:1] == [(command, idx, self.term)]
        self.removed = self.removed[1:] if same else []
        self.next = idx + 1

    def do(self, what: str, *how: Any) -> None:
        length = len(self.model)
        if what == "add" and self.log.takes_commands:
            self.term += how[1]
            self._add(how[0], self.next)
        elif what == "fill":
            with pytest.raises(JournalFullError):
                while True:
                    self._add(b"f", self.next)
            assert self.next == self.log.journal.snapshot_op + SMALL["slots"] + 1
        elif what == "wrong" and length:
            with pytest.raises(ValueError, match="cannot follow"):
                self.log.add(b"wrong", self.next + how[0], self.term)
        elif what == "too long":
            with pytest.raises(PayloadTooLargeError):
                self.log.add(b"x" * 1000, self.next, self.term)
        elif what == "again" and self.removed:
            self.term = self.removed[0][2]
            self._add(*self.removed[0][:2])
        elif what == "from":
            self.removed = self.model[how[0] :] + self.removed
            self.next = self.removed[0][1] if self.removed else self.next
            for log in (self.log, self.model):
                log.deleteEntriesFrom(how[0])
        elif what == "to":
            for log in (self.log, self.model):
                log.deleteEntriesTo(how[0])
        elif what == "load" and length:  # a dump of the leader's, which may end before the log does
            idx = max(self.model[0][1] + 1, self.next - 5) + how[0]
            for log in (self.log, self.model):
                log.clear()
            self._add(b"of the dump", idx)
            self._add(b"of the dump too", idx + 1)
        elif what == "load own" and length > 1:  # one whose entries are in the log
            at = how[0] % (length - 1)
            dump, self.removed = self.model[at : at + 2], self.model[at + 2 :] + self.removed
            for log in (self.log, self.model):
                log.clear()
                for entry in dump:
                    log.add(*entry)
            self.next = dump[1][1] + 1
        elif what in ("reopen", "term"):
            if what == "term":
                self.log.setCurrentTerm(self.log.getCurrentTerm() + 1, None)
            else:
                self.log._destroy()
                self.log = self._open()
            for entry in self.removed:
                self.model.add(*entry)
                self.next = entry[1] + 1
            self.removed = []

    def check(self) -> None:
        expected = self.model[:]
        assert len(self.log) == len(expected)
        assert listed(self.log) == expected
        assert self.log.failure is None
        if not expected:
            return
        assert [tuple(self.log[at]) for at in range(-len(expected), len(expected))] == expected * 2
        assert (self.log[-1][0], self.log[-1][1], self.log[-1][2]) == expected[-1]
        assert self.log[0] == expected[0]
        assert (self.log[0] != expected[-1]) == (expected[0] != expected[-1])
        assert self.log[1:3] == expected[1:3]
        assert self.log[3:2] == []
        assert self.log[::-2] == expected[::-2]
        assert pickle.loads(pickle.dumps(self.log[-1])) == expected[-1]  # noqa: S301
        assert pickle.loads(pickle.dumps(self.log[-3:])) == expected[-3:]  # noqa: S301
        slice_ = self.log[:]
        if len(slice_) > 1:  # it may be pickled in a forked child, which has no journal
            assert type(slice_[-1]) is tuple
        assert slice_[: len(expected) // 2 + 1] == expected[: len(expected) // 2 + 1]
        assert list(slice_) == expected
        with pytest.raises(IndexError):
            self.log[len(expected)]


@settings(max_examples=60)
@given(st.lists(STEPS, max_size=40))
def test_it_is_the_log_that_the_library_keeps_in_memory_also_after_a_restart(steps: list[Any]) -> None:
    both = LogAndModel()
    try:
        for step in steps:
            both.do(*step)
            both.check()
    finally:
        both.log._destroy()


def test_an_index_that_is_not_the_next_is_refused_before_anything_is_removed_or_written(
    open_log: Callable[..., MmapJournal],
) -> None:
    log = open_log()
    log._starting = False
    add_through(log, 10)
    log.sync()
    before = log.journal.written_lsn
    for idx in (0, 5, 10, 12, 1000):
        with pytest.raises(ValueError, match=f"index {idx} cannot follow 10"):
            log.add(b"wrong", idx, 1)
    log.deleteEntriesTo(10)
    with pytest.raises(ValueError, match="index 7 was given to the dump"):
        log.add(b"wrong", 7, 1)
    log.sync()
    assert log.journal.written_lsn == before
    assert log.failure is None


def test_of_a_dump_whose_first_entry_alone_is_in_the_log_the_second_replaces_what_stands_there(
    open_log: Callable[..., MmapJournal],
) -> None:
    log = open_log()
    add_through(log, 20)
    log = open_log()
    log.clear()
    log.add(b"9", 9, 1)
    log.add(b"other", 10, 2)
    assert listed(log) == [(b"9", 9, 1), (b"other", 10, 2)]
    log.add(b"11", 11, 2)
    assert log.journal.last_op == 11


def test_a_command_that_is_too_long_does_not_remove_what_it_cannot_replace(
    open_log: Callable[..., MmapJournal],
) -> None:
    log = open_log(max_payload_bytes=1000)
    add_through(log, 10)
    log.deleteEntriesFrom(5)
    with pytest.raises(PayloadTooLargeError):
        log.add(b"x" * 1000, 6, 2)
    assert [entry[1] for entry in open_log()[:]] == list(range(1, 11))


@pytest.mark.parametrize("removed", [0, 4])
def test_an_emptied_log_begins_at_any_index_that_was_not_given_to_the_dump(
    open_log: Callable[..., MmapJournal], removed: int
) -> None:
    log = open_log()
    add_through(log, 10)
    log.deleteEntriesTo(removed)
    log.deleteEntriesFrom(0)
    assert not len(log)
    log.add(b"20", 20, 2)
    log.add(b"21", 21, 2)
    assert listed(log) == [(b"20", 20, 2), (b"21", 21, 2)]
    assert listed(open_log()) == [(b"20", 20, 2), (b"21", 21, 2)]


def test_an_entry_that_is_held_may_be_gone_and_the_node_does_not_stop_for_that(
    open_log: Callable[..., MmapJournal],
) -> None:
    log = open_log()
    add_through(log, 10)
    held = log[2]
    log.deleteEntriesTo(5)
    with pytest.raises(MissingOpError):
        tuple(held)
    assert log.failure is None
    assert tuple(log[-1]) == (b"10", 10, 1)


@pytest.mark.parametrize("wrong", [(-1, None), (1 << 64, None), (1.5, None), (9, 5), (9, ""), (9, "\ud800")])
def test_a_wrong_term_or_vote_is_refused_and_nothing_of_it_stays(
    open_log: Callable[..., MmapJournal], wrong: tuple[Any, Any]
) -> None:
    log = open_log()
    log.setCurrentTerm(3, "host:1")
    with pytest.raises(ValueError, match=r"a term is|a vote is|surrogates not allowed"):
        log.setCurrentTerm(*wrong)
    assert (log.getCurrentTerm(), log.getVotedForNodeId()) == (3, "host:1")
    log.add(b"a", 1, 3)
    log.onOneSecondTimer()
    log.sync()
    assert open_log().getVotedForNodeId() == "host:1"


def test_no_entry_is_kept_on_the_heap(open_log: Callable[..., MmapJournal]) -> None:
    log = open_log(slots=4096, segment_bytes=1 << 20)
    log.add(b"first", 1, 1)
    before = len(pickle.dumps({k: v for k, v in vars(log).items() if k != "journal"}))
    for idx in range(2, 3000):
        log.add(b"x" * 1000, idx, 1)
    assert len(pickle.dumps({k: v for k, v in vars(log).items() if k != "journal"})) < before + 100


def test_what_was_synced_survives_a_power_cut_and_the_commit_index_covers_nothing_else() -> None:
    disk = CrashDisk(name_durable=True)
    log = MmapJournal(".", storage=disk, **SMALL)
    add_through(log, 10)
    log.setCurrentTerm(7, "host:1")
    log.setRaftCommitIndex(9)
    log.onOneSecondTimer()
    log.add(b"11", 11, 7)
    log.setRaftCommitIndex(11)
    for state in disk.crash_states():
        again = MmapJournal(".", storage=state, **SMALL)
        assert (again.getCurrentTerm(), again.getVotedForNodeId()) == (7, "host:1")
        assert 9 <= again.getRaftCommitIndex() <= len(again)
        assert [entry[1] for entry in again[:10]] == list(range(1, 11))
        again._destroy()
    log._destroy()


@pytest.mark.parametrize(
    "steps",
    [("add", "vote"), ("commit", "timer"), ("to",), ("from", "again"), ("from", "other"), ("load",)],
    ids=" ".join,
)
def test_a_power_cut_at_any_step_leaves_a_log_that_can_be_opened_and_goes_with_the_dump(
    steps: tuple[str, ...],
) -> None:
    """The dump has the entries up to 12; what is promised before it stays, or is in it."""

    def scenario(disk: CrashDisk, acknowledge: Callable[..., None]) -> None:
        log = MmapJournal(".", storage=disk, **SMALL)
        for idx in range(1, 16):
            log.add(b"%d" % idx * 100, idx, 1)
        log.sync()
        acknowledge("fifteen")
        for step in steps:
            match step:
                case "add":
                    log.add(b"16", 16, 2)
                case "vote":
                    log.setCurrentTerm(3, "host:1")
                case "commit":
                    log.setRaftCommitIndex(14)
                case "timer":
                    log.onOneSecondTimer()
                case "to":
                    log.deleteEntriesTo(10)
                case "from":
                    log.deleteEntriesFrom(12)
                case "again":
                    for idx in range(13, 16):
                        log.add(b"%d" % idx * 100, idx, 1)
                case "other":
                    log.add(b"other", 13, 2)
                case "load":
                    log.onOneSecondTimer()
                    log.clear()
                    log.add(b"of another leader", 11, 2)
                    log.add(b"and", 12, 2)
        log.sync()
        acknowledge("all")
        log._destroy()

    def check(disk: CrashDisk, acknowledged: list[str]) -> None:
        log = MmapJournal(".", storage=disk, **SMALL)
        try:
            found = [entry[1] for entry in log[:]]
            if acknowledged and found:  # else the dump is loaded
                assert found == list(range(found[0], found[-1] + 1))
                assert found[0] <= 11
            if acknowledged == ["fifteen", "all"]:
                last = {"vote": 16, "timer": 15, "to": 15, "again": 15, "other": 13, "load": 12}[steps[-1]]
                assert found[-1] == last
                assert log.getCurrentTerm() == (3 if "vote" in steps else 0)
            elif acknowledged and steps[-1] in ("vote", "timer", "to", "again"):  # what was promised stays
                assert found[-1] in (15, 16)
            log.clear()  # PySyncObj loads its dump
            log.add(b"11" * 100, 11, 1)
            log.add(b"12" * 100, 12, 1)
            assert found[:1] == [] or len(log) >= 2
        finally:
            log._destroy()

    assert_crash_safe(scenario, check, disk=CrashDisk(name_durable=True), max_states=300)


def test_of_a_long_node_id_it_is_known_that_it_was_voted_for(open_log: Callable[..., MmapJournal]) -> None:
    log = open_log()
    log.setCurrentTerm(1, "host" * 50)
    assert open_log().getVotedForNodeId()


def test_entries_behind_a_dump_that_a_crash_left_too_new_for_its_log_are_kept(
    open_log: Callable[..., MmapJournal],
) -> None:
    """The dump is there, the entries in it are not yet gone: those behind it were promised to the leader."""
    log = open_log()
    add_through(log, 20)
    log.sync()
    log = open_log()
    log.clear()  # as PySyncObj does when it loads the dump at the start
    log.add(b"9", 9, 1)
    log.add(b"10", 10, 1)
    log.onOneSecondTimer()
    assert [entry[1] for entry in log[:]] == list(range(9, 21))


def test_a_log_that_does_not_fit_the_dump_gives_way_to_it(open_log: Callable[..., MmapJournal]) -> None:
    log = open_log()
    add_through(log, 20)
    log = open_log()
    log.clear()
    log.add(b"9", 9, 2)
    log.add(b"10", 10, 2)
    assert listed(log) == [(b"9", 9, 2), (b"10", 10, 2)]


# --- what goes wrong ------------------------------------------------------------------------------------


class FailingDirectory(InterposedDirectory):
    """Calls of the kinds in `fails` find no space."""

    def __init__(self, inner: Directory) -> None:
        super().__init__(inner)
        self.fails: set[str] = set()

    def intercept(self, call: Call) -> Any:
        if call.kind in self.fails:
            raise OSError(errno.ENOSPC, "No space left on device", call.name)
        return call.run()


@pytest.mark.parametrize("kind", ["write", "sync"])
def test_while_the_log_cannot_be_made_durable_everything_refuses_and_says_why(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = FailingDirectory(MemoryDirectory())
    log = MmapJournal(".", storage=directory, **SMALL)
    log.add(b"a", 1, 1)
    log.sync()
    log.add(b"b", 2, 1)
    directory.fails = {kind}
    calls = [lambda: log[-1], lambda: log[:], lambda: log.add(b"c", 3, 1), log.clear, log.onOneSecondTimer]
    for call in (log.sync, *calls, lambda: log.setCurrentTerm(2, "host:1")):
        with pytest.raises(JournalFailedError, match="No space"):
            call()
    assert caplog.text.count("this node stops") == 1
    assert log.failure is not None
    directory.fails = set()
    log._destroy()


def test_the_node_goes_on_when_space_has_returned_and_not_before(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    directory = FailingDirectory(MemoryDirectory())
    log = MmapJournal(".", storage=directory, **SMALL)
    log.add(b"a", 1, 1)
    directory.fails = {"write"}
    with pytest.raises(JournalFailedError):
        log.sync()
    clock.now_s += 60
    with pytest.raises(JournalFailedError):
        log[-1]
    clock.now_s += 60
    directory.fails = set()
    with caplog.at_level(logging.WARNING):
        assert tuple(log[-1]) == (b"a", 1, 1)
    assert "goes on" in caplog.text
    log.add(b"b", 2, 1)
    log.sync()
    assert log.failure is None
    log._destroy()


def test_a_log_that_finds_no_space_for_an_entry_stops_once_and_goes_on_once_when_that_entry_would_find_it(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A sync succeeds meanwhile: there is nothing to sync."""
    caplog.set_level(logging.WARNING)
    directory = FailingDirectory(MemoryDirectory())
    log = MmapJournal(".", storage=directory, **SMALL)
    log.add(b"a", 1, 1)
    log.sync()
    directory.fails = {"create"}
    with pytest.raises(JournalFailedError, match="No space"):
        log.add(b"x" * 100_000, 2, 1)
    for _ in range(20):
        clock.now_s += 60
        with pytest.raises(JournalFailedError, match="No space"):
            log[-1]
    directory.fails = set()
    clock.now_s += 60
    assert tuple(log[-1]) == (b"a", 1, 1)
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    log.add(b"x" * 100_000, 2, 1)
    log.sync()
    log._destroy()


def test_a_log_that_is_let_go_on_a_full_disk_says_so_and_raises_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory = FailingDirectory(MemoryDirectory())
    log = MmapJournal(".", storage=directory, **SMALL)
    log.add(b"a", 1, 1)
    log.sync()
    log.add(b"b", 2, 1)
    directory.fails = {"write", "create"}
    log._destroy()
    assert "closed without its last entries" in caplog.text
    directory.fails = set()
    log = MmapJournal(".", storage=directory, **SMALL)  # it was let go
    assert listed(log)[0] == (b"a", 1, 1)
    log._destroy()


def test_a_log_that_cannot_replace_its_superblock_goes_on_when_it_can(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    directory = FailingDirectory(MemoryDirectory())
    log = MmapJournal(".", storage=directory, **SMALL)
    for idx in range(1, 10):
        log.add(b"a", idx, 1)
    log.sync()
    directory.fails = {"create", "write"}
    with pytest.raises(JournalFailedError, match="No space"):
        log.deleteEntriesTo(5)
    for _ in range(20):
        clock.now_s += 60
        with pytest.raises(JournalFailedError, match="No space"):
            log[-1]
    assert len(caplog.records) == 1
    directory.fails = set()
    clock.now_s += 60
    log.deleteEntriesTo(5)
    assert [entry[1] for entry in log[:]] == [6, 7, 8, 9]
    log._destroy()


def test_a_dump_that_was_loaded_while_the_log_failed_stops_the_node_for_good(
    clock: Clock,
) -> None:
    """The state is the dump's then, and the log is not: going on would apply entries twice."""
    directory = FailingDirectory(MemoryDirectory())
    log = MmapJournal(".", storage=directory, **SMALL)
    for idx in range(1, 10):
        log.add(b"a", idx, 1)
    log.onOneSecondTimer()
    log.clear()
    directory.fails = {"write", "create"}
    with pytest.raises(JournalFailedError):
        log.add(b"of the dump", 20, 2)
    directory.fails = set()
    clock.now_s += 3600
    with pytest.raises(JournalFailedError):
        log[-1]
    log._destroy()


def test_a_dump_older_than_what_is_gone_from_the_log_stops_the_node(
    open_log: Callable[..., MmapJournal],
) -> None:
    log = open_log()
    add_through(log, 20)
    log.deleteEntriesTo(15)
    log.clear()
    with pytest.raises(JournalFailedError, match="ends at 3, and the log begins behind 15"):
        log.add(b"3", 3, 1)


def test_a_journal_of_anything_else_is_refused_and_let_go(tmp_path: Path) -> None:
    with Journal(tmp_path / "log") as journal:
        journal.append(b"not an entry of Raft")
    with pytest.raises(IncompatibleFormatError, match="no log of PySyncObj"):
        MmapJournal(tmp_path / "log", slots=65536)
    with Journal(tmp_path / "log") as journal:
        assert journal.last_op == 1


def test_what_another_leader_left_is_gone_back_over_a_term_at_a_time(
    open_log: Callable[..., MmapJournal],
) -> None:
    log = open_log()
    for idx, term in enumerate([1] * 5 + [2] * 50 + [4] * 20, 11):
        log.add(b"x", idx, term)
    assert [log.conflict(85, term) for term in (4, 5, 3)] == [85, 66, 66]
    assert [log.conflict(40, term) for term in (2, 4)] == [40, 16]
    assert log.conflict(12, 4) == 11
    assert [log.conflict(idx, 9) for idx in (10, 86)] == [10, 86]  # not here
