/* CRC32C by carry-less multiplication of vectors of 256 or 512 bits: 8 and 16 bytes a cycle without lanes to look after.
 *
 * A CRC is what is left of the message modulo the polynomial, so 16 bytes that lie D bits ahead of others
 * may be multiplied by x^D mod P and added to those (Gopal et al., "Fast CRC Computation Using PCLMULQDQ",
 * Intel 2009). Each half is multiplied by its own constant; the product of two reflected numbers is one
 * bit short, and 32 bits lie above the constant's own, hence D + 31 and D - 33. */
#include "crc32c.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define FOLD __attribute__((target("avx2,pclmul,vpclmulqdq,sse4.2")))
#define WIDE __attribute__((target("avx512f,avx512vl,avx2,pclmul,vpclmulqdq,sse4.2")))
#define FOLD_MIN 64u /* below it the set-up costs more than it brings */
#define AHEAD 4096u  /* bytes that the memory is asked for before they are needed */

enum { BY_16, BY_32, BY_48, BY_64, BY_96, BY_128, BY_192, BY_256, DISTANCES };
static const unsigned distance_bytes[] = {16, 32, 48, 64, 96, 128, 192, 256};
static uint64_t by_bytes[DISTANCES][2]; /* over so many: for the low half, for the high half */

static uint64_t power(unsigned bits) { /* x^bits mod P, reflected */
    uint32_t crc = 0x80000000u;
    while (bits--) crc = crc & 1 ? crc >> 1 ^ 0x82F63B78u : crc >> 1;
    return crc;
}

FOLD static inline __m256i constants(int by) {
    return _mm256_set_epi64x((long long)by_bytes[by][1], (long long)by_bytes[by][0],
                             (long long)by_bytes[by][1], (long long)by_bytes[by][0]);
}

FOLD static inline __m256i load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i_u *)p); }

FOLD static inline __m256i fold(__m256i x, __m256i k, __m256i to) {
    __m256i low = _mm256_clmulepi64_epi128(x, k, 0x00), high = _mm256_clmulepi64_epi128(x, k, 0x11);
    return _mm256_xor_si256(_mm256_xor_si256(low, high), to);
}

FOLD static inline uint32_t rest(uint64_t crc, const uint8_t *p, uint64_t n) {
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        crc = _mm_crc32_u64(crc, word);
    }
    uint32_t out = (uint32_t)crc;
    if (n >= 4) {
        uint32_t half;
        memcpy(&half, p, 4);
        out = _mm_crc32_u32(out, half);
        p += 4;
        n -= 4;
    }
    for (; n > 0; n--) out = _mm_crc32_u8(out, *p++);
    return out;
}

/* The last 16 bytes of a message that was folded into them, and what follows. */
FOLD static inline uint32_t reduced(__m128i last, const uint8_t *p, uint64_t n) {
    uint64_t left = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(last));
    return rest(_mm_crc32_u64(left, (uint64_t)_mm_extract_epi64(last, 1)), p, n);
}

FOLD static uint32_t folded(uint32_t crc, const uint8_t *p, uint64_t n) {
    if (n < FOLD_MIN) return rest(crc, p, n);
    __m256i x = _mm256_xor_si256(load(p), _mm256_set_epi64x(0, 0, 0, (long long)crc));
    const __m256i by_32 = constants(BY_32);
    if (n >= 128) {
        __m256i y = load(p + 32), z = load(p + 64), w = load(p + 96);
        const __m256i by_128 = constants(BY_128);
        __builtin_prefetch(p + AHEAD);
        __builtin_prefetch(p + AHEAD + 64);
        for (p += 128, n -= 128; n >= 128; p += 128, n -= 128) {
            __builtin_prefetch(p + AHEAD);
            __builtin_prefetch(p + AHEAD + 64);
            x = fold(x, by_128, load(p));
            y = fold(y, by_128, load(p + 32));
            z = fold(z, by_128, load(p + 64));
            w = fold(w, by_128, load(p + 96));
        }
        x = fold(x, constants(BY_96), fold(y, constants(BY_64), fold(z, by_32, w)));
    } else {
        p += 32;
        n -= 32;
    }
    for (; n >= 32; p += 32, n -= 32) x = fold(x, by_32, load(p));
    __m128i last = _mm256_extracti128_si256(x, 1), first = _mm256_castsi256_si128(x);
    const __m128i by_16 = _mm_set_epi64x((long long)by_bytes[BY_16][1], (long long)by_bytes[BY_16][0]);
    last = _mm_xor_si128(last, _mm_xor_si128(_mm_clmulepi64_si128(first, by_16, 0x00),
                                             _mm_clmulepi64_si128(first, by_16, 0x11)));
    return reduced(last, p, n);
}

