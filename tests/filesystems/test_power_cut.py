"""The power is cut under a writer: a real file system comes back with all that was acknowledged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmapwal import Journal, SyncMethod

from .conftest import Filesystem

pytestmark = pytest.mark.root

ENTRIES = 600
WRITER = """
import os, sys, threading
from mmapwal import Durability, Journal, SyncMethod

journal = Journal(sys.argv[1], sync_method=SyncMethod[sys.argv[2]], durability=Durability[sys.argv[3]],
                  slots=8192, segment_bytes=int(sys.argv[4]))

def work():
    while True:
        op = journal.append(bytes(100))
        os.write(1, b"%d\\n" % op)

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
while True:
    try:
        first = journal.append_many([bytes(300)] * 3)[0]
        os.write(1, b"%d %d %d\\n" % (first, first + 1, first + 2))
    except Exception:
        sys.exit()
"""


def cut_power_under_a_writer(filesystem: Filesystem, *options: str) -> tuple[set[int], set[int]]:
    """The ops that were known to be acknowledged before the cut, and all that ever were."""
    command = [sys.executable, "-c", WRITER, str(filesystem.path / "j"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as writer:
        assert writer.stdout is not None
        before: set[int] = set()
        try:
            for line in writer.stdout:
                before.update(map(int, line.split()))
                if len(before) >= ENTRIES:
                    break
        finally:
            filesystem.cut_power()
            writer.kill()
        after = {int(op) for line in writer.stdout if line.endswith("\n") for op in line.split()}
    filesystem.mount_again()
    return before, before | after


def recovered(path: Path) -> dict[int, int]:
    """Op and length of what is there; the journal and its mappings are gone at return."""
    with Journal(path) as journal:
        found = {entry.op: len(entry.payload) for entry in journal}
        assert journal.verify().ok
        journal.append(b"goes on")
    return found


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_what_was_acknowledged_survives_and_a_batch_is_whole(
    make_filesystem: Callable[[str], Filesystem], kind: str, method: SyncMethod
) -> None:
    filesystem = make_filesystem(kind)
    for _ in range(2):  # the second time it goes on from a recovered journal
        acknowledged, _ = cut_power_under_a_writer(filesystem, method.name, "SYNC", "65536")
        assert len(acknowledged) >= ENTRIES
        found = recovered(filesystem.path / "j")
        assert acknowledged <= set(found)
        assert sorted(found) == list(range(1, len(found) + 1))
        assert sum(length == 300 for length in found.values()) % 3 == 0


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_the_cut_is_a_real_one_what_was_not_synced_is_lost(
    make_filesystem: Callable[[str], Filesystem], kind: str
) -> None:
    filesystem = make_filesystem(kind)
    _, acknowledged = cut_power_under_a_writer(filesystem, "AUTO", "OS", "16777216")  # no segment is left
    found = recovered(filesystem.path / "j")
    assert acknowledged - set(found)
    assert sorted(found) == list(range(1, len(found) + 1))


# --- each level ---------------------------------------------------------------------------------------

# Each line: how many entries were appended, and how many of them were known to be durable.
LEVELS = """
import os, sys, time
from mmapwal import Durability, Journal
interval = float(sys.argv[2])
journal = Journal(sys.argv[1], slots=1 << 16, segment_bytes=65536, durability=Durability[sys.argv[3]],
                  sync_interval_ms=interval or None)
durable = journal.last_op or 0
for n in range(durable + 1, 1 << 16):
    journal.append(b"entry %d" % n * (1 + n % 30))
    if n % 37 == 0:
        if not interval:
            journal.sync()
        while interval and (journal.stats().staged_bytes or journal.durable_lsn < journal.written_lsn):
            time.sleep(0.001)
        durable = n
    os.write(1, b"%d %d\\n" % (n, durable))
"""


def cut_power_under_a_level(filesystem: Filesystem, *options: str) -> int:
    """How many entries were known to be durable before the cut."""
    command = [sys.executable, "-c", LEVELS, str(filesystem.path / "j"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as writer:
        assert writer.stdout is not None
        first = durable = 0
        try:
            for line in writer.stdout:
                appended, durable = map(int, line.split())
                first = first or appended
                if durable > first + 400:
                    break
        finally:
            filesystem.cut_power()
            writer.kill()
    filesystem.mount_again()
    assert durable > first + 400
    return durable


def recovered_payloads(path: Path) -> list[bytes]:
    with Journal(path) as journal:
        assert journal.verify().ok
        return [bytes(p) for p in journal.payloads()]


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("durability", ["OS", "BUFFERED"])
@pytest.mark.parametrize("interval_ms", ["0", "2"])
def test_what_sync_or_the_background_made_durable_survives_and_only_the_last_is_lost(
    make_filesystem: Callable[[str], Filesystem], kind: str, durability: str, interval_ms: str
) -> None:
    filesystem = make_filesystem(kind)
    for _ in range(3):
        durable = cut_power_under_a_level(filesystem, interval_ms, durability)
        found = recovered_payloads(filesystem.path / "j")
        assert len(found) >= durable
        assert found == [b"entry %d" % n * (1 + n % 30) for n in range(1, len(found) + 1)]
