"""The crash explorer itself: it finds known bugs in a toy log, and nothing in the same log without them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from mmapwal.errors import LockedError
from mmapwal.storage import MemoryDirectory, MemoryStorage
from mmapwal.testing import (
    CrashDisk,
    EffectKind,
    Fault,
    FaultDirectory,
    FaultStorage,
    When,
    assert_crash_safe,
    every_fault,
)

from .toy import BUGS, ToyLog, toy_check, toy_scenario


def contents(disk: CrashDisk) -> dict[str, bytes]:
    return {name: disk.open(name).read_at(0, 1 << 20).tobytes() for name in disk.names()}


def states(disk: CrashDisk, after: int | None = None, **options: Any) -> list[dict[str, bytes]]:
    return [contents(state) for state in disk.crash_states(after, **options)]


def durable_file(disk: CrashDisk, name: str, data: bytes) -> Any:
    file = disk.create(name)
    file.write_at(0, data)
    file.sync()
    disk.sync()
    return file


@pytest.fixture
def disk() -> CrashDisk:
    return CrashDisk(name_durable=True)


# --- what a crash may leave ------------------------------------------------------------------------


def test_each_subset_of_unsynced_sectors_is_a_state(disk: CrashDisk) -> None:
    durable_file(disk, "f", b"a" * 1536).write_at(0, b"b" * 1536)
    wanted = {
        b"".join(x * 512 for x in (p, q, r)) for p in (b"a", b"b") for q in (b"a", b"b") for r in (b"a", b"b")
    }
    found = states(disk)
    assert {state["f"] for state in found} == wanted
    assert len(found) == 8


def test_a_sector_may_hold_any_value_since_its_last_sync(disk: CrashDisk) -> None:
    file = durable_file(disk, "f", b"0")
    for value in (b"1", b"2", b"3"):
        file.write_at(0, value)
    assert {state["f"] for state in states(disk)} == {b"0", b"1", b"2", b"3"}
    file.sync()
    assert states(disk) == [{"f": b"3"}]


def test_a_write_beside_older_ones_in_a_sector_carries_them_along(disk: CrashDisk) -> None:
    file = durable_file(disk, "f", b"....")
    file.write_at(0, b"a")
    file.write_sync_at(2, b"c")
    assert states(disk) == [{"f": b"a.c."}]


def test_size_and_data_are_apart(disk: CrashDisk) -> None:
    durable_file(disk, "f", b"a" * 512).write_at(512, b"b" * 512)
    assert {state["f"] for state in states(disk)} == {
        b"a" * 512,
        b"a" * 512 + bytes(512),
        b"a" * 512 + b"b" * 512,
    }


def test_a_truncated_file_may_have_its_old_size_and_old_bytes(disk: CrashDisk) -> None:
    durable_file(disk, "f", b"a" * 1024).truncate(0)
    found = {state["f"] for state in states(disk)}
    assert {b"", b"a" * 1024} <= found
    assert {len(data) for data in found} == {0, 1024}


def test_what_was_cut_off_reads_as_zeros_when_the_file_grows_again(disk: CrashDisk) -> None:
    file = durable_file(disk, "f", b"a" * 10)
    file.truncate(5)
    file.truncate(10)
    file.sync()
    assert states(disk) == [{"f": b"a" * 5 + bytes(5)}]


def test_write_sync_covers_its_own_range_and_the_size_only(disk: CrashDisk) -> None:
    file = durable_file(disk, "f", b"a" * 512)
    file.write_at(0, b"b" * 512)
    file.write_sync_at(512, b"c" * 512)
    assert {state["f"] for state in states(disk)} == {b"a" * 512 + b"c" * 512, b"b" * 512 + b"c" * 512}


def test_before_write_sync_returns_any_part_of_it_may_be_there(disk: CrashDisk) -> None:
    file = durable_file(disk, "f", b"a" * 1024)
    file.write_sync_at(0, b"b" * 1024)
    last = len(disk.effects)
    assert len(states(disk, last - 1)) == 4
    assert len(states(disk, last)) == 1


def test_a_sync_covers_what_was_written_through_the_same_storage_only(disk: CrashDisk) -> None:
    file = durable_file(disk, "f", b"a")
    file.write_at(0, b"b")
    disk.open("f", writable=True).sync()
    assert len(states(disk)) == 2
    file.sync()
    assert states(disk) == [{"f": b"b"}]


def test_after_a_failed_sync_no_later_sync_covers_what_was_not_written_again(disk: CrashDisk) -> None:
    file = durable_file(disk, "f", b"a" * 1024)
    file.write_at(0, b"b" * 1024)
    file.fail_sync()
    file.sync()
    assert len(states(disk)) == 4
    file.write_at(0, b"b" * 512)
    file.sync()
    assert {state["f"] for state in states(disk)} == {b"b" * 512 + b"a" * 512, b"b" * 1024}


def test_a_files_sync_does_not_make_its_name_durable(disk: CrashDisk) -> None:
    file = disk.create("f")
    file.write_at(0, b"a")
    file.sync()
    assert sorted(map(str, states(disk))) == sorted(map(str, [{}, {"f": b"a"}]))
    disk.sync()
    assert states(disk) == [{"f": b"a"}]


def test_a_directorys_sync_does_not_make_data_durable(disk: CrashDisk) -> None:
    disk.create("f").write_at(0, b"a")
    disk.sync()
    assert {state["f"] for state in states(disk)} == {b"", b"\0", b"a"}


def test_a_rename_is_there_or_not_and_never_half(disk: CrashDisk) -> None:
    durable_file(disk, "old", b"1")
    durable_file(disk, "new", b"2")
    disk.rename("old", "new")
    found = states(disk)
    assert len(found) == 2
    assert {"old": b"1", "new": b"2"} in found
    assert {"new": b"1"} in found


def test_an_unlink_may_come_before_the_rename_that_was_to_replace_the_file(disk: CrashDisk) -> None:
    durable_file(disk, "a", b"1")
    durable_file(disk, "b.tmp", b"2")
    disk.rename("b.tmp", "b")
    disk.unlink("a")
    found = states(disk)
    assert {"b.tmp": b"2"} in found
    assert {"a": b"1", "b": b"2"} in found
    assert len(found) == 4


def test_renames_over_one_name_may_come_in_any_order(disk: CrashDisk) -> None:
    for name in ("x", "y", "to"):
        durable_file(disk, name, name.encode())
    disk.rename("x", "to")
    disk.rename("y", "to")
    found = states(disk)
    assert {"to": b"x"} in found
    assert {"to": b"y"} in found
    assert {"x": b"x", "y": b"y", "to": b"to"} in found


def test_names_of_one_file_change_in_order(disk: CrashDisk) -> None:
    disk.create("f.tmp").sync()
    disk.rename("f.tmp", "f")
    assert sorted(sorted(state) for state in states(disk)) == [[], ["f"], ["f.tmp"]]


def test_a_new_directory_is_lost_until_its_parent_is_synced() -> None:
    disk = CrashDisk()
    durable_file(disk, "f", b"a")
    assert {} in states(disk)
    disk.sync_parent()
    assert states(disk) == [{"f": b"a"}]


def test_a_subdirectory_is_lost_until_the_directory_is_synced(disk: CrashDisk) -> None:
    durable_file(disk.subdirectory("sub"), "f", b"a")
    assert sorted(state.names() for state in disk.crash_states()) == [[], ["sub"]]
    disk.sync()
    (state,) = disk.crash_states()
    assert contents(state.subdirectory("sub")) == {"f": b"a"}


def test_a_store_in_a_shared_mapping_may_be_on_the_disk_at_once_or_never(disk: CrashDisk) -> None:
    file = durable_file(disk, "f", bytes(1024))
    other = durable_file(disk, "g", b"")
    mapping = file.shared()
    mapping[0] = 1
    other.write_at(0, b"x")
    mapping[0] = 2
    mapping[600] = 3
    assert {(state["f"][0], state["f"][600]) for state in states(disk)} == {
        (a, b) for a in (0, 1, 2) for b in (0, 3)
    }
    file.sync()
    assert {(state["f"][0], state["f"][600]) for state in states(disk)} == {(2, 3)}


def test_damage_adds_garbage_in_the_sectors_that_were_being_written() -> None:
    disk = CrashDisk(name_durable=True, damage=True)
    durable_file(disk, "f", b"a" * 1024).write_at(0, b"b")
    found = {state["f"] for state in states(disk)}
    assert len(found) == 3
    assert {data[512:] for data in found} == {b"a" * 512}


def test_with_twelve_unsynced_sectors_every_state_is_yielded_and_no_two_are_the_same(disk: CrashDisk) -> None:
    durable_file(disk, "f", bytes(12 * 512)).write_at(0, b"x" * 12 * 512)
    found = states(disk)
    assert len(found) == len({state["f"] for state in found}) == 4096


def test_a_sample_has_nothing_everything_each_missing_and_each_alone(disk: CrashDisk) -> None:
    durable_file(disk, "f", bytes(40 * 512)).write_at(0, b"x" * 40 * 512)
    found = {state["f"] for state in states(disk, max_states=100)}

    def sectors(which: Callable[[int], bool]) -> bytes:
        return b"".join((b"x" if which(n) else b"\0") * 512 for n in range(40))

    assert {sectors(lambda n: True), sectors(lambda n: False)} <= found
    for one in range(40):
        assert sectors(lambda n, one=one: n == one) in found
        assert sectors(lambda n, one=one: n != one) in found
    assert 82 < len(found) <= 182


def test_the_same_seed_gives_the_same_sample_and_another_seed_another(disk: CrashDisk) -> None:
    durable_file(disk, "f", bytes(40 * 512)).write_at(0, b"x" * 40 * 512)
    first, again, other = (
        {state["f"] for state in states(disk, max_states=50, seed=seed)} for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_state_is_a_disk_that_can_crash_again(disk: CrashDisk) -> None:
    disk.create("f")
    state = next(s for s in disk.crash_states() if s.names())
    assert state.effects == ()
    state.unlink("f")
    assert sorted(s.names() for s in state.crash_states()) == [[], ["f"]]
    assert disk.names() == ["f"]


def test_a_state_tells_what_it_kept_and_what_it_lost(disk: CrashDisk) -> None:
    durable_file(disk, "f", bytes(1024)).write_at(0, b"x" * 1024)
    told = {(len(state.kept), len(state.lost)) for state in disk.crash_states()}
    assert told == {(0, 2), (1, 1), (2, 0)}
    assert any("f: bytes [512, 1024) of #" in text for s in disk.crash_states() for text in s.kept)


def test_there_is_no_state_after_effects_that_did_not_happen(disk: CrashDisk) -> None:
    with pytest.raises(ValueError, match="0"):
        next(disk.crash_states(1))


# --- a process that dies --------------------------------------------------------------------------------


def test_a_killed_process_loses_its_lock_and_its_descriptors_and_its_mappings(disk: CrashDisk) -> None:
    file = durable_file(disk, "f", bytes(8))
    mapping = file.shared()
    mapping[0] = 1
    disk.lock("lock")
    after = disk.kill()
    mapping[1] = 2
    after.lock("lock")
    assert contents(after)["f"] == b"\1" + bytes(7)
    dead = [file.sync, file.shared, disk.names, disk.sync, disk.sync_parent, lambda: disk.create("g")]
    for call in (*dead, lambda: file.write_at(0, b"x"), lambda: len(file), lambda: disk.unlink("f")):
        with pytest.raises(OSError, match=f"Errno {errno.EBADF}"):
            call()
    disk.close()
    with pytest.raises(LockedError):
        after.lock("lock")
    assert {state["f"][0] for state in states(after)} == {0, 1}
    assert disk.kill().names() == after.names()


def test_what_a_killed_process_wrote_is_not_covered_by_syncs_of_the_next(disk: CrashDisk) -> None:
    durable_file(disk, "f", b"a").write_at(0, b"b")
    after = disk.kill()
    file = after.open("f", writable=True)
    file.sync()
    assert len(states(after)) == 2
    file.write_at(0, b"b")
    file.sync()
    assert states(after) == [{"f": b"b"}]


def test_the_record_names_every_effect_in_order(disk: CrashDisk) -> None:
    file = disk.create("a")
    file.write_sync_at(0, b"xyz")
    file.truncate(1)
    file.sync()
    disk.rename("a", "b")
    disk.subdirectory("sub").create("c").close()
    disk.unlink("b")
    disk.sync()
    disk.sync_parent()
    kinds = " ".join(effect.kind.value for effect in disk.effects)
    assert kinds == "create write sync_range truncate sync rename mkdir create unlink dir_sync parent_sync"
    assert [str(effect) for effect in disk.effects][1:6:2] == [
        "write a [0, 3)",
        "truncate a to 1 bytes",
        "rename a -> b",
    ]
    assert disk.effects[7].name == "sub/c"
    assert disk.effects[1].data == b"xyz"
    assert disk.effects[-1].kind is EffectKind.PARENT_SYNC


# --- the explorer finds bugs ---------------------------------------------------------------------------


def test_a_log_without_bugs_is_crash_safe() -> None:
    stats = assert_crash_safe(toy_scenario(), toy_check())
    assert stats.points == stats.exhaustive_points
    assert stats.points > 20
    assert stats.points <= stats.distinct <= stats.states


@pytest.mark.parametrize("bug", sorted(BUGS))
def test_a_planted_bug_is_found(bug: str) -> None:
    with pytest.raises(AssertionError, match="not safe against a crash"):
        assert_crash_safe(toy_scenario([bug]), toy_check([bug]))


def test_a_failure_is_told_by_the_shortest_list_of_effects() -> None:
    bug = ["the record is synced without its last sector"]
    with pytest.raises(AssertionError) as caught:
        assert_crash_safe(toy_scenario(bug), toy_check(bug))
    told = str(caught.value)
    assert "an acknowledged record is lost" in told
    assert "unsynced and lost:\n  log.tmp: bytes [1024, 1536)" in told.replace("log: bytes", "log.tmp: bytes")
    assert "acknowledged before it: 2" in told
    assert isinstance(caught.value.__cause__, AssertionError)


def test_a_recovery_that_raises_is_a_failure_too() -> None:
    def check(disk: CrashDisk, acknowledged: list[Any]) -> None:
        disk.open("f")

    with pytest.raises(AssertionError, match="FileNotFoundError"):
        assert_crash_safe(lambda disk, acknowledge: disk.create("f").sync(), check)


def test_an_error_of_the_scenario_is_let_through() -> None:
    def scenario(disk: CrashDisk, acknowledge: Callable[..., None]) -> None:
        disk.unlink("nothing")

    with pytest.raises(FileNotFoundError):
        assert_crash_safe(scenario, lambda disk, acknowledged: None)


def test_the_check_gets_what_was_acknowledged_before_the_crash() -> None:
    def scenario(disk: CrashDisk, acknowledge: Callable[..., None]) -> None:
        for n in range(3):
            disk.create(f"{n}").close()
            disk.sync()
            acknowledge(n)

    given: set[int] = set()

    def check(disk: CrashDisk, acknowledged: list[int]) -> None:
        assert acknowledged == list(range(len(acknowledged)))
        assert {str(n) for n in acknowledged} <= set(disk.names())
        given.add(len(acknowledged))

    assert_crash_safe(scenario, check, disk=CrashDisk(name_durable=True))
    assert given == {0, 1, 2, 3}


def test_no_more_states_are_checked_than_allowed() -> None:
    checked: list[int] = []

    def scenario(disk: CrashDisk, acknowledge: Callable[..., None]) -> None:
        file = disk.create("f")
        for n in range(20):
            file.write_at(n * 512, b"x")

    stats = assert_crash_safe(scenario, lambda disk, acknowledged: checked.append(1), max_states=100)
    assert stats.distinct == len(checked) <= 100
    assert stats.exhaustive_points < stats.points == 22


def test_a_crash_of_the_recovery_can_be_explored_from_a_state() -> None:
    """The rewrite of a log as its recovery: safe on its own, and found out with its sync left out."""
    disk = CrashDisk()
    toy_scenario()(disk, lambda *_: None)

    def recovery(bugs: list[str]) -> Callable[[CrashDisk, Any], None]:
        return lambda disk, acknowledge: ToyLog(disk, bugs).rewrite(lambda record: True)

    wanted = ToyLog(next(iter(disk.crash_states()))).records

    def check(disk: CrashDisk, acknowledged: list[Any]) -> None:
        assert ToyLog(disk).records == wanted

    for state in disk.crash_states():
        assert_crash_safe(recovery([]), check, disk=state)
    with pytest.raises(AssertionError, match="not safe"):
        assert_crash_safe(
            recovery(["renamed before the rewritten file is synced"]), check, disk=next(disk.crash_states())
        )


# --- calls that fail -------------------------------------------------------------------------------------


def run_toy(directory: Any) -> list[bytes]:
    log = ToyLog(directory)
    log.append(b"one")
    log.append(b"two")
    log.rewrite(lambda record: True)
    return log.records


def test_every_fault_goes_on_until_a_run_meets_none() -> None:
    faults, ends = [], []
    for fault in every_fault():
        try:
            ends.append(run_toy(FaultDirectory(MemoryDirectory(), fault)))
        except OSError as e:
            assert e.errno == errno.EIO
            ends.append([])
        faults.append(fault)
    assert [fault.struck for fault in faults] == [True] * (len(faults) - 1) + [False]
    assert ends[-1] == [b"one", b"two"]
    assert not any(ends[:-1])
    assert {str(fault.where).split()[0] for fault in faults[:-1]} == {
        *("names", "create", "write", "sync", "rename", "dir_sync", "sync_parent", "close", "open", "read"),
        "write_sync",
    }


@pytest.mark.parametrize(("when", "left"), [(When.BEFORE, b""), (When.AFTER, b"abcd"), (When.SHORT, b"ab")])
def test_a_write_fails_before_or_after_its_effect_or_halfway(when: When, left: bytes) -> None:
    disk = CrashDisk(name_durable=True)
    fault = Fault(kinds="write", error=errno.ENOSPC, when=when)
    file = FaultDirectory(disk, fault).create("f")
    with pytest.raises(OSError, match="No space left") as caught:
        file.write_at(0, b"abcd")
    assert caught.value.errno == errno.ENOSPC
    assert contents(disk) == {"f": left}
    assert fault.where == "write f"
    file.write_at(0, b"efgh")
    assert contents(disk) == {"f": b"efgh"}


def test_a_write_and_sync_can_write_all_and_fail_to_sync_it() -> None:
    disk = CrashDisk(name_durable=True)
    durable_file(disk, "f", b"aaaa")
    file = FaultDirectory(disk, Fault(when=When.UNSYNCED, kinds="write_sync")).open("f", writable=True)
    with pytest.raises(OSError, match="Input/output"):
        file.write_sync_at(0, b"bbbb")
    file.sync()
    assert {state["f"] for state in states(disk)} == {b"aaaa", b"bbbb"}


def test_a_failed_sync_is_not_made_up_for_by_the_next() -> None:
    disk = CrashDisk(name_durable=True)
    durable_file(disk, "f", b"a")
    file = FaultDirectory(disk, Fault(kinds="sync")).open("f", writable=True)
    file.write_at(0, b"b")
    with pytest.raises(OSError, match="Input/output"):
        file.sync()
    file.sync()
    assert len(states(disk)) == 2


def test_a_fault_can_last_until_it_is_lifted() -> None:
    fault = Fault(2, kinds={"create"}, error=errno.ENOSPC, times=None)
    directory = FaultDirectory(MemoryDirectory(), fault)
    directory.create("1").close()
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            directory.create("2")
    fault.lift()
    directory.create("2").close()
    assert directory.names() == ["1", "2"]
    assert fault.calls == 5


def test_faults_reach_into_subdirectories_and_count_there() -> None:
    directory = FaultDirectory(CrashDisk(), Fault(kinds="create"))
    with pytest.raises(OSError, match="Input/output"):
        directory.subdirectory("sub").create("f")
    directory.subdirectory("sub").create("f").close()


def test_one_storage_can_fail_by_itself() -> None:
    storage = FaultStorage(
        MemoryStorage(b"abcd"), Fault(2, kinds="write", error=errno.ENOSPC, when=When.SHORT)
    )
    storage.write_at(0, b"1")
    with pytest.raises(OSError, match="No space left") as caught:
        storage.write_at(2, b"34")
    assert caught.value.filename == "storage"
    assert bytes(storage.read_at(0, 4)) == b"1b3d"
    storage.sync()


def test_a_fault_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="fsync"):
        Fault(kinds="fsync")
    with pytest.raises(ValueError, match="0"):
        Fault(0)
