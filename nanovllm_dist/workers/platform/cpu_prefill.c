/* Attention of rows of several query tokens over a paged cache, in bfloat16, for CPUs.

   A task is a block of a row's tokens and one key/value head. It walks over the keys in turns with a running softmax in
   fp32; in each turn keys and values are repacked as the weights of a product are, so that all queries of the block use
   them as matrix products. Probabilities are rounded to bfloat16 for theirs. cpu_products.c, which cpu_step.c includes
   before this file, has the multiplication.

   query   [tokens, kv_heads * group, dim] with `query_stride` elements from token to token
   keys    [blocks, block_size, kv_heads, dim]; values alike; those of the query tokens are there already
   tables  [rows, table_stride] int32; lengths [rows] int32, keys visible to a row's last token
   starts  [rows + 1] int32, where a row's tokens begin
   output  [tokens, kv_heads * group, dim]; dim a multiple of 16 */

#define TURN PANEL    /* keys of a turn */
#define BLOCK_ROWS 96 /* queries of a task, a query being one token's head; a multiple of TILE_ROWS */
#define NOTHING -1e30f
#define LOWEST -80.0f

typedef struct {
    const uint16_t *query, *keys, *values;
    const int32_t *tables, *lengths, *starts;
    uint16_t *output;
    int64_t query_stride, table_stride;
    int32_t kv_heads, group, dim, block_size;
} attention;

/* sum [TILE_ROWS, vectors] += x [TILE_ROWS, 2 * pairs] * weight [pairs, stride], each a pair of inputs for LANES
   outputs a vector. */
static inline __attribute__((always_inline)) void multiply(const int vectors, const uint16_t *x, int64_t x_stride,
                                                           int pairs, const uint16_t *weight, int64_t stride,
                                                           floats sum[TILE_ROWS][4]) {
    for (int k = 0; k < pairs; k++, weight += stride)
        for (int r = 0; r < TILE_ROWS; r++) {
            uint32_t pair;
            memcpy(&pair, x + r * x_stride + 2 * k, 4);
            for (int v = 0; v < vectors; v++) sum[r][v] = dot(sum[r][v], weight + 2 * LANES * v, pair);
        }
}

static inline __attribute__((always_inline)) void add_product(const int vectors, const uint16_t *x, int pairs,
                                                              const uint16_t *weight, int dim, float *output) {
    floats sum[TILE_ROWS][4];
    for (int r = 0; r < TILE_ROWS; r++) memcpy(sum[r], output + (int64_t)r * dim, vectors * sizeof(floats));
    multiply(vectors, x, TURN, pairs, weight, 2 * dim, sum);
    for (int r = 0; r < TILE_ROWS; r++) memcpy(output + (int64_t)r * dim, sum[r], vectors * sizeof(floats));
}

/* One key after the other becomes a column of pairs of dimensions, two values a row of pairs of keys. */
static void pack_turn(const attention *of, const int32_t *table, int head, int start, int count, uint32_t *keys,
                      uint16_t *values) {
    const int dim = of->dim, pairs = dim / 2;
    const int64_t step = (int64_t)of->kv_heads * dim;
    const uint16_t *value[TURN];
    for (int i = 0; i < count; i++) {
        int place = start + i;
        int64_t at = ((int64_t)table[place / of->block_size] * of->block_size + place % of->block_size) * step +
                     (int64_t)head * dim;
        uint32_t key[pairs];
        memcpy(key, of->keys + at, sizeof key);
        for (int d = 0; d < pairs; d++) keys[d * TURN + i] = key[d];
        value[i] = of->values + at;
    }
    for (int i = 0; i < count; i += 2, values += 2 * dim) {
        const uint16_t *restrict first = value[i];
        if (i + 1 < count) {
            const uint16_t *restrict second = value[i + 1];
            for (int d = 0; d < dim; d++) values[2 * d] = first[d], values[2 * d + 1] = second[d];
        } else
            for (int d = 0; d < dim; d++) values[2 * d] = first[d], values[2 * d + 1] = 0;
    }
}

/* Take `visible` of TURN scores into a query's softmax: weights for them, and what is so far fades. */
static inline void soften(float *restrict score, int visible, uint16_t *restrict weight, float *restrict peak,
                          float *restrict mass, float *restrict sum, int dim) {
    float top = *peak, total = 0.0f;
    for (int i = visible; i < TURN; i++) score[i] = NOTHING;
    for (int i = 0; i < TURN; i++) top = score[i] > top ? score[i] : top;
    for (int i = 0; i < TURN; i++) {
        /* expf leaves its fast way where it underflows */
        float below = score[i] - top, each = expf(below > LOWEST ? below : LOWEST);
        total += each;
        weight[i] = to_bf16(each);
    }
    for (int i = visible; i < TURN; i++) weight[i] = 0;
    if (top > *peak) {
        float below = *peak - top, fade = below > LOWEST ? expf(below) : 0.0f;
        *mass *= fade, *peak = top;
        for (int d = 0; d < dim; d++) sum[d] *= fade;
    }
    *mass += total;
}

