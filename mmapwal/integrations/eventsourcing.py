"""Recorders for the `eventsourcing` library: an event-sourced application on journals.

    PERSISTENCE_MODULE=mmapwal.integrations.eventsourcing
    MMAPWAL_PATH=/var/lib/bank

Events are entries, with an index in memory that is read back from them when the application starts.
https://eventsourcing.readthedocs.io, `eventsourcing.persistence` has what each method must do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    InfrastructureFactory,
    ListenNotifySubscription,
    Notification,
    ProcessRecorder,
    Recorder,
    StoredEvent,
    Subscription,
    Tracking,
    TrackingRecorder,
)
from eventsourcing.utils import Environment, EnvType, resolve_topic

from mmapwal import Durability
from mmapwal.integrations.event_datastore import EventDatastore

__all__ = [
    "Factory",
    "MmapAggregateRecorder",
    "MmapApplicationRecorder",
    "MmapFactory",
    "MmapProcessRecorder",
    "MmapTrackingRecorder",
]

RecorderT = TypeVar("RecorderT", bound=Recorder)


class MmapAggregateRecorder(AggregateRecorder):
    """Events by originator and version. Several recorders may share a datastore."""

    def __init__(self, datastore: EventDatastore) -> None:
        self.datastore = datastore

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        """Writes all or none of them, durable at return. IntegrityError when one of that originator and
        version is there, or is being written by another thread; else the errors of EventDatastore."""
        self.datastore.insert(stored_events, kwargs.get("tracking"))
        return None

    def select_events(
        self, originator_id: UUID | str, *, gt: int | None = None, lte: int | None = None, desc: bool = False,
        limit: int | None = None,
    ) -> Sequence[StoredEvent]:  # fmt: skip
        """Events of one originator by version, copied and checked."""
        return self.datastore.select(originator_id, gt, lte, desc, limit)


class MmapApplicationRecorder(MmapAggregateRecorder, ApplicationRecorder):
    """Events also as notifications, numbered from 1 without gaps in the order in which they were recorded."""

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        """As MmapAggregateRecorder's; returns the notification ids."""
        return self.datastore.insert(stored_events, kwargs.get("tracking"))

    def select_notifications(
        self, start: int | None, limit: int, stop: int | None = None, topics: Sequence[str] = (),
        *, inclusive_of_start: bool = True,
    ) -> Sequence[Notification]:  # fmt: skip
        """At most `limit` notifications from `start` to `stop`, of these topics if any are given."""
        first = max(1, 1 if start is None else start + (not inclusive_of_start))
        found: list[Notification] = []
        while len(found) < limit:
            last = first - 1 + limit if stop is None else min(stop, first - 1 + limit)
            events = self.datastore.select_by_id(first, last)
            if not events:
                break
            found += [
                Notification(e.originator_id, e.originator_version, e.topic, e.state, id_)
                for id_, e in enumerate(events, first)
                if not topics or e.topic in topics
            ]
            first += len(events)
        return found[:limit]

    def max_notification_id(self) -> int | None:
        """The id of the last event, None when there is none."""
        return self.datastore.count or None

    def subscribe(
        self, gt: int | None = None, topics: Sequence[str] = ()
    ) -> Subscription[ApplicationRecorder]:
        """An iterator of the notifications behind `gt`, which waits for those of this process to come."""
        return MmapSubscription(self, gt, topics)


class MmapSubscription(ListenNotifySubscription[MmapApplicationRecorder]):
    """Notifications as they are recorded."""

    def __init__(self, recorder: MmapApplicationRecorder, gt: int | None, topics: Sequence[str]) -> None:
        super().__init__(recorder=recorder, gt=gt, topics=topics)
        recorder.datastore.listeners.add(self._has_been_notified)
        self._has_been_notified.set()  # for what was recorded before it listened

    def stop(self) -> None:
        super().stop()
        self._recorder.datastore.listeners.discard(self._has_been_notified)


class MmapTrackingRecorder(TrackingRecorder):
    """How far the notifications of other applications were processed. A subclass that keeps more than that
    has to keep it elsewhere: in memory it is gone when the process ends, and the trackings are not."""

    def __init__(self, datastore: EventDatastore) -> None:
        self.datastore = datastore

    def insert_tracking(self, tracking: Tracking) -> None:
        """Durable at return. IntegrityError when the id is not above all of that application; else the
        errors of EventDatastore."""
        self.datastore.insert((), tracking)
        self.datastore.tidy()

    def max_tracking_id(self, application_name: str) -> int | None:
        """The largest id of that application, or None."""
        return self.datastore.tracked(application_name)


