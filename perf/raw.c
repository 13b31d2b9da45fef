/* What the journal is held against: loops that do nothing but the work itself, wholly in C. One call
 * does a round and times every step of it, so that no interpreter is between two writes.
 * Compiled and loaded by raw.py; the layout of the two structs is repeated there. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef RWF_DSYNC
#define RWF_DSYNC 0x00000002
#endif

enum raw_method {
    RAW_FDATASYNC = 1, /* pwrite, then fdatasync */
    RAW_RWF_DSYNC = 2, /* pwritev2 with RWF_DSYNC */
    RAW_O_DSYNC = 3,   /* pwrite on a descriptor that was opened with O_DSYNC */
    RAW_MSYNC = 4,     /* memcpy into a shared mapping, then msync of the pages it touched */
    RAW_WRITE = 5      /* pwrite alone: what is durable in none of it, for comparison */
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- one thread ---- */

struct raw_loop {
    const void *data;
    void *map;              /* RAW_MSYNC; the whole file */
    uint64_t *ns;           /* out: one for each sync */
    uint64_t bytes;         /* of a record */
    uint64_t batch;         /* records in one sync */
    uint64_t count;         /* syncs */
    uint64_t offset;        /* in and out: where the next record goes */
    uint64_t limit;         /* back to the start here; 0: the file grows */
    uint64_t elapsed_ns;    /* out: of the whole loop */
    int32_t fd;
    int32_t method;
    int32_t separate;       /* a pwrite for each record, instead of one for the batch */
    int32_t reserved;
};

static int put(int fd, const char *data, uint64_t bytes, uint64_t offset, int flags) {
    struct iovec io = {(void *)(uintptr_t)data, bytes};
    ssize_t done = flags != 0 ? pwritev2(fd, &io, 1, (off_t)offset, flags)
                              : pwrite(fd, data, bytes, (off_t)offset);
    if (done < 0) return -errno;
    return (uint64_t)done == bytes ? 0 : -EIO;
}

static int store(const struct raw_loop *l, uint64_t bytes) {
    static const uint64_t page = 4096;
    char *at = (char *)l->map + l->offset;
    uint64_t from = l->offset / page * page;
    memcpy(at, l->data, bytes);
    return msync((char *)l->map + from, l->offset + bytes - from, MS_SYNC) != 0 ? -errno : 0;
}

static int step(const struct raw_loop *l, uint64_t bytes) {
    if (l->method == RAW_MSYNC) return store(l, bytes);
    int flags = l->method == RAW_RWF_DSYNC ? RWF_DSYNC : 0;
    uint64_t piece = l->separate ? l->bytes : bytes;
    for (uint64_t at = 0; at < bytes; at += piece) {
        int rc = put(l->fd, (const char *)l->data + at, piece, l->offset + at, flags);
        if (rc != 0) return rc;
    }
    if (l->method == RAW_FDATASYNC) return fdatasync(l->fd) != 0 ? -errno : 0;
    return 0;
}

/* 0, or a negative errno. */
int raw_run(struct raw_loop *l) {
    uint64_t bytes = l->bytes * l->batch, start = now_ns();
    for (uint64_t i = 0; i < l->count; i++) {
        if (l->limit != 0 && l->offset + bytes > l->limit) l->offset = 0;
        uint64_t before = now_ns();
        int rc = step(l, bytes);
        if (rc != 0) return rc;
        l->ns[i] = now_ns() - before;
        l->offset += bytes;
    }
    l->elapsed_ns = now_ns() - start;
    return 0;
}

/* ---- many threads, one entry each at a time: a plain leader and its followers ---- */

struct raw_group {
    const void *data;
    uint64_t *ns;           /* out: threads * count */
    uint64_t bytes;         /* of a record */
    uint64_t count;         /* records of each thread */
    uint64_t offset;        /* in and out */
    uint64_t limit;         /* back to the start here */
    uint64_t elapsed_ns;    /* out: from the first start to the last end */
    uint64_t commits;       /* out */
    int32_t fd;
    int32_t threads;
};

struct shared {
    struct raw_group *g;
    pthread_mutex_t mutex;
    pthread_cond_t changed[2]; /* of the group with this parity */
    pthread_barrier_t start;
    char *buffer[2];
    uint64_t staged[2];        /* bytes */
    uint64_t waiting[2];
    uint64_t open, done;       /* numbers of groups */
    int leading, error;
};

