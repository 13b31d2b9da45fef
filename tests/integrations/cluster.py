"""Nodes of a replicated store, each a process of its own, which a test starts, kills and asks."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NODE = """
import json, logging, sys, threading
from pysyncobj import SyncObj, SyncObjConf, replicated
from mmapwal.integrations.pysyncobj import use_mmapwal

me, folder, options, conf, *others = sys.argv[1:]
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
said = threading.Lock()

def say(**what):
    with said:
        print(json.dumps(what), flush=True)


class Store(SyncObj):
    def __init__(self):
        settings = dict(autoTickPeriod=0.01, raftMinTimeout=1.5, raftMaxTimeout=3.0, appendEntriesPeriod=0.02,
                        connectionRetryTime=0.1, leaderFallbackTimeout=10.0, **json.loads(conf))
        settings = SyncObjConf(**settings)
        super().__init__(me, others, **use_mmapwal(folder, settings, **json.loads(options)))
        self.values = {}

    @replicated
    def put(self, key, value):
        self.values[key] = value


store = Store()
say(started=me)
for line in sys.stdin:
    asked = json.loads(line)
    if "put" in asked:
        for key in range(*asked["put"]):
            store.put(key, "value %d" % key, callback=lambda _, error, key=key: say(put=key, error=error))
    elif "values" in asked:
        say(values={key: value for key, value in list(store.values.items())})
    else:
        log = store.conf.journalFile.log
        say(leader=str(store._getLeader()), ready=store.isReady(), last=store.raftLastApplied,
            failure=str(log.failure or ""), gone=log.journal.snapshot_op)
store.destroy_synchronous()
"""


class Node:
    """A process. What it says is kept in the order in which it came."""

    def __init__(self, address: str, folder: Path, others: list[str], options: Any, conf: Any) -> None:
        self.address = address
        self.folder = folder
        command = [
            sys.executable, "-c", NODE, address, str(folder), json.dumps(options), json.dumps(conf), *others
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.acknowledged: dict[int, str] = {}
        self.errors: list[int] = []
        self.complaints: list[str] = []
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._listen, self._overhear)]
        for thread in self._threads:
            thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if "put" not in said:
                self.said.put(said)
            elif said["error"] == 0:
                self.acknowledged[said["put"]] = f"value {said['put']}"
            else:
                self.errors.append(said["error"])

    def _overhear(self) -> None:
        assert self.process.stderr is not None
        self.complaints.extend(self.process.stderr)

    def tell(self, **what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def ask(self, **what: Any) -> dict[str, Any]:
        self.tell(**what)
        return self.said.get(timeout=60)

    def put(self, first: int, last: int) -> None:
        self.tell(put=[first, last])

    def values(self) -> dict[int, str]:
        return {int(key): value for key, value in self.ask(values=True)["values"].items()}

    def kill(self) -> None:
        """kill -9; what it had said until then is known afterwards."""
        self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


class Cluster:
    """Nodes by their addresses; those that were killed can be started again."""

    def __init__(self, folder: Path, addresses: list[str], options: Any, conf: Any) -> None:
        self.folder, self.addresses, self.options, self.conf = folder, addresses, options, conf
        self.nodes: dict[str, Node] = {}

    def start(self, *addresses: str, wait: bool = True) -> list[Node]:
        started = []
        for address in addresses or self.addresses:
            others = [other for other in self.addresses if other != address]
            folder = self.folder / address.rpartition(":")[2]
            self.nodes[address] = Node(address, folder, others, self.options, self.conf)
            started.append(self.nodes[address])
        for node in started if wait else []:
            assert node.said.get(timeout=60) == {"started": node.address}
        return started

    def kill(self, *addresses: str) -> None:
        for address in addresses or tuple(self.nodes):
            self.nodes.pop(address).kill()

    def until(self, done: Any) -> None:
        deadline = time.monotonic() + 120
        while not done():
            assert time.monotonic() < deadline, {a: n.complaints[-5:] for a, n in self.nodes.items()}
            time.sleep(0.02)

    def leader(self) -> str:
        """The node that all who are there follow."""
        found: set[str] = set()

        def agreed() -> bool:
            states = [node.ask(state=True) for node in self.nodes.values()]
            found.clear()
            found.update(state["leader"] for state in states)
            return all(state["ready"] for state in states) and len(found) == 1 and found <= set(self.nodes)

        self.until(agreed)
        return found.pop()

    def until_all_have(self, expected: dict[int, str]) -> None:
        def have() -> bool:
            return all(expected.items() <= node.values().items() for node in self.nodes.values())

        self.until(have)


@contextmanager
def cluster_of(
    folder: Path, addresses: list[str], options: Any = None, conf: Any = None
) -> Iterator[Cluster]:
    cluster = Cluster(folder, addresses, options or {}, conf or {})
    try:
        yield cluster
    finally:
        cluster.kill()
