"""The snapshot that a journal is paired with is verified with it, and no repair passes it over in silence."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmapwal import Entry, IncompatibleFormatError, Journal, Problem, SnapshotError, inspect, recover, repair
from mmapwal.cli import main
from mmapwal.machines import StateMachine
from mmapwal.storage import SystemDirectory

SIZES = {"slots": 256, "segment_bytes": 65536}
FILE = "snapshots/snapshot-00000000000000000010"


class Sum(StateMachine):
    """Adds up what it is given."""

    def __init__(self) -> None:
        self.total = 0

    def apply(self, entry: Entry) -> None:
        self.total += int(bytes(entry.payload))

    def snapshot(self) -> bytes:
        return b"%d" % self.total

    def restore(self, data: memoryview) -> None:
        self.total = int(bytes(data))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with a checkpoint at op 10, and ops 11 .. 20 above it."""
    path = tmp_path / "j"
    with recover(path, Sum(), **SIZES) as replica:
        for number in range(1, 21):
            replica.submit(b"%03d" % number)
            if number == 10:
                replica.checkpoint()
    return path


def rotten(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def of_an_older_state(file: Path) -> None:
    """Whole by itself, and not the one that the superblock names."""
    with recover(file.parent.parent.with_name("older"), Sum(), **SIZES) as replica:
        for _ in range(10):
            replica.submit(b"7")
        replica.checkpoint()
    shutil.copy(file.parent.parent.with_name("older") / FILE, file)


def of_no_version(file: Path) -> None:
    """As another format's would be, or one whose header is rotten."""
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"\xff" * 8 + data[16:])


DAMAGES: list[Callable[[Path], None]] = [Path.unlink, rotten, of_an_older_state, of_no_version]


@pytest.fixture(params=DAMAGES, ids=lambda damage: damage.__name__)
def damaged(path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    request.param(path / FILE)
    yield path
    with pytest.raises((SnapshotError, IncompatibleFormatError)):
        recover(path, Sum())


def check(problems: tuple[Problem, ...]) -> None:
    assert [(p.segment, p.op) for p in problems] == [(FILE, 10)]


def test_verify_names_a_paired_snapshot_that_is_missing_damaged_or_another_one(damaged: Path) -> None:
    check(inspect(damaged).problems)
    with Journal(damaged) as journal:
        check(journal.verify().problems)
        with Journal(damaged, readonly=True) as reader:
            check(reader.verify().problems)
    assert main(["verify", str(damaged)]) == 1


def test_repair_says_that_it_cannot_mend_the_snapshot_and_changes_nothing(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in damaged.rglob("*") if file.is_file()}
    for dry_run in (True, False):
        report = repair(damaged, dry_run=dry_run)
        assert not report.changed
        assert report.problems == report.remaining
        check(report.remaining)
    assert main(["repair", str(damaged)]) == 2
    assert f"cannot be repaired: {FILE}" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in damaged.rglob("*") if file.is_file()} == before


def test_repair_of_a_segment_mends_that_and_says_what_remains(damaged: Path) -> None:
    (segment,) = damaged.glob("segment-*")
    segment.write_bytes(segment.read_bytes().replace(b"015", b"0?5"))
    report = repair(damaged)
    assert report.changed
    assert [d.op for d in report.dropped] == [15]
    check(report.remaining)
    check(inspect(damaged).problems)
    with Journal(damaged) as journal:
        assert [e.op for e in journal] == [*range(11, 15), *range(16, 21)]


def test_a_whole_snapshot_is_no_problem_nor_is_one_that_is_kept_elsewhere(path: Path) -> None:
    assert inspect(path).ok
    with Journal(path) as journal:
        assert journal.verify().ok
    shutil.move(path / "snapshots", path.with_name("elsewhere"))
    assert inspect(path).ok
    assert not (path / "snapshots").exists()


def test_a_snapshot_that_is_replaced_by_a_later_one_while_it_is_verified_is_no_problem(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recover(path, Sum()) as replica:
        real = SystemDirectory.subdirectory

        def checkpoints_meanwhile(directory: SystemDirectory, name: str) -> SystemDirectory:
            monkeypatch.undo()
            for _ in range(3):
                replica.submit(b"1")
                replica.checkpoint()
            return real(directory, name)

        monkeypatch.setattr(SystemDirectory, "subdirectory", checkpoints_meanwhile)
        assert replica.journal.verify().ok
        assert not (path / FILE).exists()
