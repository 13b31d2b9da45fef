"""Work beside the main thread, where no signal handler runs."""

from __future__ import annotations

import errno
import gc
import subprocess
import threading
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest

from mmapwal import aside
from mmapwal.aside import uninterrupted
from tests.conftest import AlarmError

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_the_result_and_the_error_are_those_of_the_work() -> None:
    def fail() -> None:
        raise KeyError("no such place")

    assert uninterrupted(lambda: 7) == 7
    assert uninterrupted(lambda: None) is None
    with pytest.raises(KeyError, match="no such place"):
        uninterrupted(fail)


def test_a_handler_that_raises_meanwhile_is_heard_when_the_work_is_done(alarm: Callable[[], None]) -> None:
    steps = []

    def work() -> None:
        for step in range(1000):
            alarm()
            steps.append(step)

    with pytest.raises(AlarmError):
        uninterrupted(work)
    assert steps == list(range(1000))


def test_other_threads_do_the_work_themselves() -> None:
    done: list[tuple[int, int]] = []
    thread = threading.Thread(
        target=lambda: done.append((threading.get_ident(), uninterrupted(threading.get_ident)))
    )
    thread.start()
    thread.join()
    assert done[0][0] == done[0][1]
    assert uninterrupted(threading.get_ident) != threading.get_ident()


def test_a_finaliser_that_wants_a_lock_of_the_main_thread_does_not_stop_the_work(run_python: Run) -> None:
    script = """
import gc, threading
from mmapwal.aside import uninterrupted
lock = threading.RLock()
class Wanting:
    def __init__(self):
        self.itself = self
    def __del__(self):
        with lock:
            pass
def work():
    for _ in range(10_000):
        Wanting()
with lock:
    uninterrupted(work)
assert gc.isenabled()
"""
    done = run_python(script)
    assert done.returncode == 0, done.stderr


def test_an_error_keeps_nothing_alive_that_it_came_through() -> None:
    class Held:
        pass

    def fails(held: Held) -> None:
        raise KeyError

    held = Held()
    alive = weakref.ref(held)
    gc.disable()
    try:
        with pytest.raises(KeyError) as caught:
            uninterrupted(partial(fails, held))
        del held, caught
        assert alive() is None
    finally:
        gc.enable()


def test_where_no_thread_can_be_had_the_work_is_done_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    none = SimpleNamespace(mw_aside=lambda run, arg: -errno.EAGAIN, mw_py_errand=None)
    monkeypatch.setattr(aside, "lib", none)
    assert uninterrupted(threading.get_ident) == threading.get_ident()


def test_a_child_of_fork_and_the_end_of_the_interpreter_do_not_hang(run_python: Run) -> None:
    script = """
import os, threading
from mmapwal.aside import uninterrupted
assert uninterrupted(lambda: 1) == 1
child = os.fork()
if child == 0:
    os._exit(0 if uninterrupted(threading.get_ident) != threading.get_ident() else 1)
assert os.waitpid(child, 0)[1] == 0
class Late:
    def __del__(self, uninterrupted=uninterrupted):
        print(uninterrupted(lambda: "late"))
late = Late()
late.itself = late
"""
    done = run_python(script)
    assert (done.returncode, done.stdout) == (0, "late\n"), done.stderr
