/* test_gemm.c - out = x w^T against sums in double, over dtypes, sizes, strides, levels and
 * threads; on a GPU over the kernels of both kinds of context.
 * SPDX-License-Identifier: Apache-2.0 */
#include "view.h"

typedef struct gemm_case {
    const char *why;
    int64_t m, n, k;
    DLDataType out, x, w;
    int64_t pad;
    int integers; /* small ones: every sum is exact */
} gemm_case;

static const struct {
    const char *why;
    int64_t m, n, k;
} shapes[] = {
    {"no rows", 0, 5, 7},
    {"no columns", 5, 0, 7},
    {"nothing to sum: zeros", 3, 5, 0},
    {"nothing at all", 0, 0, 0},
    {"one of each", 1, 1, 1},
    {"one sum", 1, 1, 77},
    {"an outer product", 9, 21, 1},
    {"one element less than a vector of 16", 15, 15, 15},
    {"whole vectors", 16, 32, 64},
    {"one element past vectors", 17, 33, 65},
    {"a column, more rows than that", 100, 1, 40},
    {"few rows, odd", 3, 19, 43},
    {"few rows, k of 3 blocks of the kernel", 8, 2, 13000},
    {"one row, the longest", 1, 3, 53001},
    {"one row, more columns than a block", 1, 61500, 3},
    {"k of pieces and a rest", 13, 34, 523},
    {"rows of several blocks, the last with one", 385, 5, 300},
    {"rows and columns of several blocks", 193, 385, 9},
};

static void fill(view *v, const gemm_case *c)
{
    for (int64_t i = 0, n = view_numel(v); i < n; i++)
        view_put(v, i, c->integers ? (double)(test_below(9) - 4) : test_uniform(1));
}

static void check_sums(const gemm_case *c, const double *x, const double *w, const view *out)
{
    for (int64_t i = 0; i < c->m * c->n; i++) {
        const double *row = x + i / c->n * c->k, *column = w + i % c->n * c->k;
        double want = 0, squares = 0;
        for (int64_t j = 0; j < c->k; j++) {
            const double product = row[j] * column[j];
            want += product;
            squares += product * product;
        }
        /* k roundings of sums that walk at random, and one of the store; f16 has subnormals */
        const double walk = 0x1p-24 * 4 * (1 + sqrt((double)c->k)) * sqrt(squares);
        /* tensor cores cut off what they add, 16 products at a time, at their sum's 24th bit */
        const double cut =
            test_on_cuda() ? 0x1p-23 * (double)c->k / 16 * sqrt(squares + want * want) : 0;
        const double bound =
            test_eps(c->out) * fabs(want) + walk + cut + (c->out.bits == 16 ? 3e-8 : 0);
        const double got = view_get(out, i);
        const int good =
            c->integers ? got == view_rounded(c->out, want) : fabs(got - want) <= bound;
        if (!good)
            fail_msg("%s: [%lld, %lld, %lld] at [%lld, %lld]: expected %.9g, got %.9g", c->why,
                     (long long)c->m, (long long)c->n, (long long)c->k, (long long)(i / c->n),
                     (long long)(i % c->n), want, got);
    }
}

static void check_case(qkv_context *ctx, const gemm_case *c)
{
    view out, x, w;
    view_new(&out, c->out, c->pad, TEST_SHAPE(c->m, c->n));
    view_new(&x, c->x, c->pad, TEST_SHAPE(c->m, c->k));
    view_new(&w, c->w, c->pad, TEST_SHAPE(c->n, c->k));
    fill(&x, c);
    fill(&w, c);
    double *const x_values = view_values(&x), *const w_values = view_values(&w);
    EXPECT_OK(qkv_gemm(ctx, &out.t, &x.t, &w.t, NULL));
    check_sums(c, x_values, w_values, &out);
    free(x_values);
    free(w_values);
    view *const all[] = {&out, &x, &w};
    for (int i = 0; i < 3; i++) {
        view_check_guards(all[i]);
        view_free(all[i]);
    }
}

static void check_grid(qkv_context *ctx, void *user)
{
    (void)user;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int w = 0; w < 3; w++)
            for (int form = 0; form < 4; form++)
                check_case(ctx, &(gemm_case){
                                    .why = shapes[s].why,
                                    .m = shapes[s].m,
                                    .n = shapes[s].n,
                                    .k = shapes[s].k,
                                    .out = float_dtypes[test_below(3)],
                                    .x = float_dtypes[test_below(3)],
                                    .w = float_dtypes[w],
                                    .integers = form & 1,
                                    .pad = form & 2 ? 5 : 0,
                                });
}

