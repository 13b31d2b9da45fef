"""A writer in another process, and what is lost with the power."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from mmapwal import format as fmt

WRITER = textwrap.dedent(
    """
    import sys
    from mmapwal import Journal

    # Commands come as lines; what they gave goes back as one.
    journal = Journal(sys.argv[1], slots=256, segment_bytes=16384, durability=sys.argv[2])
    print("open", flush=True)
    for line in sys.stdin:
        print(eval(line, {"journal": journal}), flush=True)
    journal.close()
    """
)


class Writer:
    """A journal in another process."""

    def __init__(self, path: Path, durability: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WRITER, str(path), durability],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._line() == "open"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def do(self, call: str) -> str:
        """`journal.` and so on, done there; what it gave, as text."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"journal.{call}\n")
        self._process.stdin.flush()
        return self._line()

    def append(self, count: int) -> None:
        self.do(f"append_many([b'%d' % n * 20 for n in range({count})])")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self.close()


def lose(path: Path, lsn: int, length: int = 4096) -> None:
    """What the first segment has from there on in the cache, as the power does."""
    with next(path.glob("segment-*1-00000000")).open("r+b") as f:
        f.seek(fmt.PAGE_BYTES + lsn - fmt.FIRST_LSN)
        f.write(bytes(length))
