"""How many states the crash tests look at: --crash-states."""

from __future__ import annotations

import logging

import pytest

STATES = 200


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--crash-states", type=int, default=STATES, help="crash states to check for each scenario"
    )


@pytest.fixture(scope="session")
def crash_states(pytestconfig: pytest.Config) -> int:
    """How many states to check for each scenario. (The option is known when pytest is given this
    directory; from further up the default holds.)"""
    return int(pytestconfig.getoption("crash_states", default=STATES))


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Each killed journal logs that it was closed without a seal: thousands of lines."""
    caplog.set_level(logging.ERROR, "mmapwal")
