"""Plants a mutant in a copy of the module, or of the C helper, and runs tests on it in a child process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from .mutant import Mutant, Patch

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "native"
CC = ["gcc", "-std=gnu11", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread", f"-I{NATIVE}"]
BINDING = [f"-I{sysconfig.get_path('include')}", "-DPy_LIMITED_API=0x030b0000", "-w"]
MODULE = "mmapwal._native.abi3.so"


def patched(patches: tuple[Patch, ...]) -> dict[str, str]:
    """The text of each changed file. ValueError when the catalogue does not fit the code any more."""
    texts: dict[str, str] = {}
    for patch in patches:
        text = texts.get(patch.file) or (ROOT / patch.file).read_text()
        if text.count(patch.old) != 1:
            raise ValueError(f"{patch.file} holds {text.count(patch.old)} times: {patch.old!r}")
        texts[patch.file] = text.replace(patch.old, patch.new)
    return texts


class Workshop:
    """Where mutants are built. The objects of the C helper as it is are built once for all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _objects(self) -> dict[str, Path]:
        """By source file, the binding too."""
        names = ["_native.c", *(p.name for p in sorted(NATIVE.glob("*.c")))]
        objects = {name: self.folder / f"{name}.o" for name in names}
        with self._alone():
            if not (self.folder / "done").exists():
                binding = self.folder / "_native.c"
                generate = [sys.executable, "-m", "cffi.gen_src", "exec-python", "--ffi-var", "ffibuilder"]
                run([*generate, str(NATIVE / "ffi_build.py"), str(binding)])
                run([*CC, *BINDING, "-c", str(binding), "-o", str(objects["_native.c"])])
                for name in names[1:]:
                    run([*CC, "-c", str(NATIVE / name), "-o", str(objects[name])])
                (self.folder / "done").touch()
        return objects

    def plant(self, name: str, patches: tuple[Patch, ...]) -> Path:
        """The folder with the mutated modules. Without any patch: the C helper as it is, built here."""
        folder = self.folder / name
        folder.mkdir()
        texts = patched(patches)
        if not texts or any(file.endswith(".c") for file in texts):
            objects = self._objects()
            for file, text in texts.items():
                source = folder / Path(file).name
                source.write_text(text)
                objects[source.name] = source.with_suffix(".o")
                run([*CC, "-c", str(source), "-o", str(objects[source.name])])
            run(["gcc", "-shared", "-pthread", "-o", str(folder / MODULE), *map(str, objects.values())])
        else:
            for file, text in texts.items():
                (folder / f"mmapwal.{Path(file).name}").write_text(text)
        return folder


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stderr}")


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended: how many there were, the first failure; or the signal that ended it."""

    tests: int
    failure: str | None
    signal: int


def run_tests(planted: Path, tests: list[str], crash_states: int) -> Outcome:
    """Runs them in a child process with what is planted there, until the first failure."""
    report = planted / "report.xml"
    options = ["-n", "0", "-x", "-p", "no:cacheprovider", "-o", "junit_logging=no", f"--junitxml={report}"]
    options += [f"--crash-states={crash_states}", "--hypothesis-profile=unshrunk"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent / "planted"), "MMAPWAL_PLANTED": str(planted)}
    env.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode < 0:
        return Outcome(0, None, -done.returncode)
    if done.returncode not in {0, 1}:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout}{done.stderr}")
    suite = ElementTree.parse(report).getroot().find("testsuite")  # noqa: S314  # of our own child
    assert suite is not None
    failures = [e for kind in ("failure", "error") for e in suite.iter(kind)]
    said = (
        re.sub(r"\x1b\[\d+m", "", f"{failures[0].get('message')}\n{failures[0].text}") if failures else None
    )
    return Outcome(int(suite.get("tests", 0)), said, 0)


def caught(outcome: Outcome, mutant: Mutant) -> str:
    """Empty, or why the test did not catch the mutant as it should."""
    if outcome.signal and outcome.signal == mutant.failure.signal:
        return ""
    if outcome.failure is not None and re.search(mutant.failure.pattern, outcome.failure):
        return ""
    return f"expected {mutant.failure.name}: got {outcome}"
