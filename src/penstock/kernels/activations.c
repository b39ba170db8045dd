/* What a block does beside its products: RMSNorm, rotary positions, activations and gates, and sums. A step of decoding is
   short, and each of these is one pass here and many in torch. Results are rounded where torch rounds, which whole rows go
   through: an answer's log-probabilities are those that training will see. */
#include "vectors.h"

#define PART 4096

/* As a tensor of that kind keeps it. */
INLINE vec kept(vec x, int kind)
{
    return kind == FP32 ? x : (vec)(__builtin_convertvector(rounded(x), bits) << 16);
}

INLINE float kept_one(float x, int kind)
{
    float y = x;
    if (kind == BF16) {
        uint16_t half;
        store_one(&half, BF16, 0, x);
        y = load_one(&half, BF16, 0);
    }
    return y;
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

/* sums += terms. */
void add_bf16(float *restrict sums, const uint16_t *restrict terms, int64_t count, int32_t threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < count; at += PART) {
        int64_t end = at + PART < count ? at + PART : count, i = at;
        for (; i + LANES <= end; i += LANES)
            *(vec *)(sums + i) += load(terms, BF16, i);
        for (; i < end; i++)
            sums[i] += load_one(terms, BF16, i);
    }
}

/* x s of silu: s = 1 / (1 + e^-x). */
INLINE vec silu_of(vec x)
{
    vec e = exp_of((vec)((bits)x | 0x80000000u)), one = (vec){0} + 1.0f;
    bits below = (bits)(x < 0);
    return x * (vec)(((bits)e & below) | ((bits)one & ~below)) / (one + e);
}

INLINE vec gate_of(vec x, int gelu)
{
    return gelu ? gelu_of(x) : silu_of(x);
}

INLINE void gate_part(const void *x, void *y, int64_t row, int64_t at, int64_t end, int64_t width, int gelu, int kind)
{
    int64_t gate = row * 2 * width, up = gate + width, to = row * width;
    for (; at + LANES <= end; at += LANES)
        save(y, kind, to + at, kept(gate_of(load(x, kind, gate + at), gelu), kind) * load(x, kind, up + at));
    for (; at < end; at++) {
        vec share = kept(gate_of((vec){0} + load_one(x, kind, gate + at), gelu), kind);
        store_one(y, kind, to + at, share[0] * load_one(x, kind, up + at));
    }
}

/* x [rows, 2 width], the gate first -> y [rows, width]. */
void gated(const void *x, void *y, int64_t rows, int64_t width, int32_t gelu, int32_t kind, int32_t threads)
{
    int64_t parts = (width + PART - 1) / PART;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > 2 * PART)
    for (int64_t i = 0; i < rows * parts; i++) {
        int64_t row = i / parts, at = i % parts * PART, end = at + PART < width ? at + PART : width;
        if (kind == FP32)
            gelu ? gate_part(x, y, row, at, end, width, 1, FP32) : gate_part(x, y, row, at, end, width, 0, FP32);
        else
            gelu ? gate_part(x, y, row, at, end, width, 1, BF16) : gate_part(x, y, row, at, end, width, 0, BF16);
    }
}

/* --- vectors of a head or a state ---------------------------------------------------------------------------------- */

typedef struct {
    const void *x, *weight; /* row b, head h at b * x_row + h * x_head, x_kind; weight [width], kind */
    void *y;                /* the same by y_row and y_head, x_kind; may be x */
    int64_t rows, heads, width, x_row, x_head, y_row, y_head;
    float eps, offset;      /* offset: added to the weight */
    int32_t kind, x_kind, threads;
} RmsNorm;

INLINE void norm_one(const RmsNorm *n, int kind, int x_kind, int64_t from, int64_t to)
{
    vec squares = {0};
    int64_t e = 0;
    float total;
    for (; e + LANES <= n->width; e += LANES) {
        vec x = load(n->x, x_kind, from + e);
        squares = fma_of(x, x, squares);
    }
    total = sum(squares);
    for (; e < n->width; e++)
        total = fmaf(load_one(n->x, x_kind, from + e), load_one(n->x, x_kind, from + e), total);
    float scale = 1 / sqrtf(total / n->width + n->eps);
    for (e = 0; e + LANES <= n->width; e += LANES)
        save(n->y, x_kind, to + e, load(n->x, x_kind, from + e) * scale * (load(n->weight, kind, e) + n->offset));
    for (; e < n->width; e++)
        store_one(n->y, x_kind, to + e,
                  load_one(n->x, x_kind, from + e) * scale * (load_one(n->weight, kind, e) + n->offset));
}

void rms_norm(const RmsNorm *n)
{
#pragma omp parallel for num_threads(n->threads) schedule(static) if (n->rows * n->heads * n->width > 8 * PART)
    for (int64_t i = 0; i < n->rows * n->heads; i++) {
        int64_t row = i / n->heads, head = i % n->heads;
        int64_t from = row * n->x_row + head * n->x_head, to = row * n->y_row + head * n->y_head;
        if (n->x_kind == FP32 && n->kind == FP32)
            norm_one(n, FP32, FP32, from, to);
        else if (n->x_kind == FP32)
            norm_one(n, BF16, FP32, from, to);
        else if (n->kind == FP32)
            norm_one(n, FP32, BF16, from, to);
        else
            norm_one(n, BF16, BF16, from, to);
    }
}

