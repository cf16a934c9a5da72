/* bench_sampling.c - argmax, sample, renormalize, mask_logits: what becomes of rows of logits.
 * Bytes: the logits, read once, and rows that are written.
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
    float *temperature, *top_p, *min_p; /* NULL where they change nothing */
    int32_t *top_k;
    uint64_t *seed, *offset;
    void *out; /* [batch][vocab] of dtype */
} state;

static int64_t num_draws(const state *s)
{
    return s->batch > NUM_DRAWS ? s->batch : NUM_DRAWS;
}

static void setup(bench *b, const char *table)
{
    state *s = b->state = bench_alloc(b, 1, sizeof *s);
    s->batch = bench_int(b, KEY_BATCH);
    s->vocab = bench_int(b, KEY_VOCAB);
    s->dtype = problem_dtype(b->p, KEY_DTYPE);
    const int64_t n = s->batch * s->vocab;
    b->bytes = (double)data_bytes(s->dtype, n);
    bench_rotate(b, b->bytes, b->bytes);
    s->logits =
        bench_normal(b, s->dtype, (double)b->num_sets * (double)n, b->p->value[KEY_SPREAD].real);
    s->tokens = bench_memory(b, (double)num_draws(s), sizeof *s->tokens);
    bench_rows_of(b, table, b->row, sizeof b->row);
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

static void argmax_setup(bench *b)
{
    setup(b, "argmax");
}

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

/* One number for each draw, on the device; NULL where it is the one that changes nothing. */
static float *numbers(bench *b, problem_key key, double neutral)
{
    const int64_t n = num_draws(b->state);
    const double x = b->p->value[key].real;
    if (!(x < neutral || x > neutral)) return NULL;
    float *host = bench_alloc(b, (double)n, sizeof *host);
    for (int64_t i = 0; i < n; i++) host[i] = (float)x;
    return bench_upload(b, host, (size_t)n * sizeof *host);
}

static uint64_t *random_numbers(bench *b)
{
    const int64_t n = num_draws(b->state);
    uint64_t *host = bench_alloc(b, (double)n, sizeof *host);
    for (int64_t i = 0; i < n; i++) host[i] = data_u64(&b->random);
    return bench_upload(b, host, (size_t)n * sizeof *host);
}

static int64_t top_k_of(const bench *b)
{
    const state *s = b->state;
    const int64_t k = bench_int(b, KEY_TOP_K);
    return k > 0 && k < s->vocab ? k : s->vocab;
}

static void filter_setup(bench *b, bool has_probs)
{
    setup(b, "sampling");
    state *s = b->state;
    const int64_t n = num_draws(s);
    s->temperature = numbers(b, KEY_TEMPERATURE, 1);
    s->top_p = has_probs ? numbers(b, KEY_TOP_P, 1) : NULL;
    s->min_p = has_probs ? numbers(b, KEY_MIN_P, 0) : NULL;
    if (top_k_of(b) == s->vocab) return;
    int32_t *top_k = bench_alloc(b, (double)n, sizeof *top_k);
    for (int64_t i = 0; i < n; i++) top_k[i] = (int32_t)bench_int(b, KEY_TOP_K);
    s->top_k = bench_upload(b, top_k, (size_t)n * sizeof *top_k);
}

static void sample_setup(bench *b)
{
    filter_setup(b, true);
    state *s = b->state;
    s->seed = random_numbers(b);
    s->offset = random_numbers(b);
}

/* The stages of n rows, and the tensors that they are in. */
typedef struct stage_params {
    data_tensor temperature, top_k, top_p, min_p, seed, offset;
    qkv_sampling_params params;
} stage_params;

static void set_params(const bench *b, int64_t n, stage_params *t)
{
    const state *s = b->state;
    BENCH_TENSOR(b, &t->temperature, s->temperature, QKV_F32, n);
    BENCH_TENSOR(b, &t->top_k, s->top_k, QKV_I32, n);
    BENCH_TENSOR(b, &t->top_p, s->top_p, QKV_F32, n);
    BENCH_TENSOR(b, &t->min_p, s->min_p, QKV_F32, n);
    BENCH_TENSOR(b, &t->seed, s->seed, QKV_U64, n);
    BENCH_TENSOR(b, &t->offset, s->offset, QKV_U64, n);
    t->params = (qkv_sampling_params){QKV_SAMPLING_PARAMS_INIT,
                                      .temperature = s->temperature ? &t->temperature.t : NULL,
                                      .top_k = s->top_k ? &t->top_k.t : NULL,
                                      .top_p = s->top_p ? &t->top_p.t : NULL,
                                      .min_p = s->min_p ? &t->min_p.t : NULL,
                                      .seed = s->seed ? &t->seed.t : NULL,
                                      .offset = s->offset ? &t->offset.t : NULL};
}

/* n rows of logits, row_stride apart, to the first tokens. */
static void draw(const bench *b, void *logits, int64_t n, int64_t row_stride)
{
    const state *s = b->state;
    data_tensor tokens, rows;
    stage_params t;
    int64_t strides[] = {row_stride, 1};
    BENCH_TENSOR(b, &tokens, s->tokens, QKV_I32, n);
    BENCH_TENSOR(b, &rows, logits, s->dtype, n, s->vocab);
    rows.t.strides = strides;
    set_params(b, n, &t);
    tool_check(qkv_sample(b->ctx, &tokens.t, &rows.t, &t.params, b->stream), "qkv_sample");
}

static void sample_run(bench *b, int64_t set)
{
    state *s = b->state;
    draw(b, row_at(s, set, 0), s->batch, s->vocab);
}

/* A row's logits and the distribution that they stand for. */
typedef struct distribution {
    double *logit; /* [vocab] */
    double *order; /* [vocab] the same, ascending */
    double temperature, max;
    double least; /* the smallest logit that the filters keep */
    double kept;  /* sum of exp((logit - max) / temperature) of those */
} distribution;

static double mass(const distribution *d, double logit)
{
    return exp((logit - d->max) / d->temperature);
}

static distribution distribution_of(bench *b, int64_t set, int64_t row)
{
    const state *s = b->state;
    const problem_value *v = b->p->value;
    const int64_t top_k = top_k_of(b);
    distribution d = {.logit = read_row(b, set, row),
                      .order = read_row(b, set, row),
                      .temperature = v[KEY_TEMPERATURE].real};
    tool_sort(d.order, (size_t)s->vocab);
    d.least = d.max = d.order[s->vocab - 1];
    double k_mass = 0;
    for (int64_t i = 0; i < top_k; i++) k_mass += mass(&d, d.order[s->vocab - 1 - i]);
    for (int64_t i = 0; i < top_k; i++) {
        const double l = d.order[s->vocab - 1 - i], p = mass(&d, l);
        if (s->top_p && d.kept >= v[KEY_TOP_P].real * k_mass) break;
        if (s->min_p && p < v[KEY_MIN_P].real) break;
        d.kept += p;
        d.least = l;
    }
    return d;
}

static void distribution_free(distribution *d)
{
    data_free(d->logit);
    data_free(d->order);
}

/* Of what the filters keep, exactly or within rounding? */
static bool keeps(const distribution *d, double logit)
{
    return logit >= d->least - 1e-4 * (1 + fabs(d->least));
}

/* Fails a token that the filters exclude; returns where it lies in [0, 1], the kept mass counted by index. */
static double place(const bench *b, const distribution *d, int64_t token)
{
    double before = 0;
    bench_expect(b, keeps(d, d->logit[token]), 1, 0, "filters: token %lld", (long long)token);
    for (int64_t i = 0; i < token; i++)
        if (d->logit[i] >= d->least) before += mass(d, d->logit[i]);
    return (before + mass(d, d->logit[token]) / 2) / d->kept;
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
    distribution d = distribution_of(b, set, row);
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
    distribution_free(&d);
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

/* ---- renormalize, mask_logits --------------------------------------------------------------- */

static void output_setup(bench *b, bool has_probs)
{
    filter_setup(b, has_probs);
    state *s = b->state;
    b->bytes *= 2;
    s->out = bench_memory(b, (double)s->batch * (double)s->vocab, data_bytes(s->dtype, 1));
}

static void renormalize_setup(bench *b)
{
    output_setup(b, true);
}

static void mask_setup(bench *b)
{
    output_setup(b, false);
}

static void output_run(bench *b, int64_t set, bool is_mask)
{
    state *s = b->state;
    data_tensor out, rows;
    stage_params t;
    BENCH_TENSOR(b, &out, s->out, s->dtype, s->batch, s->vocab);
    BENCH_TENSOR(b, &rows, row_at(s, set, 0), s->dtype, s->batch, s->vocab);
    set_params(b, s->batch, &t);
    if (is_mask)
        tool_check(qkv_mask_logits(b->ctx, &out.t, &rows.t, &t.params, b->stream), "mask_logits");
    else
        tool_check(qkv_renormalize(b->ctx, &out.t, &rows.t, &t.params, b->stream), "renormalize");
}

static void renormalize_run(bench *b, int64_t set)
{
    output_run(b, set, false);
}

static void mask_run(bench *b, int64_t set)
{
    output_run(b, set, true);
}

static void output_verify(bench *b, bool is_mask)
{
    state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets), row = data_below(&b->random, s->batch);
    bench_poison(b, s->out, s->dtype, s->batch * s->vocab);
    output_run(b, set, is_mask);
    double *got = bench_alloc(b, (double)s->vocab, sizeof *got);
    bench_results(b, s->out, s->dtype, row * s->vocab, s->vocab, got);
    distribution d = distribution_of(b, set, row);
    const double rounding = s->dtype.bits == 32          ? 1e-5
                            : s->dtype.code == kDLBfloat ? 0x1p-8
                                                         : 0x1p-10;
    for (int64_t i = 0; i < s->vocab; i++) {
        const double l = d.logit[i], dropped = is_mask ? -INFINITY : 0;
        const double kept = is_mask ? l / d.temperature : mass(&d, l) / d.kept;
        const bool edge = keeps(&d, l) && !(l > d.least + 1e-4 * (1 + fabs(d.least)));
        if (edge && !(got[i] > dropped)) continue;
        const double expected = keeps(&d, l) ? kept : dropped;
        if (isinf(expected))
            bench_expect(b, got[i] < 0 && isinf(got[i]), 1, 0, "token %lld is masked",
                         (long long)i);
        else
            bench_expect(b, got[i], expected, rounding * fabs(expected) + 1e-9, "token %lld",
                         (long long)i);
    }
    distribution_free(&d);
}

static void renormalize_verify(bench *b)
{
    output_verify(b, false);
}

static void mask_verify(bench *b)
{
    output_verify(b, true);
}

const bench_op bench_argmax = {
    .name = "argmax", .setup = argmax_setup, .run = argmax_run, .verify = argmax_verify};
const bench_op bench_sample = {
    .name = "sample", .setup = sample_setup, .run = sample_run, .verify = sample_verify};
const bench_op bench_renormalize = {.name = "renormalize",
                                    .setup = renormalize_setup,
                                    .run = renormalize_run,
                                    .verify = renormalize_verify};
const bench_op bench_mask_logits = {
    .name = "mask_logits", .setup = mask_setup, .run = mask_run, .verify = mask_verify};
