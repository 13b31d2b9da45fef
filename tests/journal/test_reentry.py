"""Signal handlers and finalisers that use a journal within a call of their thread that is changing it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmapwal import BusyError, Journal, preparing, recover
from mmapwal.segment import NewSegment

SIZES: dict[str, Any] = {"segment_bytes": 16384, "slots": 4096}
CALLS: dict[str, Callable[[Journal], object]] = {
    "append": lambda j: j.append(b"h" * 700),
    "append_many": lambda j: j.append_many([b"h" * 700] * 3),
    "set_user_data": lambda j: j.set_user_data(b"term 7"),
    "set_snapshot_op": lambda j: j.set_snapshot_op(3),
    "drain": lambda j: j.drain(1, 2),
    "truncate_from": lambda j: j.truncate_from(2),
    "compact": lambda j: j.compact(),
    "close": lambda j: j.close(),
}  # fmt: skip


def fill(journal: Journal, count: int = 60) -> dict[int, bytes]:
    """Goes over several segments, which this thread makes."""
    return {journal.append(b"%03d" % n * 170): b"%03d" % n * 170 for n in range(count)}


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    """Nobody makes its segments ahead."""
    with Journal(tmp_path / "j", **SIZES) as made:
        made._engine._preparer.closing()
        yield made


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("moment", ["write_zeros", "publish"])
def test_who_comes_into_an_append_that_makes_a_segment_is_refused_and_nothing_is_lost(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, moment: str
) -> None:
    call, handled = getattr(NewSegment, moment), []

    def interrupted(self: NewSegment, *args: Any) -> Any:
        if not handled:
            handled.append(self)
            with pytest.raises(BusyError, match="within a change"):
                for _ in range(30):  # what still fits into the segment may be appended
                    CALLS[name](journal)
        return call(self, *args)

    monkeypatch.setattr(NewSegment, moment, interrupted)
    wanted = fill(journal)
    assert handled and journal.poisoned is None
    found = {e.op: bytes(e.payload) for e in journal}
    assert found.items() >= wanted.items()
    assert set(found.values()) - set(wanted.values()) <= {b"h" * 700}
    journal.close()
    with Journal(tmp_path / "j") as again:
        assert {e.op: bytes(e.payload) for e in again} == found
        assert again.user_data == b""


def test_what_changes_the_facts_below_a_change_makes_that_fail_as_if_it_had_not_begun(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.append(b"one")
    engine, begun = journal._engine, []

    def replace(superblock: Any, **facts: Any) -> Any:
        new = original(superblock, **facts)
        if not begun:
            begun.append(new)
            engine.change(original(superblock, user_data=b"acknowledged"), lambda: None)
        return new

    original = preparing.replace
    monkeypatch.setattr(preparing, "replace", replace)
    with pytest.raises(BusyError, match="came into this one"):
        fill(journal)
    assert begun and journal.poisoned is None and journal.user_data == b"acknowledged"
    fill(journal)
    assert journal.user_data == b"acknowledged"


def test_a_replica_that_a_handler_could_not_close_is_closed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Machine:
        def apply(self, entry: Any) -> None:
            """Nothing comes of it."""

        def snapshot(self) -> bytes:
            return b""

        def restore(self, snapshot: memoryview) -> None:
            """Nothing was in it."""

    replica = recover(tmp_path / "j", Machine(), **SIZES)
    with replica.journal._engine.structure, pytest.raises(BusyError):
        replica.close()
    replica.close()
    recover(tmp_path / "j", Machine()).close()
