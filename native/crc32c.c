/* CRC32C (Castagnoli, reflected polynomial 0x82F63B78; RFC 3720 B.4). The hardware instruction has a
 * latency of 3 and a throughput of 1. So a long input goes as three streams, joined by a table that
 * shifts a CRC over a fixed number of zero bytes. Of short ones the processor begins the next by itself. */
#include <errno.h>
#include <string.h>

#include "crc32c.h"

#define POLY 0x82F63B78u
#define STREAM 1024u /* bytes a stream */
#define LINE 64u
#define HEADER (MW_FRAME_BYTES - 4u) /* bytes of a frame's header that its checksum covers */

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

/* Words at the places of the frame's own: what was just stored there is loaded without a stall. */
TARGET static uint32_t instruction_header(uint32_t seed, const uint8_t *p) {
    uint32_t half;
    memcpy(&half, p, sizeof half);
    uint64_t a = CRC32(seed, half);
    for (unsigned i = sizeof half; i < HEADER; i += 8) a = CRC64(a, word_at(p + i));
    return (uint32_t)a;
}
#endif

static uint32_t portable_header(uint32_t crc, const uint8_t *p) { return portable(crc, p, HEADER); }

static mw_crc32c_way *ways[] = {
    [MW_CRC32C_PORTABLE] = portable,
    [MW_CRC32C_INSTRUCTION] = NULL,
    [MW_CRC32C_FOLD] = NULL,
    [MW_CRC32C_FOLD_WIDE] = NULL,
};
static mw_crc32c_way *best = portable;
static uint32_t (*best_header)(uint32_t crc, const uint8_t *p) = portable_header;

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
    best_header = instruction_header;
    ways[MW_CRC32C_INSTRUCTION] = instruction;
    mw_crc32c_fold_ways(&ways[MW_CRC32C_FOLD], &ways[MW_CRC32C_FOLD_WIDE]);
    for (int way = MW_CRC32C_PORTABLE; way <= MW_CRC32C_FOLD_WIDE; way++)
        if (ways[way] != NULL) best = ways[way];
#endif
}

uint32_t mw_crc32c(uint32_t seed, const void *data, uint64_t bytes) { return ~best(~seed, data, bytes); }

uint32_t mw_frame_crc(const struct mw_frame *f, uint32_t salt) {
    return ~best_header(~salt, (const uint8_t *)f + MW_FRAME_BYTES - HEADER);
}

int mw_crc32c_best(void) {
    int way = MW_CRC32C_FOLD_WIDE;
    while (ways[way] != best) way--;
    return way;
}

int mw_crc32c_by(int way, uint32_t seed, const void *data, uint64_t bytes, uint32_t *crc) {
    if (way < MW_CRC32C_PORTABLE || way > MW_CRC32C_FOLD_WIDE || ways[way] == NULL) return -ENOTSUP;
    *crc = ~ways[way](~seed, data, bytes);
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
