"""The latency of appends that cross from one segment into the next.

Small segments, so that there are many rotations: the journal appends across them, in turns with a raw
loop in C and with a journal whose one segment never ends. Tails are taken over all rounds together.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from common import (
    MIB,
    Report,
    finish,
    frame_bytes,
    interleave,
    machine,
    options,
    percentiles,
    pyplot,
    random_bytes,
    save,
    time_each,
    workspace,
)
from raw import Method, Timing, raw_file

from mmapwal import Journal

SEGMENT_BYTES = MIB
PAYLOAD_BYTES = 1024
CALLS = 500  # a round; 0.52 segments
ROUNDS = 140  # 73 rotations
NAMES = {
    "raw": "raw pwritev2(RWF_DSYNC)",
    "steady": "journal, one segment",
    "across": "journal, across rotations",
}


def measure(folder: Path, rounds: int) -> tuple[dict[str, list[Timing]], int]:
    """The timings of each, and how many rotations there were."""
    payload = random_bytes(PAYLOAD_BYTES)
    frame = random_bytes(frame_bytes(PAYLOAD_BYTES))
    slots = 1 << ((rounds + 2) * CALLS).bit_length()
    whole = -(-4 * slots * frame_bytes(PAYLOAD_BYTES) // MIB) * MIB  # the next one is never begun
    with (
        raw_file(folder / "raw", Method.RWF_DSYNC, 32 * MIB) as raw,
        Journal(folder / "steady", slots=slots, segment_bytes=whole) as steady,
        Journal(folder / "across", slots=slots, segment_bytes=SEGMENT_BYTES) as across,
    ):
        steady.append(payload)
        across.append(payload)
        before = across.stats().segments
        timings = interleave(
            {
                "raw": lambda: raw.run(frame, CALLS),
                "steady": lambda: time_each(steady.append, payload, CALLS),
                "across": lambda: time_each(across.append, payload, CALLS),
            },
            rounds,
        )
        return timings, across.stats().segments - before


def report_all(report: Report, timings: dict[str, list[Timing]], rotations: int) -> None:
    tails = {name: percentiles(rows) for name, rows in timings.items()}
    raw, steady, across = (tails[name] for name in ("raw", "steady", "across"))
    report.add("p99.9 across rotations / raw", [across["p99.9"] / raw["p99.9"]], target=3, at_least=False)
    report.add("p99.9 across rotations / one segment", [across["p99.9"] / steady["p99.9"]])
    report.add("p99.9 one segment / raw", [steady["p99.9"] / raw["p99.9"]])
    report.add("p99 across rotations / raw", [across["p99"] / raw["p99"]])
    report.add("p50 across rotations / raw", [across["p50"] / raw["p50"]])
    in_round = [np.percentile(t.ns, 99) for t in timings["across"]]
    report.add("p99 of a round / raw", [float(a / np.percentile(r.ns, 99))
                                        for a, r in zip(in_round, timings["raw"], strict=True)])  # fmt: skip
    report.notes.append(
        f"{rotations} rotations of {SEGMENT_BYTES // MIB} MiB segments; "
        f"{CALLS * len(timings['raw']):,} appends of {PAYLOAD_BYTES} bytes each; microseconds a call:"
    )
    for name, rows in timings.items():
        worst = max(int(t.ns.max()) for t in rows) / 1000
        cells = "  ".join(f"{k} {v:8.1f}" for k, v in tails[name].items())
        report.notes.append(f"  {NAMES[name]:28}{cells}  max {worst:9.1f}")
    report.extra["rotations"] = rotations
    report.extra["latencies_us"] = {NAMES[name]: t for name, t in tails.items()}
    report.extra["sorted_us"] = {
        NAMES[name]: (np.sort(np.concatenate([t.ns for t in rows]))[::-1][:2000] / 1000).tolist()
        for name, rows in timings.items()
    }


def picture(report: Report, path: Path) -> None:
    """The slowest appends of each, from the slowest on."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for name, worst in report.extra["sorted_us"].items():
        axes.plot(range(1, len(worst) + 1), worst, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("the n-th slowest append")
    axes.set_ylabel("microseconds")
    axes.legend(frameon=False)
    axes.set_title(f"rotation.py: {report.extra['rotations']} rotations", loc="left")
    save(figure, path)


def main() -> int:
    args = options(__doc__).parse_args()
    with workspace(args.dir) as folder:
        report = Report("rotation.py", machine(folder))
        timings, rotations = measure(folder, args.rounds or (14 if args.quick else ROUNDS))
    report_all(report, timings, rotations)
    return finish(report, args, picture)


if __name__ == "__main__":
    sys.exit(main())
