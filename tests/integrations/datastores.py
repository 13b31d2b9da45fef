"""Small datastores of events, and events for them."""

from __future__ import annotations

from uuid import UUID, uuid5

from eventsourcing.persistence import StoredEvent

SMALL = {"slots": 64, "segment_bytes": 65536}
SPACE = UUID(int=1)


def originator(number: int) -> UUID:
    return uuid5(SPACE, str(number))


def stored(number: int, version: int, state: bytes = b"state", topic: str = "topic") -> StoredEvent:
    return StoredEvent(originator(number), version, topic, state)
