/* test_gemm_quantized.c - out = x w^T with packed weights, against sums in double of what the format
 * says each block holds.
 * SPDX-License-Identifier: Apache-2.0 */
#include "view.h"

enum { BLOCK = 32 };

/* w = d * (code - zero) + min, d and min f16 at the block's front. */
typedef struct packing {
    const char *name;
    qkv_weight_format format;
    int block_bytes, bits, zero, has_min;
} packing;

static const packing packings[] = {
    {"Q8_0", QKV_WEIGHT_Q8_0, 34, 8, 0, 0},
    {"Q4_0", QKV_WEIGHT_Q4_0, 18, 4, 8, 0},
    {"Q4_1", QKV_WEIGHT_Q4_1, 20, 4, 0, 1},
};
enum { NUM_PACKINGS = sizeof packings / sizeof *packings };

static const struct {
    const char *why;
    int64_t m, n, k;
} shapes[] = {
    {"no rows", 0, 5, 64},
    {"no columns", 5, 0, 64},
    {"nothing to sum: zeros", 3, 5, 0},
    {"one block", 1, 1, 32},
    {"one row, columns past vectors", 1, 37, 96},
    {"two rows", 2, 33, 64},
    {"three rows, padded to four", 3, 16, 160},
    {"a tile of rows less one", 7, 19, 96},
    {"a tile of rows", 8, 48, 128},
    {"a tile of rows and one", 9, 17, 128},
    {"two tiles", 16, 31, 64},
    {"rows of a part and one", 33, 18, 96},
    {"rows of several parts", 130, 5, 64},
    {"more rows than columns", 70, 3, 192},
    {"pieces of k and a rest", 5, 20, 1312},
    {"few rows, parts of k", 2, 17, 66016},
    {"rows, parts of k", 20, 3, 8256},
    {"one row, more columns than a part", 1, 41003, 32},
    {"rows, more columns than a part", 9, 5003, 32},
};
enum { NUM_SHAPES = sizeof shapes / sizeof *shapes };

/* Packed weights [n][k / 32] in a guarded block, rows a stride of bytes apart, at any address. */
typedef struct packed {
    const packing *p;
    int64_t n, k, stride;
    unsigned char *block, *first;
    size_t bytes;
    int64_t shape[2], strides[2];
    DLTensor t;
} packed;

static void packed_new(packed *w, const packing *p, int64_t n, int64_t k, int64_t pad)
{
    const int64_t row = k / BLOCK * p->block_bytes;
    *w = (packed){.p = p, .n = n, .k = k, .stride = row + (pad ? test_below(pad + 1) : 0)};
    const int64_t offset = pad ? test_below(64) : 0;
    w->bytes = (size_t)(offset + (n ? (n - 1) * w->stride : 0) + row); /* reading past it is seen */
    w->block = malloc(w->bytes ? w->bytes : 1);
    assert_non_null(w->block);
    w->first = w->block + offset;
    memset(w->block, VIEW_POISON, w->bytes);
    w->shape[0] = n, w->shape[1] = row;
    w->strides[0] = w->stride, w->strides[1] = 1;
    w->t = (DLTensor){.data = w->block,
                      .device = {kDLCPU, 0},
                      .ndim = 2,
                      .dtype = QKV_U8,
                      .shape = w->shape,
                      .strides = w->strides,
                      .byte_offset = (uint64_t)offset};
}

static unsigned char *packed_block(const packed *w, int64_t row, int64_t block)
{
    return w->first + row * w->stride + block * w->p->block_bytes;
}

static void put_f16(unsigned char *at, double value)
{
    const uint16_t h = test_to_f16((float)value);
    memcpy(at, &h, sizeof h);
}

/* Random codes. integers: scales of 1 and minima of small integers, so that sums are exact. */
static void packed_fill(packed *w, int integers)
{
    for (int64_t i = 0; i < w->n; i++)
        for (int64_t b = 0; b < w->k / BLOCK; b++) {
            unsigned char *block = packed_block(w, i, b);
            for (int j = 0; j < w->p->block_bytes; j++) block[j] = (unsigned char)test_below(256);
            put_f16(block, integers ? 1 : test_uniform(0.05));
            if (w->p->has_min)
                put_f16(block + 2, integers ? (double)test_below(5) : test_uniform(1));
        }
}

