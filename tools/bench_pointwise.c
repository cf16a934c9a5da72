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
    char *buffer[NUM_BUFFERS]; /* [num_sets][tokens][size] */
    float *weight;             /* rmsnorm: [size] */
    int32_t *positions;        /* rope: [tokens] */
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
        if (n == 0) continue;
        s->buffer[i] = bench_alloc(b, (double)n, data_bytes(s->dtype, 1));
        data_fill(&b->random, s->buffer[i], s->dtype, n, 2);
    }
    return s;
}

static char *at(const state *s, int buffer, int64_t set)
{
    return s->buffer[buffer] + data_bytes(s->dtype, set * s->tokens * s->size[buffer]);
}

static double get(const state *s, int buffer, int64_t set, int64_t token, int64_t i)
{
    return data_get(at(s, buffer, set), s->dtype, token * s->size[buffer] + i);
}

/* A copy of one set of a buffer. */
static char *snapshot(bench *b, int buffer, int64_t set)
{
    const state *s = b->state;
    const size_t bytes = data_bytes(s->dtype, s->tokens * s->size[buffer]);
    return memcpy(bench_alloc(b, (double)bytes, 1), at(s, buffer, set), bytes);
}

/* ---- rmsnorm: out, x, residual ------------------------------------------------------------- */

#define EPS 1e-5f

static void rmsnorm_setup(bench *b)
{
    const int64_t size = bench_int(b, KEY_SIZE), residual = bench_int(b, KEY_RESIDUAL) ? size : 0;
    state *s = make_state(b, (const int64_t[]){size, size, residual}, (const int[]){1, 1, 2});
    s->weight = bench_alloc(b, (double)size, sizeof *s->weight);
    data_fill(&b->random, s->weight, QKV_F32, size, 1);
    b->bytes += (double)size * sizeof *s->weight;
    bench_rows_of(b, "rmsnorm");
}

static void rmsnorm_run(bench *b, int64_t set)
{
    state *s = b->state;
    data_tensor out, x, residual, weight;
    DATA_TENSOR(&out, at(s, 0, set), s->dtype, s->tokens, s->size[0]);
    DATA_TENSOR(&x, at(s, 1, set), s->dtype, s->tokens, s->size[0]);
    DATA_TENSOR(&weight, s->weight, QKV_F32, s->size[0]);
    if (s->size[2]) {
        DATA_TENSOR(&residual, at(s, 2, set), s->dtype, s->tokens, s->size[0]);
        tool_check(qkv_add_rmsnorm(b->ctx, &out.t, &residual.t, &x.t, &weight.t, EPS, 0, NULL),
                   "qkv_add_rmsnorm");
    } else {
        tool_check(qkv_rmsnorm(b->ctx, &out.t, &x.t, &weight.t, EPS, 0, NULL), "qkv_rmsnorm");
    }
}

static void rmsnorm_verify(bench *b)
{
    state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets), size = s->size[0];
    char *before = s->size[2] ? snapshot(b, 2, set) : NULL;
    double *x = bench_alloc(b, (double)size, sizeof *x);
    data_poison(at(s, 0, set), s->dtype, s->tokens * size);
    rmsnorm_run(b, set);
    bench_expect_finite(b, at(s, 0, set), s->dtype, s->tokens * size);
    for (int k = 0; k < NUM_SAMPLES; k++) {
        const int64_t t = data_below(&b->random, s->tokens);
        double squares = 0;
        for (int64_t i = 0; i < size; i++) {
            x[i] = get(s, 1, set, t, i);
            if (before) x[i] += data_get(before, s->dtype, t * size + i);
            squares += x[i] * x[i];
        }
        const double scale = 1 / sqrt(squares / (double)size + (double)EPS);
        for (int64_t i = 0; i < size; i++) {
            const double want = x[i] * scale * (double)s->weight[i];
            bench_expect(b, get(s, 0, set, t, i), want,
                         (data_eps(s->dtype) + 0x1p-20) * fabs(want) + 1e-7, "out[%lld, %lld]",
                         (long long)t, (long long)i);
            if (before)
                bench_expect(b, get(s, 2, set, t, i), x[i],
                             (data_eps(s->dtype) + 0x1p-24) * fabs(x[i]), "residual[%lld, %lld]",
                             (long long)t, (long long)i);
        }
    }
}

/* ---- gated: out, gate, up ------------------------------------------------------------------ */

static void gated_setup(bench *b)
{
    const int64_t size = bench_int(b, KEY_SIZE);
    make_state(b, (const int64_t[]){size, size, size}, (const int[]){1, 1, 1});
    bench_rows_of(b, "gated");
}

