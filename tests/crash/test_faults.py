"""Every call on the seam fails once: a typed error, a journal that is usable or poisoned, nothing lost."""

from __future__ import annotations

import errno
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mmapwal import Durability, Journal, JournalError, PoisonedError, SyncMethod
from mmapwal.testing import CrashDisk, Fault, FaultDirectory, When, assert_crash_safe, every_fault

from .story import OPTIONS, Contents, Note, Story, check, close_dead, contents_of, find, told

FAULTS = [(error, when) for error in (errno.EIO, errno.ENOSPC) for when in When]
KINDS = {When.SHORT: {"write", "write_sync"}, When.UNSYNCED: {"write_sync"}}  # others then fail as BEFORE


def _parametrize(faults: list[tuple[int, When]]) -> pytest.MarkDecorator:
    names = [f"{errno.errorcode[error]}-{when.value}" for error, when in faults]
    return pytest.mark.parametrize(("error", "when"), faults, ids=names)


parametrize_faults = _parametrize(FAULTS)
parametrize_faults_of_a_write_and_a_sync = _parametrize([f for f in FAULTS if f[1] is not When.UNSYNCED])
Step = Callable[[Story], Any]

STEPS: list[Step] = [
    lambda s: s.append(b"one" * 30),
    lambda s: s.append_many([b"two" * 200, b"three", b"four" * 400]),
    lambda s: s.append(b"five" * 1200),
    lambda s: s.append(b"six" * 1400),
    lambda s: s.append(b"seven" * 900),
    lambda s: s.drain(2, 3),
    lambda s: s.append(b"two again", op=2, replace=True),
    lambda s: s.append(b"large" * 3000),
    lambda s: s.truncate_from(7),
    lambda s: s.append(b"seven again" * 100),
    lambda s: s.set_snapshot_op(4),
    lambda s: s.compact(),
    lambda s: s.set_user_data(b"term"),
    lambda s: s.append_many([b"last"] * 3),
    lambda s: s.append(b"fill" * 2000),
    lambda s: s.append(b"fill" * 1000),
    lambda s: s.append(b"last" * 100),
    lambda s: s.drain(s.expected.now.next_op() - 3, s.expected.now.next_op() - 2),
    lambda s: s.compact(),
    lambda s: s.sync(),
]


def operation(step: Step) -> str:
    """What a step does: the method of Story that it begins with."""
    return step.__code__.co_names[0]


class FaultyLife:
    """Steps on a disk with one failing call; what they come to is held against what was promised."""

    def __init__(self, fault: Fault, disk: CrashDisk | None = None, **options: Any) -> None:
        self.fault = fault
        self.notes: list[Note] = []
        self.disk = disk or CrashDisk()
        self.story: Story | None = None
        self.options = options
        self.operation = ""
        """What the failing call was part of."""

    def run(self, steps: list[Step]) -> None:
        try:
            self.story = Story(
                self.disk, self.notes.append, wrap=lambda d: FaultDirectory(d, self.fault), **self.options
            )
        except (JournalError, OSError) as e:
            self.check_error(e)
            self.operation = "open"
            return
        if self.fault.struck:
            self.operation = "open"
        for step in steps:
            try:
                step(self.story)
            except (JournalError, OSError) as e:
                self.check_error(e)
            if not self.fault.struck:
                continue
            self.operation = self.operation or operation(step)
            if self.story.journal.poisoned is None:
                self.check_usable()
            if self.story.journal.poisoned is not None:
                self.check_poisoned()
                return
        try:
            self.story.close()
        except (JournalError, OSError) as e:
            self.check_error(e)
        if self.fault.struck:
            self.operation = self.operation or "close"

    def check_error(self, error: Exception) -> None:
        """It says what happened: the error of the disk, or one that has it as its cause."""
        assert self.fault.struck, error
        if not isinstance(error, OSError):
            assert isinstance(error, JournalError)
            error = error.__cause__  # type: ignore[assignment]
        assert isinstance(error, OSError), error
        assert error.errno == self.fault.error, error

    def check_poisoned(self) -> None:
        assert self.story is not None
        journal = self.story.journal
        for call in (
            lambda: journal.append(b"x"),
            journal.sync,
            journal.compact,
            lambda: journal.drain(1, 9),
        ):
            with pytest.raises(PoisonedError) as caught:
                call()
            assert caught.value.stage
            assert isinstance(caught.value.__cause__, OSError)

    def check_usable(self) -> None:
        assert self.story is not None
        try:
            found = contents_of(self.story.journal)
        except (JournalError, OSError) as e:
            self.check_error(e)
            if self.fault.times is None or self.story.journal.poisoned is not None:
                return  # reading hands buffered entries to a disk that is full, or fails
            found = contents_of(self.story.journal)
        assert found == self.story.expected.now

    def end(self) -> None:
        if self.story is not None:
            close_dead(self.story.journal)


