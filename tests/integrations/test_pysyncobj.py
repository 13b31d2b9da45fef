"""Nodes whose log is a journal: nothing is promised too early, and what is wrong is said."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import stat
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pysyncobj.serializer
import pysyncobj.syncobj
import pytest
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, replicated
from pysyncobj.transport import TCPTransport

from mmapwal import CorruptionError, IncompatibleFormatError, JournalError, JournalFullError, LockedError
from mmapwal.integrations.pysyncobj import JournalFailedError, MmapJournal, SyncedTransport, use_mmapwal

SMALL = {"slots": 256, "segment_bytes": 65536}


@pytest.fixture(autouse=True)
def library_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What use_mmapwal() puts into the library is taken out again."""
    monkeypatch.setattr(pysyncobj.syncobj, "createJournal", pysyncobj.syncobj.createJournal)
    monkeypatch.setattr(pysyncobj.syncobj, "FastQueue", pysyncobj.syncobj.FastQueue)
    monkeypatch.setattr(pysyncobj.serializer, "atomicReplace", pysyncobj.serializer.atomicReplace)


_ports = itertools.cycle(random.Random(os.getpid()).sample(range(10_000, 30_000), 20_000))


def free_ports(count: int) -> list[str]:
    """None of those that the kernel gives to whoever connects."""
    found: list[str] = []
    while len(found) < count:
        port = next(_ports)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(f"127.0.0.1:{port}")
    return found


class Counter(SyncObj):  # type: ignore[misc]
    def __init__(self, node: str, others: list[str], folder: Path, **options: Any) -> None:
        quick = {"raftMinTimeout": 1.0, "raftMaxTimeout": 2.0, "appendEntriesPeriod": 0.02}
        conf = quick | {"autoTick": False, "connectionRetryTime": 0.05, "useFork": False}
        conf = SyncObjConf(**conf | options.pop("conf", {}))
        super().__init__(node, others, **use_mmapwal(folder, conf, **SMALL | options))
        self.total = 0

    @property
    def log(self) -> MmapJournal:
        log: MmapJournal = self.conf.journalFile.log
        return log

    def destroy(self) -> None:
        """With the dumps that are under way, which the library leaves open."""
        super().destroy()
        dumps: Any = self._SyncObj__serializer
        files = [sent["file"] for sent in dumps._Serializer__transmissions.values()]
        for file in (*files, dumps._Serializer__incomingTransmissionFile):
            if file is not None:
                file.close()

    @replicated  # type: ignore[untyped-decorator]
    def add(self, number: int) -> int:
        self.total += number
        return self.total

    @replicated  # type: ignore[untyped-decorator]
    def add_one_of(self, payload: bytes) -> int:
        self.total += 1
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


def agreed(nodes: list[Counter]) -> Counter:
    """The leader, when all follow it."""
    tick_until(nodes, lambda: all(node.isReady() for node in nodes) and any(n._isLeader() for n in nodes))
    return next(node for node in nodes if node._isLeader())


def let_lead(node: Counter, nodes: list[Counter]) -> None:
    def leads() -> bool:
        leader = agreed(nodes)
        if leader is not node:
            leader.transferLeadership(node.selfNode)
        return leader is node

    tick_until(nodes, leads)


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


# --- a full log -----------------------------------------------------------------------------------------


def test_a_full_log_holds_commands_back_until_a_dump_made_room_and_each_is_answered(
    start: Callable[..., Counter],
) -> None:
    """256 slots, and the library would dump at 5,000 entries by itself."""
    node = start(free_ports(1)[0])
    results: list[tuple[int, int]] = []
    for _ in range(3000):
        node.add(1, callback=lambda result, error: results.append((result, error)))
    tick_until([node], lambda: len(results) == 3000)
    assert results == [(count, 0) for count in range(1, 3001)]
    assert node.log.failure is None
    assert node.log.journal.snapshot_op > 2500


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library drops open files
@pytest.mark.parametrize("batch_bytes", [1 << 16, 1000], ids=["many in a message", "one in many messages"])
def test_followers_take_what_fits_into_their_log_and_the_rest_when_a_dump_made_room(
    start: Callable[..., Counter], caplog: pytest.LogCaptureFixture, batch_bytes: int
) -> None:
    ports = free_ports(3)
    conf = {"appendEntriesBatchSizeBytes": batch_bytes}
    nodes = [start(port, [other for other in ports if other != port], conf=conf) for port in ports]
    leader = agreed(nodes)
    followers = [node for node in nodes if node is not leader]
    for node in followers:
        node.conf.logCompactionMinEntries = 10**6
    results: list[int] = []
    for _ in range(500):
        leader.add_one_of(b"x" * 1500, callback=lambda result, error: results.append(error))
    tick_until(nodes, lambda: any(node.log.last_index == node.log.takes_through for node in followers))
    for _ in range(50):  # and is sent more
        for node in nodes:
            node.doTick(0.001)
    for node in followers:
        node.conf.logCompactionMinEntries = 128
    tick_until(nodes, lambda: len(results) == 500 and all(node.total == 500 for node in nodes))
    assert not any(results)
    assert all(node.log.failure is None for node in nodes)
    assert "already-applied" not in caplog.text


