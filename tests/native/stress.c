/* Threads at the writer, without Python and with a disk in memory: appends, submissions, syncs, segments,
 * epochs and watermarks at once, while the disk fails as the mode says; beside them one who reads by op, and one
 * who follows. Checks that whoever is told a success finds it on the disk, that nothing is there of what was said
 * to have failed, that everyone is told, and that what is read is whole and durable where it is said to be.
 *
 *     stress MODE SECONDS [inline]     MODE: plain full eio poison close company
 *
 * company: appends alone, then appends that come late, then one thread alone; says how many a commit served, and how
 * often was waited for others. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "mmapwal.h"

enum { APPENDERS = 8, SLOTS = 1 << 14, TAGS = 1 << 22, CAPACITY = 1 << 16, HANG_S = 100, LATE_US = 400 };

#define CHECK(what) \
    do { \
        if (!(what)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what); \
            abort(); \
        } \
    } while (0)

static struct mw_writer *writer;
static const char *mode;
static bool is_inline;
static atomic_bool stop, alone, late;
static atomic_uint next_tag = 1, company_waits;
static atomic_uint on_disk[TAGS]; /* by op: the tag of the durable entry */
static atomic_bool failed[TAGS];  /* by tag: its owner was told that it was not appended */
static atomic_ulong counts[APPENDERS + 1], seen, woken;
static struct mw_slot slots[SLOTS];
static struct mw_index_header page;

int __real_pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *t);
int __wrap_pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *t);
int __wrap_pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *t) {
    company_waits++;
    return __real_pthread_cond_timedwait(c, m, t);
}

static bool is_mode(const char *name) { return strcmp(mode, name) == 0; }

/* --- the disk: whoever leads is alone with it, so nothing here is locked -------------------------- */

static uint8_t written[1 << 22];
static uint64_t written_bytes, io_calls;

static int disk_write(void *ctx, uint64_t offset, const void *data, uint64_t bytes) {
    (void)ctx, (void)offset;
    if (++io_calls % 97 == 0 && is_mode("full")) return -ENOSPC;
    CHECK(written_bytes + bytes <= sizeof written);
    memcpy(written + written_bytes, data, bytes);
    written_bytes += bytes;
    return 0;
}

static int disk_sync(void *ctx) {
    (void)ctx;
    struct timespec pause = {0, is_mode("company") ? 200000 : (long)(io_calls % 8) * 20000};
    if (io_calls % 4 == 0 || is_mode("company")) nanosleep(&pause, NULL);
    if (is_mode("eio") && io_calls > 2000) return -EIO;
    for (uint64_t at = 0; at < written_bytes;) {
        struct mw_frame f;
        memcpy(&f, written + at, sizeof f);
        unsigned tag;
        memcpy(&tag, written + at + MW_FRAME_BYTES, sizeof tag);
        if (f.type == MW_ENTRY) on_disk[f.op % TAGS] = tag;
        at += mw_frame_bytes(f.length);
    }
    written_bytes = 0;
    return 0;
}

static int disk_write_sync(void *ctx, uint64_t offset, const void *data, uint64_t bytes) {
    int rc = disk_write(ctx, offset, data, bytes);
    return rc != 0 ? rc : disk_sync(ctx);
}

static struct mw_io io = {disk_write, disk_write_sync, disk_sync, NULL};

/* --- what Python does for the helper ---------------------------------------------------------------- */

static pthread_mutex_t structure = PTHREAD_MUTEX_INITIALIZER;
static uint64_t segments, segment_base;
static uint32_t epoch = 1;

static bool make_way(int64_t code) {
    if (code != MW_E_NEED_SEGMENT && code != MW_E_NEED_EPOCH && code != MW_E_FULL) return false;
    pthread_mutex_lock(&structure);
    struct mw_state s;
    mw_writer_state(writer, &s);
    if (code == MW_E_NEED_SEGMENT && s.target_room == 0) {
        mw_flush(writer, UINT64_MAX);
    } else if (code == MW_E_NEED_SEGMENT && s.targets == 0) {
        struct mw_target t = {.id = ++segments, .base_lsn = segment_base, .capacity = CAPACITY, .io = &io, .salt = 7};
        segment_base += CAPACITY;
        CHECK(mw_writer_add_target(writer, &t) == 0);
    } else if (code == MW_E_NEED_EPOCH && s.epoch_owed) {
        if (mw_sync(writer, MW_SYNC_CLOSING) == 0) mw_writer_set_epoch(writer, ++epoch);
    } else if (code == MW_E_FULL && s.last_op > s.watermark) { /* else somebody else has done it */
        mw_writer_set_watermark(writer, s.last_op);
    }
    pthread_mutex_unlock(&structure);
    return true;
}

