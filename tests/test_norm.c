/* test_norm.c - RMSNorm against sums in double, over dtypes, widths, strides, levels and threads.
 * SPDX-License-Identifier: Apache-2.0 */
#include "view.h"

static const struct {
    const char *why;
    int64_t num_tokens, hidden_size;
} shapes[] = {
    {"no tokens", 0, 128},
    {"no width", 3, 0},
    {"one of each", 1, 1},
    {"less than any vector", 5, 3},
    {"odd", 3, 33},
    {"one element past two vectors of 32", 2, 65},
    {"a small model's layer, several tasks", 70, 576},
    {"a large model's layer", 9, 4096},
    {"odd and large", 2, 8191},
    {"the widest row", 1, 131072},
};

typedef struct norm_case {
    const char *why;
    DLDataType dtype, weight_dtype;
    int64_t num_tokens, hidden_size, pad;
    int add, in_place;
    float eps, weight_bias;
} norm_case;

static void check_rows(const norm_case *c, const double *sum, const view *weight, const view *out)
{
    /* Two roundings a factor, and a sum of squares whose error grows like a random walk. */
    const double bound = test_eps(c->dtype) + 0x1p-24 * (8 + sqrt((double)c->hidden_size));
    for (int64_t t = 0; t < c->num_tokens; t++) {
        double squares = 0;
        for (int64_t h = 0; h < c->hidden_size; h++) {
            const double s = sum[t * c->hidden_size + h];
            squares += s * s;
        }
        const double scale = 1 / sqrt(squares / (double)c->hidden_size + (double)c->eps);
        for (int64_t h = 0; h < c->hidden_size; h++) {
            const int64_t i = t * c->hidden_size + h;
            const double w = (double)c->weight_bias + view_get(weight, h);
            const double want = sum[i] * scale * w, got = view_get(out, i);
            if (isnan(want) && isnan(got)) continue; /* a row of zeros with eps 0: 0 / 0 */
            /* below: f16 has subnormals, and weight + bias may cancel */
            const double slack =
                0x1p-24 * fabs(sum[i] * scale) * 2 + (c->dtype.bits == 16 ? 3e-8 : 0);
            if (!(fabs(got - want) <= bound * fabs(want) + slack))
                fail_msg("%s: [%lld, %lld]: expected %.9g, got %.9g", c->why, (long long)t,
                         (long long)h, want, got);
        }
    }
}

static void check_case(qkv_context *ctx, const norm_case *c)
{
    const int64_t n = c->num_tokens, width = c->hidden_size;
    view x, other, residual, weight;
    view_new(&x, c->dtype, c->pad, TEST_SHAPE(n, width));
    view_new(&other, c->dtype, c->pad, TEST_SHAPE(n, width));
    view_new(&residual, c->dtype, c->pad, TEST_SHAPE(n, width));
    view_new(&weight, c->weight_dtype, c->pad, TEST_SHAPE(width));
    view_fill(&x, 3);
    view_fill(&residual, 20);
    view_fill(&weight, 2);
    view *const out = c->in_place ? &x : &other;
    double *const sum = view_values(&x), *const r0 = view_values(&residual);
    if (c->add) {
        for (int64_t i = 0; i < n * width; i++) sum[i] = (double)((float)sum[i] + (float)r0[i]);
        EXPECT_OK(qkv_add_rmsnorm(ctx, &out->t, &residual.t, &x.t, &weight.t, c->eps,
                                  c->weight_bias, NULL));
        for (int64_t i = 0; i < n * width; i++)
            if (view_get(&residual, i) != view_rounded(c->dtype, sum[i]))
                fail_msg("%s: residual %lld: expected %.9g, got %.9g", c->why, (long long)i,
                         view_rounded(c->dtype, sum[i]), view_get(&residual, i));
    } else {
        EXPECT_OK(qkv_rmsnorm(ctx, &out->t, &x.t, &weight.t, c->eps, c->weight_bias, NULL));
    }
    check_rows(c, sum, &weight, out);
    free(sum);
    free(r0);
    view *const all[] = {&x, &other, &residual, &weight};
    for (int i = 0; i < 4; i++) {
        view_check_guards(all[i]);
        view_free(all[i]);
    }
}

