"""What all tests share: the rule for tests that cannot run here, and a journal on every kind of storage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, settings

from mmapwal.storage import Directory, FileStorage, MemoryDirectory, SystemDirectory

if TYPE_CHECKING:
    from mmapwal import Journal

KINDS = ("mapped", "file", "memory")
TALLY = "tally"
NOTHING_SKIPS = os.environ.get("MMAPWAL_CI") == "1"

# Where a change goes in, the same code is asked the same questions; elsewhere each run asks others.
settings.register_profile("mmapwal", deadline=None, print_blob=True, derandomize=NOTHING_SKIPS)
settings.load_profile("mmapwal")
# For who asks whether it fails, not how: shrinking may take minutes. The answer is the same each time.
settings.register_profile(
    "unshrunk",
    settings.get_profile("mmapwal"),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)


# --- a skip says why, and is a failure where everything must run ------------------------------------


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    may = hasattr(report, "wasxfail") or "optional" in getattr(report, "keywords", ())
    if NOTHING_SKIPS and report.skipped and not may:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"nothing may skip with MMAPWAL_CI=1: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.fixture(scope="session")
def require() -> Callable[[object, str], None]:
    """`require(condition, reason)` skips the test where it cannot run; with MMAPWAL_CI=1 that fails."""

    def check(condition: object, reason: str) -> None:
        if not condition:
            pytest.skip(reason)

    return check


# --- how much is tried, and what was ------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    effort = parser.getgroup("effort", "how much to try: the defaults are for every day")
    effort.addoption("--crash-states", type=int, default=200, help="crash states to check for each scenario")
    effort.addoption("--power-cycles", type=int, default=20, help="cuts of the power for each combination")
    effort.addoption("--soak-seconds", type=float, default=4, help="how long to try what goes on and on")
    effort.addoption("--fuzz-inputs", type=int, default=200, help="inputs, or random lives, for each fuzzer")


@pytest.fixture
def soak_seconds(request: pytest.FixtureRequest) -> float:
    """How long a test that goes on and on shall do so."""
    return float(request.config.getoption("--soak-seconds"))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """`tally("crash states of a drain", 200)`: what the test tried, for the sum at the end of the run."""

    def add(what: str, count: int = 1) -> None:
        request.node.user_properties.append((TALLY, [what, count]))

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    sums: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, counted in report.user_properties:
            if name == TALLY:
                sums[counted[0]] += counted[1]
    if sums:
        terminalreporter.section("what was tried, in tests that passed")
        for what, count in sorted(sums.items()):
            terminalreporter.write_line(f"{count:14,}  {what}")


# --- child processes ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in another interpreter, with warnings as errors; the test looks at how it ended."""

    def run(
        script: str, *arguments: object, preload: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        env = os.environ | environment
        if preload is not None:  # behind what is there: a sanitizer's library must come first
            env["LD_PRELOAD"] = f"{env.get('LD_PRELOAD', '')} {preload}".strip()
        command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)

    return run


# --- signal handlers that raise -----------------------------------------------------------------------


class AlarmError(Exception):
    """What the handler of SIGALRM raises."""


@pytest.fixture
def alarm() -> Iterator[Callable[[], None]]:
    """`alarm()` from any thread: the handler raises AlarmError in the main one."""

    def handler(number: int, frame: object) -> None:
        raise AlarmError

    before = signal.signal(signal.SIGALRM, handler)
    yield lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
    signal.signal(signal.SIGALRM, before)


# --- the same journal on each kind of storage ---------------------------------------------------------


class Home:
    """Where one journal lives: opens it again and again, on the same files."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = KINDS[KINDS.index(kind)]
        self.path = path
        self.memory = MemoryDirectory(path.name)
        self._given: list[Journal | Directory | Home] = []
        self._journals: weakref.WeakSet[Journal] = weakref.WeakSet()

    def directory(self) -> Directory:
        """The files. On memory it is one object for all; on the others a new descriptor each time."""
        if self.kind == "memory":
            return self.memory
        storage: dict[str, Any] = {"storage": FileStorage} if self.kind == "file" else {}
        given = SystemDirectory(self.path, **storage)
        self._given.append(given)
        return given

    def open(self, **options: Any) -> Journal:
        from mmapwal import Journal

        if self.kind != "mapped":
            options.setdefault("storage", self.directory())
        journal = Journal(self.path, **options)
        self._given.append(journal)
        self._journals.add(journal)
        return journal

    def after_kill(self) -> Home:
        """Another home with the files as they are at this instant: what kill -9 would leave behind."""
        copy = Home(self.kind, self.path.with_name(f"{self.path.name}-killed-{len(self._given)}"))
        self._given.append(copy)
        with ExitStack() as still:  # no segment is made and no superblock replaced while files are copied
            for journal in self._journals:
                still.enter_context(journal._engine.structure)
            _copy_files(self.directory(), copy.directory())
        return copy

    def close(self) -> None:
        """Closes what is still open; an error of one does not keep the others open, and is raised."""
        errors = []
        while self._given:
            try:
                self._given.pop().close()
            except Exception as e:  # noqa: BLE001  # raised below, with those of the others
                errors.append(e)
        if errors:
            raise ExceptionGroup("closing what the test left open", errors)


def _copy_files(old: Directory, new: Directory) -> None:
    for name in old.names():
        try:
            source = old.open(name)
        except OSError as e:
            gone = isinstance(e, FileNotFoundError) and not isinstance(old, MemoryDirectory)
            if not gone:  # a subdirectory is no file
                _copy_files(old.subdirectory(name), new.subdirectory(name))
            continue
        target = new.create(name)
        target.write_at(0, source.read_at(0, len(source)))
        target.close()
        if not isinstance(old, MemoryDirectory):
            source.close()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of storage: "mapped", "file" or "memory"."""
    return str(request.param)


@pytest.fixture
def make_home(kind: str, tmp_path: Path) -> Iterator[Callable[[str], Home]]:
    """`make_home(name)`: the home of that name; the same name gives the same one again."""
    homes: dict[str, Home] = {}

    def make(name: str) -> Home:
        return homes.setdefault(name, Home(kind, tmp_path / name))

    yield make
    for home in homes.values():
        home.close()


@pytest.fixture
def home(make_home: Callable[[str], Home]) -> Home:
    """A journal's home, empty at first, on each kind of storage."""
    return make_home("j")


@pytest.fixture
def make_directory(make_home: Callable[[str], Home]) -> Callable[[str], Directory]:
    """`make_directory(name)`: a Directory; the same name gives the same files again."""
    return lambda name: make_home(name).directory()
