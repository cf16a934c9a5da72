/* bench_sampling.c - argmax, sample: from rows of logits to tokens.
 * Bytes: the logits, read once.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "bench.h"

enum {
    NUM_ROWS = 16,  /* rows that are checked */
    NUM_DRAWS = 64, /* from one distribution */
};

typedef struct state {
    int64_t batch, vocab;
    DLDataType dtype;
    char *logits;    /* [num_sets][batch][vocab] */
    int32_t *tokens; /* [batch] */
    /* sample: [batch or NUM_DRAWS] */
    float *temperature, *top_p, *min_p;
    int32_t *top_k;
    uint64_t *seed, *offset;
} state;

static void setup(bench *b)
{
    state *s = b->state = bench_alloc(b, 1, sizeof *s);
    s->batch = bench_int(b, KEY_BATCH);
    s->vocab = bench_int(b, KEY_VOCAB);
    s->dtype = problem_dtype(b->p, KEY_DTYPE);
    const int64_t n = s->batch * s->vocab;
    b->bytes = (double)data_bytes(s->dtype, n);
    bench_rotate(b, b->bytes, b->bytes);
    s->logits = bench_alloc(b, (double)b->num_sets * b->bytes, 1);
    s->tokens = bench_alloc(b, (double)s->batch, sizeof *s->tokens);
    data_fill(&b->random, s->logits, s->dtype, b->num_sets * n, 8);
    bench_rows_of(b, b->p->op);
}

static char *row_at(const state *s, int64_t set, int64_t row)
{
    return s->logits + data_bytes(s->dtype, (set * s->batch + row) * s->vocab);
}

static void poison_tokens(const state *s)
{
    for (int64_t i = 0; i < s->batch; i++) s->tokens[i] = -1;
}

/* ---- argmax -------------------------------------------------------------------------------- */

static void argmax_run(bench *b, int64_t set)
{
    state *s = b->state;
    data_tensor tokens, logits;
    DATA_TENSOR(&tokens, s->tokens, QKV_I32, s->batch);
    DATA_TENSOR(&logits, row_at(s, set, 0), s->dtype, s->batch, s->vocab);
    tool_check(qkv_argmax(b->ctx, &tokens.t, &logits.t, NULL), "qkv_argmax");
}

static int64_t largest(const state *s, const char *row)
{
    int64_t best = 0;
    for (int64_t i = 1; i < s->vocab; i++)
        if (data_get(row, s->dtype, i) > data_get(row, s->dtype, best)) best = i;
    return best;
}

static void argmax_verify(bench *b)
{
    state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets);
    poison_tokens(s);
    argmax_run(b, set);
    for (int i = 0; i < NUM_ROWS; i++) {
        const int64_t row = data_below(&b->random, s->batch);
        bench_expect(b, s->tokens[row], (double)largest(s, row_at(s, set, row)), 0,
                     "token of row %lld", (long long)row);
    }
}

/* ---- sample -------------------------------------------------------------------------------- */

static void sample_setup(bench *b)
{
    setup(b);
    state *s = b->state;
    const int64_t n = s->batch > NUM_DRAWS ? s->batch : NUM_DRAWS;
    s->temperature = bench_alloc(b, (double)n, sizeof *s->temperature);
    s->top_k = bench_alloc(b, (double)n, sizeof *s->top_k);
    s->top_p = bench_alloc(b, (double)n, sizeof *s->top_p);
    s->min_p = bench_alloc(b, (double)n, sizeof *s->min_p);
    s->seed = bench_alloc(b, (double)n, sizeof *s->seed);
    s->offset = bench_alloc(b, (double)n, sizeof *s->offset);
    for (int64_t i = 0; i < n; i++) {
        s->temperature[i] = (float)b->p->value[KEY_TEMPERATURE].real;
        s->top_k[i] = (int32_t)bench_int(b, KEY_TOP_K);
        s->top_p[i] = (float)b->p->value[KEY_TOP_P].real;
        s->min_p[i] = (float)b->p->value[KEY_MIN_P].real;
        s->seed[i] = data_u64(&b->random);
        s->offset[i] = data_u64(&b->random) >> 1;
    }
}

/* n rows of logits, row_stride apart, to tokens. */
static void draw(const bench *b, void *logits, int64_t n, int64_t row_stride, int32_t *to)
{
    const state *s = b->state;
    data_tensor tokens, rows, temperature, top_k, top_p, min_p, seed, offset;
    int64_t strides[] = {row_stride, 1};
    DATA_TENSOR(&tokens, to, QKV_I32, n);
    DATA_TENSOR(&rows, logits, s->dtype, n, s->vocab);
    rows.t.strides = strides;
    DATA_TENSOR(&temperature, s->temperature, QKV_F32, n);
    DATA_TENSOR(&top_k, s->top_k, QKV_I32, n);
    DATA_TENSOR(&top_p, s->top_p, QKV_F32, n);
    DATA_TENSOR(&min_p, s->min_p, QKV_F32, n);
    DATA_TENSOR(&seed, s->seed, QKV_U64, n);
    DATA_TENSOR(&offset, s->offset, QKV_U64, n);
    const qkv_sampling_params params = {QKV_SAMPLING_PARAMS_INIT, .temperature = &temperature.t,
                                        .top_k = &top_k.t,        .top_p = &top_p.t,
                                        .min_p = &min_p.t,        .seed = &seed.t,
                                        .offset = &offset.t};
    tool_check(qkv_sample(b->ctx, &tokens.t, &rows.t, &params, NULL), "qkv_sample");
}

static void sample_run(bench *b, int64_t set)
{
    state *s = b->state;
    draw(b, row_at(s, set, 0), s->batch, s->vocab, s->tokens);
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
    state *s = b->state;
    char *logits = row_at(s, set, row);
    int32_t tokens[NUM_DRAWS], again[NUM_DRAWS];
    for (int i = 0; i < NUM_DRAWS; i++) tokens[i] = -1;
    draw(b, logits, NUM_DRAWS, 0, tokens);
    draw(b, logits, NUM_DRAWS, 0, again);
    distribution d = {.logit = data_alloc((double)s->vocab, sizeof(double)),
                      .order = data_alloc((double)s->vocab, sizeof(double)),
                      .temperature = b->p->value[KEY_TEMPERATURE].real,
                      .max = -INFINITY};
    for (int64_t i = 0; i < s->vocab; i++) {
        d.logit[i] = d.order[i] = data_get(logits, s->dtype, i);
        d.max = fmax(d.max, d.logit[i]);
    }
    for (int64_t i = 0; i < s->vocab; i++) d.sum += exp((d.logit[i] - d.max) / d.temperature);
    tool_sort(d.order, (size_t)s->vocab);
    const int64_t best = largest(s, logits);
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
    poison_tokens(s);
    sample_run(b, set);
    int32_t alone[NUM_DRAWS];
    draw(b, row_at(s, set, 0), 1, s->vocab, alone);
    bench_expect(b, s->tokens[0], alone[0], 0, "row 0 of the batch");
}

const bench_op bench_argmax = {
    .name = "argmax", .setup = setup, .run = argmax_run, .verify = argmax_verify};
const bench_op bench_sample = {
    .name = "sample", .setup = sample_setup, .run = sample_run, .verify = sample_verify};