@pytest.fixture
def lives() -> Iterator[list[FaultyLife]]:
    made: list[FaultyLife] = []
    yield made
    for life in made:
        life.end()


def start(lives: list[FaultyLife], fault: Fault, **options: Any) -> FaultyLife:
    lives.append(FaultyLife(fault, **options))
    return lives[-1]


Tally = Callable[[str, int], None]


@parametrize_faults
def test_whatever_call_fails_nothing_acknowledged_is_lost(
    error: int, when: When, lives: list[FaultyLife], tally: Tally
) -> None:
    """After the failure: opened again in the same boot, and after a power cut."""
    live_with_each_fault(lives, tally, error, when, SyncMethod.DSYNC, Durability.SYNC)


@parametrize_faults_of_a_write_and_a_sync
def test_the_same_where_a_commit_is_a_write_and_then_a_sync(
    error: int, when: When, lives: list[FaultyLife], tally: Tally
) -> None:
    live_with_each_fault(lives, tally, error, when, SyncMethod.FDATASYNC, Durability.SYNC)


@parametrize_faults_of_a_write_and_a_sync
@pytest.mark.parametrize("durability", [Durability.OS, Durability.BUFFERED])
def test_whatever_call_fails_between_syncs_nothing_synced_is_lost(
    error: int, when: When, durability: Durability, lives: list[FaultyLife], tally: Tally
) -> None:
    live_with_each_fault(lives, tally, error, when, SyncMethod.DSYNC, durability)


def live_with_each_fault(
    lives: list[FaultyLife],
    tally: Tally,
    error: int,
    when: When,
    method: SyncMethod,
    durability: Durability,
) -> None:
    struck: Counter[str] = Counter()
    for fault in every_fault(error=error, when=when, kinds=KINDS.get(when)):
        life = start(lives, fault, disk=CrashDisk(sync_method=method), durability=durability)
        life.run(STEPS)
        check_with(fault, next(life.disk.crash_states(seed=fault.nth)), life.notes)
        life.end()
        check_with(fault, life.disk.kill(), life.notes)
        struck[life.operation] += fault.struck
    for name, count in struck.items():
        if count:
            tally(f"failing calls of {name}", count)
    assert struck.total() > 10
    if when not in KINDS and durability is Durability.SYNC:
        assert {"open", "close", *map(operation, STEPS)} - {"sync"} <= set(+struck)


def check_with(fault: Fault, disk: CrashDisk, notes: list[Note]) -> None:
    try:
        check(disk, notes)
    except Exception as e:
        raise AssertionError(f"after {fault!r}: {type(e).__name__}: {e}") from e


def ended(end: Step) -> tuple[Story, list[Note]]:
    """A journal with removals and a rotation that ended so; before, its tail was not proven."""
    notes: list[Note] = []
    story = Story(CrashDisk(), notes.append, durability=Durability.OS)
    for step in STEPS[:-1]:
        step(story)
    end(story)
    return story, notes


@pytest.mark.parametrize("end", [Story.kill, Story.close])
@parametrize_faults_of_a_write_and_a_sync
def test_whatever_call_fails_while_opening_in_the_same_boot_the_next_open_finds_all(
    error: int, when: When, end: Step, tally: Tally
) -> None:
    for fault in every_fault(error=error, when=when, kinds=KINDS.get(when)):
        story, notes = ended(end)
        open_with(fault, story.disk, notes, story.expected.now)
    tally(f"failing calls of open, after {end.__name__}", fault.nth - 1)
    assert fault.nth > 2


@parametrize_faults_of_a_write_and_a_sync
def test_whatever_call_fails_while_opening_after_a_power_cut_the_next_open_finds_all(
    error: int, when: When, tally: Tally
) -> None:
    story, notes = ended(Story.kill)
    *_, all_of_it = itertools.islice(story.disk.crash_states(), 2)
    for fault in every_fault(error=error, when=when, kinds=KINDS.get(when)):
        copy = next(all_of_it.crash_states())
        open_with(fault, copy, notes, story.expected.now)
    tally("failing calls of open, after a power cut", fault.nth - 1)
    assert fault.nth > 2


def open_with(fault: Fault, disk: CrashDisk, notes: list[Note], wanted: Contents) -> None:
    """It opens and shows all that was written, or says why not; and so does the next open."""
    try:
        journal = Journal("journal", storage=FaultDirectory(disk, fault), **OPTIONS)
    except OSError as e:
        assert fault.struck
        assert e.errno == fault.error
    else:
        notes = [*notes, ("found", wanted)]
        try:
            find(journal, [wanted])
        except OSError as e:
            assert e.errno == fault.error
        finally:
            disk.kill()
            close_dead(journal)
    for state in disk.crash_states(max_states=2, seed=fault.nth):
        check_with(fault, state, notes)
    check_with(fault, disk.kill(), notes)


