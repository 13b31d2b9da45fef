"""mmapwal demo: journals a folder tree, is killed on the way, recovers, and proves that nothing is lost.

The parent walks the tree once and hands the entries to a child (demo_child.py), which it kills. It
knows what was submitted, in which order, and what the child said was durable; demo_check.py compares
that with what comes back.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from mmapwal import Replica, recover
from mmapwal.cli import output
from mmapwal.cli.demo_check import (
    Acknowledgement,
    Recovered,
    State,
    check_history,
    check_state,
    replay,
)
from mmapwal.cli.demo_child import BATCH, ONE_A_CALL_S, SEGMENT_BYTES, append_batch
from mmapwal.cli.demo_crash import journal_until_killed
from mmapwal.cli.demo_machines import Catalog, Usage, mux
from mmapwal.cli.demo_tree import Submission, Tree, collect
from mmapwal.cli.opening import CannotRunError
from mmapwal.errors import CorruptionError, IncompatibleFormatError, SnapshotError, StateMachineError

DIFFERENCES_SHOWN = 20


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="journal a folder tree, kill it halfway, prove that nothing is lost",
        description="Journals the metadata of every file and folder below TREE in a child process, kills "
        "that at a random moment, recovers, and checks that what was acknowledged is a prefix of what was "
        "recovered, that this is a prefix of what was submitted, and that the state machines hold exactly "
        "what it makes. Then finishes, checkpoints, compacts, opens again, and prints what it measured. "
        "Exit code 1 when anything differs.",
    )
    parser.add_argument(
        "tree",
        metavar="TREE",
        nargs="?",
        help="the folder to read (default: the running Python's own library)",
    )
    parser.add_argument("--json", action="store_true", help="one object with all results")
    parser.add_argument(
        "--dir", type=Path, help="an empty or new folder to work in (default: a temporary one)"
    )
    parser.add_argument("--seed", type=int, help="chooses the moment of the kill (default: at random)")
    parser.add_argument("--keep", action="store_true", help="leave the journal there afterwards")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    root = args.tree or sysconfig.get_path("stdlib")
    seed = random.randrange(2**32) if args.seed is None else args.seed
    tree = collect(root)
    work = _Work(args.dir, keep=args.keep)
    with work:
        results = {"tree": root, "seed": seed} | _play(tree, work.path, random.Random(seed))
        work.keep |= bool(results["differences"])
    results["kept_in"] = str(work.path) if work.keep else None
    if args.json:
        output.json_line(results)
    else:
        _print(results)
    return 1 if results["differences"] else 0


class _Work:
    """The folder that the demo works in: everything in it was made by it, and goes at the end."""

    def __init__(self, given: Path | None, *, keep: bool) -> None:
        self.keep = keep
        self._given = given

    def __enter__(self) -> _Work:
        self._made = self._given is None or not self._given.exists()
        if self._given is None:
            self.path = Path(tempfile.mkdtemp(prefix="mmapwal-demo-"))
        else:
            self.path = self._given.absolute()
            self.path.mkdir(exist_ok=True)
            if any(self.path.iterdir()):
                raise CannotRunError(f"{self.path}: is not empty")
        return self

    def __exit__(self, *exc: object) -> None:
        if self.keep:
            return
        if self._made:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for item in self.path.iterdir():
            if item.is_dir():
                shutil.rmtree(item, ignore_errors=True)
            else:
                item.unlink()


def _play(tree: Tree, work: Path, chance: random.Random) -> dict[str, Any]:
    """All acts. Returns what was counted and measured, and `differences`, empty when all is well."""
    submitted = tree.entries
    results: dict[str, Any] = {
        "entries": len(submitted),
        "paths": dict(tree.counts),
        "unreadable": tree.unreadable,
        "vanished": tree.vanished,
        "differences": [],
    }
    options = _options(len(submitted))
    acknowledged = journal_until_killed(submitted, work, options["slots"], chance)
    results["acknowledged"] = len(acknowledged)
    try:
        _recover_and_finish(results, work / "journal", options, acknowledged, submitted)
        if not results["differences"]:
            _open_again(results, work / "journal", options, submitted)
    except (CorruptionError, IncompatibleFormatError, SnapshotError, StateMachineError) as e:
        # No disk and no user can cause these here: the journal does not take what it wrote itself.
        results["differences"].append(f"{type(e).__name__}: {e}")
    return results


def _recover_and_finish(
    results: dict[str, Any],
    journal: Path,
    options: dict[str, Any],
    acknowledged: Sequence[Acknowledgement],
    submitted: Sequence[Submission],
) -> None:
    """After the crash: recovers, checks what came back, journals the rest, checkpoints, compacts."""
    catalog, usage = Catalog(), Usage()
    begun = time.perf_counter()
    with closing(recover(journal, mux(catalog, usage), **options)) as replica:
        results["recovery_s"] = time.perf_counter() - begun
        recovered = [Recovered(e.op, e.kind, bytes(e.payload)) for e in replica.journal.entries()]
        results["recovered"] = len(recovered)
        results["tail"] = replica.journal.report.outcome.value
        state = State(catalog.paths, usage.types)
        results["differences"] += check_history(acknowledged, recovered, submitted)
        results["differences"] += check_state(state, replay(submitted[: len(recovered)]), "after the crash")
        if results["differences"]:
            return
        results |= _finish(replica, submitted[len(recovered) :])
        results["bytes_before"] = replica.journal.stats().file_bytes
        replica.checkpoint()
        replica.journal.compact()
        results["bytes_after"] = replica.journal.stats().file_bytes
        results["differences"] += check_state(state, replay(submitted), "at the end")


def _open_again(
    results: dict[str, Any], journal: Path, options: dict[str, Any], submitted: Sequence[Submission]
) -> None:
    """After the close: the snapshot alone must make the same state."""
    catalog, usage = Catalog(), Usage()
    begun = time.perf_counter()
    with closing(recover(journal, mux(catalog, usage), **options)):
        results["reopen_s"] = time.perf_counter() - begun
        state = State(catalog.paths, usage.types)
        results["differences"] += check_state(state, replay(submitted), "opened again")


def _options(entries: int) -> dict[str, Any]:
    """A slot for every entry: the demo checkpoints only at its end."""
    return {"slots": max(1024, 1 << entries.bit_length()), "segment_bytes": SEGMENT_BYTES}


# --- the rest, timed ------------------------------------------------------------------------------


def _finish(replica: Replica, rest: Sequence[Submission]) -> dict[str, Any]:
    """Journals what the child did not: the first half one a call, for some seconds at most, then
    BATCH a call. Times each append until it is durable; applying comes after it."""
    single_s: list[float] = []
    batch_s: list[float] = []
    stop = time.monotonic() + ONE_A_CALL_S
    at = 0
    while at < (len(rest) + 1) // 2 and time.monotonic() < stop:
        begun = time.perf_counter()
        op = replica.journal.append(rest[at].payload, kind=rest[at].kind)
        single_s.append(time.perf_counter() - begun)
        replica.commit(op)
        at += 1
    singles = at
    for first in range(singles, len(rest), BATCH):
        batch = rest[first : first + BATCH]
        begun = time.perf_counter()
        ops = append_batch(replica.journal, batch)
        batch_s.append(time.perf_counter() - begun)
        replica.commit(ops[-1])
    return {"one_a_call": _figures(single_s, singles), "batched": _figures(batch_s, len(rest) - singles)}


def _figures(durations_s: list[float], entries: int) -> dict[str, Any]:
    """Entries, entries a second, and the median and 99th percentile of a call; None for no calls."""
    ordered = sorted(durations_s)
    if not ordered:
        return {"entries": 0, "calls": 0, "entries_per_s": None, "p50_us": None, "p99_us": None}
    return {
        "entries": entries,
        "calls": len(ordered),
        "entries_per_s": round(entries / sum(ordered)),
        "p50_us": round(ordered[len(ordered) // 2] * 1e6, 1),
        "p99_us": round(ordered[len(ordered) * 99 // 100] * 1e6, 1),
    }


# --- what is printed ------------------------------------------------------------------------------


def _print(results: dict[str, Any]) -> None:
    if results["differences"]:
        output.line(f"mmapwal demo: {len(results['differences'])} differences, seed {results['seed']}")
        for difference in results["differences"][:DIFFERENCES_SHOWN]:
            output.line(f"  {difference}")
        if len(results["differences"]) > DIFFERENCES_SHOWN:
            output.line(f"  and {len(results['differences']) - DIFFERENCES_SHOWN} more")
        output.line(f"the journal is left in {results['kept_in']}")
        return
    output.table(f"mmapwal demo {results['tree']}", _rows(results))
    output.line("All acknowledged entries were recovered, nothing else was, and the state is what they make.")


def _rows(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    counts = sorted(results["paths"].items())
    paths = ", ".join(f"{count:,} {name}{'s' if count > 1 else ''}" for name, count in counts)
    yield "read", paths or "an empty tree"
    for name in ("unreadable", "vanished"):
        if results[name]:
            yield name, output.count_text(results[name])
    yield "entries", output.count_text(results["entries"])
    yield "acknowledged, then SIGKILL", f"{results['acknowledged']:,} (seed {results['seed']})"
    yield "recovered", output.count_text(results["recovered"])
    yield "recovery time", f"{results['recovery_s'] * 1e3:.1f} ms, replay included; tail {results['tail']}"
    for key, name in (("one_a_call", "one a call"), ("batched", f"{BATCH} a call")):
        figures = results[key]
        if figures["calls"]:
            yield f"appended {name}", output.count_text(figures["entries"])
            yield "  entries a second", output.count_text(figures["entries_per_s"])
            yield "  p50 of an append", f"{figures['p50_us']:,} µs"
            yield "  p99 of an append", f"{figures['p99_us']:,} µs"
    yield "bytes before compaction", output.bytes_text(results["bytes_before"])
    yield "bytes after compaction", output.bytes_text(results["bytes_after"])
    yield "opened again in", f"{results['reopen_s'] * 1e3:.1f} ms, from the snapshot"
    if results["kept_in"]:
        yield "left in", results["kept_in"]
