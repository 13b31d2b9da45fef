"""Bugs in what is written and synced, and in which order."""
# ruff: noqa: E501  # pieces of the code, as they are there

from __future__ import annotations

from .mutant import Failure, Method, Mutant, Patch, explored, unsynced

SYNCS = (
    Mutant(
        "commits without a sync",
        "an acknowledged commit is durable",
        (
            Patch(
                "native/commit.c",
                "        return io->write_sync(io->ctx, offset, buffer + p->from, bytes);",
                "        return io->write(io->ctx, offset, buffer + p->from, bytes);",
            ),
        ),
        Method.EXPLORER,
        Failure.REFUSED,
        explored("creates_and_appends"),
    ),
    Mutant(
        "sync before write",
        "the sync of a commit comes behind its write",
        (
            Patch(
                "native/commit.c",
                "        return io->write_sync(io->ctx, offset, buffer + p->from, bytes);",
                "        { int rc = io->sync(io->ctx); return rc != 0 ? rc : io->write(io->ctx, offset, buffer + p->from, bytes); }",
            ),
        ),
        Method.EXPLORER,
        Failure.LOST,
        explored("drains"),
    ),
    Mutant(
        "first sector of a commit only",
        "the sync covers all of a commit",
        (
            Patch(
                "native/commit.c",
                "        return io->write_sync(io->ctx, offset, buffer + p->from, bytes);",
                "        { int rc = io->write(io->ctx, offset, buffer + p->from, bytes);"
                " return rc != 0 ? rc : io->write_sync(io->ctx, offset, buffer + p->from, 8); }",
            ),
        ),
        Method.EXPLORER,
        Failure.LOST,
        explored("creates_and_appends"),
    ),
    Mutant(
        "write without its sync",
        "where a commit is a write and then a sync, it is both",
        (
            Patch(
                "native/commit.c",
                "    if (rc != 0 || !(sync || p->ends)) return rc;",
                "    if (rc != 0 || !p->ends) return rc;",
            ),
        ),
        Method.EXPLORER,
        Failure.LOST,
        explored("creates_and_appends", "the_same_where_a_commit_is_a_write_and_then_a_sync"),
    ),
    Mutant(
        "END not durable",
        "an END is durable before the next segment takes a frame",
        (
            Patch(
                "native/commit.c",
                "    if (rc != 0 || !(sync || p->ends)) return rc;",
                "    if (rc != 0 || !sync) return rc;",
            ),
        ),
        Method.EXPLORER,
        Failure.REFUSED,
        unsynced("syncs_now_and_then"),
    ),
    Mutant(
        "durable LSN over what no sync covered",
        "the durable LSN moves over bytes that a sync covered only",
        (
            Patch(
                "native/commit.c",
                "    bool synced = w->config.durability == MW_SYNC || p->ends;",
                "    bool synced = true;",
            ),
        ),
        Method.EXPLORER,
        Failure.LOST,
        unsynced("syncs_now_and_then"),
    ),
    Mutant(
        "new segment not synced",
        "a new segment's contents and size are durable before its name",
        (
            Patch(
                "mmapwal/segment.py",
                "        self._storage.sync()\n        self._synced = True",
                "        self._synced = True",
            ),
        ),
        Method.EXPLORER,
        Failure.REFUSED,
        explored("creates_and_appends"),
    ),
    Mutant(
        "superblock not synced",
        "a superblock's contents are durable before its name",
        (Patch("mmapwal/superblock.py", "            spare.sync()\n", ""),),
        Method.EXPLORER,
        Failure.REFUSED,
        explored("moves_the_watermark"),
    ),
    Mutant(
        "superblock synced after its rename",
        "the sync comes before the rename",
        (
            Patch("mmapwal/superblock.py", "            spare.sync()\n", ""),
            Patch(
                "mmapwal/superblock.py",
                "            self._directory.sync()\n            self.current = new",
                "            self._directory.sync()\n"
                "            late = self._directory.open(fmt.SUPERBLOCK_NAME, writable=True)\n"
                "            late.write_at(0, new.encode())\n            late.sync()\n            late.close()\n"
                "            self.current = new",
            ),
        ),
        Method.EXPLORER,
        Failure.REFUSED,
        explored("moves_the_watermark"),
    ),
    Mutant(
        "directory of a superblock not synced",
        "a change of structure is durable when it returns",
        (
            Patch(
                "mmapwal/superblock.py",
                "            self._directory.sync()\n            self.current",
                "            self.current",
            ),
        ),
        Method.EXPLORER,
        Failure.REFUSED,
        explored("moves_the_watermark"),
    ),
    Mutant(
        "directory of a new segment not synced",
        "a segment's name is durable before a superblock names it",
        (
            Patch(
                "mmapwal/segment.py", "self.record.name)\n        self._directory.sync()", "self.record.name)"
            ),
        ),
        Method.EXPLORER,
        Failure.REFUSED,
        explored("appends_batches_over_a_rotation"),
    ),
    Mutant(
        "parent of the directory not synced",
        "the journal's own name is durable before anything is acknowledged",
        (
            Patch(
                "mmapwal/opening.py",
                "        self.directory.sync_parent()\n        self.file",
                "        self.file",
            ),
            Patch(
                "mmapwal/opening.py",
                "                self.directory.sync_parent()\n                self.remove_strangers()",
                "                self.remove_strangers()",
            ),
        ),
        Method.EXPLORER,
        Failure.LOST,
        explored("creates_and_appends"),
    ),
)

