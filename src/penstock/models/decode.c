/* One token per row: products of few rows with a weight, and attention of one query per row over its cache.

   Both are bound by reading: a weight, or a cache, once. Weights and caches are fp32, bf16 or (weights) int8 with a scale
   per row, and are widened to fp32 in registers; activations come in fp32 and sums are made in fp32. Every output is
   summed in the same order whatever the other rows are, so a row's numbers do not depend on its company. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
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
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

enum { FP32, BF16, INT8 };

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
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)byte)));
#elif defined(__AVX2__) /* gcc 12 makes sixteen instructions of the general form */
    if (kind == BF16)
        return (vec)((bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)half)) << 16);
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)byte)));
#else
    if (kind == BF16)
        return (vec)(__builtin_convertvector(*(const halves *)half, bits) << 16);
    return __builtin_convertvector(__builtin_convertvector(*(const bytes *)byte, ints), vec);
#endif
}

INLINE float load_one(const void *from, int kind, int64_t at)
{
    if (kind == FP32)
        return ((const float *)from)[at];
    if (kind == INT8)
        return ((const int8_t *)from)[at];
    uint32_t wide = (uint32_t)((const uint16_t *)from)[at] << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
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

/* Lanes in pairs, and their sums in pairs: a chain of additions would wait for each of them. */
INLINE float sum(vec x)
{
#ifdef __AVX512F__
    __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)x, 1));
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), upper);
#elif defined(__AVX2__)
    __m256 eight = (__m256)x;
#endif
#ifdef __AVX2__
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
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

/* --- products ------------------------------------------------------------------------------------------------------ */

typedef struct {
    const void *x;       /* [rows, in], x_kind */
    const void *weight;  /* [out, in], kind */
    const void *bias;    /* [out], bias_kind, or NULL */
    const float *scales; /* [out], INT8 only */
    void *y;             /* [rows, out], x_kind */
    float *wide;         /* [rows, in], room for x in fp32 if it is not */
    uint32_t *packed;    /* BF16: [in / 32][rows / 16, rounded up][16][16], room for x as the matrix unit reads it */
    int64_t rows, in, out;
    int32_t kind, bias_kind, x_kind, threads;
} Product;

/* Sums that are made at once, in registers: 8 columns of one row, 4 of two, or 2 of four. A block of columns stays in the
   second cache while all rows pass by. */
#define BLOCK 16

INLINE void tile(const Product *p, int kind, int64_t row, int64_t column, int rows, int columns)
{
    int64_t in = p->in, k = 0;
    const float *x = p->wide + row * in;
    vec sums[4][8] = {0};
    int64_t size = kind == FP32 ? 4 : kind == BF16 ? 2 : 1;
    const char *next = (const char *)p->weight + (column + columns) * in * size; /* the columns after these */
    for (; k + LANES <= in; k += LANES) {
        vec w[8];
        for (int c = 0; c < columns; c++)
            w[c] = load(p->weight, kind, (column + c) * in + k);
        if (row == 0)
            for (int64_t line = 0; line < columns * LANES * size; line += 64)
                __builtin_prefetch(next + k * columns * size + line);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++)
                sums[r][c] = fma_of(*(const vec *)(x + r * in + k), w[c], sums[r][c]);
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            float total = sum(sums[r][c]);
            for (int64_t rest = k; rest < in; rest++)
                total = fmaf(x[r * in + rest], load_one(p->weight, kind, (column + c) * in + rest), total);
            if (kind == INT8)
                total *= p->scales[column + c];
            if (p->bias)
                total += load_one(p->bias, p->bias_kind, column + c);
            store_one(p->y, p->x_kind, (row + r) * p->out + column + c, total);
        }
}

INLINE void row_group(const Product *p, int kind, int64_t row, int rows, int64_t column, int64_t end)
{
    if (rows == 1)
        for (; column + 8 <= end; column += 8)
            tile(p, kind, row, column, 1, 8);
    else if (rows == 2)
        for (; column + 4 <= end; column += 4)
            tile(p, kind, row, column, 2, 4);
    else
        for (; column + 2 <= end; column += 2)
            tile(p, kind, row, column, rows, 2);
    for (; column < end; column++)
        tile(p, kind, row, column, rows, 1);
}

INLINE void block(const Product *p, int kind, int64_t column)
{
    int64_t end = column + BLOCK < p->out ? column + BLOCK : p->out, row = 0;
    for (; row + 4 <= p->rows; row += 4)
        row_group(p, kind, row, 4, column, end);
    switch (p->rows - row) {
    case 1: row_group(p, kind, row, 1, column, end); break;
    case 2: row_group(p, kind, row, 2, column, end); break;
    case 3: row_group(p, kind, row, 3, column, end); break;
    }
}