static void told(int64_t op, unsigned tag, int64_t result) {
    if (result == 0) CHECK(on_disk[(uint64_t)op % TAGS] == tag);
    else if (result == MW_E_POISONED) CHECK(!is_mode("plain") && !is_mode("full") && !is_mode("close"));
    else if (result != MW_E_CLOSED) CHECK(result == -ENOSPC && is_mode("full"));
    if (result != 0 && result != MW_E_POISONED) failed[tag] = true;
}

/* --- the threads -------------------------------------------------------------------------------------- */

static void *append(void *arg) {
    uint64_t me = (uint64_t)(uintptr_t)arg;
    char payload[200] = {0};
    while (!stop && !(alone && me != 0)) {
        unsigned tag = next_tag++;
        if (tag >= TAGS) break;
        memcpy(payload, &tag, sizeof tag);
        int64_t op;
        do op = mw_append_next(writer, payload, 8 + tag % 150, 1);
        while (op <= 0 && make_way(op));
        told(op, tag, op > 0 ? 0 : op);
        counts[me]++;
        if (late && !alone) usleep(LATE_US);
        if (op == MW_E_POISONED || op == MW_E_CLOSED) break;
    }
    return NULL;
}

struct pending { int64_t op; unsigned tag; };
static struct pending pending[1 << 16];
static uint64_t pending_from, pending_to, taken;

static void take(void) {
    struct mw_outcome out[MW_OUTCOMES];
    int count = mw_outcomes(writer, out);
    for (int i = 0; i < count; i++) {
        for (; taken < out[i].ticket; taken++) {
            CHECK(pending_from < pending_to);
            struct pending *p = &pending[pending_from++ % (1 << 16)];
            told(p->op, p->tag, out[i].result);
            counts[APPENDERS]++;
        }
    }
}

static void await_all(int fd) {
    while (pending_from < pending_to) {
        if (is_inline) {
            mw_committer_lead(writer);
        } else {
            mw_committer_kick(writer);
            struct pollfd p = {fd, POLLIN, 0};
            CHECK(poll(&p, 1, HANG_S * 1000) == 1);
            uint64_t n;
            CHECK(read(fd, &n, sizeof n) == sizeof n);
        }
        take();
    }
}

static void *loop(void *arg) {
    (void)arg;
    char payload[200] = {0};
    bool going = true;
    while (going && !stop) {
        int fd = eventfd(0, EFD_CLOEXEC);
        int rc = mw_committer_start(writer, fd, !is_inline);
        taken = 0;
        CHECK(rc == 0 || rc == MW_E_CLOSED || rc == MW_E_POISONED);
        going = rc == 0;
        for (unsigned round = 0; going && !stop && round < 50; round++) {
            for (unsigned n = 0; going && n < 1 + round % 40; n++) {
                unsigned tag = next_tag++;
                if (tag >= TAGS) break;
                memcpy(payload, &tag, sizeof tag);
                int64_t op;
                while ((op = mw_submit_next(writer, payload, 8 + tag % 100, 2)) == -EAGAIN || make_way(op))
                    if (op == -EAGAIN) take();
                if (op > 0) pending[pending_to++ % (1 << 16)] = (struct pending){op, tag};
                else told(op, tag, op);
                going = op != MW_E_POISONED && op != MW_E_CLOSED;
            }
            await_all(fd);
        }
        mw_committer_stop(writer);
        close(fd);
    }
    return NULL;
}

/* By op, as readers in the process do: a slot is whole, and what lies below the durable LSN is on the disk. */
static void *look_up(void *arg) {
    struct mw_progress p = {0}, before = {0};
    struct mw_slot slot;
    (void)arg;
    for (uint64_t n = 1; !stop; n++) {
        if (mw_progress_read(&page, &p) != 0) continue;
        CHECK(p.durable_lsn <= p.written_lsn && p.durable_lsn >= before.durable_lsn);
        CHECK(p.watermark >= before.watermark);
        before = p;
        uint64_t last = next_tag, op = last - n * 2654435761u % (last < 256 ? last : 256);
        int rc = mw_lookup(slots, SLOTS, op, &slot);
        CHECK(rc == 0 || rc == MW_E_MISSING);
        if (rc != 0) continue;
        CHECK(slot.op == op && slot.length >= 8 && slot.length < 158 && (slot.kind == 1 || slot.kind == 2));
        if (slot.lsn < p.durable_lsn) CHECK(on_disk[op % TAGS] != 0);
        seen++;
    }
    return NULL;
}

/* As followers do, who sleep until more is published. */
static void *follow(void *arg) {
    uint32_t word, before;
    (void)arg;
    CHECK(mw_follow_word(&page, &before) == 0);
    while (!stop) {
        int rc = mw_follow_wait(&page, before, 20000000, 1000000, 1, NULL);
        CHECK(rc == 0 || rc == 1 || rc == -ETIMEDOUT);
        CHECK(mw_follow_word(&page, &word) == 0);
        if (word != before) woken++;
        before = word;
    }
    return NULL;
}