typedef struct {
    const void *x, *weight, *grad; /* x and grad [rows, width], x_kind; weight [width], kind */
    void *back;                    /* the gradient of x, x_kind; may be grad */
    float *slopes;                 /* [threads, width], zeros: what each thread's rows give to that of the weight, or NULL */
    int64_t rows, width;
    float eps, offset;
    int32_t kind, x_kind, threads;
} RmsNormBack;

/* With r = 1 / rms(x) and g = grad (weight + offset): r g - x r^3 (g . x) / width. */
INLINE void norm_back_one(const RmsNormBack *n, int kind, int x_kind, int64_t at, float *slopes)
{
    vec squares = {0}, products = {0};
    int64_t e = 0;
    for (; e + LANES <= n->width; e += LANES) {
        vec x = load(n->x, x_kind, at + e);
        squares = fma_of(x, x, squares);
        products = fma_of(x * (load(n->weight, kind, e) + n->offset), load(n->grad, x_kind, at + e), products);
    }
    float total = sum(squares), product = sum(products);
    for (; e < n->width; e++) {
        float x = load_one(n->x, x_kind, at + e);
        total = fmaf(x, x, total);
        product = fmaf(x * (load_one(n->weight, kind, e) + n->offset), load_one(n->grad, x_kind, at + e), product);
    }
    float scale = 1 / sqrtf(total / n->width + n->eps), along = scale * scale * scale * product / n->width;
    for (e = 0; e + LANES <= n->width; e += LANES) {
        vec x = load(n->x, x_kind, at + e), grad = load(n->grad, x_kind, at + e);
        save(n->back, x_kind, at + e, grad * (load(n->weight, kind, e) + n->offset) * scale - x * along);
        if (slopes)
            *(vec *)(slopes + e) = fma_of(grad, x * scale, *(const vec *)(slopes + e));
    }
    for (; e < n->width; e++) {
        float x = load_one(n->x, x_kind, at + e), grad = load_one(n->grad, x_kind, at + e);
        store_one(n->back, x_kind, at + e, grad * (load_one(n->weight, kind, e) + n->offset) * scale - x * along);
        if (slopes)
            slopes[e] = fmaf(grad, x * scale, slopes[e]);
    }
}

void rms_norm_back(const RmsNormBack *n)
{
#pragma omp parallel for num_threads(n->threads) schedule(static) if (n->rows * n->width > 8 * PART)
    for (int64_t thread = 0; thread < n->threads; thread++) {
        float *slopes = n->slopes ? n->slopes + thread * n->width : NULL;
        for (int64_t row = n->rows * thread / n->threads; row < n->rows * (thread + 1) / n->threads; row++) {
            if (n->x_kind == FP32 && n->kind == FP32)
                norm_back_one(n, FP32, FP32, row * n->width, slopes);
            else if (n->x_kind == FP32)
                norm_back_one(n, BF16, FP32, row * n->width, slopes);
            else if (n->kind == FP32)
                norm_back_one(n, FP32, BF16, row * n->width, slopes);
            else
                norm_back_one(n, BF16, BF16, row * n->width, slopes);
        }
    }
}

typedef struct {
    void *x;                /* row b, head h at b * x_row + h * x_head: turned in place */
    const void *cos, *sin;  /* [rows or 1, turned], x's kind */
    int64_t rows, heads, turned, x_row, x_head, table_row;
    int32_t kind, threads;
} Rotation;

INLINE void turn(const Rotation *r, int kind, int64_t at, int64_t table)
{
    int64_t half = r->turned / 2, e = 0;
    for (; e + LANES <= half; e += LANES) {
        vec a = load(r->x, kind, at + e), b = load(r->x, kind, at + half + e);
        vec cos = load(r->cos, kind, table + e), sin = load(r->sin, kind, table + e);
        save(r->x, kind, at + e, kept(a * cos, kind) - kept(b * sin, kind));
        cos = load(r->cos, kind, table + half + e), sin = load(r->sin, kind, table + half + e);
        save(r->x, kind, at + half + e, kept(b * cos, kind) + kept(a * sin, kind));
    }
    for (; e < half; e++) {
        float a = load_one(r->x, kind, at + e), b = load_one(r->x, kind, at + half + e);
        float cos = load_one(r->cos, kind, table + e), sin = load_one(r->sin, kind, table + e);
        store_one(r->x, kind, at + e, kept_one(a * cos, kind) - kept_one(b * sin, kind));
        cos = load_one(r->cos, kind, table + half + e), sin = load_one(r->sin, kind, table + half + e);
        store_one(r->x, kind, at + half + e, kept_one(b * cos, kind) + kept_one(a * sin, kind));
    }
}

void rotate(const Rotation *r)
{
#pragma omp parallel for num_threads(r->threads) schedule(static) if (r->rows * r->heads * r->turned > 8 * PART)
    for (int64_t i = 0; i < r->rows * r->heads; i++) {
        int64_t row = i / r->heads, at = row * r->x_row + i % r->heads * r->x_head;
        if (r->kind == FP32)
            turn(r, FP32, at, row * r->table_row);
        else
            turn(r, BF16, at, row * r->table_row);
    }
}
