"""The promises of SnapshotStore: what a save leaves behind, what a failure does, what a load refuses."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmapwal import format as fmt
from mmapwal.errors import (
    ClosedError,
    IncompatibleFormatError,
    PersistStage,
    SnapshotCorruptError,
    SnapshotError,
    SnapshotPersistError,
)
from mmapwal.snapshot import Snapshot, SnapshotStore, snapshot_name
from mmapwal.storage import Directory, MemoryStorage, SystemDirectory

MakeDirectory = Callable[[str], Directory]
Fault = tuple[PersistStage, str, str]  # stage, call, before or after its effect
HEADER_BYTES = fmt.SNAPSHOT_HEADER.itemsize
STAGES = {
    PersistStage.WRITE: ("write", "create", "view"),
    PersistStage.SYNC: ("sync", "close"),
    PersistStage.RENAME: ("rename",),
    PersistStage.DIR_SYNC: ("dir_sync",),
}
STEPS = ["create", "write", "write", "view", "sync", "close", "rename", "dir_sync"]
at_every_fault = pytest.mark.parametrize(
    "fault",
    [(stage, call, when) for stage in STAGES for call in STAGES[stage] for when in ("before", "after")],
)


# --- a directory that fails, or dies, at a chosen call --------------------------------------------------


class Died(BaseException):
    """The process was killed: nothing that comes after has any effect."""


class Faults:
    """What the wrapped directory and its files were asked for, and what is to fail."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.dead = False
        self.armed: dict[str, tuple[str, BaseException]] = {}
        self.die_at: tuple[int, str] | None = None

    def arm(self, call: str, when: str = "before", error: BaseException | None = None) -> None:
        """The next such call fails, before or after its effect."""
        self.armed[call] = (when, error or OSError(errno.EIO, os.strerror(errno.EIO)))

    def run(self, call: str, effect: Callable[[], Any]) -> Any:
        if self.dead:
            raise OSError(errno.EIO, "the process is dead")
        self.calls.append(call)
        fault = self.armed.pop(call, ("never", None))
        for now in ("before", "after"):
            if now == "after":
                result = effect()
            if self.die_at == (len(self.calls), now):
                self.dead = True
                raise Died
            if fault[0] == now and fault[1] is not None:
                raise fault[1]
        return result


class Faulty:
    """A file or directory whose calls go through the faults. A close without a sync is no step of a save."""

    def __init__(self, inner: Any, faults: Faults, names: dict[str, str]) -> None:
        self.inner, self.faults, self.counted = inner, faults, names
        self.files: list[Faulty] = []
        self.syncs = 0

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        effect, call = getattr(self.inner, name), self.counted.get(name)
        plain = {"names": "names" not in self.faults.armed, "close": self.syncs == 0}
        if call is None or plain.get(call):
            return effect
        self.syncs += call == "sync"
        return lambda *args: self.faults.run(call, lambda: effect(*args))

    def create(self, name: str) -> Faulty:
        file = self.faults.run("create", lambda: self.inner.create(name))
        calls = {"write_at": "write", "view": "view", "sync": "sync", "close": "close"}
        self.files.append(Faulty(file, self.faults, calls))
        return self.files[-1]


def faulty_directory(directory: Directory) -> Faulty:
    calls = {"rename": "rename", "unlink": "unlink", "sync": "dir_sync", "names": "names"}
    return Faulty(directory, Faults(), calls)


@pytest.fixture
def directory(make_directory: MakeDirectory) -> Directory:
    return make_directory("snapshots")


@pytest.fixture
def faulty(directory: Directory) -> Faulty:
    return faulty_directory(directory)


def open_store(directory: Any, **options: Any) -> SnapshotStore:
    return SnapshotStore("snapshots", storage=directory, **options)


def newest(store: SnapshotStore) -> tuple[int, bytes]:
    loaded = store.load()
    assert loaded is not None
    return loaded.op, bytes(loaded.data)


def fails(store: SnapshotStore, faulty: Faulty, call: str, when: str = "before") -> SnapshotPersistError:
    """The error of a save of op 2 whose next such call fails."""
    faulty.faults.arm(call, when)
    with pytest.raises(SnapshotPersistError) as caught:
        store.save(2, b"new")
    return caught.value


def file_bytes(directory: Directory, op: int) -> bytes:
    storage = directory.open(snapshot_name(op))
    data = bytes(storage.read_at(0, len(storage)))
    storage.close()
    return data