class MmapProcessRecorder(MmapTrackingRecorder, MmapApplicationRecorder, ProcessRecorder):
    """Events, and in the same batch the tracking of what they came from. Beside events, a tracking that comes
    without any takes some 100 bytes for ever."""


class MmapFactory(InfrastructureFactory[MmapTrackingRecorder]):
    """What `PERSISTENCE_MODULE=mmapwal.integrations.eventsourcing` stands for.

    Reads from the environment, each also as `<APPLICATION>_<KEY>`:

    - `MMAPWAL_PATH`: the folder, made if missing; each application has its own below it. OSError without it.
    - `MMAPWAL_DURABILITY`: sync (default), os or buffered, as `mmapwal.Durability`.
    - `MMAPWAL_SLOTS`, `MMAPWAL_SEGMENT_BYTES`: of each journal; 2**20 and 16 MiB.
    - `APPLICATION_RECORDER_TOPIC`, `PROCESS_RECORDER_TOPIC`, `TRACKING_RECORDER_TOPIC`: a subclass of yours.

    Recorders of one purpose share their journals. `close()` closes all.
    """

    PATH = "MMAPWAL_PATH"
    DURABILITY = "MMAPWAL_DURABILITY"
    SLOTS = "MMAPWAL_SLOTS"
    SEGMENT_BYTES = "MMAPWAL_SEGMENT_BYTES"

    def __init__(self, env: Environment | EnvType | None) -> None:
        super().__init__(env)
        path = self.env.get(self.PATH)
        if not path:
            raise OSError(f"none of {', '.join(self.env.create_keys(self.PATH))} is in the environment")
        self._path = Path(path) / (self.env.name.lower() or "application")
        self._options: dict[str, Any] = {"durability": self._setting(self.DURABILITY, Durability, "sync")}
        for key, name in ((self.SLOTS, "slots"), (self.SEGMENT_BYTES, "segment_bytes")):
            if self.env.get(key):
                self._options[name] = self._setting(key, int, "")
        self._lock = threading.Lock()
        self._datastores: dict[str, EventDatastore] = {}

    def _setting(self, key: str, parse: Callable[[str], Any], default: str) -> Any:
        text = self.env.get(key, default) or default
        try:
            return parse(text.strip().lower())
        except ValueError as e:
            raise OSError(f"{key} in the environment: {e}") from None

    def datastore(self, purpose: str) -> EventDatastore:
        """The journals of one purpose: opened when first asked for, the same ones from then on."""
        with self._lock:
            if purpose not in self._datastores:
                self._datastores[purpose] = EventDatastore(self._path / purpose, **self._options)
            return self._datastores[purpose]

    def _class(self, topic_key: str, of: type[RecorderT]) -> type[RecorderT]:
        topic = self.env.get(topic_key)
        found = resolve_topic(topic) if topic else of
        if not issubclass(found, of):
            raise TypeError(f"{topic_key}: {found.__name__} is no {of.__name__}")
        return found

    def aggregate_recorder(self, purpose: str = "events") -> AggregateRecorder:
        """Events of one purpose; the library asks for "snapshots"."""
        return MmapAggregateRecorder(self.datastore(purpose))

    def application_recorder(self) -> ApplicationRecorder:
        """The events of the application, as notifications too."""
        return self._class(self.APPLICATION_RECORDER_TOPIC, MmapApplicationRecorder)(self.datastore("events"))

    def tracking_recorder(
        self, tracking_recorder_class: type[MmapTrackingRecorder] | None = None
    ) -> MmapTrackingRecorder:
        """How far a projection has got."""
        if tracking_recorder_class is None:
            tracking_recorder_class = self._class(self.TRACKING_RECORDER_TOPIC, MmapTrackingRecorder)
        return tracking_recorder_class(self.datastore("tracking"))

    def process_recorder(self) -> ProcessRecorder:
        """Events and trackings in one."""
        return self._class(self.PROCESS_RECORDER_TOPIC, MmapProcessRecorder)(self.datastore("events"))

    def close(self) -> None:
        """Closes all journals."""
        with self._lock:
            while self._datastores:
                self._datastores.popitem()[1].close()


Factory = MmapFactory
