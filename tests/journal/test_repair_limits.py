"""repair, where memory is short, and where the disk fails to read."""

from __future__ import annotations

import errno
import os
import subprocess
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mmapwal import Durability, SnapshotStore, repair
from mmapwal import format as fmt
from mmapwal.storage import Directory
from mmapwal.testing import Call, InterposedDirectory

from .files import Home, bytes_of, change_superblock, entry_frames, flip, read, superblock_of
from .test_repair import SIZES, opened


def rotten(home: Home) -> Directory:
    """A journal in three segments, with damage in the second."""
    with home.open(**SIZES) as journal:
        for n in range(1, 61):
            journal.append(b"%02d" % n * 200)
    directory = home.directory()
    frame = entry_frames(directory)[40]
    flip(directory, frame.name, frame.payload_at)
    return directory


# --- how much memory it takes ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mapped"], indirect=True)
@pytest.mark.parametrize("dry_run", [True, False])
def test_one_segment_is_in_memory_at_a_time_however_many_are_damaged(home: Home, dry_run: bool) -> None:
    size = 4 << 20
    with home.open(slots=1024, segment_bytes=size, durability=Durability.OS) as journal:
        for n in range(1, 61):
            journal.append(bytes([n]) * 1_000_000)
    directory = home.directory()
    segments = {f.name: f for f in entry_frames(directory).values()}
    assert len(segments) >= 15
    for frame in segments.values():
        file = directory.open(frame.name, writable=True)
        file.write_at(frame.payload_at, b"?")
        file.close()
    tracemalloc.start()
    try:
        assert len(repair(home.directory(), dry_run=dry_run).dropped) == len(segments)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * size


@pytest.mark.parametrize("kind", ["mapped"], indirect=True)
def test_a_segment_too_large_for_memory_is_an_oserror_and_nothing_changes(
    home: Home, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    directory = rotten(home)
    *segments, last = superblock_of(directory).segments
    large = replace(last, capacity=fmt.CAPACITY_MAX)
    change_superblock(directory, segments=(*segments, large), seal=None)
    before = bytes_of(directory)
    done = run_python(
        "import pathlib, resource, sys\n"
        "from mmapwal import repair\n"
        "pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])\n"
        "room = pages * resource.getpagesize() + (1 << 30)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (room, room))\n"
        "for dry_run in (True, False):\n"
        "    try: print(repair(sys.argv[1], dry_run=dry_run))\n"
        "    except OSError as e: print(e.errno, e.filename)\n",
        home.path,
    )
    assert done.stdout == f"{errno.ENOMEM} {last.name}\n" * 2, done.stderr
    assert bytes_of(home.directory()) == before


# --- a disk that fails to read --------------------------------------------------------------------------


class Unreadable(InterposedDirectory):
    """A file of which a sector cannot be read, nor seen in a mapping; who maps a segment reads its frames."""

    def __init__(self, inner: Directory, name: str, sector_at: int) -> None:
        super().__init__(inner)
        self.name, self.sector_at = name, sector_at

    def wrap_directory(self, inner: Directory) -> InterposedDirectory:
        return Unreadable(inner, self.name, self.sector_at)

    def intercept(self, call: Call) -> Any:
        found = call.run()
        if call.name == self.name and call.kind in {"read", "view", "shared"}:
            start = fmt.PAGE_BYTES if call.kind == "view" else call.offset
            if start < self.sector_at + 512 and call.offset + len(found) > self.sector_at:
                raise OSError(errno.EIO, os.strerror(errno.EIO), call.name)
        return found


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("row", "at"), [(1, 0), (1, 512), (1, 8192), (1, 15872), (2, 4608), (0, 8704)], ids=str
)
def test_what_cannot_be_read_is_not_left_out_and_its_file_and_byte_are_told(
    home: Home, row: int, at: int, dry_run: bool
) -> None:
    directory = rotten(home)
    name = superblock_of(directory).segments[row].name
    before = bytes_of(directory)
    with pytest.raises(OSError, match=rf"at byte {at}: .*repair the copy.*{name}") as raised:
        repair(Unreadable(home.directory(), name, at), dry_run=dry_run)
    assert raised.value.errno == errno.EIO
    assert bytes_of(home.directory()) == before
    repair(home.directory())  # with the disk well again
    assert len(opened(home)) == 59


@pytest.mark.parametrize("name", [fmt.SUPERBLOCK_NAME, fmt.INDEX_NAME, "snapshot-00000000000000000010"])
def test_another_file_that_cannot_be_read_is_told_with_its_byte_as_well(home: Home, name: str) -> None:
    directory = rotten(home)
    with SnapshotStore("snapshots", storage=directory.subdirectory(fmt.SNAPSHOTS_NAME)) as store:
        snapshot = store.save(10, b"x" * 9000)
    change_superblock(directory, watermark=10, pairing=(10, snapshot.checksum), seal=None)
    names = [r.name for r in superblock_of(directory).segments] + [fmt.SUPERBLOCK_NAME]
    before = [read(directory, n) for n in names]
    with pytest.raises(OSError, match=rf"at byte 0: .*repair the copy.*{name}"):
        repair(Unreadable(home.directory(), name, 0))
    assert [read(home.directory(), n) for n in names] == before
