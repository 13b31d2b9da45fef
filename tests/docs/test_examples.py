"""Every example in README.md and docs/ runs as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
PROMPT = "$ "


class Example(NamedTuple):
    """A block of code, with where it is found."""

    place: str
    language: str
    code: str

    def __repr__(self) -> str:
        return self.place


def examples(*languages: str) -> list[Example]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            indent, language, code = match.groups()
            if language in languages:
                line = text[: match.start()].count("\n") + 1
                code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
                found.append(Example(f"{page.name}:{line}", language, code))
    return found


def commands(code: str) -> list[str]:
    """What stands behind the prompts, with the lines that go on after a backslash."""
    found: list[str] = []
    for line in code.splitlines():
        if line.startswith(PROMPT):
            found.append(line.removeprefix(PROMPT))
        elif found and found[-1].endswith("\\"):
            found[-1] += "\n" + line
    return found


PYTHON = examples("python")
SHELL = [e for e in examples("sh", "console") if e.code.startswith(PROMPT)]


def run(directory: Path, *command: str) -> None:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=directory, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("example", PYTHON, ids=repr)
def test_python_example_runs(example: Example, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example.code)
    empty = tmp_path / "empty"
    empty.mkdir()
    run(empty, sys.executable, "-W", "error", str(script))


@pytest.mark.parametrize("example", SHELL, ids=repr)
def test_shell_example_runs(example: Example, tmp_path: Path) -> None:
    run(tmp_path, "bash", "-euo", "pipefail", "-c", "\n".join(commands(example.code)))


def test_the_readme_has_an_example_of_each_kind() -> None:
    assert any(e.place.startswith("README.md") for e in PYTHON)
    assert any(e.place.startswith("README.md") for e in SHELL)


def test_no_example_is_marked_as_not_run() -> None:
    assert [page.name for page in PAGES if "<!-- not run" in page.read_text()] == []
