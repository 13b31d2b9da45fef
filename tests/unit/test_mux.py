"""The promises of MuxStateMachine: several machines as one."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmapwal import Entry, IncompatibleFormatError, MuxStateMachine, SnapshotCorruptError, StateMachineError

from .ledger import SIZES, open_replica, reopened

if TYPE_CHECKING:
    from tests.conftest import Home


def entry(kind: int, payload: bytes = b"x", op: int = 1) -> Entry:
    return Entry(op, memoryview(payload), kind, 0)


class Part:
    """A machine whose whole state is one buffer."""

    def __init__(self, state: bytes = b"") -> None:
        self.state: Any = state

    def apply(self, entry: Entry) -> Any:
        self.state = bytes(self.state) + bytes(entry.payload)
        return self.state

    def snapshot(self) -> bytes:
        return bytes(self.state)

    def restore(self, snapshot: memoryview) -> None:
        self.state = snapshot


def address(data: Any) -> int:
    return np.frombuffer(data, np.uint8).ctypes.data


def test_a_mux_gives_each_entry_to_the_machine_of_its_kind() -> None:
    one, two = Part(), Part()
    mux = MuxStateMachine({"one": (range(10), one), "two": ({10, 32767}, two)})
    assert [mux.apply(entry(k, b"%d" % k)) for k in (0, 10, 9, 32767)] == [b"0", b"10", b"09", b"1032767"]
    with pytest.raises(StateMachineError, match="op 7: no machine has kind 11"):
        mux.apply(entry(11, op=7))
    assert (one.state, two.state) == (b"09", b"1032767")


def test_a_mux_refuses_bad_machines() -> None:
    with pytest.raises(ValueError, match="'a' and 'b' both have kind 3"):
        MuxStateMachine({"a": (range(4), Part()), "b": ([9, 3], Part())})
    for kinds, error in (([-1], ValueError), ([32768], ValueError), (["x"], TypeError), ([True], TypeError)):
        with pytest.raises(error, match="kind must be"):
            MuxStateMachine({"a": (kinds, Part())})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="name must be a str"):
        MuxStateMachine({1: ([1], Part())})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="surrogates"):
        MuxStateMachine({"\ud800": ([1], Part())})


def test_an_entry_that_no_machine_takes_is_refused_before_it_is_journaled(home: Home) -> None:
    replica = open_replica(home, MuxStateMachine({"only": ([1], Part())}), **SIZES)
    with pytest.raises(StateMachineError, match="no machine has kind 2; nothing was journaled"):
        replica.submit(b"x", kind=2)
    assert replica.last_journaled_op is None
    assert replica.submit(b"x", kind=1) == b"x"
    replica.journal.append(b"y", kind=2)
    with pytest.raises(StateMachineError, match="op 2 failed"):
        replica.submit(b"x", kind=1)


def test_a_mux_is_checkpointed_and_recovered_as_a_whole(home: Home) -> None:
    def mux() -> MuxStateMachine:
        return MuxStateMachine({"a": ([1], Part()), "b": ([2], Part()), "idle": ([3], Part())})

    replica = open_replica(home, mux(), **SIZES)
    for kind in (1, 2, 1):
        replica.submit(b"%d" % kind, kind=kind)
    replica.checkpoint()
    replica.submit(b"more", kind=2)
    again = reopened(home, replica, mux())
    assert again.machine.snapshot() == replica.machine.snapshot()
    assert again.submit(b"!", kind=1) == b"11!"
    with pytest.raises(IncompatibleFormatError, match="machines"):
        reopened(home, again, MuxStateMachine({"a": ([1, 2, 3], Part())}))


@given(
    states=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=9), st.binary(max_size=40), max_size=5
    )
)
def test_a_mux_snapshot_gives_every_machine_its_own_slice(states: dict[str, bytes]) -> None:
    def mux(parts: dict[str, Part]) -> MuxStateMachine:
        return MuxStateMachine({name: ([i], parts[name]) for i, name in enumerate(parts)})

    data = mux({name: Part(state) for name, state in states.items()}).snapshot()
    parts = {name: Part() for name in reversed(states)}
    mux(parts).restore(memoryview(data))
    assert {name: bytes(part.state) for name, part in parts.items()} == states
    for part in parts.values():
        assert part.state.obj is data
        assert not part.state.nbytes or (address(part.state) - address(data)) % 8 == 0


def test_every_cut_of_a_mux_snapshot_is_damage_and_restores_nothing() -> None:
    data = MuxStateMachine({"a": ([1], Part(b"12345678")), "b": ([2], Part(b"state"))}).snapshot()
    parts = Part(b"old"), Part(b"old")
    mux = MuxStateMachine({"a": ([1], parts[0]), "b": ([2], parts[1])})
    for damaged in (*(data[:length] for length in range(len(data))), data + b"\0", data + bytes(8)):
        with pytest.raises(SnapshotCorruptError):
            mux.restore(memoryview(damaged))
    twice = MuxStateMachine({"a": ([1], Part()), "b": ([2], Part())}).snapshot().replace(b"b\0\0", b"a\0\0")
    for damaged, error in (
        (b"X" + data[1:], SnapshotCorruptError),
        (data.replace(b"a\0\0", b"\xff\0\0"), SnapshotCorruptError),
        (twice, SnapshotCorruptError),
        (data[:8] + b"\2" + data[9:], IncompatibleFormatError),
        (data.replace(b"a\0\0", b"c\0\0"), IncompatibleFormatError),
    ):
        with pytest.raises(error):
            mux.restore(memoryview(damaged))
    assert (parts[0].state, parts[1].state) == (b"old", b"old")


@given(data=st.binary(max_size=80), count=st.integers(0, 2**32 - 1))
def test_no_bytes_make_a_mux_do_anything_but_refuse(data: bytes, count: int) -> None:
    mux = MuxStateMachine({"a": ([1], Part())})
    for raw in (data, struct.pack("<8sII", b"MMWALMUX", 1, count) + data):
        with pytest.raises((SnapshotCorruptError, IncompatibleFormatError)):
            mux.restore(memoryview(raw))
