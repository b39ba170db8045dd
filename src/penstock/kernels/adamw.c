/* AdamW in one pass: every number is read once and written once. adamw.py says the same in torch operations.

   The roundings are those of torch's fused kernel, fused multiply-adds included, so that both give the same bits. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    float lerp;      /* 1 - beta1 */
    float beta2;
    float square;    /* 1 - beta2 */
    float step_size; /* lr / (1 - beta1^t) */
    float root;      /* sqrt(1 - beta2^t) */
    float eps;
    float divisor;   /* of gradients: 1 / the clip factor */
} Rule;

static inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, sizeof x); return x; }
static inline uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, sizeof x); return bits; }

static inline float move(float weight, float gradient, float *restrict exp_avg, float *restrict exp_avg_sq, Rule r)
{
    float g = gradient / r.divisor, m = *exp_avg, v = *exp_avg_sq;
    m = r.lerp < 0.5f ? fmaf(r.lerp, g - m, m) : fmaf(r.lerp - 1.0f, g - m, g);
    v = fmaf(r.square * g, g, v * r.beta2);
    *exp_avg = m;
    *exp_avg_sq = v;
    return weight + -r.step_size * m / (sqrtf(v) / r.root + r.eps);
}

void adamw_fp32(float *restrict weights, float *restrict exp_avg, float *restrict exp_avg_sq,
                const float *restrict gradients, int64_t count, const Rule *rule, int threads)
{
    Rule r = *rule;
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++)
        weights[i] = move(weights[i], gradients[i], exp_avg + i, exp_avg_sq + i, r);
}

/* The split master: see join and split in adamw.py. `WIDEN` makes a float of a gradient as it is stored. */
#define SPLIT_MASTER(NAME, STORED, WIDEN)                                                                              \
    void NAME(uint16_t *restrict weights, int16_t *restrict remainder, float *restrict exp_avg,                        \
              float *restrict exp_avg_sq, const STORED *restrict gradients, int64_t count, const Rule *rule,           \
              int threads)                                                                                             \
    {                                                                                                                  \
        Rule r = *rule;                                                                                                \
        _Pragma("omp parallel for simd num_threads(threads) schedule(static)")                                         \
        for (int64_t i = 0; i < count; i++)                                                                            \
            move_split(weights + i, remainder + i, WIDEN(gradients[i]), exp_avg + i, exp_avg_sq + i, r);               \
    }

static inline float from_bf16(uint16_t x) { return as_float((uint32_t)x << 16); }
static inline float from_fp32(float x) { return x; }

static inline void move_split(uint16_t *restrict weight, int16_t *restrict remainder, float gradient,
                              float *restrict exp_avg, float *restrict exp_avg_sq, Rule r)
{
    float master = as_float(((uint32_t)*weight << 16) + (uint32_t)(int32_t)*remainder);
    uint32_t bits = as_bits(move(master, gradient, exp_avg, exp_avg_sq, r));
    uint32_t high = (bits + 0x8000u) >> 16;
    *weight = (uint16_t)high;
    *remainder = (int16_t)(bits - (high << 16));
}

SPLIT_MASTER(adamw_bf16, uint16_t, from_bf16)
SPLIT_MASTER(adamw_bf16_fp32, float, from_fp32)

/* Moments in 8 bits, block by block: see adamw.py. Shares and codes are its tables, of first and second moments. */
enum { BLOCK = 256, SIGN = 128, ONE = 0x3F80 };
typedef struct { const float *first, *second; const uint8_t *codes_first, *codes_second; } Tables;

