/* bench_verify.c - verify: chains of draft tokens, of which all are accepted, since the draft's rows are the
 * target's: the longest walks. Bytes: every row, read once.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "bench.h"

typedef struct state {
    int64_t batch, nodes, vocab;
    DLDataType dtype;
    bench_array target,
        draft; /* [num_sets][batch][nodes + 1][vocab], the same values; below 0 counts as 0 */
    int32_t *draft_tokens;      /* [num_sets][batch][nodes], as all that follow, on the device */
    int32_t *accepted, *tokens; /* [batch][nodes + 1] */
    int32_t *num_accepted;      /* [batch] */
    uint64_t *seed;             /* [batch] */
} state;

/* The place of a request's row. */
static int64_t row_at(const state *s, int64_t set, int64_t request, int64_t row)
{
    return ((set * s->batch + request) * (s->nodes + 1) + row) * s->vocab;
}

/* Tokens that their rows have. */
static int32_t *choose_tokens(bench *b)
{
    const state *s = b->state;
    const int64_t n = b->num_sets * s->batch * s->nodes;
    int32_t *tokens = bench_alloc(b, (double)n, sizeof *tokens);
    for (int64_t i = 0; i < n && !b->only_compiles; i++) {
        const int64_t row = row_at(s, 0, i / s->nodes, i % s->nodes);
        double value = 0;
        while (!(value > 0)) {
            tokens[i] = (int32_t)data_below(&b->random, s->vocab);
            bench_read(&s->target, row + tokens[i], 1, &value);
        }
    }
    return bench_upload(b, tokens, (size_t)n * sizeof *tokens);
}

static void setup(bench *b)
{
    state *s = b->state = bench_alloc(b, 1, sizeof *s);
    s->batch = bench_int(b, KEY_BATCH);
    s->nodes = bench_int(b, KEY_NODES);
    s->vocab = bench_int(b, KEY_VOCAB);
    s->dtype = problem_dtype(b->p, KEY_DTYPE);
    const double size = (double)data_bytes(s->dtype, 1);
    const double row = (double)s->batch * (double)s->vocab;
    b->bytes = row * (double)(2 * s->nodes + 1) * size;
    bench_rotate(b, b->bytes, row * (double)(2 * s->nodes + 2) * size);
    const double n = (double)b->num_sets * row * (double)(s->nodes + 1);
    const data_random random = b->random;
    s->target = bench_random(b, s->dtype, n, 1);
    b->random = random;
    s->draft = bench_random(b, s->dtype, n, 1);
    s->draft_tokens = choose_tokens(b);
    const double per_batch = (double)s->batch * (double)(s->nodes + 1);
    s->accepted = bench_memory(b, per_batch, sizeof *s->accepted);
    s->tokens = bench_memory(b, per_batch, sizeof *s->tokens);
    s->num_accepted = bench_memory(b, (double)s->batch, sizeof *s->num_accepted);
    uint64_t *seed = bench_alloc(b, (double)s->batch, sizeof *seed);
    for (int64_t i = 0; i < s->batch; i++) seed[i] = data_u64(&b->random);
    s->seed = bench_upload(b, seed, (size_t)s->batch * sizeof *seed);
    bench_rows_of(b, "verify", b->row, sizeof b->row);
}

