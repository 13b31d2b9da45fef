"""What is replicated: a state machine, and several as one."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Protocol

from typing_extensions import Buffer

from mmapwal import format as fmt
from mmapwal.arguments import integer
from mmapwal.errors import IncompatibleFormatError, SnapshotCorruptError, StateMachineError
from mmapwal.reader import Entry
from mmapwal.snapshot import copy_of

__all__ = ["MuxStateMachine", "StateMachine"]


class StateMachine(Protocol):
    """What is replicated. Its state must follow from the entries alone, in their order. A Replica calls
    it from one thread at a time; it must not call back into the replica."""

    def apply(self, entry: Entry) -> Any:
        """Takes one entry into the state; what is returned goes to whoever submitted it. Its payload is
        a slice of the journal's mapping, and may be kept. An exception stops the replica. The entry was
        journaled before, and comes again at each recovery: so refuse bad input before submit(), or return
        what is wrong with it instead of raising that."""

    def snapshot(self) -> Buffer:
        """The whole state as bytes; copied before the next apply(). Changes nothing."""

    def restore(self, snapshot: memoryview) -> None:
        """Replaces the state by that of a snapshot: a read-only slice of a mapping, which may be kept."""


# --- several machines as one ------------------------------------------------------------------------

_MUX_MAGIC = b"MMWALMUX"
_MUX_VERSION = 1
_MUX_HEADER = struct.Struct("<8sII")  # magic, version, how many machines
_MUX_ROW = struct.Struct("<QQ")  # bytes of data, bytes of the name behind the row


def _padded(length: int) -> int:
    return (length + 7) & ~7


class MuxStateMachine:
    """One machine for each set of kinds, each with its own part of the snapshot.

    `machines` maps a name, which is written into snapshots, to (kinds, machine); kinds are any
    iterable of ints 0 .. 2**15-1. ValueError when two machines share a kind or a kind is out of range,
    TypeError for what is no str or int. Not thread-safe, as any machine.
    """

    def __init__(self, machines: dict[str, tuple[Iterable[int], StateMachine]]) -> None:
        self._machines: dict[str, StateMachine] = {}
        self._by_kind: dict[int, StateMachine] = {}
        owners: dict[int, str] = {}
        for name, (kinds, machine) in machines.items():
            if not isinstance(name, str):
                raise TypeError(f"a machine's name must be a str, not {type(name).__name__}")
            name.encode()  # a name that cannot be written is a ValueError now, not at the first snapshot
            self._machines[name] = machine
            for given in kinds:
                kind = integer("a kind", given, 0, fmt.KIND_MAX)
                if owners.setdefault(kind, name) != name:
                    raise ValueError(f"{owners[kind]!r} and {name!r} both have kind {kind}")
                self._by_kind[kind] = machine

    def accepts(self, kind: int) -> bool:
        """Whether a machine has this kind."""
        return kind in self._by_kind

    def apply(self, entry: Entry) -> Any:
        """The result of the machine that has the entry's kind; StateMachineError when none has."""
        machine = self._by_kind.get(entry.kind)
        if machine is None:
            raise StateMachineError(f"op {entry.op}: no machine has kind {entry.kind}")
        return machine.apply(entry)

    def snapshot(self) -> bytes:
        """All machines' snapshots in one container, copied: magic, version, count; a row and a name for
        each; then their data. Names and data are padded to 8 bytes, so that a part can be an array."""
        parts = {name: copy_of(machine.snapshot()) for name, machine in self._machines.items()}
        pieces = [_MUX_HEADER.pack(_MUX_MAGIC, _MUX_VERSION, len(parts))]
        for name, data in parts.items():
            raw = name.encode()
            pieces += [_MUX_ROW.pack(len(data), len(raw)), raw.ljust(_padded(len(raw)), b"\0")]
        for data in parts.values():
            pieces += [data, bytes(-len(data) % 8)]
        return b"".join(pieces)

    def restore(self, snapshot: memoryview) -> None:
        """Gives each machine its slice; all is checked before the first one is given any.
        SnapshotCorruptError for what is no whole container, IncompatibleFormatError for one of another
        version or of other machines; and what a machine's restore() raises."""
        parts = _split_container(memoryview(snapshot).cast("B"))
        if parts.keys() != self._machines.keys():
            raise IncompatibleFormatError(
                f"the snapshot is of the machines {sorted(parts)}, here are {sorted(self._machines)}"
            )
        for name, machine in self._machines.items():
            machine.restore(parts[name])


def _split_container(view: memoryview) -> dict[str, memoryview]:
    """The parts by name. Every size is checked against what is really there."""
    at = 0

    def take(length: int, what: str) -> memoryview:
        nonlocal at
        if length > view.nbytes - at:
            raise SnapshotCorruptError(f"a mux snapshot ends in {what}")
        part = view[at : at + length]
        at += _padded(length)
        return part

    magic, version, count = _MUX_HEADER.unpack(take(_MUX_HEADER.size, "its header"))
    if magic != _MUX_MAGIC:
        raise SnapshotCorruptError("not a mux snapshot")
    if version != _MUX_VERSION:
        raise IncompatibleFormatError(
            f"a mux snapshot of version {version}; this mmapwal reads version {_MUX_VERSION}"
        )
    lengths: dict[str, int] = {}
    for _ in range(count):
        data_bytes, name_bytes = _MUX_ROW.unpack(take(_MUX_ROW.size, "its table"))
        try:
            name = str(take(name_bytes, "a name"), "utf-8")
        except UnicodeDecodeError as e:
            raise SnapshotCorruptError("a name in a mux snapshot is not UTF-8") from e
        if name in lengths:
            raise SnapshotCorruptError(f"a mux snapshot names {name!r} twice")
        lengths[name] = data_bytes
    parts = {name: take(length, f"the data of {name!r}") for name, length in lengths.items()}
    if at != view.nbytes:
        raise SnapshotCorruptError(f"a mux snapshot is {view.nbytes} bytes long, its table says {at}")
    return parts
