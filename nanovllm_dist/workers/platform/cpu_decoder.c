/* A step of decodes as a whole, in bfloat16: from the token table to the tokens that follow, written back to it.

   Python's share of such a step is more than a millisecond where the weights have passed through the caches just before,
   a tenth of a step of one row. cpu_step.c includes it last. */

/* What lasts from step to step; this rank's part of it. */
typedef struct {
    const layer *layers;
    const shape *of;
    const uint16_t *final, *embeddings; /* [vocabulary, hidden] */
    matrix head;
    const float *cos, *sin; /* [positions, dim] */
    int32_t *known;         /* the token table, flat */
    const int32_t *tables;  /* block tables by slot */
    uint16_t *logits;       /* [rows or more, columns] */
    void *space;            /* `decoder_space` bytes */
    group *with;            /* null for one rank */
    const int32_t *starts;  /* [ranks + 1], where each rank's part of the vocabulary begins */
    int64_t table_stride;
    int32_t columns;
    int32_t few; /* rows up to which `decode_step` is the faster way */
} decoder;

/* One step; arrays of `rows`. */
typedef struct {
    const int64_t *places;      /* of the last token, in `known` */
    const int64_t *slots, *positions, *cache_slots;
    const int32_t *lengths;     /* the new token included */
    const float *inv_temperature;
    const double *uniforms;
    int64_t *tokens; /* what comes out */
    int32_t rows;
} decodes;

#define ALIGNED(BYTES) (((BYTES) + 63) / 64 * 64)

/* A piece of the space. */
static void *take(char **space, int64_t bytes) {
    void *piece = *space;
    *space += ALIGNED(bytes);
    return piece;
}

static int rank_of(const decoder *all) { return all->with ? all->with->rank : 0; }

static int ranks_of(const decoder *all) { return all->with ? all->with->ranks : 1; }

static int vocabulary(const decoder *all) { return all->starts[ranks_of(all)]; }

/* Bytes for steps of up to `rows` rows. */
int64_t decoder_space(const decoder *all, int64_t rows) {
    const shape *of = all->of;
    const int64_t logits = all->with ? rows * (ranks_of(all) * (int64_t)all->columns + vocabulary(all)) : 0;
    return ALIGNED(rows * of->hidden * 2) * 2 + ALIGNED(rows * of->dim * sizeof(float)) * 2 +
           ALIGNED(rows * all->table_stride * sizeof(int32_t)) + ALIGNED((rows + 1) * sizeof(int32_t)) +
           ALIGNED(batch_space(of, rows) * 2) + ALIGNED(logits * 2) + 64;
}

static void embed(const decoder *all, const decodes *now, uint16_t *hidden) {
    const int64_t size = all->of->hidden, first = all->starts[rank_of(all)], end = all->starts[rank_of(all) + 1];
    for (int row = 0; row < now->rows; row++, hidden += size) {
        const int64_t token = all->known[now->places[row]];
        if (first <= token && token < end) memcpy(hidden, all->embeddings + (token - first) * size, size * sizeof *hidden);
        else memset(hidden, 0, size * sizeof *hidden);
    }
    if (all->with) group_sum(all->with, hidden - now->rows * size, now->rows * size, 1);
}

/* Hidden states of all rows after the final norm. */
static void run_layers(const decoder *all, const decodes *now, const uint16_t *hidden, uint16_t *output, char *space) {
    const shape *of = all->of;
    const int rows = now->rows, dim = of->dim;
    float *cos = take(&space, rows * dim * sizeof *cos), *sin = take(&space, rows * dim * sizeof *sin);
    int32_t *starts = take(&space, (rows + 1) * sizeof *starts), longest = 0;
    for (int row = 0; row < rows; row++) longest = now->lengths[row] > longest ? now->lengths[row] : longest;
    const int64_t blocks = (longest + of->block_size - 1) / of->block_size;
    int32_t *tables = take(&space, rows * blocks * sizeof *tables);
    for (int row = 0; row < rows; row++) {
        memcpy(cos + row * dim, all->cos + now->positions[row] * dim, dim * sizeof *cos);
        memcpy(sin + row * dim, all->sin + now->positions[row] * dim, dim * sizeof *sin);
        memcpy(tables + row * blocks, all->tables + now->slots[row] * all->table_stride, blocks * sizeof *tables);
        starts[row] = row;
    }
    starts[rows] = rows;
    if (rows <= all->few) {
        const step few = {hidden, cos, sin, now->cache_slots, tables, now->lengths, output, blocks, rows};
        decode_step(all->layers, of, all->final, &few, all->with);
    } else {
        const batch many = {hidden, cos,    sin,    now->cache_slots,  tables, now->lengths, starts,
                            output, (uint16_t *)space, blocks, rows, rows, rows};
        batch_step(all->layers, of, all->final, &many, all->with);
    }
}

/* Rank 0 samples from what it gathers of all. */
static void sample(const decoder *all, const decodes *now, char *space) {
    const int rows = now->rows, vocab = vocabulary(all), columns = all->columns, own = rank_of(all);
    const uint16_t *whole = all->logits;
    if (all->with) {
        const int64_t part = (int64_t)rows * columns;
        uint16_t *parts = take(&space, ranks_of(all) * part * sizeof *parts), *rest = (uint16_t *)space;
        group_gather(all->with, (const uint8_t *)all->logits, own ? 0 : (uint8_t *)parts, part * sizeof *parts);
        for (int rank = 0; own == 0 && rank < ranks_of(all); rank++)
            for (int row = 0; row < rows; row++)
                memcpy(rest + (int64_t)row * vocab + all->starts[rank], parts + rank * part + (int64_t)row * columns,
                       (all->starts[rank + 1] - all->starts[rank]) * sizeof *rest);
        whole = rest;
    }
    if (own == 0)
        sample_rows(whole, all->with ? vocab : columns, now->inv_temperature, now->uniforms, now->tokens, rows, vocab);
    if (all->with) group_broadcast(all->with, (uint8_t *)now->tokens, rows * sizeof *now->tokens);
}

void decode_tokens(const decoder *all, const decodes *now) {
    const shape *of = all->of;
    const int rows = now->rows;
    char *space = all->space;
    uint16_t *hidden = take(&space, rows * of->hidden * 2), *output = take(&space, rows * of->hidden * 2);
    embed(all, now, hidden);
    run_layers(all, now, hidden, output, space);
    panel_linear(output, all->head.panels, all->head.scales, 0, all->logits, rows, of->hidden, all->columns);
    sample(all, now, space);
    for (int row = 0; row < rows; row++) all->known[now->places[row] + 1] = (int32_t)now->tokens[row];
}
