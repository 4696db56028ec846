/* Decode attention of one row in bfloat16, for processors that multiply it: what the task of cpu_decode.c does, at
   twice its speed (64 rows of 130 to 330 keys of a 135M model, two Zen 4 cores: 17 instead of 36 ms). cpu_step.c
   includes it behind cpu_prefill.c, whose softmax it shares.

   Keys are multiplied lying as they are in memory, and the partial sums of sixteen keys added up together. Values of
   two keys are interleaved, within 128 bits, for a product with the pair of their weights; sums of dimensions lie in
   that order until the end. A turn's keys are asked of memory while the turn before is computed. */

#ifdef __AVX512BF16__

#define TOGETHER 3 /* queries of a group that share a load; with 128 dimensions, as many as there are registers for */
#define HALF 32    /* dimensions of a vector */

/* parts [16] -> the sums over each of their lanes. */
static inline __m512 sum_lanes(const __m512 *part) {
    __m512 two[8], four[4], eight[2];
    for (int i = 0; i < 8; i++)
        two[i] = _mm512_unpacklo_ps(part[2 * i], part[2 * i + 1]) + _mm512_unpackhi_ps(part[2 * i], part[2 * i + 1]);
    for (int i = 0; i < 4; i++) {
        __m512d a = (__m512d)two[2 * i], b = (__m512d)two[2 * i + 1];
        four[i] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
    }
    for (int i = 0; i < 2; i++)
        eight[i] = _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88) +
                   _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd);
    return _mm512_shuffle_f32x4(eight[0], eight[1], 0x88) + _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd);
}

/* score [together, TURN] of keys [0, count) at `places`. */
static inline __attribute__((always_inline)) void score_turn(const int together, const int width, const uint16_t *query,
                                                             const uint16_t *keys, const int64_t *places,
                                                             const int64_t *next, int count, float score[][TURN]) {
    __m512bh q[TOGETHER][4];
    for (int g = 0; g < together; g++)
        for (int w = 0; w < width; w++) q[g][w] = (__m512bh)_mm512_loadu_si512(query + (g * width + w) * HALF);
    for (int start = 0; start < count; start += LANES) {
        __m512 part[TOGETHER][LANES];
        for (int i = 0; i < LANES; i++) {
            const uint16_t *key = keys + places[start + i];
            for (int w = 0; w < width; w++) __builtin_prefetch(keys + next[start + i] + w * HALF, 0, 2);
            for (int g = 0; g < together; g++) part[g][i] = _mm512_setzero_ps();
            for (int w = 0; w < width; w++) {
                __m512bh k = (__m512bh)_mm512_loadu_si512(key + w * HALF);
                for (int g = 0; g < together; g++) part[g][i] = _mm512_dpbf16_ps(part[g][i], k, q[g][w]);
            }
        }
        for (int g = 0; g < together; g++) _mm512_storeu_ps(score[g] + start, sum_lanes(part[g]));
    }
}

/* sum [together, 2 * width vectors] += weight [together, TURN] * values of keys [0, count). */
static inline __attribute__((always_inline)) void add_turn(const int together, const int width, uint16_t weight[][TURN],
                                                           const uint16_t *values, const int64_t *places,
                                                           const int64_t *next, int count, float *sum) {
    __m512 all[TOGETHER][8];
    for (int g = 0; g < together; g++)
        for (int v = 0; v < 2 * width; v++) all[g][v] = _mm512_loadu_ps(sum + (g * 2 * width + v) * LANES);
    for (int i = 0; i < count; i += 2) {
        __m512bh pair[TOGETHER];
        for (int g = 0; g < together; g++) {
            uint32_t two;
            memcpy(&two, weight[g] + i, 4);
            pair[g] = (__m512bh)_mm512_set1_epi32((int)two);
        }
        for (int w = 0; w < width; w++) {
            __m512i first = _mm512_loadu_si512(values + places[i] + w * HALF);
            __m512i second = _mm512_loadu_si512(values + places[i + 1] + w * HALF);
            __builtin_prefetch(values + next[i] + w * HALF, 0, 2);
            __builtin_prefetch(values + next[i + 1] + w * HALF, 0, 2);
            __m512bh low = (__m512bh)_mm512_unpacklo_epi16(first, second);
            __m512bh high = (__m512bh)_mm512_unpackhi_epi16(first, second);
            for (int g = 0; g < together; g++) {
                all[g][2 * w] = _mm512_dpbf16_ps(all[g][2 * w], low, pair[g]);
                all[g][2 * w + 1] = _mm512_dpbf16_ps(all[g][2 * w + 1], high, pair[g]);
            }
        }
    }
    for (int g = 0; g < together; g++)
        for (int v = 0; v < 2 * width; v++) _mm512_storeu_ps(sum + (g * 2 * width + v) * LANES, all[g][v]);
}

