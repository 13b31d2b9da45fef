"""The crash explorer itself: it finds known bugs in a toy log, and nothing in the same log without them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from mmapwal.errors import LockedError
from mmapwal.storage import SyncMethod
from mmapwal.testing import (
    SECTOR_BYTES,
    CrashDisk,
    CrashStats,
    EffectKind,
    assert_crash_safe,
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


def test_what_is_written_by_an_msync_storage_may_be_on_the_disk_when_half_of_a_sector_is_stored(
    disk: CrashDisk,
) -> None:
    durable_file(disk, "f", b"a" * 1024)
    file = disk.open("f", writable=True, sync_method=SyncMethod.MSYNC)
    file.write_at(200, b"b" * 600)
    whole = b"a" * 200 + b"b" * 600 + b"a" * 224
    first, second = b"a" * 200 + b"b" * 56 + b"a" * 256, b"b" * 256 + b"a" * 256
    assert {state["f"] for state in states(disk)} == {
        one + other for one in (b"a" * 512, first, whole[:512]) for other in (b"a" * 512, second, whole[512:])
    }
    assert file.view() == whole
    file.write_sync_at(0, b"b")
    assert {state["f"][512:] for state in states(disk)} == {b"a" * 512, second, whole[512:]}
    file.sync()
    assert states(disk) == [{"f": b"b" + whole[1:]}]
    with pytest.raises(OSError, match=f"Errno {errno.EFBIG}"):
        file.write_at(1000, bytes(25))


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


def test_of_the_first_states_one_has_the_newest_effect_without_all_that_it_may_rely_on() -> None:
    disk = CrashDisk()
    durable_file(disk, "old", b"1" * 2000)
    disk.create("new").write_at(0, b"2" * 2000)
    disk.rename("old", "older")
    renamed = list(disk.crash_states(max_states=4))
    assert [contents(state) for state in renamed[:3]] == [
        {},
        {"older": b"1" * 2000, "new": b"2" * 2000},
        {"older": b"1" * 2000},
    ]
    disk.open("older", writable=True).write_at(0, b"3" * 1000)
    assert contents(list(disk.crash_states(max_states=4))[2]) == {"old": b"3" * 1000 + b"1" * 1000}


def test_of_the_first_states_one_has_the_first_half_of_the_newest_write(disk: CrashDisk) -> None:
    file = durable_file(disk, "f", b"1" * 4096)
    file.write_at(0, b"2" * 4096)
    file.write_at(1024, b"3" * 2048)
    first = [contents(state)["f"] for state in disk.crash_states(max_states=4)][:4]
    assert b"2" * 1024 + b"3" * 1024 + b"2" * 2048 in first


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


def writes(*sectors: int) -> Callable[..., None]:
    """Overwrites so many sectors of a durable file, and syncs; again for each number."""

    def scenario(disk: CrashDisk, acknowledge: Callable[..., None]) -> None:
        file = durable_file(disk, "f", bytes(SECTOR_BYTES * max(sectors)))
        disk.sync_parent()
        for turn, count in enumerate(sectors):
            file.write_at(0, bytes([turn % 255 + 1]) * SECTOR_BYTES * count)
            acknowledge(turn)
            file.sync()

    return scenario


def checked_in_each_turn(*sectors: int, **options: Any) -> tuple[dict[int, list[bytes]], CrashStats]:
    """What is checked of `writes`: in each turn the first byte of each sector, in the order of the checks."""
    found: dict[int, list[bytes]] = {turn: [] for turn in range(-1, len(sectors))}

    def check(disk: CrashDisk, acknowledged: list[int]) -> None:
        if "f" in disk.names():
            found[len(acknowledged) - 1].append(contents(disk)["f"][::SECTOR_BYTES])

    stats = assert_crash_safe(writes(*sectors), check, **options)
    return found, stats


EARLY = (10, *[3] * 200)


def test_a_place_is_sampled_only_when_the_states_of_all_are_more_than_max_states() -> None:
    """Also an early one, with many behind it that have no use for their shares."""
    whole, stats = checked_in_each_turn(*EARLY, max_states=20_000)
    assert len(whole[0]) == len(set(whole[0])) == 1024
    assert stats.exhaustive_points == stats.points > 400
    exactly, fewer = (checked_in_each_turn(*EARLY, max_states=stats.distinct - less)[0] for less in (0, 1))
    assert {turn: set(found) for turn, found in exactly.items()} == {t: set(f) for t, f in whole.items()}
    assert len(fewer[0]) == 1023


def test_without_max_states_every_place_with_at_most_twelve_unsynced_is_tried_whole() -> None:
    found, stats = checked_in_each_turn(12, 20, 11, max_states=None)
    assert (len(found[0]), len(found[2])) == (4096, 2048)
    assert 4096 <= len(found[1]) < 5000
    assert stats.points - stats.exhaustive_points == 1


def test_places_that_can_be_tried_whole_with_half_of_max_states_are_tried_whole() -> None:
    found, stats = checked_in_each_turn(10, *[20] * 100, 9, max_states=4000)
    assert (len(found[0]), len(found[101])) == (1024, 512)
    assert stats.distinct == 4000


def test_places_that_are_sampled_get_the_same_share_wherever_they_are() -> None:
    found, stats = checked_in_each_turn(20, *[1] * 50, 20, 20, max_states=3000)
    shares = [len(found[turn]) for turn in (0, 51, 52)]
    assert max(shares) - min(shares) <= 2
    assert stats.distinct == 3000


def test_where_there_is_not_one_for_each_place_some_are_tried_all_over_the_life() -> None:
    found, stats = checked_in_each_turn(*[20] * 200, max_states=60)
    tried = [turn for turn, states in found.items() if states]
    assert stats.distinct == 60
    assert len([turn for turn in tried if turn < 100]) > 10 < len([turn for turn in tried if turn >= 100])


def test_a_sample_of_a_place_is_of_all_its_sectors() -> None:
    found, _ = checked_in_each_turn(12, max_states=300)
    mixed = [state for state in found[0] if 3 < state.count(1) < 9]
    assert len(mixed) > 100
    for sector in range(12):
        kept = sum(state[sector] for state in mixed)
        assert len(mixed) / 4 < kept < len(mixed) * 3 / 4


def test_the_same_states_are_checked_in_the_same_order_with_the_same_seed_only() -> None:
    sectors = (12, *[3] * 20, 20)
    first, again, other = (checked_in_each_turn(*sectors, max_states=500, seed=s)[0] for s in (1, 1, 2))
    assert first == again != other


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
