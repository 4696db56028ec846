/* Sampling from rows of bfloat16 logits, for CPUs: the argmax or a plain draw. As in workers/sampling_draw.py the
   likeliest token weighs 2**42 and weights are summed as integers in vocabulary order, so a draw depends on its row
   alone.

   cpu_step.c includes it; it knows nothing of layers. */

#define SPAN 256 /* tokens whose weights are summed before they are looked at one by one */
#define WHOLE 4398046511104.0f
#define LEAST -40.0f /* exponents below weigh nothing: exp(-40) * WHOLE < 1 */

static inline int is_special(uint16_t bits) { /* NaN or +inf, which -ffast-math does not compare */
    return (bits & 0x7f80) == 0x7f80 && bits != 0xff80;
}

/* Weights of `count` logits, and their sum. Not inlined: both who call it must get the same weights. */
static __attribute__((noinline)) int64_t weigh(const uint16_t *restrict logits, int count, float peak, float scale,
                                               int64_t *restrict weights) {
    int64_t sum = 0;
    for (int i = 0; i < count; i++) {
        float exponent = (from_bf16(logits[i]) - peak) * scale;
        weights[i] = (int64_t)(expf(exponent > LEAST ? exponent : LEAST) * WHOLE);
        sum += weights[i];
    }
    return sum;
}

static int first_special(const uint16_t *logits, int vocab) {
    int found = 0;
    for (int i = 0; i < vocab; i++) found |= is_special(logits[i]);
    if (!found) return -1;
    int first = 0;
    while (!is_special(logits[first])) first++;
    return first;
}

static int64_t sample_row(const uint16_t *logits, int vocab, float scale, double uniform) {
    const int special = first_special(logits, vocab), spans = (vocab + SPAN - 1) / SPAN;
    if (special >= 0) return special;
    float peak = -3e38f;
    for (int i = 0; i < vocab; i++) peak = from_bf16(logits[i]) > peak ? from_bf16(logits[i]) : peak;
    if (peak == -3e38f) return 0; /* nothing but -inf */
    if (scale == 0.0f) {
        int first = 0;
        while (from_bf16(logits[first]) < peak) first++;
        return first;
    }
    int64_t weights[SPAN], sums[spans], total = 0;
    for (int each = 0, start = 0; each < spans; each++, start += SPAN)
        total += sums[each] = weigh(logits + start, vocab - start < SPAN ? vocab - start : SPAN, peak, scale, weights);
    int64_t rest = (int64_t)(uniform * (double)total), token = 0;
    if (rest >= total) rest = total - 1; /* which rounding may lift it to */
    while (rest >= sums[token]) rest -= sums[token++];
    token *= SPAN;
    weigh(logits + token, vocab - token < SPAN ? (int)(vocab - token) : SPAN, peak, scale, weights);
    for (int i = 0; rest >= weights[i]; i++, token++) rest -= weights[i];
    return token;
}

/* logits [rows, stride], of which `vocab` count; inverse temperatures [rows], 0 for the argmax; uniforms [rows] in
   [0, 1) -> tokens [rows]. */
void sample_rows(const uint16_t *logits, int64_t stride, const float *inv_temperature, const double *uniforms,
                 int64_t *tokens, int rows, int vocab) {
#pragma omp parallel for schedule(dynamic)
    for (int row = 0; row < rows; row++)
        tokens[row] = sample_row(logits + row * stride, vocab, inv_temperature[row], uniforms[row]);
}
