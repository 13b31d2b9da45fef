"""Bugs in what is believed of the disk, and in who may touch it."""
# ruff: noqa: E501  # pieces of the code, as they are there

from __future__ import annotations

from .mutant import Failure, Method, Mutant, Patch, damage, explored

READING = (
    Mutant(
        "acknowledged when staged",
        "an append returns when its frame is written",
        (
            Patch(
                "native/writer.c",
                "    if (op > 0 && w->config.durability != MW_BUFFERED) {",
                "    if (op > 0 && op % 1024 == 0) {",
            ),
        ),
        Method.CHILD,
        Failure.WRONG,
        "tests/journal/test_levels.py::test_killed_at_any_moment_each_level_keeps_what_it_promises[0-Durability.SYNC]",
    ),
    Mutant(
        "payload not checked",
        "a torn payload is no entry",
        (
            Patch(
                "native/scan.c",
                "    if (f->type == MW_ENTRY && f->payload_crc != mw_crc32c(0, payload, f->length)) return MW_STOP_PAYLOAD;\n",
                "",
            ),
        ),
        Method.EXPLORER,
        Failure.REFUSED,
        explored("creates_and_appends"),
        crash_states=800,
    ),
    Mutant(
        "header not checked",
        "a torn header is no frame",
        (
            Patch(
                "native/scan.c", "    if (f->header_crc != crc) return MW_STOP_HEADER;\n", "    (void)crc;\n"
            ),
        ),
        Method.DAMAGE,
        Failure.WRONG,
        damage("damage_in_the_middle_refuses_to_open_and_changes_nothing"),
    ),
    Mutant(
        "past a bad frame",
        "the scan stops at the first frame that is not right",
        (
            Patch(
                "native/scan.c",
                "        if (stop == 0) stop = accept_frame(s, &batch, &f, inserts);\n",
                "        if (stop == 0 || stop == MW_STOP_PAYLOAD) stop = accept_frame(s, &batch, &f, inserts);\n",
            ),
        ),
        Method.UNIT,
        Failure.WRONG,
        "tests/native/test_scan.py::test_a_bad_frame_is_named_by_what_is_wrong_and_nothing_of_it_is_taken",
    ),
    Mutant(
        "evidence ignored",
        "damage of what was durable is refused and never cut",
        (
            Patch(
                "mmapwal/recovery.py",
                "proven_beyond_tail=self.proven_lsn > self.tail_lsn",
                "proven_beyond_tail=False",
            ),
        ),
        Method.DAMAGE,
        Failure.ACCEPTED,
        damage("damage_in_the_middle_refuses_to_open_and_changes_nothing"),
    ),
    Mutant(
        "nothing sought behind a bad frame",
        "what lies behind a bad frame counts as evidence",
        (
            Patch(
                "mmapwal/recovery.py", "            _hunt(found, scan, record.name)\n", "            pass\n"
            ),
        ),
        Method.EXPLORER,
        Failure.WRONG,
        "tests/crash/test_second_crash.py::test_of_a_disk_that_lies_about_flushes_only_the_last_is_lost_and_a_gap_is_refused",
    ),
    Mutant(
        "evidence of the index ignored",
        "the index page proves what was durable",
        (
            Patch(
                "mmapwal/opening.py", "durable = 0 if index is None else index.progress()[1]", "durable = 0"
            ),
        ),
        Method.DAMAGE,
        Failure.ACCEPTED,
        damage("a_damaged_last_entry_that_the_index_proves_refuses"),
    ),
    Mutant(
        "evidence of later frames ignored",
        "a later frame proves what was durable before it",
        (
            Patch(
                "native/scan.c",
                "        if (f.durable_lsn > s->durable_lsn) s->durable_lsn = f.durable_lsn;\n",
                "",
            ),
        ),
        Method.DAMAGE,
        Failure.ACCEPTED,
        damage("a_damaged_entry_that_the_next_one_proves_refuses"),
    ),
    Mutant(
        "evidence of the epoch ignored",
        "all below the start of the epoch was durable",
        (
            Patch(
                "mmapwal/superblock.py",
                "return max(self.epoch_start_lsn, seal_lsn,",
                "return max(0, seal_lsn,",
            ),
        ),
        Method.DAMAGE,
        Failure.ACCEPTED,
        damage("a_damaged_entry_that_the_start_of_the_epoch_proves_refuses"),
    ),
    Mutant(
        "checksum not bound to its place",
        "a frame of another segment or journal is no frame",
        (
            Patch(
                "mmapwal/format.py",
                '    return crc32c(segment_id.to_bytes(8, "little"), crc32c(uuid))',
                "    return 0",
            ),
        ),
        Method.DAMAGE,
        Failure.ACCEPTED,
        "tests/journal/test_stale_frames.py::test_the_frames_of_another_journal_are_no_frames_here",
    ),
    Mutant(
        "place not checked",
        "a frame lies where it says, and follows the one before",
        (
            Patch("native/scan.c", "    if (f->lsn != lsn) return MW_STOP_PLACE;\n", ""),
            Patch("native/scan.c", "    if (f->link != s->link) return MW_STOP_LINK;\n", ""),
        ),
        Method.DAMAGE,
        Failure.ACCEPTED,
        damage("a_misdirected_write_refuses"),
    ),
    Mutant(
        "chain link not checked",
        "each frame names the one before",
        (Patch("native/scan.c", "    if (f->link != s->link) return MW_STOP_LINK;\n", ""),),
        Method.DAMAGE,
        Failure.ACCEPTED,
        "tests/journal/test_stale_frames.py::test_a_lost_write_of_an_epoch_that_is_over_refuses",
    ),
    Mutant(
        "old epoch accepted",
        "a frame that a cut left behind is no frame",
        (
            Patch(
                "native/scan.c",
                "    if (lsn >= s->epoch_start_lsn && f->epoch != s->epoch) return MW_STOP_OLD_EPOCH;\n",
                "",
            ),
            Patch("native/scan.c", "    if (f->epoch < s->last_epoch) return MW_STOP_OLD_EPOCH;\n", ""),
        ),
        Method.DAMAGE,
        Failure.WRONG,
        damage("the_very_bytes_that_were_cut_are_no_frame_of_the_present"),
    ),
    Mutant(
        "later epoch accepted",
        "a superblock that is older than the frames is refused",
        (Patch("native/scan.c", "    if (f->epoch > s->epoch) return MW_STOP_FUTURE_EPOCH;\n", ""),),
        Method.DAMAGE,
        Failure.WRONG,
        "tests/journal/test_files.py::test_a_superblock_of_an_earlier_epoch_refuses",
    ),
    Mutant(
        "index trusted without its seal",
        "an index is believed only with the seal's checksum",
        (Patch("mmapwal/opening.py", " and crc() == superblock.seal.index_crc\n", "\n"),),
        Method.EXPLORER,
        Failure.WRONG,
        "tests/crash/test_second_crash.py::test_an_index_that_is_never_synced_costs_a_scan_and_loses_nothing",
    ),
    Mutant(
        "older slot wins",
        "of two frames of an op the later one lives",
        (
            Patch(
                "native/slots.c",
                "m->newer[i].lsn != 0 ? m->newer[i] : m->older[i]",
                "m->older[i].lsn != 0 ? m->older[i] : m->newer[i]",
            ),
        ),
        Method.UNIT,
        Failure.WRONG,
        "tests/unit/test_recovery_threads.py::test_a_sound_journal_is_joined_wherever_it_is_parted",
    ),
    Mutant(
        "missing segment not noticed",
        "a segment that the superblock names is there",
        (Patch("mmapwal/opening.py", "            segment.check()\n", "            pass\n"),),
        Method.DAMAGE,
        Failure.ACCEPTED,
        "tests/journal/test_files.py::test_a_deleted_segment_refuses",
    ),
    Mutant(
        "superblock's checksum not checked",
        "every byte of the superblock matters",
        (
            Patch(
                "mmapwal/superblock.py",
                'if struct.unpack_from("<I", data, end)[0] != fmt.crc32c(data[:end]):',
                "if False:",
            ),
        ),
        Method.DAMAGE,
        Failure.ACCEPTED,
        "tests/journal/test_files.py::test_every_byte_of_the_superblock_matters",
    ),
    Mutant(
        "bounds of the superblock not checked",
        "a superblock that contradicts itself is refused",
        (
            Patch(
                "mmapwal/superblock.py",
                "wrong = next(_contradictions(superblock), None)",
                "wrong = None",
            ),
        ),
        Method.DAMAGE,
        Failure.WRONG,
        "tests/journal/test_security.py::test_absurd_sizes_end_in_an_error_and_not_in_memory",
    ),
    Mutant(
        "superblock written that would be refused",
        "nothing is written that would be refused when it is read",
        (
            Patch(
                "mmapwal/superblock.py",
                "return replace(new, sequence=self.current.sequence + 1).checked()",
                "return replace(new, sequence=self.current.sequence + 1)",
            ),
        ),
        Method.DAMAGE,
        Failure.ACCEPTED,
        "tests/fuzz/test_found.py::test_what_would_be_refused_when_it_is_read_is_not_written",
    ),
    Mutant(
        "version not checked",
        "a newer format is refused",
        (
            Patch(
                "mmapwal/superblock.py",
                'if int(head["version"]) != fmt.FORMAT_VERSION and not _is_rot_of_version(data):',
                "if False:",
            ),
        ),
        Method.DAMAGE,
        Failure.ACCEPTED,
        "tests/journal/test_files.py::test_a_directory_of_a_newer_format_version_is_refused",
    ),
    Mutant(
        "pairing not compared",
        "a snapshot is the one that the superblock is paired with",
        (Patch("mmapwal/snapshot.py", "    if snapshot.checksum != checksum:", "    if False:"),),
        Method.DAMAGE,
        Failure.ACCEPTED,
        "tests/unit/test_snapshot.py::test_a_paired_snapshot_that_is_missing_damaged_or_another_one_is_refused",
    ),
    Mutant(
        "newest snapshot instead of the paired one",
        "a snapshot that no superblock names did not happen",
        (
            Patch(
                "mmapwal/replica.py",
                "snapshot = snapshots.load_paired(*paired)",
                "snapshot = snapshots.load()",
            ),
        ),
        Method.DAMAGE,
        Failure.WRONG,
        "tests/unit/test_recovery_of_replicas.py::test_a_snapshot_that_no_superblock_names_is_ignored",
    ),
    Mutant(
        "lock not taken",
        "one writer at a time",
        (
            Patch(
                "mmapwal/filelock.py",
                "                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
                "                    pass\n",
            ),
        ),
        Method.CHILD,
        Failure.WRONG,
        "tests/unit/test_storage.py::test_another_process_is_locked_out",
    ),
    Mutant(
        "fork not noticed",
        "a forked child is refused",
        (
            Patch(
                "native/writer.c",
                "void mw_writer_fork(struct mw_writer *w) { w->forked = 1; }",
                "void mw_writer_fork(struct mw_writer *w) { (void)w; }",
            ),
        ),
        Method.CHILD,
        Failure.WRONG,
        "tests/journal/test_async_failures.py::test_a_fork_leaves_the_committer_to_the_parent",
    ),
    Mutant(
        "view unmapped too early",
        "a view stays right whatever becomes of its segment",
        (
            Patch(
                "mmapwal/storage.py",
                "        whole = memoryview(ffi.buffer(self.address, length))",
                "        whole = memoryview(ffi.buffer(address[0], length))",
            ),
        ),
        Method.CHILD,
        Failure.DANGLING,
        "tests/journal/test_arrays.py::test_what_was_lent_stays_right_when_all_is_replaced_compacted_unlinked_and_closed",
    ),
)