static void run(bench *b, int64_t set)
{
    state *s = b->state;
    data_tensor accepted, num_accepted, tokens, target, draft_tokens, draft, seed;
    int64_t strides[] = {(s->nodes + 1) * s->vocab, s->vocab, 1};
    const int64_t at = row_at(s, set, 0, 0);
    BENCH_TENSOR(b, &accepted, s->accepted, QKV_I32, s->batch, s->nodes + 1);
    BENCH_TENSOR(b, &num_accepted, s->num_accepted, QKV_I32, s->batch);
    BENCH_TENSOR(b, &tokens, s->tokens, QKV_I32, s->batch, s->nodes + 1);
    BENCH_TENSOR(b, &target, bench_at(&s->target, at), s->dtype, s->batch, s->nodes + 1, s->vocab);
    BENCH_TENSOR(b, &draft, bench_at(&s->draft, at), s->dtype, s->batch, s->nodes, s->vocab);
    draft.t.strides = strides;
    BENCH_TENSOR(b, &draft_tokens, s->draft_tokens + set * s->batch * s->nodes, QKV_I32, s->batch,
                 s->nodes);
    BENCH_TENSOR(b, &seed, s->seed, QKV_U64, s->batch);
    const qkv_verify_io io = {
        QKV_VERIFY_IO_INIT,  .accepted = &accepted.t, .num_accepted = &num_accepted.t,
        .tokens = &tokens.t, .target = &target.t,     .draft_tokens = &draft_tokens.t,
        .draft = &draft.t,   .seed = &seed.t};
    tool_check(qkv_verify(b->ctx, &io, b->stream), "qkv_verify");
}

/* Where a token lies in its row, the mass counted by index, in [0, 1]. */
static double place(const state *s, int64_t row, int64_t token, double *values)
{
    double before = 0, sum = 0;
    bench_read(&s->target, row, s->vocab, values);
    for (int64_t i = 0; i < s->vocab; i++) {
        const double p = fmax(values[i], 0);
        before += i < token ? p : 0;
        sum += p;
    }
    return (before + values[token] / 2) / sum;
}

/* All are accepted; the last tokens' places are uniform: their mean is within six standard deviations. */
static void verify(bench *b)
{
    state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets), n = s->batch * (s->nodes + 1);
    const size_t bytes = (size_t)n * sizeof(int32_t);
    int32_t *tokens = bench_alloc(b, (double)n, sizeof *tokens);
    int32_t *wanted = bench_alloc(b, (double)n, sizeof *wanted);
    double *values = bench_alloc(b, (double)s->vocab, sizeof *values), mean = 0;
    bench_poison(b, s->accepted, QKV_I32, n);
    bench_poison(b, s->tokens, QKV_I32, n);
    bench_poison(b, s->num_accepted, QKV_I32, s->batch);
    run(b, set);
    memcpy(wanted,
           bench_fetch(b, s->draft_tokens + set * s->batch * s->nodes,
                       (size_t)(s->batch * s->nodes) * sizeof *wanted),
           (size_t)(s->batch * s->nodes) * sizeof *wanted);
    memcpy(tokens, bench_fetch(b, s->tokens, bytes), bytes);
    for (int64_t r = 0; r < s->batch; r++) {
        for (int64_t i = 0; i < s->nodes; i++)
            bench_expect(b, tokens[r * (s->nodes + 1) + i], wanted[r * s->nodes + i], 0,
                         "request %lld, token %lld", (long long)r, (long long)i);
        const int32_t last = tokens[r * (s->nodes + 1) + s->nodes];
        bench_expect(b, last >= 0 && last < s->vocab, 1, 0, "range: token %d", last);
        mean += place(s, row_at(s, set, r, s->nodes), last, values) / (double)s->batch;
        bench_expect(b, values[last] > 0, 1, 0, "request %lld draws what its row has",
                     (long long)r);
    }
    bench_expect(b, mean, 0.5, 6 / sqrt(12. * (double)s->batch), "mean place of the draws");
    memcpy(tokens, bench_fetch(b, s->accepted, bytes), bytes);
    for (int64_t i = 0; i < n; i++) {
        const int64_t node = i % (s->nodes + 1);
        bench_expect(b, tokens[i], node < s->nodes ? (double)node : -1, 0, "accepted[%lld]",
                     (long long)i);
    }
    const size_t counts = (size_t)s->batch * sizeof(int32_t);
    memcpy(tokens, bench_fetch(b, s->num_accepted, counts), counts);
    for (int64_t r = 0; r < s->batch; r++)
        bench_expect(b, tokens[r], (double)s->nodes, 0, "num_accepted[%lld]", (long long)r);
}

const bench_op bench_verify = {.name = "verify", .setup = setup, .run = run, .verify = verify};
