"""A SIGBUS in what the helper reads or stores is EIO; anywhere else it is what it was without the helper."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

# A mapping of 64 KiB whose file was cut behind it: every access to it is a SIGBUS.
PRELUDE = """
import errno, faulthandler, os, signal, sys, threading
from mmapwal._native import ffi, lib

BYTES = 65536
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)

def mapping():
    os.ftruncate(fd, BYTES)
    address = ffi.new("void **")
    assert lib.mw_map(fd, BYTES, 1, address) == 0
    os.ftruncate(fd, 0)
    return ffi.cast("uint8_t *", address[0])

lost = mapping()
good = ffi.new("uint8_t[]", b"g" * BYTES)

def copy(source=lost, length=BYTES):
    return lib.mw_copy_guarded(ffi.new("uint8_t[]", BYTES), source, length)
"""

FAULTHANDLER = {
    "never": ("", ""),
    "enabled before the guard": ("faulthandler.enable()", ""),
    "enabled after the guard": ("", "faulthandler.enable()"),
    "enabled before and again after": (
        "faulthandler.enable()",
        "faulthandler.disable(); faulthandler.enable()",
    ),
    "disabled after the guard": ("faulthandler.enable()", "faulthandler.disable()"),
}


@pytest.fixture
def run(run_python: Run, tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    return lambda script: run_python(PRELUDE + script, tmp_path / "file")


@pytest.fixture(params=FAULTHANDLER)
def armed(request: pytest.FixtureRequest) -> str:
    """Lines that arm the guard, with faulthandler switched on and off around it."""
    before, after = FAULTHANDLER[request.param]
    return f"{before}\nassert copy() == -errno.EIO\n{after}\n"


def test_a_lost_page_is_eio_in_the_main_thread_again_and_again(run: Run, armed: str) -> None:
    done = run(
        armed
        + """
for _ in range(100):
    assert copy() == -errno.EIO
    assert copy(good) == 0
"""
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_lost_page_is_eio_in_every_thread_while_good_reads_go_on_beside(run: Run, armed: str) -> None:
    done = run(
        armed
        + """
wrong = []
start = threading.Barrier(8)

def work(number):
    start.wait()
    for i in range(200):
        bad = (i + number) % 2
        if copy(lost if bad else good) != (-errno.EIO if bad else 0):
            wrong.append((number, i))

threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert wrong == []
"""
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("thread", ["the main thread", "another thread"])
def test_a_sigbus_outside_the_guard_kills_and_faulthandler_tells_where(
    run: Run, armed: str, thread: str
) -> None:
    done = run(
        armed
        + """
print("alive", faulthandler.is_enabled(), flush=True)
def touch():
    ffi.buffer(lost, BYTES)[0]
"""
        + (
            "touch()"
            if thread == "the main thread"
            else "t = threading.Thread(target=touch); t.start(); t.join()"
        )
    )
    assert done.returncode == -signal.SIGBUS
    assert done.stdout.startswith("alive")
    if "True" in done.stdout:
        assert done.stderr.count("Fatal Python error: Bus error") == 1
        assert "in touch" in done.stderr
    else:
        assert done.stderr == ""


def test_the_guard_holds_where_the_program_sets_a_handler_of_its_own(run: Run) -> None:
    done = run("""
def h(signo, frame): seen.append(signo)
seen = []
signal.signal(signal.SIGBUS, h)
assert copy() == -errno.EIO
assert seen == []
""")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("order", ["before the guard", "after the guard", "after it, and armed again"])
def test_a_sigbus_sent_by_kill_reaches_the_handler_that_the_program_set(run: Run, order: str) -> None:
    setting = "signal.signal(signal.SIGBUS, lambda signo, frame: seen.append(signo))\n"
    arming = "assert copy() == -errno.EIO\n"
    steps = {
        "before the guard": setting + arming,
        "after the guard": arming + setting,
        "after it, and armed again": arming + setting + arming,
    }
    done = run(
        "seen = []\n"
        + steps[order]
        + """
for n in range(1, 4):
    os.kill(os.getpid(), signal.SIGBUS)
    assert seen == [signal.SIGBUS] * n
"""
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("disposition", ["SIG_DFL", "SIG_IGN"])
def test_a_sigbus_sent_by_kill_keeps_the_disposition_that_the_program_set(run: Run, disposition: str) -> None:
    done = run(f"""
signal.signal(signal.SIGBUS, signal.{disposition})
assert copy() == -errno.EIO
os.kill(os.getpid(), signal.SIGBUS)
print("alive")
""")
    assert done.returncode == (0 if disposition == "SIG_IGN" else -signal.SIGBUS)
    assert done.stderr == ""


def test_a_fault_outside_the_guard_kills_also_where_the_signal_was_ignored(run: Run) -> None:
    done = run("""
signal.signal(signal.SIGBUS, signal.SIG_IGN)
assert copy() == -errno.EIO
ffi.buffer(lost, BYTES)[0]
""")
    assert done.returncode == -signal.SIGBUS


def test_a_forked_child_is_guarded_too(run: Run) -> None:
    done = run("""
