/* bench_sampling.c - argmax, sample: from rows of logits to tokens.
 * Bytes: the logits, read once.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "bench.h"

enum {
    NUM_ROWS = 16,  /* rows that are checked */
    NUM_DRAWS = 64, /* from one distribution */
};

typedef struct state {
    int64_t batch, vocab;
    DLDataType dtype;
    bench_array logits; /* [num_sets][batch][vocab] */
    int32_t *tokens;    /* [batch or NUM_DRAWS], as all that follow, on the device */
    float *temperature, *top_p, *min_p;
    int32_t *top_k;
    uint64_t *seed, *offset;
} state;

static int64_t num_draws(const state *s)
{
    return s->batch > NUM_DRAWS ? s->batch : NUM_DRAWS;
}

static void setup(bench *b)
{
    state *s = b->state = bench_alloc(b, 1, sizeof *s);
    s->batch = bench_int(b, KEY_BATCH);
    s->vocab = bench_int(b, KEY_VOCAB);
    s->dtype = problem_dtype(b->p, KEY_DTYPE);
    const int64_t n = s->batch * s->vocab;
    b->bytes = (double)data_bytes(s->dtype, n);
    bench_rotate(b, b->bytes, b->bytes);
    s->logits = bench_random(b, s->dtype, (double)b->num_sets * (double)n, 8);
    s->tokens = bench_memory(b, (double)num_draws(s), sizeof *s->tokens);
    bench_rows_of(b, b->p->op, b->row, sizeof b->row);
}

static char *row_at(const state *s, int64_t set, int64_t row)
{
    return bench_at(&s->logits, (set * s->batch + row) * s->vocab);
}

static void poison_tokens(bench *b)
{
    const state *s = b->state;
    bench_poison(b, s->tokens, QKV_I32, num_draws(s)); /* -1 */
}

/* The first n tokens, on the host. */
static void read_tokens(bench *b, int64_t n, int32_t *out)
{
    const state *s = b->state;
    memcpy(out, bench_fetch(b, s->tokens, (size_t)n * sizeof *out), (size_t)n * sizeof *out);
}

/* ---- argmax -------------------------------------------------------------------------------- */

static void argmax_run(bench *b, int64_t set)
{
    state *s = b->state;
    data_tensor tokens, logits;
    BENCH_TENSOR(b, &tokens, s->tokens, QKV_I32, s->batch);
    BENCH_TENSOR(b, &logits, row_at(s, set, 0), s->dtype, s->batch, s->vocab);
    tool_check(qkv_argmax(b->ctx, &tokens.t, &logits.t, b->stream), "qkv_argmax");
}

static int64_t largest(const state *s, const double *row)
{
    int64_t best = 0;
    for (int64_t i = 1; i < s->vocab; i++)
        if (row[i] > row[best]) best = i;
    return best;
}

/* A row's logits on the host. */
static double *read_row(bench *b, int64_t set, int64_t row)
{
    const state *s = b->state;
    double *logits = data_alloc((double)s->vocab, sizeof *logits);
    bench_read(&s->logits, (set * s->batch + row) * s->vocab, s->vocab, logits);
    return logits;
}

static void argmax_verify(bench *b)
{
    state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets);
    int32_t *tokens = bench_alloc(b, (double)s->batch, sizeof *tokens);
    poison_tokens(b);
    argmax_run(b, set);
    read_tokens(b, s->batch, tokens);
    for (int i = 0; i < NUM_ROWS; i++) {
        const int64_t row = data_below(&b->random, s->batch);
        double *logits = read_row(b, set, row);
        bench_expect(b, tokens[row], (double)largest(s, logits), 0, "token of row %lld",
                     (long long)row);
        data_free(logits);
    }
}

/* ---- sample -------------------------------------------------------------------------------- */

