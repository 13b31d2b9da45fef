"""All bugs planted by hand. A bug is planted in a copy; the tests run on it as they are."""

from __future__ import annotations

from .failing import FAILURES
from .mutant import Mutant
from .reading import READING
from .repairing import REPAIRS
from .writing import ORDER, SYNCS, SYSTEM

__all__ = ["MUTANTS"]

MUTANTS: tuple[Mutant, ...] = (*SYNCS, *SYSTEM, *ORDER, *FAILURES, *READING, *REPAIRS)