def put_file(directory: Directory, name: str, data: bytes) -> None:
    storage = directory.create(name)
    storage.write_at(0, data)
    storage.close()


def encoded(op: int, data: bytes, **fields: Any) -> bytes:
    """A snapshot file with right checksums, whatever the fields say."""
    head: Any = np.zeros((), fmt.SNAPSHOT_HEADER)
    values = {
        "magic": fmt.SNAPSHOT_MAGIC, "version": fmt.FORMAT_VERSION, "op": op, "length": len(data),
        "data_crc": fmt.crc32c(data),
    }  # fmt: skip
    for name, value in (values | fields).items():
        head[name] = value
    head["crc"] = fmt.crc32c(head.tobytes()[:-4])
    return bytes(head.tobytes()) + data


# --- saving and loading -----------------------------------------------------------------------------------


def test_what_was_saved_is_loaded_after_reopening(make_directory: MakeDirectory) -> None:
    store = open_store(make_directory("s"))
    assert (store.load(), store.ops()) == (None, [])
    saved = store.save(7, b"the state", created_at=123)
    store.close()
    loaded = open_store(make_directory("s")).load()
    assert loaded == saved == Snapshot(7, memoryview(b"the state"), 123, fmt.crc32c(b"the state"))


def test_the_newest_is_loaded(directory: Directory) -> None:
    store = open_store(directory, keep=3)
    for op in (5, 20, 100):
        store.save(op, str(op).encode())
    assert store.ops() == [5, 20, 100]
    assert newest(store) == (100, b"100")


@pytest.mark.parametrize("op", [0, 1, np.int64(5), fmt.OP_MAX])
@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 1000])
def test_the_smallest_and_largest_come_back(directory: Directory, op: int, data: bytes) -> None:
    store = open_store(directory)
    store.save(op, data)
    assert newest(store) == (op, data)


def test_any_buffer_can_be_saved(directory: Directory) -> None:
    strided = memoryview(b"aXbXcXdX")[::2]
    for data in (bytearray(b"abcd"), memoryview(b"abcd"), np.frombuffer(b"abcd", "<u2"), strided):
        assert bytes(open_store(directory).save(1, data).data) == b"abcd"


def test_data_is_a_read_only_view_that_outlives_everything(make_directory: MakeDirectory) -> None:
    store = open_store(make_directory("s"))
    saved = store.save(1, b"first" * 1000)
    loaded = store.load()
    assert loaded is not None and saved.data.readonly and loaded.data.readonly
    store.save(1, b"other" * 1000)
    make_directory("s").unlink(snapshot_name(1))
    store.close()
    del store
    gc.collect()
    assert bytes(loaded.data) == bytes(saved.data) == b"first" * 1000


def test_data_is_copied_before_anything_is_written(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(b"before")
    store = open_store(faulty)
    create = faulty.create

    def scribble(name: str) -> Faulty:
        data[:] = b"after!"
        return create(name)

    monkeypatch.setattr(faulty, "create", scribble)
    assert bytes(store.save(1, data).data) == b"before"


def test_saving_an_op_again_replaces_it(directory: Directory) -> None:
    store = open_store(directory)
    store.save(4, b"old")
    store.save(4, b"new")
    assert newest(store) == (4, b"new")
    assert directory.names() == [snapshot_name(4)]


def test_the_file_is_the_header_and_the_data(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 7)
    assert open_store(directory).save(9, b"state").created_at == 7
    assert file_bytes(directory, 9) == encoded(9, b"state", created_at_ns=7)
    assert open_store(directory).save(9, b"state", created_at=-1).created_at == -1
    assert file_bytes(directory, 9) == encoded(9, b"state", created_at_ns=-1)
    assert directory.names() == ["snapshot-00000000000000000009"]


def test_steps_come_in_the_order_that_makes_them_durable(faulty: Faulty) -> None:
    open_store(faulty).save(1, b"x")
    assert faulty.faults.calls == STEPS


def test_a_path_alone_makes_the_directory_and_its_name_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(SystemDirectory, "sync_parent", lambda self: synced.append(self.path))
    with SnapshotStore(tmp_path / "new") as store:
        store.save(3, b"x")
    with SnapshotStore(str(tmp_path / "new")) as store:
        assert store.ops() == [3]
    assert synced == [tmp_path / "new"] * 2
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError):
        SnapshotStore(tmp_path / "file")