/* On a GPU a context may ask for sums that do not depend on the batch: then own kernels multiply what
 * cuBLASLt takes otherwise. */
static void every_provider(int32_t num_threads, void (*body)(qkv_context *ctx, void *user))
{
    test_every_level(num_threads, body, NULL);
    if (!test_on_cuda()) return;
    qkv_context *ctx;
    EXPECT_OK(
        qkv_context_create(&(qkv_context_options){TEST_CONTEXT_INIT, .batch_invariant = 1}, &ctx));
    body(ctx, NULL);
    qkv_context_destroy(ctx);
}

static void gemm_equals_the_sums(void **state)
{
    (void)state;
    every_provider(1, check_grid);
}

static void gemm_equals_the_sums_on_three_threads(void **state)
{
    (void)state;
    if (test_is_emulated()) skip(); /* a GPU has no threads here */
    every_provider(3, check_grid);
}

static void check_mixes(qkv_context *ctx, void *user)
{
    (void)user;
    for (int mix = 0; mix < 27; mix++) {
        gemm_case c = {.why = "mixed dtypes",
                       .n = 1 + test_below(80),
                       .k = 1 + test_below(600),
                       .out = float_dtypes[mix / 9],
                       .x = float_dtypes[mix / 3 % 3],
                       .w = float_dtypes[mix % 3],
                       .pad = 3,
                       .integers = mix % 2};
        for (c.m = 1; c.m < 40; c.m = c.m * 3 + 1) check_case(ctx, &c);
    }
}

static void gemm_mixes_dtypes(void **state)
{
    (void)state;
    every_provider(1, check_mixes);
}

static void check_row_counts(qkv_context *ctx, void *user)
{
    (void)user;
    gemm_case c = {.why = "every number of rows", .out = QKV_F32, .integers = 1, .pad = 7};
    for (c.m = 1; c.m <= 70; c.m++) {
        c.x = float_dtypes[test_below(3)];
        c.w = float_dtypes[test_below(3)];
        c.n = 1 + test_below(70);
        c.k = 1 + test_below(300);
        check_case(ctx, &c);
    }
}

static void gemm_takes_any_number_of_rows(void **state)
{
    (void)state;
    every_provider(2, check_row_counts);
}

enum { ROWS = 70, COLUMNS = 67, WIDTH = 1100 };

/* A product whose bits show the order of its sums. */
typedef struct batch {
    view x, w, out; /* out: of all rows at once, on one thread */
} batch;

static void check_same_bits(qkv_context *ctx, const batch *b)
{
    const int64_t m = 1 + test_below(ROWS), first = test_below(ROWS - m + 1);
    const int64_t n = 1 + test_below(COLUMNS);
    view out;
    view_new(&out, QKV_F32, 0, TEST_SHAPE(m, n));
    DLTensor x = b->x.t, w = b->w.t;
    x.shape = (int64_t[]){m, WIDTH};
    x.byte_offset = (uint64_t)(first * WIDTH) * test_bytes(x.dtype);
    w.shape = (int64_t[]){n, WIDTH};
    EXPECT_OK(qkv_gemm(ctx, &out.t, &x, &w, NULL));
    for (int64_t i = 0; i < m; i++)
        if (memcmp((float *)(void *)out.block + i * n,
                   (float *)(void *)b->out.block + (first + i) * COLUMNS, (size_t)n * 4) != 0)
            fail_msg("row %lld has other bits among rows [%lld, %lld), %lld columns",
                     (long long)(first + i), (long long)first, (long long)(first + m),
                     (long long)n);
    view_free(&out);
}

static void check_invariance(qkv_context *one, qkv_context *three)
{
    for (int dtype = 0; dtype < 3; dtype++) {
        batch b;
        view_new(&b.x, float_dtypes[test_below(3)], 0, TEST_SHAPE(ROWS, WIDTH));
        view_new(&b.w, float_dtypes[dtype], 0, TEST_SHAPE(COLUMNS, WIDTH));
        view_new(&b.out, QKV_F32, 0, TEST_SHAPE(ROWS, COLUMNS));
        view_fill(&b.x, 1);
        view_fill(&b.w, 1);
        EXPECT_OK(qkv_gemm(one, &b.out.t, &b.x.t, &b.w.t, NULL));
        for (int i = 0; i < (test_is_emulated() ? 12 : 60); i++)
            check_same_bits(i % 2 ? one : three, &b);
        view_free(&b.x);
        view_free(&b.w);
        view_free(&b.out);
    }
}

