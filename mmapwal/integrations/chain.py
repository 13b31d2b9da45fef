"""A chain of journals: what is kept for ever does not fit into one ring of slots."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmapwal import ClosedError, CorruptionError, IncompatibleFormatError, Journal
from mmapwal.integrations.folders import has_journal, make_folders

LINK_BITS = 40  # of a place, for the op
AT_MAKING = {"slots", "segment_bytes", "commit_align_bytes"}  # those that are there keep what they have
NAME = re.compile(r"journal-(\d{6})")


class Record(NamedTuple):
    """An entry with its place in the chain, which only grows from one to the next."""

    place: int
    payload: memoryview


class JournalChain:
    """Journals in one folder, the last of which takes what is appended; a full one is followed by the next.

    path: the folder; made if missing, with those above it.
    user_data: says whose journals these are (at most 128 bytes); those of anyone else are refused.
    options: of each `Journal`. `slots` is how many entries a new one takes, and the longest batch.

    Thread-safe. A place is an int that grows from entry to entry; 0 is before the first.
    CorruptionError: a journal of the chain is missing; IncompatibleFormatError: one is of another owner.
    Else as `Journal`.
    """

    def __init__(self, path: Path, user_data: bytes, **options: Any) -> None:
        self.path = path
        self._user_data = user_data
        self._options = options
        self._gate = threading.Condition()  # for who appends, and who starts the next journal
        self._under_way = 0
        self._free = 0
        self._closed = False
        self._journals: list[Journal] = []
        make_folders(path)
        names = sorted(found.name for found in path.iterdir() if NAME.fullmatch(found.name))
        try:
            for number, name in enumerate(names, 1):
                if name != self._name(number):
                    raise CorruptionError(self._name(number), 0, 0, None, f"missing in {path}")
                self._open(name)
            if not names:
                self._open(self._name(1))
        except BaseException:
            self.close()
            raise
        self._free = self._journals[-1].remaining_capacity

    @staticmethod
    def _name(number: int) -> str:
        return f"journal-{number:06}"

    def _open(self, name: str) -> None:
        made = has_journal(self.path / name)
        options = {key: value for key, value in self._options.items() if not (made and key in AT_MAKING)}
        journal = Journal(self.path / name, **options)
        try:
            if not journal.user_data and journal.last_op is None:  # new, or its maker came no further
                journal.set_user_data(self._user_data)
            if journal.user_data != self._user_data:
                raise IncompatibleFormatError(
                    f"{self.path / name} is kept by {journal.user_data!r}, not by {self._user_data!r}"
                )
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is told
                journal.close()
            raise
        self._journals.append(journal)  # not before its owner is durable: without, no start takes its entries

    def append(self, payloads: Sequence[bytes]) -> int:
        """Appends a batch, all or none of it, and returns the place of its last entry. Blocks for a sync,
        which is shared with other threads. As `Journal.append_many`, but that it is never full, unless the
        batch is longer than a journal: ValueError."""
        number, journal = self._enter(len(payloads))
        try:
            ops = journal.append_many(payloads)
        finally:
            with self._gate:
                self._under_way -= 1
                self._gate.notify_all()
        return number << LINK_BITS | ops[-1]

    def _enter(self, count: int) -> tuple[int, Journal]:
        with self._gate:
            while self._free < count:
                if self._closed:
                    raise ClosedError("the journals are closed")
                if self._under_way:  # one that fails gives its slots back
                    self._gate.wait()
                    continue
                last = self._journals[-1]
                if count > last.slots:
                    raise ValueError(f"a batch of {count} entries; a journal has {last.slots} slots")
                self._free = last.remaining_capacity
                if self._free < count:
                    last.append_many(())  # raises where it is poisoned: nothing follows an unknown end
                    self._open(self._name(len(self._journals) + 1))
                    self._free = self._journals[-1].remaining_capacity
            self._free -= count
            self._under_way += 1
            return len(self._journals), self._journals[-1]

    def after(self, place: int) -> Iterator[Record]:
        """What lies behind a place, in order. The payloads are views of the mappings."""
        number, op = divmod(place, 1 << LINK_BITS)
        for at, journal in enumerate(self._journals[max(number, 1) - 1 :], max(number, 1)):
            first = op + 1 if at == number else None
            if journal.last_op is not None and (first is None or first <= journal.last_op):
                for entry in journal.entries(first):
                    yield Record(at << LINK_BITS | entry.op, entry.payload)

    def copy(self, place: int) -> bytes:
        """The payload at a place, checked."""
        number, op = divmod(place, 1 << LINK_BITS)
        return self._journals[number - 1].copy(op)

    def forget_through(self, place: int) -> None:
        """Gives back what lies at or before a place of the last journal, and all journals before it stay as
        they are. Does not wait for the space."""
        number, op = divmod(place, 1 << LINK_BITS)
        journal = self._journals[number - 1]
        journal.set_snapshot_op(op)
        journal.compact(wait=False)
        with self._gate:
            self._free = 0  # it is asked anew

    def close(self) -> None:
        """Closes all; the first error is raised when all are closed. ClosedError from all else afterwards."""
        errors = []
        with self._gate:  # none is started any more
            self._closed = True
            self._gate.notify_all()
        for journal in self._journals:
            try:
                journal.close()
            except Exception as e:  # noqa: BLE001  # raised below
                errors.append(e)
        if errors:
            raise errors[0]
