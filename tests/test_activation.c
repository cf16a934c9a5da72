/* test_activation.c - gated activations against double, over dtypes, forms, strides, levels,
 * threads.
 * SPDX-License-Identifier: Apache-2.0 */
#include <float.h>

#include "view.h"

static double reference(double x, int32_t kind)
{
    const double root = 1.41421356237309504880, pi = 3.14159265358979323846;
    if (kind == QKV_SILU) return x / (1 + exp(-x));
    if (kind == QKV_GELU) return x / 2 * erfc(-x / root);
    const double u = sqrt(2 / pi) * (x + 0.044715 * x * x * x);
    return x / (1 + exp(-2 * u)); /* = x/2 (1 + tanh u) */
}

/* Relative error of the f32 computation: a few roundings, and those of the exponent. */
static double error_of(double x, int32_t kind)
{
    const double exponent = kind == QKV_SILU   ? fabs(x)
                            : kind == QKV_GELU ? x * x / 2
                                               : 1.6 * fabs(x + 0.044715 * x * x * x);
    return 0x1p-24 * (8 + 6 * exponent);
}

static void check_values(const char *why, int32_t kind, const double *gate, const double *up,
                         const view *out)
{
    for (int64_t i = 0; i < view_numel(out); i++) {
        const double want = reference(gate[i], kind) * up[i], got = view_get(out, i);
        const double bound = (test_eps(out->t.dtype) + error_of(gate[i], kind)) * fabs(want) +
                             (out->t.dtype.code == 2 && out->t.dtype.bits == 16 ? 3e-8 : 1e-35);
        if (!(fabs(got - want) <= bound))
            fail_msg("%s: kind %d of %.9g times %.9g: expected %.9g, got %.9g", why, (int)kind,
                     gate[i], up[i], want, got);
    }
}

static const struct {
    const char *why;
    int64_t num_tokens, size;
} shapes[] = {
    {"no tokens", 0, 64},
    {"no width", 4, 0},
    {"one of each", 1, 1},
    {"odd and small", 3, 7},
    {"one past two vectors of 16", 4, 33},
    {"a small model's layer", 30, 1536},
    {"one long row, several tasks", 1, 28673},
};

enum { APART, OVER_GATE, OVER_UP, NUM_FORMS };

static void check_case(qkv_context *ctx, size_t shape, DLDataType dtype, int form, int32_t kind,
                       int64_t pad)
{
    const char *why = shapes[shape].why;
    const int64_t n = shapes[shape].num_tokens, size = shapes[shape].size;
    view gate, up, out;
    view_new(&gate, dtype, pad, TEST_SHAPE(n, size));
    view_new(&up, dtype, pad, TEST_SHAPE(n, size));
    view_new(&out, dtype, pad, TEST_SHAPE(n, size));
    view_fill(&gate, 12);
    view_fill(&up, 2);
    double *const g0 = view_values(&gate), *const u0 = view_values(&up);
    view *const to = form == OVER_GATE ? &gate : form == OVER_UP ? &up : &out;
    EXPECT_OK(qkv_gated_activation(ctx, &to->t, &gate.t, &up.t, kind, NULL));
    check_values(why, kind, g0, u0, to);
    free(g0);
    free(u0);
    view *const all[] = {&gate, &up, &out};
    for (int i = 0; i < 3; i++) {
        view_check_guards(all[i]);
        view_free(all[i]);
    }
}

static void check_grid(qkv_context *ctx, void *user)
{
    (void)user;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int d = 0; d < 3; d++)
            for (int form = 0; form < NUM_FORMS; form++)
                for (int32_t kind = 0; kind < 3; kind++)
                    check_case(ctx, s, float_dtypes[d], form, kind, kind == 1 ? 0 : 6);
}

static void gated_equals_the_formula(void **state)
{
    (void)state;
    test_every_level(1, check_grid, NULL);
}

static void gated_equals_the_formula_on_three_threads(void **state)
{
    (void)state;
    test_every_level(3, check_grid, NULL);
}

/* The whole range of f32, large and tiny, both signs, infinities and NaN. */
static void check_range(qkv_context *ctx, void *user)
{
    (void)user;
    view gate, up, out;
    const int64_t n = 40000;
    view_new(&gate, QKV_F32, 0, TEST_SHAPE(1, n));
    view_new(&up, QKV_F32, 0, TEST_SHAPE(1, n));
    view_new(&out, QKV_F32, 0, TEST_SHAPE(1, n));
    for (int64_t i = 0; i < n; i++) {
        const double x = test_uniform(1); /* half of them where the exponentials end, and beyond */
        view_put(&gate, i, i % 2 ? 200 * x : ldexp(x, (int)test_below(254) - 126));
        view_put(&up, i, 1);
    }
    const double special[] = {0,    -0.0,  88,    -88,      100,     -100,    13,
                              -13,  14.5,  -14.5, 0x1p-126, FLT_MAX, 1e38,    -1e38,
                              1e20, -1e20, 1e13,  -1e13,    -1e30,   -FLT_MAX};
    for (size_t i = 0; i < sizeof special / sizeof *special; i++)
        view_put(&gate, (int64_t)i, special[i]);
    double *const g = view_values(&gate), *const u = view_values(&up);
    for (int32_t kind = 0; kind < 3; kind++) {
        EXPECT_OK(qkv_gated_activation(ctx, &out.t, &gate.t, &up.t, kind, NULL));
        for (int64_t i = 0; i < n; i++) {
            const double want = reference(g[i], kind), got = view_get(&out, i);
            const double bound = error_of(g[i], kind) * fabs(want) + 0x1p-120;
            if (!(fabs(got - want) <= bound))
                fail_msg("kind %d of %.9g: expected %.9g, got %.9g", (int)kind, g[i], want, got);
        }
    }
    view_put(&gate, 0, NAN);
    view_put(&gate, 1, INFINITY);
    view_put(&gate, 2, -INFINITY);
    view_put(&gate, 3, 1000);
    for (int32_t kind = 0; kind < 3; kind++) {
        EXPECT_OK(qkv_gated_activation(ctx, &out.t, &gate.t, &up.t, kind, NULL));
        assert_true(isnan(view_get(&out, 0)));
        assert_true(view_get(&out, 1) == INFINITY);
        assert_true(view_get(&out, 2) == 0);
        assert_true(view_get(&out, 3) == 1000); /* neighbours of a NaN are as ever */
    }
    free(g);
    free(u);
    view_free(&gate);
    view_free(&up);
    view_free(&out);
}

