"""Stored events on journals: what the recorders for the `eventsourcing` library share."""

from __future__ import annotations

import logging
import struct
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from eventsourcing.persistence import (
    DataError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    PersistenceError,
    StoredEvent,
    Tracking,
)

from mmapwal import ClosedError, JournalError, PayloadTooLargeError, PoisonedError
from mmapwal.integrations.chain import JournalChain

OWNER = b"mmapwal.integrations.eventsourcing 1"
SLOTS = 1 << 20
TABLE_EVERY = 1024  # trackings, of which all but the last of each application are worth nothing

# What an entry is: an event whose originator has a UUID, or a text, as its id; or only a tracking.
EVENT_OF_UUID, EVENT_OF_TEXT, TRACKING_ONLY = 1, 2, 3
# What it is; the event's version; bytes of the originator's id, of the topic, and of the name in the
# tracking; the tracking's notification id, -1 for none. Id, topic and name follow, and then the state.
HEAD = struct.Struct("<BqHHHq")
NO_TRACKING = Tracking("", -1)

logger = logging.getLogger("mmapwal.eventsourcing")

Key = bytes | str  # of an originator: its UUID's bytes, or its text


def _key(originator_id: UUID | str) -> Key:
    return originator_id.bytes if isinstance(originator_id, UUID) else originator_id


def _encode(event: StoredEvent | None, tracking: Tracking) -> bytes:
    what, originator, version, topic, state = TRACKING_ONLY, b"", 0, b"", b""
    if event is not None:
        if isinstance(event.originator_id, UUID):
            what, originator = EVENT_OF_UUID, event.originator_id.bytes
        else:
            what, originator = EVENT_OF_TEXT, event.originator_id.encode()
        version, topic, state = event.originator_version, event.topic.encode(), event.state
    name = tracking.application_name.encode()
    try:
        head = HEAD.pack(what, version, len(originator), len(topic), len(name), tracking.notification_id)
    except struct.error as e:
        raise DataError(f"too large for an event on a journal: {e}") from None
    return b"".join((head, originator, topic, name, state))


def _decode(payload: bytes) -> StoredEvent:
    what, version, id_bytes, topic_bytes, name_bytes, _ = HEAD.unpack_from(payload)
    topic_at = HEAD.size + id_bytes
    name_at = topic_at + topic_bytes
    originator, topic = payload[HEAD.size : topic_at], payload[topic_at:name_at].decode()
    originator_id = UUID(bytes=originator) if what == EVENT_OF_UUID else originator.decode()
    return StoredEvent(originator_id, version, topic, payload[name_at + name_bytes :])


@contextmanager
def _told_as_its_own() -> Iterator[None]:
    """Errors of a journal as the library's users expect them; the cause stays with them."""
    try:
        yield
    except PayloadTooLargeError as e:
        raise DataError(str(e)) from e
    except ClosedError as e:
        raise InterfaceError(str(e)) from e
    except (JournalError, OSError) as e:
        raise OperationalError(str(e)) from e


class _Sequence:
    """The events of one originator: versions in ascending order, and where each is."""

    __slots__ = ("places", "versions")

    def __init__(self) -> None:
        self.versions = array("q")
        self.places = array("q")

    def __contains__(self, version: int) -> bool:
        at = bisect_right(self.versions, version)
        return at > 0 and self.versions[at - 1] == version

    def add(self, version: int, place: int) -> None:
        at = bisect_right(self.versions, version)
        self.versions.insert(at, version)
        self.places.insert(at, place)

    def select(self, gt: int | None, lte: int | None, desc: bool, limit: int | None) -> list[int]:
        first = 0 if gt is None else bisect_right(self.versions, gt)
        last = len(self.versions) if lte is None else bisect_right(self.versions, lte)
        places = list(self.places[first:last])
        return (places[::-1] if desc else places)[:limit]


