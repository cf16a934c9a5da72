/* bench_top_k.c - top_k, log_probs: numbers about a few tokens of each row.
 * Bytes: the logits, read once.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "bench.h"

typedef struct state {
    int64_t batch, vocab, k; /* k: tokens of a row that are asked for */
    DLDataType dtype;
    bench_array logits; /* [num_sets][batch][vocab] */
    int32_t *indices;   /* [batch][k], as what follows; the tokens of log_probs */
    void *values;       /* of dtype */
    float *log_probs;
    int32_t *ranks;
} state;

static void setup(bench *b, const char *table)
{
    state *s = b->state = bench_alloc(b, 1, sizeof *s);
    s->batch = bench_int(b, KEY_BATCH);
    s->vocab = bench_int(b, KEY_VOCAB);
    s->k = bench_int(b, KEY_TOP_K);
    if (s->k == 0 || s->k > s->vocab) s->k = s->vocab;
    s->dtype = problem_dtype(b->p, KEY_DTYPE);
    const int64_t n = s->batch * s->vocab;
    b->bytes = (double)data_bytes(s->dtype, n);
    bench_rotate(b, b->bytes, b->bytes);
    s->logits =
        bench_normal(b, s->dtype, (double)b->num_sets * (double)n, b->p->value[KEY_SPREAD].real);
    bench_rows_of(b, table, b->row, sizeof b->row);
}

static data_tensor *logits_of(const bench *b, int64_t set, data_tensor *out)
{
    const state *s = b->state;
    char *first = bench_at(&s->logits, set * s->batch * s->vocab);
    BENCH_TENSOR(b, out, first, s->dtype, s->batch, s->vocab);
    return out;
}

/* A row's logits, and on request its largest k, ascending, at the end of as many. */
static double *read_row(bench *b, int64_t set, int64_t row, bool sorted)
{
    const state *s = b->state;
    double *logits = data_alloc((double)s->vocab, sizeof *logits);
    bench_read(&s->logits, (set * s->batch + row) * s->vocab, s->vocab, logits);
    if (sorted) tool_sort(logits, (size_t)s->vocab);
    return logits;
}

/* A row's k numbers of 32 bits, copied from the device. */
static void read_numbers(bench *b, const void *from, int64_t row, void *out)
{
    const state *s = b->state;
    const size_t bytes = (size_t)s->k * 4;
    memcpy(out, bench_fetch(b, (const char *)from + (size_t)row * bytes, bytes), bytes);
}

/* ---- top_k ---------------------------------------------------------------------------------- */

static void top_k_setup(bench *b)
{
    setup(b, "top_k");
    state *s = b->state;
    const double n = (double)s->batch * (double)s->k;
    s->indices = bench_memory(b, n, sizeof *s->indices);
    s->values = bench_memory(b, n, data_bytes(s->dtype, 1));
}

static void top_k_run(bench *b, int64_t set)
{
    const state *s = b->state;
    data_tensor values, indices, logits;
    BENCH_TENSOR(b, &values, s->values, s->dtype, s->batch, s->k);
    BENCH_TENSOR(b, &indices, s->indices, QKV_I32, s->batch, s->k);
    tool_check(qkv_top_k(b->ctx, &values.t, &indices.t, &logits_of(b, set, &logits)->t,
                         bench_int(b, KEY_SORTED) != 0, b->stream),
               "qkv_top_k");
}

/* The values are the k largest, and each is where its index says; equal ones by index. */
static void top_k_verify(bench *b)
{
    const state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets), row = data_below(&b->random, s->batch);
    bench_poison(b, s->indices, QKV_I32, s->batch * s->k);
    bench_poison(b, s->values, s->dtype, s->batch * s->k);
    top_k_run(b, set);
    int32_t *indices = bench_alloc(b, (double)s->k, sizeof *indices);
    double *values = bench_alloc(b, (double)s->k, sizeof *values);
    read_numbers(b, s->indices, row, indices);
    bench_results(b, s->values, s->dtype, row * s->k, s->k, values);
    double *logits = read_row(b, set, row, false), *order = read_row(b, set, row, true);
    for (int64_t i = 0; i < s->k; i++) {
        bench_expect(b, indices[i] >= 0 && indices[i] < s->vocab, 1, 0, "range: index %d",
                     indices[i]);
        bench_expect(b, values[i], logits[indices[i]], 0, "value %lld", (long long)i);
        const bool follows = i == 0 || indices[i - 1] < indices[i] ||
                             (bench_int(b, KEY_SORTED) && values[i - 1] > values[i]);
        bench_expect(b, follows, 1, 0, "order at %lld", (long long)i);
    }
    tool_sort(values, (size_t)s->k);
    for (int64_t i = 0; i < s->k; i++)
        bench_expect(b, values[i], order[s->vocab - s->k + i], 0, "value %lld from below",
                     (long long)i);
    data_free(logits);
    data_free(order);
}

