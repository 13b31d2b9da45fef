"""PySyncObj's log on a journal: it is the log that the library expects, and nothing is promised too early."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import socket
import stat
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pysyncobj.serializer
import pysyncobj.syncobj
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pysyncobj import SyncObj, SyncObjConf, replicated
from pysyncobj.journal import MemoryJournal
from pysyncobj.transport import TCPTransport

from mmapwal import (
    CorruptionError,
    Directory,
    IncompatibleFormatError,
    Journal,
    JournalError,
    LockedError,
    MemoryDirectory,
)
from mmapwal.integrations.pysyncobj import JournalFailedError, MmapJournal, SyncedTransport, use_mmapwal
from mmapwal.testing import Call, CrashDisk, InterposedDirectory, assert_crash_safe

SMALL = {"slots": 256, "segment_bytes": 65536}


@pytest.fixture(autouse=True)
def library_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What use_mmapwal() puts into the library is taken out again."""
    monkeypatch.setattr(pysyncobj.syncobj, "createJournal", pysyncobj.syncobj.createJournal)
    monkeypatch.setattr(pysyncobj.serializer, "atomicReplace", pysyncobj.serializer.atomicReplace)


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


def listed(log: Any) -> list[tuple[bytes, int, int]]:
    return [tuple(entry) for entry in log[:]]


# --- the log --------------------------------------------------------------------------------------------

COMMANDS = st.binary(min_size=1, max_size=300)
STEPS = st.one_of(
    st.tuples(st.just("add"), COMMANDS, st.integers(0, 3)),
    st.tuples(st.just("from"), st.integers(0, 12)),
    st.tuples(st.just("again")),
    st.tuples(st.just("to"), st.integers(0, 12)),
    st.tuples(st.just("load"), st.integers(0, 9)),
    st.tuples(st.just("reopen")),
)


class LogAndModel:
    """Does the same to a MmapJournal and to the library's log in memory."""

    def __init__(self) -> None:
        self.directory = MemoryDirectory()
        self.log = MmapJournal(".", storage=self.directory, **SMALL)
        self.log._starting = False  # as after the first tick
        self.model = MemoryJournal()
        self.term = 1
        self.removed: list[tuple[bytes, int, int]] = []  # behind the last entry, until another comes there
        self._add(b"first", 1)

    def _add(self, command: bytes, idx: int) -> None:
        same = self.removed[:1] == [(command, idx, self.term)]
        self.removed = self.removed[1:] if same else []
        for log in (self.log, self.model):
            log.add(command, idx, self.term)

    def do(self, what: str, *how: Any) -> None:
        length = len(self.model)
        last = self.model[-1][1] if length else 0
        if what == "add" and length < 200:
            self.term += how[1]
            self._add(how[0], last + 1)
        elif what == "again" and self.removed:
            self.term = self.removed[0][2]
            self._add(*self.removed[0][:2])
        elif what == "from" and 0 < how[0] <= length:
            self.removed = self.model[how[0] :] + self.removed
            for log in (self.log, self.model):
                log.deleteEntriesFrom(how[0])
        elif what == "to" and how[0] < length:
            for log in (self.log, self.model):
                log.deleteEntriesTo(how[0])
        elif what == "load":  # a dump of the leader's, which may end before the log does
            idx = max(self.model[0][1] + 1, last - 4) + how[0]
            for log in (self.log, self.model):
                log.clear()
            self._add(b"of the dump", idx)
            self._add(b"of the dump too", idx + 1)
        elif what == "reopen":
            self.log._destroy()
            self.log = MmapJournal(".", storage=self.directory, **SMALL)
            self.log._starting = False
            for entry in self.removed:
                self.model.add(*entry)
            self.removed = []

    def check(self) -> None:
        expected = self.model[:]
        assert len(self.log) == len(expected)
        assert listed(self.log) == expected
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
    for idx in range(1, 11):
        log.add(b"%d" % idx, idx, 1)
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
    for idx in range(1, 21):
        log.add(b"%d" % idx, idx, 1)
    log.sync()
    log = open_log()
    log.clear()  # as PySyncObj does when it loads the dump at the start
    log.add(b"9", 9, 1)
    log.add(b"10", 10, 1)
    log.onOneSecondTimer()
    assert [entry[1] for entry in log[:]] == list(range(9, 21))


def test_a_log_that_does_not_fit_the_dump_gives_way_to_it(open_log: Callable[..., MmapJournal]) -> None:
    log = open_log()
    for idx in range(1, 21):
        log.add(b"%d" % idx, idx, 1)
    log = open_log()
    log.clear()
    log.add(b"9", 9, 2)
    log.add(b"10", 10, 2)
    assert listed(log) == [(b"9", 9, 2), (b"10", 10, 2)]


