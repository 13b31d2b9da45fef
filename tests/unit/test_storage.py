"""One contract for all kinds of Storage and Directory: files, mappings, memory, test disks."""

from __future__ import annotations

import array
import errno
import gc
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmapwal._native import ffi
from mmapwal.errors import ClosedError, LockedError
from mmapwal.injected import InjectedIO
from mmapwal.storage import (
    Directory,
    FileStorage,
    MappedStorage,
    MemoryDirectory,
    MemoryStorage,
    Storage,
    SyncMethod,
    SystemDirectory,
)
from mmapwal.testing import CrashDisk, Fault, FaultDirectory

KINDS = ("mapped", "file", "memory", "crash disk", "faults")


@pytest.fixture(params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Directory]:
    made: Directory
    if request.param in {"mapped", "file"}:
        made = SystemDirectory(tmp_path, storage=MappedStorage if request.param == "mapped" else FileStorage)
    elif request.param == "memory":
        made = MemoryDirectory()
    elif request.param == "crash disk":
        made = CrashDisk()
    else:
        made = FaultDirectory(MemoryDirectory(), Fault(1 << 30))
    yield made
    made.close()


@pytest.fixture
def file(directory: Directory) -> Iterator[Storage]:
    storage = directory.create("f")
    yield storage
    storage.close()


def whole(storage: Storage) -> bytes:
    return storage.read_at(0, len(storage)).tobytes()


# --- storage: what every kind promises ------------------------------------------------------------------


def test_each_kind_keeps_the_protocols(directory: Directory, file: Storage) -> None:
    assert isinstance(directory, Directory)
    assert isinstance(file, Storage)


def test_a_new_file_is_empty(file: Storage) -> None:
    assert len(file) == 0
    assert file.read_at(0, 10).nbytes == 0


def test_what_was_written_is_read(file: Storage) -> None:
    assert file.write_at(0, b"abcdef") == 6
    assert file.read_at(1, 3) == b"bcd"
    assert file.write_at(2, b"XY") == 2
    assert whole(file) == b"abXYef"


def test_a_read_beyond_the_end_gives_what_there_is(file: Storage) -> None:
    file.write_at(0, b"abc")
    assert file.read_at(1, 100) == b"bc"
    assert file.read_at(3, 1).nbytes == 0
    assert file.read_at(50, 1).nbytes == 0
    assert file.read_at(0, 0).nbytes == 0


def test_a_read_is_a_copy_that_later_writes_leave_alone(file: Storage) -> None:
    file.write_at(0, b"abc")
    data = file.read_at(0, 3)
    file.write_at(0, b"xyz")
    assert data == b"abc"
    assert data.readonly


def test_a_write_beyond_the_end_leaves_zeros_between(file: Storage) -> None:
    file.write_at(4, b"x")
    assert whole(file) == b"\0\0\0\0x"


def test_write_and_sync_in_one_writes_the_same(file: Storage) -> None:
    file.write_at(0, bytes(8))
    assert file.write_sync_at(2, b"abc") == 3
    assert whole(file) == b"\0\0abc\0\0\0"


def test_append_writes_at_the_end_and_tells_where(file: Storage) -> None:
    assert file.append(b"abc") == 0
    assert file.append(b"de") == 3
    assert file.append(b"") == 5
    assert whole(file) == b"abcde"


def test_nothing_can_be_written(file: Storage) -> None:
    assert file.write_at(0, b"") == 0
    assert file.write_sync_at(0, b"") == 0
    assert len(file) == 0


@pytest.mark.parametrize(
    "make",
    [
        bytes,
        bytearray,
        memoryview,
        lambda b: array.array("I", b),
        lambda b: np.frombuffer(b, "<u8"),
        lambda b: memoryview(array.array("H", b)),
        lambda b: ffi.buffer(ffi.from_buffer(b), len(b)),
    ],
)
def test_any_contiguous_buffer_can_be_written_and_counts_in_bytes(
    file: Storage, make: Callable[[bytes], Any]
) -> None:
    data = bytes(range(32))
    assert file.write_at(0, make(data)) == 32
    assert file.write_sync_at(32, make(data)) == 32
    assert file.append(make(data)) == 64
    assert whole(file) == data * 3


def test_a_buffer_may_change_after_the_write(file: Storage) -> None:
    data = bytearray(b"abc")
    file.write_at(0, data)
    file.write_sync_at(3, data)
    data[:] = b"xyz"
    assert whole(file) == b"abcabc"