/* Where TURN keys from `start` lie; those behind the last one lie where it does, and get no weight. */
static void place_turn(int64_t *places, const int32_t *table, int start, int length, int block_size, int64_t step) {
    int64_t last = 0;
    for (int i = 0; i < TURN; i++) {
        int key = start + i;
        if (key < length) last = ((int64_t)table[key / block_size] * block_size + key % block_size) * step;
        places[i] = last;
    }
}

#define DOT_TASK(NAME, DIM)                                                                                            \
    static void NAME(const uint16_t *query, const uint16_t *keys, const uint16_t *values, const int32_t *table,        \
                     int length, uint16_t *output, int kv_heads, int heads, int group, int block_size, float scale) {  \
        enum { WIDTH = DIM / HALF };                                                                                   \
        const int all = heads * group;                                                                                 \
        float sum[all][DIM], peak[all], mass[all], score[TOGETHER][TURN];                                              \
        uint16_t weight[TOGETHER][TURN];                                                                               \
        int64_t places[2][TURN];                                                                                       \
        memset(sum, 0, sizeof sum);                                                                                    \
        for (int g = 0; g < all; g++) peak[g] = NOTHING, mass[g] = 0.0f;                                               \
        place_turn(places[0], table, 0, length, block_size, (int64_t)kv_heads * DIM);                                  \
        for (int i = 0; i < TURN && i < length; i++)                                                                   \
            for (int d = 0; d < heads * DIM; d += HALF) __builtin_prefetch(keys + places[0][i] + d, 0, 2);             \
        for (int i = 0; i < TURN && i < length; i++)                                                                   \
            for (int d = 0; d < heads * DIM; d += HALF) __builtin_prefetch(values + places[0][i] + d, 0, 2);           \
        for (int start = 0, turn = 0; start < length; start += TURN, turn ^= 1) {                                      \
            const int left = length - start, count = left < TURN ? left : TURN;                                        \
            const int64_t *here = places[turn], *next = left > TURN ? places[turn ^ 1] : here;                         \
            if (left > TURN)                                                                                           \
                place_turn(places[turn ^ 1], table, start + TURN, length, block_size, (int64_t)kv_heads * DIM);        \
            for (int g = 0, size; g < all; g += size) {                                                                \
                const uint16_t *key = keys + g / group * DIM, *value = values + g / group * DIM;                       \
                size = group - g % group < TOGETHER ? group - g % group : TOGETHER;                                    \
                switch (size) {                                                                                        \
                    case 1: score_turn(1, WIDTH, query + g * DIM, key, here, next, count, score); break;               \
                    case 2: score_turn(2, WIDTH, query + g * DIM, key, here, next, count, score); break;               \
                    default: score_turn(3, WIDTH, query + g * DIM, key, here, next, count, score);                     \
                }                                                                                                      \
                for (int each = 0; each < size; each++) {                                                              \
                    for (int i = 0; i < TURN; i++) score[each][i] *= scale;                                            \
                    soften(score[each], count, weight[each], peak + g + each, mass + g + each, sum[g + each], DIM);    \
                }                                                                                                      \
                switch (size) {                                                                                        \
                    case 1: add_turn(1, WIDTH, weight, value, here, next, count, sum[g]); break;                       \
                    case 2: add_turn(2, WIDTH, weight, value, here, next, count, sum[g]); break;                       \
                    default: add_turn(3, WIDTH, weight, value, here, next, count, sum[g]);                             \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        for (int g = 0; g < all; g++)                                                                                  \
            for (int d = 0; d < DIM; d++) { /* four dimensions of the low half, then four of the high one */           \
                int place = d / HALF * HALF + d % 8 / 4 * LANES + d % HALF / 8 * 4 + d % 4;                            \
                output[g * DIM + d] = to_bf16(sum[g][place] / mass[g]);                                                \
            }                                                                                                          \
    }

DOT_TASK(dot_64_task, 64)
DOT_TASK(dot_96_task, 96)
DOT_TASK(dot_128_task, 128)

#endif
