"""Calls that fail by plan: at which call, before or after its effect, once or until it is lifted."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from mmapwal.storage import MemoryDirectory, MemoryStorage
from mmapwal.testing import CrashDisk, Fault, FaultDirectory, FaultStorage, When, every_fault

from .test_explorer import contents, durable_file, states
from .toy import ToyLog


def run_toy(directory: Any) -> list[bytes]:
    log = ToyLog(directory)
    log.append(b"one")
    log.append(b"two")
    log.rewrite(lambda record: True)
    return log.records


def test_every_fault_goes_on_until_a_run_meets_none() -> None:
    faults, ends = [], []
    for fault in every_fault():
        try:
            ends.append(run_toy(FaultDirectory(MemoryDirectory(), fault)))
        except OSError as e:
            assert e.errno == errno.EIO
            ends.append([])
        faults.append(fault)
    assert [fault.struck for fault in faults] == [True] * (len(faults) - 1) + [False]
    assert ends[-1] == [b"one", b"two"]
    assert not any(ends[:-1])
    assert {str(fault.where).split()[0] for fault in faults[:-1]} == {
        *("names", "create", "write", "sync", "rename", "dir_sync", "sync_parent", "close", "open", "read"),
        "write_sync",
    }


@pytest.mark.parametrize(("when", "left"), [(When.BEFORE, b""), (When.AFTER, b"abcd"), (When.SHORT, b"ab")])
def test_a_write_fails_before_or_after_its_effect_or_halfway(when: When, left: bytes) -> None:
    disk = CrashDisk(name_durable=True)
    fault = Fault(kinds="write", error=errno.ENOSPC, when=when)
    file = FaultDirectory(disk, fault).create("f")
    with pytest.raises(OSError, match="No space left") as caught:
        file.write_at(0, b"abcd")
    assert caught.value.errno == errno.ENOSPC
    assert contents(disk) == {"f": left}
    assert fault.where == "write f"
    file.write_at(0, b"efgh")
    assert contents(disk) == {"f": b"efgh"}


def test_a_write_and_sync_can_write_all_and_fail_to_sync_it() -> None:
    disk = CrashDisk(name_durable=True)
    durable_file(disk, "f", b"aaaa")
    file = FaultDirectory(disk, Fault(when=When.UNSYNCED, kinds="write_sync")).open("f", writable=True)
    with pytest.raises(OSError, match="Input/output"):
        file.write_sync_at(0, b"bbbb")
    file.sync()
    assert {state["f"] for state in states(disk)} == {b"aaaa", b"bbbb"}


def test_a_failed_sync_is_not_made_up_for_by_the_next() -> None:
    disk = CrashDisk(name_durable=True)
    durable_file(disk, "f", b"a")
    file = FaultDirectory(disk, Fault(kinds="sync")).open("f", writable=True)
    file.write_at(0, b"b")
    with pytest.raises(OSError, match="Input/output"):
        file.sync()
    file.sync()
    assert len(states(disk)) == 2


def test_a_fault_can_last_until_it_is_lifted() -> None:
    fault = Fault(2, kinds={"create"}, error=errno.ENOSPC, times=None)
    directory = FaultDirectory(MemoryDirectory(), fault)
    directory.create("1").close()
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            directory.create("2")
    fault.lift()
    directory.create("2").close()
    assert directory.names() == ["1", "2"]
    assert fault.calls == 5


def test_faults_reach_into_subdirectories_and_count_there() -> None:
    directory = FaultDirectory(CrashDisk(), Fault(kinds="create"))
    with pytest.raises(OSError, match="Input/output"):
        directory.subdirectory("sub").create("f")
    directory.subdirectory("sub").create("f").close()


def test_one_storage_can_fail_by_itself() -> None:
    storage = FaultStorage(
        MemoryStorage(b"abcd"), Fault(2, kinds="write", error=errno.ENOSPC, when=When.SHORT)
    )
    storage.write_at(0, b"1")
    with pytest.raises(OSError, match="No space left") as caught:
        storage.write_at(2, b"34")
    assert caught.value.filename == "storage"
    assert bytes(storage.read_at(0, 4)) == b"1b3d"
    storage.sync()


def test_a_fault_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="fsync"):
        Fault(kinds="fsync")
    with pytest.raises(ValueError, match="0"):
        Fault(0)
