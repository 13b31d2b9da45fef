"""A signal handler that raises into a change of structure: the change is whole, and the journal goes on.

test_signals.py does it at random; here it hits each step of each change.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmapwal import Journal
from mmapwal.engine import Engine
from mmapwal.segment import SegmentSet
from mmapwal.superblock import SuperblockFile
from tests.conftest import AlarmError

ENTRIES = [b"%d" % i * 3000 for i in range(1, 17)]  # some segments


def append(journal: Journal) -> None:
    for _ in range(9):
        journal.append(ENTRIES[0])


CHANGES: dict[str, Callable[[Journal], Any]] = {
    "an append that makes a segment": append,
    "set_snapshot_op": lambda journal: journal.set_snapshot_op(11),
    "drain": lambda journal: journal.drain(9, 12),
    "truncate_from": lambda journal: journal.truncate_from(13),
    "compact": lambda journal: journal.compact(),
    "user_data": lambda journal: journal.set_user_data(b"mine"),
    "close": lambda journal: journal.close(),
}
STEPS: dict[str, tuple[type, str]] = {
    "the spare superblock": (SuperblockFile, "_write_spare"),
    "the commit": (SuperblockFile, "commit"),
    "the next spare": (SuperblockFile, "_allocate_spare"),
    "segments": (SegmentSet, "follow"),
    "the word to followers": (Engine, "_note_superblock"),
}


@pytest.fixture
def hit(monkeypatch: pytest.MonkeyPatch, alarm: Callable[[], None]) -> Callable[[str], list[str]]:
    """Has the handler raise before and behind a step of a change; tells how often it was got to."""

    def hit_step(step: str) -> list[str]:
        owner, name = STEPS[step]
        real, hits = getattr(owner, name), []

        def step_hit(*args: Any) -> Any:
            hits.append(step)
            alarm()
            result = real(*args)
            alarm()
            return result

        monkeypatch.setattr(owner, name, step_hit)
        return hits

    return hit_step


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_handler_that_raises_into_a_change_does_not_poison_and_the_change_is_whole(
    change: str,
    step: str,
    hit: Callable[[str], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Engine, "start_preparing", lambda self: None)  # who appends makes the segment
    journal = Journal(tmp_path / "j", slots=64, segment_bytes=16384)
    for entry in ENTRIES:
        journal.append(entry)
    journal.set_snapshot_op(8)  # so that there is something to compact
    sequence = journal._engine.superblock.sequence
    hits = hit(step)
    with pytest.raises(AlarmError):
        CHANGES[change](journal)
    monkeypatch.undo()
    assert hits
    assert journal._engine.superblock.sequence > sequence
    assert journal.poisoned is None
    here = {} if change == "close" else {e.op: bytes(e.payload) for e in journal}
    journal.close()
    with Journal(tmp_path / "j") as again:
        there = {e.op: bytes(e.payload) for e in again}
        assert again.verify().ok
        assert there == (here or dict(enumerate(ENTRIES[8:], 9)))
