/* test_bad_input_sampling.c - faults of tensors of qkv_top_k and qkv_log_probs, and of parameters of samplers that do
 * not go together.
 * SPDX-License-Identifier: Apache-2.0 */
#include "bad_input.h"

static qkv_status run_top_k(DLTensor *const *t)
{
    return qkv_top_k(ctx, t[0], t[1], t[2], 1, NULL);
}

static qkv_status run_log_probs(DLTensor *const *t)
{
    return qkv_log_probs(ctx, t[0], t[1], t[2], t[3], NULL);
}

static const int32_t chosen[] = {0, 6, -1, 3, 3, 7, 1, 2};

static const bad_call calls[] = {
    {.what = "top_k",
     .run = run_top_k,
     .args = {ARG("values", F32, SHAPE(4, 3), .output = true, .optional = true, .also = "indices"),
              ARG("indices", I32, SHAPE(4, 3), .output = true, .also = "values rows k"),
              ARG("rows", F32, SHAPE(4, 7), .also = "values indices", .longer = 2, .shorter = 2)}},
    {.what = "log_probs",
     .run = run_log_probs,
     .args = {ARG("log_probs", F32, SHAPE(4, 2), .output = true, .also = "tokens ranks"),
              ARG("ranks", I32, SHAPE(4, 2), .output = true, .optional = true,
                  .also = "tokens log_probs"),
              ARG("logits", F16, SHAPE(4, 7), .also = "log_probs tokens ranks", .longer = 2,
                  .shorter = 2),
              ARG("tokens", I32, SHAPE(4, 2), .init = chosen, .also = "log_probs ranks")}},
};

static void operators_name_the_faulty_tensor(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(calls); i++) bad_check(&calls[i]);
}