# --- bad input ------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_and_nothing_written(faulty: Faulty) -> None:
    store = open_store(faulty)
    for data in ("text", None, 3):
        with pytest.raises(TypeError):
            store.save(1, data)  # type: ignore[arg-type]
    for name, low in (("op", -1), ("created_at", -(2**63) - 1), ("keep", 0)):
        for value, error in (
            (low, ValueError),
            (2**63, ValueError),
            (True, TypeError),
            ("1", TypeError),
            (1.0, TypeError),
        ):
            arguments: dict[str, Any] = {"op": 1, "data": b"", "created_at": 1}
            with pytest.raises(error, match=f"{name} must be"):
                open_store(faulty, keep=value) if name == "keep" else store.save(**arguments | {name: value})
            if name == "op":
                with pytest.raises(error, match="op must be"):
                    store.load_paired(value, 0)  # type: ignore[arg-type]
    assert faulty.files == []


def test_a_closed_store_refuses_everything_but_close(faulty: Faulty) -> None:
    store = open_store(faulty)
    snapshot = store.save(1, b"x")
    error = fails(store, faulty, "sync")
    store.close()
    store.close()
    calls = [store.load, store.ops, store.prune, error.resume]
    for call in (*calls, lambda: store.save(1, b""), lambda: store.load_paired(1, 0)):
        with pytest.raises(ClosedError):
            call()
    assert bytes(snapshot.data) == b"x"


# --- a failure at every step --------------------------------------------------------------------------------


@at_every_fault
def test_a_failure_names_its_stage_and_resume_finishes_it(faulty: Faulty, fault: Fault) -> None:
    store = open_store(faulty)
    store.save(1, b"old")
    stage, call, when = fault
    error = fails(store, faulty, call, when)
    assert error.stage is stage
    assert isinstance(error.__cause__, OSError)
    assert f"{stage.value}: snapshot of op 2 in snapshots" in str(error)
    error.resume()
    assert newest(store) == (2, b"new")
    assert faulty.names() == [snapshot_name(1), snapshot_name(2)]


@at_every_fault
def test_after_a_failure_the_older_snapshot_or_the_new_one_is_whole(faulty: Faulty, fault: Fault) -> None:
    store = open_store(faulty)
    store.save(1, b"old")
    stage, call, when = fault
    fails(store, faulty, call, when)
    again = open_store(faulty)
    renamed = stage is PersistStage.DIR_SYNC or (call, when) == ("rename", "after")
    assert newest(again) == ((2, b"new") if renamed else (1, b"old"))
    assert again.save(3, b"later").op == 3


