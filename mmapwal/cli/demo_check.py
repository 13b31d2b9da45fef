"""What the demo holds the journal to. Plain lists and dicts: nothing here uses the journal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mmapwal.cli.demo_machines import CATALOG_KIND, USAGE_KIND
from mmapwal.cli.demo_tree import Submission


class Acknowledgement(NamedTuple):
    """The child says: the submission in this place (from 0) is durable as this op."""

    op: int
    place: int


class Recovered(NamedTuple):
    """One entry that was in the journal after the crash."""

    op: int
    kind: int
    payload: bytes


class State(NamedTuple):
    """What both state machines hold."""

    paths: dict[str, dict[str, Any]]
    types: dict[str, list[int]]


def check_history(
    acknowledged: Sequence[Acknowledgement],
    recovered: Sequence[Recovered],
    submitted: Sequence[Submission],
) -> list[str]:
    """Acknowledged must be a prefix of recovered, and recovered a prefix of submitted.

    Returns one sentence for each difference, none when all is well.
    """
    return [*_check_acknowledged(acknowledged, recovered, submitted), *_check_recovered(recovered, submitted)]


def _check_acknowledged(
    acknowledged: Sequence[Acknowledgement], recovered: Sequence[Recovered], submitted: Sequence[Submission]
) -> Iterable[str]:
    for number, (op, place) in enumerate(acknowledged):
        if (op, place) != (number + 1, number):
            yield f"acknowledgement {number + 1} was out of order: op {op} for submission {place + 1}"
        elif place >= len(submitted):
            yield f"op {op} was acknowledged and never submitted"
        elif place >= len(recovered):
            yield f"op {op} was acknowledged and is lost"
        elif recovered[place] != (op, *submitted[place]):
            yield f"op {op} was acknowledged and came back as something else"


def _check_recovered(recovered: Sequence[Recovered], submitted: Sequence[Submission]) -> Iterable[str]:
    known: dict[Submission, int] | None = None
    for place, (op, kind, payload) in enumerate(recovered):
        if op != place + 1:
            yield f"op {op} was recovered where op {place + 1} belongs"
        entry = Submission(kind, payload)
        if place < len(submitted) and entry == submitted[place]:
            continue
        if known is None:
            known = {submission: index for index, submission in enumerate(submitted)}
        if entry in known:
            yield f"op {op} was recovered out of order: it holds submission {known[entry] + 1}"
        else:
            yield f"op {op} was recovered and never submitted"


def replay(entries: Iterable[Submission]) -> State:
    """The state that exactly these entries make."""
    paths: dict[str, dict[str, Any]] = {}
    types: dict[str, list[int]] = {}
    for kind, payload in entries:
        facts = json.loads(payload)
        if kind == CATALOG_KIND:
            paths[facts["path"]] = {name: facts[name] for name in ("type", "mode", "size", "mtime_ns")}
        elif kind == USAGE_KIND:
            count, size = types.get(facts["suffix"], (0, 0))
            types[facts["suffix"]] = [count + 1, size + facts["size"]]
    return State(paths, types)


def check_state(actual: State, expected: State, when: str) -> list[str]:
    """One sentence for each path and file type that differs."""
    return [
        *_differences(f"{when}, path", actual.paths, expected.paths),
        *_differences(f"{when}, file type", actual.types, expected.types),
    ]


def _differences(what: str, actual: Mapping[str, object], expected: Mapping[str, object]) -> Iterable[str]:
    for name in sorted(actual.keys() | expected.keys()):
        if actual.get(name) != expected.get(name):
            yield f"{what} {name!r}: is {actual.get(name)}, should be {expected.get(name)}"
