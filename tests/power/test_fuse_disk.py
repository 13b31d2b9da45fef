"""The disk of the power tests: flushes and forced writes reach it in order, and it cannot hang a test."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from .fuse_disk import FuseDisk, fuse_disk
from .fuse_server import FLUSH, WRITE
from .torn_images import SECTOR_BYTES, Event, TornImages, read_log

KINDS = ["ext4", "xfs", "btrfs"]
OLD, NEW = b"o" * 4096, b"n" * 4096


@pytest.fixture
def page() -> Iterator[mmap.mmap]:
    """A page of NEW that is aligned, as direct I/O wants it."""
    with mmap.mmap(-1, 4096) as page:
        page.write(NEW)
        yield page


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def done_since(disk: FuseDisk, before: int) -> list[tuple[int, int, bytes]]:
    return [(e.kind, e.offset, e.data) for e in read_log(disk.log)[before:]]


@pytest.mark.power
def test_a_flush_of_the_device_reaches_the_server_behind_the_writes_before_it(
    tmp_path: Path, page: mmap.mmap
) -> None:
    with fuse_disk(None, tmp_path) as disk, opened(disk.device, os.O_RDWR | os.O_DIRECT) as fd:
        before = len(read_log(disk.log))
        os.pwrite(fd, page, 8192)
        assert done_since(disk, before) == [(WRITE, 8192, NEW)]
        os.fdatasync(fd)
        assert done_since(disk, before) == [(WRITE, 8192, NEW), (FLUSH, 0, b"")]


@pytest.mark.power
def test_a_forced_write_is_followed_by_a_flush_before_it_returns(tmp_path: Path, page: mmap.mmap) -> None:
    with fuse_disk(None, tmp_path) as disk, opened(disk.device, os.O_RDWR | os.O_DIRECT | os.O_DSYNC) as fd:
        before = len(read_log(disk.log))
        os.pwrite(fd, page, 4096)
        written, *flushed = done_since(disk, before)
        assert written == (WRITE, 4096, NEW)
        assert flushed and set(flushed) == {(FLUSH, 0, b"")}


@pytest.mark.power
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["fdatasync", "dsync", "msync"])
def test_what_a_file_system_calls_synced_is_written_and_then_flushed(
    tmp_path: Path, kind: str, how: str
) -> None:
    with fuse_disk(kind, tmp_path) as disk, disk.mounted() as path:
        with opened(path / "f", os.O_RDWR | os.O_CREAT | (os.O_DSYNC if how == "dsync" else 0)) as fd:
            os.write(fd, OLD * 4)
            os.fsync(fd)
            before = len(read_log(disk.log))
            if how == "msync":
                with mmap.mmap(fd, 16384) as mapped:
                    mapped[4096:8192] = NEW
                    mapped.flush()
            else:
                os.pwrite(fd, NEW, 4096)
            if how == "fdatasync":
                os.fdatasync(fd)
            done = read_log(disk.log)[before:]
        written = [n for n, e in enumerate(done) if e.kind == WRITE and NEW in e.data]
        flushed = [n for n, e in enumerate(done) if e.kind == FLUSH]
        assert written and flushed and flushed[-1] > written[0]


@pytest.mark.power
def test_each_record_says_how_long_the_notes_were_at_that_time(tmp_path: Path, page: mmap.mmap) -> None:
    with fuse_disk(None, tmp_path) as disk, opened(disk.device, os.O_RDWR | os.O_DIRECT) as fd:
        before = len(read_log(disk.log))
        with disk.notes.open("ab", buffering=0) as notes:
            for note in (b"one ", b"two "):
                os.pwrite(fd, page, 0)
                notes.write(note)
            os.fdatasync(fd)
        assert [e.noted for e in read_log(disk.log)[before:]] == [0, 4, 8]


@pytest.mark.power
def test_what_was_told_to_fail_fails_as_often_as_it_was_told_and_changes_nothing(
    tmp_path: Path, page: mmap.mmap
) -> None:
    with fuse_disk(None, tmp_path) as disk, opened(disk.device, os.O_RDWR | os.O_DIRECT) as fd:
        before = len(read_log(disk.log))
        disk.fail("write", b"nn", times=2)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output") as caught:
                os.pwrite(fd, page, 4096)
            assert caught.value.errno == errno.EIO
        assert disk.failures() == 2
        os.pwrite(fd, page, 4096)
        disk.fail("flush", times=1)
        with pytest.raises(OSError, match="Input/output"):
            os.fdatasync(fd)
        os.fdatasync(fd)
        disk.fail("read", b"nn")
        os.preadv(fd, [page], 0)
        with pytest.raises(OSError, match="Input/output"):
            os.preadv(fd, [page], 4096)
        assert disk.heal() == 4
        os.preadv(fd, [page], 4096)
        assert page[:] == NEW
        assert done_since(disk, before) == [(WRITE, 4096, NEW), (FLUSH, 0, b"")]


@pytest.mark.power
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_hangs_ends_by_itself_and_leaves_nothing_behind(tmp_path: Path, kind: str) -> None:
    with fuse_disk(kind, tmp_path) as disk:
        with (
            disk.mounted() as path,
            opened(path / "f", os.O_RDWR | os.O_CREAT) as fd,
        ):
            os.write(fd, NEW)
            disk.hang(life_s=2)
            with pytest.raises(OSError, match=r"Input/output|Read-only"):
                os.fsync(fd)
        sequence = Path(f"/sys/block/{disk.device.name}/diskseq")  # another one with each use of the device
        used = sequence.read_text()
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    assert not sequence.exists() or sequence.read_text() != used


# --- images ------------------------------------------------------------------------------------------


@pytest.fixture
def make_image(tmp_path: Path) -> Callable[..., bytes]:
    """`make_image(events, instant, seed)`: one image of a disk of four sectors, zeros at first."""

    def make(events: list[Event], instant: int, seed: int, trusted: int | None = None) -> bytes:
        base = tmp_path / "base"
        base.write_bytes(bytes(4 * SECTOR_BYTES))
        TornImages(base, events, uuid4()).make(
            tmp_path / "image", instant, random.Random(seed), trusted=trusted
        )
        return (tmp_path / "image").read_bytes()

    return make


def write(sector: int, letters: bytes) -> Event:
    return Event(WRITE, sector * SECTOR_BYTES, b"".join(bytes([c]) * SECTOR_BYTES for c in letters), 0)


FLUSHED = Event(FLUSH, 0, b"", 0)
STORY = [write(0, b"abcd"), FLUSHED, write(1, b"BC"), write(2, b"Z"), FLUSHED, write(3, b"D")]


def letters(image: bytes) -> bytes:
    sectors = [image[at : at + SECTOR_BYTES] for at in range(0, len(image), SECTOR_BYTES)]
    assert all(s == s[:1] * SECTOR_BYTES for s in sectors)  # a sector is never torn
    return b"".join(s[:1] for s in sectors)


def test_an_image_has_all_that_was_flushed_and_any_version_of_each_sector_written_since(
    make_image: Callable[..., bytes],
) -> None:
    seen = {letters(make_image(STORY, 4, seed)) for seed in range(200)}
    assert seen == {b"a" + b + c + b"d" for b in (b"b", b"B") for c in (b"c", b"C", b"Z")}
    assert {letters(make_image(STORY, 5, seed)) for seed in range(50)} == {b"aBZd"}
    assert {letters(make_image(STORY, 6, seed)) for seed in range(50)} == {b"aBZd", b"aBZD"}


def test_a_disk_that_lies_keeps_only_what_it_flushed_while_it_told_the_truth(
    make_image: Callable[..., bytes],
) -> None:
    seen = {letters(make_image(STORY, 6, seed, 2)) for seed in range(300)}
    assert seen == {b"a" + b + c + d for b in (b"b", b"B") for c in (b"c", b"C", b"Z") for d in (b"d", b"D")}


def test_a_block_that_names_its_file_system_is_there_whole_in_one_version(tmp_path: Path) -> None:
    uuid = uuid4()
    blocks = [(bytes([n]) * 32 + uuid.bytes).ljust(4096, bytes([n])) for n in (1, 2, 3)]
    seen = set()
    for seed in range(100):
        base, image = tmp_path / "base", tmp_path / "image"
        base.write_bytes(blocks[0])
        torn = TornImages(base, [Event(WRITE, 0, blocks[1], 0), Event(WRITE, 0, blocks[2], 0)], uuid)
        torn.make(image, 2, random.Random(seed))
        seen.add(image.read_bytes())
    assert seen == set(blocks)
