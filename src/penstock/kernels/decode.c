/* One token per row: attention of one query per row over its cache, and the choice of a token.

   Attention is bound by reading a cache, once: it is fp32 or bf16 and is widened to fp32 in registers; activations come in
   fp32 or bf16 and sums are made in fp32, in the same order whatever the other rows are. */
#include "vectors.h"

/* --- attention ----------------------------------------------------------------------------------------------------- */

typedef struct {
    const void *q, *k, *v;  /* this token's: row b, head h at b * x_row + h * x_head; x_kind */
    void *keys, *values;    /* the cache: row b, group g: [slots, width] at b * row + g * group; kind */
    const float *slopes;    /* [heads] ALiBi, or NULL */
    const float *sinks;     /* [heads] logits of no key, or NULL */
    const int64_t *slots;   /* [rows]: where k and v go, and the last slot that the query sees */
    void *y;                /* [rows, heads, width], x_kind */
    int64_t rows, heads, groups, width, room, x_row, x_head, row, group, window; /* room: the cache's slots */
    float scale, softcap;   /* softcap: scores s become softcap tanh(s / softcap); 0: they stay */
    int32_t kind, x_kind, threads;
} Attention;

#define BATCH 64 /* keys at once: their scores stay in the first cache */
#define WIDEST 512
/* The widest head whose query and sums fit on a thread's stack: cpu_ops sends wider ones another way. */
const int64_t widest = WIDEST;

/* tanh, within two roundings: by its series near 0, where the other form would subtract 1 from almost 1. */
INLINE vec tanh_of(vec x)
{
    vec square = x * x, e = exp_of((vec)((bits)(x + x) | 0x80000000u));
    vec far = (1.0f - e) / (1.0f + e);
    vec near = fma_of(square, (vec){0} - 1382.0f / 155925, (vec){0} + 62.0f / 2835);
    near = fma_of(square, near, (vec){0} - 17.0f / 315);
    near = fma_of(square, near, (vec){0} + 2.0f / 15);
    near = fma_of(square, near, (vec){0} - 1.0f / 3);
    near = fma_of(square * x, near, x);
    bits small = (bits)(square < 0.09f) | (bits)(x != x), sign = (bits)x & 0x80000000u;
    return (vec)(((bits)near & small) | (((bits)far | sign) & ~small));
}

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
    float slope = a->slopes ? a->slopes[head] : 0, q[WIDEST];
    float highest = a->sinks ? a->sinks[head] : -INFINITY, weight = a->sinks ? 1 : 0;
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
        if (a->softcap) {
            for (int64_t i = count; i < BATCH; i++)
                scores[i] = 0;
            for (int64_t i = 0; i < BATCH; i += LANES)
                *(vec *)(scores + i) = tanh_of(*(vec *)(scores + i) * (1 / a->softcap)) * a->softcap;
            top = -INFINITY;
            for (int64_t i = 0; i < count; i++)
                top = scores[i] > top ? scores[i] : top;
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

/* 0; or 1, and nothing is written, where heads are too wide or a row's slot is not in the cache. */
int32_t attention(const Attention *a)
{
    if (a->width > WIDEST)
        return 1;
    for (int64_t row = 0; row < a->rows; row++)
        if (a->slots[row] < 0 || a->slots[row] >= a->room)
            return 1;
    for (int64_t i = 0; i < a->rows * a->groups; i++)
        keep(a, i / a->groups, i % a->groups);
#pragma omp parallel for num_threads(a->threads) schedule(dynamic, 4)
    for (int64_t i = 0; i < a->rows * a->heads; i++) {
        if (a->kind == FP32)
            attend(a, FP32, i / a->heads, i % a->heads);
        else
            attend(a, BF16, i / a->heads, i % a->heads);
    }
    return 0;
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
