/* bench_gemm.c - out[m,n] = x[m,k] w[n,k]^T, w of floats or packed. The weights rotate, as those of a
 * model's layers do. Bytes: w as it is stored, x and out once. Flops: 2 m n k.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "bench.h"

enum {
    NUM_SAMPLES = 256, /* elements of out that are checked in double */
    BLOCK = 32,        /* packed weights of one scale */
};

/* Weights are d * (code - zero), or d * code + min: f16 d, f16 min, codes. */
typedef struct packing {
    qkv_weight_format format;
    int bits, block_bytes, has_min, zero;
} packing;

static const packing packings[] = {
    [W_Q8_0 - W_Q8_0] = {QKV_WEIGHT_Q8_0, 8, 34, 0, 0},
    [W_Q4_0 - W_Q8_0] = {QKV_WEIGHT_Q4_0, 4, 18, 0, 8},
    [W_Q4_1 - W_Q8_0] = {QKV_WEIGHT_Q4_1, 4, 20, 1, 0},
};

typedef struct state {
    int64_t m, n, k;
    DLDataType x_dtype, w_dtype, out_dtype; /* w_dtype: u8 of packed weights */
    const packing *packing;                 /* NULL: w is not packed */
    int64_t w_columns;                      /* elements of w_dtype in a row */
    bench_array x, w;                       /* w: num_sets of them, floats */
    char *packed;                           /* or packed: num_sets on the device, */
    char *packed_host;                      /* of which the host has the first */
    char *out;
} state;

/* ---- packed weights -------------------------------------------------------------------------- */

/* Random codes; scales of [2^-6, 2^-5), minima of either sign as large. */
static void fill_packed(bench *b, const packing *f, char *w, int64_t num_blocks)
{
    for (int64_t i = 0; i < num_blocks; i++, w += f->block_bytes) {
        uint64_t bits[5];
        for (int j = 0; j < 5; j++) bits[j] = data_u64(&b->random);
        memcpy(w, bits, (size_t)f->block_bytes);
        const uint64_t more = data_u64(&b->random);
        const uint16_t d = 0x2400 | (more & 0x3ff), min = 0x2400 | (more >> 16 & 0x83ff);
        memcpy(w, &d, sizeof d);
        if (f->has_min) memcpy(w + 2, &min, sizeof min);
    }
}

/* Element k of a row of packed weights: a scaled code, and what is added to it. */
static double packed_at(const packing *f, const char *row, int64_t k, double *added)
{
    const char *block = row + k / BLOCK * f->block_bytes, *codes = block + 2 + 2 * f->has_min;
    const int64_t i = k % BLOCK;
    const double d = data_get(block, QKV_F16, 0);
    *added = f->has_min ? data_get(block, QKV_F16, 1) : -f->zero * d;
    if (f->bits == 8) return d * (signed char)codes[i];
    return d * ((unsigned char)codes[i % 16] >> i / 16 * 4 & 15);
}

/* num_sets of the same weights. */
static void make_packed(bench *b, state *s)
{
    const size_t bytes = data_bytes(QKV_U8, s->n * s->w_columns);
    s->packed_host = bench_alloc(b, (double)bytes, 1);
    s->packed = bench_memory(b, (double)b->num_sets * (double)bytes, 1);
    fill_packed(b, s->packing, s->packed_host, s->n * s->k / BLOCK);
    bench_repeat(b, s->packed, s->packed_host, bytes, b->num_sets);
}

/* A row of w of a set: scaled codes, and what is added to each. */
static void read_weights(const state *s, int64_t set, int64_t row, double *w, double *added)
{
    const char *packed = s->packed_host + row * s->w_columns;
    for (int64_t j = 0; j < s->k; j++) added[j] = 0;
    if (!s->packing) bench_read(&s->w, (set * s->n + row) * s->k, s->k, w);
    for (int64_t j = 0; s->packing && j < s->k; j++)
        w[j] = packed_at(s->packing, packed, j, &added[j]);
}

/* ---- the operator ---------------------------------------------------------------------------- */

