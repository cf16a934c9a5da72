/* test_merge.c - qkv_attention_merge against the formula in double, and against attention itself.
 * SPDX-License-Identifier: Apache-2.0 */
#include "support.h"
#include "view.h"

enum { MAX_STATES = 64 };

typedef struct shape {
    const char *why;
    int64_t tokens, heads, dim;
    int32_t states;
} shape;

static const shape shapes[] = {
    {"no tokens", 0, 2, 8, 2},
    {"one number", 1, 1, 1, 1},
    {"two states", 3, 2, 64, 2},
    {"odd width", 2, 3, 37, 3},
    {"many states", 2, 2, 40, MAX_STATES},
    {"a model's heads", 5, 9, 128, 4},
    {"no width", 3, 2, 0, 2},
};

/* form: 0 apart, 1 in the place of the first state, 2 of the last; empty: some lse are -inf. */
static void check_case(qkv_context *ctx, const shape *x, DLDataType dtype_o, DLDataType dtype_s,
                       int form, int base2, int pad)
{
    static view o[MAX_STATES + 1], lse[MAX_STATES + 1];
    const DLTensor *o_states[MAX_STATES], *lse_states[MAX_STATES];
    double *o_values[MAX_STATES], *lse_values[MAX_STATES];
    const int32_t n = x->states;
    const int64_t rows = x->tokens * x->heads;
    for (int32_t s = 0; s <= n; s++) {
        view_new(&o[s], s < n ? dtype_s : dtype_o, pad, TEST_SHAPE(x->tokens, x->heads, x->dim));
        view_new(&lse[s], QKV_F32, pad, TEST_SHAPE(x->tokens, x->heads, 1));
        lse[s].t.ndim = 2; /* [tokens, heads], whose last axis may have any stride too */
        view_fill(&o[s], 2);
        view_fill(&lse[s], 10);
        for (int64_t i = 0; i < rows; i++)
            if (test_below(5) == 0) view_put(&lse[s], i, -INFINITY);
        for (int64_t i = 0; s < n && i < rows; i++) /* a state that counts for nothing */
            if (view_get(&lse[s], i) == -INFINITY)
                for (int64_t d = 0; d < x->dim; d++) view_put(&o[s], i * x->dim + d, NAN);
        if (s == n) break;
        o_states[s] = &o[s].t;
        lse_states[s] = &lse[s].t;
        o_values[s] = view_values(&o[s]);
        lse_values[s] = view_values(&lse[s]);
    }
    const int32_t at = form == 0 ? n : form == 1 ? 0 : n - 1;
    EXPECT_OK(qkv_attention_merge(ctx, &o[at].t, &lse[at].t, o_states, lse_states, n,
                                  base2 ? QKV_ATTENTION_LSE_BASE_2 : 0, NULL));
    const double unit = base2 ? log(2) : 1;
    for (int64_t i = 0; i < rows; i++) {
        double max = -INFINITY, sum = 0;
        for (int32_t s = 0; s < n; s++) max = fmax(max, lse_values[s][i] * unit);
        for (int32_t s = 0; s < n && max > -INFINITY; s++)
            sum += exp(lse_values[s][i] * unit - max);
        const double want = max > -INFINITY ? (max + log(sum)) / unit : -INFINITY;
        const double got = view_get(&lse[at], i);
        /* a rounding of each product, sum and function, of numbers up to 10 and their scaling */
        if (!(got == want || fabs(got - want) <= (n + 16) * 0x1p-24 * (1 + fabs(want))))
            fail_msg("%s: lse of row %d: expected %.9g, got %.9g", x->why, (int)i, want, got);
        for (int64_t d = 0; d < x->dim; d++) {
            double value = 0, magnitude = 0;
            for (int32_t s = 0; s < n && max > -INFINITY; s++) {
                const double weight = exp(lse_values[s][i] * unit - max) / sum;
                if (weight == 0) continue;
                value += weight * o_values[s][i * x->dim + d];
                magnitude += weight * fabs(o_values[s][i * x->dim + d]);
            }
            const double have = view_get(&o[at], i * x->dim + d);
            const double bound =
                (n + 40) * 0x1p-24 * magnitude + test_eps(o[at].t.dtype) * fabs(value);
            if (!(fabs(have - value) <= bound + 1e-7 * (o[at].t.dtype.bits == 16)))
                fail_msg("%s: o of row %d, %d: expected %.9g, got %.9g", x->why, (int)i, (int)d,
                         value, have);
        }
    }
    for (int32_t s = 0; s <= n; s++) {
        view_check_guards(&o[s]);
        view_check_guards(&lse[s]);
        view_free(&o[s]);
        view_free(&lse[s]);
        if (s == n) break;
        free(o_values[s]);
        free(lse_values[s]);
    }
}