static void widen(const Product *p)
{
    if (p->wide != p->x)
        for (int64_t i = 0; i < p->rows * p->in; i++)
            p->wide[i] = load_one(p->x, BF16, i);
}

static void by_lanes(const Product *p, int64_t first)
{
#pragma omp parallel for num_threads(p->threads) schedule(static)
    for (int64_t column = first; column < p->out; column += BLOCK) {
        if (p->kind == FP32)
            block(p, FP32, column);
        else if (p->kind == BF16)
            block(p, BF16, column);
        else
            block(p, INT8, column);
    }
}

#ifdef __AMX_BF16__
/* Intel's matrix unit: 16 columns of the weight as they lie, times 16 rows of x whose pairs were laid side by side. It
   adds 16 x 16 x 32 products in 16 cycles, so that reading the weight is what is left. Every row goes the same way,
   however many there are. */
enum { UNIT = 16, DEEP = 32 };

typedef struct {
    uint8_t palette, start, zeros[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) Tiles;

/* Linux lends the unit to a process that asks. */
static int unit_is_ours(void)
{
    static int ours = -1;
    if (ours < 0)
        ours = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return ours;
}

/* Whether x has nothing that bf16 leaves out: states that were widened, say. */
static int is_bf16(const Product *p)
{
    if (p->x_kind == BF16)
        return 1;
    uint32_t rest = 0;
    for (int64_t i = 0; i < p->rows * p->in; i++)
        rest |= ((const uint32_t *)p->x)[i];
    return !(rest & 0xffffu);
}

/* 0, step, .. 15 step */
INLINE __m512i strides(int64_t step)
{
    __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)step));
}

/* Of 16 rows of x, or as many as there are, 32 elements: pairs of each row side by side, [pair][row]. */
static void pack(const Product *p, int64_t row, int64_t at, uint32_t *to)
{
    __mmask16 there = p->rows - row < UNIT ? (__mmask16)((1u << (p->rows - row)) - 1) : 0xffff;
    int64_t size = p->x_kind == BF16 ? 2 : 4;
    __m512i across = strides(p->in * size), nothing = _mm512_setzero_si512();
    const char *x = (const char *)p->x + (row * p->in + at) * size;
    for (int64_t pair = 0; pair < UNIT; pair++, x += 2 * size, to += UNIT) {
        __m512i both = _mm512_mask_i32gather_epi32(nothing, there, across, x, 1);
        if (p->x_kind == FP32) {
            __m512i second = _mm512_mask_i32gather_epi32(nothing, there, across, x + 4, 1);
            both = _mm512_or_si512(_mm512_srli_epi32(both, 16), second);
        }
        _mm512_storeu_si512(to, both);
    }
}

/* 16 columns of up to 16 rows, [column][row], to their places. */
static void give(const Product *p, int64_t column, int64_t row, float *sums)
{
    int64_t count = p->rows - row < UNIT ? p->rows - row : UNIT;
    for (int64_t k = p->in / DEEP * DEEP; k < p->in; k++) /* what the unit has left */
        for (int c = 0; c < UNIT; c++)
            for (int64_t r = 0; r < count; r++)
                sums[c * UNIT + r] = fmaf(p->wide[(row + r) * p->in + k],
                                          load_one(p->weight, BF16, (column + c) * p->in + k), sums[c * UNIT + r]);
    const __m512i across = strides(UNIT);
    vec bias = {0};
    if (p->bias)
        bias = p->bias_kind == FP32 ? load(p->bias, FP32, column) : load(p->bias, BF16, column);
    for (int64_t r = 0; r < count; r++) {
        vec total = (vec)_mm512_i32gather_ps(across, sums + r, 4) + bias;
        save(p->y, p->x_kind, (row + r) * p->out + column, total);
    }
}

