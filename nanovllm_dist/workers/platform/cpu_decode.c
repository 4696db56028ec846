/* Decode attention of one layer over a paged cache, for CPUs: one query token a row.

   A row, or a part of its key/value heads, is one task: keys and values are read once, straight from the blocks,
   for all query heads of the group, with a running softmax in fp32. It knows shapes and pointers, nothing else.

   query   [rows, kv_heads * group, DIM] with `query_stride` elements from row to row, T
   keys    [blocks, block_size, kv_heads, DIM], T; values alike
   tables  [rows, table_stride] int32; lengths [rows] int32, at least 1
   output  [rows, kv_heads * group, DIM], T
   parts   tasks that a row is cut into, by key/value heads
   T is float, or bfloat16 as uint16_t, for which processors that multiply it have cpu_dot.c. */

#define MAX_TURN 64 /* keys per turn of the running softmax; larger blocks take several turns */
#define AHEAD 8     /* keys that memory is asked for in advance */

static inline float from_float(float value) { return value; }
static inline float to_float(float value) { return value; }

#define TASK(NAME, T, LOAD, STORE, DIM)                                                                                \
    static void NAME(const T *restrict query, const T *restrict keys, const T *restrict values,                        \
                            const int32_t *restrict table, int length, T *restrict output, int kv_heads, int heads,    \
                            int group, int block_size, float scale) {                                                  \
        const int all = heads * group;                                                                                 \
        const int64_t step = (int64_t)kv_heads * DIM;                                                                  \
        float q[all][DIM], sum[all][DIM], score[all][MAX_TURN], peak[all], mass[all];                                  \
        for (int g = 0; g < all; g++) {                                                                                \
            for (int d = 0; d < DIM; d++) q[g][d] = LOAD(query[g * DIM + d]) * scale, sum[g][d] = 0.0f;                \
            peak[g] = -1e30f, mass[g] = 0.0f;                                                                          \
        }                                                                                                              \
        for (int start = 0, count; start < length; start += count) {                                                   \
            int offset = start % block_size;                                                                           \
            count = block_size - offset;                                                                               \
            if (count > length - start) count = length - start;                                                        \
            if (count > MAX_TURN) count = MAX_TURN;                                                                    \
            int64_t first = ((int64_t)table[start / block_size] * block_size + offset) * step;                         \
            for (int i = 0; i < count; i++)                                                                            \
                for (int h = 0; h < heads; h++) {                                                                      \
                    const T *restrict key = keys + first + i * step + h * DIM;                                         \
                    float wide[DIM];                                                                                   \
                    __builtin_prefetch(key + AHEAD * step);                                                            \
                    for (int d = 0; d < DIM; d++) wide[d] = LOAD(key[d]);                                              \
                    for (int g = h * group; g < (h + 1) * group; g++) {                                                \
                        float dot = 0.0f;                                                                              \
                        for (int d = 0; d < DIM; d++) dot += q[g][d] * wide[d];                                        \
                        score[g][i] = dot;                                                                             \
                    }                                                                                                  \
                }                                                                                                      \
            for (int g = 0; g < all; g++) {                                                                            \
                float top = peak[g], total = 0.0f;                                                                     \
                for (int i = 0; i < count; i++) top = score[g][i] > top ? score[g][i] : top;                           \
                for (int i = 0; i < count; i++) {                                                                      \
                    score[g][i] = expf(score[g][i] - top);                                                             \
                    total += score[g][i];                                                                              \
                }                                                                                                      \
                float fade = expf(peak[g] - top);                                                                      \
                mass[g] = mass[g] * fade + total;                                                                      \
                for (int d = 0; d < DIM; d++) sum[g][d] *= fade;                                                       \
                peak[g] = top;                                                                                         \
            }                                                                                                          \
            for (int i = 0; i < count; i++)                                                                            \
                for (int h = 0; h < heads; h++) {                                                                      \
                    const T *restrict value = values + first + i * step + h * DIM;                                     \
                    float wide[DIM];                                                                                   \
                    __builtin_prefetch(value + AHEAD * step);                                                          \
                    for (int d = 0; d < DIM; d++) wide[d] = LOAD(value[d]);                                            \
                    for (int g = h * group; g < (h + 1) * group; g++) {                                                \
                        float weight = score[g][i];                                                                    \
                        for (int d = 0; d < DIM; d++) sum[g][d] += weight * wide[d];                                   \
                    }                                                                                                  \
                }                                                                                                      \
        }                                                                                                              \
        for (int g = 0; g < all; g++)                                                                                  \
            for (int d = 0; d < DIM; d++) output[g * DIM + d] = STORE(sum[g][d] / mass[g]);                            \
    }

#define ROWS(NAME, TASK, T, DIM)                                                                                       \
    void NAME(const T *query, int64_t query_stride, const T *keys, const T *values, const int32_t *tables,             \
              int64_t table_stride, const int32_t *lengths, T *output, int rows, int kv_heads, int group,              \
              int block_size, float scale, int parts) {                                                                \
        _Pragma("omp parallel for schedule(dynamic)") for (int task = 0; task < rows * parts; task++) {                \
            int row = task / parts, part = task % parts;                                                               \
            int head = kv_heads * part / parts, heads = kv_heads * (part + 1) / parts - head;                          \
            int64_t place = (int64_t)head * group * DIM;                                                               \
            if (heads)                                                                                                 \
                TASK(query + row * query_stride + place, keys + head * DIM, values + head * DIM,                       \
                            tables + row * table_stride, lengths[row],                                                 \
                            output + (int64_t)row * kv_heads * group * DIM + place, kv_heads, heads, group,            \
                            block_size, scale);                                                                        \
        }                                                                                                              \
    }

TASK(decode_float_64_task, float, from_float, to_float, 64)
TASK(decode_float_80_task, float, from_float, to_float, 80)
TASK(decode_float_96_task, float, from_float, to_float, 96)
TASK(decode_float_128_task, float, from_float, to_float, 128)
TASK(decode_bf16_80_task, uint16_t, from_bf16, to_bf16, 80)
#ifdef __AVX512BF16__
#define decode_bf16_64_task dot_64_task
#define decode_bf16_96_task dot_96_task
#define decode_bf16_128_task dot_128_task
#else
TASK(decode_bf16_64_task, uint16_t, from_bf16, to_bf16, 64)
TASK(decode_bf16_96_task, uint16_t, from_bf16, to_bf16, 96)
TASK(decode_bf16_128_task, uint16_t, from_bf16, to_bf16, 128)
#endif

ROWS(decode_float_64, decode_float_64_task, float, 64)
ROWS(decode_float_80, decode_float_80_task, float, 80)
ROWS(decode_float_96, decode_float_96_task, float, 96)
ROWS(decode_float_128, decode_float_128_task, float, 128)
ROWS(decode_bf16_64, decode_bf16_64_task, uint16_t, 64)
ROWS(decode_bf16_80, decode_bf16_80_task, uint16_t, 80)
ROWS(decode_bf16_96, decode_bf16_96_task, uint16_t, 96)
ROWS(decode_bf16_128, decode_bf16_128_task, uint16_t, 128)
