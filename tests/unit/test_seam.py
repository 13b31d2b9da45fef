"""No effect on a file happens behind the seam's back: strace sees every system call, and each one lies
inside a call of Directory or Storage, or is one of the commits that the C helper counts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

EFFECTS = [
    *("write", "writev", "pwrite64", "pwritev", "pwritev2", "copy_file_range", "sendfile", "splice"),
    *("fsync", "fdatasync", "sync_file_range", "msync", "syncfs", "sync"),
    *("rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat"),
    *("link", "linkat", "symlink", "symlinkat", "open", "openat", "openat2", "creat"),
    *("truncate", "ftruncate", "fallocate", "ioctl"),
]
MARKS = ["access", "faccessat", "faccessat2"]

# Every call of the seam is bracketed by two system calls that do nothing but can be seen.
BRACKETS = """
import functools, os, sys, threading
from mmapwal import *
from mmapwal import extras
from mmapwal import storage as seam

depth = threading.local()

def bracketed(function):
    @functools.wraps(function)
    def call(*arguments, **named):
        depth.n = getattr(depth, "n", 0) + 1
        if depth.n == 1:
            os.access("/seam-begin", 0)
        try:
            return function(*arguments, **named)
        finally:
            depth.n -= 1
            if depth.n == 0:
                os.access("/seam-end", 0)
    return call

PROTOCOLS = (Storage, Directory, extras.StorageExtras, extras.DirectoryExtras)
CALLS = {n for p in PROTOCOLS for n, f in vars(p).items() if callable(f)}
CALLS -= {"__init__", "__str__", "__subclasshook__", "__init_subclass__", "__class_getitem__"}
"""

# The journal on its own files: the C helper commits by itself, and counts.
ON_SYSTEM_FILES = """
for owner in (seam.SystemDirectory, seam.MappedStorage, *seam.MappedStorage.__mro__[1:-1]):
    for name in CALLS & set(vars(owner)):
        setattr(owner, name, bracketed(vars(owner)[name]))
seam.SystemDirectory.__init__ = bracketed(seam.SystemDirectory.__init__)
storage = lambda: None
"""

# The journal on an injected storage: the C helper's commits go through it too.
ON_INJECTED_FILES = """
class Injected:
    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getattr__(self, name):
        found = getattr(self.inner, name)
        if name in {"create", "open", "subdirectory"}:
            return lambda *a, **k: Injected(bracketed(found)(*a, **k))
        return bracketed(found) if name in CALLS else found

storage = lambda: Injected(bracketed(SystemDirectory)(sys.argv[1]))
"""

SCENARIO = """
options = {"sync_method": SyncMethod[sys.argv[2]], "durability": Durability[sys.argv[3]]}

def count(journal):
    journal.sync()
    stats = journal.stats()
    os.write(1, f"{stats.commits} {stats.syncs}\\n".encode())

class Machine:
    def __init__(self): self.applied = 0
    def apply(self, entry): self.applied += 1
    def snapshot(self): return b"%d" % self.applied
    def restore(self, snapshot): self.applied = int(bytes(snapshot))

child = os.fork()
if child == 0:  # made, written to over several segments, and never closed
    journal = Journal(sys.argv[1], slots=256, segment_bytes=32768, storage=storage(), **options)
    for _ in range(100):
        journal.append(bytes(600))
    count(journal)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

replica = recover(sys.argv[1], Machine(), storage=storage(), **options)
for _ in range(30):
    replica.submit(bytes(700))
replica.checkpoint()
count(replica.journal)
replica.close()

with Journal(sys.argv[1], storage=storage(), **options) as journal:
    base = journal.snapshot_op
    journal.append_many([bytes(900)] * 50)
    journal.append(bytes(100_000))  # larger than a segment
    journal.drain(base + 10, base + 20)
    journal.set_snapshot_op(base + 5)
    journal.compact()
    journal.truncate_from(base + 45)
    journal.set_user_data(b"term")
    journal.verify()
    list(journal.payloads())
    count(journal)
