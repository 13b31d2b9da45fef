/* LD_PRELOAD: makes chosen system calls fail, come up short, or be interrupted. A test loads this with
 * ctypes and hands over a plan for each call; what the plan does not name goes through. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum call { PWRITE, PWRITEV2, FDATASYNC, FSYNC, MSYNC, PREAD, CALLS };
enum { STEPS = 32 };
enum { THROUGH = 0, SHORT = -1, NOTHING = -2 }; /* what is above 0 is the errno to fail with */

static const char *const names[CALLS] = {"pwrite", "pwritev2", "fdatasync", "fsync", "msync", "pread"};
static int plan[CALLS][STEPS];
static int planned[CALLS], begun[CALLS], flags_seen;
static size_t synced_bytes;

static int index_of(const char *name) {
    for (int i = 0; i < CALLS; i++)
        if (strcmp(names[i], name) == 0) return i;
    return -1;
}

int shim_plan(const char *name, const int *steps, int count) {
    int call = index_of(name);
    if (call < 0 || count > STEPS) return -1;
    memcpy(plan[call], steps, (size_t)count * sizeof *steps);
    planned[call] = count;
    begun[call] = 0;
    return 0;
}

int shim_count(const char *name) { return begun[index_of(name)]; }

int shim_flags(void) { return flags_seen; } /* of the last pwritev2 */

size_t shim_synced_bytes(void) { return synced_bytes; } /* by the last msync */

static int step(enum call call) {
    int at = begun[call]++;
    return at < planned[call] ? plan[call][at] : THROUGH;
}

static int failed(int action) {
    if (action <= 0) return 0;
    errno = action;
    return 1;
}

ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset) {
    ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite");
    int action = step(PWRITE);
    if (failed(action)) return -1;
    if (action == NOTHING) return 0;
    return real(fd, data, action == SHORT ? (bytes + 1) / 2 : bytes, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t bytes, off_t offset) {
    return pwrite(fd, data, bytes, offset);
}

ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags) {
    ssize_t (*real)(int, const struct iovec *, int, off_t, int) = dlsym(RTLD_NEXT, "pwritev2");
    int action = step(PWRITEV2);
    flags_seen = flags;
    if (failed(action)) return -1;
    if (action == NOTHING) return 0;
    struct iovec first = iov[0];
    if (action == SHORT) first.iov_len = (first.iov_len + 1) / 2;
    return real(fd, &first, count, offset, flags);
}

ssize_t pwritev64v2(int fd, const struct iovec *iov, int count, off_t offset, int flags) {
    return pwritev2(fd, iov, count, offset, flags);
}

int fdatasync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fdatasync");
    return failed(step(FDATASYNC)) ? -1 : real(fd);
}

int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    return failed(step(FSYNC)) ? -1 : real(fd);
}

int msync(void *address, size_t bytes, int flags) {
    int (*real)(void *, size_t, int) = dlsym(RTLD_NEXT, "msync");
    synced_bytes = bytes;
    return failed(step(MSYNC)) ? -1 : real(address, bytes, flags);
}

ssize_t pread(int fd, void *data, size_t bytes, off_t offset) {
    ssize_t (*real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
    int action = step(PREAD);
    if (failed(action)) return -1;
    if (action == NOTHING) return 0;
    return real(fd, data, action == SHORT ? (bytes + 1) / 2 : bytes, offset);
}

ssize_t pread64(int fd, void *data, size_t bytes, off_t offset) { return pread(fd, data, bytes, offset); }
