"""Run by test_cut_files.py: threads read and write a journal while its files are cut under their mappings.

Arguments: path; what is cut ("segment" or "index"); when faulthandler is enabled ("never", "before" or
"after"); "view" to end with a look at a view. Prints how each way of reading ended, as JSON.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmapwal import CorruptionError, Journal, MissingOpError, PoisonedError
from mmapwal import format as fmt

ENTRIES = 2000
ROUNDS = 30


def main(path: str, what: str, faults: str) -> None:
    if faults == "before":
        faulthandler.enable()
    journal = Journal(path, slots=4096, segment_bytes=1 << 18)
    for _ in range(ENTRIES // 100):
        journal.append_many([b"x" * 200] * 100)
    reader = Journal(path, readonly=True)
    if faults == "after":
        faulthandler.enable()
    ways: dict[str, Callable[[int], Any]] = {
        "copy": lambda n: journal.copy(1 + n * 61 % ENTRIES),
        "header": lambda n: journal.header(1 + n * 61 % ENTRIES),
        "headers": lambda n: journal.headers(copy=True),
        "entries": lambda n: sum(1 for _ in journal),
        "payloads": lambda n: sum(1 for _ in journal.payloads()),
        "columns": lambda n: journal.columns(),
        "verify": lambda n: journal.verify(),
        "follow": lambda n: sum(1 for _ in journal.follow(timeout=0)),
        "readonly copy": lambda n: reader.copy(1 + n * 61 % ENTRIES),
        "readonly follow": lambda n: sum(1 for _ in reader.follow(timeout=0)),
        "append": lambda n: journal.append(b"y" * 100),
        "compact": lambda n: journal.compact(),
        "stats": lambda n: journal.stats(),
    }
    journal._engine.prepare_segment()  # none gets its name while they are cut
    for way in ways.values():  # all is mapped
        way(0)
    ended: dict[str, Counter[str]] = {name: Counter() for name in ways}
    ready = threading.Barrier(len(ways) + 1)

    def work(name: str) -> None:
        ready.wait()
        for n in range(ROUNDS):
            try:
                ways[name](n)
                ended[name]["none"] += 1
            except (OSError, CorruptionError, PoisonedError, MissingOpError) as e:
                ended[name][type(e).__name__] += 1

    threads = [threading.Thread(target=work, args=(name,)) for name in ways]
    for thread in threads:
        thread.start()
    ready.wait()
    files = Path(path).glob("segment-*") if what == "segment" else [Path(path) / fmt.INDEX_NAME]
    for file in files:
        os.truncate(file, fmt.PAGE_BYTES if what == "segment" else 0)
    for thread in threads:
        thread.join()
    for name, way in ways.items():  # and each once more, for certain behind the cut
        try:
            way(ENTRIES)
            ended[name]["none"] += 1
        except (OSError, CorruptionError, PoisonedError, MissingOpError) as e:
            ended[name][f"behind: {type(e).__name__}"] += 1
    print(json.dumps({name: sorted(counts) for name, counts in ended.items()}), flush=True)
    if what == "segment" and len(sys.argv) > 4:  # a view is the user's: it gets the signal
        bytes(journal.read(100))  # in a segment that nobody writes to any more
    os._exit(0)  # nothing of it can be closed in order


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
