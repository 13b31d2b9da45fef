"""The log of a Raft node on a journal: what PySyncObj's own logs do, and durable."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import struct
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pysyncobj.journal import Journal as RaftJournal

from mmapwal import (
    BusyError,
    Durability,
    IncompatibleFormatError,
    Journal,
    JournalError,
    JournalFullError,
    MissingOpError,
    PayloadTooLargeError,
)
from mmapwal.format import USER_DATA_BYTES_MAX, frame_bytes
from mmapwal.integrations.folders import has_journal, make_folders

__all__ = ["JournalFailedError", "MmapJournal"]

SLOTS = 1 << 20
SLOTS_MIN = 64
RESERVE = 16  # slots that commands leave: each new leader needs one, or it could commit nothing
RETRY_S = 1.0
READ_AHEAD_MIN, READ_AHEAD_MAX = 8, 4096
READ_AHEAD_BYTES = 4 << 20
UNPACKERS_MAX = 1024
DUMP_ENTRIES = 2  # the last two that a dump covers: they stand in the log, which is never empty

TERM = struct.Struct("<Q")  # before the command, in each entry
# User data of the journal: term, commit index, whose journal it is; the vote, or nothing, follows.
STATE = struct.Struct("<BQQ16s")
STATE_VERSION = 1
VOTE_BYTES_MAX = USER_DATA_BYTES_MAX - STATE.size

HARMLESS = (
    BusyError,
    JournalFullError,
    MissingOpError,
    PayloadTooLargeError,
)  # nothing happened, and the disk is well

logger = logging.getLogger("mmapwal.pysyncobj")


class JournalFailedError(JournalError):
    """The log cannot be made durable (`__cause__` says why): the node takes part in nothing until it can."""


def _reason(cause: BaseException) -> str:
    return f"{cause}: {cause.__cause__}" if cause.__cause__ is not None else str(cause)


def _digest(*names: str) -> bytes:
    return hashlib.blake2b("\0".join(names).encode(), digest_size=16).digest()


def _vote_bytes(node_id: str) -> bytes:
    """Of the vote only that there was one matters after a restart, so a long id may be told by its digest."""
    name = node_id.encode()
    return name if len(name) <= VOTE_BYTES_MAX else _digest(node_id).hex().encode()


class _Unpackers(dict[int, Callable[[memoryview], tuple[int, bytes]]]):
    """By the length of a payload: what takes it apart. In half the time of two steps."""

    def __missing__(self, length: int) -> Callable[[memoryview], tuple[int, bytes]]:
        if len(self) >= UNPACKERS_MAX:
            self.clear()
        unpack: Any = struct.Struct(f"<Q{length - TERM.size}s").unpack
        return self.setdefault(length, unpack)


class LogEntry:
    """(command, index, term), like the tuple; the command and the term are read when they are asked for, with
    MissingOpError when the entry is gone by then."""

    __slots__ = ("_index", "_log")

    def __init__(self, log: MmapJournal, index: int) -> None:
        self._log = log
        self._index = index

    def __getitem__(self, item: int) -> Any:
        if item == 1:
            return self._index
        return self._log.term(self._index) if item == 2 else tuple(self)[item]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._log.entry(self._index))

    def __len__(self) -> int:
        return 3

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, (tuple, LogEntry)) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> tuple[type[tuple[Any, ...]], tuple[list[Any]]]:
        return tuple, (list(self),)


class LogSlice(Sequence[Any]):
    """Entries from one index up to another, like the list of tuples; read as far as they are asked for, since
    PySyncObj asks for all that follows and takes what fits into a message. Goes onto the wire as a list."""

    def __init__(self, log: MmapJournal, first: int, count: int) -> None:
        self._log = log
        self._first = first
        self._count = count
        self._read: list[tuple[bytes, int, int]] = []

    def _up_to(self, count: int) -> list[tuple[bytes, int, int]]:
        if len(self._read) < count:
            first, ahead = self._first + len(self._read), max(self._log.read_ahead, 2 * len(self._read))
            more = self._log.first_of(first, min(ahead, self._count) - len(self._read))
            self._read += self._log.entries(first, first + max(more, count - len(self._read)) - 1)
        return self._read

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, item: Any) -> Any:
        places = range(self._count)[item]  # IndexError, as a list
        if isinstance(places, int):
            return self._read[places] if places < len(self._read) else self._log.entry(self._first + places)
        found = self._up_to(max(places, default=-1) + 1)
        self._log.expect(len(places))
        return [found[place] for place in places]

    def __iter__(self) -> Iterator[tuple[bytes, int, int]]:
        place = 0
        while place < self._count:
            read = self._up_to(place + 1)[place:]  # the list itself may grow meanwhile
            yield from read
            place += len(read)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (list, LogSlice)) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as a list

    def __reduce__(self) -> tuple[type[list[Any]], tuple[list[Any]]]:
        return list, (list(self),)


class MmapJournal(RaftJournal):  # type: ignore[misc]
    """The log of one node, and its term and vote. For one thread, as PySyncObj uses it.

    path: the folder of the journal, made if missing. options: of `mmapwal.Journal`.
    What is added is durable at the next `sync()`, and no earlier. When the journal refuses, everything raises
    JournalFailedError; each second it is tried again, so that the node goes on where space has returned. One
    that is poisoned or damaged, or refused while a dump was being loaded, has to be opened again.
    JournalFullError when an entry finds no slot, PayloadTooLargeError when it is above `max_payload_bytes`:
    nothing happened. CorruptionError, LockedError and so on when it is opened, as `Journal`.
    """

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        if options.get("storage") is None:
            make_folders(Path(path))
            if not has_journal(Path(path)):  # one that is there keeps what it has
                options = {"slots": SLOTS} | options
        self.journal = Journal(path, **options, durability=Durability.BUFFERED)
        self._first = self._last = self._tail = 0  # between last and tail lies what was removed
        self._last_term, self._last_term_from = -1, 0  # of all entries from there on, where it is known
        self._end = 0  # no entry behind it finds a slot
        self._look_again()
        self.refused: bytes | None = None  # the command that the last add() raised an error for
        self._unsynced = self._unsaved = False  # entries; term, vote and commit index
        self._failure: BaseException | None = None
        self._retry_at = 0.0
        self._wanted = 0  # the space of the entry that found none
        self._starting = True  # until the dump was loaded
        self._loading = 0  # how many entries of a dump are to come
        self._placeholder: tuple[bytes, int, int] | None = None
        self._unpack = _Unpackers()
        self.read_ahead = READ_AHEAD_MIN
        try:
            self._read_state()
        except BaseException:
            self.journal.close()
            raise

    # --- term, vote, commit index, owner -----------------------------------------------------------

    def _read_state(self) -> None:
        data = self.journal.user_data
        self._term, self._commit, self._owner, vote = 0, 1, bytes(16), b""
        if data:
            if len(data) < STATE.size or data[0] != STATE_VERSION:
                raise IncompatibleFormatError(f"{self.journal.directory} is no log of PySyncObj")
            _, self._term, self._commit, self._owner = STATE.unpack_from(data)
            vote = data[STATE.size :]
        elif self._last or self.journal.snapshot_op:
            raise IncompatibleFormatError(f"{self.journal.directory} is no log of PySyncObj")
        self._vote = vote.decode() or None
        self._saved_commit = self._commit
        self._unsaved = not data  # a new one says whose it is before it has an entry
        self.sync()

    def claim(self, node: str, cluster: str) -> None:
        """The journal is this node's from now on. IncompatibleFormatError when it is of another one."""
        owner = _digest(node, cluster)
        if self._owner == bytes(16):
            self._owner, self._unsaved = owner, True
            self.sync()
        if self._owner != owner:
            raise IncompatibleFormatError(
                f"{self.journal.directory} belongs to another node or cluster than {node!r} of {cluster!r}"
            )

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:  # noqa: N802,N803
        """Durable at return, as Raft demands before a message tells of it. ValueError."""
        if not (isinstance(term, int) and 0 <= term < 1 << 64):
            raise ValueError(f"a term is 0 .. 2**64 - 1; not {term}")
        if votedForNodeId is not None and not (
            isinstance(votedForNodeId, str) and _vote_bytes(votedForNodeId)
        ):
            raise ValueError(f"a vote is for the id of a node, or None; not {votedForNodeId!r}")
        if term > self._term:
            # The leader is gone that was to send again what it had PySyncObj remove: of that, what does not
            # conflict was promised, and counts in votes and elections. Also where the node has stopped:
            # PySyncObj has the new term already, and may vote in it when the node goes on.
            self._last = self._tail
        self.check_usable()
        self._term, self._vote, self._unsaved = term, votedForNodeId, True
        self.sync()

    def getCurrentTerm(self) -> int:  # noqa: N802
        """The last one that was set; 0 at first."""
        return self._term

    def getVotedForNodeId(self) -> str | None:  # noqa: N802
        """For whom the node voted in that term, or None."""
        return self._vote

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:  # noqa: N802,N803
        """Kept in memory, and by the timer: it may be too small after a crash, never too large."""
        self._commit = raftCommitIndex

    def getRaftCommitIndex(self) -> int:  # noqa: N802
        """At most the last index of the log."""
        return max(1, min(self._commit, self._last))

    def onOneSecondTimer(self) -> None:  # noqa: N802
        """Makes the commit index durable where it has moved."""
        self.check_usable()
        self._starting = False  # PySyncObj has just loaded its dump, or has none
        if self._commit != self._saved_commit:
            self._unsaved = True
            self.sync()

    # --- durability ---------------------------------------------------------------------------------

    def sync(self) -> None:
        """Makes durable all that was added, then term, vote and commit index where they have changed; costs
        nothing where nothing has. JournalFailedError."""
        if not (self._unsynced or self._unsaved):
            return
        with self._failing():
            if self._unsynced:
                self.journal.sync()
            self._unsynced = False
            if self._unsaved:  # the commit index covers no entry that is not durable
                state = STATE.pack(STATE_VERSION, self._term, self._commit, self._owner)
                self.journal.set_user_data(state + _vote_bytes(self._vote or ""))
            self._saved_commit, self._unsaved = self._commit, False

    @property
    def failure(self) -> BaseException | None:
        """Why the node has stopped, or None."""
        return self._failure

    def fail(self, cause: BaseException, *, for_good: bool = False) -> None:
        """The node stops: everything refuses for a while, or for good. Says so in the log, once."""
        if self._failure is None:
            logger.error("%s: this node stops: %s", self.journal.directory, _reason(cause))
            self._failure = cause
        if self._retry_at != math.inf:
            self._retry_at = math.inf if for_good else time.monotonic() + RETRY_S

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, JournalError) as e:
            raise self._failed(e) from e

    def _failed(self, cause: Exception, *, for_good: bool = False) -> Exception:
        """What is to be raised; the node stops, unless the cause says nothing of the disk."""
        if isinstance(cause, HARMLESS) and not for_good:
            return cause
        self.fail(cause, for_good=for_good or isinstance(cause, JournalError))  # space may return, no more
        return JournalFailedError(f"{self.journal.directory}: {_reason(cause)}")

    def check_usable(self) -> None:
        """JournalFailedError while the node has stopped. Once a second what failed is tried again: space for
        the entry, a sync, and replacing the superblock."""
        if self._failure is None:
            return
        if time.monotonic() < self._retry_at:
            raise JournalFailedError(f"{self.journal.directory}: {_reason(self._failure)}") from self._failure
        with self._failing():
            if self._wanted:
                self.journal._engine.prepare_segment(self._wanted)
        self._unsaved = True
        self.sync()
        logger.warning("%s: this node goes on", self.journal.directory)
        self._failure, self._wanted = None, 0

    # --- the log ------------------------------------------------------------------------------------

    def add(self, command: bytes, idx: int, term: int) -> None:
        """Appends an entry. The first one may have any index above what was given to the dump; all others are
        the next one, ValueError."""
        self.check_usable()
        try:
            if 0 < self._tail == self._last == idx - 1 and not self._loading:  # what happens all the time
                self._append(command, idx, term)
                return
            self._add(command, idx, term)
        except (OSError, JournalError) as e:
            self.refused = command
            self._wanted = frame_bytes(TERM.size + len(command)) if isinstance(e, OSError) else 0
            # For good while a dump is loaded: the state is the dump's then, and the log is not.
            raise self._failed(e, for_good=self._loading > 0) from e
        self._loading = max(0, self._loading - 1)

    def _append(self, command: bytes, idx: int, term: int) -> None:
        """`idx` is the next op of the journal."""
        self.journal.append(TERM.pack(term) + command)
        if term != self._last_term:
            self._last_term, self._last_term_from = term, idx
        self._last = self._tail = idx
        self._unsynced = True

    @property
    def _dropped(self) -> bool:
        """clear() was called, and nothing was added yet."""
        return self._loading == DUMP_ENTRIES

    def _add(self, command: bytes, idx: int, term: int) -> None:
        if self._loading and self._has(command, idx, term):
            if self._dropped:  # what follows the dump in the log was promised, and stays
                self._forget_through(idx - 1)
            if not self._starting:  # but the leader that sent the dump has not compared it
                self._last = idx
            return
        if self._loading == 1 and self._first < idx <= self._last:  # only the first of the dump is in the log
            self._last = idx - 1
        self._check_new(command, idx)
        if idx == self._last + 1 <= self._tail and not self._dropped:
            if self._has(command, idx, term):
                self._last = idx
                return
            self._truncate_from(idx)
        if not (self._last or self._dropped) and idx <= self.journal.snapshot_op:
            self._placeholder = (command, idx, term)  # of a new node, which this is not: its dump comes next
            return
        if not len(self) or not self._last:
            self._restart_at(idx)
        self._placeholder = None
        self._append(command, idx, term)
        self._first = self._first or idx

    def _check_new(self, command: bytes, idx: int) -> None:
        """ValueError, PayloadTooLargeError; before anything is removed or written."""
        if len(command) > self.command_bytes_max:
            raise PayloadTooLargeError(
                f"{len(command)} bytes; a command has {self.command_bytes_max} at most"
            )
        if not self._loading and self._last >= self._first > 0 and idx != self._last + 1:
            raise ValueError(f"index {idx} cannot follow {self._last}")
        gone = self.journal.snapshot_op
        if not (self._loading or self._starting) and idx <= gone:
            raise ValueError(f"index {idx} was given to the dump, as all up to {gone}")

    def _has(self, command: bytes, idx: int, term: int) -> bool:
        return self._first <= idx <= self._tail and self.entry(idx) == (command, idx, term)

    def _restart_at(self, idx: int) -> None:
        """Nothing is there any more, and `idx` can come. In this order: whatever a crash leaves of it is a
        beginning of the log, or nothing, and the dump has all of it."""
        if idx <= self.journal.snapshot_op:
            raise JournalError(
                f"the dump ends at {idx}, and the log begins behind {self.journal.snapshot_op}"
            )
        if self._tail >= idx:
            self._truncate_from(idx)
        self._forget_through(idx - 1)
        self._first = self._last = self._tail = 0

    def _truncate_from(self, idx: int) -> None:
        with self._removing():
            self.journal.truncate_from(idx)
            self._unsynced = False  # it syncs first

    def _forget_through(self, idx: int) -> None:
        with self._removing():
            if idx > self.journal.snapshot_op:
                self.journal.set_snapshot_op(idx)
                self.journal.compact(wait=False)

    @contextmanager
    def _removing(self) -> Iterator[None]:
        """Looks again also where it raises: the entries may be gone, and only their space not given back."""
        last = self._last
        try:
            yield
        finally:
            self._look_again()
            self._last = min(self._last, last)  # what was removed before stays removed

    def _look_again(self) -> None:
        self._first, self._last = self.journal.first_op or 0, self.journal.last_op or 0
        self._tail = self._last
        self._end = self.journal.snapshot_op + self.journal.slots
        self._last_term = -1

    @property
    def last_index(self) -> int:
        """Of the last entry; 0 where there is none."""
        return self._last

    @property
    def command_bytes_max(self) -> int:
        """The longest command that is added."""
        return self.journal._max_payload_bytes - TERM.size

    @property
    def takes_commands(self) -> bool:
        """Whether a leader may add a command; no while the node has stopped, or the log is full."""
        return self._failure is None and self._last < self._end - RESERVE

    @property
    def takes_through(self) -> int:
        """The last index that a follower may add. As many as leaders before it took, and the first entries of
        some new ones."""
        return self._end - RESERVE // 2

    def clear(self) -> None:
        """The log is empty; on the disk it is when the next entry is added, which PySyncObj does at once."""
        self.check_usable()
        self._loading, self._placeholder = DUMP_ENTRIES, None

    def deleteEntriesFrom(self, entryFrom: int) -> None:  # noqa: N802,N803
        """Removes what stands at or behind this position; from the disk when another entry comes there.

        PySyncObj also removes what it was sent twice, to add it once more. It was promised, so a crash must
        not find it gone meanwhile, and if it is the same it stays. (Raft removes only what conflicts.)
        """
        self.check_usable()
        kept = slice(entryFrom, None).indices(len(self))[0]  # as a list, also where it is negative
        if kept < len(self) and not self._placeholder:
            self._last = self._first + kept - 1

    def deleteEntriesTo(self, entryTo: int) -> None:  # noqa: N802,N803
        """Removes so many entries from the front: they are in the dump, which is durable. Gives their space
        back."""
        self.check_usable()
        removed = slice(entryTo, None).indices(len(self))[0]  # as a list, also where it is negative
        if removed and not self._placeholder:
            with self._failing():
                self._forget_through(self._first + removed - 1)

    def entry(self, index: int) -> tuple[bytes, int, int]:
        """(command, index, term) of a Raft index."""
        with self._failing():
            data = self.journal.read(index)
        return bytes(data[TERM.size :]), index, TERM.unpack_from(data)[0]

    def term(self, index: int) -> int:
        """The term of a Raft index."""
        if self._last_term >= 0 and index >= self._last_term_from:
            return self._last_term
        with self._failing():
            return int(TERM.unpack_from(self.journal.read(index))[0])

    def conflict(self, index: int, term: int) -> int:
        """Where the term begins that a Raft index has here, if that is another one; else that index."""
        if self._first <= index <= self._last and (own := self.term(index)) != term:
            return bisect_left(range(index), own, lo=self._first, key=self.term)
        return index

    def entries(self, first: int, last: int) -> list[tuple[bytes, int, int]]:
        """(command, index, term) of the Raft indices `first` .. `last`. MissingOpError when one is gone."""
        with self._failing():
            found = enumerate(self.journal.payloads(first, last), first)
            unpack = self._unpack
            read = [
                (command, index, term)
                for index, data in found
                for term, command in (unpack[len(data)](data),)
            ]
            if len(read) <= last - first:  # else they are all, and numbered rightly
                raise MissingOpError(first)  # they go from the front
            return read

    def first_of(self, index: int, count: int) -> int:
        """As many of so many entries as are read ahead: no more than fit into some megabytes."""
        if count <= READ_AHEAD_MIN:
            return count
        with self._failing():
            first, last = self.journal.header(index), self.journal.header(index + count - 1)
        if first is None or last is None:  # they go from the front
            return count
        span = last.lsn + last.length - first.lsn
        return count if span <= READ_AHEAD_BYTES else max(READ_AHEAD_MIN, count * READ_AHEAD_BYTES // span)

    def expect(self, count: int) -> None:
        """So many entries found room in a message; of the next one some more than that are read at once."""
        self.read_ahead = min(max(READ_AHEAD_MIN, count + count // 16), READ_AHEAD_MAX)

    def __getitem__(self, item: Any) -> Any:
        """By position: one is a LogEntry; a slice is a LogSlice, or a list, of one or of not all."""
        if self._failure is not None:
            self.check_usable()
        first, last = self._first, self._last
        if last >= first > 0 and self._loading != DUMP_ENTRIES:  # what a leader asks of each entry, at once
            if item == -1:
                return LogEntry(self, last)
            if item == 0:
                return LogEntry(self, first)
            if type(item) is slice:
                start, stop = item.start, item.stop
                if (
                    item.step is None
                    and type(start) is int
                    and 0 <= start <= last - first
                    and stop == start + 1
                ):
                    return [LogEntry(self, first + start)]
        places = range(len(self))[item]  # IndexError, as a list
        if isinstance(places, int):
            return self._placeholder or LogEntry(self, self._first + places)
        if self._placeholder or places.step != 1:
            return [self._placeholder or self.entry(self._first + place) for place in places]
        if len(places) == 1:
            return [LogEntry(self, self._first + places.start)]
        return LogSlice(self, self._first + places.start, len(places))

    def __len__(self) -> int:
        if self._dropped:
            return 0
        return self._last - self._first + 1 if self._last else int(self._placeholder is not None)

    def flush(self) -> None:
        """As the library's own file journal: durable at return."""
        self.sync()

    def _destroy(self) -> None:
        """Closes the journal. What finds no space then was promised to nobody, so that is logged only."""
        try:
            self.journal.close()
        except (OSError, JournalError) as e:
            logger.warning("%s: closed without its last entries: %s", self.journal.directory, _reason(e))
