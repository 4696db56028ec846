/* Products with weights of bfloat16 or int8, for CPUs, and what all kernels here share.

   bfloat16 is uint16_t. Values are rounded where a chain of torch's operators would round them. */

#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define PANEL 64  /* outputs of a weight that lie together, in pairs of inputs: [inputs / 2, PANEL, 2] */
#define LANES 16  /* outputs of one vector */
#define TILE_ROWS 6 /* with four vectors of outputs, as many sums as there are registers for */
#define LINE 64   /* bytes of a cache line */
#define NARROW_ROWS 4 /* rows of a tile whose weights are widened in registers, which takes some */
#define HUGE_PAGE (1 << 21) /* bytes */

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

/* A weight [outputs, inputs]: panels of [inputs rounded up to 32 / 2, PANEL, 2] bfloat16 or, where there are `scales`
   [outputs], int8 of at most 127 either way to be multiplied by them. */
typedef struct {
    const void *panels;
    const float *scales;
} matrix;

static int64_t panel_size(int inputs) { return (int64_t)((inputs + 31) / 32 * 32) * PANEL; }

static inline floats dot_words(floats sum, words weights, uint32_t pair) {
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32((int)pair));
#else
    return sum + (floats)(weights << 16) * from_bf16((uint16_t)pair) + (floats)(weights & 0xffff0000u) * from_bf16(pair >> 16);
#endif
}

static inline floats dot(floats sum, const uint16_t *weight, uint32_t pair) {
    words weights;
    memcpy(&weights, weight, sizeof weights);
    return dot_words(sum, weights, pair);
}

/* 64 int8 of at most 127 either way as bfloat16, which holds them exactly: tables of its bytes by magnitude. */
#ifdef __AVX512VBMI__
#define EXPONENT(I) (31 - __builtin_clz((I) | 1))
#define BITS(I) ((I) ? (127 + EXPONENT(I)) << 7 | (((I) << 7 >> EXPONENT(I)) & 127) : 0)
#define LOW(I) (BITS(I) & 255)
#define HIGH(I) (BITS(I) >> 8)
#define FOUR(BYTE, I) BYTE(I), BYTE((I) + 1), BYTE((I) + 2), BYTE((I) + 3)
#define SIXTEEN(BYTE, I) FOUR(BYTE, I), FOUR(BYTE, (I) + 4), FOUR(BYTE, (I) + 8), FOUR(BYTE, (I) + 12)
#define SIXTY_FOUR(BYTE, I) SIXTEEN(BYTE, I), SIXTEEN(BYTE, (I) + 16), SIXTEEN(BYTE, (I) + 32), SIXTEEN(BYTE, (I) + 48)
#define LOW_THEN_HIGH(I) (I), 64 + (I) /* places in two vectors of bytes */
static const uint8_t low_bytes[128] = {SIXTY_FOUR(LOW, 0), SIXTY_FOUR(LOW, 64)};
static const uint8_t high_bytes[128] = {SIXTY_FOUR(HIGH, 0), SIXTY_FOUR(HIGH, 64)};
static const uint8_t interleaved[128] = {SIXTY_FOUR(LOW_THEN_HIGH, 0)};

static inline void widen(const int8_t *from, words *to) {
    const __m512i *low = (const __m512i *)low_bytes, *high = (const __m512i *)high_bytes;
    const __m512i *order = (const __m512i *)interleaved;
    const __m512i value = _mm512_loadu_si512(from), magnitude = _mm512_abs_epi8(value);
    const __m512i lows = _mm512_permutex2var_epi8(_mm512_loadu_si512(low), magnitude, _mm512_loadu_si512(low + 1));
    const __m512i highs = _mm512_or_si512(
        _mm512_permutex2var_epi8(_mm512_loadu_si512(high), magnitude, _mm512_loadu_si512(high + 1)),
        _mm512_and_si512(value, _mm512_set1_epi8(-128)));
    for (int i = 0; i < 2; i++) to[i] = (words)_mm512_permutex2var_epi8(lows, _mm512_loadu_si512(order + i), highs);
}
#else
static inline void widen(const int8_t *from, words *to) {
    uint16_t wide[4 * LANES];
    for (int i = 0; i < 4 * LANES; i++) {
        const float value = from[i];
        uint32_t bits;
        memcpy(&bits, &value, 4);
        wide[i] = bits >> 16;
    }
    memcpy(to, wide, sizeof wide);
}
#endif

