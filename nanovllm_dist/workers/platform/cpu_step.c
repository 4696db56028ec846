/* All layers of a decoder for a step of few decodes, in bfloat16: one parallel region from embeddings to the final
   norm.

   A step of one row is a few hundred small operations; here the threads meet five or six times a layer and nothing is called
   in between. Every thread keeps the residual and the norms for itself, which is quicker than to wait for another's.
   The other kernels are part of this file, so that they are one library. */

#include "cpu_products.c"
#include "cpu_layers.c"
#include "cpu_prefill.c"
#include "cpu_dot.c"
#include "cpu_decode.c"
#include "cpu_group.c"

typedef void task(const uint16_t *, const uint16_t *, const uint16_t *, const int32_t *, int, uint16_t *, int, int, int,
                  int, float);

/* One layer. Biases and qk_norm [heads + kv_heads, dim] or null; caches [blocks, block_size, kv_heads, dim]. */
typedef struct {
    matrix qkv, o, gate_up, down;
    const uint16_t *input_norm, *qkv_bias, *qk_norm, *mlp_norm, *gate_up_bias;
    uint16_t *keys, *values;
} layer;

typedef struct {
    int32_t layers, hidden, heads, kv_heads, dim, intermediate, block_size;
    float eps, qk_eps;
} shape;

/* What is different in every step: see `rotate_and_store` and cpu_decode.c. */
typedef struct {
    const uint16_t *input; /* [rows, hidden] */
    const float *cos, *sin;
    const int64_t *slots;
    const int32_t *tables, *lengths;
    uint16_t *output; /* [rows, hidden] */
    int64_t table_stride;
    int32_t rows;
} step;

static task *task_of(int dim) {
    switch (dim) {
        case 64: return decode_bf16_64_task;
        case 80: return decode_bf16_80_task;
        case 96: return decode_bf16_96_task;
        case 128: return decode_bf16_128_task;
    }
    return 0;
}

static uint16_t *queries_of(const shape *of, uint16_t *qkv, int row, int head) {
    return qkv + ((int64_t)row * (of->heads + 2 * of->kv_heads) + head * (of->heads / of->kv_heads)) * of->dim;
}

/* One key/value head of one row and the query heads of its group: norm, rotation, cache. */
static void store(const layer *at, const shape *of, const step *now, uint16_t *qkv, int row, int head) {
    const int dim = of->dim, group = of->heads / of->kv_heads, first = head * group;
    const float *cos = now->cos + (int64_t)row * dim, *sin = now->sin + (int64_t)row * dim;
    const int64_t slot = (now->slots[row] * of->kv_heads + head) * dim;
    uint16_t *queries = queries_of(of, qkv, row, head);
    uint16_t *key = queries + (int64_t)(of->heads - first + head) * dim, *value = key + (int64_t)of->kv_heads * dim;
    for (int g = 0; g < group; g++)
        turn(queries + g * dim, at->qk_norm ? at->qk_norm + (first + g) * dim : 0, cos, sin, dim, of->qk_eps);
    turn(key, at->qk_norm ? at->qk_norm + (of->heads + head) * dim : 0, cos, sin, dim, of->qk_eps);
    memcpy(at->keys + slot, key, dim * sizeof *key);
    memcpy(at->values + slot, value, dim * sizeof *value);
}

/* Attention of that group, when all rows are stored: a row may share a block that another has just filled. */
static void attend(const layer *at, const shape *of, const step *now, uint16_t *qkv, uint16_t *context, int row,
                   int head) {
    const int dim = of->dim, group = of->heads / of->kv_heads;
    task_of(dim)(queries_of(of, qkv, row, head), at->keys + head * dim, at->values + head * dim,
                 now->tables + row * now->table_stride, now->lengths[row],
                 context + ((int64_t)row * of->heads + head * group) * dim, of->kv_heads, 1, group, of->block_size,
                 1.0f / sqrtf((float)dim));
}

/* total += delta (unless null), normed = norm(total) * weight. */
static void add_norm(uint16_t *total, const uint16_t *delta, const uint16_t *weight, uint16_t *normed, int rows,
                     int size, float eps) {
    for (int row = 0; row < rows; row++, total += size, normed += size) {
        if (delta) add(delta + (int64_t)row * size, total, total, size);
        normalize(total, weight, normed, size, eps);
    }
}