def test_truncate_cuts_and_grows_with_zeros(file: Storage) -> None:
    file.write_at(0, b"abcdef")
    file.truncate(3)
    assert whole(file) == b"abc"
    file.truncate(5)
    assert whole(file) == b"abc\0\0"
    file.truncate(0)
    assert len(file) == 0


def test_sync_changes_nothing_that_is_read(file: Storage) -> None:
    file.write_at(0, b"abc")
    file.sync()
    file.sync()
    assert whole(file) == b"abc"


def test_a_view_is_read_only_and_shows_what_is_there(file: Storage) -> None:
    file.write_at(0, b"abcdef")
    view = file.view()
    assert view == b"abcdef"
    assert view.readonly
    assert (view.format, view.itemsize, view.contiguous) == ("B", 1, True)


def test_a_view_shows_later_writes_of_the_same_storage(file: Storage) -> None:
    file.write_at(0, bytes(8192))
    view = file.view()
    file.write_at(1, b"abc")
    file.write_sync_at(4098, b"def")
    assert view[:5] == b"\0abc\0"
    assert view[4098:4101] == b"def"


def test_a_new_view_shows_a_file_that_has_grown(file: Storage) -> None:
    file.write_at(0, b"a" * 100)
    assert len(file.view()) == 100
    file.write_at(200, b"b" * 5000)
    assert file.view() == b"a" * 100 + bytes(100) + b"b" * 5000
    file.truncate(50)
    assert file.view() == b"a" * 50


def test_a_view_stays_right_after_close_and_unlink(directory: Directory) -> None:
    file = directory.create("f")
    file.write_at(0, b"abc" * 3000)
    view = file.view()
    directory.unlink("f")
    file.close()
    del file
    assert view == b"abc" * 3000


def test_a_view_does_not_change_when_the_name_gets_another_file(directory: Directory) -> None:
    old = directory.create("f")
    old.write_at(0, b"old")
    view = old.view()
    new = directory.create("f.tmp")
    new.write_at(0, b"new")
    directory.rename("f.tmp", "f")
    assert view == b"old"
    assert old.read_at(0, 3) == b"old"
    assert new.view() == b"new"
    old.close()
    new.close()


def test_stores_in_a_shared_mapping_reach_the_file_at_the_latest_by_sync(
    directory: Directory, file: Storage
) -> None:
    file.write_at(0, bytes(8192))
    shared = file.shared()
    assert not shared.readonly
    assert len(shared) == 8192
    shared[5] = 7
    shared[8000:8003] = b"abc"
    file.sync()
    assert file.read_at(5, 1) == b"\7"
    again = directory.open("f")
    assert again.read_at(8000, 3) == b"abc"
    again.close()


def test_a_view_shows_stores_in_the_shared_mapping(file: Storage) -> None:
    file.write_at(0, bytes(4096))
    view, shared = file.view(), file.shared()
    shared[100] = 9
    assert view[100] == 9


def test_closing_twice_is_fine(directory: Directory) -> None:
    file = directory.create("f")
    file.close()
    file.close()


def test_what_was_written_is_there_when_it_is_opened_again(directory: Directory) -> None:
    file = directory.create("f")
    file.write_at(0, b"abc")
    file.close()
    for writable in (False, True):
        again = directory.open("f", writable=writable)
        assert whole(again) == b"abc"
        assert again.view() == b"abc"
        again.close()


@pytest.mark.parametrize("method", [SyncMethod.DSYNC, SyncMethod.FDATASYNC, SyncMethod.MSYNC])
def test_each_sync_method_writes_the_same(directory: Directory, method: SyncMethod) -> None:
    made = directory.create("f")
    made.write_at(0, bytes(16384))
    made.close()
    file = directory.open("f", writable=True, sync_method=method)
    view = file.view()
    file.write_at(10, b"abc")
    file.sync()
    file.write_sync_at(5000, b"def" * 2000)
    assert view[10:13] == b"abc"
    assert view[5000:11000] == b"def" * 2000
    file.close()
    again = directory.open("f")
    assert again.read_at(10, 3) == b"abc"
    assert again.read_at(5000, 6000) == b"def" * 2000
    again.close()


