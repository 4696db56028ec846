/* The operations of a decoder layer between its products, in bfloat16, for CPUs, each in one pass over memory: residual
   and norm, rotation with the cache write, the gated activation. They know shapes and pointers, nothing else.
   cpu_step.c includes it behind cpu_products.c. */

#include <math.h>

#define SERIAL 4096 /* elements that one thread has done before a second one is awake */
/* The share of a thread: [FROM, TO) */
#define FROM(COUNT) ((int)((int64_t)(COUNT) * thread / threads))
#define TO(COUNT) ((int)((int64_t)(COUNT) * (thread + 1) / threads))

/* ---- norms ----------------------------------------------------------------------------------------------------- */

static inline void normalize(const uint16_t *restrict x, const uint16_t *restrict weight, uint16_t *restrict output,
                             int size, float eps) {
    float squares = 0.0f;
    for (int i = 0; i < size; i++) squares += from_bf16(x[i]) * from_bf16(x[i]);
    float scale = 1.0f / sqrtf(squares / size + eps);
    for (int i = 0; i < size; i++) output[i] = to_bf16(from_bf16(to_bf16(from_bf16(x[i]) * scale)) * from_bf16(weight[i]));
}

static inline void add(const uint16_t *x, const uint16_t *y, uint16_t *sum, int size) {
    for (int i = 0; i < size; i++) sum[i] = to_bf16(from_bf16(x[i]) + from_bf16(y[i]));
}

/* x, residual (or null) [rows, size] -> total = x + residual (unless null), output = norm(total) * weight. */
void add_rms_norm(const uint16_t *x, const uint16_t *residual, const uint16_t *weight, uint16_t *total,
                  uint16_t *output, int rows, int size, float eps) {
#pragma omp parallel for if ((int64_t)rows * size > SERIAL)
    for (int row = 0; row < rows; row++) {
        int64_t at = (int64_t)row * size;
        if (residual) add(x + at, residual + at, total + at, size);
        normalize(residual ? total + at : x + at, weight, output + at, size, eps);
    }
}

/* ---- rotation and the cache ------------------------------------------------------------------------------------ */

static inline void turn(uint16_t *restrict head, const uint16_t *weight, const float *restrict cos,
                        const float *restrict sin, int dim, float eps) {
    const int half = dim / 2; /* the first half of the sines is negated already */
    uint16_t copy[dim];
    memcpy(copy, head, sizeof copy);
    if (weight) {
        normalize(copy, weight, head, dim, eps);
        memcpy(copy, head, sizeof copy);
    }
    const uint16_t *restrict low = copy, *restrict high = copy + half;
    for (int i = 0; i < half; i++) head[i] = to_bf16(from_bf16(low[i]) * cos[i] + from_bf16(high[i]) * sin[i]);
    for (int i = 0; i < half; i++)
        head[half + i] = to_bf16(from_bf16(high[i]) * cos[half + i] + from_bf16(low[i]) * sin[half + i]);
}

/* Tokens [from, to) of `rotate_and_store`. */
static void rotate_rows(uint16_t *qkv, const uint16_t *weight, const float *cos, const float *sin, const int64_t *slots,
                        uint16_t *keys, uint16_t *values, int from, int to, int heads, int kv_heads, int dim,
                        float eps) {
    const int64_t row = (int64_t)(heads + 2 * kv_heads) * dim, cached = (int64_t)kv_heads * dim;
    for (int token = from; token < to; token++) {
        uint16_t *start = qkv + token * row;
        for (int head = 0; head < heads + kv_heads; head++) {
            const uint16_t *normed = weight ? weight + (int64_t)head * dim : 0;
            turn(start + (int64_t)head * dim, normed, cos + (int64_t)token * dim, sin + (int64_t)token * dim, dim, eps);
        }
        memcpy(keys + slots[token] * cached, start + (int64_t)heads * dim, cached * sizeof *keys);
        memcpy(values + slots[token] * cached, start + (int64_t)(heads + kv_heads) * dim, cached * sizeof *values);
    }
}

/* qkv [tokens, heads + 2 * kv_heads, dim], queries and keys normed (weight [heads + kv_heads, dim] or null) and
   rotated (cos, sin [tokens, dim]) in place; keys and values also go to the caches' rows of kv_heads * dim elements
   at `slots` [tokens]. */
void rotate_and_store(uint16_t *qkv, const uint16_t *weight, const float *cos, const float *sin, const int64_t *slots,
                      uint16_t *keys, uint16_t *values, int tokens, int heads, int kv_heads, int dim, float eps) {
    const int64_t row = (int64_t)(heads + 2 * kv_heads) * dim;
#pragma omp parallel for if (tokens * row > SERIAL)
    for (int token = 0; token < tokens; token++)
        rotate_rows(qkv, weight, cos, sin, slots, keys, values, token, token + 1, heads, kv_heads, dim, eps);
}

/* ---- activation ------------------------------------------------------------------------------------------------ */

static inline void activate(const uint16_t *restrict gate, const uint16_t *restrict up, uint16_t *restrict output,
                            int size) {
    for (int i = 0; i < size; i++) {
        float x = from_bf16(gate[i]);
        output[i] = to_bf16(from_bf16(to_bf16(x / (1.0f + expf(-x)))) * from_bf16(up[i]));
    }
}

/* gate_up [rows, 2 * size], gates first -> output = silu(gates) * rest [rows, size]. */
void silu_mul(const uint16_t *gate_up, uint16_t *output, int rows, int size) {
#pragma omp parallel for if ((int64_t)rows * size > SERIAL)
    for (int row = 0; row < rows; row++) {
        const uint16_t *gate = gate_up + 2 * (int64_t)row * size;
        activate(gate, gate + size, output + (int64_t)row * size, size);
    }
}