assert copy() == -errno.EIO
child = os.fork()
if child == 0:
    os._exit(0 if copy() == -errno.EIO and copy(good) == 0 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""")
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_follower_takes_is_guarded_also_when_the_handler_was_replaced_while_it_slept(run: Run) -> None:
    done = run("""
page = ffi.new("struct mw_index_header *", {"wake": 1, "superblock_sequence": 7})
page.progress[1].written_lsn = page.progress[1].durable_lsn = 2**40
page.progress[1].sequence = 1
page.progress[1].check = lib.mw_crc32c(0, ffi.addressof(page.progress[1]), 28)
walk = ffi.new("struct mw_walk *", {"frames": lost, "base_lsn": 4096, "capacity": BYTES, "lsn": 4096,
                                    "limit_lsn": 2**63})
following = ffi.new("struct mw_next *", {"walk": walk, "max": 8, "superblock_sequence": 7})
ended = []
wait = lambda: ended.append(lib.mw_follow_wait(page, 1, 10**11, 0, 1, following))
thread = threading.Thread(target=wait)
thread.start()
while page.waiting == 0: pass
faulthandler.enable()
while thread.is_alive():
    lib.mw_follow_stir(page)
    thread.join(0.01)
assert (ended, following.count) == ([0], 0)
""")
    assert (done.returncode, done.stderr) == (0, "")


TOUCHES = {
    "mw_copy_guarded": "lib.mw_copy_guarded(good, lost, 10)",
    "mw_copy_guarded, storing": "lib.mw_copy_guarded(lost, good, 10)",
    "mw_crc32c_guarded": "lib.mw_crc32c_guarded(0, lost, 10, ffi.new('uint32_t *'))",
    "mw_scan": "lib.mw_scan(scan)",
    "mw_hunt": "lib.mw_hunt(scan)",
    "mw_plan": "lib.mw_plan(lost, 4096, 8192, 0, slots, 8, lsn, ffi.new('uint32_t *'),"
    " ffi.new('struct mw_run[8]'), 8)",
    "mw_slots_clear": "lib.mw_slots_clear(lost_slots, 8)",
    "mw_slots_summary": "lib.mw_slots_summary(lost_slots, 8, ffi.new('struct mw_summary *'))",
    "mw_slots_copy": "lib.mw_slots_copy(slots, lost_slots, 8)",
    "mw_lookup": "lib.mw_lookup(lost_slots, 8, 1, ffi.new('struct mw_slot *'))",
    "mw_progress_read": "lib.mw_progress_read(ffi.cast('struct mw_index_header *', lost),"
    " ffi.new('struct mw_progress *'))",
    "mw_check_frame": "lib.mw_check_frame(lost, 4096, BYTES, 0, 4096, 1, ffi.new('struct mw_frame *'),"
    " ffi.NULL, 0)",
    "mw_file_write": "lib.mw_file_write(file, 0, b'x', 1)",
    "mw_file_write_sync": "lib.mw_file_write_sync(file, 0, b'x', 1)",
    "mw_gather, slots": "lib.mw_gather(lost_slots, 8, table, cursor, ffi.NULL, 0, ffi.NULL, columns, 8, 0)",
    "mw_gather, frames": "lib.mw_gather(slots, 8, table, cursor, ffi.NULL, 0, ffi.NULL, columns, 8, 0)",
}


@pytest.mark.parametrize("call", TOUCHES.values(), ids=TOUCHES.keys())
def test_everything_the_helper_reads_or_stores_in_a_mapping_is_guarded(run: Run, call: str) -> None:
    done = run(f"""
slots = ffi.new("struct mw_slot[8]")
slots[1] = {{"lsn": 4096, "op": 1, "length": 1}}
lost_slots = ffi.cast("struct mw_slot *", lost)
lsn = ffi.new("uint64_t *", 4096)
scan = ffi.new("struct mw_scan *", {{"frames": lost, "base_lsn": 4096, "capacity": BYTES, "epoch": 1,
                                    "limit_lsn": 2**63, "lsn": 4096, "batch_lsn": 4096}})
file = ffi.new("struct mw_file *", {{"fd": fd, "method": lib.MW_MSYNC, "map": lost, "bytes": BYTES}})
refs = ffi.new("struct mw_segment_ref[1]", [{{"base_lsn": 4096, "capacity": BYTES, "frames": lost}}])
table = ffi.new("struct mw_table *", {{"refs": refs, "count": 1}})
cursor = ffi.new("struct mw_cursor *", {{"op": 1, "last_op": 8}})
rows = {{n: ffi.new(t) for n, t in [("op", "uint64_t[8]"), ("start", "uint64_t[8]"), ("end", "uint64_t[8]"),
        ("lsn", "uint64_t[8]"), ("timestamp_ns", "int64_t[8]"), ("segment", "uint32_t[8]"),
        ("checksum", "uint32_t[8]"), ("kind", "uint16_t[8]")]}}
columns = ffi.new("struct mw_columns *", rows)
for _ in range(3):
    result = {call}
    assert result == -errno.EIO, result
""")
    assert (done.returncode, done.stderr) == (0, "")