static void check_grid(qkv_context *ctx, void *user)
{
    (void)user;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int d = 0; d < 3; d++)
            for (int form = 0; form < 16; form++)
                check_case(ctx, &(norm_case){
                                    .why = shapes[s].why,
                                    .dtype = float_dtypes[d],
                                    .weight_dtype = float_dtypes[form & 1 ? 0 : d],
                                    .num_tokens = shapes[s].num_tokens,
                                    .hidden_size = shapes[s].hidden_size,
                                    .add = form >> 1 & 1,
                                    .in_place = form >> 2 & 1,
                                    .pad = form >> 3 & 1 ? 5 : 0,
                                    .eps = form & 1 ? 0.f : 1e-5f,
                                    .weight_bias = form & 2 ? 1.f : 0.f,
                                });
}

static void rmsnorm_equals_the_formula(void **state)
{
    (void)state;
    test_every_level(1, check_grid, NULL);
}

static void rmsnorm_equals_the_formula_on_three_threads(void **state)
{
    (void)state;
    test_every_level(3, check_grid, NULL);
}

/* Heads of a fused [tokens, q | k | v] tensor are normalised where they are, between others. */
static void check_slices(qkv_context *ctx, void *user)
{
    (void)user;
    enum { TOKENS = 7, WIDE = 96, WIDTH = 32 };
    float wide[TOKENS * WIDE], weight[WIDTH], before[TOKENS * WIDE];
    for (int i = 0; i < WIDTH; i++) weight[i] = 1;
    for (int i = 0; i < TOKENS * WIDE; i++) before[i] = wide[i] = (float)test_uniform(1);
    int64_t shape[] = {TOKENS, WIDTH}, strides[] = {WIDE, 1};
    DLTensor x = {.data = wide,
                  .device = test_device(),
                  .ndim = 2,
                  .dtype = {2, 32, 1},
                  .shape = shape,
                  .strides = strides};
    DLTensor out = x, residual = x;
    residual.data = wide + WIDTH;
    out.data = wide + 2 * WIDTH;
    DLTensor *w = TENSOR(weight, QKV_F32, WIDTH);
    EXPECT_OK(qkv_add_rmsnorm(ctx, &out, &residual, &x, w, 0.f, 0.f, NULL));
    for (int t = 0; t < TOKENS; t++) {
        double squares = 0;
        for (int h = 0; h < WIDTH; h++) {
            const float *from = before + t * WIDE + h, *to = wide + t * WIDE + h;
            assert_true(to[0] == from[0] && to[WIDTH] == from[0] + from[WIDTH]);
            squares += (double)to[2 * WIDTH] * (double)to[2 * WIDTH];
        }
        assert_true(fabs(squares / WIDTH - 1) < 1e-5);
    }
    /* one element further they meet */
    residual.data = wide + WIDTH - 1;
    EXPECT_FAIL(QKV_ERR_INVALID, "residual: expected memory apart from x",
                qkv_add_rmsnorm(ctx, &out, &residual, &x, w, 0.f, 0.f, NULL));
    x.data = wide + WIDTH + 1;
    EXPECT_FAIL(QKV_ERR_INVALID, "out: expected x itself or memory apart from it",
                qkv_rmsnorm(ctx, &out, &x, w, 0.f, 0.f, NULL));
}

static void rmsnorm_takes_slices_of_one_tensor(void **state)
{
    (void)state;
    test_every_level(1, check_slices, NULL);
}

