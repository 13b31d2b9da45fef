"""What only looks at a journal leaves every byte and every name of its folder as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmapwal import Journal, LockedError, SystemDirectory
from mmapwal.cli import main
from mmapwal.cli.looking import look_into

LOOKING = {
    "stat": ["stat", "J"],
    "dump": ["dump", "J"],
    "verify": ["verify", "J"],
    "tail": ["tail", "J"],
    "backup": ["backup", "J", "COPY"],
    "repair": ["repair", "--dry-run", "J"],
}
IN_USE_REFUSED = {"dump", "repair"}
WRITER = """
import os, signal, sys
from mmapwal import recover

class Counter:
    count = 0
    def apply(self, entry): self.count += 1
    def snapshot(self): return b"%d" % self.count
    def restore(self, data): self.count = int(bytes(data))

replica = recover(sys.argv[1], Counter(), slots=256, segment_bytes=16384)
for n in range(100):
    replica.submit(b"entry %d " % n * 30)
    if n == 60:
        replica.checkpoint()
if sys.argv[2] == "in use":  # nothing is left to do in the background
    replica.journal._engine.prepare_segment()
    replica.journal.compact(wait=True)
print("there", flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "in use":
    sys.stdin.read()
replica.close()
"""


def files(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def write(path: Path, how: str) -> subprocess.Popen[bytes]:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"there\n"
    if how != "in use":
        assert writer.wait() == (-signal.SIGKILL if how == "killed" else 0)
    return writer


@pytest.fixture(params=["closed", "killed", "killed, without an index", "in use", "a backup"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    path = tmp_path / "j"
    how = request.param.partition(",")[0]
    with write(path, how) as writer:
        if "without an index" in request.param:
            (path / "index").unlink()
        if how == "a backup":
            with Journal(path) as journal:
                journal.backup(tmp_path / "copy of j")
            path = tmp_path / "copy of j"
        yield path
        if writer.stdin is not None:
            writer.stdin.close()


@pytest.mark.parametrize("command", LOOKING)
def test_a_command_that_only_looks_changes_no_byte_and_no_name(
    path: Path,
    tmp_path: Path,
    command: str,
    request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
) -> None:
    places = {"J": str(path), "COPY": str(tmp_path / "copy")}
    before = files(path)
    in_use = request.node.callspec.params["path"] == "in use"
    for _ in range(2):
        code = main([places.get(word, word) for word in LOOKING[command]])
        assert code == (2 if in_use and command in IN_USE_REFUSED else 0), capfd.readouterr().err
        assert files(path) == before


@pytest.mark.parametrize("how", ["closed", "killed", "killed, without an index"])
def test_what_looks_at_a_journal_that_nobody_writes_finds_all_that_was_acknowledged(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "j"
    with write(path, how.partition(",")[0]):
        pass
    if "without" in how:
        (path / "index").unlink()
    assert main(["dump", "--json", str(path)]) == 0
    assert [json.loads(line)["op"] for line in capsys.readouterr().out.splitlines()] == [*range(62, 101)]
    assert main(["stat", "--json", str(path)]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert main(["backup", str(path), str(tmp_path / "copy")]) == 0
    shutil.copytree(path, tmp_path / "opened")
    with Journal(tmp_path / "opened") as journal:
        assert seen["stats"]["entries"] == len(journal) == 39
        assert seen["report"]["outcome"] == journal.report.outcome.value
        assert seen["report"]["tail_lsn"] == journal.report.tail_lsn
        assert seen["journal"]["remaining_capacity"] == journal.remaining_capacity
        assert seen["journal"]["sync_method"] == journal.sync_method.value
        entries = [(e.op, bytes(e.payload)) for e in journal]
    with Journal(tmp_path / "copy") as copy:
        assert [(e.op, bytes(e.payload)) for e in copy] == entries


def test_a_backup_that_was_looked_at_still_takes_what_is_new(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", slots=256, segment_bytes=16384) as journal:
        for n in range(100):
            journal.append(b"entry %d " % n * 30)
        first = journal.backup(tmp_path / "copy")
        for command in ("stat", "dump", "verify", "tail"):
            assert main([command, str(tmp_path / "copy")]) == 0
        assert main(["backup", str(tmp_path / "copy"), str(tmp_path / "copy of it")]) == 0
        journal.append(b"more")
        second = journal.backup(tmp_path / "copy")
        assert second.kept_segments == first.segments - 1 > 0
    with Journal(tmp_path / "copy") as copy:
        assert copy.last_op == 101


def test_nobody_writes_a_journal_while_it_is_looked_at(tmp_path: Path) -> None:
    """Its files would go from under who looks."""
    Journal(tmp_path / "j").close()
    with look_into(tmp_path / "j"), pytest.raises(LockedError):
        Journal(tmp_path / "j")
    with Journal(tmp_path / "j"), pytest.raises(LockedError):
        look_into(tmp_path / "j")


def test_a_journal_that_may_only_be_read_can_be_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal(tmp_path / "j").close()
    real = SystemDirectory._open_file

    def read_only(directory: SystemDirectory, name: str, flags: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", name)
        return real(directory, name, flags)

    monkeypatch.setattr(SystemDirectory, "_open_file", read_only)
    assert main(["stat", str(tmp_path / "j")]) == 0
    assert main(["dump", str(tmp_path / "j")]) == 0