def test_a_dump_of_the_leader_replaces_the_log_that_goes_further(
    open_log: Callable[..., MmapJournal],
) -> None:
    """Only at the start an entry that is the same says that those behind it may stay."""
    log = open_log()
    for idx in range(1, 21):
        log.add(b"%d" % idx, idx, 1)
    log.onOneSecondTimer()
    log.clear()
    log.add(b"9", 9, 1)
    log.add(b"10", 10, 1)
    assert [entry[1] for entry in log[:]] == [9, 10]


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
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = time.monotonic()
    monkeypatch.setattr("mmapwal.integrations.pysyncobj.time.monotonic", lambda: now)
    directory = FailingDirectory(MemoryDirectory())
    log = MmapJournal(".", storage=directory, **SMALL)
    log.add(b"a", 1, 1)
    directory.fails = {"write"}
    with pytest.raises(JournalFailedError):
        log.sync()
    now += 60
    with pytest.raises(JournalFailedError):
        log[-1]
    now += 60
    directory.fails = set()
    with caplog.at_level(logging.WARNING):
        assert tuple(log[-1]) == (b"a", 1, 1)
    assert "goes on" in caplog.text
    log.add(b"b", 2, 1)
    log.sync()
    assert log.failure is None
    log._destroy()


def test_a_dump_that_was_loaded_while_the_log_failed_stops_the_node_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The state is the dump's then, and the log is not: going on would apply entries twice."""
    now = time.monotonic()
    monkeypatch.setattr("mmapwal.integrations.pysyncobj.time.monotonic", lambda: now)
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
    now += 3600
    with pytest.raises(JournalFailedError):
        log[-1]
    log._destroy()


def test_a_dump_older_than_what_is_gone_from_the_log_stops_the_node(
    open_log: Callable[..., MmapJournal],
) -> None:
    log = open_log()
    for idx in range(1, 21):
        log.add(b"%d" % idx, idx, 1)
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


# --- nodes in this process ------------------------------------------------------------------------------


def free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


class Counter(SyncObj):  # type: ignore[misc]
    def __init__(self, node: str, others: list[str], folder: Path, **options: Any) -> None:
        conf = SyncObjConf(
            autoTick=False, raftMinTimeout=0.2, raftMaxTimeout=0.4, appendEntriesPeriod=0.02,
            connectionRetryTime=0.05, useFork=False, **options.pop("conf", {}),
        )  # fmt: skip
        super().__init__(node, others, **use_mmapwal(folder, conf, **SMALL | options))
        self.total = 0

    @property
    def log(self) -> MmapJournal:
        log: MmapJournal = self.conf.journalFile.log
        return log

    @replicated  # type: ignore[untyped-decorator]
    def add(self, number: int) -> int:
        self.total += number
        return self.total


def tick_until(nodes: list[Counter], done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        for node in nodes:
            node.doTick(0.001)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Counter]]:
    nodes: list[Counter] = []

    def start_(node: str, others: Sequence[str] = (), **options: Any) -> Counter:
        nodes.append(Counter(node, list(others), tmp_path / node.rpartition(":")[2], **options))
        return nodes[-1]

    yield start_
    for node in nodes:
        node.destroy()


def is_durable(log: MmapJournal) -> bool:
    stats = log.journal.stats()
    return stats.staged_bytes == 0 and log.journal.durable_lsn == log.journal.written_lsn


