"""The process that the demo kills: it journals what it was handed, and says what became durable."""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mmapwal import Journal, Replica, recover
from mmapwal.cli import output
from mmapwal.cli.demo_machines import Catalog, Usage, mux
from mmapwal.cli.demo_tree import Submission, load
from mmapwal.errors import JournalError

ACKNOWLEDGEMENT = struct.Struct("<QQ")  # op, place of the submission
BATCH = 64  # acknowledgements of one batch fit into one atomic write to a pipe
ONE_A_CALL_S = 5.0  # on a slow disk, from then on only batches
SEGMENT_BYTES = 1 << 20  # small, so that the crash meets many changes of segment


def main() -> int:
    """Arguments: the journal's folder, the file of submissions, the number of slots."""
    directory, submissions, slots = sys.argv[1:]
    try:
        replica = recover(directory, mux(Catalog(), Usage()), slots=int(slots), segment_bytes=SEGMENT_BYTES)
        try:
            _journal(replica, load(Path(submissions)))
            sys.stdin.buffer.read()  # wait to be killed; the end of the input means that the parent is gone
        finally:
            replica.close()
    except (JournalError, OSError) as e:
        output.error(f"{type(e).__name__}: {e}")
        return 2
    return 0


def _journal(replica: Replica, entries: Sequence[Submission]) -> None:
    """Turn about: BATCH entries one a call, then as many in one call."""
    one_a_call_until = time.monotonic() + ONE_A_CALL_S
    for first in range(0, len(entries), BATCH):
        batch = entries[first : first + BATCH]
        if first // BATCH % 2 == 0 and time.monotonic() < one_a_call_until:
            for place, entry in enumerate(batch, first):
                op = replica.submit(entry.payload, kind=entry.kind)
                _acknowledge([op], place)
        else:
            ops = append_batch(replica.journal, batch)
            replica.commit(ops[-1])
            _acknowledge(ops, first)


def append_batch(journal: Journal, batch: Sequence[Submission]) -> range:
    """Several entries in one commit: all or none. Returns their ops, durable."""
    return journal.append_many([e.payload for e in batch], kinds=[e.kind for e in batch])


def _acknowledge(ops: Sequence[int], first_place: int) -> None:
    os.write(1, b"".join(ACKNOWLEDGEMENT.pack(op, place) for place, op in enumerate(ops, first_place)))