WIDE static inline __m512i wide_constants(int by) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i_u *)by_bytes[by]));
}

WIDE static inline __m512i wide_load(const uint8_t *p) { return _mm512_loadu_si512(p); }

enum { XOR_OF_THREE = 0x96 };

WIDE static inline __m512i wide_fold(__m512i x, __m512i k, __m512i to) {
    __m512i low = _mm512_clmulepi64_epi128(x, k, 0x00), high = _mm512_clmulepi64_epi128(x, k, 0x11);
    return _mm512_ternarylogic_epi64(low, high, to, XOR_OF_THREE);
}

/* Its four lanes lie 48, 32, 16 and 0 bytes ahead of its end. */
WIDE static inline __m128i last_lane(__m512i x) {
    const __m512i by = _mm512_set_epi64(
        0, 0, (long long)by_bytes[BY_16][1], (long long)by_bytes[BY_16][0], (long long)by_bytes[BY_32][1],
        (long long)by_bytes[BY_32][0], (long long)by_bytes[BY_48][1], (long long)by_bytes[BY_48][0]);
    __m512i moved = wide_fold(x, by, _mm512_setzero_si512());
    __m256i half = _mm256_xor_si256(_mm512_castsi512_si256(moved), _mm512_extracti64x4_epi64(moved, 1));
    return _mm_ternarylogic_epi64(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1),
                                  _mm512_extracti32x4_epi32(x, 3), XOR_OF_THREE);
}

WIDE static inline void ask_for(const uint8_t *p) {
    for (unsigned i = 0; i < 256; i += 64) __builtin_prefetch(p + AHEAD + i);
}

WIDE static uint32_t wide_folded(uint32_t crc, const uint8_t *p, uint64_t n) {
    if (n < FOLD_MIN) return rest(crc, p, n);
    __m512i x = _mm512_xor_si512(wide_load(p), _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
    const __m512i by_64 = wide_constants(BY_64);
    if (n >= 256) {
        __m512i y = wide_load(p + 64), z = wide_load(p + 128), w = wide_load(p + 192);
        const __m512i by_256 = wide_constants(BY_256);
        ask_for(p);
        for (p += 256, n -= 256; n >= 256; p += 256, n -= 256) {
            ask_for(p);
            x = wide_fold(x, by_256, wide_load(p));
            y = wide_fold(y, by_256, wide_load(p + 64));
            z = wide_fold(z, by_256, wide_load(p + 128));
            w = wide_fold(w, by_256, wide_load(p + 192));
        }
        x = wide_fold(x, wide_constants(BY_192), wide_fold(y, wide_constants(BY_128), wide_fold(z, by_64, w)));
    } else {
        p += 64;
        n -= 64;
    }
    for (; n >= 64; p += 64, n -= 64) x = wide_fold(x, by_64, wide_load(p));
    return reduced(last_lane(x), p, n);
}

void mw_crc32c_fold_ways(mw_crc32c_way **fold, mw_crc32c_way **wide) {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("vpclmulqdq")) return;
    if (!__builtin_cpu_supports("pclmul") || !__builtin_cpu_supports("sse4.2")) return;
    for (int by = 0; by < DISTANCES; by++) {
        by_bytes[by][0] = power(8 * distance_bytes[by] + 31);
        by_bytes[by][1] = power(8 * distance_bytes[by] - 33);
    }
    *fold = folded;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) *wide = wide_folded;
}
#else
void mw_crc32c_fold_ways(mw_crc32c_way **fold, mw_crc32c_way **wide) {
    (void)fold;
    (void)wide;
}
#endif
