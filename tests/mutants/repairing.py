"""Bugs in the repair of a damaged journal."""

from __future__ import annotations

from .mutant import Failure, Method, Mutant, Patch

_FILE = "tests/journal/test_repair.py::test_"
_REPLACED = "tests/journal/test_repair_replaced.py::test_"

REPAIRS = (
    Mutant(
        "older entries hidden as far as there is room",
        "what a damaged entry had replaced does not come back",
        (
            Patch(
                "mmapwal/repair.py",
                "for ops in runs[room:] for op in ops}",
                "for ops in runs[room:room] for op in ops}",
            ),
        ),
        Method.DAMAGE,
        Failure.WRONG,
        f"{_REPLACED}of_any_number_of_damaged_entries_none_falls_back_to_what_it_had_replaced",
    ),
    Mutant(
        "one removal over what lives",
        "repair hides nothing that lives",
        (Patch("mmapwal/repair.py", "runs[-1][-1] == op - 1", "runs[-1][-1] >= op - 2"),),
        Method.DAMAGE,
        Failure.WRONG,
        f"{_REPLACED}a_removal_for_damaged_entries_hides_nothing_that_lives",
    ),
    Mutant(
        "kept file overwritten",
        "what an earlier repair kept stays",
        (Patch("mmapwal/repair.py", "    while aside in taken:", "    while False:"),),
        Method.DAMAGE,
        Failure.WRONG,
        f"{_FILE}files_kept_before_under_the_same_name_stay_as_they_are",
    ),
    Mutant(
        "unreadable bytes taken for zeros",
        "what cannot be read is not left out",
        (
            Patch(
                "mmapwal/repair.py",
                "                part = storage.read_at(at, min(COPY_BYTES, end - at))\n",
                "                part = memoryview(b'')\n"
                "                with contextlib.suppress(OSError):\n"
                "                    part = storage.read_at(at, min(COPY_BYTES, end - at))\n",
            ),
        ),
        Method.DAMAGE,
        Failure.ACCEPTED,
        "tests/journal/test_repair_limits.py::test_what_cannot_be_read_is_not_left_out_and_its_file_and_byte_are_told",
    ),
    Mutant(
        "repair without a sync of the parent",
        "what was repaired survives where it was only just copied to",
        (Patch("mmapwal/repair.py", "            directory.sync_parent()  #", "            #"),),
        Method.EXPLORER,
        Failure.WRONG,
        f"{_FILE}what_was_repaired_survives_also_where_it_was_only_just_copied_to",
    ),
)
