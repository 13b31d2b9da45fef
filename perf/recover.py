"""How long opening takes: after a clean close, and after a kill, with a million live entries.

A child process fills the journal and is killed with SIGKILL in the middle of an append. What it left
is put back before each round, since opening changes it. The same frames checked by the C helper alone
stand beside it: no open that believes nothing can be faster than that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from common import (
    MIB,
    PAYLOAD_BYTES,
    Report,
    check_segments,
    fill,
    finish,
    interleave,
    machine,
    map_segments,
    number,
    numbered_payloads,
    options,
    random_bytes,
    ratios,
    workspace,
)
from numpy.typing import NDArray
from raw import read_bandwidth

from mmapwal import Durability, Journal
from mmapwal.index import SlotIndex
from mmapwal.opening import begin_crc
from mmapwal.storage import SystemDirectory
from mmapwal.superblock import read_superblock
from mmapwal.threads import SecondThread

SLOTS = 1 << 20
APPENDS_BEFORE_KILL = 200
SCANS = {256: 0.55, 1024: 0.6}  # bytes of payload: part of the memory's bandwidth


def fill_until_killed(path: Path, entries: int) -> None:
    """The child: a durable journal, then one durable append after the other until it is killed."""
    journal = Journal(path, slots=SLOTS)
    fill(journal, entries)
    payload = random_bytes(PAYLOAD_BYTES)
    for appended in range(SLOTS - entries):
        journal.append(payload)
        if appended == APPENDS_BEFORE_KILL:
            print("filled", flush=True)
    time.sleep(600)


def make_killed(path: Path, entries: int) -> None:
    command = [sys.executable, str(Path(__file__).resolve()), "--fill", str(path), str(entries)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        word = child.stdout.readline()
        child.kill()
        if word != b"filled\n":
            raise RuntimeError("the filling child ended before it had filled the journal")


def same_bytes(one: Path, other: Path) -> bool:
    if not other.exists() or one.stat().st_size != other.stat().st_size:
        return False
    if one.stat().st_size == 0:
        return True
    return bool(np.array_equal(np.memmap(one, np.uint8, "r"), np.memmap(other, np.uint8, "r")))


def restore(original: Path, copy: Path) -> None:
    """Makes `copy` what `original` is, warm and with nothing left to write; what is equal stays."""
    copy.mkdir(exist_ok=True)
    for extra in {p.name for p in copy.iterdir()} - {p.name for p in original.iterdir()}:
        if (copy / extra).is_dir():
            shutil.rmtree(copy / extra)
        else:
            (copy / extra).unlink()
    for source in original.iterdir():
        if source.is_dir() or same_bytes(source, copy / source.name):
            continue
        target = copy / source.name
        target.unlink(missing_ok=True)
        shutil.copyfile(source, target)
        fd = os.open(target, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    fd = os.open(copy, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def evict(path: Path) -> None:
    """Takes the files out of the page cache: these only, not those of the whole machine."""
    for name in path.iterdir():
        fd = os.open(name, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def time_open(path: Path, stages: list[dict[str, float]], outcomes: set[str], entries: int) -> float:
    """Milliseconds until the journal can be used."""
    start = time.perf_counter_ns()
    journal = Journal(path, slots=SLOTS)
    elapsed = (time.perf_counter_ns() - start) / 1e6
    with journal:
        assert len(journal) >= entries, f"{len(journal)} live entries"
        stages.append({stage: s * 1000 for stage, s in journal.report.seconds.items()})
        outcomes.add(journal.report.outcome.value)
    return elapsed


def time_check(path: Path, threads: int) -> float:
    """Milliseconds to map all segments and check every frame in C."""
    start = time.perf_counter_ns()
    segments = map_segments(path)
    if threads == 1:
        check_segments(segments)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(check_segments, [segments[i::threads] for i in range(threads)]))
    return (time.perf_counter_ns() - start) / 1e6


def time_plain_read(path: Path) -> float:
    """Milliseconds to read every segment and the index with read(2)."""
    buffer = bytearray(MIB)
    start = time.perf_counter_ns()
    for name in sorted(path.iterdir()):
        with name.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return (time.perf_counter_ns() - start) / 1e6


def time_swap(folder: Path) -> float:
    """Milliseconds for what every open does at least once: write, sync, rename, sync the directory."""
    start = time.perf_counter_ns()
    fd = os.open(folder / "swap.tmp", os.O_WRONLY | os.O_CREAT)
    os.pwrite(fd, bytes(4096), 0)
    os.fsync(fd)
    os.close(fd)
    (folder / "swap.tmp").rename(folder / "swap")
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return (time.perf_counter_ns() - start) / 1e6


def time_index(path: Path) -> float:
    """Milliseconds for the check whether the index is the one that was sealed."""
    with SystemDirectory(path) as directory:
        superblock = read_superblock(directory)
        assert superblock is not None
        start = time.perf_counter_ns()
        index = SlotIndex.open(directory, superblock.uuid, superblock.slot_count)
        assert index is not None
        with SecondThread("check") as second:
            begin_crc(index, second, 2)()
        elapsed = time.perf_counter_ns() - start
        index.close()
    return elapsed / 1e6


class Measurement:
    """The three directories, and what the opens reported."""

    def __init__(self, folder: Path, entries: int) -> None:
        self.entries = entries
        self.killed, self.copy, self.clean = folder / "killed", folder / "copy", folder / "clean"
        self.stages: dict[str, list[dict[str, float]]] = {"clean": [], "killed": [], "cold": []}
        self.outcomes: dict[str, set[str]] = {"clean": set(), "killed": set(), "cold": set()}
        make_killed(self.killed, entries)
        restore(self.killed, self.clean)
        Journal(self.clean, slots=SLOTS).close()
        self.segments: dict[int, list[NDArray[np.uint8]]] = {PAYLOAD_BYTES: map_segments(self.killed)}
        for size in set(SCANS) - {PAYLOAD_BYTES}:
            path = folder / f"scan-{size}"
            with Journal(path, durability=Durability.OS, slots=SLOTS) as journal:
                count = entries * PAYLOAD_BYTES // size
                for first in range(1, count + 1, 1000):
                    journal.append_many(numbered_payloads(first, min(1000, count + 1 - first), size))
            self.segments[size] = map_segments(path)
        self.memory = np.ones(256 * MIB, np.uint8)

    def _open(self, path: Path, kind: str) -> float:
        return time_open(path, self.stages[kind], self.outcomes[kind], self.entries)

    def after_clean_close(self) -> float:
        return self._open(self.clean, "clean")

    def after_kill(self) -> float:
        restore(self.killed, self.copy)
        return self._open(self.copy, "killed")

    def after_kill_cold(self) -> float:
        restore(self.killed, self.copy)
        evict(self.copy)
        return self._open(self.copy, "cold")

    def plain_read_cold(self) -> float:
        restore(self.killed, self.copy)
        evict(self.copy)
        return time_plain_read(self.copy)

    def contenders(self, cold: bool) -> dict[str, Callable[[], float]]:
        chosen: dict[str, Callable[[], float]] = {
            "clean": self.after_clean_close,
            "killed": self.after_kill,
            "check": partial(time_check, self.killed, 1),
            "check 2": partial(time_check, self.killed, 2),
            "swap": partial(time_swap, self.clean.parent),
            "index": partial(time_index, self.clean),
            "memory": partial(read_bandwidth, self.memory),
        }
        for size, segments in self.segments.items():
            chosen[f"scan {size}"] = partial(check_segments, segments)
        if cold:
            chosen |= {"cold": self.after_kill_cold, "cold read": self.plain_read_cold}
        return chosen


def stage_notes(m: Measurement) -> list[str]:
    lines = []
    for kind, opens in m.stages.items():
        if opens:
            names = dict.fromkeys(name for o in opens for name in o)
            medians = (f"{n} {number(float(np.median([o.get(n, 0) for o in opens])))}" for n in names)
            lines.append(
                f"stages of an open, {kind} ({', '.join(m.outcomes[kind])}), ms: {', '.join(medians)}"
            )
    return lines


def main() -> int:
    if sys.argv[1:2] == ["--fill"]:
        fill_until_killed(Path(sys.argv[2]), int(sys.argv[3]))
        return 0
    parser = options(__doc__)
    parser.add_argument("--cold", action="store_true", help="also with the files out of the page cache")
    args = parser.parse_args()
    entries = 100_000 if args.quick else 1_000_000
    rounds = args.rounds or (3 if args.quick else 9)
    with workspace(args.dir) as folder:
        report = Report("recover.py", machine(folder))
        m = Measurement(folder, entries)
        ms = interleave(m.contenders(args.cold), rounds)
        size = sum(p.stat().st_size for p in m.killed.glob("segment-*"))
    for name, bound in SCANS.items():
        report.add(
            f"scan in C / memory, {name} bytes", ratios(ms[f"scan {name}"], ms["memory"]), target=bound
        )
    sealed = "calibration: index checked, and a superblock swapped in"
    report.add("open after a clean close", ms["clean"], "ms", target=10, at_least=False, limit=sealed)
    checked = "check of all frames in C, two threads"
    report.add("open after a kill, warm", ms["killed"], "ms", target=45, at_least=False, limit=checked)
    report.add("check of all frames in C, one thread", ms["check"], "ms", at_least=False)
    report.add(checked, ms["check 2"], "ms", at_least=False)
    best = [min(pair) for pair in zip(ms["check"], ms["check 2"], strict=True)]
    report.add("open after a kill / check alone", ratios(ms["killed"], best), target=2, at_least=False)
    if args.cold:
        report.add("open after a kill, cold", ms["cold"], "ms", at_least=False)
        report.add("plain cold read", ms["cold read"], "ms", at_least=False)
        report.add("plain cold read / cold open", ratios(ms["cold read"], ms["cold"]), target=0.85)
    least = [a + b for a, b in zip(ms["index"], ms["swap"], strict=True)]
    report.add(sealed, least, "ms", at_least=False)
    report.add("calibration: write, sync, rename, sync", ms["swap"], "ms", at_least=False)
    report.add("calibration: memory, read once", [v / 1e9 for v in ms["memory"]], "GB/s")
    report.notes.append(
        f"{number(entries)} entries of {PAYLOAD_BYTES} bytes, {size / MIB:.0f} MiB of segments"
    )
    report.notes += stage_notes(m)
    report.extra["stages_ms"] = m.stages
    return finish(report, args)


if __name__ == "__main__":
    sys.exit(main())