def test_no_promise_leaves_before_it_is_durable_and_many_entries_share_a_sync(
    start: Callable[..., Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = free_ports(3)
    nodes = [start(port, [other for other in ports if other != port]) for port in ports]
    promises: Counts[str] = Counts()
    send = TCPTransport.send

    def send_and_look(transport: Any, node: Any, message: Any) -> Any:
        if message["type"] in ("next_node_idx", "request_vote", "response_vote") or message.get("entries"):
            assert is_durable(transport._log)
            promises[message["type"]] += 1
        return send(transport, node, message)

    monkeypatch.setattr(TCPTransport, "send", send_and_look)
    tick_until(nodes, lambda: all(node.isReady() for node in nodes))
    results: list[int] = []
    for _ in range(200):
        nodes[0].add(1, callback=lambda result, error: results.append(result if not error else -1))
    tick_until(nodes, lambda: len(results) == 200 and all(node.total == 200 for node in nodes))
    assert sorted(results) == list(range(1, 201))
    assert set(promises) == {"next_node_idx", "request_vote", "response_vote", "append_entries"}
    for node in nodes:
        assert node.log.journal.stats().syncs < 60


def test_a_node_alone_acknowledges_only_what_is_durable(start: Callable[..., Counter]) -> None:
    node = start(free_ports(1)[0])
    tick_until([node], node.isReady)
    durable: list[bool] = []
    for _ in range(50):
        node.add(1, callback=lambda result, error: durable.append(not error and is_durable(node.log)))
    tick_until([node], lambda: len(durable) == 50)
    assert all(durable)


def test_a_node_that_starts_again_has_its_state_from_the_dump_and_the_entries_behind_it(
    start: Callable[..., Counter], tmp_path: Path
) -> None:
    port = free_ports(1)[0]
    conf = {"logCompactionMinEntries": 20}
    node = start(port, conf=conf)
    results: list[int] = []
    for count in range(1, 101):
        node.add(1, callback=lambda result, error: results.append(result))
        tick_until([node], lambda count=count: len(results) == count)
    node.destroy()
    assert node.log.journal.snapshot_op > 50
    node = start(port, conf=conf)
    tick_until([node], lambda: node.isReady() and node.total == 100)
    node.destroy()
    (tmp_path / port.rpartition(":")[2] / "dump").unlink()
    with pytest.raises(JournalError, match="is missing"):
        start(port, conf=conf)


def test_a_dump_replaces_the_one_before_when_it_is_durable_and_so_is_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_mmapwal(tmp_path / "node")
    old, new = tmp_path / "dump.tmp", tmp_path / "dump"
    old.write_bytes(b"the state")
    synced: list[tuple[bool, bool]] = []
    fsync = os.fsync

    def fsync_and_look(fd: int) -> None:
        fsync(fd)
        synced.append((stat.S_ISDIR(os.fstat(fd).st_mode), new.exists()))

    monkeypatch.setattr(os, "fsync", fsync_and_look)
    pysyncobj.serializer.atomicReplace(str(old), str(new))
    assert synced == [(False, False), (True, True)]  # the file before it has the name, the folder after that
    assert new.read_bytes() == b"the state"


def test_a_dump_that_cannot_be_loaded_stops_the_node(
    start: Callable[..., Counter], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_ports(1)[0]
    conf = {"logCompactionMinEntries": 20}
    node = start(port, conf=conf)
    results: list[int] = []
    for count in range(1, 61):
        node.add(1, callback=lambda result, error: results.append(result))
        tick_until([node], lambda count=count: len(results) == count)
    node.destroy()
    (tmp_path / port.rpartition(":")[2] / "dump").write_bytes(b"rot")
    node = start(port, conf=conf)
    with pytest.raises(JournalFailedError, match="the dump was not loaded"):
        tick_until([node], node.isReady)
    assert "this node stops" in caplog.text


def test_a_node_is_not_started_twice_nor_on_the_log_of_another_node_or_cluster(
    start: Callable[..., Counter], tmp_path: Path
) -> None:
    port, other = free_ports(2)
    first = start(port, cluster="words")
    with pytest.raises(LockedError):
        start(port, cluster="words")
    first.destroy()
    with pytest.raises(IncompatibleFormatError, match="another node or cluster"):
        start(port, cluster="numbers")
    folder = tmp_path / port.rpartition(":")[2]
    with pytest.raises(IncompatibleFormatError, match="another node or cluster"):
        Counter(other, [], folder, cluster="words")
    start(port, cluster="words")  # it was let go each time


def test_a_node_whose_log_is_damaged_does_not_start_and_names_the_place(
    start: Callable[..., Counter], tmp_path: Path
) -> None:
    port = free_ports(1)[0]
    node = start(port)
    results: list[int] = []
    for _ in range(20):
        node.add(1, callback=lambda result, error: results.append(result))
    tick_until([node], lambda: len(results) == 20)
    node.destroy()
    folder = tmp_path / port.rpartition(":")[2] / "journal"
    segment = next(path for path in sorted(folder.glob("segment-*")))
    data = bytearray(segment.read_bytes())
    data[4096 + 200] ^= 1
    segment.write_bytes(data)
    (folder / "index").unlink()
    with pytest.raises(CorruptionError, match=segment.name):
        start(port)


def test_the_transport_alone_says_what_it_needs() -> None:
    with pytest.raises(TypeError, match="use_mmapwal"):
        SyncObj("127.0.0.1:1", [], SyncObjConf(autoTick=False), transportClass=SyncedTransport)
