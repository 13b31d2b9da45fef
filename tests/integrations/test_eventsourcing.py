"""An event-sourced application on journals: the library's own tests of recorders, and what a journal adds."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import TestCase
from uuid import UUID

import pytest
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    DataError,
    InfrastructureFactory,
    IntegrityError,
    InterfaceError,
    ListenNotifySubscription,
    OperationalError,
    ProcessRecorder,
    StoredEvent,
    Tracking,
    TrackingRecorder,
)
from eventsourcing.tests import application as library_applications
from eventsourcing.tests import persistence as library
from eventsourcing.utils import Environment

from mmapwal import Journal
from mmapwal.integrations import event_datastore
from mmapwal.integrations.event_datastore import EventDatastore
from mmapwal.integrations.eventsourcing import (
    MmapAggregateRecorder,
    MmapApplicationRecorder,
    MmapFactory,
    MmapProcessRecorder,
    MmapTrackingRecorder,
)

from .datastores import SMALL, originator, stored

MODULE = "mmapwal.integrations.eventsourcing"


# --- the library's own tests --------------------------------------------------------------------------


class InFolder(TestCase):
    """Datastores in a folder that goes away."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        super().setUp()

    def datastore(self) -> EventDatastore:
        made = EventDatastore(self.folder / "events", segment_bytes=1 << 20)
        self.addCleanup(made.close)
        return made


class TestAggregateRecorder(InFolder, library.AggregateRecorderTestCase):
    def create_recorder(self) -> AggregateRecorder:
        return MmapAggregateRecorder(self.datastore())


class TestApplicationRecorder(InFolder, library.ApplicationRecorderTestCase):
    def create_recorder(self) -> MmapApplicationRecorder:
        return MmapApplicationRecorder(self.datastore())

    def test_insert_subscribe(self) -> None:
        self.optional_test_insert_subscribe()


class TestApplicationRecorderWithTextIds(TestApplicationRecorder):
    def new_originator_id(self) -> str:
        return f"name-{super().new_originator_id()}"


class TestTrackingRecorder(InFolder, library.TrackingRecorderTestCase):
    def create_recorder(self) -> TrackingRecorder:
        return MmapTrackingRecorder(self.datastore())


class TestProcessRecorder(InFolder, library.ProcessRecorderTestCase):
    def create_recorder(self) -> ProcessRecorder:
        return MmapProcessRecorder(self.datastore())


class TestNotificationsDoNotInterleave(InFolder, library.NonInterleavingNotificationIDsBaseCase):
    def create_recorder(self) -> ApplicationRecorder:
        return MmapApplicationRecorder(self.datastore())


class MyTrackingRecorder(MmapTrackingRecorder):
    pass


class TestFactory(InFolder, library.InfrastructureFactoryTestCase[MmapFactory]):
    def setUp(self) -> None:
        self.env = Environment("App", {"PERSISTENCE_MODULE": MODULE, "MMAPWAL_SEGMENT_BYTES": str(1 << 20)})
        self.env["MMAPWAL_PATH"] = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.env["MMAPWAL_PATH"])
        super().setUp()

    def expected_factory_class(self) -> type[MmapFactory]:
        return MmapFactory

    def expected_aggregate_recorder_class(self) -> type[AggregateRecorder]:
        return MmapAggregateRecorder

    def expected_application_recorder_class(self) -> type[ApplicationRecorder]:
        return MmapApplicationRecorder

    def expected_tracking_recorder_class(self) -> type[TrackingRecorder]:
        return MmapTrackingRecorder

    def tracking_recorder_subclass(self) -> type[TrackingRecorder]:
        return MyTrackingRecorder

    def expected_process_recorder_class(self) -> type[ProcessRecorder]:
        return MmapProcessRecorder


