"""What journals do in the crash tests: one behaviour a script."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest

from mmapwal import format as fmt

from .story import Story

SMALL = [b"a" * 100, b"", b"b" * 600, b"c" * 40]
Script = Callable[[Story], None]


def fill(story: Story, count: int, size: int = 1400, tag: bytes = b"f") -> None:
    for n in range(count):
        story.append(tag + b"%d" % n + b"." * size)


def creates_and_appends(story: Story) -> None:
    for payload in SMALL:
        story.append(payload, kind=len(payload) % 5)


def appends_batches_over_a_rotation(story: Story) -> None:
    for n in range(4):
        story.append_many([b"%d" % n * 1500 for _ in range(3)])


def fills_gaps_and_replaces(story: Story) -> None:
    story.append(b"five", op=5)
    story.append(b"two" * 50, op=2)
    story.append(b"four", op=4, kind=3)
    story.append(b"two again", op=2, replace=True)
    story.append_many([b"six", b"seven" * 100])
    story.append(b"five again" * 60, op=5, replace=True)
    story.append(b"one", op=1)


def drains(story: Story) -> None:
    story.append_many([b"x" * 300] * 6)
    story.drain(3, 4)
    story.append(b"again", op=3)
    story.drain(1, 2)
    story.append(b"next")
    story.drain(1, 100)
    story.append(b"from a hundred on")


def truncates_and_refills(story: Story) -> None:
    story.append_many([b"old" * 100] * 5)
    story.truncate_from(3)
    story.append(b"new" * 100)
    story.append(b"newer")
    story.truncate_from(4)
    story.truncate_from(1)
    story.append(b"first again")


def moves_the_watermark(story: Story) -> None:
    fill(story, 3, 200)
    story.set_snapshot_op(2)
    story.append(b"four")
    story.set_snapshot_op(10)
    story.append(b"eleven")
    story.set_user_data(b"term 3")
    story.set_user_data(b"")


def compacts(story: Story) -> None:
    fill(story, 14, 2000)
    story.set_snapshot_op(6)
    story.compact()
    fill(story, 3, 2000, b"g")
    story.drain(8, 12)
    story.compact()
    story.append(b"behind")


def compacts_away_what_was_replaced_and_truncated(story: Story) -> None:
    fill(story, 6, 1500)
    for op in range(1, 5):
        story.append(b"again%d" % op * 200, op=op, replace=True)
    story.truncate_from(6)
    fill(story, 6, 1500, b"h")
    story.compact()
    story.append(b"behind")


def dies_and_opens_again(story: Story) -> None:
    fill(story, 2, 300)
    story.reopen(kill=True)
    story.append(b"second life" * 30)
    story.reopen(kill=True)
    story.reopen(kill=True)
    story.append_many([b"fourth", b"life" * 200])
    story.reopen(kill=True)


def closes_and_opens_again(story: Story) -> None:
    fill(story, 3, 300)
    story.reopen()
    story.append(b"second life")
    story.reopen()
    story.close()


def dies_in_the_middle_of_removals(story: Story) -> None:
    fill(story, 8, 1800)
    story.reopen(kill=True)
    story.drain(3, 5)
    story.reopen(kill=True)
    story.truncate_from(7)
    story.append(b"seven")
    story.reopen(kill=True)
    story.compact()
    story.reopen(kill=True)


def takes_what_is_larger_than_a_segment(story: Story) -> None:
    story.append(b"small")
    story.append(b"large" * 5000)
    story.append(b"behind it")
    story.append_many([b"pair" * 2400] * 2)
    story.append(b"last")


def goes_round_the_ring(story: Story) -> None:
    for n in range(3):
        fill(story, 12, 900, b"%d" % n)
        story.set_snapshot_op(12 * (n + 1) - 3)
        story.compact()


def drains_until_there_are_too_many_rows(story: Story) -> None:
    """A removal that leaves something live below it takes a row; when all are taken, it compacts."""
    with mock.patch.object(fmt, "REMOVALS_MAX", 3):
        story.append(b"stays")
        for n in range(5):
            story.append(b"%d" % n * 600)
            story.drain(2, 2)
        story.append(b"last" * 100)


SCRIPTS: list[Script] = [
    creates_and_appends,
    appends_batches_over_a_rotation,
    fills_gaps_and_replaces,
    drains,
    drains_until_there_are_too_many_rows,
    truncates_and_refills,
    moves_the_watermark,
    compacts,
    compacts_away_what_was_replaced_and_truncated,
    dies_and_opens_again,
    closes_and_opens_again,
    dies_in_the_middle_of_removals,
    takes_what_is_larger_than_a_segment,
    goes_round_the_ring,
]
parametrize_scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