static void gemm_gives_a_row_the_same_bits_in_any_batch(void **state)
{
    (void)state;
    int32_t usable;
    const char *level;
    for (int32_t i = 0; (level = test_level(i, &usable)); i++) {
        if (!usable) continue;
        qkv_context *contexts[2];
        for (int32_t j = 0; j < 2; j++)
            EXPECT_OK(qkv_context_create(&(qkv_context_options){TEST_CONTEXT_INIT, .isa = level,
                                                                .num_threads = 1 + 2 * j,
                                                                .batch_invariant = 1},
                                         &contexts[j]));
        check_invariance(contexts[0], contexts[1]);
        qkv_context_destroy(contexts[0]);
        qkv_context_destroy(contexts[1]);
    }
}

/* NaN and infinity reach their own row and column, and no padding of the kernel turns them into
 * more. */
static void check_non_finite(qkv_context *ctx, void *user)
{
    (void)user;
    for (int i = 0; i < (test_is_emulated() ? 18 : 60); i++) {
        const int64_t m = 1 + test_below(30), n = 1 + test_below(70), k = 1 + test_below(70);
        view out, x, w;
        view_new(&out, QKV_F32, 3, TEST_SHAPE(m, n));
        view_new(&x, float_dtypes[i % 3], 3, TEST_SHAPE(m, k));
        view_new(&w, float_dtypes[i / 3 % 3], 3, TEST_SHAPE(n, k));
        EXPECT_OK(qkv_gemm(ctx, &out.t, &x.t, &w.t, NULL)); /* leaves NaN in the kernel's scratch */
        for (int64_t j = 0; j < m * k; j++) view_put(&x, j, 1);
        for (int64_t j = 0; j < n * k; j++) view_put(&w, j, 1);
        const int64_t row = test_below(m), column = test_below(n);
        view_put(&x, row * k + test_below(k), NAN);
        view_put(&w, column * k + test_below(k), INFINITY);
        EXPECT_OK(qkv_gemm(ctx, &out.t, &x.t, &w.t, NULL));
        for (int64_t j = 0; j < m * n; j++) {
            const double got = view_get(&out, j), want = j % n == column ? INFINITY : (double)k;
            if (j / n == row ? !isnan(got) : got != want)
                fail_msg("[%lld, %lld, %lld] at %lld: expected %g, got %g", (long long)m,
                         (long long)n, (long long)k, (long long)j,
                         j / n == row ? (double)NAN : want, got);
        }
        view_free(&out);
        view_free(&x);
        view_free(&w);
    }
}

static void gemm_keeps_nan_and_infinity_in_their_place(void **state)
{
    (void)state;
    every_provider(1, check_non_finite);
}

/* Tensors without strides, one row for all tokens, and the halves of a wider tensor. */
static void check_layouts(qkv_context *ctx, void *user)
{
    (void)user;
    enum { M = 11, N = 18, K = 20 };
    float x[K], w[N * K], wide[M * 2 * N];
    for (int i = 0; i < K; i++) x[i] = (float)(test_below(9) - 4);
    for (int i = 0; i < N * K; i++) w[i] = (float)(test_below(9) - 4);
    memset(wide, VIEW_POISON, sizeof wide);
    DLTensor out_t = *TENSOR(wide + N, QKV_F32, M, N), x_t = *TENSOR(x, QKV_F32, M, K);
    DLTensor w_t = *TENSOR(w, QKV_F32, N, K);
    out_t.strides = (int64_t[]){2 * N, 1};
    x_t.strides = (int64_t[]){0, 1};
    w_t.strides = NULL;
    EXPECT_OK(qkv_gemm(ctx, &out_t, &x_t, &w_t, NULL));
    for (int i = 0; i < M * N; i++) {
        float want = 0;
        for (int j = 0; j < K; j++) want += x[j] * w[i % N * K + j];
        assert_true(wide[i / N * 2 * N + N + i % N] == want);
        assert_true(isnan(wide[i / N * 2 * N + i % N]));
    }
}

static void gemm_takes_any_outer_stride(void **state)
{
    (void)state;
    every_provider(1, check_layouts);
}