SYSTEM = (
    Mutant(
        "first page of a commit's msync only",
        "the msync of a commit covers all of it",
        (
            Patch(
                "native/file.c",
                "    do rc = msync(file->map + from, offset + bytes - from, MS_SYNC);",
                "    do rc = msync(file->map + from, 1, MS_SYNC);",
            ),
        ),
        Method.CHILD,
        Failure.WRONG,
        "tests/unit/test_seam.py::test_each_msync_covers_all_of_what_was_stored[commits]",
    ),
    Mutant(
        "first page of a later msync only",
        "a sync covers all that was stored since the last one",
        (Patch("native/file.c", "msync_range(file, 0, file->bytes);", "msync_range(file, 0, 1);"),),
        Method.CHILD,
        Failure.WRONG,
        "tests/unit/test_seam.py::test_each_msync_covers_all_of_what_was_stored[syncs]",
    ),
    Mutant(
        "sync of the parent that does nothing",
        "the journal's own name is durable before anything is acknowledged",
        (
            Patch(
                "mmapwal/storage.py",
                "            _check(lib.mw_fd_sync(parent), str(self.path.parent))",
                "            pass",
            ),
        ),
        Method.CHILD,
        Failure.WRONG,
        "tests/unit/test_seam.py::test_the_parent_is_synced_behind_the_making_and_ahead_of_the_first_superblock",
    ),
)