"""


class Call(NamedTuple):
    """One system call that changes something, and whether it lay inside a call of the seam."""

    name: str
    inside: bool
    line: str

    @property
    def file(self) -> str:
        """What its first descriptor is of."""
        return Path(re.findall("<(/[^>]*)>", self.line)[0]).name


def is_effect(name: str, line: str) -> bool:
    if name in {"open", "openat", "openat2"}:
        return "O_CREAT" in line or "O_TRUNC" in line
    if name == "ioctl":
        return "SETFLAGS" in line or "FICLONE" in line
    return True


def effects(trace: Path, below: Path) -> list[Call]:
    """The calls on files below the directory (msync, which names no file: all), by thread."""
    inside: dict[str, bool] = {}
    found = []
    for line in trace.read_text().splitlines():
        match = re.match(r"(\d+) +(\w+)\((.*)", line)  # the second half of an interrupted line has none
        if match is None:
            continue
        thread, name, rest = match.groups()
        if name in MARKS:
            if "/seam-" in rest:
                inside[thread] = "/seam-begin" in rest
        elif is_effect(name, rest) and (name in {"msync", "sync"} or str(below) in rest):
            found.append(Call(name, inside.get(thread, False), line))
    return found


@pytest.fixture(scope="session")
def strace(require: Callable[[object, str], None]) -> str:
    program = shutil.which("strace")
    require(program, "strace is not installed")
    works = subprocess.run([str(program), "-o", "/dev/null", "true"], capture_output=True, check=False)
    require(works.returncode == 0, "strace may not trace here")
    return str(program)


class Run(NamedTuple):
    """What a traced script did."""

    effects: list[Call]
    output: str

    @property
    def marked(self) -> list[Call]:
        return [call for call in self.effects if call.inside]


@pytest.fixture
def traced(strace: str, tmp_path: Path) -> Callable[..., Run]:
    def run(script: str, *arguments: str) -> Run:
        journal, trace = tmp_path / "parent" / "journal", tmp_path / "trace"
        journal.parent.mkdir(exist_ok=True)
        names = ",".join(f"?{name}" for name in EFFECTS + MARKS)
        command = [strace, "-f", "-y", "-s", "64", "-o", trace, "-e", f"trace={names}"]
        child = [sys.executable, "-W", "error", "-c", script, journal, *arguments]
        done = subprocess.run([*command, *child], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return Run(effects(trace, journal.parent), done.stdout)

    return run


def counted(run: Run) -> tuple[int, int]:
    """Commits and syncs, as the journals counted them."""
    rows = [tuple(map(int, line.split())) for line in run.output.splitlines()]
    assert len(rows) == 3
    return sum(commits for commits, _ in rows), sum(syncs for _, syncs in rows)


# What one commit and one sync of the helper are as system calls.
COMMITS = [
    ("DSYNC", "SYNC", lambda commits, _: {"pwritev2": commits}),
    ("FDATASYNC", "SYNC", lambda commits, syncs: {"pwrite64": commits, "fdatasync": syncs}),
    ("MSYNC", "SYNC", lambda _, syncs: {"msync": syncs}),
    ("DSYNC", "OS", lambda commits, syncs: {"pwrite64": commits, "fdatasync": syncs}),
    ("FDATASYNC", "BUFFERED", lambda commits, syncs: {"pwrite64": commits, "fdatasync": syncs}),
]


@pytest.mark.parametrize(("method", "durability", "expected"), COMMITS)
def test_every_effect_outside_the_seam_is_a_commit_that_the_helper_counted(
    traced: Callable[..., Run],
    method: str,
    durability: str,
    expected: Callable[[int, int], dict[str, int]],
) -> None:
    run = traced(BRACKETS + ON_SYSTEM_FILES + SCENARIO, method, durability)
    assert any(call.inside for call in run.effects)
    outside = [call for call in run.effects if not call.inside]
    assert dict(Counter(call.name for call in outside)) == expected(*counted(run))
    assert [c.line for c in outside if c.name != "msync" and "/segment-" not in c.line] == []


@pytest.mark.parametrize(
    ("method", "durability"), [("DSYNC", "SYNC"), ("FDATASYNC", "SYNC"), ("DSYNC", "OS")]
)
def test_no_effect_at_all_passes_an_injected_storage_by(
    traced: Callable[..., Run], method: str, durability: str
) -> None:
    run = traced(BRACKETS + ON_INJECTED_FILES + SCENARIO, method, durability)
    assert len(run.effects) > 200
    assert [call.line for call in run.effects if not call.inside] == []


ONE_APPEND = """
with Journal(sys.argv[1], slots=256, segment_bytes=1 << 20, sync_method=SyncMethod[sys.argv[2]]) as journal:
    for _ in range(3):
        journal.append(bytes(256))
    os.access("/seam-begin", 0)
    for _ in range(20):
        journal.append(bytes(256))
    os.access("/seam-end", 0)
"""


@pytest.mark.parametrize(
    ("method", "calls"),
    [("DSYNC", {"pwritev2": 20}), ("FDATASYNC", {"pwrite64": 20, "fdatasync": 20}), ("MSYNC", {"msync": 20})],
)
def test_a_durable_append_is_one_write_and_one_flush_and_nothing_else(
    traced: Callable[..., Run], method: str, calls: dict[str, int]
) -> None:
    run = traced("import os, sys\nfrom mmapwal import *\n" + ONE_APPEND, method)
    assert dict(Counter(call.name for call in run.marked)) == calls
    if method == "DSYNC":
        assert all("RWF_DSYNC" in call.line for call in run.marked)


# --- what the syncs cover -----------------------------------------------------------------------------

# Each prints a line for each range that it had stored and then synced: its address and its length.
INTO_A_SEGMENT = """
def address():
    for line in open("/proc/self/maps"):
        if "rw-s" in line and "segment-0000000000000001" in line:
            return int(line.split("-")[0], 16)