/* `ahead`: as many cache lines as there are pairs of inputs, which a later tile will read. `narrow`: the weights are
   int8; unless `room` [inputs / 2, PANEL, 2] is null it gets what they become. */
static inline __attribute__((always_inline)) void tile(const int rows, const int vectors, const int narrow,
                                                       const uint16_t *input, int inputs, const void *at,
                                                       uint16_t *restrict room, const float *scales,
                                                       const uint16_t *bias, uint16_t *output, int outputs,
                                                       const char *ahead) {
    const int64_t step = 2 * PANEL * (narrow ? sizeof(int8_t) : sizeof(uint16_t));
    floats sum[TILE_ROWS][PANEL / LANES];
    const char *line = at;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = (floats){0};
    for (int k = 0; k < inputs; k += 2, line += step, ahead += LINE) {
        words weights[PANEL / LANES];
        __builtin_prefetch(ahead, 0, 2);
        for (int v = 0; v < vectors; v++) /* one by one, or the compiler keeps them in memory */
            if (!narrow) memcpy(weights + v, line + v * sizeof *weights, sizeof *weights);
            else if (v % 2 == 0) widen((const int8_t *)line + 2 * LANES * v, weights + v);
        if (room)
            for (int v = 0; v < vectors; v++) memcpy(room + k * PANEL + 2 * LANES * v, weights + v, sizeof *weights);
        for (int r = 0; r < rows; r++) {
            uint32_t pair;
            memcpy(&pair, input + (int64_t)r * inputs + k, 4);
            for (int v = 0; v < vectors; v++) sum[r][v] = dot_words(sum[r][v], weights[v], pair);
        }
    }
    for (int r = 0; r < rows; r++) {
        float flat[PANEL];
        for (int v = 0; v < vectors; v++) memcpy(flat + LANES * v, &sum[r][v], sizeof(floats));
        if (scales)
            for (int i = 0; i < vectors * LANES; i++) flat[i] *= scales[i];
        if (bias)
            for (int i = 0; i < vectors * LANES; i++) flat[i] += from_bf16(bias[i]);
        for (int i = 0; i < vectors * LANES; i++) output[(int64_t)r * outputs + i] = to_bf16(flat[i]);
    }
}

/* Room for one panel in bfloat16, kept by each thread; null where there is no memory for it. On a huge page it lies in
   one piece, of which the second-level cache holds all. */