/* Weight k of a row: what multiplies x, and what is added to it first. */
static double packed_get(const packed *w, int64_t row, int64_t k, double *d, double *min)
{
    const unsigned char *block = packed_block(w, row, k / BLOCK);
    const unsigned char *codes = block + 2 + 2 * w->p->has_min;
    const int64_t i = k % BLOCK;
    uint16_t h;
    memcpy(&h, block, sizeof h);
    *d = test_f16_value(h);
    memcpy(&h, block + 2, sizeof h);
    *min = w->p->has_min ? test_f16_value(h) : -*d * w->p->zero;
    return w->p->bits == 8 ? (double)(signed char)codes[i] : codes[i % 16] >> (i / 16 * 4) & 15;
}

typedef struct quantized_case {
    const char *why;
    int64_t m, n, k;
    const packing *p;
    DLDataType out, x;
    int64_t pad;
    int integers;
} quantized_case;

/* Sums of code * x over a block, and of x, are rounded apart: so errors are those of both parts. */
static void check_sums(const quantized_case *c, const double *x, const packed *w, const view *out)
{
    for (int64_t at = 0; at < c->m * c->n; at++) {
        const double *row = x + at / c->n * c->k;
        double want = 0, squares = 0;
        for (int64_t j = 0; j < c->k; j++) {
            double d, min;
            const double code = packed_get(w, at % c->n, j, &d, &min);
            want += (d * code + min) * row[j];
            squares += (d * code * d * code + min * min) * row[j] * row[j];
        }
        const double walk = 0x1p-24 * 8 * (1 + sqrt((double)c->k)) * sqrt(squares);
        const double bound = test_eps(c->out) * fabs(want) + walk + (c->out.bits == 16 ? 3e-8 : 0);
        const double got = view_get(out, at);
        if (c->integers ? got != view_rounded(c->out, want) : !(fabs(got - want) <= bound))
            fail_msg("%s, %s: [%lld, %lld, %lld] at [%lld, %lld]: expected %.9g, got %.9g", c->why,
                     c->p->name, (long long)c->m, (long long)c->n, (long long)c->k,
                     (long long)(at / c->n), (long long)(at % c->n), want, got);
    }
}

static void check_case(qkv_context *ctx, const quantized_case *c)
{
    view out, x;
    packed w;
    view_new(&out, c->out, c->pad, TEST_SHAPE(c->m, c->n));
    view_new(&x, c->x, c->pad, TEST_SHAPE(c->m, c->k));
    packed_new(&w, c->p, c->n, c->k, c->pad);
    packed_fill(&w, c->integers);
    for (int64_t i = 0; i < c->m * c->k; i++)
        view_put(&x, i, c->integers ? (double)(test_below(9) - 4) : test_uniform(1));
    double *const values = view_values(&x);
    EXPECT_OK(qkv_gemm_quantized(ctx, &out.t, &x.t, &w.t, c->p->format, NULL));
    check_sums(c, values, &w, &out);
    view_check_guards(&out);
    view_check_guards(&x);
    free(values);
    free(w.block);
    view_free(&out);
    view_free(&x);
}

static void check_grid(qkv_context *ctx, void *user)
{
    (void)user;
    for (int s = 0; s < NUM_SHAPES; s++)
        for (int p = 0; p < NUM_PACKINGS; p++)
            for (int form = 0; form < 4; form++)
                check_case(ctx, &(quantized_case){
                                    .why = shapes[s].why,
                                    .m = shapes[s].m,
                                    .n = shapes[s].n,
                                    .k = shapes[s].k,
                                    .p = &packings[p],
                                    .out = float_dtypes[test_below(3)],
                                    .x = float_dtypes[test_below(3)],
                                    .integers = form & 1 && shapes[s].k <= 8256,
                                    .pad = form & 2 ? 5 : 0,
                                });
}

static void gemm_quantized_equals_the_sums(void **state)
{
    (void)state;
    test_every_level(1, check_grid, NULL);
}

