"""Frames that are right by themselves, of another journal or of another time, are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mmapwal import Durability, Journal

from .files import (
    SMALL,
    Frame,
    Home,
    entry_frames,
    flip,
    frames_of,
    killed,
    read,
    refused,
    without_index,
    write,
)


@pytest.mark.parametrize("kind", ["mapped", "memory"], indirect=True)
def test_the_frames_of_another_journal_are_no_frames_here(make_home: Callable[[str], Home]) -> None:
    """All of them, in the same places: the chain is whole, only the salt is another."""
    left = []
    for name in ("ours", "theirs"):
        home = make_home(name)
        journal = home.open(**SMALL, clock=lambda: 1)
        for n in range(3):
            journal.append(name.encode().ljust(40) + bytes([n]))
        left.append(killed(home, journal))
    ours, theirs = left
    first = entry_frames(ours.directory())[1]
    data = read(theirs.directory(), frames_of(theirs.directory())[0].name)
    write(ours.directory(), first.name, first.at, data[first.at : first.at + 3 * first.bytes])
    assert refused(ours).lsn == first.lsn


def written_anew(home: Home) -> tuple[Home, Journal, Frame, bytes]:
    """A journal whose second entry was damaged and cut off, and two appended since: its home, itself, the
    frame of the entry that is gone, and the bytes of that frame. Another one lies there now."""
    journal = home.open(**SMALL, durability=Durability.OS, clock=lambda: 1)
    journal.append(b"a" * 40)
    journal.append(b"b" * 40)
    older = without_index(killed(home, journal))
    frame = entry_frames(older.directory())[2]
    old = read(older.directory(), frame.name)[frame.at : frame.at + frame.bytes]
    flip(older.directory(), frame.name, frame.at)
    journal = older.open()
    journal.append(b"c" * 40)
    journal.append(b"d" * 40)
    return older, journal, frame, old


def test_a_lost_write_refuses(home: Home) -> None:
    """The sector fell back to an older state that is right by itself: the chain breaks behind it."""
    older, journal, frame, old = written_anew(home)
    left = killed(older, journal)
    write(left.directory(), frame.name, frame.at, old)
    assert refused(left).lsn == frame.lsn


def test_a_lost_write_of_an_epoch_that_is_over_refuses(home: Home) -> None:
    """The sector fell back to a frame that a cut had left behind. Its epoch is that of the frame before, so
    only the link of the next one tells."""
    older, journal, frame, old = written_anew(home)
    over = killed(older, journal)
    left = killed(over, over.open())
    write(left.directory(), frame.name, frame.at, old)
    assert refused(left).lsn == frame.lsn + frame.bytes
