"""The process behind a FuseDisk: serves one file over /dev/fuse, and writes down each write and each flush.

Standard library only, and run as a script, since a disk has to go on while the program that uses it dies.
It mounts itself on an empty file, so the root of the file system is the file. Requests are answered one by
one: what stands in the log before a flush had been answered before that flush, so the flush covers it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import struct
import sys
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

WRITE, FLUSH = 1, 2
RECORD = struct.Struct("<IIQQ")  # kind, length of the data that follows, offset, bytes of notes by then

_IN_HEADER = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, ...
_OUT_HEADER = struct.Struct("<IiQ")  # length, -errno, unique
_INIT_IN = struct.Struct("<IIII")  # major, minor, max_readahead, flags
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_ATTR_OUT = struct.Struct("<QII" + "QQQQQQIIIIIIIIII")
_OPEN_OUT = struct.Struct("<QII")
_DATA_IN = struct.Struct("<QQIIQII")  # file handle, offset, size, ...: of READ and of WRITE
_WRITE_OUT = struct.Struct("<II")
_MINOR = 38
_MAX_PAGES_GIVEN = 1 << 22
_FOPEN_DIRECT_IO = 1
_MAX_WRITE_BYTES = 1 << 20
_MS_NOSUID, _MS_NODEV = 2, 4


class Opcode(IntEnum):
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FSYNC = 20
    INIT = 26
    DESTROY = 38
    BATCH_FORGET = 42


@dataclass
class Fault:
    """What fails: reads or writes of sectors that hold `needle`, or flushes; `times` times, -1 for ever."""

    on: str
    needle: bytes
    times: int
    hits: int = 0

    def strikes(self, on: str, data: bytes | memoryview = b"") -> bool:
        if self.on != on or self.times == 0 or self.needle not in bytes(data):
            return False
        self.times -= 1
        self.hits += 1
        return True


class Request(NamedTuple):
    opcode: int
    unique: int
    body: memoryview


class Server:
    def __init__(self, mountpoint: str, image: str, log: str, notes: str) -> None:
        self._image = os.open(image, os.O_RDWR)
        self._size = os.fstat(self._image).st_size
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        self._notes = os.open(notes, os.O_RDONLY)
        self._faults: list[Fault] = []
        self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
        self._buffer = bytearray(_MAX_WRITE_BYTES + 4096)
        libc = ctypes.CDLL(None, use_errno=True)
        options = f"fd={self._fuse},rootmode=100600,user_id=0,group_id=0".encode()
        if libc.mount(b"fuse-disk", mountpoint.encode(), b"fuse", _MS_NOSUID | _MS_NODEV, options):
            raise OSError(ctypes.get_errno(), "mount of the disk")

    def serve(self) -> None:
        """Until it is unmounted, or the one who gives orders is gone."""
        print("ready", flush=True)
        poll = select.poll()
        poll.register(self._fuse, select.POLLIN)
        poll.register(0, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if not (self._answer() if fd == self._fuse else self._obey()):
                    return

    # --- orders

    def _obey(self) -> bool:
        line = os.read(0, 65536)  # orders are given one at a time
        if not line:
            return False
        order = json.loads(line)
        if order["do"] == "hang":
            signal.alarm(order["life_s"])
            signal.pause()
        if order["do"] == "fail":
            self._faults.append(Fault(order["on"], bytes.fromhex(order["needle"]), order["times"]))
        hits = sum(fault.hits for fault in self._faults)
        if order["do"] == "heal":
            self._faults = []
        print(hits, flush=True)
        return True

    def _fails(self, on: str, data: bytes | memoryview = b"") -> bool:
        return any(fault.strikes(on, data) for fault in self._faults)

    # --- requests

    def _answer(self) -> bool:
        try:
            length = os.readv(self._fuse, [self._buffer])
        except OSError as e:
            if e.errno in {errno.EAGAIN, errno.EINTR, errno.ENOENT}:  # the request was taken back
                return True
            if e.errno == errno.ENODEV:  # unmounted
                return False
            raise
        _, opcode, unique, *_ = _IN_HEADER.unpack_from(self._buffer)
        if opcode in {Opcode.FORGET, Opcode.BATCH_FORGET}:
            return True
        request = Request(opcode, unique, memoryview(self._buffer)[_IN_HEADER.size : length])
        try:
            self._reply(request, 0, self._do(request))
        except OSError as e:
            self._reply(request, e.errno or errno.EIO, b"")
        return True

    def _reply(self, request: Request, error: int, body: bytes) -> None:
        header = _OUT_HEADER.pack(_OUT_HEADER.size + len(body), -error, request.unique)
        try:
            os.writev(self._fuse, [header, body])
        except OSError as e:
            if e.errno not in {errno.ENOENT, errno.ENODEV}:  # nobody waits for it any more
                raise

    def _do(self, request: Request) -> bytes:
        match request.opcode:
            case Opcode.READ:
                return self._read(request.body)
            case Opcode.WRITE:
                return self._write(request.body)
            case Opcode.FSYNC:
                return self._flush()
            case Opcode.INIT:
                return self._init(request.body)
            case Opcode.GETATTR:
                return self._attributes()
            case Opcode.OPEN:
                return _OPEN_OUT.pack(0, _FOPEN_DIRECT_IO, 0)
            case Opcode.RELEASE | Opcode.DESTROY:
                return b""
            case _:
                raise OSError(errno.ENOSYS, "no such thing on this disk")

    def _init(self, body: memoryview) -> bytes:
        major, minor, readahead, flags = _INIT_IN.unpack_from(body)
        return _INIT_OUT.pack(
            major, min(minor, _MINOR), readahead, flags & _MAX_PAGES_GIVEN, 16, 12, _MAX_WRITE_BYTES, 1,
            _MAX_WRITE_BYTES // 4096, 0, 0,
        )  # fmt: skip

    def _attributes(self) -> bytes:
        times = (0,) * 6
        return _ATTR_OUT.pack(
            3600, 0, 0, 1, self._size, self._size // 512, *times, 0o100600, 1, 0, 0, 0, 4096, 0
        )

    def _read(self, body: memoryview) -> bytes:
        _, offset, size, *_ = _DATA_IN.unpack_from(body)
        data = os.pread(self._image, size, offset)
        if self._fails("read", data):
            raise OSError(errno.EIO, "told to fail")
        return data

    def _write(self, body: memoryview) -> bytes:
        _, offset, size, *_ = _DATA_IN.unpack_from(body)
        data = body[_DATA_IN.size : _DATA_IN.size + size]
        if self._fails("write", data):
            raise OSError(errno.EIO, "told to fail")
        os.pwrite(self._image, data, offset)
        self._record(WRITE, offset, data)
        return _WRITE_OUT.pack(size, 0)

    def _flush(self) -> bytes:
        if self._fails("flush"):
            raise OSError(errno.EIO, "told to fail")
        self._record(FLUSH, 0, memoryview(b""))
        return b""

    def _record(self, kind: int, offset: int, data: memoryview) -> None:
        noted = os.fstat(self._notes).st_size
        os.writev(self._log, [RECORD.pack(kind, len(data), offset, noted), data])


if __name__ == "__main__":
    # Who waits for a hung disk can not be killed: at the end of its time the server dies by itself, and
    # with it the connection; everyone then gets an error.
    signal.alarm(int(sys.argv[5]))
    Server(*sys.argv[1:5]).serve()