@pytest.fixture
def on_journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Applications of the test are kept below tmp_path."""
    env = {"PERSISTENCE_MODULE": MODULE, "MMAPWAL_PATH": str(tmp_path), "MMAPWAL_SEGMENT_BYTES": str(1 << 20)}
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    return env


@pytest.mark.usefixtures("on_journals")
class TestExampleApplication(library_applications.ExampleApplicationTestCase):
    expected_factory_topic = f"{MODULE}:MmapFactory"


# --- what is there when it starts again ---------------------------------------------------------------


class Dog(Aggregate):
    @event("Registered")
    def __init__(self, name: str) -> None:
        self.name = name
        self.tricks: list[str] = []

    @event("TrickAdded")
    def add_trick(self, trick: str) -> None:
        self.tricks.append(trick)


class DogSchool(Application[UUID]):
    is_snapshotting_enabled = True

    def register(self, name: str) -> UUID:
        dog = Dog(name)
        self.save(dog)
        return dog.id

    def add_trick(self, dog_id: UUID, trick: str) -> None:
        dog: Dog = self.repository.get(dog_id)
        dog.add_trick(trick)
        self.save(dog)

    def tricks(self, dog_id: UUID) -> list[str]:
        dog: Dog = self.repository.get(dog_id)
        return dog.tricks


@pytest.mark.usefixtures("on_journals")
def test_an_application_finds_its_aggregates_snapshots_and_notifications_when_it_starts_again() -> None:
    with DogSchool() as school:
        fido = school.register("Fido")
        school.add_trick(fido, "roll over")
        school.take_snapshot(fido)
        school.add_trick(fido, "play dead")
        notifications = school.notification_log.select(start=1, limit=10)
    with DogSchool() as school:
        assert school.tricks(fido) == ["roll over", "play dead"]
        assert school.notification_log.select(start=1, limit=10) == notifications
        assert [n.id for n in notifications] == [1, 2, 3]
        assert len(list(school.snapshots.get(fido))) == 1
        school.add_trick(fido, "fetch")
        assert school.recorder.max_notification_id() == 4


WRITER = """
import sys
from uuid import UUID, uuid5
from eventsourcing.persistence import StoredEvent, Tracking
from mmapwal.integrations.event_datastore import EventDatastore

store = EventDatastore(sys.argv[1], slots=64, segment_bytes=65536)
for number in range(10**6):
    events = [StoredEvent(uuid5(UUID(int=1), str(number)), v, "topic", b"%d" % number * v) for v in range(3)]
    ids = store.insert(events, Tracking("upstream", number + 1))
    print(number, *ids, flush=True)