def test_the_committers_table_writes_into_an_injected_storage(file: Storage) -> None:
    """As C calls it: through the functions of the table, with a buffer that lives for the call."""
    io = InjectedIO(file)
    data = ffi.new("char[]", b"abcdef")
    assert io.table.write(io.table.ctx, 0, data, 6) == 0
    assert io.table.write_sync(io.table.ctx, 3, data, 3) == 0
    assert io.table.sync(io.table.ctx) == 0
    data[0:6] = b"xxxxxx"
    assert whole(file) == b"abcabc"
    assert io.error is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_the_committers_table_gives_back_the_errno_of_a_failure(code: int) -> None:
    for kind in ("write", "write_sync", "sync"):
        directory = FaultDirectory(MemoryDirectory(), Fault(kinds=kind, error=code))
        io = InjectedIO(directory.create("f"))
        arguments = () if kind == "sync" else (0, ffi.new("char[]", b"abc"), 3)
        assert getattr(io.table, kind)(io.table.ctx, *arguments) == -code
        assert isinstance(io.error, OSError)
        assert getattr(io.table, kind)(io.table.ctx, *arguments) == 0


def test_the_committers_table_keeps_an_exception_that_is_no_oserror() -> None:
    class Odd(MemoryStorage):
        def sync(self) -> None:
            raise KeyError("odd")

    io = InjectedIO(Odd())
    assert io.table.sync(io.table.ctx) == -errno.EIO
    assert isinstance(io.error, KeyError)


# --- directory: what every kind promises ------------------------------------------------------------------


def test_names_are_sorted(directory: Directory) -> None:
    assert directory.names() == []
    for name in ("b", "a", "c"):
        directory.create(name).close()
    assert directory.names() == ["a", "b", "c"]


def test_opening_what_is_not_there_says_so(directory: Directory) -> None:
    with pytest.raises(FileNotFoundError):
        directory.open("f")
    with pytest.raises(FileNotFoundError):
        directory.open("f", writable=True)
    assert directory.names() == []


def test_create_replaces_by_an_empty_file_and_leaves_the_old_one_to_who_has_it(directory: Directory) -> None:
    old = directory.create("f")
    old.write_at(0, b"old")
    new = directory.create("f")
    assert len(new) == 0
    new.write_at(0, b"x")
    assert whole(old) == b"old"
    assert directory.names() == ["f"]
    old.close()
    new.close()


def test_rename_moves_and_replaces(directory: Directory) -> None:
    for name in ("a", "b"):
        file = directory.create(name)
        file.write_at(0, name.encode())
        file.close()
    directory.rename("a", "b")
    assert directory.names() == ["b"]
    file = directory.open("b")
    assert whole(file) == b"a"
    file.close()


def test_a_file_can_be_written_after_its_rename(directory: Directory, file: Storage) -> None:
    directory.rename("f", "g")
    file.write_at(0, b"abc")
    again = directory.open("g")
    assert whole(again) == b"abc"
    again.close()


def test_rename_and_unlink_of_what_is_not_there_say_so(directory: Directory) -> None:
    with pytest.raises(FileNotFoundError):
        directory.rename("a", "b")
    with pytest.raises(FileNotFoundError):
        directory.unlink("a")


def test_unlink_takes_the_name_away(directory: Directory, file: Storage) -> None:
    file.write_at(0, b"abc")
    directory.unlink("f")
    assert directory.names() == []
    assert whole(file) == b"abc"


def test_syncs_of_names_change_nothing_that_is_read(directory: Directory, file: Storage) -> None:
    directory.sync()
    directory.sync_parent()
    assert directory.names() == ["f"]


def test_a_subdirectory_has_files_of_its_own(directory: Directory) -> None:
    sub = directory.subdirectory("sub")
    sub.create("f").close()
    assert directory.names() == ["sub"]
    assert sub.names() == ["f"]
    again = directory.subdirectory("sub")
    assert again.names() == ["f"]
    again.close()
    sub.close()


def test_the_lock_is_taken_once_and_let_go_by_close(directory: Directory) -> None:
    directory.lock("lock")
    with pytest.raises(LockedError):
        directory.lock("lock")
    directory.close()


def test_a_directory_says_what_it_is(directory: Directory) -> None:
    assert str(directory)
    assert isinstance(directory.concurrent, bool)
    assert directory.best_sync_method() in {SyncMethod.DSYNC, SyncMethod.FDATASYNC, SyncMethod.MSYNC}
    free = directory.free_bytes()
    assert free is None or free > 0


# --- the system's own -------------------------------------------------------------------------------------


@pytest.fixture(params=[MappedStorage, FileStorage])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SystemDirectory]:
    with SystemDirectory(tmp_path / "d", storage=request.param) as directory:
        yield directory