struct worker {
    struct shared *s;
    uint64_t *ns;
    uint64_t from, to;
};

static void lead(struct shared *s) {
    struct raw_group *g = s->g;
    uint64_t mine = s->open++, bytes = s->staged[mine % 2];
    s->leading = 1;
    if (g->offset + bytes > g->limit) g->offset = 0;
    uint64_t offset = g->offset;
    g->offset += bytes;
    pthread_mutex_unlock(&s->mutex);
    int rc = put(g->fd, s->buffer[mine % 2], bytes, offset, RWF_DSYNC);
    pthread_mutex_lock(&s->mutex);
    if (rc != 0) s->error = rc;
    s->staged[mine % 2] = 0;
    s->done = mine + 1;
    s->leading = 0;
    g->commits++;
    pthread_cond_broadcast(&s->changed[mine % 2]);
    if (s->waiting[(mine + 1) % 2] != 0) pthread_cond_signal(&s->changed[(mine + 1) % 2]);
}

static void append(struct shared *s) {
    struct raw_group *g = s->g;
    pthread_mutex_lock(&s->mutex);
    uint64_t mine = s->open, half = mine % 2;
    memcpy(s->buffer[half] + s->staged[half], g->data, g->bytes);
    s->staged[half] += g->bytes;
    s->waiting[half]++;
    while (s->done <= mine) {
        if (s->leading) pthread_cond_wait(&s->changed[half], &s->mutex);
        else lead(s);
    }
    s->waiting[half]--;
    pthread_mutex_unlock(&s->mutex);
}

static void *work(void *arg) {
    struct worker *w = arg;
    pthread_barrier_wait(&w->s->start);
    w->from = now_ns();
    for (uint64_t i = 0; i < w->s->g->count; i++) {
        uint64_t before = now_ns();
        append(w->s);
        w->ns[i] = now_ns() - before;
    }
    w->to = now_ns();
    return NULL;
}

/* For as many threads of the caller's as the group says; NULL without memory. */
struct shared *raw_group_open(struct raw_group *g) {
    struct shared *s = calloc(1, sizeof *s);
    if (s == NULL) return NULL;
    s->g = g;
    for (int i = 0; i < 2; i++) s->buffer[i] = malloc(g->bytes * (uint64_t)g->threads);
    pthread_mutex_init(&s->mutex, NULL);
    for (int i = 0; i < 2; i++) pthread_cond_init(&s->changed[i], NULL);
    pthread_barrier_init(&s->start, NULL, (unsigned)g->threads);
    return s;
}

/* 0, or a negative errno. */
int raw_group_append(struct shared *s) {
    append(s);
    return s->error;
}

void raw_group_close(struct shared *s) {
    for (int i = 0; i < 2; i++) free(s->buffer[i]);
    free(s);
}

/* 0, or a negative errno. */
int raw_group_run(struct raw_group *g) {
    struct shared *s = raw_group_open(g);
    struct worker *workers = calloc((size_t)g->threads, sizeof *workers);
    pthread_t *ids = calloc((size_t)g->threads, sizeof *ids);
    if (s == NULL || workers == NULL || ids == NULL || s->buffer[0] == NULL || s->buffer[1] == NULL) return -ENOMEM;
    for (int i = 0; i < g->threads; i++) {
        workers[i] = (struct worker){.s = s, .ns = g->ns + (uint64_t)i * g->count};
        if (pthread_create(&ids[i], NULL, work, &workers[i]) != 0) abort();
    }
    uint64_t from = UINT64_MAX, to = 0;
    for (int i = 0; i < g->threads; i++) {
        pthread_join(ids[i], NULL);
        if (workers[i].from < from) from = workers[i].from;
        if (workers[i].to > to) to = workers[i].to;
    }
    g->elapsed_ns = to - from;
    int error = s->error;
    raw_group_close(s);
    free(workers);
    free(ids);
    return error;
}

/* ---- memory ---- */

/* Nanoseconds to load every byte once; *sum keeps the compiler from leaving it out. */
uint64_t raw_read_ns(const void *data, uint64_t bytes, uint64_t *sum) {
    const uint64_t *from = data, *to = from + bytes / 8;
    uint64_t start = now_ns(), total = 0;
    for (; from < to; from++) total += *from;
    *sum = total;
    return now_ns() - start;
}