ORDER = (
    Mutant(
        "watermark in memory only",
        "a watermark is durable when it returns",
        (
            Patch(
                "mmapwal/removal.py",
                "    code = engine.change(new, lambda: lib.mw_writer_set_watermark(engine.writer, op))",
                "    engine._file.current = new\n    code = lib.mw_writer_set_watermark(engine.writer, op)",
            ),
        ),
        Method.EXPLORER,
        Failure.INVENTED,
        explored("moves_the_watermark"),
    ),
    Mutant(
        "files unlinked before the superblock",
        "what a superblock names is there",
        (
            Patch(
                "mmapwal/compaction.py",
                "        engine.change(new, lambda: None)\n        engine.dispose([r.name for r in present if r.id in gone or r.id in renewed])",
                "        engine.dispose([r.name for r in present if r.id in gone or r.id in renewed])\n        engine.change(new, lambda: None)",
            ),
        ),
        Method.EXPLORER,
        Failure.REFUSED,
        explored("compacts"),
    ),
    Mutant(
        "compaction without a sync first",
        "a frame is dead only by one that is durable",
        (Patch("mmapwal/compaction.py", "    engine.sync()\n    dropped", "    dropped"),),
        Method.EXPLORER,
        Failure.LOST,
        unsynced("compacts_away_what_was_replaced_and_truncated"),
        800,
    ),
    Mutant(
        "removal without a sync first",
        "a removal makes durable what was appended before",
        (Patch("mmapwal/removal.py", "            engine.sync()\n", ""),),
        Method.EXPLORER,
        Failure.OTHER_ERROR,
        unsynced("drains"),
        800,
    ),
    Mutant(
        "removal row above the durable LSN",
        "a removal hides no frame that is appended later",
        (
            Patch(
                "mmapwal/removal.py",
                "        return _commit_removal(engine, Removal(op, fmt.OP_MAX, int(state.durable_lsn)), cut=True)",
                "        return _commit_removal(engine, Removal(op, fmt.OP_MAX, int(state.durable_lsn) + 4096), cut=True)",
            ),
        ),
        Method.EXPLORER,
        Failure.REFUSED,
        explored("truncates_and_refills"),
    ),
    Mutant(
        "removal row dropped too early",
        "a removal's row stays as long as a segment holds a frame that it hides",
        (Patch("mmapwal/compaction.py", "if r.below_lsn > lowest)", "if False)"),),
        Method.EXPLORER,
        Failure.INVENTED,
        explored("dies_in_the_middle_of_removals"),
    ),
    Mutant(
        "superblock of the open not made durable",
        "an open makes what it read durable before it removes anything",
        (
            Patch(
                "mmapwal/opening.py",
                "                self.file.commit(superblock)\n                self.directory.sync_parent()\n",
                "",
            ),
        ),
        Method.EXPLORER,
        Failure.REFUSED,
        "tests/crash/test_second_crash.py::test_a_superblock_that_was_not_yet_durable_when_it_was_read_is_made_so_first",
    ),
    Mutant(
        "page cache believed",
        "what no sync is known to have covered is written again",
        (
            Patch(
                "mmapwal/opening.py",
                "            renewed, written = rewrite_unproven(self.directory, self.segments.table, superblock, found)",
                "            renewed, written = {}, 0",
            ),
        ),
        Method.EXPLORER,
        Failure.REFUSED,
        unsynced("dies_and_opens_again"),
    ),
    Mutant(
        "rewritten tail not synced",
        "what is written again is synced",
        (Patch("mmapwal/recovery.py", "                storage.sync()\n", ""),),
        Method.EXPLORER,
        Failure.REFUSED,
        unsynced("dies_and_opens_again"),
    ),
    Mutant(
        "epoch before the rewrite",
        "the tail is durable before a superblock proves it",
        (
            Patch(
                "mmapwal/opening.py",
                "            renewed, written = rewrite_unproven(",
                "            self.file.commit(superblock.with_epoch(found.tail_lsn))\n            renewed, written = rewrite_unproven(",
            ),
        ),
        Method.EXPLORER,
        Failure.REFUSED,
        unsynced("dies_and_opens_again"),
    ),
    Mutant(
        "new epoch in memory only",
        "the next epoch is durable before anything is appended",
        (
            Patch(
                "mmapwal/opening.py",
                "        self.file.commit(replace(superblock, segments=tuple(kept)).with_epoch(found.tail_lsn))",
                "        self.file.current = replace(superblock, segments=tuple(kept)).with_epoch(found.tail_lsn)",
            ),
        ),
        Method.EXPLORER,
        Failure.OTHER_ERROR,
        "tests/crash/test_recovery_crash.py::test_a_crash_of_recovery_loses_nothing[dies_and_opens_again]",
    ),
    Mutant(
        "no new epoch at open",
        "what a cut left behind never comes back",
        (
            Patch(
                "mmapwal/superblock.py",
                "epoch=self.epoch + 1, epoch_start_lsn=start_lsn, seal=None)",
                "seal=None)",
            ),
        ),
        Method.EXPLORER,
        Failure.INVENTED,
        "tests/crash/test_second_crash.py::test_what_a_cut_left_behind_does_not_come_back_when_the_power_goes_again",
    ),
    Mutant(
        "batch flag ignored",
        "a batch is wholly there or wholly gone",
        (Patch("native/stage.c", ".flags = i + 1 < count ? MW_FLAG_MORE : 0", ".flags = 0"),),
        Method.EXPLORER,
        Failure.TORN,
        explored("appends_batches_over_a_rotation"),
    ),
    Mutant(
        "commits share a sector",
        "with commit_align_bytes no two commits share a sector",
        (
            Patch(
                "native/stage.c",
                "    if (align == 0 || w->open->bytes",
                "    if (align != 0 || w->open->bytes",
            ),
        ),
        Method.EXPLORER,
        Failure.LOST,
        explored(
            "creates_and_appends", "aligned_commits_survive_sectors_that_are_damaged_while_they_are_written"
        ),
        3200,
    ),
    Mutant(
        "snapshot paired before it is durable",
        "a snapshot is durable before a superblock is paired with it",
        (Patch("mmapwal/snapshot.py", "                storage.sync()\n", ""),),
        Method.EXPLORER,
        Failure.REFUSED,
        "tests/crash/test_checkpoint_crash.py::test_a_crash_leaves_the_state_of_the_acknowledged_entries",
    ),
    Mutant(
        "watermark moved before the snapshot",
        "the watermark moves with the pairing, behind the snapshot",
        (
            Patch(
                "mmapwal/replica.py",
                "            snapshot = self._snapshots.save(op, data)\n",
                "            self._journal.set_snapshot_op(op)\n            snapshot = self._snapshots.save(op, data)\n",
            ),
        ),
        Method.EXPLORER,
        Failure.WRONG,
        "tests/crash/test_checkpoint_crash.py::test_a_crash_leaves_the_state_of_the_acknowledged_entries",
    ),
    Mutant(
        "snapshot's name not durable",
        "a snapshot's name is durable before a superblock is paired with it",
        (
            Patch(
                "mmapwal/snapshot.py",
                "PersistStage.DIR_SYNC):\n            self._directory.sync()",
                "PersistStage.DIR_SYNC):\n            pass",
            ),
        ),
        Method.EXPLORER,
        Failure.REFUSED,
        "tests/crash/test_checkpoint_crash.py::test_a_crash_leaves_the_state_of_the_acknowledged_entries",
    ),
    Mutant(
        "sync that does nothing",
        "what a snapshot stands for is durable before the pairing",
        (Patch("native/commit.c", "        rc = io->sync(io->ctx);\n", "        rc = 0;\n"),),
        Method.EXPLORER,
        Failure.REFUSED,
        "tests/crash/test_checkpoint_crash.py::test_a_checkpoint_makes_durable_what_it_covers_before_its_snapshot",
        800,
    ),
)
