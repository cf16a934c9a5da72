/* test_attention_low_precision.c - attention over 8-bit q, keys, values and outputs, with scales.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_case_random.h"

/* Each feature in so many, scales always. */
static const any_features mixed = {.custom_mask = 6,
                                   .alibi = 6,
                                   .sink = 6,
                                   .rope = 4,
                                   .scales = 1,
                                   .invariant = 8,
                                   .levels = 6,
                                   .bsr = 6,
                                   .detect = 6};

static void set_dtypes(qkv_attention_spec *s, int32_t number)
{
    const DLDataType types[] = {QKV_F32, QKV_F16, QKV_BF16, QKV_E4M3, QKV_E5M2, QKV_I8};
    s->dtype_q = types[number % 5];
    s->dtype_kv = types[number / 5 % 6];
    s->dtype_o = types[number / 30 % 5];
}

/* Each mix many times, for tiles and rows of the table differ. */
static void attention_takes_every_mix_of_dtypes(void **state)
{
    (void)state;
    try_cases(case_count(1950), mixed, set_dtypes);
}

static void set_dtypes_of_fixed_dims(qkv_attention_spec *s, int32_t number)
{
    set_dtypes(s, number);
    s->head_dim_qk = s->head_dim_vo = number / 150 % 2 ? 64 : 128;
}

static void attention_takes_every_mix_of_dtypes_in_common_dims(void **state)
{
    (void)state;
    any_features f = mixed;
    f.rope = 0;
    try_cases(case_count(1500), f, set_dtypes_of_fixed_dims);
}

/* q, k and v that tensor cores may multiply as they are, in the dims that have tiles of their own. */
static void set_e4m3(qkv_attention_spec *s, int32_t number)
{
    const DLDataType outputs[] = {QKV_BF16, QKV_F16, QKV_F32, QKV_E4M3};
    const int32_t dims[][2] = {{128, 128}, {64, 64}, {256, 256}, {192, 128}, {128, 192}};
    s->dtype_q = s->dtype_kv = QKV_E4M3;
    s->dtype_o = outputs[test_below(4)];
    if (number % 6 == 5) return;
    s->head_dim_qk = dims[number % 6][0];
    s->head_dim_vo = dims[number % 6][1];
}

static void attention_takes_e4m3_alone(void **state)
{
    (void)state;
    const any_features f = {
        .custom_mask = 8, .alibi = 8, .sink = 4, .scales = 1, .levels = 6, .detect = 6};
    try_cases(case_count(600), f, set_e4m3);
}

/* What the reference reads data with: the formats' definitions, by their landmarks. */
static void fp8_of_the_tests_is_by_the_book(void **state)
{
    (void)state;
    static const struct {
        const char *why;
        int32_t dtype;
        uint8_t code[4]; /* the first counts */
        double value;
    } rows[] = {
        {"e4m3: one", TEST_E4M3, {0x38}, 1},
        {"e4m3: the largest", TEST_E4M3, {0x7e}, 448},
        {"e4m3: minus the smallest normal", TEST_E4M3, {0x88}, -0x1p-6},
        {"e4m3: the smallest", TEST_E4M3, {0x01}, 0x1p-9},
        {"e5m2: one", TEST_E5M2, {0x3c}, 1},
        {"e5m2: the largest", TEST_E5M2, {0x7b}, 57344},
        {"e5m2: minus the smallest normal", TEST_E5M2, {0x84}, -0x1p-14},
        {"e5m2: the smallest", TEST_E5M2, {0x01}, 0x1p-16},
        {"i8: the lowest", 0, {0x80}, -128},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (test_get(rows[i].code, QKV_DTYPE((uint8_t)rows[i].dtype, 8), 0) != rows[i].value)
            fail_msg("%s", rows[i].why);
    const DLDataType types[] = {QKV_E4M3, QKV_E5M2, QKV_I8};
    for (int t = 0; t < 3; t++) {
        for (int code = 0; code < 256; code++) { /* a value stays, its neighbour's middle is even */
            const uint8_t c[4] = {(uint8_t)code}, next[4] = {(uint8_t)(code + 1)};
            const double x = test_get(c, types[t], 0), y = test_get(next, types[t], 0);
            uint8_t got[4];
            if (isinf(x) || isnan(x) || x == -128) continue; /* not stored */
            test_put(got, types[t], 0, x);
            assert_int_equal(got[0], c[0]);
            if (isinf(y) || isnan(y) || fabs(x - y) > 20000 || code == 0x7f || code == 0xff)
                continue;
            test_put(got, types[t], 0, (x + y) / 2);
            assert_int_equal(got[0], code % 2 ? next[0] : c[0]);
        }
    }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fp8_of_the_tests_is_by_the_book),
        cmocka_unit_test(attention_takes_every_mix_of_dtypes),
        cmocka_unit_test(attention_takes_every_mix_of_dtypes_in_common_dims),
        cmocka_unit_test(attention_takes_e4m3_alone),
    };
    return cmocka_run_group_tests_name("attention_low_precision", tests, open_contexts,
                                       close_contexts);
}
