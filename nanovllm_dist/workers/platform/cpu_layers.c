/* The operations of a decoder layer in bfloat16, for CPUs, each in one pass over memory: a product,
   residual and norm, rotation with the cache write, the gated activation. They know shapes and pointers, nothing else.

   bfloat16 is uint16_t here. Values are rounded where a chain of torch's operators would round them. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define PANEL 64  /* outputs of a weight that lie together, in pairs of inputs: [inputs / 2, PANEL, 2] */
#define LANES 16  /* outputs of one vector */
#define TILE_ROWS 6 /* with four vectors of outputs, as many sums as there are registers for */
#define LINE 32   /* elements of a cache line */
#define SERIAL 4096 /* elements that one thread has done before a second one is awake */

/* The share of a thread: [FROM, TO) */
#define FROM(COUNT) ((int)((int64_t)(COUNT) * thread / threads))
#define TO(COUNT) ((int)((int64_t)(COUNT) * (thread + 1) / threads))

typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bf16(float value) { /* round to nearest even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0; /* NaN, which -ffast-math does not compare */
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* ---- products -------------------------------------------------------------------------------------------------- */

static inline floats dot(floats sum, const uint16_t *weight, uint32_t pair) {
    words weights;
    memcpy(&weights, weight, sizeof weights);
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32((int)pair));
#else
    return sum + (floats)(weights << 16) * from_bf16((uint16_t)pair) + (floats)(weights & 0xffff0000u) * from_bf16(pair >> 16);
#endif
}

/* `ahead`: as many cache lines as there are pairs of inputs, which a later tile will read. */
static inline __attribute__((always_inline)) void tile(const int rows, const int vectors, const uint16_t *input,
                                                       int inputs, const uint16_t *weight, const uint16_t *bias,
                                                       uint16_t *output, int outputs, const uint16_t *ahead) {
    floats sum[TILE_ROWS][PANEL / LANES];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = (floats){0};
    for (int k = 0; k < inputs; k += 2, weight += 2 * PANEL, ahead += LINE) {
        __builtin_prefetch(ahead, 0, 2);
        for (int r = 0; r < rows; r++) {
            uint32_t pair;
            memcpy(&pair, input + (int64_t)r * inputs + k, 4);
            for (int v = 0; v < vectors; v++) sum[r][v] = dot(sum[r][v], weight + 2 * LANES * v, pair);
        }
    }
    for (int r = 0; r < rows; r++) {
        float flat[PANEL];
        memcpy(flat, sum[r], vectors * sizeof(floats));
        if (bias)
            for (int i = 0; i < vectors * LANES; i++) flat[i] += from_bf16(bias[i]);
        for (int i = 0; i < vectors * LANES; i++) output[(int64_t)r * outputs + i] = to_bf16(flat[i]);
    }
}

#define TILES(ROWS)                                                       \
    case ROWS:                                                            \
        if (whole) tile(ROWS, 4, x, inputs, at, biased, target, outputs, ahead); \
        else tile(ROWS, 2, x, inputs, at, biased, target, outputs, ahead);       \
        break;

/* Outputs [half, end) of `panel_linear`, counted in half panels. `next`: panels from one to that which this thread is
   likely to have next. */
static void some_outputs(const uint16_t *input, const uint16_t *weight, const uint16_t *bias, uint16_t *output,
                         int rows, int inputs, int outputs, int half, int end, int next) {
    const int64_t panel = (int64_t)((inputs + 31) / 32 * 32) * PANEL;
    while (half < end) { /* whole panels where that is possible */
        int whole = half % 2 == 0 && half + 2 <= end;
        int first = half * (PANEL / 2);
        const uint16_t *at = weight + half / 2 * panel + half % 2 * PANEL;
        const uint16_t *biased = bias ? bias + first : 0;
        for (int row = 0; row < rows; row += TILE_ROWS) {
            const uint16_t *x = input + (int64_t)row * inputs;
            uint16_t *target = output + (int64_t)row * outputs + first;
            /* With many rows the first tiles fetch the next panel, which else would come while nothing is computed;
               with few all waits for memory anyway, and the tile's own lines come first. */
            const uint16_t *ahead = at;
            if (rows > 2 * TILE_ROWS) ahead += next * panel + row / TILE_ROWS * LINE * (inputs / 2);
            switch (rows - row) {
                TILES(1) TILES(2) TILES(3) TILES(4) TILES(5)
                default:
                    TILES(6)
            }
        }
        half += whole ? 2 : 1;
    }
}

/* All outputs, shared by the threads of the region it is called in as each is ready for more: on a machine that is not
   theirs alone equal shares end apart. Half panels come last. None waits at the end. */
static void share_outputs(const uint16_t *input, const uint16_t *weight, const uint16_t *bias, uint16_t *output,
                          int rows, int inputs, int outputs) {
    const int threads = omp_get_num_threads(), halves = outputs / (PANEL / 2);
    const int whole = halves / 2 > threads ? halves / 2 - threads : 0;
#pragma omp for schedule(dynamic) nowait
    for (int each = 0; each < halves - whole; each++) {
        const int half = each < whole ? 2 * each : whole + each;
        some_outputs(input, weight, bias, output, rows, inputs, outputs, half, half + (each < whole ? 2 : 1), threads);
    }
}

/* input [rows, inputs], inputs even; weight: panels of [inputs rounded up to 32 / 2, PANEL, 2];
   bias [outputs] or null -> output [rows, outputs], outputs a multiple of 32. */
void panel_linear(const uint16_t *input, const uint16_t *weight, const uint16_t *bias, uint16_t *output, int rows,
                     int inputs, int outputs) {
    const int64_t halves = outputs / (PANEL / 2);
#pragma omp parallel
    {
        int threads = omp_get_num_threads(), thread = omp_get_thread_num();
        if (rows > 2 * TILE_ROWS) share_outputs(input, weight, bias, output, rows, inputs, outputs);
        else
            some_outputs(input, weight, bias, output, rows, inputs, outputs, (int)(halves * thread / threads),
                         (int)(halves * (thread + 1) / threads), 1);
    }
}

/* Whether this processor multiplies bfloat16; without it another kernel is faster. */
int has_products(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

/* Whether `packed` holds weight [outputs, inputs] as `panel_linear` reads it. */
int holds_panels(const uint16_t *packed, const uint16_t *weight, int inputs, int outputs) {
    const int64_t panel = (int64_t)((inputs + 31) / 32 * 32) * PANEL;
    int64_t wrong = 0;
#pragma omp parallel for reduction(+ : wrong)
    for (int n = 0; n < outputs; n++) {
        const uint16_t *at = packed + n / PANEL * panel + n % PANEL * 2;
        for (int k = 0; k < inputs; k++) wrong += at[k / 2 * 2 * PANEL + k % 2] != weight[(int64_t)n * inputs + k];
    }
    return wrong == 0;
}

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
