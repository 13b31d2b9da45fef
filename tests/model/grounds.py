"""Where the journal of a state machine lives, and how its process and its machine can die."""

from __future__ import annotations

import contextlib
import copy
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Protocol

from hypothesis import strategies as st

from mmapwal import Directory, MemoryDirectory, SystemDirectory
from mmapwal import format as fmt
from mmapwal.testing import CrashDisk

STATES = 40  # of a power cut, to pick one from
SAMPLED = 12


class Ground(Protocol):
    """Files that outlive processes."""

    fails: bool
    """Whether calls can be made to fail here: they go through a wrapper then."""
    has_power: bool
    """That can be cut."""

    def directory(self) -> Directory:
        """For one process, which has nothing else of these files."""

    def effects(self) -> int:
        """How many things were done to the files so far."""

    def kill(self) -> None:
        """The process dies at this instant."""

    def cut(self, data: st.DataObject, after: int) -> str:
        """The power went after so many effects: what was lost. Where there is power."""

    def close(self) -> None: ...


class MemoryGround:
    fails, has_power = True, False

    def __init__(self) -> None:
        self._directory = MemoryDirectory()

    def directory(self) -> Directory:
        return self._directory

    def effects(self) -> int:
        return 0

    def kill(self) -> None:
        self._directory = copy.deepcopy(self._directory)
        self._directory.close()  # the lock

    def cut(self, data: st.DataObject, after: int) -> str:
        raise NotImplementedError

    def close(self) -> None: ...


class MappedGround:
    """Real files, mapped. Without `concurrent` no thread works beside: the same is done each time."""

    fails, has_power = False, False

    def __init__(self, *, concurrent: bool = False) -> None:
        self._concurrent = concurrent
        self._root = Path(tempfile.mkdtemp(prefix="mmapwal-model-"))
        self._lives = 0

    @property
    def _path(self) -> Path:
        return self._root / str(self._lives)

    def directory(self) -> Directory:
        directory = SystemDirectory(self._path)
        directory.concurrent = self._concurrent
        return directory

    def effects(self) -> int:
        return 0

    def kill(self) -> None:
        """The dead one keeps what it had open; whoever comes next has a copy. What is made ahead or removed
        beside may be in it or not, but all that its superblock names is."""
        dead = self._path
        superblock = dead / fmt.SUPERBLOCK_NAME
        while True:
            before = _bytes_of(superblock)
            self._lives += 1
            shutil.copytree(dead, self._path, copy_function=_copy_if_there)
            if _bytes_of(superblock) == before == _bytes_of(self._path / fmt.SUPERBLOCK_NAME):
                return

    def cut(self, data: st.DataObject, after: int) -> str:
        raise NotImplementedError

    def close(self) -> None:
        shutil.rmtree(self._root)


def _bytes_of(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def _copy_if_there(source: str, to: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(source, to)


class CrashGround:
    fails, has_power = True, True

    def __init__(self, *, damage: bool = False) -> None:
        self._disk = CrashDisk(damage=damage)

    def directory(self) -> Directory:
        return self._disk

    def effects(self) -> int:
        return self._disk.observe()

    def kill(self) -> None:
        self._disk = self._disk.kill()

    def cut(self, data: st.DataObject, after: int) -> str:
        seed = data.draw(st.integers(0, 2**16), "seed of the states")
        states = self._disk.crash_states(after, seed=seed, max_states=SAMPLED)
        some = list(itertools.islice(states, STATES))
        state = some[data.draw(st.integers(0, len(some) - 1), "state")]
        self._disk.kill()
        self._disk = state
        return "; ".join(state.lost)

    def close(self) -> None:
        self._disk.kill()
