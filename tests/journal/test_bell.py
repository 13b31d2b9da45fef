"""How followers wait: they sleep, but not for what comes in a hurry."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from mmapwal import Journal
from mmapwal.following import SPIN_S, Bell
from mmapwal.page import ProgressPage
from tests.conftest import Home


class Page:
    """A page that says what it is asked; what comes, comes after so many seconds."""

    writable = True

    def __init__(self) -> None:
        self.comes_in_s = 0.0
        self.asked: list[str] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def word(self) -> int:
        return 0

    def spin(self, seen: int, timeout_s: float, _following: object) -> bool:
        self.asked.append("spin")
        self.meanwhile()
        self.comes_in_s -= min(timeout_s, self.comes_in_s)
        return not self.comes_in_s

    def wait(self, seen: int, timeout_s: float, soon_s: float, _following: object) -> bool:
        self.asked.append("wait")
        return self.comes_in_s < soon_s

    def stir(self) -> None:
        self.asked.append("stir")


class Engine:
    def __init__(self) -> None:
        self.page = Page()

    def follow_page(self) -> Page:
        return self.page


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def bell(engine: Engine) -> Bell:
    followed: Any = engine
    return Bell(followed)


@pytest.fixture
def journal(home: Home) -> Journal:
    return home.open()


@pytest.fixture
def page(journal: Journal) -> ProgressPage:
    page = journal._engine.follow_page()
    assert page is not None
    return page


def waited(bell: Bell, engine: Engine, comes_in_s: float) -> list[str]:
    engine.page.comes_in_s, engine.page.asked = comes_in_s, []
    bell.listen()
    bell.wait(1)
    return engine.page.asked


def test_what_comes_soon_behind_the_one_before_is_not_slept_for_and_what_does_not_is(
    bell: Bell, engine: Engine
) -> None:
    late = 3 * SPIN_S
    assert waited(bell, engine, late) == ["wait"]
    assert waited(bell, engine, 0) == ["wait"]  # soon: from here on there is no sleep
    assert waited(bell, engine, 0) == ["spin"]
    assert waited(bell, engine, 0) == ["spin"]
    assert waited(bell, engine, 1.5 * SPIN_S) == ["spin", "wait"]
    assert waited(bell, engine, late) == ["wait"]


def test_one_that_is_stopped_while_it_spins_does_not_go_to_sleep(bell: Bell, engine: Engine) -> None:
    waited(bell, engine, 0)
    engine.page.meanwhile = bell.stop
    assert waited(bell, engine, 3 * SPIN_S) == ["spin", "stir"]


def test_spinning_ends_with_what_is_published_or_with_its_time(page: ProgressPage, journal: Journal) -> None:
    seen = page.word()
    assert not page.spin(seen, 0.001)
    thread = threading.Timer(0.05, journal.append, (b"x",))
    thread.start()
    assert page.spin(seen, 20)
    assert page.word() != seen
    thread.join()


def test_who_spins_does_not_say_that_he_sleeps_and_who_sleeps_does(page: ProgressPage) -> None:
    assert not page.spin(page.word(), 0.001)
    assert page.native.waiting == 0
    page.wait(page.word(), 0.001, 0.001)
    assert page.native.waiting == 1


def test_a_follower_with_nothing_to_read_leaves_the_processor_alone(journal: Journal) -> None:
    for _ in range(100):
        journal.append(b"x")
    entries = journal.follow(timeout=0.5)
    assert len(list(islice(entries, 100))) == 100  # to read is work, and the collector may run
    began, used = time.monotonic(), time.thread_time()
    assert list(entries) == []
    assert time.thread_time() - used < (time.monotonic() - began) / 5