static void read_problem(const bench *b, state *s)
{
    const int64_t w = bench_int(b, KEY_W);
    s->m = bench_int(b, KEY_M);
    s->n = bench_int(b, KEY_N);
    s->k = s->w_columns = bench_int(b, KEY_K);
    s->x_dtype = problem_dtype(b->p, KEY_X);
    s->out_dtype = problem_dtype(b->p, KEY_OUT);
    s->w_dtype = w < W_Q8_0 ? problem_dtype(b->p, KEY_W) : QKV_U8;
    if (w < W_Q8_0) return;
    s->packing = &packings[w - W_Q8_0];
    s->w_columns = s->k / BLOCK * s->packing->block_bytes;
}

static void setup(bench *b)
{
    state *s = b->state = bench_alloc(b, 1, sizeof *s);
    read_problem(b, s);
    bench_rows_of(b, s->packing ? "gemm_quantized" : "gemm", b->row, sizeof b->row);
    const double w_bytes = (double)data_bytes(s->w_dtype, s->n * s->w_columns);
    bench_rotate(b, w_bytes, w_bytes);
    b->bytes = w_bytes + (double)data_bytes(s->x_dtype, s->m * s->k) +
               (double)data_bytes(s->out_dtype, s->m * s->n);
    b->flops = 2.0 * (double)s->m * (double)s->n * (double)s->k;
    b->bf16 = (s->x_dtype.code == QKV_BF16.code && s->w_dtype.code == QKV_BF16.code) ||
              (b->gpu && s->x_dtype.bits == 16); /* f16 is as fast there */
    if (s->packing)
        make_packed(b, s);
    else
        s->w = bench_random(b, s->w_dtype, (double)b->num_sets * (double)s->n * (double)s->k, 1);
    s->x = bench_random(b, s->x_dtype, (double)s->m * (double)s->k, 1);
    s->out = bench_memory(b, (double)s->m * (double)s->n, data_bytes(s->out_dtype, 1));
}

static void run(bench *b, int64_t set)
{
    state *s = b->state;
    const int64_t first = set * s->n * s->w_columns;
    data_tensor out, x, w;
    BENCH_TENSOR(b, &out, s->out, s->out_dtype, s->m, s->n);
    BENCH_TENSOR(b, &x, s->x.data, s->x_dtype, s->m, s->k);
    BENCH_TENSOR(b, &w, s->packing ? s->packed + first : bench_at(&s->w, first), s->w_dtype, s->n,
                 s->w_columns);
    if (s->packing)
        tool_check(qkv_gemm_quantized(b->ctx, &out.t, &x.t, &w.t, s->packing->format, b->stream),
                   "qkv_gemm_quantized");
    else
        tool_check(qkv_gemm(b->ctx, &out.t, &x.t, &w.t, b->stream), "qkv_gemm");
}

static void verify(bench *b)
{
    state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets);
    double *x = bench_alloc(b, (double)s->k, sizeof *x),
           *w = bench_alloc(b, (double)s->k, sizeof *w);
    double *added = bench_alloc(b, (double)s->k, sizeof *added);
    bench_poison(b, s->out, s->out_dtype, s->m * s->n);
    run(b, set);
    bench_expect_finite(b, s->out, s->out_dtype, s->m * s->n);
    for (int i = 0; i < NUM_SAMPLES; i++) {
        const int64_t row = data_below(&b->random, s->m), column = data_below(&b->random, s->n);
        double sum = 0, squares = 0, got;
        bench_read(&s->x, row * s->k, s->k, x);
        read_weights(s, set, column, w, added);
        for (int64_t j = 0; j < s->k; j++) {
            const double product = x[j] * w[j], more = x[j] * added[j];
            sum += product + more;
            squares += product * product + more * more;
        }
        /* k roundings of partial sums that grow like a random walk */
        const double walk = sqrt((double)s->k) * sqrt(squares);
        bench_results(b, s->out, s->out_dtype, row * s->n + column, 1, &got);
        bench_expect(b, got, sum, data_eps(s->out_dtype) * fabs(sum) + 8 * 0x1p-24 * walk,
                     "out[%lld, %lld]", (long long)row, (long long)column);
    }
}

const bench_op bench_gemm = {.name = "gemm", .setup = setup, .run = run, .verify = verify};