/* ---- log_probs ------------------------------------------------------------------------------- */

static void log_probs_setup(bench *b)
{
    setup(b, "log_probs");
    state *s = b->state;
    const int64_t n = s->batch * s->k;
    int32_t *tokens = bench_alloc(b, (double)n, sizeof *tokens);
    for (int64_t i = 0; i < n; i++) tokens[i] = (int32_t)data_below(&b->random, s->vocab);
    s->indices = bench_upload(b, tokens, (size_t)n * sizeof *tokens);
    s->log_probs = bench_memory(b, (double)n, sizeof *s->log_probs);
    s->ranks = bench_memory(b, (double)n, sizeof *s->ranks);
}

static void log_probs_run(bench *b, int64_t set)
{
    const state *s = b->state;
    data_tensor log_probs, ranks, logits, tokens;
    BENCH_TENSOR(b, &log_probs, s->log_probs, QKV_F32, s->batch, s->k);
    BENCH_TENSOR(b, &ranks, s->ranks, QKV_I32, s->batch, s->k);
    BENCH_TENSOR(b, &tokens, s->indices, QKV_I32, s->batch, s->k);
    tool_check(qkv_log_probs(b->ctx, &log_probs.t, &ranks.t, &logits_of(b, set, &logits)->t,
                             &tokens.t, b->stream),
               "qkv_log_probs");
}

static void log_probs_verify(bench *b)
{
    const state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets), row = data_below(&b->random, s->batch);
    bench_poison(b, s->log_probs, QKV_F32, s->batch * s->k);
    bench_poison(b, s->ranks, QKV_I32, s->batch * s->k);
    log_probs_run(b, set);
    int32_t *tokens = bench_alloc(b, (double)s->k, sizeof *tokens);
    int32_t *ranks = bench_alloc(b, (double)s->k, sizeof *ranks);
    float *log_probs = bench_alloc(b, (double)s->k, sizeof *log_probs);
    read_numbers(b, s->indices, row, tokens);
    read_numbers(b, s->ranks, row, ranks);
    read_numbers(b, s->log_probs, row, log_probs);
    double *logits = read_row(b, set, row, false), max = -INFINITY, sum = 0;
    for (int64_t i = 0; i < s->vocab; i++) max = fmax(max, logits[i]);
    for (int64_t i = 0; i < s->vocab; i++) sum += exp(logits[i] - max);
    for (int64_t i = 0; i < s->k; i++) {
        const double l = logits[tokens[i]], expected = l - max - log(sum);
        int64_t before = 0;
        for (int64_t t = 0; t < s->vocab; t++)
            before += logits[t] > l || (!(logits[t] < l) && t < tokens[i]);
        bench_expect(b, ranks[i], (double)before, 0, "rank of token %d", tokens[i]);
        if (l - max > -29) /* it has mass */
            bench_expect(b, (double)log_probs[i], expected, 1e-5 * (1 + fabs(expected)),
                         "log-probability of token %d", tokens[i]);
        if (l - max < -30)
            bench_expect(b, isinf(log_probs[i]) && log_probs[i] < 0, 1, 0, "mass of token %d",
                         tokens[i]);
    }
    data_free(logits);
}

const bench_op bench_top_k = {
    .name = "top_k", .setup = top_k_setup, .run = top_k_run, .verify = top_k_verify};
const bench_op bench_log_probs = {.name = "log_probs",
                                  .setup = log_probs_setup,
                                  .run = log_probs_run,
                                  .verify = log_probs_verify};
