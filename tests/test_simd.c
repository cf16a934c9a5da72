/* test_simd.c - what kern/cpu/simd.h promises of NaN, seen through softmax, the only operator whose
 * result rests on an exponential alone.
 * SPDX-License-Identifier: Apache-2.0 */
#include "support.h"

enum { DIM = 16, KEYS = 40, ROWS = 20 };

typedef struct softmax_case {
    qkv_attention *op[2]; /* without and with a soft cap */
    float q[ROWS * DIM], k[KEYS * DIM], v[KEYS * DIM], o[ROWS * DIM];
} softmax_case;

static qkv_attention *softmax_new(qkv_context *ctx, float soft_cap)
{
    const qkv_attention_spec spec = {
        QKV_ATTENTION_SPEC_INIT,     .num_qo_heads = 1,
        .num_kv_heads = 1,           .head_dim_qk = DIM,
        .head_dim_vo = DIM,          .features = soft_cap > 0 ? QKV_FEATURE_SOFT_CAP : 0,
        .logits_soft_cap = soft_cap, .dtype_q = QKV_F32,
        .dtype_kv = QKV_F32,         .dtype_o = QKV_F32};
    const qkv_attention_limits limits = {QKV_ATTENTION_LIMITS_INIT, .max_requests = 1,
                                         .max_tokens = ROWS, .max_kv_len = KEYS};
    qkv_attention *op;
    EXPECT_OK(qkv_attention_create(ctx, &spec, &limits, NULL, &op));
    return op;
}

/* o of the first num_rows rows over all keys. */
static void softmax_run(softmax_case *c, qkv_attention *op, int32_t num_rows)
{
    int32_t qo_indptr[] = {0, num_rows}, kv_indptr[] = {0, KEYS};
    const qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(qo_indptr, QKV_I32, 2),
                                .kv_indptr = TENSOR(kv_indptr, QKV_I32, 2)};
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1, .levels = &index};
    EXPECT_OK(qkv_attention_plan(op, &batch, NULL));
    const qkv_attention_io io = {
        QKV_ATTENTION_IO_INIT, .q = TENSOR(c->q, QKV_F32, num_rows, 1, DIM),
        .k = TENSOR(c->k, QKV_F32, KEYS, 1, DIM), .v = TENSOR(c->v, QKV_F32, KEYS, 1, DIM),
        .o = TENSOR(c->o, QKV_F32, num_rows, 1, DIM)};
    EXPECT_OK(qkv_attention_run(op, &io, NULL));
}

/* A NaN of any payload, quiet or signalling, of either sign; the first few are those that are made
 * in practice: by 0 / 0, by memset, by a payload that counts. */
static float any_nan(int64_t i)
{
    static const uint32_t common[] = {0x7fc00000, 0xffc00000, 0xffffffff, 0x7fffffff,
                                      0x7fc00001, 0x7f800001, 0xff800001, 0x7fc000ff};
    if (i < 8) return test_bits_float(common[i]);
    return test_bits_float(0x7f800000 | (uint32_t)test_below(2) << 31 |
                           (uint32_t)(1 + test_below((1 << 23) - 1)));
}

/* One key that holds a NaN makes a NaN of everything that it has a weight in. */
static void check_nan(qkv_context *ctx, void *user)
{
    (void)user;
    static softmax_case c;
    for (int i = 0; i < 2; i++) c.op[i] = softmax_new(ctx, i ? 30.f : 0.f);
    for (int i = 0; i < ROWS * DIM; i++) c.q[i] = (float)test_uniform(1);
    for (int i = 0; i < KEYS * DIM; i++)
        c.k[i] = (float)test_uniform(1), c.v[i] = (float)test_uniform(1);
    for (int64_t trial = 0; trial < 3000; trial++) {
        const int64_t at = test_below(KEYS * DIM);
        const int32_t num_rows = trial / 8 % 2 ? 1 : ROWS; /* decode, prefill */
        const float before = c.k[at], nan = any_nan(trial < 32 ? trial % 8 : trial);
        memcpy(&c.k[at], &nan, sizeof nan);
        softmax_run(&c, c.op[trial / 16 % 2], num_rows);
        for (int i = 0; i < num_rows * DIM; i++)
            if (!isnan(c.o[i])) {
                uint32_t bits;
                memcpy(&bits, &nan, sizeof bits);
                fail_msg("%s, %d rows: a key with NaN 0x%08x: expected NaN, got %g",
                         qkv_context_device_name(ctx), (int)num_rows, (unsigned)bits,
                         (double)c.o[i]);
            }
        c.k[at] = before;
        if (trial % 100 == 0) { /* nothing of it stays behind */
            softmax_run(&c, c.op[trial / 16 % 2], num_rows);
            for (int i = 0; i < num_rows * DIM; i++) assert_true(fabsf(c.o[i]) <= 1);
        }
    }
    for (int i = 0; i < 2; i++) qkv_attention_destroy(c.op[i]);
}

static void simd_exponential_of_every_nan_is_nan(void **state)
{
    (void)state;
    test_every_level(1, check_nan, NULL);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(simd_exponential_of_every_nan_is_nan),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
