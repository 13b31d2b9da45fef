"""What a bug planted by hand is: a change of the code, and the test that it has to make fail."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum


class Method(Enum):
    """What kind of test catches it."""

    EXPLORER = "the crash explorer"
    FAULTS = "injected failures"
    DAMAGE = "damaged files"
    CHILD = "child processes"
    UNIT = "unit tests"


class Failure(Enum):
    """How the test has to fail: what is searched for in its report."""

    LOST = r"lost: recovery \("
    INVENTED = r"invented: recovery \("
    TORN = r"torn: recovery \("
    REFUSED = r"not safe against [^\n]*: (CorruptionError|SnapshotError|SnapshotCorruptError):"
    ACCEPTED = "DID NOT RAISE|it opened: no "
    WRONG = "^(AssertionError|assert)"
    OTHER_ERROR = r"^(OSError|mmapwal\.errors\.\w+):"
    DANGLING = r"^assert \[0, 0"

    @property
    def pattern(self) -> str:
        return str(self.value)

    @property
    def signal(self) -> int:
        """That may end the process instead."""
        return signal.SIGSEGV if self is Failure.DANGLING else 0


@dataclass(frozen=True)
class Patch:
    """`old`, which is there once, becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """`breaks`: the rule that it breaks. `test`: what catches it, with so many crash states."""

    name: str
    breaks: str
    patches: tuple[Patch, ...]
    method: Method
    failure: Failure
    test: str
    crash_states: int = 200


def explored(test: str, name: str = "nothing_acknowledged_is_lost_and_nothing_else_is_found") -> str:
    """A test of the journal by the explorer, for one script."""
    return f"tests/crash/test_journal_crash.py::test_{name}[{test}]"


def unsynced(test: str) -> str:
    """The same without a sync of each commit."""
    return explored(f"{test}-Durability.OS", "of_what_is_not_synced_only_the_last_is_lost")


def damage(name: str) -> str:
    """A test of damaged files."""
    return f"tests/journal/test_damage.py::test_{name}"
