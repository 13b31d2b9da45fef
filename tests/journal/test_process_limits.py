"""Out of descriptors, out of addresses: an error of its own kind, nothing acknowledged is lost, and when
there is room again the journal goes on."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmapwal import Journal, MemoryDirectory, SyncMethod
from mmapwal.disposal import Disposal
from mmapwal.testing import Fault, FaultDirectory

Run = Callable[..., Any]

CHILD = """
import os, resource, sys, threading, zlib
from contextlib import contextmanager
from functools import partial
from mmapwal import *

threading.stack_size(256 << 10)
path, what, method = sys.argv[1:4]
options = {"sync_method": SyncMethod[method], "slots": 4096, "segment_bytes": SEGMENT_BYTES}


class Chain:
    count = crc = 0

    def apply(self, entry):
        self.count, self.crc = self.count + 1, zlib.crc32(entry.payload, self.crc)

    def snapshot(self):
        return b"%d %d" % (self.count, self.crc)

    def restore(self, snapshot):
        self.count, self.crc = map(int, bytes(snapshot).split())


@contextmanager
def limit(kind, value):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


class Life:
    def __init__(self, path):
        self.path, self.expected, self.number, self.refused = path, Chain(), 0, 0

    def open(self):
        self.replica = recover(self.path, Chain(), **options)

    def payload(self):
        self.number += 1
        return (b"%d." % self.number) * (PAYLOAD_BYTES // 6)

    def submit(self, payload=None):
        payload = payload or self.payload()
        try:
            self.replica.submit(payload)
        except JournalError as e:
            assert "is journaled" in str(e), e
            self.expected.apply(Entry(0, payload, 0, 0))
            raise e.__cause__
        self.expected.apply(Entry(0, payload, 0, 0))

    def fill(self, *, killed):
        if killed:
            child = os.fork()
            if child != 0:
                assert os.waitpid(child, 0)[1] == 0
                for _ in range(BEFORE):
                    self.expected.apply(Entry(0, self.payload(), 0, 0))
                return
        self.open()
        for _ in range(BEFORE):
            self.submit()
        if killed:
            os._exit(0)

    def reopen(self):
        self.open()
        self.replica.close()

    def attempt(self, work):
        try:
            work()
        except (OSError, SnapshotError) as e:
            cause = e if isinstance(e, OSError) else e.__cause__
            assert cause.errno == ERROR, e
            self.refused += 1

    def run(self, limited):
        self.fill(killed=what == "open killed")
        if what == "open":
            self.replica.close()
        if what.startswith("open"):
            with limited():
                self.attempt(self.reopen)
        elif what == "read":
            self.replica.close()
            with Journal(self.path) as journal:  # after a clean close nothing of it is mapped
                with limited():
                    self.attempt(lambda: journal.copy(1))
                assert journal.copy(1).startswith(b"1.1.")
        else:
            self.replica.journal._engine.prepare_segment()  # what is in the making holds a descriptor
            works = [self.replica.checkpoint]
            if what == "append":  # of payloads that are there already: the limit is for the journal
                works = [partial(self.submit, self.payload()) for _ in range(BEFORE)]
            with limited():
                for work in works:
                    self.attempt(work)
            assert self.replica.journal.poisoned is None
            self.submit()
            self.replica.close()
        self.open()
        self.submit()
        self.replica.close()
        self.open()
        assert self.replica.journal.verify().ok
        found = self.replica.machine
        assert (found.count, found.crc) == (self.expected.count, self.expected.crc)
        self.replica.close()
        return self.refused
"""

DESCRIPTORS = (
    "ERROR, SEGMENT_BYTES, PAYLOAD_BYTES, BEFORE = 24, 32768, 1500, 60\n"
    + CHILD
    + """
@contextmanager
def descriptors(free):
    with limit(resource.RLIMIT_NOFILE, 64):
        held = []
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        for _ in range(free):
            os.close(held.pop())
        try:
            yield
        finally:
            for fd in held:
                os.close(fd)

print(*(Life(f"{path}-{free}").run(partial(descriptors, free)) for free in range(9)))
"""
)
ADDRESSES = (
    "ERROR, SEGMENT_BYTES, PAYLOAD_BYTES, BEFORE = 12, 8 << 20, (1 << 20) - 4096, 20\n"
    + CHILD
    + """
@contextmanager
def addresses():
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    with limit(resource.RLIMIT_AS, used + (4 << 20)):  # less than a segment
        yield

print(Life(path).run(addresses))
"""
)

CALLS = [("open", "DSYNC"), ("open killed", "DSYNC"), ("append", "DSYNC"), ("append", "MSYNC"),
         ("checkpoint", "DSYNC"), ("read", "DSYNC")]  # fmt: skip
parametrize_calls = pytest.mark.parametrize(("what", "method"), CALLS)


@parametrize_calls
def test_without_descriptors_it_is_an_error_nothing_is_poisoned_and_nothing_acknowledged_is_lost(
    run_python: Run, tmp_path: Path, what: str, method: str
) -> None:
    done = run_python(DESCRIPTORS, tmp_path / "j", what, method)
    assert (done.returncode, done.stderr) == (0, "")
    refused = [int(count) for count in done.stdout.split()]
    assert refused[0] > 0
    assert refused[-1] == 0


@parametrize_calls
def test_without_addresses_for_a_mapping_it_is_an_error_nothing_is_poisoned_and_nothing_acknowledged_is_lost(
    run_python: Run, tmp_path: Path, what: str, method: str
) -> None:
    done = run_python(ADDRESSES, tmp_path / "j", what, method)
    assert (done.returncode, done.stderr) == (0, "")
    if what != "checkpoint":  # which maps nothing as large
        assert int(done.stdout) > 0


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_new_segment_that_cannot_be_opened_for_writing_fails_the_append_and_poisons_nothing(
    error: int,
) -> None:
    disk = FaultDirectory(MemoryDirectory(), Fault(1 << 30))
    journal = Journal("j", storage=disk, slots=64, segment_bytes=16384, sync_method=SyncMethod.DSYNC)
    journal.append(bytes(12000))
    disk.plan = Fault(kinds="open", error=error, times=None)
    for _ in range(2):
        with pytest.raises(OSError, match=r"\[Errno") as raised:
            journal.append_many([bytes(12000), bytes(20000)])
        assert raised.value.errno == error
    assert journal.poisoned is None
    disk.plan.lift()
    assert journal.append_many([bytes(12000), bytes(20000)]) == range(2, 4)
    journal.close()
    with Journal("j", storage=disk) as journal:
        assert len(journal) == 3
        assert journal.verify().ok


def test_where_no_thread_can_be_had_files_stay_for_later_and_nobody_waits_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with Journal(tmp_path / "j", slots=64, segment_bytes=16384) as journal:
        for _ in range(5):
            journal.append(bytes(12000))
        journal.set_snapshot_op(4)
        disposal: Disposal = journal._engine.disposal
        with monkeypatch.context() as patch:
            patch.setattr("mmapwal.disposal.threading.Thread.start", refuse)
            journal.compact()
            assert disposal.pending > 0
            assert not disposal.wait()
        assert disposal.wait()
        assert disposal.pending == 0
