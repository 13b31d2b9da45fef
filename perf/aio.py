"""What asyncio gains: 1 .. 1000 tasks, one durable entry of 256 bytes an await each.

Against the raw C loop that writes one at a time. By the committer's thread, and inline on the loop's own.
The loop, the tasks and the committer are there before the clock starts.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from common import (
    MIB,
    PAYLOAD_BYTES,
    Report,
    band,
    finish,
    frame_bytes,
    interleave,
    machine,
    make_room,
    options,
    pyplot,
    random_bytes,
    rates,
    ratios,
    save,
    workspace,
)
from raw import Method, Timing, raw_file

from mmapwal import AsyncJournal, Journal

TASKS = (1, 10, 100, 1000)
TURNING = (100, 1000)  # tasks whose appends take less than what asyncio does for them
RAW = "raw C, one at a time"
TARGETS: dict[str, float | None] = {
    "1 task": 0.45,
    "10 tasks": 3.8,
    "100 tasks": 20,
    "1000 tasks": 30,
    "1 task, inline": 0.65,
}


async def all_await(
    append: Callable[[bytes], Awaitable[object]], payload: bytes, tasks: int, awaits: int
) -> Timing:
    ns = np.zeros((tasks, awaits), np.uint64)
    go = asyncio.Event()

    async def work(who: int) -> None:
        clock = time.perf_counter_ns
        times = [0] * awaits
        await go.wait()
        for i in range(awaits):
            before = clock()
            await append(payload)
            times[i] = clock() - before
        ns[who] = times

    workers = [asyncio.create_task(work(i)) for i in range(tasks)]
    await asyncio.sleep(0)
    start = time.perf_counter_ns()
    go.set()
    await asyncio.gather(*workers)
    return Timing(ns.ravel(), time.perf_counter_ns() - start)


class Turns:
    """What asyncio itself takes: nothing is written, and each turn of the loop tells all who wait."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[int]] = []

    def append(self, payload: bytes) -> asyncio.Future[int]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = asyncio.Future(loop=loop)
        if not self._waiting:
            loop.call_soon(self._tell)
        self._waiting.append(future)
        return future

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.set_result(0)

    def run(self, payload: bytes, tasks: int, awaits: int) -> Timing:
        with asyncio.Runner() as runner:
            return runner.run(all_await(self.append, payload, tasks, awaits))


class Loop:
    """An event loop with an AsyncJournal, kept between the rounds."""

    def __init__(self, path: Path, *, inline: bool) -> None:
        self._journal = Journal(path, slots=1 << 20)
        self._runner = asyncio.Runner()
        self._async = AsyncJournal(self._journal, inline=inline)
        self._runner.run(self._async.__aenter__())

    def run(self, payload: bytes, tasks: int, awaits: int) -> Timing:
        """Each task awaits `awaits` appends, one after the other."""
        make_room(self._journal, tasks * awaits)
        return self._runner.run(all_await(self._async.append, payload, tasks, awaits))

    def close(self) -> None:
        self._runner.run(self._async.close())
        self._runner.close()
        self._journal.close()


def name_of(tasks: int, *, inline: bool) -> str:
    return f"{tasks} task{'s' if tasks > 1 else ''}{', inline' if inline else ''}"


def turning(tasks: int) -> str:
    return f"calibration: {tasks} tasks, nothing written"


def measure(folder: Path, rounds: int, scale: int) -> dict[str, list[Timing]]:
    payload = random_bytes(PAYLOAD_BYTES)
    frame = random_bytes(frame_bytes(PAYLOAD_BYTES))
    with ExitStack() as stack:
        raw = stack.enter_context(raw_file(folder / "raw", Method.RWF_DSYNC, 32 * MIB))
        contenders: dict[str, Callable[[], Timing]] = {RAW: partial(raw.run, frame, 100 * scale)}
        for inline in (False, True):
            loop = Loop(folder / f"journal-{inline}", inline=inline)
            stack.callback(loop.close)
            for tasks in TASKS:
                awaits = max(10, 100 // tasks) * scale
                contenders[name_of(tasks, inline=inline)] = partial(loop.run, payload, tasks, awaits)
        for tasks in TURNING:
            contenders[turning(tasks)] = partial(Turns().run, payload, tasks, 10 * scale)
        return interleave(contenders, rounds)


def picture(report: Report, path: Path) -> None:
    """Entries a second by tasks."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5.5, 3.4))
    for inline, label in ((False, "committer's thread"), (True, "inline")):
        values = [report.extra["rates"][name_of(n, inline=inline)] for n in TASKS]
        band(axes, TASKS, values, label)
    axes.axhline(np.median(report.extra["rates"][RAW]), color="black", linestyle="--", lw=1, label=RAW)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tasks, one durable entry of 256 bytes an await each")
    axes.set_ylabel("entries a second")
    axes.legend(fontsize=7)
    save(figure, path)


def main() -> int:
    args = options(__doc__).parse_args()
    rounds = args.rounds or (3 if args.quick else 15)
    with workspace(args.dir) as folder:
        report = Report("aio.py", machine(folder))
        results = measure(folder, rounds, 1 if args.quick else 2)
    rate = {name: rates(timings) for name, timings in results.items()}
    for name in results:
        if name != RAW:
            report.add(f"{name} / {RAW}", ratios(rate[name], rate[RAW]), target=TARGETS.get(name))
    for tasks in TURNING:
        name = name_of(tasks, inline=False)
        report.add(f"{name} / the same, nothing written", ratios(rate[name], rate[turning(tasks)]))
    report.add_latencies("entries a second, and microseconds an await:", results)
    return finish(report, args, picture)


if __name__ == "__main__":
    sys.exit(main())