static void check_grid(qkv_context *ctx, void *user)
{
    (void)user;
    static const DLDataType dtypes[] = {{2, 32, 1}, {2, 16, 1}, {4, 16, 1}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int a = 0; a < 3; a++)
            for (int b = 0; b < 3; b++)
                for (int form = 0; form < (a == b ? 3 : 1); form++)
                    for (int bits = 0; bits < 4; bits++)
                        check_case(ctx, &shapes[i], dtypes[a], dtypes[b], form, bits & 1,
                                   bits & 2 ? 3 : 0);
}

static void merge_equals_the_formula(void **state)
{
    (void)state;
    test_every_level(1, check_grid, NULL);
    test_every_level(3, check_grid, NULL);
}

/* Attention over each half of the keys, merged, is attention over all of them. */
static void merge_of_halves_is_the_whole(void **state)
{
    (void)state;
    enum { TOKENS = 3, HEADS = 4, DIM = 64, KEYS = 50 };
    static float q[TOKENS * HEADS * DIM], k[KEYS * 2 * DIM], v[KEYS * 2 * DIM];
    static float o[4][TOKENS * HEADS * DIM], lse[4][TOKENS * HEADS];
    for (size_t i = 0; i < sizeof q / sizeof *q; i++) q[i] = (float)test_uniform(1);
    for (size_t i = 0; i < sizeof k / sizeof *k; i++) k[i] = (float)test_uniform(1);
    for (size_t i = 0; i < sizeof v / sizeof *v; i++) v[i] = (float)test_uniform(1);
    qkv_context *ctx;
    qkv_attention *attention;
    EXPECT_OK(test_context_create(&ctx));
    const qkv_attention_spec spec = {
        QKV_ATTENTION_SPEC_INIT, .num_qo_heads = HEADS, .num_kv_heads = 2,   .head_dim_qk = DIM,
        .head_dim_vo = DIM,      .dtype_q = QKV_F32,    .dtype_kv = QKV_F32, .dtype_o = QKV_F32};
    const qkv_attention_limits limits = {QKV_ATTENTION_LIMITS_INIT, .max_requests = 1,
                                         .max_tokens = TOKENS, .max_kv_len = KEYS};
    EXPECT_OK(qkv_attention_create(ctx, &spec, &limits, NULL, &attention));
    const int32_t parts[][2] = {{0, 21}, {21, KEYS}, {0, KEYS}};
    for (int part = 0; part < 3; part++) {
        int32_t qo_indptr[] = {0, TOKENS}, kv_indptr[] = {parts[part][0], parts[part][1]};
        const qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(qo_indptr, QKV_I32, 2),
                                    .kv_indptr = TENSOR(kv_indptr, QKV_I32, 2)};
        const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1,
                                           .levels = &index};
        EXPECT_OK(qkv_attention_plan(attention, &batch, NULL));
        const qkv_attention_io io = {QKV_ATTENTION_IO_INIT,
                                     .q = TENSOR(q, QKV_F32, TOKENS, HEADS, DIM),
                                     .k = TENSOR(k, QKV_F32, KEYS, 2, DIM),
                                     .v = TENSOR(v, QKV_F32, KEYS, 2, DIM),
                                     .o = TENSOR(o[part], QKV_F32, TOKENS, HEADS, DIM),
                                     .lse = TENSOR(lse[part], QKV_F32, TOKENS, HEADS)};
        EXPECT_OK(qkv_attention_run(attention, &io, NULL));
    }
    const DLTensor *o_states[] = {TENSOR(o[0], QKV_F32, TOKENS, HEADS, DIM),
                                  TENSOR(o[1], QKV_F32, TOKENS, HEADS, DIM)};
    const DLTensor *lse_states[] = {TENSOR(lse[0], QKV_F32, TOKENS, HEADS),
                                    TENSOR(lse[1], QKV_F32, TOKENS, HEADS)};
    EXPECT_OK(qkv_attention_merge(ctx, TENSOR(o[3], QKV_F32, TOKENS, HEADS, DIM),
                                  TENSOR(lse[3], QKV_F32, TOKENS, HEADS), o_states, lse_states, 2,
                                  0, NULL));
    for (int i = 0; i < TOKENS * HEADS * DIM; i++)
        assert_true(fabsf(o[3][i] - o[2][i]) <= KEYS * 0x1p-22f);
    for (int i = 0; i < TOKENS * HEADS; i++)
        assert_true(fabsf(lse[3][i] - lse[2][i]) <= KEYS * 0x1p-22f);
    qkv_attention_destroy(attention);
    qkv_context_destroy(ctx);
}

