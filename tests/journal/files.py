"""The files of a journal as the tests see and damage them, and what they hold a journal against."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import pytest

from mmapwal import CorruptionError, Journal, MemoryDirectory
from mmapwal import format as fmt
from mmapwal._native import lib
from mmapwal.storage import Directory
from mmapwal.superblock import Superblock, read_superblock

SMALL: dict[str, Any] = {"slots": 16, "segment_bytes": 16384}
ROOM = 16384 - fmt.PAGE_BYTES  # for frames, in a segment of SMALL
Contents = dict[int, tuple[bytes, int]]


class Home(Protocol):
    """Home of tests/conftest.py: the place of one journal."""

    kind: str
    path: Any
    memory: MemoryDirectory

    def directory(self) -> Directory: ...
    def open(self, **options: Any) -> Journal: ...
    def after_kill(self) -> Home: ...


class Frame(NamedTuple):
    """A frame, and the file and the byte where it lies."""

    name: str
    at: int
    lsn: int
    op: int
    length: int
    type: int
    flags: int
    kind: int
    epoch: int
    durable_lsn: int

    @property
    def bytes(self) -> int:
        return fmt.frame_bytes(self.length)

    @property
    def payload_at(self) -> int:
        return self.at + fmt.FRAME_BYTES


def read(directory: Directory, name: str) -> bytes:
    file = directory.open(name)
    try:
        return bytes(file.read_at(0, len(file)))
    finally:
        _close(directory, file)


def write(directory: Directory, name: str, offset: int, data: bytes) -> None:
    file = directory.open(name, writable=True)
    try:
        file.write_at(offset, data)
    finally:
        _close(directory, file)


def put(directory: Directory, name: str, data: bytes) -> None:
    """A file of these bytes, whatever was there."""
    file = directory.create(name)
    try:
        file.write_at(0, data)
    finally:
        _close(directory, file)


def cut(directory: Directory, name: str, length: int) -> None:
    put(directory, name, read(directory, name)[:length])


def flip(directory: Directory, name: str, offset: int, mask: int = 0xFF) -> None:
    byte = read(directory, name)[offset]
    write(directory, name, offset, bytes([byte ^ mask]))


def _close(directory: Directory, file: Any) -> None:
    if not isinstance(directory, MemoryDirectory):
        file.close()


def bytes_of(directory: Directory) -> dict[str, bytes]:
    """Every file, but not the lock."""
    return {name: read(directory, name) for name in directory.names() if name != fmt.LOCK_NAME}


def frames_of(directory: Directory) -> list[Frame]:
    """The frames that the segments hold, in order; from each up to its END or the first that is none."""
    found = []
    superblock = superblock_of(directory)
    for record in superblock.segments:
        data = read(directory, record.name)
        salt = fmt.segment_salt(superblock.uuid, record.id)
        at = fmt.PAGE_BYTES
        while at + fmt.FRAME_BYTES <= len(data):
            f: Any = np.frombuffer(data, fmt.FRAME, 1, at)[0]
            if int(f["header_crc"]) != fmt.crc32c(data[at + 4 : at + fmt.FRAME_BYTES], salt):
                break
            fields = ("lsn", "op", "length", "type", "flags", "kind", "epoch", "durable_lsn")
            found.append(Frame(record.name, at, *(int(f[field]) for field in fields)))
            at += found[-1].bytes
            if found[-1].type == lib.MW_END:
                break
    return found


def entry_frames(directory: Directory) -> dict[int, Frame]:
    """The newest frame of each op."""
    return {f.op: f for f in frames_of(directory) if f.type == lib.MW_ENTRY}


def change_frame(directory: Directory, frame: Frame, **fields: int) -> None:
    """Other fields in a frame's header, and its checksum made right."""
    superblock = superblock_of(directory)
    record = next(r for r in superblock.segments if r.name == frame.name)
    raw = read(directory, frame.name)[frame.at : frame.payload_at]
    header: Any = np.frombuffer(bytearray(raw), fmt.FRAME, 1)
    for field, value in fields.items():
        header[field] = value
    crc = fmt.crc32c(header.tobytes()[4:], fmt.segment_salt(superblock.uuid, record.id))
    header["header_crc"] = crc
    write(directory, frame.name, frame.at, header.tobytes())


def superblock_of(directory: Directory) -> Superblock:
    superblock = read_superblock(directory)
    assert superblock is not None
    return superblock