static void gemm_names_the_bad_argument(void **state)
{
    (void)state;
    qkv_context *ctx;
    EXPECT_OK(test_context_create(&ctx));
    float data[4][64];
    memset(data, VIEW_POISON, sizeof data);
    DLTensor *out = TENSOR(data[0], QKV_F32, 2, 3), *x = TENSOR(data[1], QKV_F32, 2, 16);
    DLTensor *w = TENSOR(data[2], QKV_F32, 3, 16);
    DLTensor gaps = *x, elsewhere = *w, odd = *w, back = *x, one_row = *out, near = *out;
    gaps.strides = (int64_t[]){32, 2};
    back.strides = (int64_t[]){-16, 1};
    one_row.strides = (int64_t[]){0, 1};
    near.strides = (int64_t[]){2, 1};
    elsewhere.device.device_type = kDLROCM;
    odd.byte_offset = 2;
    const struct {
        const char *why;
        qkv_context *ctx;
        DLTensor *out;
        const DLTensor *x, *w;
    } cases[] = {
        {"ctx: expected a context", NULL, out, x, w},
        {"x: expected a tensor, got NULL", ctx, out, NULL, w},
        {"w: expected a tensor, got NULL", ctx, out, x, NULL},
        {"out: expected a tensor, got NULL", ctx, NULL, x, w},
        {"x: expected dtype f32, f16 or bf16, got i32", ctx, out, TENSOR(data[1], QKV_I32, 2, 16),
         w},
        {"w: expected dtype f32, f16 or bf16, got i32", ctx, out, x,
         TENSOR(data[2], QKV_I32, 3, 16)},
        {"out: expected dtype f32, f16 or bf16, got i32", ctx, TENSOR(data[0], QKV_I32, 2, 3), x,
         w},
        {"x: expected shape [*, *], got [16]", ctx, out, TENSOR(data[1], QKV_F32, 16), w},
        {"w: expected shape [*, 16], got [3, 15]", ctx, out, x, TENSOR(data[2], QKV_F32, 3, 15)},
        {"w: expected shape [*, 16], got [3, 16, 1]", ctx, out, x,
         TENSOR(data[2], QKV_F32, 3, 16, 1)},
        {"out: expected shape [2, 3], got [3, 2]", ctx, TENSOR(data[0], QKV_F32, 3, 2), x, w},
        {"x: expected a contiguous last axis, got stride 2", ctx, out, &gaps, w},
        {"x: expected sizes and strides within 59 bits and not negative", ctx, out, &back, w},
        {"x: expected data, got NULL", ctx, out, TENSOR(NULL, QKV_F32, 2, 16), w},
        {"w: expected a tensor on ", ctx, out, x, &elsewhere},
        {"w: expected data aligned to its elements", ctx, out, x, &odd},
        {"out: expected elements apart from each other, got stride 0 on axis 0", ctx, &one_row, x,
         w},
        {"out: expected elements apart from each other, got stride 2 on axis 0", ctx, &near, x, w},
        {"out: expected memory apart from x, got an overlap", ctx,
         TENSOR(data[1] + 31, QKV_F32, 2, 3), x, w},
        {"out: expected memory apart from w, got an overlap", ctx,
         TENSOR(data[2] + 47, QKV_F32, 2, 3), x, w},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        EXPECT_FAIL(QKV_ERR_INVALID, cases[i].why,
                    qkv_gemm(cases[i].ctx, cases[i].out, cases[i].x, cases[i].w, NULL));
    for (size_t i = 0; i < sizeof data; i++)
        assert_int_equal(((unsigned char *)data)[i], VIEW_POISON); /* untouched */
    EXPECT_OK(qkv_gemm(ctx, out, x, w, NULL));                     /* the context is usable */
    qkv_context_destroy(ctx);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gemm_equals_the_sums),
        cmocka_unit_test(gemm_equals_the_sums_on_three_threads),
        cmocka_unit_test(gemm_mixes_dtypes),
        cmocka_unit_test(gemm_takes_any_number_of_rows),
        cmocka_unit_test(gemm_gives_a_row_the_same_bits_in_any_batch),
        cmocka_unit_test(gemm_keeps_nan_and_infinity_in_their_place),
        cmocka_unit_test(gemm_takes_any_outer_stride),
        cmocka_unit_test(gemm_names_the_bad_argument),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