static void check_row_counts(qkv_context *ctx, void *user)
{
    (void)user;
    quantized_case c = {.why = "every number of rows", .out = QKV_F32, .integers = 1, .pad = 7};
    for (c.m = 1; c.m <= 70; c.m++) {
        c.p = &packings[test_below(NUM_PACKINGS)];
        c.x = float_dtypes[test_below(3)];
        c.n = 1 + test_below(70);
        c.k = test_below(10) * BLOCK;
        check_case(ctx, &c);
    }
}

static void gemm_quantized_takes_any_number_of_rows(void **state)
{
    (void)state;
    test_every_level(3, check_row_counts, NULL);
}

enum { ROWS = 70, COLUMNS = 67, WIDTH = 1120 };

/* Some rows and columns of a product have the bits that they have in all of it. */
static void check_same_bits(qkv_context *ctx, const view *all_x, const packed *all_w,
                            const float *want)
{
    const int64_t m = 1 + test_below(ROWS), first = test_below(ROWS - m + 1);
    const int64_t n = 1 + test_below(COLUMNS);
    view out;
    view_new(&out, QKV_F32, 0, TEST_SHAPE(m, n));
    DLTensor x = all_x->t, w = all_w->t;
    x.shape = (int64_t[]){m, WIDTH};
    x.byte_offset = (uint64_t)(first * WIDTH) * test_bytes(x.dtype);
    w.shape = (int64_t[]){n, all_w->shape[1]};
    EXPECT_OK(qkv_gemm_quantized(ctx, &out.t, &x, &w, all_w->p->format, NULL));
    for (int64_t i = 0; i < m; i++)
        if (memcmp((float *)(void *)out.block + i * n, want + (first + i) * COLUMNS,
                   (size_t)n * 4) != 0)
            fail_msg("%s: row %lld has other bits among rows [%lld, %lld), %lld columns",
                     all_w->p->name, (long long)(first + i), (long long)first,
                     (long long)(first + m), (long long)n);
    view_free(&out);
}

static void check_invariance(qkv_context *one, qkv_context *three)
{
    for (int p = 0; p < NUM_PACKINGS; p++) {
        view x, out;
        packed w;
        view_new(&x, float_dtypes[test_below(3)], 0, TEST_SHAPE(ROWS, WIDTH));
        view_new(&out, QKV_F32, 0, TEST_SHAPE(ROWS, COLUMNS));
        packed_new(&w, &packings[p], COLUMNS, WIDTH, 0);
        packed_fill(&w, 0);
        view_fill(&x, 1);
        EXPECT_OK(qkv_gemm_quantized(one, &out.t, &x.t, &w.t, packings[p].format, NULL));
        for (int i = 0; i < 60; i++)
            check_same_bits(i % 2 ? one : three, &x, &w, (float *)(void *)out.block);
        free(w.block);
        view_free(&x);
        view_free(&out);
    }
}

static void gemm_quantized_gives_a_row_the_same_bits_in_any_batch(void **state)
{
    (void)state;
    int32_t usable;
    const char *level;
    for (int32_t i = 0; (level = qkv_cpu_level(i, &usable)); i++) {
        if (!usable) continue;
        qkv_context *contexts[2];
        for (int32_t j = 0; j < 2; j++)
            EXPECT_OK(
                qkv_context_create(&(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .isa = level,
                                                          .num_threads = 1 + 2 * j},
                                   &contexts[j]));
        check_invariance(contexts[0], contexts[1]);
        qkv_context_destroy(contexts[0]);
        qkv_context_destroy(contexts[1]);
    }
}

