"""What durability costs a Raft cluster: three PySyncObj nodes on 127.0.0.1, writes one behind the other.

The library's own file journal, which never syncs; a journal with one sync an entry; and use_mmapwal(), which
syncs once before a message leaves that promises what is new. Each node is a process. A round starts a
cluster, waits until it agrees, writes to its leader, and counts until the last write is acknowledged.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from common import Report, bars, finish, interleave, machine, options, ratios, workspace

WRITES = 20_000
ROUNDS = 7
UNSYNCED, EACH, SHARED = "the library's journal, unsynced", "a sync for each entry", "use_mmapwal()"

NODE = """
import json, sys, threading, time
from pysyncobj import SyncObj, SyncObjConf, replicated
from mmapwal.integrations import pysyncobj as plugged

how, folder, me, *others = sys.argv[1:]
conf = SyncObjConf(autoTickPeriod=0.01, appendEntriesPeriod=0.01, raftMinTimeout=0.5, raftMaxTimeout=1.0,
                   connectionRetryTime=0.1, commandsQueueSize=10**6, logCompactionMinEntries=10**6)
arguments = {"conf": conf}
if how == "unsynced":
    conf.journalFile, conf.fullDumpFile = folder + ".journal", folder + ".dump"
else:
    arguments = plugged.use_mmapwal(folder, conf)
if how == "each":
    add = plugged.MmapJournal.add
    plugged.MmapJournal.add = lambda log, *entry: (add(log, *entry), log.sync())


class Store(SyncObj):
    @replicated
    def put(self, key, value):
        self.values[key] = value


store = Store(me, others, **arguments)
store.values = {}
while not (store.isReady() and store._getLeader()):
    time.sleep(0.01)
print(json.dumps(store._isLeader()), flush=True)
for line in sys.stdin:
    count, done = int(line), threading.Semaphore(0)
    began = time.perf_counter()
    for key in range(count):
        store.put(key, "some bytes" * 16, callback=lambda _, error: done.release() if not error else None)
    for _ in range(count):
        done.acquire()
    print(json.dumps(count / (time.perf_counter() - began)), flush=True)
"""


def addresses() -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


def node(how: str, folder: Path, me: str, others: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", NODE, how, str(folder / me.rpartition(":")[2]), me, *others]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def writes_a_second(how: str, folder: Path, count: int) -> float:
    """Of a new cluster."""
    nodes = addresses()
    folder = folder / nodes[0].rpartition(":")[2]
    folder.mkdir()
    processes = [node(how, folder, me, [other for other in nodes if other != me]) for me in nodes]
    try:
        leads = [said(process) for process in processes]
        leader = processes[leads.index(True)]
        assert leader.stdin is not None
        leader.stdin.write(f"{count}\n")
        leader.stdin.flush()
        return float(said(leader))
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def main() -> int:
    args = options(__doc__).parse_args()
    count = WRITES // 10 if args.quick else WRITES
    with workspace(args.dir) as folder:
        report = Report("cluster.py", machine(folder))
        contenders = {
            UNSYNCED: partial(writes_a_second, "unsynced", folder, count),
            EACH: partial(writes_a_second, "each", folder, count // 10),
            SHARED: partial(writes_a_second, "shared", folder, count),
        }
        rates = interleave(contenders, args.rounds or ROUNDS)
    report.add("use_mmapwal() / unsynced", ratios(rates[SHARED], rates[UNSYNCED]), target=0.85)
    report.add("use_mmapwal() / a sync for each entry", ratios(rates[SHARED], rates[EACH]))
    for name, samples in rates.items():
        report.add(name, samples, "/s")
    return finish(report, args, bars)


if __name__ == "__main__":
    sys.exit(main())