static void *sync_often(void *arg) {
    (void)arg;
    struct timespec pause = {0, 3000000};
    while (!stop) {
        int rc = mw_sync(writer, MW_SYNC_STAGED);
        if (rc != 0 && !make_way(rc)) CHECK(rc == MW_E_POISONED || rc == MW_E_CLOSED || rc == -ENOSPC);
        nanosleep(&pause, NULL);
    }
    return NULL;
}

/* How many a commit served in the best tenth of a second: a leader does not wait for who is not let run. */
static double best_company(void) {
    struct mw_state before, now;
    double best = 0;
    mw_writer_state(writer, &before);
    for (int i = 0; i < 50 && best <= 0.7 * APPENDERS; i++) {
        usleep(100000);
        mw_writer_state(writer, &now);
        double served = (double)(now.entries - before.entries) / (double)(now.commits - before.commits);
        if (served > best) best = served;
        before = now;
    }
    return best;
}

/* How often a leader waits where that gains nothing, in a commit: in the best of some times. */
static double least_waits(void) {
    double least = 1e9;
    for (int i = 0; i < 20 && least > 0.1; i++) {
        struct mw_state before, now;
        mw_writer_state(writer, &before);
        unsigned waits = company_waits;
        usleep(300000);
        mw_writer_state(writer, &now);
        double share = (double)(company_waits - waits) / (double)(now.commits - before.commits);
        if (share < least) least = share;
    }
    return least;
}

/* A commit serves most of those who append all the time; for those who do something else first, and for who has gone,
 * nobody waits for long. */
static void check_company(void) {
    double served = best_company();
    late = true;
    double vain = least_waits();
    printf("of those who come late %.2f were waited for in a commit\n", vain);
    CHECK(vain < 0.3);
    alone = true;
    usleep(100000);
    unsigned before = company_waits;
    uint64_t from = counts[0];
    while (counts[0] < from + 1000) usleep(1000);
    unsigned waits = company_waits - before;
    printf("a commit served %.1f of %d, one alone waited %u times in %d appends\n", served, APPENDERS, waits, 1000);
    CHECK(served > 0.7 * APPENDERS);
    CHECK(waits < 10);
}

int main(int argc, char **argv) {
    CHECK(argc > 2);
    mode = argv[1];
    is_inline = argc > 3;
    alarm(HANG_S);
    struct mw_config config = {.page = &page, .slots = slots, .slot_count = SLOTS, .lsn = 4096, .epoch = epoch,
                               .durability = MW_SYNC, .separate_sync = is_mode("full")};
    segment_base = config.lsn;
    writer = mw_writer_new(&config);
    CHECK(writer != NULL);
    pthread_t threads[APPENDERS + 4];
    uintptr_t started = 0;
    for (; started < APPENDERS; started++) pthread_create(&threads[started], NULL, append, (void *)started);
    if (!is_mode("company")) {
        pthread_create(&threads[started++], NULL, loop, NULL);
        pthread_create(&threads[started++], NULL, sync_often, NULL);
        pthread_create(&threads[started++], NULL, look_up, NULL);
        pthread_create(&threads[started++], NULL, follow, NULL);
    }
    usleep((useconds_t)(atof(argv[2]) * 1e6));
    if (is_mode("company")) check_company();
    if (is_mode("poison")) mw_writer_poison(writer, -EIO);
    if (is_mode("close")) mw_writer_close(writer);
    if (is_mode("close")) mw_sync(writer, MW_SYNC_STAGED | MW_SYNC_CLOSING);
    stop = true;
    for (uintptr_t i = 0; i < started; i++) pthread_join(threads[i], NULL);
    mw_writer_close(writer);
    mw_committer_stop(writer);
    struct mw_state s;
    mw_writer_state(writer, &s);
    for (uint64_t op = 1; op <= s.last_op; op++) CHECK(!failed[on_disk[op % TAGS]]);
    uint64_t least = UINT64_MAX, most = 0;
    for (int i = 0; i < APPENDERS; i++) {
        if (counts[i] < least) least = counts[i];
        if (counts[i] > most) most = counts[i];
    }
    printf("entries %llu commits %llu least %llu most %llu submitted %llu waits %u\n",
           (unsigned long long)s.entries, (unsigned long long)s.commits, (unsigned long long)least,
           (unsigned long long)most, (unsigned long long)counts[APPENDERS], (unsigned)company_waits);
    printf("entries looked up %lu, wake-ups of a follower %lu\n", (unsigned long)seen, (unsigned long)woken);
    CHECK(least > 0);
    CHECK(is_mode("company") || (seen > 0 && woken > 0));
    mw_writer_free(writer);
    return 0;
}
