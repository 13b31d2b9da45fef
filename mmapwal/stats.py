"""What a journal holds and has done, in numbers."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mmapwal import format as fmt
from mmapwal.compaction import Live
from mmapwal.engine import Engine

__all__ = ["JournalStats", "take_stats"]


@dataclass(frozen=True, slots=True)
class JournalStats:
    """A journal at one moment. Sizes in bytes; counters since it was opened."""

    entries: int
    first_op: int | None
    last_op: int | None
    snapshot_op: int
    segments: int
    file_bytes: int
    live_bytes: int
    dead_bytes: int
    commits: int
    syncs: int
    appended_entries: int
    appended_bytes: int
    staged_bytes: int
    held_bytes: int
    oldest_view_s: float
    removals: int
    epoch: int
    sequence: int


def take_stats(engine: Engine) -> JournalStats:
    """Walks the slots; the journal goes on meanwhile."""
    state, superblock = engine.state(), engine.superblock
    live = Live(engine.index.copy()).total_bytes
    held = engine.segments.held.held()
    now = time.monotonic()
    segment_bytes = sum(s.file_bytes for s in superblock.segments)
    used = sum(min(s.next_base_lsn, state.written_lsn) - s.base_lsn
               for s in superblock.segments if s.base_lsn < state.written_lsn)  # fmt: skip
    return JournalStats(
        entries=int(state.live), first_op=int(state.first_op) or None, last_op=int(state.last_op) or None,
        snapshot_op=int(state.watermark), segments=len(superblock.segments),
        file_bytes=segment_bytes + fmt.PAGE_BYTES + superblock.slot_count * fmt.SLOT_BYTES,
        live_bytes=live, dead_bytes=max(0, used - live), commits=int(state.commits),
        syncs=int(state.syncs), appended_entries=int(state.entries), appended_bytes=int(state.bytes),
        staged_bytes=int(state.staged_bytes), held_bytes=sum(length for length, _ in held),
        oldest_view_s=max((now - since for _, since in held), default=0.0),
        removals=len(superblock.removals), epoch=int(state.epoch), sequence=superblock.sequence,
    )  # fmt: skip
