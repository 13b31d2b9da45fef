"""The writer under many threads at once, without Python (stress.c says what is checked). `.ci/tsan` runs the
same under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODES = ("plain", "full", "eio", "poison", "close")
SECONDS = "0.5"


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory, require: Callable[[object, str], None]) -> Path:
    require(shutil.which("gcc"), "no gcc to build the program with")
    program = tmp_path_factory.mktemp("stress") / "stress"
    sources = [Path(__file__).with_name("stress.c"), *sorted((ROOT / "native").glob("*.c"))]
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", f"-I{ROOT / 'native'}", "-pthread"]
    command += ["-Wl,--wrap=pthread_cond_timedwait", "-o", str(program), *map(str, sources)]
    subprocess.run(command, check=True)
    return program


def run(stress: Path, *arguments: str) -> None:
    done = subprocess.run([stress, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("inline", [[], ["inline"]], ids=["threaded", "inline"])
@pytest.mark.parametrize("mode", MODES)
def test_whoever_is_told_a_success_finds_it_on_the_disk_and_everyone_is_told(
    stress: Path, mode: str, inline: list[str]
) -> None:
    run(stress, mode, SECONDS, *inline)


def test_a_commit_serves_most_of_those_who_append_and_waits_for_nobody_who_comes_late_or_has_gone(
    stress: Path,
) -> None:
    run(stress, "company", SECONDS)
