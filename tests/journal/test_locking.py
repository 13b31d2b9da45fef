"""One writer: in this process and in all others; a forked child is none; and the lock goes when it does."""

from __future__ import annotations

import dis
import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import mmapwal
from mmapwal import Journal, LockedError, MemoryDirectory
from mmapwal import format as fmt

from ..conftest import AlarmError
from .files import SMALL, Home, at_rest, bytes_of, contents_of

PACKAGE = str(Path(mmapwal.__file__).parent)


def test_a_second_writer_in_this_process_gets_locked_error(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"one")
    with at_rest(journal):
        before = bytes_of(home.directory())
        for _ in range(2):
            with pytest.raises(LockedError):
                home.open()
        assert bytes_of(home.directory()) == before
    assert journal.append(b"two") == 2
    journal.close()
    assert contents_of(home.open()) == {1: (b"one", 0), 2: (b"two", 0)}


@pytest.mark.parametrize("kind", ["mapped"], indirect=True)
def test_the_same_place_by_another_name_is_locked_too(home: Home, tmp_path: Path) -> None:
    journal = home.open(**SMALL)
    link = tmp_path / "link"
    link.symlink_to(home.path)
    for path in (link, home.path / "." / ".." / home.path.name, str(home.path)):
        with pytest.raises(LockedError, match="this process"):
            Journal(path)
    moved = tmp_path / "moved"
    home.path.rename(moved)
    with pytest.raises(LockedError):
        Journal(moved)
    assert journal.append(b"x") == 1
    journal.close()
    with Journal(moved) as found:
        assert len(found) == 1


HELD = """
import os, signal, sys
from mmapwal import Journal
journal = Journal(sys.argv[1], slots=64, segment_bytes=16384)
journal.append(b"one")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("left", [None, b"", b"4194305\n", bytes(5000)])
def test_a_lock_file_that_a_dead_process_left_hinders_nobody_whatever_it_holds(
    tmp_path: Path, run_python: Callable[..., Any], left: bytes | None
) -> None:
    assert run_python(HELD, tmp_path / "j").returncode == -signal.SIGKILL
    if left is not None:
        (tmp_path / "j" / fmt.LOCK_NAME).write_bytes(left)
    with Journal(tmp_path / "j") as journal:
        assert journal.append(b"two") == 2
        assert contents_of(journal) == {1: (b"one", 0), 2: (b"two", 0)}
        with pytest.raises(LockedError):
            Journal(tmp_path / "j")


SECOND = """
import sys
from mmapwal import Journal, LockedError
try:
    with Journal(sys.argv[1]) as journal:
        print(len(journal))
except LockedError as e:
    print("locked", "another process" in str(e))
"""


def test_a_second_writer_in_another_process_gets_locked_error(
    tmp_path: Path, run_python: Callable[..., Any]
) -> None:
    with Journal(tmp_path / "j", **SMALL) as journal:
        journal.append(b"x")
        assert run_python(SECOND, tmp_path / "j").stdout.split() == ["locked", "True"]
        assert journal.append(b"y") == 2
    assert run_python(SECOND, tmp_path / "j").stdout.split() == ["2"]


HOLDER = """
import sys
from mmapwal import Journal
journal = Journal(sys.argv[1])
journal.append(b"from the holder")
print("open", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "j")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(LockedError, match="another process"):
            Journal(tmp_path / "j")
        holder.kill()
        holder.wait()
    with Journal(tmp_path / "j") as journal:
        assert contents_of(journal) == {1: (b"from the holder", 0)}


def test_a_lock_file_that_was_left_behind_locks_nobody_out(home: Home) -> None:
    home.open(**SMALL).close()
    assert fmt.LOCK_NAME in home.directory().names() or home.kind == "memory"
    home.open()


@pytest.mark.parametrize("kind", ["mapped", "file"], indirect=True)
def test_a_copy_of_a_live_directory_is_another_journal(home: Home, tmp_path: Path) -> None:
    journal = home.open(**SMALL)
    journal.append(b"x")
    shutil.copytree(home.path, tmp_path / "copy")
    with Journal(tmp_path / "copy") as copy:
        assert contents_of(copy) == contents_of(journal) == {1: (b"x", 0)}


