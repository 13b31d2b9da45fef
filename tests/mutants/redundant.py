"""Effects that may be left out, and neighbours that may be swapped, each with the reason why nothing is lost.

A pattern stands for whole names of effects.Mutant: "no X" is X left out, "X after Y" is X put off behind Y,
which came next. What the model itself shows to change nothing that a crash could leave is not listed.
"""

from __future__ import annotations

import re

__all__ = ["REDUNDANT", "reason"]

_MADE = "(new segment|new generation|snapshot)"
_EMPTY = r"\((first|\w+( facts)?, no segment)\)"
_SPARE = r"(create|unlink|write|write zeros of) superblock( \([^)]*\))?"

REDUNDANT: dict[str, str] = {
    # --- left out
    "no write zeros of superblock": "room kept ahead for the next one, which is written whole in any case",
    "no (write|write zeros of|rename|sync) index": "without it, or with a bad one, the next open scans",
    "no parent sync": "making a journal syncs the parent before its first superblock and behind the second",
    rf"no (rename|dir sync behind rename) superblock {_EMPTY}": "the superblock that names the first segment "
    "is durable before any frame",
    r"no rename superblock \(same facts\)": "the directory sync behind it makes the one that was read "
    "durable; the rename is for a directory sync that had failed, which proves nothing when called again",
    r"no (rename|dir sync behind rename) superblock \(seal\)": "without the seal the next open scans",
    "no dir sync behind mkdir snapshots": "the superblock that pairs a snapshot syncs the same directory",
    "no dir sync behind nothing new": "nothing has come into the directory since its last sync",
    # --- put off
    "create lock after parent sync": "the lock file is empty and says nothing",
    "(store|write|write zeros of|rename) index after .*": "the index is not believed after a crash",
    r"sync index after write superblock \(seal\)": "the seal means nothing before its rename",
    "unlink (segment|snapshot) after .*": "what no superblock names is removed by the next open",
    rf"(sync segment|dir sync behind rename (?!snapshot after unlink).*|rename superblock \([^)]*\)|"
    rf"unlink superblock) after {_SPARE}": "the spare superblock means nothing before its rename",
    f"(write|truncate) {_MADE} after (write|write zeros of|truncate) {_MADE}": "both come before the sync",
    f"sync {_MADE} after rename {_MADE}": "the name means nothing before a superblock has it, and the sync "
    "of the directory comes behind both",
    rf"rename superblock ({_EMPTY}|\((same facts|seal)\)) after dir sync behind .*": "as when it is left out",
    "mkdir snapshots after dir sync .*|dir sync behind mkdir snapshots after .*": "as when it is left out",
    "dir sync behind rename snapshot after unlink snapshot": "neither the newest nor the paired one goes",
    "dir sync behind nothing new after .*": "as when it is left out",
    "parent sync after .*": "as when it is left out",
}


def reason(name: str) -> str | None:
    """Why the mutant of this name does no harm; None: it does."""
    return next((why for pattern, why in REDUNDANT.items() if re.fullmatch(pattern, name)), None)
