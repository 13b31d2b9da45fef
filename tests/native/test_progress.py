"""More is published between any two loads of who looks at the progress (progress.c says what is checked)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_progress_that_is_read_is_whole_and_never_goes_back_however_much_is_published(
    tmp_path: Path, require: Callable[[object, str], None]
) -> None:
    require(shutil.which("gcc"), "no gcc to build the program with")
    program = tmp_path / "progress"
    helper = [path for path in sorted((ROOT / "native").glob("*.c")) if path.name != "slots.c"]
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'native'}", "-pthread"]
    subprocess.run([*command, "-o", program, Path(__file__).with_name("progress.c"), *helper], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout.split()[0]) > 10_000
