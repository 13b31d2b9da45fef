"""What is removed from the log of a Raft node: nothing that was promised; what is left keeps its index."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pysyncobj.serializer
import pysyncobj.syncobj
import pytest
from pysyncobj import SyncObj, SyncObjConf
from pysyncobj.node import TCPNode
from pysyncobj.transport import TCPTransport

from mmapwal import MemoryDirectory, MissingOpError
from mmapwal.integrations.pysyncobj import JournalFailedError, MmapJournal, use_mmapwal
from mmapwal.testing import Call, InterposedDirectory

from .conftest import Clock

SMALL = {"slots": 256, "segment_bytes": 16384}


def entries(first: int, last: int, term: int = 1) -> list[tuple[bytes, int, int]]:
    return [(b"\x01%d" % idx + b"." * 400, idx, term) for idx in range(first, last + 1)]  # \x01: no operation


def add_all(log: MmapJournal, added: list[tuple[bytes, int, int]]) -> None:
    for entry in added:
        log.add(*entry)


def listed(log: Any) -> list[tuple[bytes, int, int]]:
    return [tuple(entry) for entry in log[:]]


class FullDirectory(InterposedDirectory):
    """While `full`, there is no space for what begins with `name`."""

    full = False
    name = ""

    def intercept(self, call: Call) -> Any:
        if self.full and call.kind in {"create", "write"} and call.name.startswith(self.name):
            raise OSError(errno.ENOSPC, "No space left on device", call.name)
        return call.run()


@pytest.fixture
def directory() -> FullDirectory:
    return FullDirectory(MemoryDirectory())


@pytest.fixture
def log(directory: FullDirectory) -> Iterator[MmapJournal]:
    log = MmapJournal(".", storage=directory, **SMALL)
    log._starting = False  # as after the first tick
    yield log
    directory.full = False
    log._destroy()


@pytest.mark.parametrize("last", [100, 90], ids=["all", "the last ones removed before"])
def test_each_index_has_its_entry_also_where_those_before_are_gone_and_giving_back_their_space_failed(
    log: MmapJournal, directory: FullDirectory, clock: Clock, last: int
) -> None:
    """The watermark has its superblock at hand; the next generation of a segment finds no space."""
    add_all(log, entries(1, 100))
    log.sync()
    log.deleteEntriesFrom(last)
    directory.full, directory.name = True, "segment"
    with pytest.raises(JournalFailedError, match="No space"):
        log.deleteEntriesTo(70)
    assert log.journal.snapshot_op == 70
    directory.full = False
    clock.now_s += 60
    assert listed(log) == entries(71, last)
    assert (log[0][1], log[-1][1], len(log)) == (71, last, last - 70)
    assert log[19:20] == entries(90, 90)
    assert log.takes_through > 70 + SMALL["slots"] - 16


def test_entries_that_are_gone_are_told_and_none_takes_their_indices(log: MmapJournal) -> None:
    add_all(log, entries(1, 10))
    held = log[:]
    log.deleteEntriesTo(5)
    with pytest.raises(MissingOpError):
        list(held)
    assert log.failure is None
    assert log.entries(6, 10) == entries(6, 10)


# --- what was promised ----------------------------------------------------------------------------------


def test_what_a_leader_had_removed_to_send_it_again_is_there_again_in_the_next_term(log: MmapJournal) -> None:
    add_all(log, entries(1, 14))
    log.setCurrentTerm(2, None)
    log.deleteEntriesFrom(4)
    add_all(log, entries(5, 6))
    log.setCurrentTerm(2, "host:1")
    assert log[-1] == entries(6, 6)[0]
    log.setCurrentTerm(3, None)
    assert listed(log) == entries(1, 14)
    log.deleteEntriesFrom(9)
    add_all(log, entries(10, 11, term=3))  # others: now they are gone
    log.setCurrentTerm(4, None)
    assert listed(log) == entries(1, 9) + entries(10, 11, term=3)


def test_it_is_there_again_also_where_the_node_has_stopped_and_hears_of_the_term_meanwhile(
    log: MmapJournal, directory: FullDirectory, clock: Clock
) -> None:
    """PySyncObj has the new term before the log refuses it, and does not set it again before it votes."""
    add_all(log, entries(1, 14))
    log.sync()
    log.deleteEntriesFrom(4)
    log.fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(JournalFailedError):
        log.setCurrentTerm(1, None)
    clock.now_s += 60
    assert log[-1] == entries(14, 14)[0]


@pytest.mark.parametrize("dump_ends", [10, 14, 15])
def test_a_dump_of_the_leader_removes_nothing_behind_it_where_its_entries_are_those_of_the_log(
    log: MmapJournal, directory: FullDirectory, dump_ends: int
) -> None:
    """They were promised. They show in the next term, or after a restart: this leader has not compared them,
    and PySyncObj tells it that all is as in its own log."""
    add_all(log, entries(1, 14))
    log.setCurrentTerm(2, None)
    log.clear()
    add_all(log, entries(dump_ends - 1, dump_ends))
    assert listed(log) == entries(dump_ends - 1, dump_ends)
    log.setCurrentTerm(3, None)
    assert listed(log) == entries(dump_ends - 1, max(dump_ends, 14))


def test_a_dump_whose_entries_are_others_removes_what_stands_behind_it(log: MmapJournal) -> None:
    add_all(log, entries(1, 14))
    for first, second in [
        (entries(5, 5, term=2), entries(6, 6, term=2)),
        (entries(6, 6, term=2), entries(7, 7)),
    ]:
        log.clear()
        add_all(log, first + second)
        log.setCurrentTerm(log.getCurrentTerm() + 1, None)
        assert listed(log) == first + second


class Follower:
    """Of a cluster of three: what it is sent, it gets by hand, and what it sends is kept."""

    def __init__(self, folder: Path, kept: list[tuple[bytes, int, int]], term: int) -> None:
        with socket.socket() as one:  # nobody connects to it
            one.bind(("127.0.0.1", 0))
            me = f"127.0.0.1:{one.getsockname()[1]}"
        others = ["127.0.0.1:1", "127.0.0.1:2"]
        log = MmapJournal(folder / "journal", **SMALL)
        add_all(log, kept)
        log.setCurrentTerm(term, me)
        log._destroy()
        self.sent: list[dict[str, Any]] = []
        conf = SyncObjConf(raftMinTimeout=1e5, raftMaxTimeout=2e5, connectionTimeout=3e5, autoTick=False)
        arguments = use_mmapwal(folder, conf, slots=256, segment_bytes=16384)
        self.node = SyncObj(me, others, **arguments)
        self.log: MmapJournal = arguments["conf"].journalFile.log
        for _ in range(3):
            self.node.doTick(0)
        self.one, self.other = (TCPNode(other) for other in others)
        internals: Any = self.node
        self.transport = internals._SyncObj__transport

    def gets(self, sender: TCPNode, message: dict[str, Any]) -> list[dict[str, Any]]:
        """What it sends thereupon."""
        del self.sent[:]
        node = next(node for node in self.node.otherNodes if node.id == sender.id)
        self.transport._onMessageReceived(node, message)
        return list(self.sent)

    def gets_entries(self, sender: TCPNode, log: list[tuple[bytes, int, int]], count: int, idx: int) -> int:
        """From the leader whose log that is, until the follower has taken some; its next index."""
        while True:
            place = {"prevLogIdx": idx - 1, "prevLogTerm": log[idx - 2][2], "entries": log[idx - 1 :][:count]}
            message = {"type": "append_entries", "term": log[-1][2], "commit_index": 9} | place
            (answer,) = self.gets(sender, message)
            idx = answer["next_node_idx"]
            if answer["success"]:
                return idx


@pytest.fixture
def follower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Follower]:
    """It had led, in term 2, and committed through 9. A leader of term 3 has those, and others behind, and
    dies when it has sent it again 2 .. 4, and no more."""
    for module, name in (
        ("syncobj", "createJournal"),
        ("syncobj", "FastQueue"),
        ("serializer", "atomicReplace"),
    ):
        of = getattr(pysyncobj, module)
        monkeypatch.setattr(of, name, getattr(of, name))  # so that use_mmapwal()'s are taken out again
    own = entries(1, 1) + entries(2, 14, term=2)
    follower = Follower(tmp_path, own, term=2)

    def send(transport: TCPTransport, node: TCPNode, message: dict[str, Any]) -> bool:
        follower.sent.append(message)
        return True

    monkeypatch.setattr(TCPTransport, "send", send)
    assert follower.gets_entries(follower.one, own[:9] + entries(10, 14, term=3), count=3, idx=13) == 5
    assert follower.log.last_index == 4
    yield follower
    follower.node.destroy()


def test_no_vote_is_for_a_candidate_that_lacks_what_was_committed_when_its_leader_died_resending_it(
    follower: Follower,
) -> None:
    wants: dict[str, Any] = {"type": "request_vote", "last_log_term": 2}
    assert follower.gets(follower.other, wants | {"term": 4, "last_log_index": 5}) == []
    assert follower.gets(follower.other, wants | {"term": 5, "last_log_index": 13}) == []
    (vote,) = follower.gets(follower.other, wants | {"term": 6, "last_log_index": 14})
    assert vote == {"type": "response_vote", "term": 6}


def test_a_candidate_has_what_it_had_promised_when_its_leader_died_resending_it(follower: Follower) -> None:
    internals: Any = follower.node
    internals._SyncObj__connectedNodes |= follower.node.otherNodes
    internals._SyncObj__raftElectionDeadline = 0
    del follower.sent[:]
    follower.node.doTick(0)
    asked = [message for message in follower.sent if message["type"] == "request_vote"]
    assert [(m["term"], m["last_log_index"], m["last_log_term"]) for m in asked] == [(4, 14, 2)] * 2
    follower.gets(follower.one, {"type": "response_vote", "term": 4})
    assert follower.node._isLeader()
    assert listed(follower.log)[:14] == entries(1, 1) + entries(2, 14, term=2)
    assert follower.log[-1] == (b"\x01", 15, 4)


def test_the_next_leader_removes_what_conflicts_with_its_log_and_nothing_that_does_not(
    follower: Follower,
) -> None:
    log = entries(1, 1) + entries(2, 11, term=2) + entries(12, 20, term=4)
    assert follower.gets_entries(follower.other, log, count=3, idx=18) < 12
    assert follower.log.journal.last_op == 14  # what follows may be the same
    idx = follower.log.last_index + 1
    while idx <= 20:
        idx = follower.gets_entries(follower.other, log, count=3, idx=idx)
        assert follower.log.journal.last_op == (idx - 1 if idx > 12 else 14)
    assert listed(follower.log) == log
    for number in range(1, 12):
        assert follower.log.journal.read(number)[8:] == log[number - 1][0]
