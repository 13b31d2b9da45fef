/* System calls on one file: whole writes, EINTR retried, every failure the errno it was.
 * A sync is never called again after it has failed: only EINTR, which did nothing, is retried. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "mmapwal.h"

#define MW_RESIDENT_LOOKS 16u

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef RWF_DSYNC
#define RWF_DSYNC 0x00000002
#endif

int mw_open(int dir_fd, const char *name, int flags, int mode) {
    int fd;
    do fd = openat(dir_fd, name, flags | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, mode); /* a pipe waits for nobody */
    while (fd < 0 && errno == EINTR);
    return fd < 0 ? -errno : fd;
}

/* btrfs: no copy on write. Only an empty file takes it; elsewhere the call is refused, which is fine. */
int mw_set_nocow(int fd) {
    int flags = 0;
    if (ioctl(fd, FS_IOC_GETFLAGS, &flags) != 0) return -errno;
    flags |= FS_NOCOW_FL;
    return ioctl(fd, FS_IOC_SETFLAGS, &flags) != 0 ? -errno : 0;
}

static int write_all(int fd, uint64_t offset, const uint8_t *data, uint64_t bytes, int flags) {
    while (bytes > 0) {
        struct iovec iov = {(void *)(uintptr_t)data, bytes};
        ssize_t n = flags != 0 ? pwritev2(fd, &iov, 1, (off_t)offset, flags)
                               : pwrite(fd, data, bytes, (off_t)offset);
        if (n < 0) {
            if (errno == EINTR) continue;
            return -errno;
        }
        if (n == 0) return -ENOSPC; /* a write of more than nothing that does nothing */
        data += n;
        offset += (uint64_t)n;
        bytes -= (uint64_t)n;
    }
    return 0;
}

struct store {
    struct mw_file *file;
    uint64_t offset;
    const void *data;
    uint64_t bytes;
};

static int store(void *arg) {
    struct store *s = arg;
    memcpy(s->file->map + s->offset, s->data, s->bytes);
    return 0;
}

static int store_mapped(struct mw_file *file, uint64_t offset, const void *data, uint64_t bytes) {
    if (offset > file->bytes || bytes > file->bytes - offset) return -EFBIG;
    struct store s = {file, offset, data, bytes};
    return mw_guarded(store, &s);
}

static int msync_range(struct mw_file *file, uint64_t offset, uint64_t bytes) {
    uint64_t from = offset & ~(uint64_t)(MW_PAGE_BYTES - 1);
    int rc;
    do rc = msync(file->map + from, offset + bytes - from, MS_SYNC);
    while (rc != 0 && errno == EINTR);
    return rc != 0 ? -errno : 0;
}

int mw_file_write(void *ctx, uint64_t offset, const void *data, uint64_t bytes) {
    struct mw_file *file = ctx;
    if (file->map == NULL) return write_all(file->fd, offset, data, bytes, 0);
    file->unsynced = 1;
    return store_mapped(file, offset, data, bytes);
}

int mw_file_write_sync(void *ctx, uint64_t offset, const void *data, uint64_t bytes) {
    struct mw_file *file = ctx;
    if (file->map != NULL) {
        int rc = store_mapped(file, offset, data, bytes);
        return rc != 0 ? rc : msync_range(file, offset, bytes);
    }
    if (file->method == MW_DSYNC) {
        if (file->dsync_fd < 0) {
            int rc = write_all(file->fd, offset, data, bytes, RWF_DSYNC);
            if (rc != -EOPNOTSUPP && rc != -ENOSYS && rc != -EINVAL) return rc;
        } else {
            return write_all(file->dsync_fd, offset, data, bytes, 0);
        }
    }
    int rc = write_all(file->fd, offset, data, bytes, 0);
    return rc != 0 ? rc : mw_fd_datasync(file->fd);
}

int mw_file_sync(void *ctx) {
    struct mw_file *file = ctx;
    if (file->map != NULL && file->unsynced) {
        int rc = msync_range(file, 0, file->bytes);
        if (rc != 0) return rc;
        file->unsynced = 0;
    }
    return mw_fd_datasync(file->fd);
}

