"""Who may read the files, what lies in their place, and what the files say of sizes."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import mmapwal
from mmapwal import Journal, JournalError, SystemDirectory, inspect, recover
from mmapwal import format as fmt
from mmapwal.superblock import Superblock

from ..fuzz.mutate import repair_index, repair_segment, repair_superblock

PACKAGE = Path(mmapwal.__file__).parent
SMALL = {"slots": 256, "segment_bytes": 16384}


class Count:
    """A state machine: how many entries."""

    count = 0

    def apply(self, entry: object) -> None:
        self.count += 1

    def snapshot(self) -> bytes:
        return b"%d" % self.count

    def restore(self, snapshot: memoryview) -> None:
        self.count = int(bytes(snapshot))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with a snapshot, closed."""
    with recover(tmp_path / "j", Count(), **SMALL) as replica:
        for _ in range(30):
            replica.submit(b"x" * 500)
        replica.checkpoint()
        replica.submit(b"x")
    return tmp_path / "j"


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


# --- modes --------------------------------------------------------------------------------------------


def modes_of(path: Path) -> set[tuple[str, str]]:
    return {(f.suffix, oct(stat.S_IMODE(f.stat().st_mode))) for f in path.rglob("*") if f.is_file()}


@pytest.mark.usefixtures("open_umask")
def test_files_and_folders_are_for_the_owner_alone_whatever_the_umask(path: Path, tmp_path: Path) -> None:
    with recover(path, Count()) as replica:
        replica.submit(b"x")
        replica.checkpoint()
        replica.journal.backup(tmp_path / "copy")
        for folder in (path, tmp_path / "copy"):
            assert {mode for _, mode in modes_of(folder)} == {"0o600"}
            for each in (folder, folder / "snapshots"):
                assert stat.S_IMODE(each.stat().st_mode) == 0o700


@pytest.mark.usefixtures("open_umask")
def test_who_says_otherwise_gets_other_modes(tmp_path: Path) -> None:
    directory = SystemDirectory(tmp_path / "j", file_mode=0o640, directory_mode=0o750)
    with recover(tmp_path / "j", Count(), storage=directory, **SMALL) as replica:
        replica.submit(b"x")
        replica.checkpoint()
        assert {mode for _, mode in modes_of(tmp_path / "j")} == {"0o640"}
        for each in (tmp_path / "j", tmp_path / "j" / "snapshots"):
            assert stat.S_IMODE(each.stat().st_mode) == 0o750


# --- what lies in the place of a file -----------------------------------------------------------------


def put_link(place: Path, aside: Path) -> None:
    place.rename(aside)
    place.symlink_to(aside)


def put_dangling_link(place: Path, aside: Path) -> None:
    place.unlink()
    place.symlink_to(aside)


def put_pipe(place: Path, aside: Path) -> None:
    place.rename(aside)
    os.mkfifo(place)


def put_socket(place: Path, aside: Path) -> None:
    place.rename(aside)
    with socket.socket(socket.AF_UNIX) as s:
        here = Path.cwd()
        os.chdir(place.parent)  # the path of a socket is short
        try:
            s.bind(place.name)
        finally:
            os.chdir(here)


def put_folder(place: Path, aside: Path) -> None:
    place.rename(aside)
    place.mkdir()


@contextlib.contextmanager
def nobody_waits_at(place: Path) -> Iterator[None]:
    """Who waits at a pipe is let through after a while, and that is a failure."""
    freed = []

    def free() -> None:
        if stat.S_ISFIFO(place.lstat().st_mode):
            freed.append(os.open(place, os.O_RDWR | os.O_NONBLOCK))

    timer = threading.Timer(20, free)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # who was let through may be here before the timer has noted it
    assert freed == [], "somebody waited"


PUT = [put_link, put_dangling_link, put_pipe, put_socket, put_folder]


