"""The journal against others that keep entries durably: the same work, in turns, A B C A B C.

Entries of 256 bytes: one durable append a call; 64 in one transaction; random reads by key over 100,000
entries; all of them one after the other. Settings of each: the lines below the table, or peers.py.
What is not installed is named and left out (exit status 2 when a target needs it).

--syncs does none of that: it counts by strace how many times each of them syncs in a transaction.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    MIB,
    PAYLOAD_BYTES,
    Report,
    finish,
    frame_bytes,
    interleave,
    machine,
    number,
    numbered_payloads,
    options,
    percentiles,
    pyplot,
    random_bytes,
    rates,
    ratios,
    save,
    shuffled,
    time_each,
    workspace,
)
from peers import PEERS, Peer
from raw import Method, RawFile, Timing, raw_file

BATCH = 64
WARM = 4
MINE, RAW = "mmapwal", "raw C"
APPEND, MANY, READ, ITERATE = "append", f"append_many({BATCH})", "read by key", "iterate all"
TARGETS = {(APPEND, "sqlite3"): 1.4, (APPEND, "lmdb"): 2.2, (MANY, "sqlite3"): 2.5}
PACKAGES = {"persist-queue, files": "persist-queue"}

Rates = dict[str, list[float]]


def put_round(call: Callable[[Any], object], argument: object, count: int) -> Timing:
    for _ in range(WARM):
        call(argument)
    return time_each(call, argument, count)


def raw_round(file: RawFile, data: bytes, count: int) -> Timing:
    file.run(data, WARM)
    return file.run(data, count)


def time_once(call: Callable[[], object], items: int) -> float:
    """Items a second."""
    start = time.perf_counter_ns()
    call()
    return items * 1e9 / (time.perf_counter_ns() - start)


def load(peer: Any, entries: int) -> None:
    for first in range(1, entries + 1, 1000):
        peer.append_many(numbered_payloads(first, min(1000, entries + 1 - first)))


def check(name: str, peer: Any, entries: int) -> None:
    """What was loaded can be read: not a comparison with something that forgets."""
    for op in shuffled(1, entries, 50, 7):
        if peer.get(op) != numbered_payloads(op, 1)[0]:
            raise SystemExit(f"{name} gives something else than what it was given")


def open_peers(folder: Path, stack: ExitStack, missing: list[str]) -> dict[str, Any]:
    peers: dict[str, Any] = {}
    for name, make in PEERS.items():
        try:
            peers[name] = stack.enter_context(closing(make(folder)))
        except ModuleNotFoundError as e:
            missing.append(f"{name}: not installed ({e.name})")
    return peers


def measure(
    folder: Path, entries: int, rounds: int, missing: list[str], extra: dict[str, Any]
) -> dict[str, Rates]:
    """Rates of each kind of work, of each contender, a sample a round."""
    found: dict[str, Rates] = {}
    with ExitStack() as stack:
        peers = open_peers(folder, stack, missing)
        for name, peer in peers.items():
            if hasattr(peer, "get"):
                load(peer, entries)
                check(name, peer, entries)
        payload = random_bytes(PAYLOAD_BYTES)
        for work, batch, count in ((APPEND, 1, 40), (MANY, BATCH, 15)):
            raw = stack.enter_context(raw_file(folder / f"raw{batch}", Method.RWF_DSYNC, 32 * MIB))
            frames = random_bytes(frame_bytes(PAYLOAD_BYTES) * batch)
            contenders = {RAW: partial(raw_round, raw, frames, count)}
            for name, peer in peers.items():
                call = peer.append if batch == 1 else peer.append_many
                contenders[name] = partial(
                    put_round, call, payload if batch == 1 else [payload] * batch, count
                )
            timings = interleave(contenders, rounds)
            found[work] = {name: [r * batch for r in rates(t)] for name, t in timings.items()}
            extra.setdefault("latency_us", {})[work] = {n: percentiles(t) for n, t in timings.items()}
        readers = {name: peer for name, peer in peers.items() if hasattr(peer, "get")}
        ops = shuffled(1, entries, min(entries, 5000), 3)
        few = max(3, rounds // 3)
        found[READ] = interleave(
            {n: partial(time_once, partial(p.read_each, ops), len(ops)) for n, p in readers.items()}, few
        )
        found[ITERATE] = interleave(
            {n: partial(time_once, p.iterate, entries) for n, p in readers.items()}, few
        )
    return found


def version(name: str) -> list[str]:
    """Of the package, where it is one."""
    try:
        return [importlib.metadata.version(PACKAGES.get(name, name))]
    except importlib.metadata.PackageNotFoundError:
        return []


def table(found: dict[str, Rates]) -> list[str]:
    """Entries a second: the median, and in brackets the quartiles as shares of it."""
    lines = ["entries a second (and the quartiles, in % of the median):"]
    lines += ["  " + " " * 22 + "".join(f"{work:>24}" for work in found)]
    for name in (RAW, *PEERS):
        cells = []
        for rates_of in found.values():
            samples = rates_of.get(name)
            if samples is None:
                cells.append(f"{'-':>24}")
                continue
            low, middle, high = (float(v) for v in np.percentile(samples, [25, 50, 75]))
            spread = f"({low / middle * 100:.0f} .. {high / middle * 100:.0f})"
            cells.append(f"{number(middle):>11} {spread:12}")
        if any(name in r for r in found.values()):
            lines.append(f"  {name:22}" + "".join(cells))
    return [*lines, ""]


def picture(report: Report, path: Path) -> None:
    """Entries a second of each, on a logarithmic scale, one panel for each kind of work."""
    plt = pyplot()
    found: dict[str, Rates] = report.extra["entries_a_second"]
    figure, panels = plt.subplots(1, len(found), figsize=(11, 3.2), sharey=True)
    names = [n for n in (RAW, *PEERS) if n in found[APPEND]]
    for axes, (work, rates_of) in zip(panels, found.items(), strict=True):
        for at, name in enumerate(reversed(names)):
            if name in rates_of:
                low, middle, high = np.percentile(rates_of[name], [25, 50, 75])
                axes.barh(at, middle, color="tab:blue" if name == MINE else "tab:grey", alpha=0.8)
                axes.plot([low, high], [at, at], color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_title(f"{work}, entries a second", loc="left", fontsize=7)
    panels[0].set_yticks(range(len(names)), list(reversed(names)))
    save(figure, path)


# --- how often each syncs -----------------------------------------------------------------------------

CALL = re.compile(r"\b(fsync|fdatasync|msync|sync_file_range|sync|syncfs)\(")
OPENED = re.compile(r"\bopenat\(.*O_D?SYNC.*= (\d+)$")
WRITTEN = re.compile(r"\b(?:write|pwrite64|writev|pwritev|pwritev2)\((\d+),")


def traced_syncs(folder: Path, name: str, batch: int, calls: int) -> int:
    """Syncs of a child that does `calls` transactions: system calls that sync, writes with RWF_DSYNC, and
    writes to descriptors that were opened with O_DSYNC."""
    folder.mkdir()
    log = folder / "trace"
    traced = "fsync,fdatasync,msync,sync_file_range,sync,syncfs,openat,write,pwrite64,writev,pwritev,pwritev2"
    command = ["strace", "-f", "-qq", "-s", "0", "-e", f"trace={traced}", "-o", str(log), sys.executable]
    child = [__file__, "--child", name, str(batch), str(calls), "--dir", str(folder)]
    subprocess.run([*command, *child], check=True)
    syncs, sync_fds = 0, set()
    for line in log.read_text(errors="replace").splitlines():
        if opened := OPENED.search(line):
            sync_fds.add(opened[1])
            continue
        written = WRITTEN.search(line)
        syncs += bool(CALL.search(line) or "RWF_DSYNC" in line or (written and written[1] in sync_fds))
    return syncs


def child(folder: Path, name: str, batch: int, calls: int) -> int:
    peer: Peer
    with closing(PEERS[name](folder)) as peer:
        payload = bytes(PAYLOAD_BYTES)
        for _ in range(calls):
            peer.append(payload) if batch == 1 else peer.append_many([payload] * batch)
    return 0


def count_syncs(folder: Path) -> int:
    """Of two children the one does 100 transactions more; what it syncs more is theirs."""
    if shutil.which("strace") is None:
        print("strace is not installed", file=sys.stderr)
        return 2
    print(f"syncs a transaction:\n  {'':22}{APPEND:>12}{MANY:>18}")
    for at, name in enumerate(PEERS):
        cells = []
        for batch, width in ((1, 12), (BATCH, 18)):
            try:
                few, many = (
                    traced_syncs(folder / f"{at}-{batch}-{calls}", name, batch, calls) for calls in (20, 120)
                )
                cells.append(f"{(many - few) / 100:{width}.2f}")
            except subprocess.CalledProcessError:
                cells.append(f"{'missing':>{width}}")
        print(f"  {name:22}" + "".join(cells))
    return 0


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--entries", type=int, default=100_000, help="read and iterated over (100,000)")
    parser.add_argument("--syncs", action="store_true", help="count the syncs of each by strace instead")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.dir, args.child[0], int(args.child[1]), int(args.child[2]))
    rounds = args.rounds or (4 if args.quick else 40)
    entries = args.entries // 10 if args.quick else args.entries
    missing: list[str] = []
    with workspace(args.dir) as folder:
        if args.syncs:
            return count_syncs(folder)
        report = Report("compare.py", machine(folder))
        found = measure(folder, entries, rounds, missing, report.extra)
    report.extra["entries_a_second"] = found
    for work, rates_of in found.items():
        for name in (RAW, *PEERS):
            if name != MINE and name in rates_of:
                target = TARGETS.get((work, name))
                report.add(f"{work} / {name}", ratios(rates_of[MINE], rates_of[name]), target=target)
    report.notes += table(found)
    for name, make in PEERS.items():
        told = " ".join(str(make.__doc__).split())
        report.notes += [f"  {' '.join((name, *version(name)))}: {told}"]
    report.notes += missing
    status = finish(report, args, picture)
    lacking = [f"{work} / {name}: no such peer" for work, name in TARGETS if name not in found[work]]
    for line in lacking:
        print(line, file=sys.stderr)
    return status or (2 if lacking else 0)


if __name__ == "__main__":
    sys.exit(main())