/* Whether pwritev2 takes RWF_DSYNC here: asked by writing nothing. */
int mw_has_rwf_dsync(int fd) {
    struct iovec iov = {NULL, 0};
    return pwritev2(fd, &iov, 1, 0, RWF_DSYNC) == 0;
}

int64_t mw_file_read(struct mw_file *file, uint64_t offset, void *data, uint64_t bytes) {
    uint64_t done = 0;
    while (done < bytes) {
        ssize_t n = pread(file->fd, (uint8_t *)data + done, bytes - done, (off_t)(offset + done));
        if (n < 0) {
            if (errno == EINTR) continue;
            return -errno;
        }
        if (n == 0) break;
        done += (uint64_t)n;
    }
    return (int64_t)done;
}

int mw_file_zero(struct mw_file *file, uint64_t offset, uint64_t bytes) {
    static const uint8_t zeros[256 << 10];
    while (bytes > 0) {
        uint64_t n = bytes < sizeof zeros ? bytes : sizeof zeros;
        int rc = write_all(file->fd, offset, zeros, n, 0);
        if (rc != 0) return rc;
        offset += n;
        bytes -= n;
    }
    return 0;
}

static int close_fd(int *fd) {
    int rc = *fd >= 0 && close(*fd) != 0 && errno != EINTR ? -errno : 0; /* it is closed, whatever it says */
    *fd = -1;
    return rc;
}

/* Twice is fine. */
int mw_file_close(struct mw_file *file) {
    int rc = close_fd(&file->fd), other = close_fd(&file->dsync_fd);
    return rc != 0 ? rc : other;
}

/* Of a descriptor as cffi keeps it. What it says is no matter: Linux has closed it. */
void mw_fd_close(void *fd) { (void)close((int)(intptr_t)fd); }

int mw_fd_sync(int fd) {
    int rc;
    do rc = fsync(fd);
    while (rc != 0 && errno == EINTR);
    return rc != 0 ? -errno : 0;
}

int mw_fd_datasync(int fd) {
    int rc;
    do rc = fdatasync(fd);
    while (rc != 0 && errno == EINTR);
    return rc != 0 ? -errno : 0;
}

/* Has the kernel begin to write a range, and returns: nothing is durable by it, and it takes no note of
 * an error away from the sync that has to tell. Not SYNC_FILE_RANGE_WAIT_*: those would. */
int mw_fd_start_writeback(int fd, uint64_t offset, uint64_t bytes) {
    return sync_file_range(fd, (off_t)offset, (off_t)bytes, SYNC_FILE_RANGE_WRITE) != 0 ? -errno : 0;
}

int mw_map(int fd, uint64_t bytes, int writable, void **address) {
    int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    void *at = mmap(NULL, bytes, protection, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) return -errno;
    *address = at;
    return 0;
}

void mw_unmap(uint64_t bytes, void *address) { munmap(address, bytes); }

int mw_map_sync(void *address, uint64_t bytes) {
    int rc;
    do rc = msync(address, bytes, MS_SYNC);
    while (rc != 0 && errno == EINTR);
    return rc != 0 ? -errno : 0;
}

/* Faults a mapping in at once. Best effort: an old kernel answers EINVAL, a bad disk EFAULT, and the
 * loads that follow under the guard will tell. */
int mw_populate(void *address, uint64_t bytes, int writable) {
    return madvise(address, bytes, writable ? MADV_POPULATE_WRITE : MADV_POPULATE_READ) != 0 ? -errno : 0;
}

/* 1: of a file's mapping, all pages that were looked at are in the page cache; 0: not, or nobody knows. */
int mw_resident(void *address, uint64_t bytes) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), pages = bytes / page;
    const uint64_t looks = pages < MW_RESIDENT_LOOKS ? pages : MW_RESIDENT_LOOKS;
    for (uint64_t i = 0; i < looks; i++) {
        unsigned char in = 0;
        if (mincore((uint8_t *)address + pages * i / looks * page, page, &in) != 0 || !(in & 1)) return 0;
    }
    return 1;
}

int64_t mw_fs_type(int fd) {
    struct statfs fs;
    int rc;
    do rc = fstatfs(fd, &fs);
    while (rc != 0 && errno == EINTR);
    return rc != 0 ? -errno : (int64_t)fs.f_type;
}