durability = Durability[sys.argv[2]]
options = {"sync_method": SyncMethod.MSYNC, "durability": durability}
with Journal(sys.argv[1], slots=256, segment_bytes=1 << 20, **options) as journal:
    journal.append(b"")
    journal.sync()
    os.access("/seam-begin", 0)
    for size in (10, 100, 5000, 20_000, 70_000):
        journal.append(bytes(size))
        if durability is not Durability.SYNC:
            journal.sync()
    os.access("/seam-end", 0)
    for op in range(2, len(journal) + 1):
        columns = journal.columns(op, op)
        print(address() + columns.offsets[0] - 64, columns.lengths[0] + 64)
"""
INTO_A_SHARED_MAPPING = """
with SystemDirectory(sys.argv[1]) as directory:
    file = directory.create("f")
    file.write_at(0, bytes(20_000))
    shared = file.shared()
    shared[100], shared[19_999] = 1, 1
    os.access("/seam-begin", 0)
    file.sync()
    os.access("/seam-end", 0)
    print(int(ffi.cast("uintptr_t", ffi.from_buffer(shared))), len(shared))
"""


@pytest.mark.parametrize(
    ("script", "durability"),
    [(INTO_A_SEGMENT, "SYNC"), (INTO_A_SEGMENT, "OS"), (INTO_A_SHARED_MAPPING, "")],
    ids=["commits", "syncs", "a shared mapping"],
)
def test_each_msync_covers_all_of_what_was_stored(
    traced: Callable[..., Run], script: str, durability: str
) -> None:
    prelude = "import os, sys\nfrom mmapwal import *\nfrom mmapwal._native import ffi\n"
    run = traced(prelude + script, durability)
    stored = [tuple(map(int, line.split())) for line in run.output.splitlines()]
    synced = [re.findall(r"msync\((\w+), (\d+)", call.line)[0] for call in run.marked if call.name == "msync"]
    assert len(stored) == len(synced) > 0
    for (address, length), (begin, synced_bytes) in zip(stored, synced, strict=True):
        assert int(begin, 16) <= address
        assert address + length <= int(begin, 16) + int(synced_bytes)


EACH_SYNC = """
with SystemDirectory(sys.argv[1]) as directory:
    made = directory.create("made")
    made.write_at(0, bytes(8192))
    made.close()
    files = [directory.open("made", writable=True, sync_method=m) for m in list(SyncMethod)[1:]]
    os.access("/seam-begin", 0)
    directory.sync()
    directory.sync_parent()
    for file in files:
        file.write_at(100, b"x")
        file.sync()
        file.write_sync_at(200, b"x")
    os.access("/seam-end", 0)
"""


def test_each_sync_of_the_seam_is_one_of_the_system_on_just_that_file(traced: Callable[..., Run]) -> None:
    run = traced("import os, sys\nfrom mmapwal import *\n" + EACH_SYNC)
    assert [c.name if c.name == "msync" else f"{c.name} {c.file}" for c in run.marked] == [
        *("fsync journal", "fsync parent"),
        *("pwrite64 made", "fdatasync made", "pwritev2 made"),  # dsync
        *("pwrite64 made", "fdatasync made", "pwrite64 made", "fdatasync made"),
        *("msync", "msync", "fdatasync made", "msync"),
    ]


# A life that sees to it that there is something to remove when the journal is opened.
LIFE = """
stray = os.path.join(sys.argv[1], "segment-00000000000000ff-00000000")
if os.path.exists(sys.argv[1]):
    open(stray, "w").close()
journal = Journal(sys.argv[1], slots=256, segment_bytes=32768)
journal.append(bytes(100))
if sys.argv[2] == "killed":
    os._exit(0)
journal.close()
"""


def place(calls: list[Call], name: str, text: str) -> int:
    """Where the first such call is."""
    found = [n for n, call in enumerate(calls) if call.name.startswith(name) and text in call.line]
    assert found, f"no {name} with {text}"
    return found[0]


def test_the_parent_is_synced_behind_the_making_and_ahead_of_the_first_superblock(
    traced: Callable[..., Run],
) -> None:
    calls = traced("import os, sys\nfrom mmapwal import *\n" + LIFE, "killed").effects
    made, synced = place(calls, "mkdir", "/journal"), place(calls, "fsync", "/parent>)")
    assert made < synced < place(calls, "renameat", '"superblock"')


@pytest.mark.parametrize("before", ["killed", "closed"])
def test_an_open_syncs_the_parent_behind_its_superblock_and_ahead_of_all_that_it_removes_or_appends(
    traced: Callable[..., Run], before: str
) -> None:
    script = "import os, sys\nfrom mmapwal import *\n" + LIFE
    traced(script, before)
    calls = traced(script, "killed").effects
    replaced, synced = place(calls, "renameat", '"superblock"'), place(calls, "fsync", "/parent>)")
    removed, appended = place(calls, "unlinkat", "00ff-"), place(calls, "pwrite", "/segment-")
    assert replaced < synced < min(removed, appended)