/* Where a product goes that ranks will add up: its part of the next meeting, or `alone` without other ranks. */
static uint16_t *place(const group *with, uint64_t *turn, uint16_t *alone) {
    if (!with) return alone;
    ++*turn;
    return is_lost(with) ? alone : (uint16_t *)part_of(with, with->rank, *turn);
}

/* The sum over ranks of what is there, when all threads of this one have passed a barrier; in `whole` unless alone. */
static const uint16_t *summed(group *with, uint64_t turn, int thread, const uint16_t *there, uint16_t *whole,
                              int count) {
    if (!with) return there;
    meet(with, turn, thread);
    sum_bf16_parts(with, turn, 0, count, whole);
    return whole;
}

/* Runs the layers, then the norm `final`. Rows, of which there are few, have one token each; [rows, hidden] is no more
   than a part of the group, which is null for one rank. */
void decode_step(const layer *layers, const shape *of, const uint16_t *final, const step *now, group *with) {
    const int rows = now->rows, hidden = of->hidden, middle = of->intermediate, inner = of->heads * of->dim;
    const int packed = inner + 2 * of->kv_heads * of->dim;
    uint16_t qkv[rows * packed], context[rows * inner], gates[2 * rows * middle], active[rows * middle];
    uint16_t attended[rows * hidden], passed[rows * hidden];
    const uint64_t first_turn = with ? with->turn : 0;
#pragma omp parallel
    {
        const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
        uint16_t total[rows * hidden], normed[rows * hidden], whole[with ? rows * hidden : 1], *target;
        const uint16_t *delta = 0;
        uint64_t turn = first_turn;
        memcpy(total, now->input, sizeof total);
#define SHARED(IN, WEIGHT, BIAS, OUT, INPUTS, OUTPUTS) \
    some_outputs(IN, WEIGHT, BIAS, OUT, rows, INPUTS, OUTPUTS, FROM((OUTPUTS) / 32), TO((OUTPUTS) / 32), 1)
        for (int index = 0; index < of->layers; index++) {
            const layer *at = layers + index;
            add_norm(total, delta, at->input_norm, normed, rows, hidden, of->eps);
            SHARED(normed, at->qkv, at->qkv_bias, qkv, hidden, packed);
#pragma omp barrier
            for (int each = thread; each < rows * of->kv_heads; each += threads)
                store(at, of, now, qkv, each / of->kv_heads, each % of->kv_heads);
            if (rows > 1) {
#pragma omp barrier
            }
            for (int each = thread; each < rows * of->kv_heads; each += threads)
                attend(at, of, now, qkv, context, each / of->kv_heads, each % of->kv_heads);
#pragma omp barrier
            target = place(with, &turn, attended);
            SHARED(context, at->o, 0, target, inner, hidden);
#pragma omp barrier
            delta = summed(with, turn, thread, target, whole, rows * hidden);
            add_norm(total, delta, at->mlp_norm, normed, rows, hidden, of->eps);
            const int from = FROM(middle / 32), to = TO(middle / 32), units = middle / 32;
            some_outputs(normed, at->gate_up, at->gate_up_bias, gates, rows, hidden, 2 * middle, from, to, 1);
            some_outputs(normed, at->gate_up, at->gate_up_bias, gates, rows, hidden, 2 * middle, units + from,
                         units + to, 1);
            for (int row = 0; row < rows; row++) {
                const uint16_t *gate = gates + 2 * row * middle + from * 32;
                activate(gate, gate + middle, active + row * middle + from * 32, (to - from) * 32);
            }
#pragma omp barrier
            target = place(with, &turn, passed);
            SHARED(active, at->down, 0, target, middle, hidden);
#pragma omp barrier
            delta = summed(with, turn, thread, target, whole, rows * hidden);
        }
        add_norm(total, delta, final, normed, rows, hidden, of->eps);
        if (thread == 0) memcpy(now->output, normed, sizeof normed);
    }
    if (with) with->turn = first_turn + 2 * of->layers;
}

#include "cpu_batch.c"
#include "cpu_sampler.c"
#include "cpu_decoder.c"