/* NaN in a row of x or a scale of a row of w stays in that row and column; all other sums are exact. */
static void check_non_finite(qkv_context *ctx, void *user)
{
    (void)user;
    for (int i = 0; i < 60; i++) {
        const int64_t m = 1 + test_below(30), n = 1 + test_below(70),
                      k = BLOCK * (1 + test_below(5));
        view out, x;
        packed w;
        view_new(&out, QKV_F32, 3, TEST_SHAPE(m, n));
        view_new(&x, float_dtypes[i % 3], 3, TEST_SHAPE(m, k));
        packed_new(&w, &packings[i / 3 % 3], n, k, 3);
        packed_fill(&w, 1);
        EXPECT_OK(qkv_gemm_quantized(ctx, &out.t, &x.t, &w.t, w.p->format, NULL)); /* NaN */
        for (int64_t j = 0; j < m * k; j++) view_put(&x, j, 1);
        const int64_t row = test_below(m), column = test_below(n), at = test_below(k);
        view_put(&x, row * k + at, i % 2 ? NAN : INFINITY);
        const uint16_t nan = 0x7e00;
        memcpy(packed_block(&w, column, test_below(k / BLOCK)), &nan, sizeof nan);
        EXPECT_OK(qkv_gemm_quantized(ctx, &out.t, &x.t, &w.t, w.p->format, NULL));
        for (int64_t j = 0; j < m * n; j++) {
            double want = 0, d, min;
            for (int64_t l = 0; l < k; l++) {
                const double code = packed_get(&w, j % n, l, &d, &min);
                want += d * code + min;
            }
            const double got = view_get(&out, j);
            if (j / n == row || j % n == column ? isfinite(got) : got != want)
                fail_msg("%s [%lld, %lld, %lld] at %lld: got %g of %g", w.p->name, (long long)m,
                         (long long)n, (long long)k, (long long)j, got, want);
        }
        free(w.block);
        view_free(&out);
        view_free(&x);
    }
}

static void gemm_quantized_keeps_what_is_not_finite_in_its_place(void **state)
{
    (void)state;
    test_every_level(1, check_non_finite, NULL);
}

static void gemm_quantized_names_the_bad_argument(void **state)
{
    (void)state;
    qkv_context *ctx;
    EXPECT_OK(qkv_context_create(NULL, &ctx));
    unsigned char data[3][512];
    memset(data, VIEW_POISON, sizeof data);
    DLTensor *out = TENSOR(data[0], QKV_F32, 2, 3), *x = TENSOR(data[1], QKV_F32, 2, 32);
    DLTensor *w = TENSOR(data[2], QKV_U8, 3, 34);
    const struct {
        const char *why;
        qkv_context *ctx;
        DLTensor *out;
        const DLTensor *x, *w;
        int format;
    } cases[] = {
        {"ctx: expected a context", NULL, out, x, w, QKV_WEIGHT_Q8_0},
        {"format: expected QKV_WEIGHT_Q8_0, Q4_0 or Q4_1, got 3", ctx, out, x, w, 3},
        {"format: expected QKV_WEIGHT_Q8_0, Q4_0 or Q4_1, got -1", ctx, out, x, w, -1},
        {"x: expected rows of whole blocks of 32, got 33", ctx, out,
         TENSOR(data[1], QKV_F32, 2, 33), w, QKV_WEIGHT_Q8_0},
        {"w: expected shape [*, 18], got [3, 34]", ctx, out, x, w, QKV_WEIGHT_Q4_0},
        {"w: expected shape [*, 20], got [3, 34]", ctx, out, x, w, QKV_WEIGHT_Q4_1},
        {"w: expected dtype u8, got f32", ctx, out, x, TENSOR(data[2], QKV_F32, 3, 34),
         QKV_WEIGHT_Q8_0},
        {"out: expected shape [2, 3], got [3, 2]", ctx, TENSOR(data[0], QKV_F32, 3, 2), x, w,
         QKV_WEIGHT_Q8_0},
        {"out: expected memory apart from w, got an overlap", ctx,
         TENSOR(data[2] + 100, QKV_F32, 2, 3), x, w, QKV_WEIGHT_Q8_0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        EXPECT_FAIL(QKV_ERR_INVALID, cases[i].why,
                    qkv_gemm_quantized(cases[i].ctx, cases[i].out, cases[i].x, cases[i].w,
                                       (qkv_weight_format)cases[i].format, NULL));
    for (size_t i = 0; i < sizeof data; i++)
        assert_int_equal(((unsigned char *)data)[i], VIEW_POISON); /* untouched */
    qkv_context_destroy(ctx);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gemm_quantized_equals_the_sums),
        cmocka_unit_test(gemm_quantized_takes_any_number_of_rows),
        cmocka_unit_test(gemm_quantized_gives_a_row_the_same_bits_in_any_batch),
        cmocka_unit_test(gemm_quantized_keeps_what_is_not_finite_in_its_place),
        cmocka_unit_test(gemm_quantized_names_the_bad_argument),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
