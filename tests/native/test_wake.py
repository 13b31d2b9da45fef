"""No follower sleeps through a publication (wake.c says how it is tried)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[2] / "native"


def test_who_goes_to_sleep_at_any_instruction_of_a_publication_is_woken(
    tmp_path: Path, require: Callable[[object, str], None], tally: Callable[[str, int], None]
) -> None:
    require(shutil.which("gcc"), "no gcc to build the program with")
    program = tmp_path / "wake"
    sources = [Path(__file__).with_name("wake.c"), *sorted(NATIVE.glob("*.c"))]
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}", "-pthread"]
    subprocess.run([*command, "-Wl,--wrap=syscall", "-o", program, *sources], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tally("instructions of a publication at which a follower fell asleep", int(done.stdout))
