"""Threads, or tasks, that append at the same time: a crowd, whose entries say of themselves who wrote them.

Run as a program it lives. Each line that it notes is an entry that was acknowledged: op, thread, number. With
Durability.OS that is when a sync behind it has returned.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path

from mmapwal import AsyncJournal, Durability, Journal, SyncMethod

THREADS = 6
BATCH = 4  # entries; thread 0 writes batches


def payload(thread: int, number: int) -> bytes:
    return (b"thread %d, number %d; " % (thread, number) * 80)[: 20 + number * 293 % 1400]


def who(found: bytes) -> tuple[int, int]:
    """Thread and number; ValueError when no thread has ever written that."""
    words = found[: found.index(b";")].split()
    thread, number = int(words[1].rstrip(b",")), int(words[3])
    if payload(thread, number) != found:
        raise ValueError(found)
    return thread, number


def work(journal: Journal, thread: int, count: int) -> None:
    unsynced = journal.durability is not Durability.SYNC
    step = BATCH if thread == 0 else 1
    for first in range(0, count, step):
        numbers = range(first, first + step)
        if thread == 0:
            ops = list(journal.append_many([payload(0, n) for n in numbers]))
        else:
            ops = [journal.append(payload(thread, n)) for n in numbers]
        if unsynced:
            journal.sync()
        os.write(1, b"".join(b"%d %d %d\n" % (op, thread, n) for op, n in zip(ops, numbers, strict=True)))


async def work_in_a_task(appends: AsyncJournal, task: int, count: int, *, unsynced: bool) -> None:
    step = BATCH if task == 0 else 1
    for first in range(0, count, step):
        numbers = range(first, first + step)
        if task == 0:
            ops = list(await appends.append_many([payload(0, n) for n in numbers]))
        else:
            ops = [await appends.append(payload(task, n)) for n in numbers]
        if unsynced:
            await appends.sync()
        os.write(1, b"".join(b"%d %d %d\n" % (op, task, n) for op, n in zip(ops, numbers, strict=True)))


async def run_tasks(journal: Journal, count: int) -> None:
    unsynced = journal.durability is not Durability.SYNC
    async with AsyncJournal(journal) as appends:
        await asyncio.gather(*(work_in_a_task(appends, n, count, unsynced=unsynced) for n in range(THREADS)))


if __name__ == "__main__":
    journal = Journal(
        Path(sys.argv[1]), sync_method=SyncMethod(sys.argv[2]), durability=Durability[sys.argv[3]],
        slots=4096, segment_bytes=32768,
    )  # fmt: skip
    count = int(sys.argv[4])
    if "tasks" in sys.argv[5:]:
        asyncio.run(run_tasks(journal, count))
    else:
        threads = [threading.Thread(target=work, args=(journal, n, count)) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    os._exit(0)
