"""A chain of journals: how the next one is started, and what becomes of it where that fails."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmapwal import ClosedError, Journal, PoisonedError
from mmapwal.integrations.chain import JournalChain

SLOTS = 4


@pytest.fixture
def open_chain(tmp_path: Path) -> Iterator[Callable[[], JournalChain]]:
    """Opens the chain; the one that was open is closed before."""
    opened: list[JournalChain] = []

    def open_() -> JournalChain:
        while opened:
            opened.pop().close()
        opened.append(JournalChain(tmp_path / "chain", b"me", slots=SLOTS, segment_bytes=65536))
        return opened[-1]

    yield open_
    for chain in opened:
        chain.close()


def payloads(chain: JournalChain) -> list[bytes]:
    return [bytes(record.payload) for record in chain.after(0)]


def fill(chain: JournalChain) -> list[bytes]:
    """So that the next append starts the next journal."""
    kept = [b"%d" % number for number in range(SLOTS)]
    for payload in kept:
        chain.append([payload])
    return kept


ERRORS = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EIO, os.strerror(errno.EIO)),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("in_force", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=["ENOSPC", "EIO", "interrupt"])
def test_what_is_acknowledged_behind_a_start_of_a_journal_that_failed_is_there_after_a_restart(
    open_chain: Callable[[], JournalChain],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    in_force: bool,
    restarted: bool,
) -> None:
    chain = open_chain()
    kept = fill(chain)
    set_user_data = Journal.set_user_data

    def fail(journal: Journal, data: bytes) -> None:
        if in_force:
            set_user_data(journal, data)
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(Journal, "set_user_data", fail)
        chain.append([b"not acknowledged"])
    assert payloads(chain) == kept
    if restarted:
        chain = open_chain()
    for payload in (b"a", b"b"):
        assert chain.copy(chain.append([payload])) == payload
    assert payloads(chain) == [*kept, b"a", b"b"]
    chain = open_chain()
    assert payloads(chain) == [*kept, b"a", b"b"]
    assert [p.name for p in sorted(chain.path.iterdir())] == ["journal-000001", "journal-000002"]


def test_a_next_journal_that_a_poisoned_start_left_is_taken_over(
    open_chain: Callable[[], JournalChain], monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = open_chain()
    kept = fill(chain)

    def poison(journal: Journal, _: bytes) -> None:
        journal._engine._mark_poisoned("directory sync", OSError(errno.EIO, "planted"))
        raise PoisonedError("directory sync")

    with monkeypatch.context() as patch, pytest.raises(PoisonedError):
        patch.setattr(Journal, "set_user_data", poison)
        chain.append([b"not acknowledged"])
    chain.append([b"a"])
    assert payloads(open_chain()) == [*kept, b"a"]


@pytest.mark.parametrize("made", ["folder", "killed", "closed"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_journal_whose_maker_died_before_it_had_an_owner_is_taken_over(
    open_chain: Callable[[], JournalChain], tmp_path: Path, made: str, number: int
) -> None:
    kept = fill(open_chain()) if number == 2 else []
    path = tmp_path / "chain" / f"journal-{number:06}"
    path.mkdir(parents=True)
    if made != "folder":
        journal = Journal(path, slots=SLOTS, segment_bytes=65536)
        if made == "killed":
            journal._engine._mark_poisoned("kill", OSError(errno.EIO, "planted"))  # closes without a seal
        journal.close()
    chain = open_chain()
    chain.append([b"a"])
    assert payloads(chain) == payloads(open_chain()) == [*kept, b"a"]


def test_behind_a_journal_whose_end_is_unknown_no_next_one_is_started(
    open_chain: Callable[[], JournalChain],
) -> None:
    chain = open_chain()
    kept = fill(chain)
    chain._journals[-1]._engine._mark_poisoned("sync", OSError(errno.EIO, "planted"))
    for _ in range(2):
        with pytest.raises(PoisonedError):
            chain.append([b"too many"])
    assert [p.name for p in chain.path.iterdir()] == ["journal-000001"]
    chain = open_chain()
    chain.append([b"a"])
    assert payloads(chain) == [*kept, b"a"]


def test_a_chain_that_is_closed_starts_no_next_journal(open_chain: Callable[[], JournalChain]) -> None:
    chain = open_chain()
    kept = fill(chain)
    chain.close()
    with pytest.raises(ClosedError):
        chain.append([b"too late"])
    assert [p.name for p in chain.path.iterdir()] == ["journal-000001"]
    assert payloads(open_chain()) == kept


def test_while_a_chain_is_closed_no_next_journal_is_started(
    open_chain: Callable[[], JournalChain], monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = open_chain()
    fill(chain)
    close = Journal.close

    def append_and_close(journal: Journal) -> None:
        with pytest.raises(ClosedError):
            chain.append([b"too late"])
        close(journal)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "close", append_and_close)
        chain.close()
    assert [p.name for p in chain.path.iterdir()] == ["journal-000001"]


def test_backups_of_the_journals_listed_before_in_order_are_the_chain_up_to_some_moment(
    open_chain: Callable[[], JournalChain], tmp_path: Path
) -> None:
    chain = open_chain()
    appended = 0

    def append(count: int) -> None:
        nonlocal appended
        for _ in range(count):
            chain.append([b"%d" % appended])
            appended += 1

    append(SLOTS + 1)
    (tmp_path / "backup").mkdir()
    for _ in range(4):  # the later ones take what is new
        before = appended
        for path in sorted(chain.path.iterdir()):
            with Journal(path, readonly=True) as journal:
                journal.backup(tmp_path / "backup" / path.name)
            append(SLOTS - 1)  # meanwhile
        copy = tmp_path / f"of {before}"
        shutil.copytree(tmp_path / "backup", copy)
        restored = JournalChain(copy, b"me")
        kept = payloads(restored)
        restored.close()
        assert before <= len(kept) < appended
        assert kept == [b"%d" % number for number in range(len(kept))]
