/* Sixteen lanes at a time, on four kinds of processors: what the kernels are written in.

   ints and floats hold 16 values, bytes holds 4 values of 8 bits for each of the 16 lanes. AVX-512 has registers of
   that size, AVX2 takes two, and plain C leaves loops to the compiler. */
#pragma once

#include <stdint.h>
#include <string.h>

enum { LANES = 16 };

#if defined(_WIN32) && defined(__AVX__) && defined(__GNUC__) && !defined(__clang__)
#error "GCC for Windows keeps 32-byte values at 16-byte addresses: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=54412"
#endif

#if defined(__AVX512VNNI__)
/* ----------------------------------------------------------------------------------------------- AVX-512 with VNNI */
#include <immintrin.h>
typedef __m512i ints, bytes;
typedef __m512 floats;
enum { OFFSET = 128 }; /* dpbusd wants its first operand unsigned: weights carry this offset, see dot */

static inline bytes load_bytes(const void *p) { return _mm512_loadu_si512(p); }
static inline bytes shifted(bytes b) { return _mm512_xor_si512(b, _mm512_set1_epi8((char)0x80)); }
static inline bytes table_of(const int8_t *t) {
    return shifted(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)t)));
}
static inline bytes low_nibbles(bytes b, bytes table) {
    return _mm512_shuffle_epi8(table, _mm512_and_si512(b, _mm512_set1_epi8(15)));
}
static inline bytes high_nibbles(bytes b, bytes table) {
    return _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(15)));
}
static inline ints dot(ints sum, bytes w, int32_t x) { return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x)); }
static inline ints ints_of(int32_t v) { return _mm512_set1_epi32(v); }
static inline ints ints_add(ints a, ints b) { return _mm512_add_epi32(a, b); }
static inline floats to_floats(ints v) { return _mm512_cvtepi32_ps(v); }
static inline floats floats_of(float v) { return _mm512_set1_ps(v); }
static inline floats load_floats(const float *p) { return _mm512_loadu_ps(p); }
static inline void store_floats(float *p, floats v) { _mm512_storeu_ps(p, v); }
static inline floats mul(floats a, floats b) { return _mm512_mul_ps(a, b); }
static inline floats mul_add(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline floats load_int8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline floats load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline void store_half(uint16_t *p, floats v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* no function: GCC 12 takes one that does nothing else for one that does nothing */
#define prefetch(p) _mm_prefetch((const char *)(p), _MM_HINT_T0)

#elif defined(__AVX2__)
/* ----------------------------------------------------------------------------------- AVX2, with or without AVX-VNNI */
#include <immintrin.h>
typedef struct {
    __m256i v[2];
} ints, bytes;
typedef struct {
    __m256 v[2];
} floats;

static inline bytes load_bytes(const void *p) {
    return (bytes){{_mm256_loadu_si256(p), _mm256_loadu_si256((const __m256i *)p + 1)}};
}
#ifdef __AVXVNNI__
enum { OFFSET = 128 };
static inline bytes shifted(bytes b) {
    __m256i top = _mm256_set1_epi8((char)0x80);
    return (bytes){{_mm256_xor_si256(b.v[0], top), _mm256_xor_si256(b.v[1], top)}};
}
static inline __m256i dot_part(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#else
enum { OFFSET = 0 };
static inline bytes shifted(bytes b) { return b; }
static inline __m256i dot_part(__m256i sum, __m256i w, __m256i x) {
    /* |w| * (x with w's sign): w may be -128, which has no counterpart, x is never; a pair of products stays within
       2 * 128 * 127, which 16 bits hold */
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif
static inline bytes table_of(const int8_t *t) {
    __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)t));
    return shifted((bytes){{v, v}});
}
static inline __m256i look_up(__m256i table, __m256i index) {
    return _mm256_shuffle_epi8(table, _mm256_and_si256(index, _mm256_set1_epi8(15)));
}
static inline bytes low_nibbles(bytes b, bytes table) {
    return (bytes){{look_up(table.v[0], b.v[0]), look_up(table.v[0], b.v[1])}};
}
static inline bytes high_nibbles(bytes b, bytes table) {
    __m256i first = _mm256_srli_epi16(b.v[0], 4), second = _mm256_srli_epi16(b.v[1], 4);
    return (bytes){{look_up(table.v[0], first), look_up(table.v[0], second)}};
}
static inline ints dot(ints sum, bytes w, int32_t x) {
    __m256i all = _mm256_set1_epi32(x);
    return (ints){{dot_part(sum.v[0], w.v[0], all), dot_part(sum.v[1], w.v[1], all)}};
}
static inline ints ints_of(int32_t v) { return (ints){{_mm256_set1_epi32(v), _mm256_set1_epi32(v)}}; }
static inline ints ints_add(ints a, ints b) {
    return (ints){{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}};
}
static inline floats to_floats(ints v) { return (floats){{_mm256_cvtepi32_ps(v.v[0]), _mm256_cvtepi32_ps(v.v[1])}}; }
static inline floats floats_of(float v) { return (floats){{_mm256_set1_ps(v), _mm256_set1_ps(v)}}; }
static inline floats load_floats(const float *p) { return (floats){{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
static inline void store_floats(float *p, floats v) {
    _mm256_storeu_ps(p, v.v[0]);
    _mm256_storeu_ps(p + 8, v.v[1]);
}
static inline floats mul(floats a, floats b) {
    return (floats){{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
}
static inline floats mul_add(floats a, floats b, floats c) {
    return (floats){{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
}
static inline floats load_int8(const int8_t *p) {
    __m128i v = _mm_loadu_si128((const __m128i *)p);
    return to_floats((ints){{_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))}});
}
static inline floats load_half(const uint16_t *p) {
    const __m128i *halves = (const __m128i *)p;
    return (floats){{_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))}};
}
static inline void store_half(uint16_t *p, floats v) {
    __m128i *halves = (__m128i *)p;
    _mm_storeu_si128(halves, _mm256_cvtps_ph(v.v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(v.v[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* no function: GCC 12 takes one that does nothing else for one that does nothing */
#define prefetch(p) _mm_prefetch((const char *)(p), _MM_HINT_T0)

#else
/* --------------------------------------------------------------------------------------------------------- plain C */
typedef struct {
    int32_t v[LANES];
} ints;
typedef struct {
    int8_t v[4 * LANES];
} bytes;
typedef struct {
    float v[LANES];
} floats;
enum { OFFSET = 0 };
#define EACH_LANE for (int i = 0; i < LANES; i++)

static inline bytes load_bytes(const void *p) {
    bytes b;
    memcpy(&b, p, sizeof b);
    return b;
}
static inline bytes shifted(bytes b) { return b; }
static inline bytes table_of(const int8_t *t) {
    bytes b = {{0}};
    memcpy(&b, t, 16);
    return b;
}
static inline bytes low_nibbles(bytes b, bytes table) {
    for (int i = 0; i < 4 * LANES; i++) b.v[i] = table.v[b.v[i] & 15];
    return b;
}
static inline bytes high_nibbles(bytes b, bytes table) {
    for (int i = 0; i < 4 * LANES; i++) b.v[i] = table.v[(b.v[i] >> 4) & 15];
    return b;
}
static inline ints dot(ints sum, bytes w, int32_t x) {
    int8_t four[4];
    memcpy(four, &x, 4);
    EACH_LANE for (int j = 0; j < 4; j++) sum.v[i] += w.v[4 * i + j] * four[j];
    return sum;
}
static inline ints ints_of(int32_t v) {
    ints r;
    EACH_LANE r.v[i] = v;
    return r;
}
static inline ints ints_add(ints a, ints b) {
    EACH_LANE a.v[i] += b.v[i];
    return a;
}
static inline floats to_floats(ints v) {
    floats r;
    EACH_LANE r.v[i] = (float)v.v[i];
    return r;
}
static inline floats floats_of(float v) {
    floats r;
    EACH_LANE r.v[i] = v;
    return r;
}
static inline floats load_floats(const float *p) {
    floats r;
    memcpy(&r, p, sizeof r);
    return r;
}
static inline void store_floats(float *p, floats v) { memcpy(p, &v, sizeof v); }
static inline floats mul(floats a, floats b) {
    EACH_LANE a.v[i] *= b.v[i];
    return a;
}
static inline floats mul_add(floats a, floats b, floats c) {
    EACH_LANE c.v[i] += a.v[i] * b.v[i];
    return c;
}
static inline floats load_int8(const int8_t *p) {
    floats r;
    EACH_LANE r.v[i] = p[i];
    return r;
}
static inline floats load_half(const uint16_t *p) {
    floats r;
    EACH_LANE {
        /* https://gist.github.com/rygorous/2156668: a product moves the exponent, and serves subnormal numbers too */
        uint32_t bits = (uint32_t)(p[i] & 0x7fff) << 13, sign = (uint32_t)(p[i] & 0x8000) << 16;
        float value, two_to_112 = 5.192296858534828e33f;
        memcpy(&value, &bits, 4);
        value *= two_to_112;
        memcpy(&bits, &value, 4);
        if ((p[i] & 0x7c00) == 0x7c00) bits = 0x7f800000 | (uint32_t)(p[i] & 0x3ff) << 13;
        bits |= sign;
        memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
static inline void store_half(uint16_t *p, floats v) {
    EACH_LANE {
        /* the same source: the largest numbers become infinity, the smallest are rounded by an addition */
        uint32_t bits, sign, magic = 126u << 23;
        memcpy(&bits, &v.v[i], 4);
        sign = bits & 0x80000000u;
        bits ^= sign;
        if (bits >= 0x47800000u) {
            bits = bits > 0x7f800000u ? 0x7e00 : 0x7c00;
        } else if (bits < 0x38800000u) {
            float value, half;
            memcpy(&value, &bits, 4);
            memcpy(&half, &magic, 4);
            value += half;
            memcpy(&bits, &value, 4);
            bits -= magic;
        } else {
            bits = (bits - 0x38000000u + 0xfff + (bits >> 13 & 1)) >> 13;
        }
        p[i] = (uint16_t)(bits | sign >> 16);
    }
}
#define prefetch(p) ((void)(p))
#undef EACH_LANE
#endif

/* Any number of values. */
static inline void widen(const uint16_t *halves, float *out, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store_floats(out + i, load_half(halves + i));
    if (i < count) {
        uint16_t rest[LANES] = {0};
        float wide[LANES];
        memcpy(rest, halves + i, (size_t)(count - i) * sizeof *rest);
        store_floats(wide, load_half(rest));
        memcpy(out + i, wide, (size_t)(count - i) * sizeof *out);
    }
}

static inline void narrow(const float *values, uint16_t *out, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store_half(out + i, load_floats(values + i));
    if (i < count) {
        float rest[LANES] = {0};
        uint16_t halves[LANES];
        memcpy(rest, values + i, (size_t)(count - i) * sizeof *rest);
        store_half(halves, load_floats(rest));
        memcpy(out + i, halves, (size_t)(count - i) * sizeof *out);
    }
}
