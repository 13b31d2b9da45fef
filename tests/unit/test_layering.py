"""Imports point down only; files and functions stay short; nothing depends on assert or hides an error."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints

import pytest

import mmapwal
import mmapwal.testing

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mmapwal"

# From the bottom up. A module may import what lies below it, and its neighbours as long as no circle
# comes of it. "mmapwal" is the public face.
LAYERS = [
    {"_native"},
    {"errors", "format", "arguments"},
    {"storage", "extras", "filelock", "descriptor", "injected", "aside", "threads", "turn"},
    {"segment", "index", "page", "superblock", "columns", "disposal"},
    {
        "engine",
        "preparing",
        "opening",
        "writer",
        "reader",
        "reading",
        "recovery",
        "compaction",
        "removal",
        "verify",
        "stats",
        "syncing",
        "observer",
        "following",
        "walking",
    },
    {"journal", "snapshot", "inspection", "backup", "repair"},
    {"replica", "machines", "aio", "aio_following", "testing"},
    {"mmapwal"},
    {"cli", "integrations", "__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70
LONG: dict[str, str] = {}  # "file.py: function": why it is one

MODULES = sorted(PACKAGE.rglob("*.py"))
C_FILES = sorted((ROOT / "native").glob("*.[ch]"))
SHORT_FILES = [*MODULES, *C_FILES, *sorted((ROOT / "perf").glob("*.*[yc]"))]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """The modules of mmapwal that a file imports, anywhere in it, as full names."""
    known = {name_of(m) for m in MODULES} | {"mmapwal._native"}
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "mmapwal")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            if base.split(".")[0] != "mmapwal":
                continue
            for alias in node.names:
                below = f"{base}.{alias.name}"
                yield below if below in known else base


def room_of(module: str) -> str:
    """What the layers name: the module, or the package right below mmapwal that it is in."""
    return module.split(".")[1] if "." in module else module


def test_every_module_has_a_layer() -> None:
    assert {room_of(name_of(path)) for path in MODULES} <= set(LAYER)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    here = room_of(name_of(path))
    up = [target for target in imports_of(path) if LAYER[room_of(target)] > LAYER[here]]
    assert up == []


def test_imports_make_no_circle() -> None:
    below = {name_of(path): set(imports_of(path)) for path in MODULES}
    below = {name: {t for t in targets if t != name} for name, targets in below.items()}
    while below:
        free = [name for name, targets in below.items() if not targets & set(below)]
        assert free, f"in a circle, or above one: {sorted(below)}"
        for name in free:
            del below[name]


def test_only_the_seam_opens_writes_or_syncs_files() -> None:
    effects = re.compile(
        r"\bos\.(open|write|pwrite\w*|writev|fsync|fdatasync|rename|replace|unlink|remove|truncate|ftruncate"
        r"|mkdir|makedirs|link|symlink|posix_fallocate)\b|\blib\.mw_(open|file_\w+|fd_\w+|map\w*|set_nocow)\b"
        r"|\.(write_bytes|write_text|mkdir|touch|symlink_to)\(|\bfcntl\.|\bimport mmap\b"
    )
    seam = {"storage", "extras", "filelock", "descriptor"}
    core = [p for p in MODULES if LAYER[room_of(name_of(p))] <= LAYER["journal"] and p.stem not in seam]
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in core
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if effects.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("path", SHORT_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < FILE_LINES_MAX


def functions(path: Path) -> Iterator[tuple[str, int]]:
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1
        return
    start, name = 0, ""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if re.match(r"[a-zA-Z].*\{$|[a-zA-Z].*\($", line):
            start, name = number, line
        elif line.startswith("}") and start:
            yield name, number - start + 1
            start = 0


@pytest.mark.parametrize("path", SHORT_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path: Path) -> None:
    long = [f"{path.name}: {name}" for name, lines in functions(path) if lines >= FUNCTION_LINES_MAX]
    assert [name for name in long if name not in LONG] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_assert_and_no_bare_except(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"assert at line {node.lineno}"
        bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not bare, f"bare except at line {node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


# --- the public face ------------------------------------------------------------------------------------


def own_docstring(thing: object, name: str) -> str:
    """The docstring that someone wrote, not the signature that dataclasses put there."""
    text = getattr(thing, "__doc__", None) or ""
    return "" if text.startswith(f"{name}(") else text


@pytest.mark.parametrize("name", sorted(mmapwal.__all__))
def test_every_public_name_is_documented(name: str) -> None:
    thing = getattr(mmapwal, name)
    if inspect.isclass(thing) or callable(thing):
        assert own_docstring(thing, name), name


def public_methods() -> list[str]:
    seam = {n for p in (mmapwal.Storage, mmapwal.Directory) for n in vars(p)}  # documented in the protocol
    found = []
    for name in mmapwal.__all__:
        thing = getattr(mmapwal, name)
        if not inspect.isclass(thing) or thing in {mmapwal.Storage, mmapwal.Directory}:
            continue
        for method, value in vars(thing).items():
            described = inspect.isfunction(value) or isinstance(value, property | classmethod)
            if described and not method.startswith("_") and method not in seam:
                found.append(f"{name}.{method}")
    return sorted(found)


@pytest.mark.parametrize("name", public_methods())
def test_every_public_method_is_documented(name: str) -> None:
    owner, method = name.split(".")
    assert inspect.getdoc(getattr(getattr(mmapwal, owner), method)), name


@pytest.mark.parametrize("face", [mmapwal, mmapwal.testing], ids=lambda m: m.__name__)
def test_all_names_what_is_there_sorted_and_once(face: ModuleType) -> None:
    assert sorted(set(face.__all__)) == sorted(face.__all__)
    assert all(hasattr(face, name) for name in face.__all__)


def test_asyncio_is_only_imported_for_who_asks_for_the_journal_of_tasks() -> None:
    script = """
import sys
import mmapwal
assert "AsyncJournal" in dir(mmapwal) and not hasattr(mmapwal, "AsyncJourney")
assert "asyncio" not in sys.modules
from mmapwal import *
assert AsyncJournal is mmapwal.AsyncJournal and "asyncio" in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def kinds_in(hints: Iterable[object]) -> Iterator[type]:
    """The classes that types are made of."""
    for hint in hints:
        if inspect.isclass(hint):
            yield hint
        yield from kinds_in(hint if isinstance(hint, list) else get_args(hint))


def public_calls(face: ModuleType) -> Iterator[Callable[..., object]]:
    for thing in (getattr(face, name) for name in face.__all__):
        members = (
            vars(thing) if inspect.isclass(thing) else {thing.__name__: thing} if callable(thing) else {}
        )
        for name, member in members.items():
            call = getattr(member, "fget", getattr(member, "__func__", member))
            if inspect.isfunction(call) and not name.startswith("_"):
                yield call


def test_what_the_calls_of_testing_take_and_give_has_a_public_name() -> None:
    public = {getattr(face, name) for face in (mmapwal, mmapwal.testing) for name in face.__all__}
    hidden = {
        f"{call.__qualname__}: {kind.__name__}"
        for call in public_calls(mmapwal.testing)
        for kind in kinds_in(get_type_hints(call).values())
        if kind.__module__.startswith("mmapwal") and kind not in public
    }
    assert hidden == set()
