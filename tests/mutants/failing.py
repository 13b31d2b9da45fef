"""Bugs in what is done when a call fails."""
# ruff: noqa: E501  # pieces of the code, as they are there

from __future__ import annotations

from .mutant import Failure, Method, Mutant, Patch

_TOLD = "tests/journal/test_levels.py::test_when_a_commit_fails_all_16_threads_are_told_the_one_cause_and_none_hangs"

FAILURES = (
    Mutant(
        "sync retried after EIO",
        "a sync that failed once is never believed again",
        (
            Patch(
                "native/commit.c",
                "        if (step == MW_STAGE_WRITE && is_clean(rc)) return rc;",
                "        if (is_clean(rc) || rc == -EIO) return rc;",
            ),
        ),
        Method.FAULTS,
        Failure.OTHER_ERROR,
        "tests/crash/test_faults.py::test_a_sync_that_failed_once_is_never_believed_again",
    ),
    Mutant(
        "sync of a superblock retried",
        "a sync that failed is not repeated on the same file",
        (
            Patch(
                "mmapwal/superblock.py",
                "            spare.sync()\n",
                "            with contextlib.suppress(OSError):\n                spare.sync()\n            spare.sync()\n",
            ),
        ),
        Method.FAULTS,
        Failure.WRONG,
        "tests/crash/test_faults.py::test_whatever_call_fails_nothing_acknowledged_is_lost[EIO-before]",
    ),
    Mutant(
        "error of a commit passed over",
        "a write or sync that failed acknowledges nothing",
        (
            Patch(
                "native/commit.c",
                "    if (rc != 0) {\n        if (step",
                "    if (rc != 0 && rc != -EIO) {\n        if (step",
            ),
        ),
        Method.FAULTS,
        Failure.WRONG,
        "tests/crash/test_faults.py::test_whatever_call_fails_nothing_acknowledged_is_lost[EIO-before]",
    ),
    Mutant(
        "no poison after a directory sync that failed",
        "where nobody knows which superblock is in force, nothing goes on",
        (
            Patch(
                "mmapwal/superblock.py",
                "            raise PoisonedError(stage) from e",
                "            self.in_doubt = False\n            raise",
            ),
        ),
        Method.FAULTS,
        Failure.WRONG,
        "tests/crash/test_faults_then_crash.py::test_the_power_goes_right_behind_the_call_that_failed[When.BEFORE]",
    ),
    Mutant(
        "clean failure without a new epoch",
        "a write that failed never comes back",
        (Patch("native/commit.c", "    w->epoch_owed = true;\n", ""),),
        Method.FAULTS,
        Failure.WRONG,
        "tests/journal/test_async_failures.py::test_a_commit_without_space_fails_for_all_in_it_and_behind_it_and_never_comes_back",
    ),
    Mutant(
        "op counter not taken back",
        "the op of an append that failed is taken by the next",
        (Patch("native/commit.c", "    w->high_op = w->last_op;\n", ""),),
        Method.FAULTS,
        Failure.WRONG,
        "tests/journal/test_full_disk.py::test_an_append_without_space_appends_nothing_and_its_op_is_taken_by_the_next",
    ),
    Mutant(
        "no second try when files have gone",
        "an append without space waits for files that go",
        (
            Patch(
                "mmapwal/engine.py",
                "            self._preparer.give_back()\n            self.disposal.wait()\n",
                "            self._preparer.give_back()\n",
            ),
        ),
        Method.FAULTS,
        Failure.OTHER_ERROR,
        "tests/journal/test_compact.py::test_an_append_without_space_waits_for_files_that_go",
    ),
    Mutant(
        "poisoned journal sealed",
        "a poisoned journal is never sealed",
        (
            Patch("mmapwal/engine.py", "                self._seal()\n", "            self._seal()\n"),
            Patch(
                "mmapwal/engine.py",
                "        if self.state().poison_stage:\n            raise self.poisoned()\n        if new.seq",
                "        if new.seq",
            ),
        ),
        Method.FAULTS,
        Failure.WRONG,
        "tests/journal/test_poison.py::test_closing_a_poisoned_journal_does_not_raise_and_does_not_seal",
    ),
    Mutant(
        "follower told success",
        "when a commit fails, everyone in it is told",
        (
            Patch(
                "native/commit.c",
                "finish(w, &w->groups[i], UINT64_MAX, MW_E_POISONED);",
                "finish(w, &w->groups[i], UINT64_MAX, i);",
            ),
        ),
        Method.FAULTS,
        Failure.WRONG,
        _TOLD,
    ),
    Mutant(
        "publication before durability",
        "with SYNC an entry cannot be read before it is durable",
        (
            Patch(
                "native/commit.c",
                "    uint32_t link = stamp(g, p, &target, &as);\n",
                "    uint32_t link = stamp(g, p, &target, &as);\n    (void)publish_group(w, g->buffer + p->from, g->buffer + p->to);\n",
            ),
        ),
        Method.FAULTS,
        Failure.WRONG,
        "tests/journal/test_durability.py::test_with_sync_an_entry_cannot_be_read_before_it_is_durable",
    ),
    Mutant(
        "short write taken for whole",
        "a short write is continued",
        (Patch("native/file.c", "        bytes -= (uint64_t)n;", "        bytes = 0;"),),
        Method.CHILD,
        Failure.WRONG,
        "tests/native/test_file.py::TestWrite::test_short_and_interrupted_writes_are_continued_until_all_is_written",
    ),
    Mutant(
        "failed sync called again",
        "a sync that failed is not called again",
        (
            Patch(
                "native/file.c",
                "    do rc = fdatasync(fd);\n    while (rc != 0 && errno == EINTR);",
                "    do rc = fdatasync(fd);\n    while (rc != 0 && (errno == EINTR || errno == EIO));",
            ),
        ),
        Method.CHILD,
        Failure.WRONG,
        "tests/native/test_file.py::TestSync::test_a_failed_sync_is_told_and_not_called_again",
    ),
    Mutant(
        "no guard around loads and stores",
        "a SIGBUS in what the helper touches is an error",
        (
            Patch(
                "native/guard.c",
                "    if (sigsetjmp(guard.env, 0) != 0) return -EIO;",
                "    if (0) return -EIO;",
            ),
            Patch("native/guard.c", "    top = &guard;\n", ""),
        ),
        Method.CHILD,
        Failure.WRONG,
        "tests/native/test_guard.py::test_everything_the_helper_reads_or_stores_in_a_mapping_is_guarded",
    ),
    Mutant(
        "new segment opened behind its superblock",
        "what can fail for want of descriptors fails before a superblock names the segment",
        (
            Patch(
                "mmapwal/preparing.py",
                "            with engine.segments.expecting(record, engine.sync_method):",
                "            if True:",
            ),
        ),
        Method.FAULTS,
        Failure.OTHER_ERROR,
        "tests/journal/test_process_limits.py::test_a_new_segment_that_cannot_be_opened_for_writing_fails_the_append_and_poisons_nothing",
    ),
    Mutant(
        "file made over what lies there",
        "what comes to lie in the place of a file that is being made is not written to",
        (Patch("mmapwal/storage.py", "os.O_RDWR | os.O_CREAT | os.O_EXCL, ", "os.O_RDWR | os.O_CREAT, "),),
        Method.UNIT,
        Failure.ACCEPTED,
        "tests/journal/test_security.py::test_what_comes_to_lie_in_the_place_of_what_is_being_made_is_not_written_to",
    ),
    Mutant(
        "wait at a pipe",
        "a pipe in the place of a file is refused at once",
        (Patch("native/file.c", " | O_NOFOLLOW | O_NONBLOCK, mode);", " | O_NOFOLLOW, mode);"),),
        Method.UNIT,
        Failure.WRONG,
        "tests/journal/test_security.py::test_what_is_no_file_in_the_place_of_one_is_refused_at_once_and_never_written_through[superblock-put_pipe]",
    ),
)