class EventDatastore:
    """Events and trackings in a chain of journals, and the index of them in memory.

    path: the folder of the journals; one datastore at a time has it.
    options: of each `mmapwal.Journal`: `slots` (how many entries one takes, before the next follows it),
        `durability`, `segment_bytes`, and so on.

    Thread-safe: inserts of several threads share syncs. Errors of the journals are raised as the library's:
    OperationalError (the disk; a journal that is locked, poisoned or damaged), InterfaceError (closed),
    DataError (too large). Where the cause is a PoisonedError, and for who interrupts an insert, whether the
    events are there is unknown until the application is started again. An error that begins with "recorded, "
    is of what is durable, and could not be read back for the index: the next call does that, or raises too.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        self.listeners: set[threading.Event] = set()  # set when the index has more
        self._lock = threading.Lock()
        self._until_tidy = TABLE_EVERY
        self._sequences: dict[Key, _Sequence] = {}
        self._notifications = array("q")  # the place of each, by id from 1
        self._tracked: dict[str, int] = {}
        self._indexed = 0  # the last place that is in the index
        self._recorded = 0  # the last place that is known to be durable
        self._half_indexed = False
        self._pending: set[tuple[Key, int]] = set()
        self._pending_tracked: set[tuple[str, int]] = set()
        with _told_as_its_own():
            self._chain = JournalChain(Path(path), OWNER, **{"slots": SLOTS} | options)
            try:
                self._catch_up()
            except BaseException:
                with suppress(Exception):  # the first error is told
                    self._chain.close()
                raise

    def close(self) -> None:
        """Closes the journals. What reads and writes afterwards gets InterfaceError."""
        with _told_as_its_own():
            self._chain.close()

    def _catch_up(self) -> None:
        """Takes into the index what the journals have, in their order, whoever wrote it: at the start, and
        before and after each insert. There is no other way into the index, and none out of what is pending
        but this one, for what may be durable. Under the lock. Where it fails the next one goes on."""
        if self._half_indexed:  # by a signal handler that raised
            self._recorded = max(self._recorded, self._indexed)
            self._indexed = 0
            self._sequences, self._notifications, self._tracked = {}, array("q"), {}
            self._half_indexed = False
        before = self._indexed
        try:
            self._take_in()
        finally:
            if self._indexed > before:
                for listener in tuple(self.listeners):
                    listener.set()

    def _take_in(self) -> None:
        for place, payload in self._chain.after(self._indexed):
            self._half_indexed = True
            what, version, id_bytes, topic_bytes, name_bytes, tracked = HEAD.unpack_from(payload)
            if what != TRACKING_ONLY:
                originator = bytes(payload[HEAD.size : HEAD.size + id_bytes])
                key = originator if what == EVENT_OF_UUID else originator.decode()
                sequence = self._sequences.get(key)
                if sequence is None:
                    sequence = self._sequences[key] = _Sequence()
                sequence.add(version, place)
                self._notifications.append(place)
                self._pending.discard((key, version))
            if tracked != NO_TRACKING.notification_id:
                at = HEAD.size + id_bytes + topic_bytes
                name = bytes(payload[at : at + name_bytes]).decode()
                self._tracked[name] = max(tracked, self._tracked.get(name, tracked))
                self._pending_tracked.discard((name, tracked))
            self._indexed = place
            self._half_indexed = False

    @contextmanager
    def _index(self) -> Iterator[None]:
        """Holds the lock, with all in the index that is known to be recorded."""
        with self._lock, _told_as_its_own():
            if self._half_indexed or self._indexed < self._recorded:
                self._catch_up()
            yield

    def insert(self, events: Sequence[StoredEvent], tracking: Tracking | None) -> list[int]:
        """All or none; the notification ids. IntegrityError when one is there, or is being written."""
        keys = [(_key(e.originator_id), e.originator_version) for e in events]
        entries: list[StoredEvent | None] = list(events)
        if tracking and not entries:
            entries = [None]
        if not entries:
            return []
        payloads = [_encode(event, NO_TRACKING) for event in entries[:-1]]
        payloads.append(_encode(entries[-1], tracking or NO_TRACKING))
        with self._lock, _told_as_its_own():
            self._catch_up()  # of those that were interrupted too
            self._check_unique(keys, tracking)
            self._reserve(keys, tracking)
        try:
            with _told_as_its_own():
                place = self._chain.append(payloads)
        except (PersistenceError, ValueError):  # not written; or poisoned, and nothing is until a restart
            self._release(keys, tracking)
            raise  # one that is interrupted may still be written, and keeps its place
        end = self._settle(place)
        return list(range(end - len(events), end))

    def _reserve(self, keys: list[tuple[Key, int]], tracking: Tracking | None) -> None:
        self._pending.update(keys)
        if tracking:
            self._pending_tracked.add((tracking.application_name, tracking.notification_id))

    def _release(self, keys: list[tuple[Key, int]], tracking: Tracking | None) -> None:
        with self._lock:
            self._pending.difference_update(keys)
            if tracking:
                self._pending_tracked.discard((tracking.application_name, tracking.notification_id))

    def _settle(self, place: int) -> int:
        """What is durable comes into the index, and is pending until then; the notification id behind it."""
        with self._lock:
            self._recorded = max(self._recorded, place)
            try:
                with _told_as_its_own():
                    self._catch_up()
            except PersistenceError as e:
                if isinstance(e.__cause__, PoisonedError):
                    raise
                raise type(e)(f"recorded, but not read back for the index yet: {e}") from e.__cause__
            return bisect_right(self._notifications, place) + 1

    def _check_unique(self, keys: list[tuple[Key, int]], tracking: Tracking | None) -> None:
        if len(set(keys)) < len(keys):
            raise IntegrityError("stored events are not unique")
        for key in keys:
            sequence = self._sequences.get(key[0])
            if key in self._pending or (sequence is not None and key[1] in sequence):
                originator = UUID(bytes=key[0]) if isinstance(key[0], bytes) else key[0]
                raise IntegrityError(f"stored event already recorded: {originator} version {key[1]}")
        if tracking:
            name = tracking.application_name
            known = [self._tracked.get(name, -1), *(id_ for n, id_ in self._pending_tracked if n == name)]
            if tracking.notification_id <= max(known):
                raise IntegrityError(
                    f"tracking notification id {tracking.notification_id} of {name!r} "
                    f"is not greater than {max(known)}"
                )

    def _read(self, places: list[int]) -> list[StoredEvent]:
        with _told_as_its_own():
            return [_decode(self._chain.copy(place)) for place in places]

    def select(
        self, originator_id: UUID | str, gt: int | None, lte: int | None, desc: bool, limit: int | None
    ) -> list[StoredEvent]:
        """Events of one originator by version, above `gt` and up to `lte`, copied and checked."""
        with self._index():
            sequence = self._sequences.get(_key(originator_id))
            places = sequence.select(gt, lte, desc, limit) if sequence is not None else []
        return self._read(places)

    def select_by_id(self, first: int, last: int) -> list[StoredEvent]:
        """Events by notification id, inclusive; fewer where there are no more."""
        with self._index():
            places = list(self._notifications[first - 1 : last])
        return self._read(places)

    @property
    def count(self) -> int:
        """How many events there are: the last notification id."""
        with self._index():
            return len(self._notifications)

    def tracked(self, application_name: str) -> int | None:
        """The largest id that was tracked of an application."""
        with self._index():
            return self._tracked.get(application_name)

    def tidy(self) -> None:
        """Where only trackings are kept, gives back those that later ones have replaced, now and then. An
        error is logged: the space comes with a later one."""
        try:
            with self._index():
                self._until_tidy -= 1
                if self._until_tidy > 0 or self._notifications:
                    return
                self._until_tidy = TABLE_EVERY
                through, last = self._indexed, [Tracking(*item) for item in self._tracked.items()]
            self._chain.append([_encode(None, tracking) for tracking in last])
            self._chain.forget_through(through)
        except Exception:  # what the caller did is durable
            logger.warning("%s: no space of replaced trackings given back", self._chain.path, exc_info=True)
