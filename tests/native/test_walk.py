"""The walk of a follower gives what lies in order up to its limit; a wake-up takes no more than that."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from mmapwal._native import ffi, lib
from mmapwal.columns import Room

from .frames import BASE, SALT, Chain, Ground

ROWS = 8
SEQUENCE = 7
PAYLOADS = [b"first", b"", b"third" * 30, b"fourth"]


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    ground = Ground(1 << 16)
    yield ground
    ground.close()


class Walk:
    """struct mw_walk over a chain of entries 1, 2, ..., and a page that tells how far they are."""

    def __init__(self, ground: Ground, **fields: Any) -> None:
        chain = Chain()
        self.ends = [chain.add(p, op=n, kind=n, timestamp_ns=10 * n).end for n, p in enumerate(PAYLOADS, 1)]
        self.native = ffi.new(
            "struct mw_walk *",
            {"frames": ground.put(chain.raw), "base_lsn": BASE, "capacity": len(chain.raw), "salt": SALT}
            | {"lsn": BASE, "limit_lsn": 2**63}
            | fields,
        )
        self.room = Room(ROWS)
        self.page = ffi.new("struct mw_index_header *", {"wake": 1, "superblock_sequence": SEQUENCE})
        self.tell(written=self.ends[3], durable=self.ends[3])

    def tell(self, *, written: int, durable: int) -> None:
        progress = self.page.progress[1]
        progress.written_lsn, progress.durable_lsn, progress.sequence = written, durable, self.page.wake
        progress.check = lib.mw_crc32c(self.page.salt, ffi.addressof(progress), 28)

    def run(self) -> int:
        return int(lib.mw_walk(self.native, self.room.native, ROWS))

    def take(self, how: str, **fields: Any) -> Any:
        """struct mw_next, after a wait that something had come before already."""
        following = ffi.new(
            "struct mw_next *",
            {"walk": self.native, "out": self.room.native, "max": ROWS, "superblock_sequence": SEQUENCE}
            | fields,
        )
        seen = self.page.wake - 1
        if how == "spins":
            assert lib.mw_follow_spin(self.page, seen, 10**9, following) == 1
        else:
            assert lib.mw_follow_wait(self.page, seen, 10**9, 10**9, 1, following) == 1
        return following


both = pytest.mark.parametrize("how", ["spins", "sleeps"])


@both
def test_a_wake_up_gives_what_the_walk_gives_up_to_what_is_told(ground: Ground, how: str) -> None:
    walk = Walk(ground)
    walk.tell(written=walk.ends[2], durable=walk.ends[1])
    taken = walk.take(how)
    assert (taken.count, taken.lsn, taken.durable_lsn) == (2, walk.ends[1], walk.ends[1])
    first = (taken.op, taken.end - taken.start, taken.timestamp_ns, taken.kind)
    assert first == (1, len(PAYLOADS[0]), 10, 1)
    assert walk.room.op[:2].tolist() == [1, 2]
    taken = walk.take(how, written=1)  # it goes on where it was
    assert (taken.count, taken.op, taken.lsn, taken.durable_lsn) == (0, 0, 0, 0)  # up to the limit of before
    walk.native.limit_lsn = 2**63
    taken = walk.take(how, written=1)
    assert (taken.count, taken.op, taken.lsn, taken.durable_lsn) == (1, 3, walk.ends[2], walk.ends[1])


@both
def test_nothing_is_taken_by_another_superblock_or_what_does_not_verify(ground: Ground, how: str) -> None:
    walk = Walk(ground)
    for sequence in (SEQUENCE - 1, SEQUENCE + 1):
        assert walk.take(how, superblock_sequence=sequence).count == 0
    walk.page.progress[1].durable_lsn -= 8
    assert walk.take(how).count == 0
    assert walk.native.lsn == BASE
    walk.page.progress[1].durable_lsn += 8
    assert walk.take(how).count == 4


@both
@pytest.mark.parametrize("lsn", [0, BASE - 8, BASE + 1, BASE + 4])
def test_a_place_that_is_none_is_refused_and_nothing_is_taken_there(
    ground: Ground, how: str, lsn: int
) -> None:
    walk = Walk(ground, lsn=lsn)
    assert walk.run() == -errno.EINVAL
    assert walk.take(how).count == 0


@both
def test_what_the_disk_fails_to_show_is_told_by_a_walk_and_nothing_is_taken(ground: Ground, how: str) -> None:
    walk = Walk(ground)
    walk.native.capacity *= 2  # what is behind the end is a SIGBUS
    walk.tell(written=2**62, durable=2**62)
    assert walk.take(how).count == 0
    walk.native.lsn, walk.native.limit_lsn = BASE, 2**63
    assert walk.run() == 4  # all before it counts
    assert (walk.native.failed, walk.native.lsn) == (-errno.EIO, walk.ends[3])


@both
def test_who_waits_in_vain_takes_nothing(ground: Ground, how: str) -> None:
    walk = Walk(ground)
    following = ffi.new("struct mw_next *", {"walk": walk.native, "out": walk.room.native, "max": ROWS})
    if how == "spins":
        assert lib.mw_follow_spin(walk.page, walk.page.wake, 1000, following) == 0
    else:
        assert lib.mw_follow_wait(walk.page, walk.page.wake, 1000, 0, 1, following) == -errno.ETIMEDOUT
    assert (following.count, walk.native.lsn) == (0, BASE)


def test_a_wait_that_something_ends_late_was_not_soon(ground: Ground) -> None:
    walk = Walk(ground)
    assert lib.mw_follow_wait(walk.page, walk.page.wake - 1, 10**9, 0, 1, ffi.NULL) == 0