static void top_k_has_bounds(void **state)
{
    (void)state;
    float row[8] = {0}, values[9];
    int32_t indices[9];
    DLTensor *x = TENSOR(row, QKV_F32, 1, 8);
    EXPECT_FAIL(QKV_ERR_INVALID, "indices: expected",
                qkv_top_k(ctx, NULL, TENSOR(indices, QKV_I32, 1, 9), x, 1, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "indices: expected",
                qkv_top_k(ctx, NULL, TENSOR(indices, QKV_I32, 1, 0), x, 1, NULL));
    EXPECT_FAIL(
        QKV_ERR_INVALID, "values: expected",
        qkv_top_k(ctx, TENSOR(values, QKV_F16, 1, 4), TENSOR(indices, QKV_I32, 1, 4), x, 1, NULL));
    EXPECT_FAIL(
        QKV_ERR_INVALID, "rows: expected",
        qkv_top_k(ctx, NULL, TENSOR(indices, QKV_I32, 1, 1), TENSOR(row, QKV_F32, 1, 0), 1, NULL));
    EXPECT_OK(qkv_top_k(ctx, NULL, TENSOR(indices, QKV_I32, 1, 8), x, 0, NULL));
}

/* Parameters that the kind of rows, or the operator, has not, and those that need another. */
static void parameters_go_together(void **state)
{
    (void)state;
    float x[2][8] = {{0}}, y[2][8], value = 1;
    int32_t tokens[2] = {-7, -7}, words[2] = {-1, -1}, counts[2][8] = {{0}};
    uint64_t seed = 1;
    DLTensor *t = TENSOR(tokens, QKV_I32, 2), *rows = TENSOR(x, QKV_F32, 2, 8),
             *out = TENSOR(y, QKV_F32, 2, 8);
    const DLTensor *v = TENSOR(&value, QKV_F32, 1), *s = TENSOR(&seed, QKV_U64, 1);
    const DLTensor *w = TENSOR(words, QKV_I32, 2, 1), *n = TENSOR(counts, QKV_I32, 2, 8);
    const DLTensor *b = TENSOR(x, QKV_F32, 2, 8);
    memset(y, 0x55, sizeof y);
#define P(...) (&(qkv_sampling_params){QKV_SAMPLING_PARAMS_INIT, __VA_ARGS__})
#define SAMPLE(name, ...)                                                                          \
    EXPECT_FAIL(QKV_ERR_INVALID, name, qkv_sample(ctx, t, rows, P(__VA_ARGS__), NULL))
#define RENORM(name, ...)                                                                          \
    EXPECT_FAIL(QKV_ERR_INVALID, name, qkv_renormalize(ctx, out, rows, P(__VA_ARGS__), NULL))
#define MASK(name, ...)                                                                            \
    EXPECT_FAIL(QKV_ERR_INVALID, name, qkv_mask_logits(ctx, out, rows, P(__VA_ARGS__), NULL))
    SAMPLE("seed", .seed = NULL);
    SAMPLE("kind", .seed = s, .kind = 2);
    SAMPLE("order", .seed = s, .order = -1);
    SAMPLE("reserved", .seed = s, .reserved = 1);
    SAMPLE("temperature", .seed = s, .kind = QKV_PROBS, .temperature = v);
    SAMPLE("top_n_sigma", .seed = s, .kind = QKV_PROBS, .top_n_sigma = v);
    SAMPLE("repetition", .seed = s, .kind = QKV_PROBS, .repetition = v, .counts = n);
    SAMPLE("frequency", .seed = s, .kind = QKV_PROBS, .frequency = v, .counts = n);
    SAMPLE("presence", .seed = s, .kind = QKV_PROBS, .presence = v, .counts = n);
    SAMPLE("bias", .seed = s, .kind = QKV_PROBS, .bias = b);
    SAMPLE("bitmask", .seed = s, .kind = QKV_PROBS, .bitmask = w);
    SAMPLE("counts", .seed = s, .repetition = v);
    SAMPLE("counts", .seed = s, .frequency = v);
    SAMPLE("counts", .seed = s, .presence = v);
    RENORM("seed", .seed = s);
    RENORM("offset", .offset = s);
    RENORM("temperature", .kind = QKV_PROBS, .temperature = v);
    MASK("seed", .seed = s);
    MASK("offset", .offset = s);
    MASK("top_p", .top_p = v);
    MASK("min_p", .min_p = v);
    MASK("typical_p", .typical_p = v);
    MASK("kind", .kind = QKV_PROBS);
    EXPECT_FAIL(QKV_ERR_INVALID, "ctx", qkv_renormalize(NULL, out, rows, P(.top_p = v), NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "ctx",
                qkv_mask_logits(NULL, out, rows, P(.temperature = v), NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "params", qkv_renormalize(ctx, out, rows, NULL, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "params", qkv_mask_logits(ctx, out, rows, NULL, NULL));
#undef MASK
#undef RENORM
#undef SAMPLE
#undef P
    for (int i = 0; i < 16; i++) assert_true(((unsigned char *)y)[4 * i] == 0x55);
    assert_true(tokens[0] == -7 && tokens[1] == -7);
}

/* One number for all requests is checked like one of many; in range it is taken. */
static void single_numbers_are_checked(void **state)
{
    (void)state;
    float x[2][8] = {{0}};
    int32_t tokens[2];
    uint64_t seed = 1;
    const struct {
        const char *name;
        float bad[3], good[2];
    } cases[] = {
        {"temperature", {-1, NAN, INFINITY}, {0, 1e30f}},
        {"top_p", {0, 1.5f, NAN}, {1e-30f, 1}},
        {"min_p", {-0.5f, 1.5f, NAN}, {0, 1}},
        {"typical_p", {0, 1.5f, NAN}, {1e-30f, 1}},
        {"top_n_sigma", {0, -1, NAN}, {1e-30f, 1e30f}},
        {"repetition", {0, -1, NAN}, {1e-30f, 1e30f}},
        {"frequency", {INFINITY, -INFINITY, NAN}, {-9, 9}},
        {"presence", {INFINITY, -INFINITY, NAN}, {-9, 9}},
    };
    int32_t counts[2][8] = {{0}};
    for (size_t i = 0; i < COUNT(cases); i++)
        for (int j = 0; j < 5; j++) {
            float value = j < 3 ? cases[i].bad[j] : cases[i].good[j - 3];
            const DLTensor *v = TENSOR(&value, QKV_F32, 1);
            const qkv_sampling_params params = {
                QKV_SAMPLING_PARAMS_INIT,
                .seed = TENSOR(&seed, QKV_U64, 1),
                .temperature = i == 0 ? v : NULL,
                .top_p = i == 1 ? v : NULL,
                .min_p = i == 2 ? v : NULL,
                .typical_p = i == 3 ? v : NULL,
                .top_n_sigma = i == 4 ? v : NULL,
                .repetition = i == 5 ? v : NULL,
                .frequency = i == 6 ? v : NULL,
                .presence = i == 7 ? v : NULL,
                .counts = i >= 5 ? TENSOR(counts, QKV_I32, 2, 8) : NULL,
            };
            DLTensor *t = TENSOR(tokens, QKV_I32, 2), *rows = TENSOR(x, QKV_F32, 2, 8);
            if (j < 3)
                EXPECT_FAIL(QKV_ERR_INVALID, cases[i].name,
                            qkv_sample(ctx, t, rows, &params, NULL));
            else
                EXPECT_OK(qkv_sample(ctx, t, rows, &params, NULL));
        }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(operators_name_the_faulty_tensor),
        cmocka_unit_test(top_k_has_bounds),
        cmocka_unit_test(parameters_go_together),
        cmocka_unit_test(single_numbers_are_checked),
    };
    return cmocka_run_group_tests_name("bad_input_sampling", tests, bad_open, bad_close);
}
