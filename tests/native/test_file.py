"""Writes are whole or an errno, an interruption is no failure, a failed sync is never tried again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Script = Callable[[str], None]


@pytest.mark.parametrize(
    ("method", "function", "call"),
    [
        ("MW_FDATASYNC", "mw_file_write", "pwrite"),
        ("MW_FDATASYNC", "mw_file_write_sync", "pwrite"),
        ("MW_DSYNC", "mw_file_write_sync", "pwritev2"),
    ],
)
class TestWrite:
    def test_short_and_interrupted_writes_are_continued_until_all_is_written(
        self, run_shimmed: Script, method: str, function: str, call: str
    ) -> None:
        run_shimmed(f"""
file.method = lib.{method}
data = bytes(range(251)) * 16
plan("{call}", errno.EINTR, SHORT, errno.EINTR, errno.EINTR, SHORT, SHORT)
assert lib.{function}(file, 100, data, len(data)) == 0
assert calls("{call}") == 7, calls("{call}")
assert content(0, 100 + len(data) + 8) == bytes(100) + data + bytes(8)
""")

    def test_a_failed_write_is_the_errno_it_was_and_is_not_repeated(
        self, run_shimmed: Script, method: str, function: str, call: str
    ) -> None:
        run_shimmed(f"""
file.method = lib.{method}
plan("fdatasync")
for error in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
    for before in ([], [SHORT], [errno.EINTR, SHORT]):
        plan("{call}", *before, error)
        assert lib.{function}(file, 0, b"x" * 100, 100) == -error
        assert calls("{call}") == len(before) + 1
assert calls("fdatasync") == 0
""")

    def test_a_write_that_does_nothing_is_no_space_and_not_a_loop(
        self, run_shimmed: Script, method: str, function: str, call: str
    ) -> None:
        run_shimmed(f"""
file.method = lib.{method}
plan("{call}", SHORT, NOTHING)
assert lib.{function}(file, 0, b"x" * 100, 100) == -errno.ENOSPC
assert calls("{call}") == 2
""")


def test_dsync_writes_and_syncs_in_one_call(run_shimmed: Script) -> None:
    run_shimmed("""
file.method = lib.MW_DSYNC
plan("pwritev2"); plan("pwrite"); plan("fdatasync"); plan("fsync")
assert lib.mw_file_write_sync(file, 0, b"abc", 3) == 0
assert flags() == 0x2
assert [calls(c) for c in ("pwritev2", "pwrite", "fdatasync", "fsync")] == [1, 0, 0, 0]
""")


@pytest.mark.parametrize("refusal", ["EOPNOTSUPP", "ENOSYS", "EINVAL"])
def test_where_the_kernel_refuses_rwf_dsync_the_bytes_are_written_then_synced(
    run_shimmed: Script, refusal: str
) -> None:
    run_shimmed(f"""
file.method = lib.MW_DSYNC
plan("pwritev2", errno.{refusal}); plan("pwrite", SHORT); plan("fdatasync", errno.EINTR)
assert lib.mw_file_write_sync(file, 7, b"payload", 7) == 0
assert [calls(c) for c in ("pwritev2", "pwrite", "fdatasync")] == [1, 2, 2]
assert content(7, 7) == b"payload"
""")


def test_the_fallback_of_a_refused_rwf_dsync_reports_a_failed_sync(run_shimmed: Script) -> None:
    run_shimmed("""
file.method = lib.MW_DSYNC
plan("pwritev2", errno.EOPNOTSUPP); plan("fdatasync", errno.EIO)
assert lib.mw_file_write_sync(file, 0, b"payload", 7) == -errno.EIO
assert calls("fdatasync") == 1
""")


@pytest.mark.parametrize("refusal", ["EOPNOTSUPP", "ENOSYS"])
def test_a_refused_rwf_dsync_is_found_out_without_writing(run_shimmed: Script, refusal: str) -> None:
    run_shimmed(f"""
before = content(0, 8192)
assert lib.mw_has_rwf_dsync(fd) == 1
plan("pwritev2", errno.{refusal})
assert lib.mw_has_rwf_dsync(fd) == 0
assert content(0, 9000) == before
""")


def test_mapped_storage_writes_through_an_o_dsync_descriptor_where_rwf_dsync_is_refused(
    run_shimmed: Script,
) -> None:
    run_shimmed("""