static void by_unit(const Product *p, int64_t columns)
{
    int64_t deep = p->in / DEEP, groups = (p->rows + UNIT - 1) / UNIT, bytes = p->in * 2;
#pragma omp parallel num_threads(p->threads)
    {
        Tiles before, mine = {.palette = 1};
        for (int t = 0; t < 6; t++)
            mine.bytes[t] = 64, mine.rows[t] = 16;
        _tile_storeconfig(&before);
        _tile_loadconfig(&mine);
#pragma omp for schedule(static)
        for (int64_t k = 0; k < deep; k++)
            for (int64_t group = 0; group < groups; group++)
                pack(p, group * UNIT, k * DEEP, p->packed + (k * groups + group) * UNIT * UNIT);
#pragma omp for schedule(static)
        for (int64_t column = 0; column < columns; column += UNIT) {
            const char *weight = (const char *)p->weight + column * bytes;
            float sums[UNIT * UNIT];
            for (int64_t group = 0; group < groups; group += 4) {
                int64_t beside = groups - group < 4 ? groups - group : 4;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int64_t k = 0; k < deep; k++) {
                    const uint32_t *x = p->packed + (k * groups + group) * UNIT * UNIT;
                    if (group == 0) /* the columns after these */
                        for (int64_t line = 0; line < UNIT; line++)
                            __builtin_prefetch(weight + UNIT * bytes + (k * UNIT + line) * 64, 0, 2);
                    _tile_loadd(4, weight + k * 2 * DEEP, bytes);
                    _tile_loadd(5, x, 64);
                    _tile_dpbf16ps(0, 4, 5);
                    if (beside > 1) {
                        _tile_loadd(5, x + UNIT * UNIT, 64);
                        _tile_dpbf16ps(1, 4, 5);
                    }
                    if (beside > 2) {
                        _tile_loadd(5, x + 2 * UNIT * UNIT, 64);
                        _tile_dpbf16ps(2, 4, 5);
                    }
                    if (beside > 3) {
                        _tile_loadd(5, x + 3 * UNIT * UNIT, 64);
                        _tile_dpbf16ps(3, 4, 5);
                    }
                }
                _tile_stored(0, sums, 64);
                give(p, column, group * UNIT, sums);
                if (beside > 1) {
                    _tile_stored(1, sums, 64);
                    give(p, column, (group + 1) * UNIT, sums);
                }
                if (beside > 2) {
                    _tile_stored(2, sums, 64);
                    give(p, column, (group + 2) * UNIT, sums);
                }
                if (beside > 3) {
                    _tile_stored(3, sums, 64);
                    give(p, column, (group + 3) * UNIT, sums);
                }
            }
        }
        _tile_loadconfig(&before); /* others of this thread believe it is still theirs */
    }
}
#endif

void product(Product *p)
{
    if (p->x_kind == FP32)
        p->wide = (float *)p->x;
#ifdef __AMX_BF16__
    if (p->kind == BF16 && p->in >= DEEP && p->out >= UNIT && unit_is_ours() && is_bf16(p)) {
        int64_t columns = p->out / UNIT * UNIT;
        if (p->in % DEEP || columns < p->out)
            widen(p);
        by_unit(p, columns);
        by_lanes(p, columns);
        return;
    }
#endif
    widen(p);
    by_lanes(p, 0);
}

/* --- attention ----------------------------------------------------------------------------------------------------- */

typedef struct {
    const void *q, *k, *v;  /* this token's: row b, head h at b * x_row + h * x_head; x_kind */
    void *keys, *values;    /* the cache: row b, group g: [slots, width] at b * row + g * group; kind */
    const float *slopes;    /* [heads] ALiBi, or NULL */
    const int64_t *slots;   /* [rows]: where k and v go, and the last slot that the query sees */
    void *y;                /* [rows, heads, width], x_kind */
    int64_t rows, heads, groups, width, x_row, x_head, row, group, window;
    float scale;
    int32_t kind, x_kind, threads;
} Attention;

#define BATCH 64 /* keys at once: their scores stay in the first cache */
#define WIDEST 512

/* Values of `count` slots, as many vectors of each as stay in registers, in their shares. */
INLINE void mix(const Attention *a, int kind, int64_t at, int64_t count, const float *shares, float *mixed, int vectors)
{
    vec sums[4];
    for (int j = 0; j < vectors; j++)
        sums[j] = *(vec *)(mixed + j * LANES);
    for (int64_t i = 0; i < count; i++, at += a->width)
        for (int j = 0; j < vectors; j++)
            sums[j] = fma_of((vec){0} + shares[i], load(a->values, kind, at + j * LANES), sums[j]);
    for (int j = 0; j < vectors; j++)
        *(vec *)(mixed + j * LANES) = sums[j];
}