@pytest.mark.parametrize("call", ["sync", "dir_sync"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_no_file_is_synced_again_after_a_failed_sync(faulty: Faulty, call: str, when: str) -> None:
    fails(open_store(faulty), faulty, call, when).resume()
    assert [file.syncs for file in faulty.files] == [1, 1]
    assert faulty.faults.calls[-3:] == ["close", "rename", "dir_sync"]


def test_resume_from_rename_renames_the_finished_file(faulty: Faulty) -> None:
    error = fails(open_store(faulty), faulty, "rename")
    faulty.faults.calls.clear()
    error.resume()
    assert faulty.faults.calls == ["rename", "dir_sync"]


def test_resume_from_rename_writes_again_when_the_file_is_gone(directory: Directory, faulty: Faulty) -> None:
    store = open_store(faulty)
    error = fails(store, faulty, "rename")
    directory.unlink(f"{snapshot_name(2)}.tmp")
    error.resume()
    assert newest(store) == (2, b"new")
    assert len(faulty.files) == 2


def test_resume_never_renames_the_temporary_file_of_another_save(faulty: Faulty) -> None:
    store = open_store(faulty)
    error = fails(store, faulty, "rename")
    faulty.faults.arm("rename")
    with pytest.raises(SnapshotPersistError):
        store.save(2, b"other")
    error.resume()
    assert newest(store) == (2, b"new")


def test_resume_leaves_a_later_save_of_the_same_op_alone(faulty: Faulty) -> None:
    store = open_store(faulty)
    error = fails(store, faulty, "sync")
    store.save(2, b"later")
    error.resume()
    assert newest(store) == (2, b"later")


@at_every_fault
def test_a_resume_that_fails_can_be_resumed(faulty: Faulty, fault: Fault) -> None:
    store = open_store(faulty)
    stage, call, when = fault
    error = fails(store, faulty, "sync")
    faulty.faults.arm(call, when)
    with pytest.raises(SnapshotPersistError) as again:
        error.resume()
    assert again.value.stage is stage
    again.value.resume()
    assert newest(store) == (2, b"new")


def test_a_full_disk_fails_in_write_and_gives_the_space_back(faulty: Faulty) -> None:
    store = open_store(faulty)
    faulty.faults.arm("write", "after", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(SnapshotPersistError, match="No space left") as caught:
        store.save(1, b"x")
    assert caught.value.stage is PersistStage.WRITE
    assert faulty.names() == []


@pytest.mark.parametrize("call", dict.fromkeys(STEPS))
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_passes_through_and_the_store_goes_on(faulty: Faulty, call: str, when: str) -> None:
    store = open_store(faulty)
    store.save(1, b"old")
    faulty.faults.arm(call, when, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        store.save(2, b"new")
    assert store.save(2, b"newer").op == 2
    assert newest(store) == (2, b"newer")
    assert not any(name.endswith(".tmp") for name in faulty.names())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(1, 10))
def test_killed_at_any_step_leaves_the_old_or_the_new_one_whole(
    make_directory: MakeDirectory, step: int, when: str
) -> None:
    open_store(make_directory("s"), keep=1).save(1, b"old")
    faulty = faulty_directory(make_directory("s"))
    store = open_store(faulty, keep=1)
    faulty.faults.die_at = (step, when)
    with pytest.raises(Died):
        store.save(2, b"new")
    assert faulty.faults.calls == [*STEPS, "unlink"][:step]
    is_new = (step, when) >= (7, "after") and (step, when) != (7, "before")
    after = open_store(make_directory("s"), keep=1)
    assert newest(after) == ((2, b"new") if is_new else (1, b"old"))
    assert not any(name.endswith(".tmp") for name in make_directory("s").names())


# --- what is left behind ------------------------------------------------------------------------------------


def test_old_temporary_files_are_removed_by_opening_and_by_saving(
    directory: Directory, faulty: Faulty
) -> None:
    put_file(directory, f"{snapshot_name(3)}.tmp", b"junk")
    faulty.faults.arm("unlink")
    store = open_store(faulty)  # one that cannot be removed is no matter
    assert directory.names() == [f"{snapshot_name(3)}.tmp"]
    assert open_store(directory).ops() == directory.names() == []
    put_file(directory, f"{snapshot_name(4)}.tmp", b"junk")
    store.save(5, b"x")
    assert directory.names() == [snapshot_name(5)]


def test_files_that_are_not_ours_are_left_alone(directory: Directory) -> None:
    foreign = ["notes.tmp", "snapshot-1", "snapshot-1.tmp", f"snapshot-{'9' * 20}", f"{snapshot_name(1)}~"]
    for name in foreign:
        put_file(directory, name, b"mine")
    store = open_store(directory, keep=1)
    store.save(1, b"")
    store.save(2, b"")
    store.prune()
    assert store.ops() == [2]
    assert directory.names() == sorted([*foreign, snapshot_name(2)])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_save_leaves_the_newest_ones(directory: Directory, keep: int) -> None:
    store = open_store(directory, keep=keep)
    for op in range(1, 7):
        store.save(op, b"x")
    assert store.ops() == list(range(7 - keep, 7))


def test_the_paired_snapshot_is_never_pruned(directory: Directory) -> None:
    store = open_store(directory, keep=1)
    store.save(1, b"paired")
    store.protected_op = 1
    for op in (2, 3, 4):
        store.save(op, b"x")
    store.prune()
    assert store.ops() == [1, 4]
    store.protected_op = 4
    store.prune()
    assert store.ops() == [4]


def test_a_snapshot_just_saved_is_not_pruned_for_a_newer_unpaired_one(directory: Directory) -> None:
    store = open_store(directory, keep=1)
    store.save(10, b"of a checkpoint that did not happen")
    store.save(9, b"x")
    assert store.ops() == [9, 10]


def test_pruning_does_not_fail_on_a_failed_unlink(faulty: Faulty) -> None:
    store = open_store(faulty, keep=1)
    store.save(1, b"x")
    faulty.faults.arm("unlink")
    store.save(2, b"x")
    assert store.ops() == [1, 2]
    faulty.faults.arm("unlink")
    store.prune()
    assert store.ops() == [1, 2]
    store.prune()
    assert store.ops() == [2]


def test_a_directory_that_cannot_be_listed_fails_a_save_before_it_writes_and_not_when_it_prunes(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(faulty)
    assert fails(store, faulty, "names").stage is PersistStage.WRITE
    monkeypatch.setattr(faulty, "sync", lambda: faulty.faults.arm("names"), raising=False)
    assert store.save(1, b"x").op == 1
    assert "names" not in faulty.faults.armed


# --- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 4, HEADER_BYTES + 6])
def test_a_newest_snapshot_of_a_wrong_length_is_refused_and_no_older_one_taken(
    directory: Directory, length: int
) -> None:
    store = open_store(directory)
    store.save(1, b"older")
    store.save(2, b"newer")
    put_file(directory, snapshot_name(2), (file_bytes(directory, 2) + b"\0")[:length])
    with pytest.raises(SnapshotCorruptError, match=snapshot_name(2)):
        store.load()
    assert store.ops() == [1, 2]


def test_one_wrong_bit_anywhere_is_damage_and_never_another_format(directory: Directory) -> None:
    store = open_store(directory)
    store.save(2, b"state")
    good = file_bytes(directory, 2)
    for bit in range(len(good) * 8):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        put_file(directory, snapshot_name(2), bytes(raw))
        with pytest.raises(SnapshotCorruptError):
            store.load()


@pytest.mark.parametrize("length", [0, 4, 6, 2**32, 2**63, 2**64 - 1])
def test_a_length_that_does_not_fit_the_file_is_damage(directory: Directory, length: int) -> None:
    put_file(directory, snapshot_name(2), encoded(2, b"state", length=length))
    with pytest.raises(SnapshotCorruptError, match="bytes of data"):
        open_store(directory).load()


def test_another_file_is_damage_and_a_newer_format_is_not(directory: Directory) -> None:
    store = open_store(directory)
    put_file(directory, snapshot_name(3), encoded(2, b"state"))
    with pytest.raises(SnapshotCorruptError, match="says op 2"):
        store.load()
    put_file(directory, snapshot_name(3), encoded(3, b"state", magic=b"MMWALSUP"))
    with pytest.raises(SnapshotCorruptError, match="not a snapshot"):
        store.load()
    put_file(directory, snapshot_name(3), encoded(3, b"state", version=2))
    with pytest.raises(IncompatibleFormatError, match="version 2"):
        store.load()
    with pytest.raises(IncompatibleFormatError, match="version 2"):
        store.load_paired(3, fmt.crc32c(b"state"))


def test_a_read_error_is_raised_as_it_is(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreadable(MemoryStorage):
        def read_at(self, offset: int, length: int) -> memoryview:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = open_store(faulty)
    store.save(1, b"x")
    monkeypatch.setattr(faulty, "open", lambda name: Unreadable(), raising=False)
    with pytest.raises(OSError, match="Input/output error"):
        store.load()


def test_a_file_cut_under_the_mapping_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    class CutsBehindTheMapping(SystemDirectory):
        def open(self, name: str, **options: Any) -> Any:
            storage = super().open(name, **options)
            storage.view()
            os.truncate(self.path / name, 4096)
            return storage

    with SnapshotStore(tmp_path, storage=CutsBehindTheMapping(tmp_path)) as store:
        store.save(1, bytes(64 << 10))
        with pytest.raises(OSError, match="Input/output error"):
            store.load()


# --- the one that a superblock names ------------------------------------------------------------------------


def test_the_paired_snapshot_is_loaded_whatever_newer_one_is_there(directory: Directory) -> None:
    store = open_store(directory)
    paired = store.save(1, b"paired")
    store.save(2, b"newer")
    put_file(directory, snapshot_name(3), b"damaged")
    assert store.load_paired(1, paired.checksum) == paired


def test_a_paired_snapshot_that_is_missing_damaged_or_another_one_is_refused(directory: Directory) -> None:
    store = open_store(directory)
    saved = store.save(1, b"x")
    with pytest.raises(SnapshotError, match="op 2 is missing") as caught:
        store.load_paired(2, 0)
    assert not isinstance(caught.value, SnapshotCorruptError)
    with pytest.raises(SnapshotCorruptError, match="paired with"):
        store.load_paired(1, saved.checksum ^ 1)
    put_file(directory, snapshot_name(1), file_bytes(directory, 1)[:-1] + b"y")
    with pytest.raises(SnapshotCorruptError, match="checksum of its data"):
        store.load_paired(1, saved.checksum)