import fcntl
from pathlib import Path
from mmapwal.storage import SyncMethod, SystemDirectory

directory = SystemDirectory(Path(sys.argv[1]).parent)
plan("pwritev2", *[errno.EOPNOTSUPP] * 8)
storage = directory.open("file", writable=True, sync_method=SyncMethod.DSYNC)
assert storage._file.dsync_fd >= 0
assert fcntl.fcntl(storage._file.dsync_fd, fcntl.F_GETFL) & os.O_DSYNC == os.O_DSYNC
plan("pwritev2"); plan("pwrite"); plan("fdatasync")
assert storage.write_sync_at(40, b"payload") == 7
assert [calls(c) for c in ("pwritev2", "pwrite", "fdatasync")] == [0, 1, 0]
assert content(40, 7) == b"payload" and storage.view()[40:47] == b"payload"
storage.close()
directory.close()
""")


@pytest.mark.parametrize(
    ("function", "call"),
    [("mw_fd_sync", "fsync"), ("mw_fd_datasync", "fdatasync"), ("mw_file_sync", "fdatasync")],
)
class TestSync:
    def test_an_interrupted_sync_is_called_again(self, run_shimmed: Script, function: str, call: str) -> None:
        argument = "file" if function == "mw_file_sync" else "fd"
        run_shimmed(f"""
plan("{call}", errno.EINTR, errno.EINTR)
assert lib.{function}({argument}) == 0
assert calls("{call}") == 3
""")

    @pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EDQUOT"])
    def test_a_failed_sync_is_told_and_not_called_again(
        self, run_shimmed: Script, function: str, call: str, error: str
    ) -> None:
        argument = "file" if function == "mw_file_sync" else "fd"
        run_shimmed(f"""
plan("{call}", errno.{error})
assert lib.{function}({argument}) == -errno.{error}
assert calls("{call}") == 1
""")


MAPPED = """
address = ffi.new("void **")
assert lib.mw_map(fd, 8192, 1, address) == 0
file.method, file.map, file.bytes = lib.MW_MSYNC, address[0], 8192
plan("pwrite"); plan("pwritev2"); plan("fdatasync"); plan("msync")
"""


class TestMsync:
    def test_bytes_are_stored_and_their_pages_synced(self, run_shimmed: Script) -> None:
        run_shimmed(f"""{MAPPED}
assert lib.mw_file_write_sync(file, 4090, b"0123456789", 10) == 0
assert synced_bytes() == 4100
assert [calls(c) for c in ("msync", "pwrite", "pwritev2", "fdatasync")] == [1, 0, 0, 0]
assert content(4090, 10) == b"0123456789"
""")

    def test_a_failed_msync_is_told_and_not_called_again(self, run_shimmed: Script) -> None:
        run_shimmed(f"""{MAPPED}
plan("msync", errno.EINTR, errno.EIO)
assert lib.mw_file_write_sync(file, 0, b"x", 1) == -errno.EIO
assert calls("msync") == 2
""")

    def test_a_store_waits_for_the_next_sync_which_covers_the_whole_mapping(
        self, run_shimmed: Script
    ) -> None:
        run_shimmed(f"""{MAPPED}
assert lib.mw_file_write(file, 5000, b"x", 1) == 0
assert file.unsynced == 1 and calls("msync") == 0
assert lib.mw_file_sync(file) == 0
assert file.unsynced == 0 and calls("msync") == 1 and calls("fdatasync") == 1
assert synced_bytes() == 8192
""")

    def test_a_sync_that_failed_leaves_the_store_owed(self, run_shimmed: Script) -> None:
        run_shimmed(f"""{MAPPED}
assert lib.mw_file_write(file, 0, b"x", 1) == 0
plan("msync", errno.EIO)
assert lib.mw_file_sync(file) == -errno.EIO
assert file.unsynced == 1 and calls("fdatasync") == 0
""")

    @pytest.mark.parametrize(("offset", "length"), [(8192, 1), (8191, 2), (2**63, 1), (0, 8193)])
    def test_a_store_past_the_mapping_is_refused(self, run_shimmed: Script, offset: int, length: int) -> None:
        run_shimmed(f"""{MAPPED}