def test_a_directory_of_the_system_is_made_for_its_owner_only(system: SystemDirectory) -> None:
    system.create("f").close()
    assert stat.S_IMODE(system.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((system.path / "f").stat().st_mode) == 0o600


def test_a_directory_that_is_not_to_be_made_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SystemDirectory(tmp_path / "none", create=False)
    with pytest.raises(FileNotFoundError):
        SystemDirectory(tmp_path / "none" / "below")
    (tmp_path / "file").touch()
    with pytest.raises((NotADirectoryError, FileExistsError)):
        SystemDirectory(tmp_path / "file")


def test_a_change_of_the_working_directory_or_a_rename_of_the_parent_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with SystemDirectory("journal") as directory:
        monkeypatch.chdir("/")
        (tmp_path / "a").rename(tmp_path / "b")
        directory.create("f").close()
        directory.rename("f", "g")
        directory.sync()
        directory.sync_parent()
        assert directory.names() == ["g"]
        assert (tmp_path / "b" / "journal" / "g").exists()


def test_what_is_no_regular_file_is_not_opened(system: SystemDirectory) -> None:
    os.mkfifo(system.path / "pipe")
    (system.path / "link").symlink_to("elsewhere")
    (system.path / "folder").mkdir()
    with pytest.raises(OSError, match="pipe"):
        system.open("pipe", writable=True)
    with pytest.raises(OSError, match="link"):
        system.open("link", writable=True)
    with pytest.raises(OSError, match="folder"):
        system.open("folder")


def test_a_file_opened_for_reading_refuses_to_write(system: SystemDirectory) -> None:
    system.create("f").close()
    file = system.open("f")
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.write_at(0, b"x")
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.read_at(0, 1)


def test_errors_of_the_system_name_the_file(system: SystemDirectory) -> None:
    system.create("f").close()
    file = system.open("f")
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        file.write_at(0, b"x")
    assert Path(str(caught.value.filename)).name == "f"
    file.close()


def test_two_directory_objects_of_one_place_have_one_lock(system: SystemDirectory) -> None:
    with SystemDirectory(system.path) as other:
        system.lock("lock")
        with pytest.raises(LockedError, match="this process"):
            other.lock("lock")
        system.close()
        other.lock("lock")


def test_another_process_is_locked_out(system: SystemDirectory, run_python: Callable[..., Any]) -> None:
    script = (
        "import sys; from mmapwal.storage import SystemDirectory; from mmapwal.errors import LockedError\n"
        "with SystemDirectory(sys.argv[1]) as d:\n"
        "    try: d.lock('lock'); print('taken')\n"
        "    except LockedError as e: print('locked', 'another process' in str(e))\n"
    )
    system.lock("lock")
    assert run_python(script, system.path).stdout == "locked True\n"
    system.close()
    assert run_python(script, system.path).stdout == "taken\n"


def test_a_forked_child_lets_go_of_the_lock_without_unlocking(system: SystemDirectory) -> None:
    system.lock("lock")
    child = os.fork()
    if child == 0:
        try:
            system.after_fork()
            system.close()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with SystemDirectory(system.path) as other, pytest.raises(LockedError):
        other.lock("lock")


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_descriptors_are_given_back(system: SystemDirectory) -> None:
    gc.collect()
    before = open_descriptors()
    for method in SyncMethod:
        file = system.create("f")
        file.write_at(0, bytes(4096))
        file.close()
        file = system.open("f", writable=True, sync_method=method)
        file.view()
        file.shared()
        file.close()
        system.open("f", sync_method=method)  # dropped without being closed
    assert open_descriptors() == before


def test_a_mapping_lives_as_long_as_a_view_of_it_and_no_longer(tmp_path: Path) -> None:
    def mapped() -> bool:
        return f"{tmp_path}/f" in Path("/proc/self/maps").read_text()

    with SystemDirectory(tmp_path) as directory:
        file = directory.create("f")
        file.write_at(0, bytes(8192))
        view = file.view()
        file.close()
        del file
        part = view[10:20]
        del view
        assert mapped()
        assert part == bytes(10)
        del part
        assert not mapped()


def test_a_view_of_a_mapping_is_coherent_with_writes_of_other_descriptors(tmp_path: Path) -> None:
    with SystemDirectory(tmp_path) as directory:
        file = directory.create("f")
        file.write_at(0, bytes(4096))
        view = file.view()
        other = directory.open("f", writable=True)
        other.write_sync_at(100, b"abc")
        assert view[100:103] == b"abc"
        other.close()
        file.close()


def test_a_directory_that_another_thread_has_closed_says_so(system: SystemDirectory) -> None:
    system.create("f").close()
    system.close()
    with pytest.raises(ClosedError, match="closed"):
        system.open("f")
