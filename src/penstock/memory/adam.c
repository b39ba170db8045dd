/* AdamW in one pass: every number is read once and written once. adam.py says the same in torch operations.

   The roundings are those of torch's fused kernel, fused multiply-adds included, so that both give the same bits. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    float decay;     /* 1 - lr * weight_decay */
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
    return weight * r.decay + -r.step_size * m / (sqrtf(v) / r.root + r.eps);
}

void adamw_fp32(float *restrict weights, float *restrict exp_avg, float *restrict exp_avg_sq,
                const float *restrict gradients, int64_t count, const Rule *rule, int threads)
{
    Rule r = *rule;
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++)
        weights[i] = move(weights[i], gradients[i], exp_avg + i, exp_avg_sq + i, r);
}

/* The split master: see join and split in adam.py. */
void adamw_bf16(uint16_t *restrict weights, int16_t *restrict remainder, float *restrict exp_avg,
                float *restrict exp_avg_sq, const uint16_t *restrict gradients, int64_t count, const Rule *rule, int threads)
{
    Rule r = *rule;
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++) {
        float master = as_float(((uint32_t)weights[i] << 16) + (uint32_t)(int32_t)remainder[i]);
        float gradient = as_float((uint32_t)gradients[i] << 16);
        uint32_t bits = as_bits(move(master, gradient, exp_avg + i, exp_avg_sq + i, r));
        uint32_t high = (bits + 0x8000u) >> 16;
        weights[i] = (uint16_t)high;
        remainder[i] = (int16_t)(bits - (high << 16));
    }
}