"""


def test_a_killed_application_loses_no_recorded_event_and_each_keeps_its_id(tmp_path: Path) -> None:
    path = tmp_path / "events"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        told = [child.stdout.readline() for _ in range(100)]  # over four journals
        child.send_signal(signal.SIGKILL)
        told += child.stdout.readlines()
    acknowledged = [[int(word) for word in line.split()] for line in told if line.endswith("\n")]
    store = EventDatastore(path, **SMALL)
    try:
        for number, *ids in acknowledged:
            expected = [stored(number, v, b"%d" % number * v) for v in range(3)]
            assert store.select(originator(number), None, None, False, None) == expected
            assert store.select_by_id(ids[0], ids[-1]) == expected
        written = store.count
        assert written % 3 == 0  # all of an insert or nothing
        assert store.tracked("upstream") == written // 3 >= len(acknowledged)
        assert len(list(path.glob("journal-*"))) > 3
    finally:
        store.close()


def test_versions_that_came_out_of_order_are_found_in_order(
    open_store: Callable[..., EventDatastore],
) -> None:
    store = open_store()
    for version in (5, 1, 3):
        store.insert([stored(1, version)], None)
    for _ in range(2):
        assert [e.originator_version for e in store.select(originator(1), None, None, False, None)] == [
            1,
            3,
            5,
        ]
        assert [e.originator_version for e in store.select(originator(1), 1, 4, True, None)] == [3]
        with pytest.raises(IntegrityError):
            store.insert([stored(1, 3)], None)
        store.close()
        store = open_store()


def test_a_full_journal_is_followed_by_the_next_and_a_batch_is_in_one_of_them(
    open_store: Callable[..., EventDatastore], tmp_path: Path
) -> None:
    store = open_store()
    for number in range(20):
        assert store.insert([stored(number, v) for v in range(25)], None)[-1] == 25 * (number + 1)
    with pytest.raises(ValueError, match="65 entries"):
        store.insert([stored(99, v) for v in range(65)], None)
    store.close()
    lengths = []
    for path in sorted((tmp_path / "events").iterdir()):
        with Journal(path) as journal:
            lengths.append(len(journal))
    assert lengths == [50] * 10
    store = open_store()
    assert store.count == 500
    assert store.insert([stored(20, 0)], None) == [501]


def test_inserts_of_threads_get_the_ids_that_their_events_have_after_a_restart(
    open_store: Callable[..., EventDatastore],
) -> None:
    store = open_store()

    def insert(number: int) -> list[int]:
        return [store.insert([stored(number, 2 * v), stored(number, 2 * v + 1)], None)[0] for v in range(20)]

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(insert, range(8)))
    store.close()
    store = open_store()
    assert sorted(first for one in ids for first in one) == list(range(1, 8 * 40, 2))
    for number in range(8):
        for version, first in enumerate(ids[number]):
            assert store.select_by_id(first, first + 1) == [
                stored(number, 2 * version),
                stored(number, 2 * version + 1),
            ]


def test_of_threads_that_record_the_same_version_one_wins(open_store: Callable[..., EventDatastore]) -> None:
    store = open_store()

    def insert(writer: int) -> int:
        won = 0
        for version in range(30):
            try:
                store.insert([stored(1, version, b"%d" % writer)], Tracking("upstream", version + 1))
                won += 1
            except IntegrityError:
                pass
        return won

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(insert, range(4))) == store.count
    versions = [e.originator_version for e in store.select(originator(1), None, None, False, None)]
    assert versions == sorted(set(versions))


def test_a_subscriber_sees_what_others_record_once_and_in_order(
    open_store: Callable[..., EventDatastore],
) -> None:
    recorder = MmapApplicationRecorder(open_store())
    recorder.insert_events([stored(1, 0)])
    with recorder.subscribe(gt=0) as subscription, ThreadPoolExecutor(4) as pool:
        inserts = [pool.submit(recorder.insert_events, [stored(n, 1)]) for n in range(100)]
        seen = [next(subscription).id for _ in range(101)]
        for insert in inserts:
            insert.result()
    assert seen == list(range(1, 102))


def test_what_is_recorded_while_a_subscription_begins_is_not_missed(
    open_store: Callable[..., EventDatastore], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = MmapApplicationRecorder(open_store())
    looked = threading.Event()
    begin, select = ListenNotifySubscription.__init__, recorder.datastore.select_by_id

    def select_and_tell(first: int, last: int) -> list[StoredEvent]:
        found = select(first, last)
        looked.set()
        return found

    def begin_and_record(subscription: Any, **arguments: Any) -> None:
        begin(subscription, **arguments)
        looked.wait()  # it has found nothing
        recorder.insert_events([stored(1, 0)])

    monkeypatch.setattr(recorder.datastore, "select_by_id", select_and_tell)
    monkeypatch.setattr(ListenNotifySubscription, "__init__", begin_and_record)
    with ThreadPoolExecutor(1) as pool, recorder.subscribe(gt=0) as subscription:
        assert pool.submit(next, subscription).result(timeout=30).id == 1


# --- trackings ------------------------------------------------------------------------------------------


def test_trackings_that_later_ones_replaced_give_their_space_back(
    open_store: Callable[..., EventDatastore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(event_datastore, "TABLE_EVERY", 20)
    recorder = MmapTrackingRecorder(open_store())
    for id_ in range(1, 301):
        recorder.insert_tracking(Tracking(f"upstream {id_ % 3}", id_))
    recorder.datastore.close()
    assert [p.name for p in (tmp_path / "events").iterdir()] == ["journal-000001"]
    recorder = MmapTrackingRecorder(open_store())
    assert [recorder.max_tracking_id(f"upstream {n}") for n in range(3)] == [300, 298, 299]
    assert recorder.max_tracking_id("upstream 3") is None


def test_beside_events_no_tracking_and_no_event_is_given_back(
    open_store: Callable[..., EventDatastore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_datastore, "TABLE_EVERY", 5)
    recorder = MmapProcessRecorder(open_store())
    recorder.insert_events([stored(1, 0)], tracking=Tracking("upstream", 1))
    for id_ in range(2, 30):
        recorder.insert_tracking(Tracking("upstream", id_))
    recorder.datastore.close()
    recorder = MmapProcessRecorder(open_store())
    assert recorder.select_events(originator(1)) == [stored(1, 0)]
    assert recorder.max_tracking_id("upstream") == 29


def test_a_tracking_is_recorded_without_an_error_where_the_space_of_others_cannot_be_given_back(
    open_store: Callable[..., EventDatastore],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(event_datastore, "TABLE_EVERY", 20)
    recorder = MmapTrackingRecorder(open_store())

    def no_space(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "compact", no_space)
        for id_ in range(1, 31):
            recorder.insert_tracking(Tracking("upstream", id_))
    assert [r.levelname for r in caplog.records if r.name == "mmapwal.eventsourcing"] == ["WARNING"]
    assert recorder.max_tracking_id("upstream") == 30
    for id_ in range(31, 301):
        recorder.insert_tracking(Tracking("upstream", id_))
    with pytest.raises(IntegrityError):
        recorder.insert_tracking(Tracking("upstream", 300))
    recorder.datastore.close()
    recorder = MmapTrackingRecorder(open_store())
    assert recorder.max_tracking_id("upstream") == 300


# --- what goes wrong ------------------------------------------------------------------------------------


def test_an_insert_that_was_interrupted_is_found_by_the_next_and_cannot_be_made_twice(
    open_store: Callable[..., EventDatastore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    append = Journal.append_many

    def interrupted(journal: Journal, *args: Any, **kwargs: Any) -> range:
        append(journal, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "append_many", interrupted)
        store.insert([stored(1, 0)], None)
    with pytest.raises(IntegrityError):
        store.insert([stored(1, 0)], None)
    assert store.insert([stored(1, 1)], None) == [2]
    assert store.select_by_id(1, 2) == [stored(1, 0), stored(1, 1)]


def test_nobody_takes_the_place_of_an_insert_that_was_interrupted_and_may_still_be_written(
    open_store: Callable[..., EventDatastore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()

    def interrupted(*_: Any, **__: Any) -> range:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "append_many", interrupted)
        store.insert([stored(1, 0)], None)
    with pytest.raises(IntegrityError):
        store.insert([stored(1, 0)], None)
    store.close()
    assert open_store().insert([stored(1, 0)], None) == [1]  # it was not, as a restart finds out


def test_an_insert_that_found_no_space_has_not_happened_and_can_be_made_again(
    open_store: Callable[..., EventDatastore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()

    def no_space(*_: Any, **__: Any) -> range:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OperationalError, match="No space") as caught:
        patch.setattr(Journal, "append_many", no_space)
        store.insert([stored(1, 0)], Tracking("upstream", 1))
    assert isinstance(caught.value.__cause__, OSError)
    assert store.count == 0
    assert store.insert([stored(1, 0)], Tracking("upstream", 1)) == [1]


def test_a_closed_datastore_says_so(open_store: Callable[..., EventDatastore]) -> None:
    store = open_store()
    store.insert([stored(1, 0)], None)
    store.close()
    with pytest.raises(InterfaceError):
        store.insert([stored(1, 1)], None)
    with pytest.raises(InterfaceError):
        store.select(originator(1), None, None, False, None)


def test_what_is_too_large_is_refused_before_anything_is_written(
    open_store: Callable[..., EventDatastore],
) -> None:
    store = open_store(max_payload_bytes=1000)
    for too_large in (stored(1, 0, b"x" * 1001), stored(1, 0, topic="t" * 70_000), stored(1, 2**63)):
        with pytest.raises(DataError):
            store.insert([stored(2, 0), too_large], None)
    assert store.insert([stored(1, 0)], None) == [1]


def test_a_folder_that_another_process_or_program_has_is_refused(
    open_store: Callable[..., EventDatastore], tmp_path: Path
) -> None:
    open_store()
    with pytest.raises(OperationalError, match="open already"):
        open_store()
    (tmp_path / "other").mkdir()
    with Journal(tmp_path / "other" / "journal-000001") as journal:
        journal.append(b"not an event")
    with pytest.raises(OperationalError, match="is kept by"):
        EventDatastore(tmp_path / "other")


def test_a_journal_that_is_missing_from_the_chain_is_told(
    open_store: Callable[..., EventDatastore], tmp_path: Path
) -> None:
    store = open_store()
    for number in range(10):
        store.insert([stored(number, v) for v in range(20)], None)
    store.close()
    shutil.rmtree(tmp_path / "events" / "journal-000002")
    with pytest.raises(OperationalError, match="journal-000002"):
        open_store()


@pytest.mark.parametrize(
    ("key", "value"), [("MMAPWAL_DURABILITY", "never"), ("MMAPWAL_SLOTS", "many"), ("MMAPWAL_PATH", "")]
)
def test_a_setting_that_means_nothing_is_told_by_its_name(
    on_journals: dict[str, str], key: str, value: str
) -> None:
    with pytest.raises(OSError, match=key):
        InfrastructureFactory.construct(Environment("App", on_journals | {key: value}))
