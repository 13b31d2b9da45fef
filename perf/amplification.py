"""What reaches the block device: bytes for a byte of the user, and flushes for a commit.

Counted by the kernel (/sys/dev/block/*/stat). As root the files live on a loop device of their own,
which nobody else writes to; otherwise on the device below --dir, where the writes of all others count
too. The zeros of segment preparation are counted apart: as many bytes as the new segments have.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    MIB,
    PAYLOAD_BYTES,
    Report,
    SqliteLog,
    finish,
    frame_bytes,
    machine,
    mount_of,
    number,
    options,
    pyplot,
    random_bytes,
    save,
    workspace,
)
from raw import Method, raw_file

from mmapwal import Journal

SECTOR_BYTES = 512
BATCH = 64
WARM = 100
PASSES = 8
IMAGE_BYTES = 2 << 30


@dataclass(frozen=True)
class Counters:
    """What a block device has done so far."""

    writes: int
    written_bytes: int
    flushes: int

    def since(self, before: Counters) -> Counters:
        return Counters(
            self.writes - before.writes,
            self.written_bytes - before.written_bytes,
            self.flushes - before.flushes,
        )


class NotCountedError(Exception):
    """There is no block device whose counters would tell."""


class Device:
    """The whole block device below a folder: partitions do not count their flushes."""

    def __init__(self, path: Path) -> None:
        self.folder = path
        mount = mount_of(path)
        block = Path("/sys/dev/block") / mount.device
        if not block.exists():  # btrfs and the like: the mount has a number of its own
            info = Path(mount.source)
            if not info.is_block_device():
                raise NotCountedError(
                    f"{mount.type} at {mount.point}: no block device below it that could be asked"
                )
            device_number = info.stat().st_rdev
            block = Path("/sys/dev/block") / f"{os.major(device_number)}:{os.minor(device_number)}"
        block = block.resolve()
        self._stat = (block.parent if (block / "partition").exists() else block) / "stat"

    def read(self) -> Counters:
        """After everything that is still in memory has been written."""
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
                raise OSError(ctypes.get_errno(), "syncfs")
        finally:
            os.close(fd)
        fields = [int(f) for f in self._stat.read_text().split()]
        if len(fields) < 17:
            raise NotCountedError("this kernel does not count flushes (Linux 5.5 does)")
        return Counters(fields[4], fields[6] * SECTOR_BYTES, fields[15])


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def loop_device(folder: Path) -> Iterator[Path]:
    """A new ext4 on an image in `folder`, mounted; root only."""
    image, point = folder / "image", folder / "mounted"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    # nothing left to be initialised in the background, where it would be counted
    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
    device = run("losetup", "--find", "--show", image)
    try:
        run("mount", "-t", "ext4", device, point)
        try:
            yield point
        finally:
            run("umount", point)
    finally:
        run("losetup", "--detach", device)


@contextmanager
def place(args: argparse.Namespace) -> Iterator[Path]:
    """Where the files go: on a loop device when that is possible and wanted."""
    with workspace(args.dir) as folder:
        if os.geteuid() != 0 or args.no_loop:
            yield folder
            return
        with ExitStack() as stack:
            try:
                point = stack.enter_context(loop_device(folder))
            except (OSError, subprocess.CalledProcessError) as e:
                print(f"no loop device ({e}): the device of --dir is counted", file=sys.stderr)
                point = folder
            yield point


def segment_files(path: Path) -> dict[str, int]:
    """Finished segments, and those being made, with their sizes."""
    return {p.name: p.stat().st_size for p in path.glob("segment-*")}


def settled_segments(path: Path) -> dict[str, int]:
    """The same, when no segment is being prepared: seen unchanged and finished for a while."""
    seen: dict[str, int] = {}
    for _ in range(100):
        before, seen = seen, segment_files(path)
        if seen == before and not any(name.endswith(".tmp") for name in seen):
            break
        time.sleep(0.1)
    return seen


@dataclass(frozen=True)
class Amplification:
    """Of one run: `commits` syncs of `user_bytes` in all; `prepared` bytes of zeros in new segments."""

    device: Counters
    commits: int
    user_bytes: int
    prepared_bytes: int = 0
    segments_made: int = 0

    @property
    def bytes_ratio(self) -> float:
        return (self.device.written_bytes - self.prepared_bytes) / self.user_bytes

    @property
    def flush_ratio(self) -> float:
        return self.device.flushes / self.commits

    @property
    def prepared_ratio(self) -> float:
        return self.prepared_bytes / self.user_bytes

    def as_dict(self) -> dict[str, Any]:
        return {
            "commits": self.commits,
            "user_bytes": self.user_bytes,
            "device_bytes": self.device.written_bytes,
            "device_writes": self.device.writes,
            "flushes": self.device.flushes,
            "prepared_bytes": self.prepared_bytes,
            "segments_made": self.segments_made,
        }


def measure_journal(device: Device, commits: int, batch: int, passes: int = 1) -> Amplification:
    """`passes`: how often the ring of slots is passed; a checkpoint every half of it."""
    payload = random_bytes(PAYLOAD_BYTES)
    path = device.folder / f"journal{batch}x{passes}"
    slots = 1 << ((commits + WARM) * batch // passes).bit_length()
    with Journal(path, slots=slots) as journal:
        call: Callable[[], object] = (
            (lambda: journal.append(payload))
            if batch == 1
            else (lambda: journal.append_many([payload] * batch))
        )
        for _ in range(WARM):
            call()
        segments = settled_segments(path)
        before = device.read()
        for n in range(1, commits + 1):
            call()
            if passes > 1 and n % (slots // batch // 2) == 0:
                journal.set_snapshot_op(n * batch)
        made = {n: s for n, s in settled_segments(path).items() if n not in segments}
        after = device.read()
    user = commits * batch * PAYLOAD_BYTES
    return Amplification(after.since(before), commits, user, sum(made.values()), len(made))


def measure_raw(device: Device, commits: int, batch: int, method: Method, prepared: int) -> Amplification:
    data = random_bytes(frame_bytes(PAYLOAD_BYTES) * batch)
    with raw_file(device.folder / "raw", method, prepared) as file:
        file.run(data, WARM)
        before = device.read()
        file.run(data, commits)
        counted = device.read().since(before)
    return Amplification(counted, commits, commits * batch * PAYLOAD_BYTES)


def measure_sqlite(device: Device, commits: int, batch: int) -> Amplification:
    payloads = [random_bytes(PAYLOAD_BYTES)] * batch
    with closing(SqliteLog(device.folder / f"sqlite{batch}")) as sqlite:
        for _ in range(WARM):
            sqlite.append_many(payloads)
        before = device.read()
        for _ in range(commits):
            sqlite.append_many(payloads)
        counted = device.read().since(before)
    return Amplification(counted, commits, commits * batch * PAYLOAD_BYTES)


def measure(folder: Path, commits: int) -> dict[str, Amplification]:
    """One after the other: a counter does not mind what the disk's mood is."""
    device = Device(folder)
    results: dict[str, Amplification] = {}
    for batch in (1, BATCH):
        # beside it fewer: every commit of theirs costs the same. The journal's cross segments
        mine = commits if batch == 1 else max(100, commits // 8)
        few = max(100, commits // 20)
        entries = "1 entry" if batch == 1 else f"{batch} entries"
        results[f"journal, {entries} a sync"] = measure_journal(device, mine, batch)
        results[f"journal, {entries} a sync, checkpoints"] = measure_journal(device, mine, batch, PASSES)
        for name, method, prepared in (
            ("raw pwrite + fdatasync", Method.FDATASYNC, 32 * MIB),
            ("raw pwritev2(RWF_DSYNC)", Method.RWF_DSYNC, 32 * MIB),
            ("raw growing file", Method.FDATASYNC, 0),
        ):
            results[f"{name}, {entries} a sync"] = measure_raw(device, few, batch, method, prepared)
        results[f"sqlite3 WAL FULL, {entries} a sync"] = measure_sqlite(device, few, batch)
    return results


def report_all(report: Report, results: dict[str, Amplification]) -> None:
    one, many = (results[f"journal, {n} a sync"] for n in ("1 entry", f"{BATCH} entries"))
    report.add("flushes a commit, 1 entry a sync", [one.flush_ratio], target=1.01, at_least=False)
    report.add(
        "device bytes / user bytes, 1 entry a sync", [one.bytes_ratio], target=17.5, aim=17.3, at_least=False
    )
    report.add("zeros prepared / user bytes, 1 entry a sync", [one.prepared_ratio])
    for entries, aim in (("1 entry", 17.3), (f"{BATCH} entries", 1.55)):
        again = results[f"journal, {entries} a sync, checkpoints"]
        name = f"device bytes / user bytes, {entries} a sync, slots used {PASSES} times"
        report.add(name, [again.bytes_ratio], target=aim, at_least=False)
    report.add(f"flushes a commit, {BATCH} entries a sync", [many.flush_ratio], target=1.01, at_least=False)
    report.add(
        f"device bytes / user bytes, {BATCH} entries a sync", [many.bytes_ratio], aim=1.55, at_least=False
    )
    report.add(
        f"zeros prepared / user bytes, {BATCH} entries a sync",
        [many.prepared_ratio],
        target=1.35,
        at_least=False,
    )
    head = f"{'':44}{'commits':>9}{'bytes':>9}{'flushes':>9}{'writes':>9}{'segments':>10}"
    report.notes += ["for a byte of the user / for a commit:", head]
    for name, a in results.items():
        report.notes.append(
            f"{name:44}{a.commits:>9,}{number(a.bytes_ratio):>9}{number(a.flush_ratio):>9}"
            f"{number(a.device.writes / a.commits):>9}{a.segments_made:>10}"
        )
    report.extra["counters"] = {name: a.as_dict() for name, a in results.items()}


def picture(report: Report, path: Path) -> None:
    """Device bytes for a byte of the user, and flushes for a commit, side by side."""
    plt = pyplot()
    counters = report.extra["counters"]
    names = list(reversed(counters))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    bytes_ = [(c["device_bytes"] - c["prepared_bytes"]) / c["user_bytes"] for c in map(counters.get, names)]
    flushes = [c["flushes"] / c["commits"] for c in map(counters.get, names)]
    for axes, values, label in (
        (left, bytes_, "bytes to the device for a byte of the user"),
        (right, flushes, "flushes for a commit"),
    ):
        drawn = axes.barh(
            names, values, color=["tab:blue" if n.startswith("journal") else "lightgray" for n in names]
        )
        axes.bar_label(drawn, [number(v) for v in values], padding=2)
        axes.set_title(label, loc="left")
        axes.margins(x=0.15)
    left.set_xscale("log")
    save(figure, path)


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--no-loop", action="store_true", help="count on the device of --dir, also as root")
    args = parser.parse_args()
    try:
        with place(args) as folder:
            report = Report("amplification.py", machine(folder))
            results = measure(folder, 6_000 if args.quick else 60_000)
    except NotCountedError as e:
        print(e, file=sys.stderr)
        return 2
    report_all(report, results)
    return finish(report, args, picture)


if __name__ == "__main__":
    sys.exit(main())
