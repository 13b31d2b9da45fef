"""Removing entries: the watermark, drain, truncate_from. Each commits by one superblock, in constant
time; the space is given back by compaction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from mmapwal import format as fmt
from mmapwal._native import lib
from mmapwal.compaction import compact_in_turn, shrinking
from mmapwal.engine import Engine
from mmapwal.reader import DrainedEntries, Reader
from mmapwal.superblock import Removal, Superblock

__all__ = ["drain", "set_watermark", "truncate_from"]


@contextmanager
def _holding(engine: Engine, first: int, last: int) -> Iterator[None]:
    """No append of these ops meanwhile, and all that was appended before is durable."""
    with engine.structure:
        try:  # an interrupt may come right behind any call
            lib.mw_writer_barrier(engine.writer, first, last)
            engine.sync()
            engine.start_epoch()  # where one is owed: what failed before shall not outlive its removal
            yield
        finally:
            lib.mw_writer_barrier(engine.writer, 1, 0)


def prune_removals(superblock: Superblock) -> tuple[Removal, ...]:
    """Without what the watermark says as well, and what a wider removal says."""
    rows = [
        replace(r, first=max(r.first, superblock.watermark + 1))
        for r in superblock.removals
        if r.last > superblock.watermark
    ]
    return tuple(
        r
        for i, r in enumerate(rows)
        if not any(
            o.first <= r.first and o.last >= r.last and o.below_lsn >= r.below_lsn and (o != r or j < i)
            for j, o in enumerate(rows)
            if j != i
        )
    )


def _commit_watermark(engine: Engine, op: int, pairing: tuple[int, int] | None) -> None:
    new = replace(engine.superblock, watermark=op, pairing=pairing)
    new = replace(new, removals=prune_removals(new))
    code = engine.change(new, lambda: lib.mw_writer_set_watermark(engine.writer, op))
    if code < 0:
        raise engine.error(code)


def set_watermark(engine: Engine, op: int, *, checksum: int | None = None) -> None:
    """All ops up to `op` are gone, durably. With a checksum, the snapshot of that op is paired."""
    with shrinking(engine), _holding(engine, 1, op):
        superblock = engine.superblock
        if op < superblock.watermark:
            raise ValueError(f"the watermark is {superblock.watermark} and only grows; {op} is below it")
        pairing = superblock.pairing if checksum is None else (op, checksum)
        if op != superblock.watermark or pairing != superblock.pairing:
            _commit_watermark(engine, op, pairing)


def drain(engine: Engine, reader: Reader, first: int, last: int) -> DrainedEntries:
    """Takes the ops first .. last out. The watermark moves to `last` when nothing lives below `first`."""
    with shrinking(engine), _holding(engine, 1, last):
        superblock, state = engine.superblock, engine.state()
        entries = reader.drained(max(first, superblock.watermark + 1), last)
        if not state.live or int(state.first_op) >= first:
            if last > superblock.watermark:
                _commit_watermark(engine, last, superblock.pairing)
        elif len(entries):
            _commit_removal(engine, Removal(first, last, int(state.durable_lsn)))
        return entries


def truncate_from(engine: Engine, op: int) -> int:
    """Takes all ops from `op` on out; how many there were."""
    with shrinking(engine), _holding(engine, op, fmt.OP_MAX):
        superblock, state = engine.superblock, engine.state()
        if op <= superblock.watermark:
            raise ValueError(f"op {op} is at or below the watermark {superblock.watermark}")
        if not state.live or int(state.last_op) < op:
            return 0
        return _commit_removal(engine, Removal(op, fmt.OP_MAX, int(state.durable_lsn)), cut=True)


def _commit_removal(engine: Engine, row: Removal, *, cut: bool = False) -> int:
    if len(engine.superblock.removals) >= fmt.REMOVALS_MAX:
        compact_in_turn(engine, hidden_too=True)
    superblock = engine.superblock
    new = replace(superblock, removals=(*superblock.removals, row))
    new = replace(new, removals=prune_removals(new))
    if cut:
        new = new.with_cut(row.first)
    removed = engine.change(
        new, lambda: lib.mw_writer_remove(engine.writer, row.first, row.last, row.below_lsn)
    )
    if removed < 0:
        raise engine.error(removed)
    return int(removed)