@pytest.mark.parametrize("put", PUT)
@pytest.mark.parametrize("name", ["superblock", "segment-*", "index", "lock", "snapshots/snapshot-*"])
def test_what_is_no_file_in_the_place_of_one_is_refused_at_once_and_never_written_through(
    path: Path, tmp_path: Path, name: str, put: Callable[[Path, Path], None]
) -> None:
    (place,) = list(path.glob(name))[-1:]
    aside = tmp_path / "aside"
    put(place, aside)
    before = aside.read_bytes() if aside.exists() else None
    with nobody_waits_at(place):
        for read in (lambda: inspect(path), lambda: Journal(path, readonly=True).close()):
            try:
                read()
            except (OSError, JournalError) as e:
                assert place.name in str(e) or str(path) in str(e)
        try:
            recover(path, Count()).close()
        except (OSError, JournalError) as e:
            assert place.name in str(e) or str(path) in str(e), e
        else:
            assert name == "lock", "it was taken for a file"  # which says nothing, whatever it is
    assert (aside.read_bytes() if aside.exists() else None) == before


@pytest.mark.parametrize("put", PUT)
@pytest.mark.parametrize("name", ["superblock.tmp", "segment-0000000000000099-00000000.tmp", "index.tmp"])
def test_a_link_in_the_place_of_what_is_being_made_is_not_written_through(
    path: Path, tmp_path: Path, name: str, put: Callable[[Path, Path], None]
) -> None:
    aside = tmp_path / "aside"
    place = path / name
    place.write_bytes(b"untouched")
    put(place, aside)
    before = aside.read_bytes() if aside.exists() else None
    (path / "index").unlink()
    try:
        with Journal(path) as journal:
            for _ in range(100):
                journal.append(b"y" * 500)
    except OSError as e:
        assert put is put_folder
        assert name in str(e)
    assert (aside.read_bytes() if aside.exists() else None) == before