data = bytes({length})
assert lib.mw_file_write(file, {offset}, data, {length}) == -errno.EFBIG
assert lib.mw_file_write_sync(file, {offset}, data, {length}) == -errno.EFBIG
assert calls("msync") == 0
""")


def test_reads_go_on_after_interruptions_and_end_where_the_file_ends(run_shimmed: Script) -> None:
    run_shimmed("""
os.pwrite(fd, b"abcdefgh", 8184)
data = bytearray(100)
plan("pread", errno.EINTR, SHORT, errno.EINTR)
assert lib.mw_file_read(file, 8184, ffi.from_buffer(data), 100) == 8
assert data == b"abcdefgh" + bytes(92)
plan("pread", SHORT, errno.EIO)
assert lib.mw_file_read(file, 0, ffi.from_buffer(data), 100) == -errno.EIO
""")


def test_zeroing_writes_all_of_a_long_range_in_spite_of_short_writes(run_shimmed: Script) -> None:
    run_shimmed("""
os.ftruncate(fd, 0)
os.pwrite(fd, b"x" * 1_000_000, 0)
plan("pwrite", SHORT, errno.EINTR, SHORT)
assert lib.mw_file_zero(file, 5, 900_001) == 0
assert content(0, 1_000_000) == b"x" * 5 + bytes(900_001) + b"x" * (1_000_000 - 900_006)
plan("pwrite", SHORT, errno.ENOSPC)
assert lib.mw_file_zero(file, 0, 900_000) == -errno.ENOSPC
""")


@pytest.mark.parametrize(
    ("method", "function"),
    [
        ("MW_FDATASYNC", "mw_file_write"),
        ("MW_FDATASYNC", "mw_file_write_sync"),
        ("MW_DSYNC", "mw_file_write_sync"),
    ],
)
def test_a_real_file_size_limit_is_efbig_after_what_fitted(
    run_shimmed: Script, method: str, function: str
) -> None:
    run_shimmed(f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
file.method = lib.{method}
assert lib.{function}(file, 8192, b"x" * 4096, 4096) == -errno.EFBIG
assert os.fstat(fd).st_size == 10_000
assert lib.{function}(file, 0, b"y" * 8192, 8192) == 0
assert lib.{function}(file, 10_000, b"x", 1) == -errno.EFBIG
""")


def test_opening_closes_on_exec_and_does_not_follow_a_link(run_shimmed: Script) -> None:
    run_shimmed("""
import fcntl
os.symlink(sys.argv[1], sys.argv[1] + ".link")
assert lib.mw_open(-100, (sys.argv[1] + ".link").encode(), os.O_RDWR, 0) == -errno.ELOOP
assert lib.mw_open(-100, (sys.argv[1] + ".none").encode(), os.O_RDWR, 0) == -errno.ENOENT
other = lib.mw_open(-100, sys.argv[1].encode(), os.O_RDWR, 0)
assert fcntl.fcntl(other, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
os.close(other)
""")


def test_a_closed_descriptor_is_ebadf_everywhere(run_shimmed: Script) -> None:
    run_shimmed("""
os.close(fd)
out = bytearray(8)
assert lib.mw_file_write(file, 0, b"x", 1) == -errno.EBADF
assert lib.mw_file_write_sync(file, 0, b"x", 1) == -errno.EBADF
assert lib.mw_file_sync(file) == -errno.EBADF
assert lib.mw_fd_sync(fd) == -errno.EBADF
assert lib.mw_file_read(file, 0, ffi.from_buffer(out), 8) == -errno.EBADF
assert lib.mw_fs_type(fd) == -errno.EBADF
assert lib.mw_map(fd, 4096, 0, ffi.new("void **")) == -errno.EBADF
""")


def test_starting_writeback_writes_nothing_and_tells_a_bad_descriptor(run_shimmed: Script) -> None:
    run_shimmed("""
before = content(0, 8192)
assert lib.mw_fd_start_writeback(fd, 0, 4096) == 0
assert content(0, 9000) == before
os.close(fd)
assert lib.mw_fd_start_writeback(fd, 0, 4096) == -errno.EBADF
""")