def test_a_refused_open_leaves_the_lock_free(home: Home) -> None:
    home.open(**SMALL).close()
    for _ in range(2):
        with pytest.raises(ValueError, match="slots"):
            home.open(slots=0)
    home.directory().unlink(fmt.SUPERBLOCK_NAME)
    with pytest.raises(Exception, match="gone"):
        home.open()
    for name in home.directory().names():
        home.directory().unlink(name)
    home.open()


@pytest.mark.parametrize("durability", ["sync", "os", "buffered"])
def test_a_journal_that_is_forgotten_is_let_go_with_a_warning(home: Home, durability: str) -> None:
    given: dict[str, Any] = {"storage": home.directory()} if home.kind != "mapped" else {}
    journal = Journal(home.path, **SMALL, **given, durability=durability)
    for n in range(10):
        journal.append(b"%d" % n * 1000)
    durable = journal.sync()
    journal.append(b"x")
    view = journal.read(3)
    with pytest.warns(ResourceWarning, match="was not closed"):
        del journal
        gc.collect()
    assert bytes(view) == b"2" * 1000
    found = home.open()
    assert found.report.outcome.value == "clean"
    assert found.report.tail_lsn >= durable
    assert len(found) == (10 if durability == "buffered" else 11)  # as after a kill: nothing is handed over
    assert found.append(b"goes on") == len(found)


def test_a_journal_that_was_closed_is_forgotten_without_a_warning(home: Home) -> None:
    journal = home.open(**SMALL)
    journal.append(b"x")
    journal.close()
    del journal
    gc.collect()


CYCLE = """
import gc
from mmapwal import Journal, MemoryDirectory

class User:
    pass

for n in range(3):
    user = User()
    user.me = user  # a cycle
    user.journal = Journal("j", storage=MemoryDirectory(), slots=16, segment_bytes=16384)
    user.journal.append(b"x")
    gc.freeze()
    user.journal.read(1)  # maps the segment
    gc.collect()
    gc.unfreeze()  # and the mapping is looked at before what it belongs to
    user.journal.close()
    del user
    gc.collect()
print("ok")
"""