/* Tokens [first, first + count) of a row, the last of which sees `last + 1` keys, and one key/value head. */
static void attend_block(const attention *of, int row, int head, int first, int count, int last, float scale) {
    const int dim = of->dim, group = of->group, rows = count * group;
    const int tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, padded = tiles * TILE_ROWS;
    const int64_t place = (int64_t)head * group * dim, width = (int64_t)of->kv_heads * group * dim;
    const int token = of->starts[row] + first, position = last - count + 1;
    uint16_t query[padded * dim], weight[TILE_ROWS * TURN], values[TURN * dim];
    uint32_t keys[dim / 2 * TURN];
    float sum[padded * dim], peak[padded], mass[padded], score[TILE_ROWS][TURN];
    memset(query + rows * dim, 0, (padded - rows) * dim * sizeof *query);
    memset(keys, 0, sizeof keys);
    for (int t = 0; t < count; t++)
        memcpy(query + t * group * dim, of->query + (token + t) * of->query_stride + place,
               group * dim * sizeof *query);
    for (int r = 0; r < padded; r++) peak[r] = NOTHING, mass[r] = 0.0f;
    memset(sum, 0, sizeof sum);
    for (int start = 0; start <= last; start += TURN) {
        const int present = last + 1 - start < TURN ? last + 1 - start : TURN, pairs = (present + 1) / 2;
        pack_turn(of, of->tables + row * of->table_stride, head, start, present, keys, values);
        for (int r = 0; r < padded; r += TILE_ROWS) {
            const int end = r + TILE_ROWS < rows ? r + TILE_ROWS : rows;
            if (position + (end - 1) / group < start) continue; /* sees none of these keys */
            floats scores[TILE_ROWS][4];
            memset(scores, 0, sizeof scores);
            multiply(4, query + r * dim, dim, dim / 2, (const uint16_t *)keys, 2 * TURN, scores);
            memset(weight, 0, sizeof weight);
            for (int each = r; each < end; each++) {
                const int seen = position + each / group + 1 - start, visible = seen < present ? seen : present;
                if (visible <= 0) continue;
                float *mine = score[each - r];
                memcpy(mine, scores[each - r], sizeof scores[0]);
                for (int i = 0; i < TURN; i++) mine[i] *= scale;
                soften(mine, visible, weight + (each - r) * TURN, peak + each, mass + each, sum + each * dim, dim);
            }
            int d = 0;
            for (; d + 64 <= dim; d += 64) add_product(4, weight, pairs, values + 2 * d, dim, sum + r * dim + d);
            for (; d + 32 <= dim; d += 32) add_product(2, weight, pairs, values + 2 * d, dim, sum + r * dim + d);
            for (; d < dim; d += 16) add_product(1, weight, pairs, values + 2 * d, dim, sum + r * dim + d);
        }
    }
    for (int r = 0; r < rows; r++) {
        uint16_t *target = of->output + (token + r / group) * width + place + r % group * dim;
        for (int d = 0; d < dim; d++) target[d] = to_bf16(sum[r * dim + d] / mass[r]);
    }
}

/* Rows [from, to), shared by the threads of the region it is called in; none waits at the end. */
static void attend_rows(const attention *of, int from, int to) {
    const int most = BLOCK_ROWS / of->group, tokens = most ? most : 1;
    const float scale = 1.0f / sqrtf((float)of->dim);
    for (int row = from; row < to; row++) {
        const int count = of->starts[row + 1] - of->starts[row], blocks = (count + tokens - 1) / tokens;
#pragma omp for schedule(dynamic) nowait
        for (int task = 0; task < blocks * of->kv_heads; task++) {
            /* the last block first: it sees the most keys */
            const int first = (blocks - 1 - task / of->kv_heads) * tokens;
            const int size = count - first < tokens ? count - first : tokens;
            attend_block(of, row, task % of->kv_heads, first, size, of->lengths[row] - count + first + size - 1, scale);
        }
    }
}

void prefill_bf16(const attention *of, int from, int to) {
#pragma omp parallel
    attend_rows(of, from, to);
}
