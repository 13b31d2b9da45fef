/* CRC32C (Castagnoli, reflected polynomial 0x82F63B78; RFC 3720 B.4). The hardware instruction has a
 * latency of 3 and a throughput of 1. So a long input goes as three streams, joined by a table that
 * shifts a CRC over a fixed number of zero bytes, and many inputs go side by side, one in each lane. */
#include <errno.h>
#include <string.h>

#include "crc32c.h"

#define POLY 0x82F63B78u
#define STREAM 1024u /* bytes a stream */
#define LINE 64u
#define LANES 4u
#define AHEAD 2048u /* bytes that the memory is asked for before a lane gets there */

static uint32_t bytewise[8][256];

static uint32_t portable(uint32_t crc, const uint8_t *p, uint64_t n) {
    while (n >= 8) {
        uint32_t low, high;
        memcpy(&low, p, 4);
        memcpy(&high, p + 4, 4);
        low ^= crc;
        crc = bytewise[7][low & 255] ^ bytewise[6][low >> 8 & 255] ^ bytewise[5][low >> 16 & 255] ^
              bytewise[4][low >> 24] ^ bytewise[3][high & 255] ^ bytewise[2][high >> 8 & 255] ^
              bytewise[1][high >> 16 & 255] ^ bytewise[0][high >> 24];
        p += 8;
        n -= 8;
    }
    while (n--) crc = crc >> 8 ^ bytewise[0][(crc ^ *p++) & 255];
    return crc;
}

static void portable_many(struct mw_sum *sums, uint64_t count) {
    for (uint64_t i = 0; i < count; i++) sums[i].crc = ~portable(~sums[i].crc, sums[i].data, sums[i].bytes);
}

static void portable_frames(uint32_t salt, const struct mw_frame *frames, uint64_t count, uint32_t *crcs) {
    for (uint64_t i = 0; i < count; i++)
        crcs[i] = ~portable(~salt, (const uint8_t *)&frames[i].payload_crc, MW_FRAME_BYTES - 4);
}