/* (a b) c = a (b c) = a b c, within rounding. */
static void try_orders(qkv_context *ctx, void *user)
{
    (void)user;
    enum { TOKENS = 5, HEADS = 3, DIM = 37, N = TOKENS * HEADS };
    static float o[3][N * DIM], lse[3][N], pair_o[N * DIM], pair_lse[N], out[3][N * DIM], got[3][N];
    for (int s = 0; s < 3; s++) {
        for (int i = 0; i < N * DIM; i++) o[s][i] = (float)test_uniform(2);
        for (int i = 0; i < N; i++) lse[s][i] = test_below(5) ? (float)test_uniform(20) : -INFINITY;
    }
#define STATE(x)  TENSOR(x, QKV_F32, TOKENS, HEADS, DIM)
#define LSE(x)    TENSOR(x, QKV_F32, TOKENS, HEADS)
#define PAIR(...) ((const DLTensor *const[]){__VA_ARGS__})
    for (int order = 0; order < 2; order++) {
        const int a = order, b = order + 1, rest = order ? 0 : 2;
        EXPECT_OK(qkv_attention_merge(ctx, STATE(pair_o), LSE(pair_lse),
                                      PAIR(STATE(o[a]), STATE(o[b])),
                                      PAIR(LSE(lse[a]), LSE(lse[b])), 2, 0, NULL));
        EXPECT_OK(qkv_attention_merge(ctx, STATE(out[order]), LSE(got[order]),
                                      PAIR(STATE(pair_o), STATE(o[rest])),
                                      PAIR(LSE(pair_lse), LSE(lse[rest])), 2, 0, NULL));
    }
    EXPECT_OK(qkv_attention_merge(ctx, STATE(out[2]), LSE(got[2]),
                                  PAIR(STATE(o[0]), STATE(o[1]), STATE(o[2])),
                                  PAIR(LSE(lse[0]), LSE(lse[1]), LSE(lse[2])), 3, 0, NULL));
#undef STATE
#undef LSE
#undef PAIR
    for (int order = 0; order < 2; order++) {
        for (int i = 0; i < N * DIM; i++) /* values within 2, a dozen roundings; lse within 20 */
            assert_true(fabs((double)out[order][i] - (double)out[2][i]) <= 2 * 60 * 0x1p-24);
        for (int i = 0; i < N; i++)
            assert_true(got[order][i] == got[2][i] ||
                        fabs((double)got[order][i] - (double)got[2][i]) <= 20 * 12 * 0x1p-24);
    }
}

static void merge_is_associative(void **state)
{
    (void)state;
    for (int i = 0; i < 20; i++) test_every_level(1, try_orders, NULL);
}

