"""Random journals: any calls in any order, some of which fail, kills and power cuts, life after life.

A failure names its seed, and all that was done: ``RandomLife(seed).run()`` does it again.
"""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from mmapwal import (
    DuplicateOpError,
    Durability,
    JournalError,
    JournalFullError,
    StaleOpError,
    SyncMethod,
)
from mmapwal import format as fmt
from mmapwal.storage import Directory
from mmapwal.testing import CrashDisk, Fault, FaultDirectory, When
from mmapwal.verify import UNREADABLE

from .story import Contents, Note, Story, check, close_dead, contents_of

REFUSALS = (DuplicateOpError, StaleOpError, JournalFullError)
SIZES = [0, 1, 60, 400, 456, 900, 1400, 3000, 6000, 14000]
LIVES = 8


def may_refuse(contents: Contents, slots: int, first: int, count: int, *, replace: bool) -> bool:
    """Whether an append of these ops has to be refused, by what is live."""
    taken = {op % slots: op for op in contents.entries}
    for op in range(first, first + count):
        if op <= contents.watermark or (op in contents.entries and not replace):
            return True
        if taken.setdefault(op % slots, op) != op:
            return True
    return False


class RandomLife:
    """One disk, one seed: lives follow each other on it."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        align = rng.choice([0, 0, 0, 512, 512, 4096])
        method = rng.choice([SyncMethod.DSYNC, SyncMethod.FDATASYNC, SyncMethod.MSYNC])
        self.disk = CrashDisk(sync_method=method, damage=align > 0 and rng.random() < 0.5)
        self.slots = rng.choice([16, 16, 16, 3, 64])
        self.removals_max = rng.choice([fmt.REMOVALS_MAX, 3])
        self.options: dict[str, Any] = {"commit_align_bytes": align, "slots": self.slots}
        self.notes: list[tuple[int, Note]] = []  # with the number of effects before each
        self.journals: list[Any] = []
        self.log: list[str] = []
        self.tag = 0

    def payload(self) -> bytes:
        self.tag += 1
        return (b"%d." % self.tag * 4000)[: self.rng.choice(SIZES)]

    def earlier(self) -> list[Note]:
        return [note for _, note in self.notes]

    # --- one action each

    def append(self, story: Story) -> None:
        rng, now = self.rng, story.expected.now
        replace = rng.random() < 0.2
        op = None if rng.random() < 0.6 else max(1, now.next_op() + rng.randrange(-8, 12))
        first = now.next_op() if op is None else op
        self.say("append", op, replace)
        if may_refuse(now, self.slots, first, 1, replace=replace):
            with pytest.raises(REFUSALS):
                story.journal.append(b"refused", op=op, replace=replace)
        else:
            story.append(self.payload(), op=op, replace=replace, kind=rng.randrange(3))

    def append_many(self, story: Story) -> None:
        rng, now = self.rng, story.expected.now
        payloads = [self.payload()[: 12000 // 4] for _ in range(rng.randrange(1, 5))]
        first = None if rng.random() < 0.7 else max(1, now.next_op() + rng.randrange(-6, 8))
        self.say("append_many", first, [len(p) for p in payloads])
        start = now.next_op() if first is None else first
        if may_refuse(now, self.slots, start, len(payloads), replace=False):
            with pytest.raises(REFUSALS):
                story.journal.append_many(payloads, first_op=first)
        else:
            story.append_many(payloads, first_op=first)

    def drain(self, story: Story) -> None:
        now = story.expected.now
        first = self.rng.randrange(1, now.next_op() + 3)
        last = first + self.rng.randrange(0, 6)
        self.say("drain", first, last)
        story.drain(first, last)

    def truncate_from(self, story: Story) -> None:
        now = story.expected.now
        op = self.rng.randrange(now.watermark + 1, now.next_op() + 2)
        self.say("truncate_from", op)
        story.truncate_from(op)

    def set_snapshot_op(self, story: Story) -> None:
        now = story.expected.now
        op = now.watermark + self.rng.randrange(0, 8)
        self.say("set_snapshot_op", op)
        story.set_snapshot_op(op)

    def compact(self, story: Story) -> None:
        self.say("compact")
        story.compact()

    def sync(self, story: Story) -> None:
        self.say("sync")
        story.sync()

    def user_data(self, story: Story) -> None:
        self.say("user data")
        story.set_user_data(b"%d" % self.rng.randrange(100))

    def verify(self, story: Story) -> None:
        self.say("verify")
        report = story.journal.verify()
        if report.problems and all(p.reason == UNREADABLE for p in report.problems):
            raise OSError(errno.EIO, "told as a problem")  # as act() knows: by a fault alone
        assert report.ok, report.problems

    # --- lives

    def say(self, *words: object) -> None:
        self.log.append(" ".join(map(str, words)))

    def fault(self) -> Fault | None:
        rng = self.rng
        if rng.random() < 0.6:
            return None
        code, when = rng.choice([errno.EIO, errno.ENOSPC, errno.EDQUOT]), rng.choice(list(When))
        return Fault(rng.randrange(1, 150), error=code, when=when, times=rng.choice([1, 1, 3]))

    def live(self) -> None:
        """Opens, does this and that, ends somehow."""
        rng, fault = self.rng, self.fault()
        wrap: Callable[[Directory], Directory] = lambda d: d if fault is None else FaultDirectory(d, fault)  # noqa: E731
        durability = rng.choice([Durability.SYNC, Durability.SYNC, Durability.OS, Durability.BUFFERED])
        began = self.disk.observe()
        self.say(f"--- a life with {durability}, {fault}")
        earlier = self.earlier()
        if earlier:
            self.notes = [(0, note) for note in earlier]

        def tell(note: Note) -> None:
            self.notes.append((self.disk.observe(), note))

        try:
            story = Story(self.disk, tell, earlier, wrap=wrap, durability=durability, **self.options)
        except (OSError, JournalError) as e:
            self.say("opening failed:", type(e).__name__, e)
            if fault is None or not fault.struck:
                raise
            self.end(None, began)
            return
        self.journals.append(story.journal)
        self.act(story, fault)
        self.end(story, began)

    def act(self, story: Story, fault: Fault | None) -> None:
        actions = [self.append] * 8 + [self.append_many] * 3 + [self.drain, self.truncate_from, self.compact]
        actions += [self.set_snapshot_op] * 2 + [self.sync, self.user_data, self.verify]
        for _ in range(self.rng.randrange(1, 25)):
            try:
                self.rng.choice(actions)(story)
                assert contents_of(story.journal) == story.expected.now
            except (OSError, JournalError) as e:
                self.say("   ", type(e).__name__, e)
                if fault is None or not fault.struck:
                    raise
            if story.journal.poisoned is not None:
                self.say("    poisoned")
                return

    def end(self, story: Story | None, began: int) -> None:
        how = self.rng.choice(["close", "kill", "cut", "cut", "cut"])
        if how == "close" and story is not None and story.journal.poisoned is None:
            self.say("close")
            try:
                story.close()
            except (OSError, JournalError) as e:
                self.say("   ", type(e).__name__, e)
        elif how == "cut":
            self.cut(began)
            return
        self.say("kill")
        self.disk = self.disk.kill()
        if story is not None:
            close_dead(story.journal)

    def cut(self, began: int) -> None:
        after = self.rng.randrange(began, self.disk.observe() + 1)
        some = itertools.islice(
            self.disk.crash_states(after, seed=self.rng.randrange(1 << 30), max_states=12), 40
        )
        self.notes = [(n, note) for n, note in self.notes if n <= after]
        state = self.rng.choice(list(some))
        self.say(f"power cut after effect {after}, lost: {list(state.lost)}")
        self.disk.kill()
        self.disk = state

    def run(self) -> None:
        with mock.patch.object(fmt, "REMOVALS_MAX", self.removals_max):
            self._run()

    def _run(self) -> None:
        try:
            for _ in range(LIVES):
                self.live()
            check(self.disk.kill(), self.earlier(), **self.options)
        except Exception as e:
            raise AssertionError("\n".join([f"{type(e).__name__}: {e}", *self.log])) from e
        finally:
            self.disk.kill()
            for journal in self.journals:
                close_dead(journal)


@pytest.mark.parametrize("block", range(4))
def test_random_lives_lose_nothing(block: int, crash_states: int, tally: Callable[[str, int], None]) -> None:
    seeds = range(block, crash_states // 2, 4)
    tally("random journals of eight lives", len(seeds))
    for seed in seeds:
        try:
            RandomLife(seed).run()
        except AssertionError as e:
            raise AssertionError(f"seed {seed}: {e}") from e
