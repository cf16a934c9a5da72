/* bench_pointwise.c - rmsnorm, rope, gated: operators that read and write each element once.
 * Bytes: every input read and every output written once; all are bound by copying.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "bench.h"

enum { NUM_SAMPLES = 32 /* rows that are checked in double */, NUM_BUFFERS = 3 };

typedef struct state {
    int64_t tokens, size[NUM_BUFFERS]; /* elements of a row of each buffer; 0 = not there */
    DLDataType dtype;
    bench_array buffer[NUM_BUFFERS]; /* [num_sets][tokens][size] */
    bench_array weight;              /* rmsnorm: [size] */
    int32_t *positions;              /* rope: [tokens] */
    int32_t *device_positions;
    int64_t heads, kv_heads, head_dim;
} state;

/* Buffers of random numbers, as many sets as it takes; passes: times that a row of each is
 * moved. */
static state *make_state(bench *b, const int64_t size[NUM_BUFFERS], const int passes[NUM_BUFFERS])
{
    state *s = b->state = bench_alloc(b, 1, sizeof *s);
    s->tokens = bench_int(b, KEY_TOKENS);
    s->dtype = problem_dtype(b->p, KEY_DTYPE);
    double held = 0;
    for (int i = 0; i < NUM_BUFFERS; i++) {
        const double bytes = (double)data_bytes(s->dtype, s->tokens * size[i]);
        s->size[i] = size[i];
        held += bytes;
        b->bytes += passes[i] * bytes;
    }
    b->copies = true;
    bench_rotate(b, held, held);
    for (int i = 0; i < NUM_BUFFERS; i++) {
        const int64_t n = b->num_sets * s->tokens * size[i];
        if (n > 0) s->buffer[i] = bench_random(b, s->dtype, (double)n, 2);
    }
    return s;
}

/* The first element of a row of a set of a buffer. */
static int64_t row_at(const state *s, int buffer, int64_t set, int64_t token)
{
    return (set * s->tokens + token) * s->size[buffer];
}

static char *at(const state *s, int buffer, int64_t set)
{
    return bench_at(&s->buffer[buffer], row_at(s, buffer, set, 0));
}

/* A row as it was before the first call, and as it is. */
static double *before(bench *b, int buffer, int64_t set, int64_t token)
{
    const state *s = b->state;
    double *row = data_alloc((double)s->size[buffer], sizeof *row);
    bench_read(&s->buffer[buffer], row_at(s, buffer, set, token), s->size[buffer], row);
    return row;
}

static double *after(bench *b, int buffer, int64_t set, int64_t token)
{
    const state *s = b->state;
    double *row = data_alloc((double)s->size[buffer], sizeof *row);
    bench_results(b, s->buffer[buffer].data, s->dtype, row_at(s, buffer, set, token),
                  s->size[buffer], row);
    return row;
}

/* Rows of several buffers that one call is checked by: read before it. */
typedef struct sample {
    int64_t token;
    double *row[NUM_BUFFERS];
} sample;

static void take_samples(bench *b, int64_t set, sample samples[NUM_SAMPLES])
{
    const state *s = b->state;
    for (int k = 0; k < NUM_SAMPLES; k++) {
        samples[k].token = data_below(&b->random, s->tokens);
        for (int i = 0; i < NUM_BUFFERS; i++)
            samples[k].row[i] = s->size[i] ? before(b, i, set, samples[k].token) : NULL;
    }
}

static void free_samples(sample samples[NUM_SAMPLES])
{
    for (int k = 0; k < NUM_SAMPLES; k++)
        for (int i = 0; i < NUM_BUFFERS; i++) data_free(samples[k].row[i]);
}

/* ---- rmsnorm: out, x, residual ------------------------------------------------------------- */

#define EPS 1e-5f

static void rmsnorm_setup(bench *b)
{
    const int64_t size = bench_int(b, KEY_SIZE), residual = bench_int(b, KEY_RESIDUAL) ? size : 0;
    state *s = make_state(b, (const int64_t[]){size, size, residual}, (const int[]){1, 1, 2});
    s->weight = bench_random(b, QKV_F32, (double)size, 1);
    b->bytes += (double)size * sizeof(float);
    bench_rows_of(b, "rmsnorm", b->row, sizeof b->row);
}

