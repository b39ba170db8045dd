/* Products of few rows with a weight.

   They are bound by reading the weight, once: it is fp32, bf16, or int8 or fp8 with a scale per row, and is widened to fp32 in
   registers, or fed to the matrix unit as it lies; sums are made in fp32. Every output is summed in the same order
   whatever the other rows are, so a row's numbers do not depend on its company. */
#include "vectors.h"
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef struct {
    const void *x;       /* [rows, in], x_kind */
    const void *weight;  /* [out, in], kind */
    const void *bias;    /* [out], bias_kind, or NULL */
    const float *scales; /* [out], INT8 and FP8 only */
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
    int64_t size = kind == FP32 ? 4 : kind == BF16 ? 2 : 1, ahead = size == 1 ? 2 : 1;
    /* Each group of rows sends for its share of the block after this one, so that reading goes on while all compute. */
    const char *next = (const char *)p->weight + (column + BLOCK * ahead) * in * size;
    int64_t groups = (p->rows + 3) / 4, from = in * (row / 4) / groups, to = in * (row / 4 + 1) / groups;
    for (; k + LANES <= in; k += LANES) {
        vec w[8];
        for (int c = 0; c < columns; c++)
            w[c] = load(p->weight, kind, (column + c) * in + k);
        if (k >= from && k < to)
            for (int64_t line = 0; line < columns * LANES * size; line += 64)
                __builtin_prefetch(next + k * columns * size + line, 0, 2);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++)
                sums[r][c] = fma_of(*(const vec *)(x + r * in + k), w[c], sums[r][c]);
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            float total = sum(sums[r][c]);
            for (int64_t rest = k; rest < in; rest++)
                total = fmaf(x[r * in + rest], load_one(p->weight, kind, (column + c) * in + rest), total);
            if (size == 1)
                total *= p->scales[column + c] * (kind == FP8 ? FP8_UNIT : 1);
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
        else if (p->kind == INT8)
            block(p, INT8, column);
        else
            block(p, FP8, column);
    }
}

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
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
#endif

#ifdef __AVX512BF16__
/* Numbers of bf16 in pairs, 32 at once: twice as many products as in fp32, and nothing to widen. Here a tile has up to 4
   rows and 4 columns. */
enum { PAIRS = 32, ACROSS = 4 };

INLINE __m512bh pairs_at(const uint16_t *from, int64_t there)
{
    if (there >= PAIRS)
        return (__m512bh)_mm512_loadu_si512(from);
    return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1u << there) - 1), from);
}

INLINE void pair_step(const uint16_t *x, const uint16_t *w, int64_t in, int64_t there, int rows, int columns,
                      const uint16_t *next, __m512 sums[4][ACROSS])
{
    __m512bh weights[ACROSS];
    for (int c = 0; c < columns; c++) {
        weights[c] = pairs_at(w + c * in, there);
        if (next)
            __builtin_prefetch(next + c * PAIRS, 0, 2);
    }
    for (int r = 0; r < rows; r++) {
        __m512bh left = pairs_at(x + r * in, there);
        for (int c = 0; c < columns; c++)
            sums[r][c] = _mm512_dpbf16_ps(sums[r][c], left, weights[c]);
    }
}

/* A row's sums, in the order of `sum` whatever `columns` is, to their places. */
INLINE void pair_give(const Product *p, int64_t row, int64_t column, int columns, const __m512 *sums)
{
    float totals[ACROSS];
    if (columns == ACROSS) {
        __m128 a = quarter((vec)sums[0]), b = quarter((vec)sums[1]);
        __m128 c = quarter((vec)sums[2]), d = quarter((vec)sums[3]);
        __m128 first = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        __m128 second = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
        _mm_storeu_ps(totals, _mm_add_ps(_mm_movelh_ps(first, second), _mm_movehl_ps(second, first)));
    } else {
        for (int c = 0; c < columns; c++)
            totals[c] = sum((vec)sums[c]);
    }
    for (int c = 0; c < columns; c++) {
        if (p->bias)
            totals[c] += load_one(p->bias, p->bias_kind, column + c);
        store_one(p->y, p->x_kind, row * p->out + column + c, totals[c]);
    }
}

INLINE void pair_tile(const Product *p, int64_t row, int64_t column, int rows, int columns)
{
    int64_t in = p->in, k = 0;
    const uint16_t *x = (const uint16_t *)p->packed + row * in, *w = (const uint16_t *)p->weight + column * in;
    __m512 sums[4][ACROSS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            sums[r][c] = _mm512_setzero_ps();
    const uint16_t *next = w + BLOCK * in; /* as in `tile` */
    int64_t groups = (p->rows + 3) / 4, from = in * (row / 4) / groups, to = in * (row / 4 + 1) / groups;
    for (; k + PAIRS <= from; k += PAIRS)
        pair_step(x + k, w + k, in, PAIRS, rows, columns, NULL, sums);
    for (; k < to && k + PAIRS <= in; k += PAIRS)
        pair_step(x + k, w + k, in, PAIRS, rows, columns, next + k * columns, sums);
    for (; k + PAIRS <= in; k += PAIRS)
        pair_step(x + k, w + k, in, PAIRS, rows, columns, NULL, sums);
    if (k < in)
        pair_step(x + k, w + k, in, in - k, rows, columns, NULL, sums);
    for (int r = 0; r < rows; r++)
        pair_give(p, row + r, column, columns, sums[r]);
}

INLINE void pair_rows(const Product *p, int64_t row, int rows, int64_t column, int64_t end)
{
    for (; column + ACROSS <= end; column += ACROSS)
        pair_tile(p, row, column, rows, ACROSS);
    for (; column < end; column++)
        pair_tile(p, row, column, rows, 1);
}

static void by_pairs(const Product *p)
{
    Product mine = *p;
    if (p->x_kind == BF16)
        mine.packed = (uint32_t *)p->x;
    else
        for (int64_t i = 0; i < p->rows * p->in; i++)
            ((uint16_t *)p->packed)[i] = ((const uint16_t *)p->x)[2 * i + 1];
    p = &mine;
#pragma omp parallel for num_threads(p->threads) schedule(static)
    for (int64_t column = 0; column < p->out; column += BLOCK) {
        int64_t end = column + BLOCK < p->out ? column + BLOCK : p->out, row = 0;
        for (; row + 4 <= p->rows; row += 4)
            pair_rows(p, row, 4, column, end);
        switch (p->rows - row) {
        case 1: pair_rows(p, row, 1, column, end); break;
        case 2: pair_rows(p, row, 2, column, end); break;
        case 3: pair_rows(p, row, 3, column, end); break;
        }
    }
}
#endif

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

/* Whether products of bf16 numbers have instructions of their own here. */
int32_t has_bf16(void)
{
#ifdef __AMX_BF16__
    if (unit_is_ours())
        return 1;
#endif
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

void product(Product *p)
{
    if (p->x_kind == FP32)
        p->wide = (float *)p->x;
#ifdef __AMX_BF16__
    /* 16 rows are gathered by offsets of 32 bits */
    if (p->kind == BF16 && p->in >= DEEP && p->in < 1 << 24 && p->out >= UNIT && unit_is_ours() && is_bf16(p)) {
        int64_t columns = p->out / UNIT * UNIT;
        if (p->in % DEEP || columns < p->out)
            widen(p);
        by_unit(p, columns);
        by_lanes(p, columns);
        return;
    }
#endif
#ifdef __AVX512BF16__
    if (p->kind == BF16 && is_bf16(p)) {
        by_pairs(p);
        return;
    }
#endif
    widen(p);
    by_lanes(p, 0);
}
