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
    """A journal at one moment. Counters since it was opened here: 0 of one that is `readonly`."""

    entries: int
    """How many live."""
    first_op: int | None
    """Of the live ones; None: there is none."""
    last_op: int | None
    snapshot_op: int
    """The watermark."""
    segments: int
    """How many files, the one that was prepared ahead too."""
    file_bytes: int
    """Of segments and index."""
    live_bytes: int
    """Frames of live entries."""
    dead_bytes: int
    """All else that was written to the segments there are: what compact() may give back."""
    commits: int
    """Writes of one entry or many."""
    syncs: int
    appended_entries: int
    appended_bytes: int
    """Their frames, with what a commit adds."""
    staged_bytes: int
    """Appended, and not yet handed to the kernel."""
    held_bytes: int
    """Segments that are gone, whose space views still hold."""
    oldest_view_s: float
    """For how many seconds the first of those segments has been gone; 0: none is held."""
    removals: int
    """Drains and truncations that the superblock lists; compact() takes them out."""
    epoch: int
    """Of the frames that are written now."""
    sequence: int
    """Of the superblock: how often it was replaced."""


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