static void rmsnorm_run(bench *b, int64_t set)
{
    state *s = b->state;
    data_tensor out, x, residual, weight;
    BENCH_TENSOR(b, &out, at(s, 0, set), s->dtype, s->tokens, s->size[0]);
    BENCH_TENSOR(b, &x, at(s, 1, set), s->dtype, s->tokens, s->size[0]);
    BENCH_TENSOR(b, &weight, s->weight.data, QKV_F32, s->size[0]);
    if (s->size[2]) {
        BENCH_TENSOR(b, &residual, at(s, 2, set), s->dtype, s->tokens, s->size[0]);
        tool_check(qkv_add_rmsnorm(b->ctx, &out.t, &residual.t, &x.t, &weight.t, EPS, 0, b->stream),
                   "qkv_add_rmsnorm");
    } else {
        tool_check(qkv_rmsnorm(b->ctx, &out.t, &x.t, &weight.t, EPS, 0, b->stream), "qkv_rmsnorm");
    }
}

/* x: the row, with the residual stream added if there is one. */
static void rmsnorm_check(bench *b, int64_t set, int64_t token, double *x, const double *residual,
                          const double *weight)
{
    const state *s = b->state;
    const int64_t size = s->size[0];
    double *out = after(b, 0, set, token), *stream = residual ? after(b, 2, set, token) : NULL;
    double squares = 0;
    for (int64_t i = 0; i < size; i++) {
        if (residual) x[i] += residual[i];
        squares += x[i] * x[i];
    }
    const double scale = 1 / sqrt(squares / (double)size + (double)EPS);
    for (int64_t i = 0; i < size; i++) {
        const double want = x[i] * scale * weight[i];
        bench_expect(b, out[i], want, (data_eps(s->dtype) + 0x1p-20) * fabs(want) + 1e-7,
                     "out[%lld, %lld]", (long long)token, (long long)i);
        if (residual)
            bench_expect(b, stream[i], x[i], (data_eps(s->dtype) + 0x1p-24) * fabs(x[i]),
                         "residual[%lld, %lld]", (long long)token, (long long)i);
    }
    data_free(out);
    data_free(stream);
}

static void rmsnorm_verify(bench *b)
{
    state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets), size = s->size[0];
    double *weight = bench_alloc(b, (double)size, sizeof *weight);
    sample samples[NUM_SAMPLES];
    bench_read(&s->weight, 0, size, weight);
    take_samples(b, set, samples);
    bench_poison(b, at(s, 0, set), s->dtype, s->tokens * size);
    rmsnorm_run(b, set);
    bench_expect_finite(b, at(s, 0, set), s->dtype, s->tokens * size);
    for (int k = 0; k < NUM_SAMPLES; k++)
        rmsnorm_check(b, set, samples[k].token, samples[k].row[1], samples[k].row[2], weight);
    free_samples(samples);
}

/* ---- gated: out, gate, up ------------------------------------------------------------------ */

static void gated_setup(bench *b)
{
    const int64_t size = bench_int(b, KEY_SIZE);
    make_state(b, (const int64_t[]){size, size, size}, (const int[]){1, 1, 1});
    bench_rows_of(b, "gated", b->row, sizeof b->row);
}

static void gated_run(bench *b, int64_t set)
{
    state *s = b->state;
    data_tensor t[3];
    for (int i = 0; i < 3; i++)
        BENCH_TENSOR(b, &t[i], at(s, i, set), s->dtype, s->tokens, s->size[0]);
    tool_check(qkv_gated_activation(b->ctx, &t[0].t, &t[1].t, &t[2].t,
                                    (int32_t)bench_int(b, KEY_ACT), b->stream),
               "qkv_gated_activation");
}

static double activation(int64_t kind, double x)
{
    if (kind == QKV_SILU) return x / (1 + exp(-x));
    if (kind == QKV_GELU) return x / 2 * (1 + erf(x / sqrt(2)));
    return x / 2 * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}

static void gated_verify(bench *b)
{
    state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets);
    sample samples[NUM_SAMPLES];
    take_samples(b, set, samples);
    bench_poison(b, at(s, 0, set), s->dtype, s->tokens * s->size[0]);
    gated_run(b, set);
    bench_expect_finite(b, at(s, 0, set), s->dtype, s->tokens * s->size[0]);
    for (int k = 0; k < NUM_SAMPLES; k++) {
        double *out = after(b, 0, set, samples[k].token);
        for (int64_t i = 0; i < s->size[0]; i++) {
            const double gate = samples[k].row[1][i], up = samples[k].row[2][i];
            const double want = activation(bench_int(b, KEY_ACT), gate) * up;
            bench_expect(b, out[i], want,
                         data_eps(s->dtype) * fabs(want) + 0x1p-20 * fabs(gate * up) + 1e-7,
                         "out[%lld, %lld]", (long long)samples[k].token, (long long)i);
        }
        data_free(out);
    }
    free_samples(samples);
}