static inline uint32_t rounded(float x) /* to bf16, to nearest, ties to even, as torch does */
{
    uint32_t bits = as_bits(x);
    return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

static inline uint32_t share_of(float x) /* the place of a share in the tables of codes, which end with that of 1 */
{
    uint32_t place = rounded(x);
    return place < ONE ? place : ONE;
}

static inline void open_block(const uint8_t *m, const uint8_t *v, float m_scale, float v_scale, float *restrict exp_avg,
                              float *restrict exp_avg_sq, Tables t)
{
    for (int i = 0; i < BLOCK; i++) {
        float share = t.first[m[i] & (SIGN - 1)];
        exp_avg[i] = (m[i] & SIGN ? -share : share) * m_scale;
        exp_avg_sq[i] = t.second[v[i]] * v_scale;
    }
}

static inline void close_block(uint8_t *m, uint8_t *v, float *m_scale, float *v_scale, const float *restrict exp_avg,
                               const float *restrict exp_avg_sq, Tables t)
{
    float most_m = 0, most_v = 0;
    for (int i = 0; i < BLOCK; i++) {
        float size = fabsf(exp_avg[i]);
        most_m = size > most_m || size != size ? size : most_m; /* a NaN stays: the whole block becomes one */
        most_v = exp_avg_sq[i] > most_v || exp_avg_sq[i] != exp_avg_sq[i] ? exp_avg_sq[i] : most_v;
    }
    *m_scale = most_m;
    *v_scale = most_v;
    float by_m = most_m > 0 ? most_m : 1, by_v = most_v > 0 ? most_v : 1;
    for (int i = 0; i < BLOCK; i++) {
        m[i] = t.codes_first[share_of(fabsf(exp_avg[i]) / by_m)] + (exp_avg[i] < 0 ? SIGN : 0);
        v[i] = t.codes_second[share_of(exp_avg_sq[i] / by_v)];
    }
}

void adamw8_fp32(float *restrict weights, uint8_t *m, uint8_t *v, float *m_scale, float *v_scale,
                 const float *restrict gradients, const float *first, const float *second,
                 const uint8_t *codes_first, const uint8_t *codes_second, int64_t count, const Rule *rule, int threads)
{
    Rule r = *rule;
    Tables t = {first, second, codes_first, codes_second};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < count / BLOCK; b++) {
        float exp_avg[BLOCK], exp_avg_sq[BLOCK];
        int64_t at = b * BLOCK;
        open_block(m + at, v + at, m_scale[b], v_scale[b], exp_avg, exp_avg_sq, t);
#pragma omp simd
        for (int i = 0; i < BLOCK; i++)
            weights[at + i] = move(weights[at + i], gradients[at + i], exp_avg + i, exp_avg_sq + i, r);
        close_block(m + at, v + at, m_scale + b, v_scale + b, exp_avg, exp_avg_sq, t);
    }
}

#define SPLIT_MASTER_8(NAME, STORED, WIDEN)                                                                            \
    void NAME(uint16_t *restrict weights, int16_t *restrict remainder, uint8_t *m, uint8_t *v, float *m_scale,         \
              float *v_scale, const STORED *restrict gradients, const float *first, const float *second,               \
              const uint8_t *codes_first, const uint8_t *codes_second, int64_t count, const Rule *rule, int threads)   \
    {                                                                                                                  \
        Rule r = *rule;                                                                                                \
        Tables t = {first, second, codes_first, codes_second};                                                         \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                              \
        for (int64_t b = 0; b < count / BLOCK; b++) {                                                                  \
            float exp_avg[BLOCK], exp_avg_sq[BLOCK];                                                                   \
            int64_t at = b * BLOCK;                                                                                    \
            open_block(m + at, v + at, m_scale[b], v_scale[b], exp_avg, exp_avg_sq, t);                                \
            _Pragma("omp simd")                                                                                        \
            for (int i = 0; i < BLOCK; i++)                                                                            \
                move_split(weights + at + i, remainder + at + i, WIDEN(gradients[at + i]), exp_avg + i,                \
                           exp_avg_sq + i, r);                                                                         \
            close_block(m + at, v + at, m_scale + b, v_scale + b, exp_avg, exp_avg_sq, t);                             \
        }                                                                                                              \
    }

SPLIT_MASTER_8(adamw8_bf16, uint16_t, from_bf16)
SPLIT_MASTER_8(adamw8_bf16_fp32, float, from_fp32)

/* --- the norm -------------------------------------------------------------------------------------------------------- */

#define SPAN 65536

/* Sums of squares, one per SPAN of gradients: the same bits however many threads there are. */
#define SQUARES(NAME, STORED, WIDEN)                                                                                   \
    void NAME(const STORED *restrict gradients, int64_t count, double *sums, int threads)                              \
    {                                                                                                                  \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                              \
        for (int64_t start = 0; start < count; start += SPAN) {                                                        \
            int64_t end = start + SPAN < count ? start + SPAN : count;                                                 \
            double total = 0;                                                                                          \
            for (int64_t at = start; at < end; at += 1024) {                                                           \
                int64_t stop = at + 1024 < end ? at + 1024 : end;                                                      \
                float some = 0;                                                                                        \
                _Pragma("omp simd reduction(+ : some)")                                                                \
                for (int64_t i = at; i < stop; i++)                                                                    \
                    some += WIDEN(gradients[i]) * WIDEN(gradients[i]);                                                 \
                total += some;                                                                                         \
            }                                                                                                          \
            sums[start / SPAN] = total;                                                                                \
        }                                                                                                              \
    }

SQUARES(squares_bf16, uint16_t, from_bf16)
SQUARES(squares_fp32, float, from_fp32)