INLINE void attend(const Attention *a, int kind, int64_t row, int64_t head)
{
    int64_t width = a->width, last = a->slots[row], first = 0, size = kind == FP32 ? 4 : 2;
    int64_t base = row * a->row + head / (a->heads / a->groups) * a->group;
    float slope = a->slopes ? a->slopes[head] : 0, highest = -INFINITY, weight = 0, q[WIDEST];
    for (int64_t e = 0; e < width; e++)
        q[e] = load_one(a->q, a->x_kind, row * a->x_row + head * a->x_head + e) * a->scale;
    float mixed[WIDEST] = {0}, scores[BATCH];
    if (a->window && last >= a->window)
        first = last - a->window + 1;
    for (int64_t start = first; start <= last; start += BATCH) {
        int64_t count = last + 1 - start < BATCH ? last + 1 - start : BATCH;
        float top = -INFINITY;
        for (int64_t i = 0; i < count; i++) {
            int64_t at = base + (start + i) * width, e = 0;
            vec dot = {0};
            for (int64_t line = 0; line < width * size; line += 64) /* the next step reads them */
                __builtin_prefetch((const char *)a->values + at * size + line);
            for (; e + LANES <= width; e += LANES)
                dot = fma_of(*(const vec *)(q + e), load(a->keys, kind, at + e), dot);
            float score = sum(dot);
            for (; e < width; e++)
                score = fmaf(q[e], load_one(a->keys, kind, at + e), score);
            score = fmaf(-slope, (float)(last - start - i), score);
            scores[i] = score;
            top = score > top ? score : top;
        }
        for (int64_t i = count; i < BATCH; i++)
            scores[i] = -INFINITY;
        if (top > highest) { /* what was summed so far was relative to a lower score */
            float shrink = weight ? expf(highest - top) : 0;
            highest = top;
            weight *= shrink;
            for (int64_t e = 0; e < width; e++)
                mixed[e] *= shrink;
        }
        for (int64_t i = 0; i < BATCH; i += LANES) {
            vec s = exp_of(*(vec *)(scores + i) - highest);
            *(vec *)(scores + i) = s;
        }
        for (int64_t i = 0; i < count; i++)
            weight += scores[i];
        int64_t e = 0;
        for (; e + 4 * LANES <= width; e += 4 * LANES)
            mix(a, kind, base + start * width + e, count, scores, mixed + e, 4);
        for (; e + LANES <= width; e += LANES)
            mix(a, kind, base + start * width + e, count, scores, mixed + e, 1);
        for (; e < width; e++)
            for (int64_t i = 0; i < count; i++)
                mixed[e] = fmaf(scores[i], load_one(a->values, kind, base + (start + i) * width + e), mixed[e]);
    }
    for (int64_t e = 0; e < width; e++)
        store_one(a->y, a->x_kind, (row * a->heads + head) * width + e, mixed[e] / weight);
}

static void keep(const Attention *a, int64_t row, int64_t group)
{
    int64_t from = row * a->x_row + group * a->x_head, to = row * a->row + group * a->group + a->slots[row] * a->width;
    if (a->kind == a->x_kind) {
        int64_t size = a->kind == FP32 ? 4 : 2;
        memcpy((char *)a->keys + to * size, (const char *)a->k + from * size, a->width * size);
        memcpy((char *)a->values + to * size, (const char *)a->v + from * size, a->width * size);
        return;
    }
    for (int64_t e = 0; e < a->width; e++) {
        store_one(a->keys, a->kind, to + e, load_one(a->k, a->x_kind, from + e));
        store_one(a->values, a->kind, to + e, load_one(a->v, a->x_kind, from + e));
    }
}

void attention(const Attention *a)
{
    for (int64_t i = 0; i < a->rows * a->groups; i++)
        keep(a, i / a->groups, i % a->groups);
#pragma omp parallel for num_threads(a->threads) schedule(dynamic, 4)
    for (int64_t i = 0; i < a->rows * a->heads; i++) {
        if (a->kind == FP32)
            attend(a, FP32, i / a->heads, i % a->heads);
        else
            attend(a, BF16, i / a->heads, i % a->heads);
    }
}

/* --- activations --------------------------------------------------------------------------------------------------- */

/* GELU by tanh is x s, s = 1 / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3). Here are e^-|2u| and s of it. */
INLINE vec share_of(vec x, vec *e)
{
    vec twice = x * (0.044715f * 1.5957691216057308f * x * x + 1.5957691216057308f), one = (vec){0} + 1.0f;
    bits below = (bits)(twice < 0);
    *e = exp_of((vec)((bits)twice | 0x80000000u));
    return (vec)(((bits)*e & below) | ((bits)one & ~below)) / (one + *e);
}

INLINE vec gelu_of(vec x)
{
    vec e;
    return x * share_of(x, &e);
}

/* Its slope: s + x s (1 - s) 2u'. */
INLINE vec slope_of(vec x)
{
    vec e, s = share_of(x, &e), rest = e / ((1.0f + e) * (1.0f + e));
    return s + x * rest * (3 * 0.044715f * 1.5957691216057308f * x * x + 1.5957691216057308f);
}