#if defined(__x86_64__)
#include <nmmintrin.h>
#define TARGET __attribute__((target("sse4.2")))
#define CRC8(crc, byte) _mm_crc32_u8(crc, byte)
#define CRC32(crc, half) _mm_crc32_u32(crc, half)
#define CRC64(crc, word) _mm_crc32_u64(crc, word)
#define HAVE_INSTRUCTION 1
static int have_instruction(void) { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif
#define TARGET __attribute__((target("+crc")))
#define CRC8(crc, byte) __crc32cb((uint32_t)(crc), byte)
#define CRC32(crc, half) __crc32cw((uint32_t)(crc), half)
#define CRC64(crc, word) __crc32cd((uint32_t)(crc), word)
#define HAVE_INSTRUCTION 1
static int have_instruction(void) { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }
#endif

#ifdef HAVE_INSTRUCTION
static uint32_t shift_stream[4][256];

static uint32_t shifted(uint32_t crc) {
    return shift_stream[0][crc & 255] ^ shift_stream[1][crc >> 8 & 255] ^
           shift_stream[2][crc >> 16 & 255] ^ shift_stream[3][crc >> 24];
}

static inline uint64_t word_at(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}

TARGET static uint32_t one_stream(uint64_t a, const uint8_t *p, uint64_t n) {
    for (; n >= 8; p += 8, n -= 8) a = CRC64(a, word_at(p));
    uint32_t crc = (uint32_t)a;
    if (n >= 4) { /* a frame's header ends so */
        uint32_t half;
        memcpy(&half, p, 4);
        crc = CRC32(crc, half);
        p += 4;
        n -= 4;
    }
    for (; n > 0; n--) crc = CRC8(crc, *p++);
    return crc;
}

TARGET static uint32_t instruction(uint32_t seed, const uint8_t *p, uint64_t n) {
    uint64_t a = seed;
    while (n >= 3 * STREAM) {
        uint64_t b = 0, c = 0;
        for (const uint8_t *end = p + STREAM; p < end; p += LINE) {
            /* The next round's lines: three short streams are too many for the hardware to foresee. */
            for (unsigned s = 0; s < 3; s++) __builtin_prefetch(p + (3 + s) * STREAM);
            for (unsigned i = 0; i < LINE; i += 8) {
                a = CRC64(a, word_at(p + i));
                b = CRC64(b, word_at(p + i + STREAM));
                c = CRC64(c, word_at(p + i + 2 * STREAM));
            }
        }
        a = shifted((uint32_t)a) ^ b;
        a = shifted((uint32_t)a) ^ c;
        p += 2 * STREAM;
        n -= 3 * STREAM;
    }
    return one_stream(a, p, n);
}

struct lane {
    const uint8_t *p;
    uint64_t left;
    uint64_t crc;
    struct mw_sum *sum;
};

/* All lanes over as many bytes as the shortest one has, in words. */
TARGET static void step(struct lane *lane) {
    uint64_t n = lane[0].left;
    for (unsigned k = 1; k < LANES; k++) n = lane[k].left < n ? lane[k].left : n;
    n &= ~(uint64_t)7;
    const uint8_t *p = lane[0].p, *q = lane[1].p, *r = lane[2].p, *s = lane[3].p;
    uint64_t a = lane[0].crc, b = lane[1].crc, c = lane[2].crc, d = lane[3].crc, i = 0;
    for (; i + LINE <= n; i += LINE) {
        __builtin_prefetch(p + i + AHEAD);
        __builtin_prefetch(q + i + AHEAD);
        __builtin_prefetch(r + i + AHEAD);
        __builtin_prefetch(s + i + AHEAD);
        for (unsigned j = 0; j < LINE; j += 8) {
            a = CRC64(a, word_at(p + i + j));
            b = CRC64(b, word_at(q + i + j));
            c = CRC64(c, word_at(r + i + j));
            d = CRC64(d, word_at(s + i + j));
        }
    }
    for (; i < n; i += 8) {
        a = CRC64(a, word_at(p + i));
        b = CRC64(b, word_at(q + i));
        c = CRC64(c, word_at(r + i));
        d = CRC64(d, word_at(s + i));
    }
    lane[0].crc = a;
    lane[1].crc = b;
    lane[2].crc = c;
    lane[3].crc = d;
    for (unsigned k = 0; k < LANES; k++) {
        lane[k].p += n;
        lane[k].left -= n;
    }
}

TARGET static void instruction_many(struct mw_sum *sums, uint64_t count) {
    struct lane lane[LANES];
    unsigned live = 0;
    for (uint64_t next = 0;;) {
        while (live < LANES && next < count) {
            struct mw_sum *sum = &sums[next++];
            if (sum->bytes >= 3 * STREAM) sum->crc = ~instruction(~sum->crc, sum->data, sum->bytes);
            else lane[live++] = (struct lane){sum->data, sum->bytes, ~sum->crc, sum};
        }
        if (live < LANES) break;
        step(lane);
        for (unsigned k = 0; k < live;) {
            if (lane[k].left >= 8) {
                k++;
                continue;
            }
            lane[k].sum->crc = ~one_stream(lane[k].crc, lane[k].p, lane[k].left);
            lane[k] = lane[--live];
        }
    }
    for (unsigned k = 0; k < live; k++) lane[k].sum->crc = ~one_stream(lane[k].crc, lane[k].p, lane[k].left);
}

/* Seven steps a header: independent ones overlap by themselves. */
TARGET static void instruction_frames(uint32_t salt, const struct mw_frame *frames, uint64_t count,
                                      uint32_t *crcs) {
    for (uint64_t i = 0; i < count; i++) {
        const uint8_t *p = (const uint8_t *)&frames[i];
        uint64_t crc = CRC32(~salt, frames[i].payload_crc);
        for (unsigned j = 8; j < MW_FRAME_BYTES; j += 8) crc = CRC64(crc, word_at(p + j));
        crcs[i] = ~(uint32_t)crc;
    }
}
#endif

static struct mw_crc32c_way ways[] = {
    [MW_CRC32C_PORTABLE] = {portable, portable_many, portable_frames},
    [MW_CRC32C_INSTRUCTION] = {NULL, NULL, NULL},
    [MW_CRC32C_FOLD] = {NULL, NULL, NULL},
};
static const struct mw_crc32c_way *best = &ways[MW_CRC32C_PORTABLE];

/* When the library is loaded: no call has to ask whether the tables are there. */
__attribute__((constructor)) static void build(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++) crc = crc & 1 ? crc >> 1 ^ POLY : crc >> 1;
        bytewise[0][i] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (int i = 0; i < 256; i++)
            bytewise[k][i] = bytewise[k - 1][i] >> 8 ^ bytewise[0][bytewise[k - 1][i] & 255];
#ifdef HAVE_INSTRUCTION
    static const uint8_t zeros[STREAM];
    for (int k = 0; k < 4; k++) /* a CRC is linear: shift each bit over STREAM zeros, and add up */
        for (uint32_t i = 1; i < 256; i++) {
            uint32_t lowest = i & -i;
            shift_stream[k][i] = i == lowest ? portable(i << 8 * k, zeros, STREAM)
                                             : shift_stream[k][i ^ lowest] ^ shift_stream[k][lowest];
        }
    if (!have_instruction()) return;
    ways[MW_CRC32C_INSTRUCTION] = (struct mw_crc32c_way){instruction, instruction_many, instruction_frames};
    ways[MW_CRC32C_FOLD].frames = instruction_frames;
    mw_crc32c_fold_way(&ways[MW_CRC32C_FOLD]);
    best = &ways[ways[MW_CRC32C_FOLD].one != NULL ? MW_CRC32C_FOLD : MW_CRC32C_INSTRUCTION];
#endif
}