@pytest.mark.parametrize("durability", list(Durability))
def test_a_disk_that_is_full_for_a_while_is_survived(durability: Durability, lives: list[FaultyLife]) -> None:
    """From the nth write or create on there is no space; then there is, and the journal goes on."""
    kinds = {"write", "write_sync", "create", "truncate"}
    for fault in every_fault(kinds=kinds, error=errno.ENOSPC, when=When.SHORT, times=None):
        disk = CrashDisk(sync_method=SyncMethod.FDATASYNC)
        life = start(lives, fault, disk=disk, durability=durability)
        life.run([*STEPS[:8], lambda s, f=fault: f.lift(), *STEPS[8:]])
        life.end()
        fault.lift()
        check_with(fault, disk.kill(), life.notes)


@pytest.mark.parametrize("when", [When.BEFORE, When.SHORT, When.AFTER])
def test_after_a_write_that_found_no_space_the_journal_goes_on(when: When) -> None:
    """Where a write is apart from its sync: the entry is not there, and its op is taken by the next."""
    fault = Fault(1 << 30, kinds="write", error=errno.ENOSPC, when=when)

    def script(story: Story) -> None:
        story.append(b"one")
        fault.nth = fault.calls + 1
        with pytest.raises(OSError, match="No space left"):
            story.append(b"no room")
        assert story.journal.poisoned is None
        assert 2 not in story.journal
        assert story.append(b"two") == 2
        assert bytes(story.journal.read(2)) == b"two"

    with told(script, wrap=lambda d: FaultDirectory(d, fault)) as scenario:
        assert_crash_safe(scenario, check, disk=CrashDisk(sync_method=SyncMethod.FDATASYNC), max_states=300)


@pytest.mark.parametrize(
    "remove",
    [lambda s: s.truncate_from(2), lambda s: s.drain(2, 9), lambda s: s.set_snapshot_op(1)],
    ids=["truncate_from", "drain", "set_snapshot_op"],
)
def test_what_a_failed_append_left_behind_is_removed_too(remove: Step) -> None:
    """Its frame lies whole behind the tail: it must not come back once a removal was acknowledged."""
    fault = Fault(1 << 30, kinds="write", error=errno.ENOSPC, when=When.AFTER)

    def script(story: Story) -> None:
        story.append(b"one")
        story.append(b"two")
        fault.nth = fault.calls + 1
        with pytest.raises(OSError, match="No space left"):
            story.append(b"no room")
        remove(story)
        story.reopen(kill=True)

    with told(script, wrap=lambda d: FaultDirectory(d, fault)) as scenario:
        assert_crash_safe(scenario, check, disk=CrashDisk(sync_method=SyncMethod.FDATASYNC), max_states=300)


def test_a_compaction_whose_commit_is_unclear_removes_nothing() -> None:
    """The superblock was renamed and is not known to be durable: either generation may be the one."""
    fault = Fault(1 << 30, kinds="dir_sync")

    def script(story: Story) -> None:
        for n in range(8):
            story.append(b"%d" % n * 2000)
        story.drain(2, 4)
        fault.nth = fault.calls + 2  # the first one is of the new generation
        with pytest.raises(PoisonedError, match="directory sync"):
            story.compact()
        story.reopen(kill=True)

    with told(script, wrap=lambda d: FaultDirectory(d, fault)) as scenario:
        assert_crash_safe(scenario, check, max_states=300)


def test_a_sync_that_failed_once_is_never_believed_again() -> None:
    """The second sync of the same pages would succeed and prove nothing: the journal is poisoned, and
    recovery in the same boot writes the tail again before anything is built on it."""
    fault = Fault(1 << 30, kinds={"sync", "write_sync"}, when=When.UNSYNCED)

    def script(story: Story) -> None:
        story.append(b"one" * 200)
        fault.nth = fault.calls + 1
        with pytest.raises(PoisonedError, match="sync of a commit"):
            story.append(b"two" * 200)
        with pytest.raises(PoisonedError):
            story.journal.sync()
        assert 2 not in story.journal
        close_dead(story.journal)
        story.open()
        story.note("found", find(story.journal, story.expected.accepted))
        story.append(b"three")

    for method in (SyncMethod.DSYNC, SyncMethod.FDATASYNC):
        with told(script, wrap=lambda d: FaultDirectory(d, fault)) as scenario:
            assert_crash_safe(scenario, check, disk=CrashDisk(sync_method=method), max_states=300)
