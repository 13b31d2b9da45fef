"""What is recorded comes into the index of events, once: also where it cannot be read back at first, or who
indexes it is interrupted."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from eventsourcing.persistence import IntegrityError, OperationalError, Tracking

from mmapwal import Journal
from mmapwal.integrations import event_datastore
from mmapwal.integrations.chain import JournalChain, Record
from mmapwal.integrations.event_datastore import EventDatastore

from .datastores import originator, stored


def unreadable(*_: Any) -> Iterator[Record]:
    """For JournalChain.after: no segment can be mapped."""
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize("healed_by", ["insert", "count", "select", "select_by_id", "tracked"])
def test_what_is_recorded_and_could_not_be_read_back_is_told_is_found_and_is_never_recorded_again(
    open_store: Callable[..., EventDatastore], monkeypatch: pytest.MonkeyPatch, healed_by: str
) -> None:
    store = open_store()
    heard = threading.Event()
    store.listeners.add(heard)
    reads: dict[str, Callable[[], Any]] = {
        "count": lambda: store.count,
        "select": lambda: store.select(originator(1), None, None, False, None),
        "select_by_id": lambda: store.select_by_id(1, 9),
        "tracked": lambda: store.tracked("upstream"),
    }

    def again() -> None:
        store.insert([stored(1, 1), stored(1, 0)], None)

    with monkeypatch.context() as patch:
        chain_append = JournalChain.append

        def append(chain: JournalChain, payloads: Any) -> int:
            patch.setattr(JournalChain, "after", unreadable)
            return chain_append(chain, payloads)

        patch.setattr(JournalChain, "append", append)
        with pytest.raises(OperationalError, match=r"^recorded, but") as caught:
            store.insert([stored(1, 0), stored(2, 0)], Tracking("upstream", 7))
        assert isinstance(caught.value.__cause__, OSError)
        assert not heard.is_set()
        for call in (again, *reads.values()):
            with pytest.raises(OperationalError, match=os.strerror(errno.EMFILE)):
                call()
    if healed_by != "insert":
        reads[healed_by]()
        assert heard.is_set()
    with pytest.raises(IntegrityError):
        again()
    with pytest.raises(IntegrityError):
        store.insert([], Tracking("upstream", 7))
    assert store.insert([stored(1, 1)], Tracking("upstream", 8)) == [3]
    for _ in range(2):
        assert store.select(originator(1), None, None, False, None) == [stored(1, 0), stored(1, 1)]
        assert store.select_by_id(1, 9) == [stored(1, 0), stored(2, 0), stored(1, 1)]
        assert store.tracked("upstream") == 8
        store.close()
        store = open_store()


def test_an_insert_without_space_can_be_made_again_also_where_nothing_could_be_read_back(
    open_store: Callable[..., EventDatastore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    with monkeypatch.context() as patch, pytest.raises(OperationalError, match="No space"):

        def no_space(*_: Any, **__: Any) -> range:
            patch.setattr(JournalChain, "after", unreadable)
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(Journal, "append_many", no_space)
        store.insert([stored(1, 0)], Tracking("upstream", 1))
    assert store.insert([stored(1, 0)], Tracking("upstream", 1)) == [1]


@pytest.mark.parametrize("added", [False, True])
def test_who_interrupts_the_indexing_of_an_event_leaves_it_there_once(
    open_store: Callable[..., EventDatastore], monkeypatch: pytest.MonkeyPatch, added: bool
) -> None:
    store = open_store()
    store.insert([stored(1, 0)], None)
    add = event_datastore._Sequence.add

    def interrupted(sequence: Any, version: int, place: int) -> None:
        if added:
            add(sequence, version, place)
        else:
            sequence.versions.append(version)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(event_datastore._Sequence, "add", interrupted)
        store.insert([stored(1, 1, b"once")], None)
    with pytest.raises(IntegrityError):
        store.insert([stored(1, 1)], None)
    assert store.insert([stored(1, 2)], None) == [3]
    expected = [stored(1, 0), stored(1, 1, b"once"), stored(1, 2)]
    assert store.select(originator(1), None, None, False, None) == store.select_by_id(1, 9) == expected
    assert store.select(originator(1), 1, None, False, None) == expected[2:]


def test_a_start_that_could_not_read_the_events_lets_go_of_the_journals(
    open_store: Callable[..., EventDatastore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.insert([stored(1, 0)], None)
    store.close()
    with monkeypatch.context() as patch, pytest.raises(OperationalError) as caught:
        patch.setattr(JournalChain, "after", unreadable)
        open_store()
    assert open_store().count == 1  # while the traceback of the one that failed is held
    assert isinstance(caught.value.__cause__, OSError)