static void merge_names_the_bad_argument(void **state)
{
    (void)state;
    qkv_context *ctx;
    EXPECT_OK(test_context_create(&ctx));
    float a[24] = {0}, b[24] = {0}, o[24], la[6] = {0}, lb[6] = {0}, l[6];
    for (int i = 0; i < 24; i++) o[i] = 7;
    for (int i = 0; i < 6; i++) l[i] = 7;
    DLTensor *to = TENSOR(o, QKV_F32, 3, 2, 4), *tl = TENSOR(l, QKV_F32, 3, 2);
    const DLTensor *os[] = {TENSOR(a, QKV_F32, 3, 2, 4), TENSOR(b, QKV_F32, 3, 2, 4)};
    const DLTensor *ls[] = {TENSOR(la, QKV_F32, 3, 2), TENSOR(lb, QKV_F32, 3, 2)};
    const DLTensor *short_os[] = {os[0], TENSOR(b, QKV_F32, 3, 2, 3)};
    const DLTensor *other_os[] = {os[0], TENSOR(b, QKV_F16, 3, 2, 4)};
    const DLTensor *short_ls[] = {ls[0], TENSOR(lb, QKV_F32, 3, 1)}, *no_ls[] = {ls[0], NULL};
    const DLTensor *half_ls[] = {ls[0], TENSOR(lb, QKV_F16, 3, 2)}, *no_os[] = {NULL, os[1]};
    const DLTensor *near_os[] = {TENSOR(o + 2, QKV_F32, 2, 2, 4), TENSOR(b, QKV_F32, 2, 2, 4)};
    const DLTensor *two_ls[] = {TENSOR(la, QKV_F32, 2, 2), TENSOR(lb, QKV_F32, 2, 2)};
    const DLTensor *lse_in_o[] = {ls[0], TENSOR(o, QKV_F32, 3, 2)};
#define MERGE(ctx, o, l, os, ls, n, flags) qkv_attention_merge(ctx, o, l, os, ls, n, flags, NULL)
    const qkv_status bad = QKV_ERR_INVALID;
    EXPECT_FAIL(bad, "ctx", MERGE(NULL, to, tl, os, ls, 2, 0));
    EXPECT_FAIL(bad, "o:", MERGE(ctx, NULL, tl, os, ls, 2, 0));
    EXPECT_FAIL(bad, "o:", MERGE(ctx, TENSOR(o, QKV_F32, 6, 4), tl, os, ls, 2, 0));
    EXPECT_FAIL(bad, "lse:", MERGE(ctx, to, TENSOR(l, QKV_F32, 2, 3), os, ls, 2, 0));
    EXPECT_FAIL(bad, "num_states", MERGE(ctx, to, tl, os, ls, 0, 0));
    EXPECT_FAIL(bad, "num_states", MERGE(ctx, to, tl, os, ls, 65, 0));
    EXPECT_FAIL(bad, "o_states:", MERGE(ctx, to, tl, NULL, ls, 2, 0));
    EXPECT_FAIL(bad, "lse_states:", MERGE(ctx, to, tl, os, NULL, 2, 0));
    EXPECT_FAIL(bad, "o_states[0]", MERGE(ctx, to, tl, no_os, ls, 2, 0));
    EXPECT_FAIL(bad, "lse_states[1]", MERGE(ctx, to, tl, os, no_ls, 2, 0));
    EXPECT_FAIL(bad, "o_states[1]", MERGE(ctx, to, tl, short_os, ls, 2, 0));
    EXPECT_FAIL(bad, "o_states[1]", MERGE(ctx, to, tl, other_os, ls, 2, 0));
    EXPECT_FAIL(bad, "lse_states[1]", MERGE(ctx, to, tl, os, short_ls, 2, 0));
    EXPECT_FAIL(bad, "lse_states[1]", MERGE(ctx, to, tl, os, half_ls, 2, 0));
    EXPECT_FAIL(bad, "o: expected state 0's own memory",
                MERGE(ctx, TENSOR(o, QKV_F32, 2, 2, 4), NULL, near_os, two_ls, 2, 0));
    EXPECT_FAIL(bad, "apart from lse_states[1]", MERGE(ctx, to, NULL, os, lse_in_o, 2, 0));
    EXPECT_FAIL(bad, "flags", MERGE(ctx, to, tl, os, ls, 2, 1));
#undef MERGE
    for (int i = 0; i < 24; i++) assert_true(o[i] == 7);
    for (int i = 0; i < 6; i++) assert_true(l[i] == 7);
    qkv_context_destroy(ctx);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(merge_equals_the_formula),
        cmocka_unit_test(merge_of_halves_is_the_whole),
        cmocka_unit_test(merge_is_associative),
        cmocka_unit_test(merge_names_the_bad_argument),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