uint32_t mw_crc32c(uint32_t seed, const void *data, uint64_t bytes) { return ~best->one(~seed, data, bytes); }

void mw_crc32c_many(struct mw_sum *sums, uint64_t count) { best->many(sums, count); }

void mw_crc32c_frames(uint32_t salt, const struct mw_frame *frames, uint64_t count, uint32_t *crcs) {
    best->frames(salt, frames, count, crcs);
}

int mw_crc32c_best(void) { return (int)(best - ways); }

static const struct mw_crc32c_way *way_of(int way) {
    bool known = way >= MW_CRC32C_PORTABLE && way <= MW_CRC32C_FOLD;
    return known && ways[way].one != NULL ? &ways[way] : NULL;
}

int mw_crc32c_by(int way, uint32_t seed, const void *data, uint64_t bytes, uint32_t *crc) {
    const struct mw_crc32c_way *w = way_of(way);
    if (w == NULL) return -ENOTSUP;
    *crc = ~w->one(~seed, data, bytes);
    return 0;
}

int mw_crc32c_many_by(int way, struct mw_sum *sums, uint64_t count) {
    const struct mw_crc32c_way *w = way_of(way);
    if (w == NULL) return -ENOTSUP;
    w->many(sums, count);
    return 0;
}

int mw_crc32c_frames_by(int way, uint32_t salt, const struct mw_frame *frames, uint64_t count,
                        uint32_t *crcs) {
    const struct mw_crc32c_way *w = way_of(way);
    if (w == NULL) return -ENOTSUP;
    w->frames(salt, frames, count, crcs);
    return 0;
}

struct check {
    const void *data;
    uint64_t bytes;
    uint32_t crc;
};

static int check(void *arg) {
    struct check *c = arg;
    c->crc = mw_crc32c(c->crc, c->data, c->bytes);
    return 0;
}

int mw_crc32c_guarded(uint32_t seed, const void *data, uint64_t bytes, uint32_t *crc) {
    struct check c = {data, bytes, seed};
    int rc = mw_guarded(check, &c);
    *crc = c.crc;
    return rc;
}