static uint16_t *room_of_thread(int64_t elements) {
    static _Thread_local uint16_t *room;
    static _Thread_local int64_t size;
    if (size < elements) {
        free(room);
        const int64_t bytes = (elements * (int64_t)sizeof *room + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        room = aligned_alloc(HUGE_PAGE, bytes);
        size = room ? elements : 0;
#ifdef MADV_HUGEPAGE
        if (room) madvise(room, bytes, MADV_HUGEPAGE);
#endif
    }
    return room;
}

#define TILE(ROWS, NARROW, ROOM)                                                                      \
    if (whole) tile(ROWS, 4, NARROW, x, inputs, at, ROOM, scales, biased, target, outputs, ahead);    \
    else tile(ROWS, 2, NARROW, x, inputs, at, ROOM, scales, biased, target, outputs, ahead);          \
    break;

/* Outputs [half, end) of `panel_linear`, counted in half panels. `next`: panels from one to that which this thread is
   likely to have next. Weights of int8 are widened by every tile, or where rows are many by the first, for all. */
static void some_outputs(const uint16_t *input, matrix weight, const uint16_t *bias, uint16_t *output, int rows,
                         int inputs, int outputs, int half, int end, int next) {
    const int64_t panel = panel_size(inputs), size = weight.scales ? sizeof(int8_t) : sizeof(uint16_t);
    uint16_t *room = weight.scales && rows >= TILE_ROWS ? room_of_thread(panel) : 0;
    const int many = room || rows > 2 * TILE_ROWS;
    while (half < end) { /* whole panels where that is possible */
        int whole = half % 2 == 0 && half + 2 <= end;
        int first = half * (PANEL / 2);
        const char *own = (const char *)weight.panels + (half / 2 * panel + half % 2 * PANEL) * size;
        const uint16_t *biased = bias ? bias + first : 0;
        const float *scales = weight.scales ? weight.scales + first : 0;
        const void *at = own;
        int narrow = weight.scales != 0, count;
        for (int row = 0, turn = 0; row < rows; row += count, turn++) {
            const uint16_t *x = input + (int64_t)row * inputs;
            uint16_t *target = output + (int64_t)row * outputs + first;
            /* With many rows the first tiles fetch the next panel, which else would come while nothing is computed;
               with few all waits for memory anyway, and the tile's own lines come first. */
            const int64_t fetched = turn * LINE * (int64_t)(inputs / 2);
            const char *ahead = own + (many && fetched < panel * size ? next * panel * size + fetched : 0);
            const int most = narrow ? NARROW_ROWS : TILE_ROWS;
            count = rows - row < most ? rows - row : most;
            switch (count + (narrow ? room ? 2 * TILE_ROWS : TILE_ROWS : 0)) {
                case 1: TILE(1, 0, 0)
                case 2: TILE(2, 0, 0)
                case 3: TILE(3, 0, 0)
                case 4: TILE(4, 0, 0)
                case 5: TILE(5, 0, 0)
                case 6: TILE(6, 0, 0)
                case TILE_ROWS + 1: TILE(1, 1, 0)
                case TILE_ROWS + 2: TILE(2, 1, 0)
                case TILE_ROWS + 3: TILE(3, 1, 0)
                case TILE_ROWS + 4: TILE(4, 1, 0)
                case 2 * TILE_ROWS + NARROW_ROWS: TILE(NARROW_ROWS, 1, room)
            }
            if (room) {
                at = room;
                narrow = 0;
            }
        }
        half += whole ? 2 : 1;
    }
}

/* All outputs, shared by the threads of the region it is called in as each is ready for more: on a machine that is not
   theirs alone equal shares end apart. Half panels come last. None waits at the end. */
static void share_outputs(const uint16_t *input, matrix weight, const uint16_t *bias, uint16_t *output, int rows,
                          int inputs, int outputs) {
    const int threads = omp_get_num_threads(), halves = outputs / (PANEL / 2);
    const int whole = halves / 2 > threads ? halves / 2 - threads : 0;
#pragma omp for schedule(dynamic) nowait
    for (int each = 0; each < halves - whole; each++) {
        const int half = each < whole ? 2 * each : whole + each;
        some_outputs(input, weight, bias, output, rows, inputs, outputs, half, half + (each < whole ? 2 : 1), threads);
    }
}

/* input [rows, inputs], inputs even; panels and scales (or null): see `matrix`; bias [outputs] or null
   -> output [rows, outputs], outputs a multiple of 32. */
void panel_linear(const uint16_t *input, const void *panels, const float *scales, const uint16_t *bias,
                  uint16_t *output, int rows, int inputs, int outputs) {
    const int64_t halves = outputs / (PANEL / 2);
    const matrix weight = {panels, scales};
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
    const int64_t panel = panel_size(inputs);
    int64_t wrong = 0;
#pragma omp parallel for reduction(+ : wrong)
    for (int n = 0; n < outputs; n++) {
        const uint16_t *at = packed + n / PANEL * panel + n % PANEL * 2;
        for (int k = 0; k < inputs; k++) wrong += at[k / 2 * 2 * PANEL + k % 2] != weight[(int64_t)n * inputs + k];
    }
    return wrong == 0;
}
