/* bench_gemm.c - out[m,n] = x[m,k] w[n,k]^T. The weights rotate, as those of a model's layers do.
 * Bytes: w, x and out once. Flops: 2 m n k.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "bench.h"

enum { NUM_SAMPLES = 256 /* elements of out that are checked in double */ };

typedef struct state {
    int64_t m, n, k;
    DLDataType x_dtype, w_dtype, out_dtype;
    char *x, *w, *out; /* w: num_sets of them */
    data_tensor x_t, out_t;
} state;

static void setup(bench *b)
{
    state *s = b->state = bench_alloc(b, 1, sizeof *s);
    s->m = bench_int(b, KEY_M);
    s->n = bench_int(b, KEY_N);
    s->k = bench_int(b, KEY_K);
    s->x_dtype = problem_dtype(b->p, KEY_X);
    s->w_dtype = problem_dtype(b->p, KEY_W);
    s->out_dtype = problem_dtype(b->p, KEY_OUT);
    bench_rows_of(b, "gemm");
    const double w_bytes = (double)data_bytes(s->w_dtype, s->n * s->k);
    bench_rotate(b, w_bytes, w_bytes);
    b->bytes = w_bytes + (double)data_bytes(s->x_dtype, s->m * s->k) +
               (double)data_bytes(s->out_dtype, s->m * s->n);
    b->flops = 2.0 * (double)s->m * (double)s->n * (double)s->k;
    b->bf16 = s->x_dtype.code == QKV_BF16.code && s->w_dtype.code == QKV_BF16.code;
    s->w = bench_alloc(b, (double)b->num_sets * w_bytes, 1);
    s->x = bench_alloc(b, (double)s->m * (double)s->k, data_bytes(s->x_dtype, 1));
    s->out = bench_alloc(b, (double)s->m * (double)s->n, data_bytes(s->out_dtype, 1));
    data_fill(&b->random, s->w, s->w_dtype, b->num_sets * s->n * s->k, 1);
    data_fill(&b->random, s->x, s->x_dtype, s->m * s->k, 1);
    DATA_TENSOR(&s->x_t, s->x, s->x_dtype, s->m, s->k);
    DATA_TENSOR(&s->out_t, s->out, s->out_dtype, s->m, s->n);
}

static char *weights(const state *s, int64_t set)
{
    return s->w + data_bytes(s->w_dtype, set * s->n * s->k);
}

static void run(bench *b, int64_t set)
{
    state *s = b->state;
    data_tensor w;
    DATA_TENSOR(&w, weights(s, set), s->w_dtype, s->n, s->k);
    tool_check(qkv_gemm(b->ctx, &s->out_t.t, &s->x_t.t, &w.t, NULL), "qkv_gemm");
}

static void verify(bench *b)
{
    state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets);
    const char *w = weights(s, set);
    data_poison(s->out, s->out_dtype, s->m * s->n);
    run(b, set);
    bench_expect_finite(b, s->out, s->out_dtype, s->m * s->n);
    for (int i = 0; i < NUM_SAMPLES; i++) {
        const int64_t row = data_below(&b->random, s->m), column = data_below(&b->random, s->n);
        double sum = 0, squares = 0;
        for (int64_t j = 0; j < s->k; j++) {
            const double product = data_get(s->x, s->x_dtype, row * s->k + j) *
                                   data_get(w, s->w_dtype, column * s->k + j);
            sum += product;
            squares += product * product;
        }
        /* k roundings of partial sums that grow like a random walk */
        const double walk = sqrt((double)s->k) * sqrt(squares);
        bench_expect(b, data_get(s->out, s->out_dtype, row * s->n + column), sum,
                     data_eps(s->out_dtype) * fabs(sum) + 8 * 0x1p-24 * walk, "out[%lld, %lld]",
                     (long long)row, (long long)column);
    }
}

const bench_op bench_gemm = {.name = "gemm", .setup = setup, .run = run, .verify = verify};