def test_a_node_whose_log_is_full_can_still_become_leader_and_go_on(start: Callable[..., Counter]) -> None:
    """A new leader adds an entry of its own, or what was there could never be committed."""
    port = free_ports(1)[0]
    node = start(port)
    tick_until([node], node.isReady)
    node.conf.logCompactionMinEntries = 10**6
    errors: list[int] = []
    for _ in range(500):
        node.add(1, callback=lambda result, error: errors.append(error))
    tick_until([node], lambda: not node.log.takes_commands and len(errors) == node.total > 0)
    taken = node.total
    assert 200 < taken < 256
    node.destroy()
    node = start(port)
    tick_until([node], lambda: node.isReady() and node.total == taken)
    for _ in range(500):
        node.add(1)
    tick_until([node], lambda: node.total == taken + 500)


def test_a_command_that_the_log_refused_comes_again_with_its_callback(
    start: Callable[..., Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start(free_ports(1)[0])
    tick_until([node], node.isReady)
    node.conf.logCompactionMinEntries = 10**6
    node.log._end = 10**6  # so that it does not know that it is full
    results: list[tuple[int, int]] = []
    for _ in range(300):
        node.add(1, callback=lambda result, error: results.append((result, error)))
    with pytest.raises(JournalFullError):
        tick_until([node], lambda: len(results) == 300)
    node.log._look_again()
    node.conf.logCompactionMinEntries = 100
    tick_until([node], lambda: len(results) == 300)
    assert results == [(count, 0) for count in range(1, 301)]


def test_a_message_that_meets_entries_of_another_leader_is_compared_where_their_term_begins(
    tmp_path: Path,
) -> None:
    log = MmapJournal(tmp_path / "log", **SMALL)
    for idx, term in enumerate([1] * 5 + [2] * 50, 1):
        log.add(b"x", idx, term)
    message = {"term": 3, "prevLogIdx": 40, "prevLogTerm": 3, "entries": [(b"x", 41, 3)]}
    seen = SyncedTransport._as_far_as_it_fits(SimpleNamespace(_log=log), message)  # type: ignore[arg-type]
    assert (seen["prevLogIdx"], seen["prevLogTerm"], seen["entries"]) == (6, 3, [])
    log._destroy()


def test_a_command_that_is_too_long_is_denied_to_its_caller_and_the_node_goes_on_undisturbed(
    start: Callable[..., Counter], caplog: pytest.LogCaptureFixture
) -> None:
    node = start(free_ports(1)[0], max_payload_bytes=1000)
    tick_until([node], node.isReady)
    answers: list[tuple[Any, int]] = []
    for length in (10, 2000, 10):
        node.add_one_of(b"x" * length, callback=lambda *answer: answers.append(answer))
    node.add_one_of(b"x" * 2000)
    tick_until([node], lambda: len(answers) == 3)
    assert answers == [(None, FAIL_REASON.REQUEST_DENIED), (1, 0), (2, 0)]
    assert node.log.failure is None
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "max_payload_bytes leaves 992" in caplog.text


def test_where_nodes_differ_a_leader_denies_what_is_too_long_and_a_follower_says_why_it_cannot_follow(
    start: Callable[..., Counter], caplog: pytest.LogCaptureFixture
) -> None:
    ports = free_ports(3)
    nodes = [
        start(port, [other for other in ports if other != port], max_payload_bytes=1000 if few else 10_000)
        for port, few in zip(ports, (True, False, False), strict=True)
    ]
    short, *longer = nodes
    let_lead(short, nodes)
    answers: list[int] = []
    longer[0].add_one_of(b"x" * 2000, callback=lambda result, error: answers.append(error))
    tick_until(nodes, lambda: answers)
    assert answers == [FAIL_REASON.REQUEST_DENIED]
    let_lead(longer[1], nodes)
    longer[1].add_one_of(b"x" * 2000, callback=lambda result, error: answers.append(error))
    with pytest.raises(JournalFailedError, match="max_payload_bytes is 1000"):
        tick_until(nodes, lambda: False)
    tick_until(longer, lambda: len(answers) == 2)
    assert caplog.text.count("this node stops") == 1


def test_entries_that_are_sent_again_remove_nothing_that_follows_them(tmp_path: Path) -> None:
    log = MmapJournal(tmp_path / "log", **SMALL)
    for idx in range(1, 51):
        log.add(b"x", idx, 3)
    message = {"term": 3, "prevLogIdx": 20, "prevLogTerm": 3, "entries": [(b"x", 21, 3)]}
    seen = SyncedTransport._as_far_as_it_fits(SimpleNamespace(_log=log), message)  # type: ignore[arg-type]
    assert (seen["prevLogIdx"], seen["prevLogTerm"], seen["entries"]) == (50, 3, [])
    later = message | {"term": 4}  # the last entry may be none of its own
    seen = SyncedTransport._as_far_as_it_fits(SimpleNamespace(_log=log), later)  # type: ignore[arg-type]
    assert seen == later
    log._destroy()


def test_a_log_of_too_few_slots_is_refused_and_said_how_many_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"slots is 63.*give 64 or more"):
        use_mmapwal(tmp_path, slots=63)


def test_nodes_that_are_given_the_same_conf_have_dumps_of_their_own_and_the_conf_stays_as_it_was(
    tmp_path: Path,
) -> None:
    conf = SyncObjConf()
    before = dict(vars(conf))
    nodes = [use_mmapwal(tmp_path / name, conf)["conf"] for name in "ab"]
    assert [node.fullDumpFile for node in nodes] == [str(tmp_path / name / "dump") for name in "ab"]
    assert [node.journalFile.path for node in nodes] == [tmp_path / name / "journal" for name in "ab"]
    assert vars(conf) == before


# --- nodes that start again -----------------------------------------------------------------------------


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
