/* A processor's vectors of fp32: loads that widen and stores that round, by gcc's vector types where one operation says it
   all, and by instructions of x86 where gcc would make many of it. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint8_t codes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

enum { FP32, BF16, INT8, FP8 };
/* Numbers of e4m3 (Micikevicius et al. 2022) are loaded as 1 / 256 of what they are: those of fp16 with the same bits,
   which have 8 times the exponents, and a bias of 15 in the place of 7. */
#define FP8_UNIT 256

/* `kind` is a constant wherever these are called, so each becomes one instruction or two. */
INLINE vec load(const void *from, int kind, int64_t at)
{
    if (kind == FP32)
        return *(const vec *)((const float *)from + at);
    const uint16_t *half = (const uint16_t *)from + at;
    const int8_t *byte = (const int8_t *)from + at;
#if defined(__AVX512F__)
    if (kind == BF16)
        return (vec)((bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)half)) << 16);
    if (kind == FP8) {
        __m256i sign_and_rest = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)byte)), 7);
        return (vec)_mm512_cvtph_ps(_mm256_and_si256(sign_and_rest, _mm256_set1_epi16((short)0xbfff)));
    }
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)byte)));
#elif defined(__AVX2__) /* gcc 12 makes sixteen instructions of the general form */
    if (kind == BF16)
        return (vec)((bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)half)) << 16);
    if (kind == FP8) {
        __m128i sign_and_rest = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const void *)byte)), 7);
        return (vec)_mm256_cvtph_ps(_mm_and_si128(sign_and_rest, _mm_set1_epi16((short)0xbfff)));
    }
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)byte)));
#else
    if (kind == BF16)
        return (vec)(__builtin_convertvector(*(const halves *)half, bits) << 16);
    if (kind == FP8) {
        bits code = __builtin_convertvector(*(const codes *)byte, bits);
        return (vec)((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p112f;
    }
    return __builtin_convertvector(__builtin_convertvector(*(const bytes *)byte, ints), vec);
#endif
}

INLINE float load_one(const void *from, int kind, int64_t at)
{
    if (kind == FP32)
        return ((const float *)from)[at];
    if (kind == INT8)
        return ((const int8_t *)from)[at];
    uint32_t wide, code;
    if (kind == FP8)
        code = ((const uint8_t *)from)[at], wide = (code & 0x80) << 24 | (code & 0x7f) << 20;
    else
        wide = (uint32_t)((const uint16_t *)from)[at] << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return kind == FP8 ? x * 0x1p112f : x;
}

INLINE void store_one(void *to, int kind, int64_t at, float x)
{
    if (kind == FP32) {
        ((float *)to)[at] = x;
        return;
    }
    uint32_t wide;
    memcpy(&wide, &x, sizeof wide);
    if (x != x) /* rounding up must not make an infinity of a NaN */
        wide |= 0x400000u;
    else
        wide += 0x7fffu + ((wide >> 16) & 1); /* to nearest, ties to even, as torch does */
    ((uint16_t *)to)[at] = (uint16_t)(wide >> 16);
}

/* The same of a vector, to bf16. */
INLINE halves rounded(vec x)
{
    bits wide = (bits)x, broken = (bits)(x != x);
    bits up = wide + (0x7fffu + ((wide >> 16) & 1));
    bits half = (((wide | 0x400000u) & broken) | (up & ~broken)) >> 16;
#if defined(__AVX512F__)
    return (halves)_mm512_cvtepi32_epi16((__m512i)half);
#elif defined(__AVX2__)
    __m256i pairs = _mm256_packus_epi32((__m256i)half, (__m256i)half);
    return (halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
    return __builtin_convertvector(half, halves);
#endif
}

INLINE void save(void *to, int kind, int64_t at, vec x)
{
    if (kind == FP32)
        *(vec *)((float *)to + at) = x;
    else
        *(halves *)((uint16_t *)to + at) = rounded(x);
}

/* a * b + c in one rounding, said aloud: left to itself, gcc fuses in one loop and not in its neighbour. */
INLINE vec fma_of(vec a, vec b, vec c)
{
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int lane = 0; lane < LANES; lane++)
        c[lane] = fmaf(a[lane], b[lane], c[lane]);
    return c;
#endif
}

#ifdef __AVX2__
/* Four sums of the lanes, each of those that are four apart. */
INLINE __m128 quarter(vec x)
{
#ifdef __AVX512F__
    __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)x, 1));
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), upper);
#else
    __m256 eight = (__m256)x;
#endif
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}
#endif

/* Lanes in pairs, and their sums in pairs: a chain of additions would wait for each of them. */
INLINE float sum(vec x)
{
#ifdef __AVX2__
    __m128 four = quarter(x), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float total = 0;
    for (int lane = 0; lane < LANES; lane++)
        total += x[lane];
    return total;
#endif
}

/* e^x for x <= 0, within 2 ulp: 2^(x log2 e) by its whole and its broken part (Cephes' polynomial). */
INLINE vec exp_of(vec x)
{
    vec lowest = (vec){0} - 87.0f;
    x = (vec)(((bits)x & (bits)(x > lowest)) | ((bits)lowest & ~(bits)(x > lowest)));
    ints whole = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, ints); /* to nearest: x is below zero */
    vec n = __builtin_convertvector(whole, vec), zero = {0};
    vec r = fma_of(n, zero + 2.12194440e-4f, fma_of(n, zero - 0.693359375f, x));
    vec p = zero + 1.9875691500e-4f;
    p = fma_of(p, r, zero + 1.3981999507e-3f);
    p = fma_of(p, r, zero + 8.3334519073e-3f);
    p = fma_of(p, r, zero + 4.1665795894e-2f);
    p = fma_of(p, r, zero + 1.6666665459e-1f);
    p = fma_of(p, r, zero + 5.0000001201e-1f);
    p = fma_of(p, r * r, r) + 1.0f;
    return p * (vec)((whole + 127) << 23);
}