static void sample_setup(bench *b)
{
    setup(b);
    state *s = b->state;
    const int64_t n = num_draws(s);
    float *temperature = bench_alloc(b, (double)n, sizeof *temperature);
    int32_t *top_k = bench_alloc(b, (double)n, sizeof *top_k);
    float *top_p = bench_alloc(b, (double)n, sizeof *top_p);
    float *min_p = bench_alloc(b, (double)n, sizeof *min_p);
    uint64_t *seed = bench_alloc(b, (double)n, sizeof *seed);
    uint64_t *offset = bench_alloc(b, (double)n, sizeof *offset);
    for (int64_t i = 0; i < n; i++) {
        temperature[i] = (float)b->p->value[KEY_TEMPERATURE].real;
        top_k[i] = (int32_t)bench_int(b, KEY_TOP_K);
        top_p[i] = (float)b->p->value[KEY_TOP_P].real;
        min_p[i] = (float)b->p->value[KEY_MIN_P].real;
        seed[i] = data_u64(&b->random);
        offset[i] = data_u64(&b->random) >> 1;
    }
    s->temperature = bench_upload(b, temperature, (size_t)n * sizeof *temperature);
    s->top_k = bench_upload(b, top_k, (size_t)n * sizeof *top_k);
    s->top_p = bench_upload(b, top_p, (size_t)n * sizeof *top_p);
    s->min_p = bench_upload(b, min_p, (size_t)n * sizeof *min_p);
    s->seed = bench_upload(b, seed, (size_t)n * sizeof *seed);
    s->offset = bench_upload(b, offset, (size_t)n * sizeof *offset);
}

/* n rows of logits, row_stride apart, to the first tokens. */
static void draw(const bench *b, void *logits, int64_t n, int64_t row_stride)
{
    const state *s = b->state;
    data_tensor tokens, rows, temperature, top_k, top_p, min_p, seed, offset;
    int64_t strides[] = {row_stride, 1};
    BENCH_TENSOR(b, &tokens, s->tokens, QKV_I32, n);
    BENCH_TENSOR(b, &rows, logits, s->dtype, n, s->vocab);
    rows.t.strides = strides;
    BENCH_TENSOR(b, &temperature, s->temperature, QKV_F32, n);
    BENCH_TENSOR(b, &top_k, s->top_k, QKV_I32, n);
    BENCH_TENSOR(b, &top_p, s->top_p, QKV_F32, n);
    BENCH_TENSOR(b, &min_p, s->min_p, QKV_F32, n);
    BENCH_TENSOR(b, &seed, s->seed, QKV_U64, n);
    BENCH_TENSOR(b, &offset, s->offset, QKV_U64, n);
    const qkv_sampling_params params = {QKV_SAMPLING_PARAMS_INIT, .temperature = &temperature.t,
                                        .top_k = &top_k.t,        .top_p = &top_p.t,
                                        .min_p = &min_p.t,        .seed = &seed.t,
                                        .offset = &offset.t};
    tool_check(qkv_sample(b->ctx, &tokens.t, &rows.t, &params, b->stream), "qkv_sample");
}

static void sample_run(bench *b, int64_t set)
{
    state *s = b->state;
    draw(b, row_at(s, set, 0), s->batch, s->vocab);
}

/* A row's logits and the distribution that they stand for, before filters. */
typedef struct distribution {
    double *logit; /* [vocab] */
    double *order; /* [vocab] the same, ascending */
    double temperature, max, sum;
} distribution;

static double mass(const distribution *d, double logit)
{
    return exp((logit - d->max) / d->temperature) / d->sum;
}

/* Fails a token that the filters exclude, by more than rounding; returns where it lies in [0,
 * 1], the kept mass counted from the largest logit on. */