static void gated_holds_over_the_range_of_f32(void **state)
{
    (void)state;
    test_every_level(1, check_range, NULL);
}

/* gate and up as halves of one tensor, the result over either. */
static void check_halves(qkv_context *ctx, void *user)
{
    (void)user;
    enum { TOKENS = 6, SIZE = 40 };
    for (int over = 0; over < 2; over++) {
        float wide[TOKENS][2][SIZE], before[TOKENS][2][SIZE];
        for (int i = 0; i < TOKENS * 2 * SIZE; i++) (&wide[0][0][0])[i] = (float)test_uniform(5);
        memcpy(before, wide, sizeof wide);
        int64_t shape[] = {TOKENS, SIZE}, strides[] = {2 * SIZE, 1};
        DLTensor half[2];
        for (int i = 0; i < 2; i++)
            half[i] = (DLTensor){.data = wide[0][i],
                                 .device = test_device(),
                                 .ndim = 2,
                                 .dtype = {2, 32, 1},
                                 .shape = shape,
                                 .strides = strides};
        EXPECT_OK(qkv_gated_activation(ctx, &half[over], &half[0], &half[1], QKV_SILU, NULL));
        for (int t = 0; t < TOKENS; t++)
            for (int h = 0; h < SIZE; h++) {
                const double x = (double)before[t][0][h];
                const double want = reference(x, QKV_SILU) * (double)before[t][1][h];
                assert_true(fabs((double)wide[t][over][h] - want) <= 1e-6 * fabs(want));
                assert_true(wide[t][!over][h] == before[t][!over][h]);
            }
    }
}

static void gated_takes_halves_of_one_tensor(void **state)
{
    (void)state;
    test_every_level(1, check_halves, NULL);
}

static void gated_names_the_bad_argument(void **state)
{
    (void)state;
    qkv_context *ctx;
    EXPECT_OK(test_context_create(&ctx));
    float data[3][64];
    memset(data, VIEW_POISON, sizeof data);
    DLTensor *out = TENSOR(data[0], QKV_F32, 2, 16), *gate = TENSOR(data[1], QKV_F32, 2, 16);
    DLTensor *up = TENSOR(data[2], QKV_F32, 2, 16);
    const char *const shared =
        "out: expected gate or up itself, or memory apart from them, got an overlap";
    DLTensor one_row = *gate;
    one_row.strides = (int64_t[]){0, 1};
    const struct {
        const char *why;
        qkv_context *ctx;
        DLTensor *out;
        const DLTensor *gate, *up;
        int32_t kind;
    } cases[] = {
        {"ctx: expected a context", NULL, out, gate, up, 0},
        {"gate: expected a tensor, got NULL", ctx, out, NULL, up, 0},
        {"gate: expected shape [*, *], got [32]", ctx, out, TENSOR(data[1], QKV_F32, 32), up, 0},
        {"gate: expected dtype f32, f16 or bf16, got e4m3", ctx, out,
         TENSOR(data[1], QKV_E4M3, 2, 16), up, 0},
        {"up: expected a tensor, got NULL", ctx, out, gate, NULL, 0},
        {"up: expected dtype f32, got f16", ctx, out, gate, TENSOR(data[2], QKV_F16, 2, 16), 0},
        {"up: expected shape [2, 16], got [2, 8]", ctx, out, gate, TENSOR(data[2], QKV_F32, 2, 8),
         0},
        {"out: expected a tensor, got NULL", ctx, NULL, gate, up, 0},
        {"out: expected shape [2, 16], got [1, 16]", ctx, TENSOR(data[0], QKV_F32, 1, 16), gate, up,
         0},
        {"kind: expected QKV_SILU, QKV_GELU or QKV_GELU_TANH, got 3", ctx, out, gate, up, 3},
        {"kind: expected QKV_SILU, QKV_GELU or QKV_GELU_TANH, got -1", ctx, out, gate, up, -1},
        {"out: expected elements apart from each other, got stride 0", ctx, &one_row, &one_row, up,
         0},
        {shared, ctx, TENSOR(data[1] + 1, QKV_F32, 2, 16), gate, up, 0},
        {shared, ctx, TENSOR(data[2] + 31, QKV_F32, 2, 16), gate, up, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        EXPECT_FAIL(QKV_ERR_INVALID, cases[i].why,
                    qkv_gated_activation(cases[i].ctx, cases[i].out, cases[i].gate, cases[i].up,
                                         cases[i].kind, NULL));
    for (size_t i = 0; i < sizeof data; i++)
        assert_int_equal(((unsigned char *)data)[i], VIEW_POISON); /* untouched */
    qkv_context_destroy(ctx);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gated_equals_the_formula),
        cmocka_unit_test(gated_equals_the_formula_on_three_threads),
        cmocka_unit_test(gated_holds_over_the_range_of_f32),
        cmocka_unit_test(gated_takes_halves_of_one_tensor),
        cmocka_unit_test(gated_names_the_bad_argument),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