static void rmsnorm_names_the_bad_argument(void **state)
{
    (void)state;
    qkv_context *ctx;
    EXPECT_OK(test_context_create(&ctx));
    float data[4][64];
    memset(data, VIEW_POISON, sizeof data);
    DLTensor *out = TENSOR(data[0], QKV_F32, 2, 16), *x = TENSOR(data[1], QKV_F32, 2, 16);
    DLTensor *w = TENSOR(data[2], QKV_F32, 16), *res = TENSOR(data[3], QKV_F32, 2, 16);
    DLTensor one_row = *out;
    one_row.strides = (int64_t[]){0, 1};
    const float huge = INFINITY, bad = NAN;
    const struct {
        const char *why;
        qkv_context *ctx;
        DLTensor *out;
        const DLTensor *x, *weight;
        float eps, bias;
    } cases[] = {
        {"ctx: expected a context", NULL, out, x, w, 0, 0},
        {"x: expected a tensor, got NULL", ctx, out, NULL, w, 0, 0},
        {"x: expected shape [*, *], got [16]", ctx, out, w, w, 0, 0},
        {"x: expected dtype f32, f16 or bf16, got i32", ctx, out, TENSOR(data[1], QKV_I32, 2, 16),
         w, 0, 0},
        {"x: expected hidden_size of at most 131072", ctx, out, TENSOR(data[1], QKV_F32, 0, 131073),
         w, 0, 0},
        {"out: expected a tensor, got NULL", ctx, NULL, x, w, 0, 0},
        {"out: expected dtype f32, got bf16", ctx, TENSOR(data[0], QKV_BF16, 2, 16), x, w, 0, 0},
        {"out: expected shape [2, 16], got [2, 15]", ctx, TENSOR(data[0], QKV_F32, 2, 15), x, w, 0,
         0},
        {"weight: expected a tensor, got NULL", ctx, out, x, NULL, 0, 0},
        {"weight: expected shape [16], got [15]", ctx, out, x, TENSOR(data[2], QKV_F32, 15), 0, 0},
        {"weight: expected dtype f32, got f16", ctx, out, x, TENSOR(data[2], QKV_F16, 16), 0, 0},
        {"weight: expected memory apart from out", ctx, out, x, TENSOR(data[0], QKV_F32, 16), 0, 0},
        {"out: expected x itself or memory apart from it, got an overlap", ctx,
         TENSOR(data[1] + 1, QKV_F32, 2, 16), x, w, 0, 0},
        {"out: expected elements apart from each other, got stride 0", ctx, &one_row, x, w, 0, 0},
        {"eps: expected >= 0 and finite, got -1", ctx, out, x, w, -1, 0},
        {"eps: expected >= 0 and finite, got nan", ctx, out, x, w, bad, 0},
        {"eps: expected >= 0 and finite, got inf", ctx, out, x, w, huge, 0},
        {"weight_bias: expected a finite number", ctx, out, x, w, 0, bad},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        EXPECT_FAIL(QKV_ERR_INVALID, cases[i].why,
                    qkv_rmsnorm(cases[i].ctx, cases[i].out, cases[i].x, cases[i].weight,
                                cases[i].eps, cases[i].bias, NULL));
        EXPECT_FAIL(QKV_ERR_INVALID, cases[i].why,
                    qkv_add_rmsnorm(cases[i].ctx, cases[i].out, res, cases[i].x, cases[i].weight,
                                    cases[i].eps, cases[i].bias, NULL));
    }
    EXPECT_FAIL(QKV_ERR_INVALID, "weight: expected dtype bf16, got f16",
                qkv_rmsnorm(ctx, TENSOR(data[0], QKV_BF16, 2, 16), TENSOR(data[1], QKV_BF16, 2, 16),
                            TENSOR(data[2], QKV_F16, 16), 0, 0, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "residual: expected a tensor, got NULL",
                qkv_add_rmsnorm(ctx, out, NULL, x, w, 0, 0, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "residual: expected shape [2, 16], got [1, 16]",
                qkv_add_rmsnorm(ctx, out, TENSOR(data[3], QKV_F32, 1, 16), x, w, 0, 0, NULL));
    one_row.data = data[3];
    EXPECT_FAIL(QKV_ERR_INVALID, "residual: expected elements apart from each other, got stride 0",
                qkv_add_rmsnorm(ctx, out, &one_row, x, w, 0, 0, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "residual: expected memory apart from out",
                qkv_add_rmsnorm(ctx, out, TENSOR(data[0] + 31, QKV_F32, 2, 16), x, w, 0, 0, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "residual: expected memory apart from weight",
                qkv_add_rmsnorm(ctx, out, TENSOR(data[2], QKV_F32, 2, 16), x, w, 0, 0, NULL));
    for (size_t i = 0; i < sizeof data; i++)
        assert_int_equal(((unsigned char *)data)[i], VIEW_POISON); /* untouched */
    qkv_context_destroy(ctx);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rmsnorm_equals_the_formula),
        cmocka_unit_test(rmsnorm_equals_the_formula_on_three_threads),
        cmocka_unit_test(rmsnorm_takes_slices_of_one_tensor),
        cmocka_unit_test(rmsnorm_names_the_bad_argument),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
