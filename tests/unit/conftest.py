"""A replica on each kind of storage, and one in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mmapwal import MemoryDirectory, Replica, recover

from .ledger import SIZES, Ledger, open_replica

if TYPE_CHECKING:
    from tests.conftest import Home


@pytest.fixture
def replica(home: Home) -> Replica:
    """A new one, with little room, on each kind of storage."""
    return open_replica(home, **SIZES)


@pytest.fixture
def single() -> Any:
    """A new one in memory, for what has nothing to do with storage."""
    with recover("j", Ledger(), storage=MemoryDirectory(), **SIZES) as made:
        yield made
