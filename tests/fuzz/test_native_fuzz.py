"""No bytes make the C helper read or write where it should not, or walk without an end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ..native.frames import Ground
from .mutate import Source
from .native import GROUND_BYTES, TARGETS, Bytes
from .test_recovery_fuzz import fuzz


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    ground = Ground(GROUND_BYTES)
    yield ground
    ground.close()


@pytest.mark.parametrize("target", TARGETS)
def test_no_bytes_lead_the_c_helper_astray(
    target: str, ground: Ground, pytestconfig: pytest.Config, tally: Callable[[str, int], None]
) -> None:
    tried = [0]

    def check(data: bytes) -> None:
        tried[0] += 1
        TARGETS[target](Bytes(Source(data), ground))

    fuzz(check, int(pytestconfig.getoption("fuzz_inputs")))
    tally(f"inputs fuzzed: mw_{target}", tried[0])