def change_superblock(directory: Directory, **fields: Any) -> None:
    """Another superblock with these facts, its checksum right."""
    put(directory, fmt.SUPERBLOCK_NAME, replace(superblock_of(directory), **fields).encode())


def contents_of(journal: Journal) -> Contents:
    """op -> (payload, kind), read in every way there is; all ways have to agree."""
    found = {e.op: (bytes(e.payload), e.kind) for e in journal}
    assert list(found) == sorted(found)
    assert [bytes(p) for p in journal.payloads()] == [payload for payload, _ in found.values()]
    assert len(journal) == len(found)
    assert journal.first_op == min(found, default=None)
    assert journal.last_op == max(found, default=None)
    assert journal.headers()["op"].tolist() == list(found)
    columns = journal.columns()
    kinds = zip(columns.ops.tolist(), columns.kinds.tolist(), strict=True)
    assert {op: (bytes(columns.payload(row)), kind) for row, (op, kind) in enumerate(kinds)} == found
    for op, (payload, kind) in found.items():
        assert op in journal
        assert op > journal.snapshot_op
        assert bytes(journal.read(op)) == journal.copy(op) == payload
        header = journal.header(op)
        assert header is not None
        assert (header.op, header.length, header.kind) == (op, len(payload), kind)
        assert header.checksum == fmt.crc32c(payload)
    return found


@contextmanager
def making_none(journal: Journal) -> Iterator[None]:
    """No segment is made in the background meanwhile. Without the lock: who holds that may change nothing."""
    preparer = journal._engine._preparer
    prepare = preparer.prepare

    def prepare_if_asked(*args: Any) -> None:
        if threading.current_thread() is not preparer._thread:
            prepare(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparer, "_ahead", lambda _: time.sleep(0.005))
        patch.setattr(preparer, "prepare", prepare_if_asked)
        with journal._engine.structure:  # one that was begun ends here, or with its next step
            preparer.give_back()
        yield


@contextmanager
def at_rest(journal: Journal) -> Iterator[None]:
    """Nothing is done in the background meanwhile: no segment is made, and none goes."""
    with making_none(journal):
        journal._engine.disposal.wait()
        yield


def killed(home: Home, journal: Journal) -> Home:
    """Another home with what kill -9 would leave at this instant. The thread that prepares segments is
    held still, so that the copy is of one moment."""
    with journal._engine.structure:
        return home.after_kill()


def killed_at_rest(home: Home, journal: Journal) -> Home:
    """The same, when no segment is in the making."""
    with at_rest(journal):
        return killed(home, journal)


def without_index(home: Home) -> Home:
    """The same home, where a recovery has only the segments to go by."""
    home.directory().unlink(fmt.INDEX_NAME)
    return home


def every_end(home: Home, journal: Journal) -> Iterator[Journal]:
    """The journal as it is, what a kill leaves of it, and what a close leaves of it."""
    yield journal
    yield killed(home, journal).open()
    journal.close()
    yield home.open()


def settle(journal: Journal) -> None:
    """Has the next segment made now, so that nobody makes it in the background later."""
    journal._engine.prepare_segment()


def after_kill(directory: MemoryDirectory) -> MemoryDirectory:
    """The same in memory."""
    left = copy.deepcopy(directory)
    left.close()
    return left


def refused(home: Home, error: type[Exception] = CorruptionError, **options: Any) -> Any:
    """Opening raises `error`, and changes nothing. The error."""
    before = bytes_of(home.directory())
    raised = None
    try:
        home.open(**options).close()
    except error as e:
        raised = e
    assert raised is not None, f"it opened: no {error}"
    assert bytes_of(home.directory()) == before
    return raised


Errors = type[BaseException] | tuple[type[BaseException], ...]


def refused_call(error: Errors, journal: Journal, call: Callable[[], Any]) -> Any:
    """The call raises `error`, writes nothing, and the journal is what it was. The error."""
    engine = journal._engine
    raised = None
    with at_rest(journal):
        before = bytes_of(engine.directory), journal.written_lsn, len(journal), journal.snapshot_op
        try:
            call()
        except error as e:
            raised = e
        assert raised is not None, f"no {error}"
        after = bytes_of(engine.directory), journal.written_lsn, len(journal), journal.snapshot_op
    assert after == before
    return raised
