"""No thread can be had: what needs one to stay is an ordinary error, what is only quicker by one is done."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmapwal import Durability, Journal, reader, recovery
from mmapwal.threads import SecondThread, start_thread

from .test_recovery_threads import long, scan, told_by

Refuse = Callable[[int], None]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """From the nth start of a thread on, none can be had."""
    start = threading.Thread.start

    def refuse_from(nth: int) -> None:
        count = 0

        def limited(thread: threading.Thread) -> None:
            nonlocal count
            count += 1
            if count >= nth:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)

    return refuse_from


def test_a_thread_that_cannot_be_had_is_an_error_of_the_system(refuse: Refuse) -> None:
    refuse(1)
    with pytest.raises(OSError, match="no thread can be had") as raised:
        start_thread("prepare", lambda: None)
    assert (raised.value.errno, raised.value.filename) == (errno.EAGAIN, "mmapwal-prepare")


def test_a_part_of_a_work_is_done_once_where_no_thread_can_be_had(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(1)
    done: list[int] = []
    with SecondThread("test") as second:
        second.submit(done.append, 1)
        assert second.submit(threading.get_ident).result() == threading.get_ident()
        failed = second.submit(int, "no number")
        monkeypatch.undo()  # now one could
        second.submit(done.append, 2)
    with pytest.raises(ValueError, match="no number"):
        failed.result()
    assert done == [1, 2]


@pytest.mark.parametrize(("nth", "options"), [
    (1, {}), (1, {"durability": Durability.BUFFERED, "sync_interval_ms": 5}),
    (2, {"durability": Durability.BUFFERED, "sync_interval_ms": 5}),
])  # fmt: skip
def test_an_open_without_a_thread_is_an_error_and_lets_the_journal_go(
    tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch, nth: int, options: dict[str, Any]
) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.append(b"acknowledged")
    refuse(nth)
    with pytest.raises(OSError, match="no thread can be had") as raised:
        Journal(tmp_path / "j", **options)
    monkeypatch.undo()
    with Journal(tmp_path / "j", **options) as journal:  # while the error is still held
        assert raised.value.errno == errno.EAGAIN
        assert journal.copy(1) == b"acknowledged"
        assert journal.append(b"more") == 2


def test_columns_are_gathered_by_the_caller_where_no_thread_can_be_had(
    tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(tmp_path / "j", slots=64) as journal:
        journal.append_many([b"%d" % i for i in range(50)])
        alone = journal.columns()
        monkeypatch.setattr(reader, "threads_for", lambda _: 2)
        monkeypatch.setattr(reader, "SPLIT_ROWS", 2)
        refuse(1)
        found = journal.columns()
        assert [bytes(found.payload(i)) for i in range(50)] == [bytes(alone.payload(i)) for i in range(50)]


@pytest.mark.parametrize("resident", [True, False])
def test_a_scan_is_the_callers_where_no_thread_can_be_had(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    directory = long()
    alone = told_by(scan(directory, 1))
    monkeypatch.setattr(recovery, "SPLIT_MIN_BYTES", 0)
    monkeypatch.setattr(recovery, "is_resident", lambda segments: resident)
    refuse(1)
    told: list[tuple[int, int]] = []
    assert told_by(scan(directory, 2, told)) == alone
    assert told[-1][0] == told[-1][1]