/* ---- rope: q, k, in place ------------------------------------------------------------------ */

#define THETA 500000.f

static void rope_setup(bench *b)
{
    const problem_value *v = b->p->value;
    const int64_t dim = v[KEY_HEAD_DIM].first;
    state *s =
        make_state(b, (const int64_t[]){v[KEY_HEADS].first * dim, v[KEY_HEADS].second * dim, 0},
                   (const int[]){2, 2, 0});
    s->heads = v[KEY_HEADS].first;
    s->kv_heads = v[KEY_HEADS].second;
    s->head_dim = dim;
    s->positions = bench_alloc(b, (double)s->tokens, sizeof *s->positions);
    for (int64_t t = 0; t < s->tokens; t++)
        s->positions[t] = (int32_t)data_below(&b->random, 131072);
    s->device_positions = bench_upload(b, s->positions, (size_t)s->tokens * sizeof *s->positions);
    bench_rows_of(b, "rope", b->row, sizeof b->row);
}

static void rope_run(bench *b, int64_t set)
{
    state *s = b->state;
    data_tensor q, k, positions;
    BENCH_TENSOR(b, &q, at(s, 0, set), s->dtype, s->tokens, s->heads, s->head_dim);
    BENCH_TENSOR(b, &k, at(s, 1, set), s->dtype, s->tokens, s->kv_heads, s->head_dim);
    BENCH_TENSOR(b, &positions, s->device_positions, QKV_I32, s->tokens);
    const qkv_rope_spec spec = {QKV_ROPE_SPEC_INIT, .rotary_dim = (int32_t)bench_int(b, KEY_ROTARY),
                                .interleaved = bench_int(b, KEY_STYLE) == STYLE_INTERLEAVED,
                                .theta = THETA};
    tool_check(qkv_rope(b->ctx, &spec, &q.t, &q.t, &k.t, &k.t, &positions.t, NULL, NULL, b->stream),
               "qkv_rope");
}

/* One head of one row, before and after. */
static void rope_check(const bench *b, int64_t token, const double *x, const double *got)
{
    const state *s = b->state;
    const int64_t dims = bench_int(b, KEY_ROTARY) ? bench_int(b, KEY_ROTARY) : s->head_dim;
    const bool interleaved = bench_int(b, KEY_STYLE) == STYLE_INTERLEAVED;
    for (int64_t i = 0; i < dims / 2; i++) {
        const int64_t ia = interleaved ? 2 * i : i, ib = ia + (interleaved ? 1 : dims / 2);
        const double a = s->positions[token] * pow((double)THETA, -2.0 * (double)i / (double)dims);
        const double want[] = {x[ia] * cos(a) - x[ib] * sin(a), x[ia] * sin(a) + x[ib] * cos(a)};
        for (int j = 0; j < 2; j++)
            bench_expect(b, got[j ? ib : ia], want[j],
                         data_eps(s->dtype) * fabs(want[j]) + 0x1p-20 * (fabs(x[ia]) + fabs(x[ib])),
                         "token %lld, pair %lld", (long long)token, (long long)i);
    }
    for (int64_t i = dims; i < s->head_dim; i++)
        bench_expect(b, got[i], x[i], 0, "token %lld, dim %lld", (long long)token, (long long)i);
}

static void rope_verify(bench *b)
{
    state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets);
    sample samples[NUM_SAMPLES];
    take_samples(b, set, samples);
    rope_run(b, set);
    for (int k = 0; k < NUM_SAMPLES; k++)
        for (int i = 0; i < 2; i++) {
            double *got = after(b, i, set, samples[k].token);
            for (int64_t at_head = 0; at_head < s->size[i]; at_head += s->head_dim)
                rope_check(b, samples[k].token, samples[k].row[i] + at_head, got + at_head);
            data_free(got);
        }
    free_samples(samples);
}

const bench_op bench_rmsnorm = {
    .name = "rmsnorm", .setup = rmsnorm_setup, .run = rmsnorm_run, .verify = rmsnorm_verify};
const bench_op bench_gated = {
    .name = "gated", .setup = gated_setup, .run = gated_run, .verify = gated_verify};
const bench_op bench_rope = {
    .name = "rope", .setup = rope_setup, .run = rope_run, .verify = rope_verify};