static double place(const bench *b, const distribution *d, int64_t token)
{
    const state *s = b->state;
    const problem_value *v = b->p->value;
    const int64_t top_k =
        v[KEY_TOP_K].first > 0 && v[KEY_TOP_K].first < s->vocab ? v[KEY_TOP_K].first : s->vocab;
    const double logit = d->logit[token], p_max = mass(d, d->max);
    double k_mass = 0, kept = 0, above = 0, beside = 0;
    for (int64_t i = 0; i < top_k; i++) k_mass += mass(d, d->order[s->vocab - 1 - i]);
    int64_t num_above = 0;
    for (int64_t i = 0; i < top_k; i++) {
        const double l = d->order[s->vocab - 1 - i], p = mass(d, l);
        if (kept >= v[KEY_TOP_P].real * k_mass || p < v[KEY_MIN_P].real * p_max) break;
        kept += p;
        if (l > logit) above += p, num_above++;
        if (!(l < logit) && !(l > logit)) beside += p;
    }
    const double slack = 1e-5;
    bench_expect(b, num_above < top_k, 1, 0, "top_k: token %lld", (long long)token);
    bench_expect(b, above < (v[KEY_TOP_P].real + slack) * k_mass, 1, 0, "top_p: token %lld",
                 (long long)token);
    bench_expect(b, mass(d, logit) >= v[KEY_MIN_P].real * p_max * (1 - slack), 1, 0,
                 "min_p: token %lld", (long long)token);
    return (above + beside / 2) / kept;
}

/* Many draws from one row: the places of the tokens must be uniform in [0, 1], as far as the
 * steps of the distribution let them: mean and bound of six standard deviations. */
static void verify_row(bench *b, int64_t set, int64_t row)
{
    const state *s = b->state;
    char *logits = row_at(s, set, row);
    int32_t tokens[NUM_DRAWS], again[NUM_DRAWS];
    poison_tokens(b);
    draw(b, logits, NUM_DRAWS, 0);
    read_tokens(b, NUM_DRAWS, tokens);
    draw(b, logits, NUM_DRAWS, 0);
    read_tokens(b, NUM_DRAWS, again);
    distribution d = {.logit = read_row(b, set, row),
                      .order = read_row(b, set, row),
                      .temperature = b->p->value[KEY_TEMPERATURE].real,
                      .max = -INFINITY};
    for (int64_t i = 0; i < s->vocab; i++) d.max = fmax(d.max, d.logit[i]);
    for (int64_t i = 0; i < s->vocab; i++) d.sum += exp((d.logit[i] - d.max) / d.temperature);
    tool_sort(d.order, (size_t)s->vocab);
    const int64_t best = largest(s, d.logit);
    double mean = 0;
    for (int i = 0; i < NUM_DRAWS; i++) {
        bench_expect(b, tokens[i] >= 0 && tokens[i] < s->vocab, 1, 0, "range: token %d", tokens[i]);
        bench_expect(b, again[i], tokens[i], 0, "draw %d, repeated", i);
        if (d.temperature > 0)
            mean += place(b, &d, tokens[i]) / NUM_DRAWS;
        else
            bench_expect(b, tokens[i], (double)best, 0, "draw %d at temperature 0", i);
    }
    if (d.temperature > 0)
        bench_expect(b, mean, 0.5, 6 / sqrt(12.0 * NUM_DRAWS), "mean place of %d draws", NUM_DRAWS);
    data_free(d.logit);
    data_free(d.order);
}

static void sample_verify(bench *b)
{
    state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets), row = data_below(&b->random, s->batch);
    verify_row(b, set, row);
    /* The batch that is timed draws the same for a row as the row alone with its seed. */
    int32_t together, alone;
    poison_tokens(b);
    sample_run(b, set);
    read_tokens(b, 1, &together);
    draw(b, row_at(s, set, 0), 1, s->vocab);
    read_tokens(b, 1, &alone);
    bench_expect(b, together, alone, 0, "row 0 of the batch");
}

const bench_op bench_argmax = {
    .name = "argmax", .setup = setup, .run = argmax_run, .verify = argmax_verify};
const bench_op bench_sample = {
    .name = "sample", .setup = sample_setup, .run = sample_run, .verify = sample_verify};