INLINE void gelu_part(const void *x, const void *grad, void *y, int64_t at, int64_t end, int kind)
{
    if (grad)
        for (; at + LANES <= end; at += LANES)
            save(y, kind, at, slope_of(load(x, kind, at)) * load(grad, kind, at));
    else
        for (; at + LANES <= end; at += LANES)
            save(y, kind, at, gelu_of(load(x, kind, at)));
    for (; at < end; at++) {
        vec some = (vec){0} + load_one(x, kind, at);
        store_one(y, kind, at, grad ? slope_of(some)[0] * load_one(grad, kind, at) : gelu_of(some)[0]);
    }
}

#define PART 4096

/* y may be x. With `grad` y becomes grad times the slope at x. */
void gelu_tanh(const void *x, const void *grad, void *y, int64_t count, int32_t kind, int32_t threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < count; at += PART) {
        int64_t end = at + PART < count ? at + PART : count;
        if (kind == FP32)
            gelu_part(x, grad, y, at, end, FP32);
        else
            gelu_part(x, grad, y, at, end, BF16);
    }
}

/* --- choosing a token ---------------------------------------------------------------------------------------------- */

typedef struct {
    const float *logits;   /* [rows, vocabulary] */
    const float *uniforms; /* [rows], in [0, 1) */
    int64_t *tokens;       /* [rows] */
    float *logprobs;       /* [rows]; NaN where a logit is NaN or the highest is not finite */
    int64_t rows, vocabulary;
    float temperature;     /* 0: the likeliest */
    int32_t threads;
} Choice;

#define SUMS 1024

/* What a softmax weighs a logit: nothing at all, too far below the highest. */
INLINE vec weigh(vec x, float highest, float by)
{
    vec below = (x - highest) * by;
    return (vec)((bits)exp_of(below) & (bits)(below > -87.0f));
}

INLINE float weigh_one(float x, float highest, float by)
{
    return weigh((vec){0} + x, highest, by)[0];
}

/* The sums of a few hundred logits first, then the one of them in which the number falls, logit by logit. */
static void choose_one(const Choice *c, int64_t row)
{
    int64_t count = c->vocabulary, whole = count / LANES * LANES, token = 0;
    const float *x = c->logits + row * count;
    float by = c->temperature ? 1 / c->temperature : 1, highest = -INFINITY;
    vec top = (vec){0} - INFINITY;
    bits odd = {0};
    for (int64_t at = 0; at < whole; at += LANES) {
        vec some = load(x, FP32, at);
        bits higher = (bits)(some > top);
        top = (vec)(((bits)some & higher) | ((bits)top & ~higher));
        odd |= (bits)(some != some);
    }
    int broken = 0;
    for (int lane = 0; lane < LANES; lane++) {
        highest = top[lane] > highest ? top[lane] : highest;
        broken |= odd[lane] != 0;
    }
    for (int64_t at = whole; at < count; at++) {
        highest = x[at] > highest ? x[at] : highest;
        broken |= x[at] != x[at];
    }
    c->tokens[row] = 0;
    c->logprobs[row] = NAN;
    if (broken || !isfinite(highest))
        return;
    int64_t size = (count / SUMS / LANES + 1) * LANES, parts = (count + size - 1) / size;
    double sums[SUMS + 1], total = 0;
    for (int64_t part = 0; part < parts; part++) {
        int64_t at = part * size, end = at + size < count ? at + size : count;
        vec some = {0};
        float rest = 0;
        for (; at + LANES <= end; at += LANES)
            some += weigh(load(x, FP32, at), highest, by);
        for (; at < end; at++)
            rest += weigh_one(x[at], highest, by);
        total += sums[part] = sum(some) + rest;
    }
    if (c->temperature) {
        double left = c->uniforms[row] * total;
        int64_t part = 0, last = 0;
        for (int64_t i = 0; i < parts; i++)
            last = sums[i] > 0 ? i : last;
        while (part < last && sums[part] <= left)
            left -= sums[part++];
        int64_t end = part * size + size < count ? part * size + size : count;
        for (int64_t at = part * size; at < end; at++) {
            float share = weigh_one(x[at], highest, by);
            if (share > 0) {
                token = at; /* the last of its part, where rounding leaves the number beyond all of them */
                if (share > left)
                    break;
                left -= share;
            }
        }
    } else {
        while (x[token] != highest)
            token++;
    }
    c->tokens[row] = token;
    c->logprobs[row] = (float)((x[token] - highest) * by - log(total));
}

void choose(const Choice *c)
{
#pragma omp parallel for num_threads(c->threads) schedule(dynamic)
    for (int64_t row = 0; row < c->rows; row++)
        choose_one(c, row);
}