def test_what_comes_to_lie_in_the_place_of_what_is_being_made_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another name of somebody's file, put there between the removal of what was there and the making."""
    aside = tmp_path / "aside"
    aside.write_bytes(b"untouched")
    with SystemDirectory(tmp_path / "j") as directory:
        unlink = directory.unlink

        def unlink_and_put(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                unlink(name)
            os.link(aside, directory.path / name)

        monkeypatch.setattr(directory, "unlink", unlink_and_put)
        with pytest.raises(FileExistsError):
            directory.create(fmt.SUPERBLOCK_SPARE_NAME)
        with pytest.raises(FileExistsError):
            Journal(tmp_path / "j", storage=directory)
    assert aside.read_bytes() == b"untouched"


def test_a_link_in_the_place_of_the_snapshots_is_refused_and_nothing_goes_there(
    path: Path, tmp_path: Path
) -> None:
    (path / "snapshots").rename(tmp_path / "aside")
    (path / "snapshots").symlink_to(tmp_path / "aside")
    before = sorted((tmp_path / "aside").iterdir())
    with pytest.raises(OSError, match="snapshots"):
        recover(path, Count())
    assert sorted((tmp_path / "aside").iterdir()) == before


def test_links_in_the_place_of_a_backup_are_not_written_through(path: Path, tmp_path: Path) -> None:
    copy, aside = tmp_path / "copy", tmp_path / "aside"
    with Journal(path) as journal:
        journal.backup(copy)
        for place in (
            copy / "superblock.tmp",
            next(copy.glob("segment-*")),
            *copy.glob("snapshots/snapshot-*"),
        ):
            aside.write_bytes(b"untouched")
            place.unlink(missing_ok=True)
            place.symlink_to(aside)
            journal.append(b"more")
            try:
                journal.backup(copy)
            except (OSError, JournalError) as e:
                assert place.name in str(e)
                place.unlink()
            assert aside.read_bytes() == b"untouched"
        journal.backup(copy)
        expected = [bytes(e.payload) for e in journal]
    with Journal(copy) as journal:
        assert [bytes(e.payload) for e in journal] == expected


# --- what the files say of sizes ----------------------------------------------------------------------

OPENS = """
import os, resource, sys
import mmapwal
from mmapwal import Journal, JournalError, inspect

if sys.argv[2:] == [] and "libasan" not in os.environ.get("LD_PRELOAD", ""):  # which maps terabytes itself
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
def whole(path):
    for problem in inspect(path).problems:
        raise problem.error()
for look in (whole, lambda path: list(Journal(path, readonly=True)), lambda path: Journal(path).close()):
    try:
        look(sys.argv[1])
        print("none")
    except (JournalError, OSError) as e:
        print(type(e).__name__)
"""


def unseal(path: Path) -> Superblock:
    """As if it had been killed; what it was before."""
    superblock = Superblock.decode((path / fmt.SUPERBLOCK_NAME).read_bytes())
    (path / fmt.SUPERBLOCK_NAME).write_bytes(replace(superblock, seal=None).encode())
    return superblock


@pytest.mark.parametrize(
    ("file", "at", "size"),
    [
        ("superblock", 40, 2**62), ("superblock", 48, 2**62), ("superblock", 144, 2**32 - 1),
        ("superblock", 148, 2**32 - 1), ("superblock", 12, 2**32 - 1), ("superblock", 156, 2**32 - 1),
        ("superblock", 152, 2**32 - 1), ("superblock", fmt.SUPERBLOCK_HEAD.itemsize + 16, 2**62),
        ("segment-*", 48, 2**62), ("segment-*", 4096 + 40, 2**32 - 1), ("index", 32, 2**62),
    ],
)  # fmt: skip
def test_absurd_sizes_end_in_an_error_and_not_in_memory(
    path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]], file: str, at: int, size: int
) -> None:
    """No checksum tells of them, and no seal makes it needless to read them."""
    superblock = unseal(path)
    place = path / (superblock.segments[0].name if file == "segment-*" else file)
    data = bytearray(place.read_bytes())
    width = 8 if size > 2**32 else 4
    data[at : at + width] = size.to_bytes(width, "little")
    salt = fmt.segment_salt(superblock.uuid, superblock.segments[0].id)
    mends = {"superblock": repair_superblock, "index": repair_index}
    mends.get(file, lambda data: repair_segment(data, salt, depth=2))(data)
    place.write_bytes(data)
    done = run_python(OPENS, path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"none" if file == "index" else "CorruptionError"}


@pytest.mark.parametrize("file", ["superblock", "index", "segment-*", "snapshots/snapshot-*"])
def test_a_file_grown_to_terabytes_costs_no_memory(
    path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]], file: str
) -> None:
    os.truncate(sorted(path.glob(file))[0], 8 << 40)
    done = run_python(OPENS, path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"CorruptionError", "OSError", "none"}


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("number", [0, -1])
def test_a_segment_grown_to_terabytes_costs_no_time_where_there_are_addresses_for_it(
    path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]], number: int, closed: bool
) -> None:
    """What is behind its end is no part of it: nobody looks there."""
    if not closed:
        unseal(path)
    os.truncate(sorted(path.glob("segment-*"))[number], 8 << 40)
    done = run_python(OPENS, path, "without a limit")
    assert (done.returncode, done.stdout.split()) == (0, ["none"] * 3), done.stderr


# --- what runs ----------------------------------------------------------------------------------------


RUNS = re.compile(r"(c?pickle|marshal|shelve|dill|eval|exec|compile)(\..*)?")


def test_nothing_that_is_read_can_run() -> None:
    """No pickle, marshal, shelve, eval or exec: data is data. PySyncObj pickles what it sends by itself."""
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        names |= {
            n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        wrong = {
            n for n in names if re.fullmatch(r"(c?pickle|marshal|shelve|dill|eval|exec|compile)(\..*)?", n)
        }
        assert not wrong, f"{file}: {wrong}"