def test_a_journal_in_a_cycle_is_garbage_collected(run_python: Callable[..., Any]) -> None:
    """A memoryview that something pins must not be left to the garbage collector: CPython crashes."""
    done = run_python(CYCLE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


# --- fork ---------------------------------------------------------------------------------------------

FORKED = """
import os, sys, warnings
from mmapwal import Journal, ForkedError
warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads is the point
journal = Journal(sys.argv[1], slots=64, segment_bytes=16384, durability=sys.argv[2])
journal.append(b"one")
view = journal.read(1)
calls = {
    "append": lambda: journal.append(b"x"),
    "append of bytearray": lambda: journal.append(bytearray(b"x"), op=9),
    "append_many": lambda: journal.append_many([b"x"]),
    "sync": journal.sync,
    "drain": lambda: journal.drain(1, 1),
    "truncate_from": lambda: journal.truncate_from(1),
    "set_snapshot_op": lambda: journal.set_snapshot_op(1),
    "compact": journal.compact,
    "set_user_data": lambda: journal.set_user_data(b"x"),
    "verify": journal.verify,
}
pid = os.fork()
if pid == 0:
    status = 0
    for name, call in calls.items():
        try:
            call()
        except ForkedError:
            continue
        except BaseException as e:
            print(name, type(e), e)
        else:
            print(name, "went through")
        status = 1
    if bytes(view) != b"one":
        status = 2
    journal.close()  # does nothing
    del journal
    os._exit(status) if sys.argv[3] == "at once" else sys.exit(status)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert journal.append(b"two") == 2
assert [bytes(p) for p in journal.payloads()] == [b"one", b"two"]
try:
    Journal(sys.argv[1])
except Exception as e:
    assert type(e).__name__ == "LockedError"
else:
    raise AssertionError("the child took the lock along")
journal.close()
with Journal(sys.argv[1]) as journal:
    assert [bytes(p) for p in journal.payloads()] == [b"one", b"two"]
print("ok")
"""


@pytest.mark.parametrize("how", ["at once", "with all finalizers"])
@pytest.mark.parametrize("durability", ["sync", "os", "buffered"])
def test_a_forked_child_gets_forked_error_and_the_parent_goes_on(
    tmp_path: Path, run_python: Callable[..., Any], durability: str, how: str
) -> None:
    done = run_python(FORKED, tmp_path / "j", durability, how)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


FORKED_UNDER_LOAD = """
import os, sys, threading, warnings
from mmapwal import Journal, ForkedError
warnings.simplefilter("ignore", DeprecationWarning)
journal = Journal(sys.argv[1], slots=65536, segment_bytes=16384)
stop = threading.Event()
acknowledged = []
def append():
    while not stop.is_set():
        acknowledged.append(journal.append(b"x" * 300))
threads = [threading.Thread(target=append) for _ in range(4)]
for t in threads:
    t.start()
for n in range(10):  # whatever locks are held at that moment
    pid = os.fork()
    if pid == 0:
        try:
            journal.append(b"from the child")
        except ForkedError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
stop.set()
for t in threads:
    t.join()
assert len(set(acknowledged)) == len(acknowledged) == len(journal)
journal.close()
print("ok")
"""


def test_a_fork_in_the_middle_of_commits_hangs_nobody(tmp_path: Path, run_python: Callable[..., Any]) -> None:
    done = run_python(FORKED_UNDER_LOAD, tmp_path / "j")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_the_parent_may_end_before_a_child_that_holds_its_descriptors(
    tmp_path: Path, run_python: Callable[..., Any]
) -> None:
    script = """
import os, sys, warnings
from mmapwal import Journal
warnings.simplefilter("ignore", DeprecationWarning)
journal = Journal(sys.argv[1])
journal.append(b"x")
read, write = os.pipe()
if os.fork() == 0:
    os.close(write)
    os.read(read, 1)  # until the test is done with it
    os._exit(0)
journal.close()
with Journal(sys.argv[1]) as journal:  # the child holds no lock
    print(len(journal))
os.close(write)
"""
    done = run_python(script, tmp_path / "j")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_memory_is_locked_while_it_is_open() -> None:
    directory = MemoryDirectory()
    with Journal("j", storage=directory, **SMALL), pytest.raises(LockedError):
        Journal("j", storage=directory)
    Journal("j", storage=directory).close()


def test_closing_an_old_journal_once_more_does_not_unlock_the_new_one(home: Home) -> None:
    old = home.open(**SMALL)
    old.close()
    new = home.open()
    old.close()
    with pytest.raises(LockedError):
        home.open()
    assert new.append(b"x") == 1


@pytest.mark.parametrize("kind", ["mapped"], indirect=True)
def test_closing_gives_every_descriptor_back(home: Home) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    home.open(**SMALL).close()
    gc.collect()
    before = descriptors()
    for _ in range(3):
        journal = home.open()
        for _ in range(4):
            journal.append(bytes(3500))
        list(journal)
        journal.set_snapshot_op(journal.last_op or 0)
        journal.compact()
        journal.close()
    with pytest.raises(ValueError, match="slots"):
        home.open(slots=0)
    assert descriptors() == before


# --- interrupts -----------------------------------------------------------------------------------------


HEARS_BEHIND = {"RESUME", "CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD"}


def is_interrupted(call: Callable[[], object], nth: int) -> bool:
    """Calls it. The nth time that the interpreter would hear of a signal within this package, it raises
    AlarmError. Not in a finalizer, where nobody would be told."""
    heard = 0
    before: dict[FrameType, str] = {}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal heard
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or code.co_name == "__del__":
            return None
        frame.f_trace_opcodes = True
        if event == "return":
            before.pop(frame, None)
        if event == "opcode":
            hears = before.get(frame) in HEARS_BEHIND
            before[frame] = dis.opname[code.co_code[frame.f_lasti]]
            heard += hears
            if hears and heard == nth:
                raise AlarmError
        return trace

    traced = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except AlarmError:
        return True
    finally:
        sys.settrace(traced)
        before.clear()  # an interrupted frame returns nowhere: it and all it holds would stay
    return False


@pytest.mark.parametrize("kind", ["mapped", "file"], indirect=True)
def test_a_journal_whose_closing_is_interrupted_anywhere_lets_go_when_it_is_closed_again(home: Home) -> None:
    home.open(**SMALL).close()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for nth in itertools.count(1):
        journal = home.open()
        for op in range(1, 4):
            journal.append(b"%d" % op, op=op, replace=True)
        interrupted = is_interrupted(journal.close, nth)
        journal.close()
        assert journal._engine.closed
        del journal
        if not interrupted:
            break
    assert nth > 100
    assert contents_of(home.open()) == {op: (b"%d" % op, 0) for op in range(1, 4)}
    home.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