static void gated_run(bench *b, int64_t set)
{
    state *s = b->state;
    data_tensor t[3];
    for (int i = 0; i < 3; i++) DATA_TENSOR(&t[i], at(s, i, set), s->dtype, s->tokens, s->size[0]);
    tool_check(qkv_gated_activation(b->ctx, &t[0].t, &t[1].t, &t[2].t,
                                    (int32_t)bench_int(b, KEY_ACT), NULL),
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
    data_poison(at(s, 0, set), s->dtype, s->tokens * s->size[0]);
    gated_run(b, set);
    bench_expect_finite(b, at(s, 0, set), s->dtype, s->tokens * s->size[0]);
    for (int k = 0; k < NUM_SAMPLES; k++) {
        const int64_t t = data_below(&b->random, s->tokens);
        for (int64_t i = 0; i < s->size[0]; i++) {
            const double gate = get(s, 1, set, t, i), up = get(s, 2, set, t, i);
            const double want = activation(bench_int(b, KEY_ACT), gate) * up;
            bench_expect(b, get(s, 0, set, t, i), want,
                         data_eps(s->dtype) * fabs(want) + 0x1p-20 * fabs(gate * up) + 1e-7,
                         "out[%lld, %lld]", (long long)t, (long long)i);
        }
    }
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
    bench_rows_of(b, "rope");
}

static void rope_run(bench *b, int64_t set)
{
    state *s = b->state;
    data_tensor q, k, positions;
    DATA_TENSOR(&q, at(s, 0, set), s->dtype, s->tokens, s->heads, s->head_dim);
    DATA_TENSOR(&k, at(s, 1, set), s->dtype, s->tokens, s->kv_heads, s->head_dim);
    DATA_TENSOR(&positions, s->positions, QKV_I32, s->tokens);
    const qkv_rope_spec spec = {QKV_ROPE_SPEC_INIT, .rotary_dim = (int32_t)bench_int(b, KEY_ROTARY),
                                .interleaved = bench_int(b, KEY_STYLE) == STYLE_INTERLEAVED,
                                .theta = THETA};
    tool_check(qkv_rope(b->ctx, &spec, &q.t, &q.t, &k.t, &k.t, &positions.t, NULL, NULL, NULL),
               "qkv_rope");
}

/* One head of one row, before and after. */
static void rope_check(const bench *b, int64_t token, const char *before, const char *after,
                       int64_t first)
{
    const state *s = b->state;
    const int64_t dims = bench_int(b, KEY_ROTARY) ? bench_int(b, KEY_ROTARY) : s->head_dim;
    const bool interleaved = bench_int(b, KEY_STYLE) == STYLE_INTERLEAVED;
    for (int64_t i = 0; i < dims / 2; i++) {
        const int64_t ix = first + (interleaved ? 2 * i : i),
                      iy = ix + (interleaved ? 1 : dims / 2);
        const double a = s->positions[token] * pow((double)THETA, -2.0 * (double)i / (double)dims);
        const double x = data_get(before, s->dtype, ix), y = data_get(before, s->dtype, iy);
        const double want[] = {x * cos(a) - y * sin(a), x * sin(a) + y * cos(a)};
        for (int j = 0; j < 2; j++)
            bench_expect(b, data_get(after, s->dtype, j ? iy : ix), want[j],
                         data_eps(s->dtype) * fabs(want[j]) + 0x1p-20 * (fabs(x) + fabs(y)),
                         "token %lld, pair %lld", (long long)token, (long long)i);
    }
    for (int64_t i = first + dims; i < first + s->head_dim; i++)
        bench_expect(b, data_get(after, s->dtype, i), data_get(before, s->dtype, i), 0,
                     "token %lld, dim %lld", (long long)token, (long long)(i - first));
}

static void rope_verify(bench *b)
{
    state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets);
    char *before[] = {snapshot(b, 0, set), snapshot(b, 1, set)};
    rope_run(b, set);
    for (int k = 0; k < NUM_SAMPLES; k++) {
        const int64_t t = data_below(&b->random, s->tokens);
        for (int i = 0; i < 2; i++)
            for (int64_t at_head = 0; at_head < s->size[i]; at_head += s->head_dim)
                rope_check(b, t, before[i], at(s, i, set), t * s->size[i] + at_head);
    }
}

const bench_op bench_rmsnorm = {
    .name = "rmsnorm", .setup = rmsnorm_setup, .run = rmsnorm_run, .verify = rmsnorm_verify};
const bench_op bench_gated = {
    .name = "gated", .setup = gated_setup, .run = gated_run, .verify = gated_verify};
const bench_op bench_rope = {
    .name = "rope", .setup = rope_setup, .run = rope_run, .verify = rope_verify};
