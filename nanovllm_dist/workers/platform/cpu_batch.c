/* All layers of a decoder for a step of any rows, decodes first, in bfloat16: one parallel region from embeddings to
   the final norm. Threads share rows in norms and rotations equally, outputs in products and tasks in attention as
   they come.

   Products take some rows at a time, so that what goes in and comes out stays in the second-level caches.
   cpu_step.c includes it behind the other kernels and has `layer` and `shape`. */

#define CHUNK 256 /* rows of a product */

typedef struct {
    const uint16_t *input; /* [tokens, hidden] */
    const float *cos, *sin;
    const int64_t *slots;
    const int32_t *tables, *lengths, *starts; /* see cpu_prefill.c */
    uint16_t *output;                         /* [tokens, hidden] */
    uint16_t *space;                          /* `batch_space` elements */
    int64_t table_stride;
    int32_t tokens, rows, decodes;
} batch;

/* Elements of bfloat16 that `batch_step` works in. */
int64_t batch_space(const shape *of, int64_t tokens) {
    const int64_t chunk = tokens < CHUNK ? tokens : CHUNK;
    return tokens * (3 * of->hidden + (2 * of->heads + 2 * of->kv_heads) * of->dim) + 4 * chunk * of->intermediate;
}

static int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

/* Decodes are shared by rows where there are many, which read memory in order, else by key/value heads too. */
static void attend_batch(const layer *at, const shape *of, const batch *now, const uint16_t *qkv, uint16_t *context,
                         int threads) {
    const int group = of->heads / of->kv_heads, dim = of->dim, packed = (of->heads + 2 * of->kv_heads) * dim;
    const int parts = now->decodes ? (int)at_most(of->kv_heads, (2 * threads + now->decodes - 1) / now->decodes) : 1;
    const attention rest = {qkv,   at->keys, at->values,        now->tables,  now->lengths, now->starts,
                            context, packed, now->table_stride, of->kv_heads, group,        dim, of->block_size};
#pragma omp for schedule(dynamic) nowait
    for (int each = 0; each < now->decodes * parts; each++) {
        const int row = each / parts, part = each % parts;
        const int head = of->kv_heads * part / parts, heads = of->kv_heads * (part + 1) / parts - head;
        const int64_t place = (int64_t)head * group * dim;
        task_of(dim)(qkv + (int64_t)row * packed + place, at->keys + head * dim, at->values + head * dim,
                     now->tables + row * now->table_stride, now->lengths[row],
                     context + (int64_t)row * of->heads * dim + place, of->kv_heads, heads, group, of->block_size,
                     1.0f / sqrtf((float)dim));
    }
    attend_rows(&rest, now->decodes, now->rows);
}

/* active = silu(gates) * ups of rows [0, rows) of `normed`, shared as in `share_outputs`. */
static void share_gates(const layer *at, const shape *of, const uint16_t *normed, uint16_t *gates, uint16_t *active,
                        int rows, int threads) {
    const int middle = of->intermediate, units = middle / 32;
#pragma omp for schedule(dynamic) nowait
    for (int from = 0; from < units; from += 2) {
        const int to = from + 2 < units ? from + 2 : units;
        some_outputs(normed, at->gate_up, at->gate_up_bias, gates, rows, of->hidden, 2 * middle, from, to, threads);
        some_outputs(normed, at->gate_up, at->gate_up_bias, gates, rows, of->hidden, 2 * middle, units + from,
                     units + to, threads);
        for (int row = 0; row < rows; row++) {
            const uint16_t *own = gates + 2 * (int64_t)row * middle + from * 32;
            activate(own, own + middle, active + (int64_t)row * middle + from * 32, (to - from) * 32);
        }
    }
}

/* delta [count] summed over ranks, by all threads, with the barriers before and after it. */
static uint64_t sum_delta(group *with, uint16_t *delta, int64_t count, uint64_t turn, int thread, int threads) {
#pragma omp barrier
    if (with) {
        turn = sum_bf16(with, delta, count, turn, thread, threads);
#pragma omp barrier
    }
    return turn;
}

/* Runs the layers, then the norm `final`. `with` is null for one rank. */
void batch_step(const layer *layers, const shape *of, const uint16_t *final, const batch *now, group *with) {
    const int64_t tokens = now->tokens, hidden = of->hidden, inner = of->heads * of->dim;
    const int64_t packed = inner + 2 * of->kv_heads * of->dim, middle = of->intermediate;
    const int64_t chunk = at_most(tokens, CHUNK);
    uint16_t *total = now->space, *normed = total + tokens * hidden, *delta = normed + tokens * hidden;
    uint16_t *qkv = delta + tokens * hidden, *context = qkv + tokens * packed, *gates = context + tokens * inner;
    uint16_t *active[2] = {gates + 2 * chunk * middle, gates + 3 * chunk * middle};
    uint64_t last_turn = 0;
#pragma omp parallel
    {
        const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const int64_t first = FROM(tokens), own = TO(tokens) - first, mine = first * hidden;
        uint64_t turn = with ? with->turn : 0;
        memcpy(total + mine, now->input + mine, own * hidden * sizeof *total);
        for (int index = 0; index < of->layers; index++) {
            const layer *at = layers + index;
            add_norm(total + mine, index ? delta + mine : 0, at->input_norm, normed + mine, own, hidden, of->eps);
#pragma omp barrier
            for (int64_t row = 0; row < tokens; row += CHUNK)
                share_outputs(normed + row * hidden, at->qkv, at->qkv_bias, qkv + row * packed,
                              at_most(CHUNK, tokens - row), hidden, packed);
#pragma omp barrier
            rotate_rows(qkv, at->qk_norm, now->cos, now->sin, now->slots, at->keys, at->values, first, first + own,
                        of->heads, of->kv_heads, of->dim, of->qk_eps);
#pragma omp barrier
            attend_batch(at, of, now, qkv, context, threads);
#pragma omp barrier
            for (int64_t row = 0; row < tokens; row += CHUNK)
                share_outputs(context + row * inner, at->o, 0, delta + row * hidden, at_most(CHUNK, tokens - row),
                              inner, hidden);
            turn = sum_delta(with, delta, tokens * hidden, turn, thread, threads);
            add_norm(total + mine, delta + mine, at->mlp_norm, normed + mine, own, hidden, of->eps);
#pragma omp barrier
            for (int64_t row = 0, half = 0; row < tokens; row += CHUNK, half ^= 1) {
                const int rows = at_most(CHUNK, tokens - row);
                share_gates(at, of, normed + row * hidden, gates, active[half], rows, threads);
#pragma omp barrier
                share_outputs(active[half], at->down, 0, delta + row * hidden, rows, middle, hidden);
            }
            turn = sum_delta(with, delta, tokens * hidden, turn, thread, threads);
        }
        add_norm(total + mine, delta + mine, final, now->output + mine, own, hidden, of->eps);
        if (thread == 0) last_turn = turn;
    }
    if (with) with->turn = last_turn;
}
