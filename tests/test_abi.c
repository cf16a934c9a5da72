/* test_abi.c - what a program compiled against this version relies on: sizes, the place of the last
 * field, and the numbers behind names. A change here is a change of ABI: version and changelog say
 * so.
 * SPDX-License-Identifier: Apache-2.0 */
#include "support.h"

static void abi_sizes_are_pinned(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        size_t size, pinned;
    } cases[] = {
        {"qkv_allocator", sizeof(qkv_allocator), 24},
        {"qkv_parallel", sizeof(qkv_parallel), 24},
        {"qkv_context_options", sizeof(qkv_context_options), 128},
        {"qkv_kernel_info", sizeof(qkv_kernel_info), 24},
        {"qkv_attention_spec", sizeof(qkv_attention_spec), 88},
        {"qkv_attention_limits", sizeof(qkv_attention_limits), 72},
        {"qkv_workspace_size", sizeof(qkv_workspace_size), 24},
        {"qkv_workspace", sizeof(qkv_workspace), 56},
        {"qkv_kv_index", sizeof(qkv_kv_index), 88},
        {"qkv_attention_batch", sizeof(qkv_attention_batch), 48},
        {"qkv_attention_io", sizeof(qkv_attention_io), 160},
        {"qkv_scale", sizeof(qkv_scale), 16},
        {"qkv_variant", sizeof(qkv_variant), 32},
        {"qkv_param", sizeof(qkv_param), 24},
        {"qkv_arg", sizeof(qkv_arg), 16},
        {"qkv_kv_append_options", sizeof(qkv_kv_append_options), 88},
        {"qkv_rope_spec", sizeof(qkv_rope_spec), 32},
        {"qkv_sampling_params", sizeof(qkv_sampling_params), 152},
        {"qkv_verify_io", sizeof(qkv_verify_io), 80},
        {"qkv_stage", sizeof(qkv_stage), 40},
        {"qkv_logits_pipe_spec", sizeof(qkv_logits_pipe_spec), 40},
        {"qkv_named_tensor", sizeof(qkv_named_tensor), 16},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        if (cases[i].size != cases[i].pinned)
            fail_msg("%s: expected %zu bytes, got %zu", cases[i].name, cases[i].pinned,
                     cases[i].size);
    assert_int_equal(offsetof(qkv_context_options, log_user), sizeof(qkv_context_options) - 8);
    assert_int_equal(offsetof(qkv_attention_spec, variant), sizeof(qkv_attention_spec) - 8);
    assert_int_equal(offsetof(qkv_attention_limits, reserved), sizeof(qkv_attention_limits) - 4);
    assert_int_equal(offsetof(qkv_attention_io, args), sizeof(qkv_attention_io) - 8);
    assert_int_equal(offsetof(qkv_sampling_params, valid), sizeof(qkv_sampling_params) - 8);
}

static void abi_numbers_are_pinned(void **state)
{
    (void)state;
    static const char *const status[] = {"QKV_OK",         "QKV_ERR_INVALID", "QKV_ERR_UNSUPPORTED",
                                         "QKV_ERR_MEMORY", "QKV_ERR_COMPILE", "QKV_ERR_DEVICE",
                                         "QKV_ERR_COMM",   "QKV_ERR_INTERNAL"};
    for (int i = 0; i < 8; i++) assert_string_equal(qkv_status_name((qkv_status)i), status[i]);
    assert_int_equal(QKV_NHD, 0);
    assert_int_equal(QKV_HND, 1);
    assert_int_equal(QKV_MASK_NONE, 0);
    assert_int_equal(QKV_MASK_CAUSAL, 1);
    assert_int_equal(QKV_FEATURE_SOFT_CAP, 1);
    assert_int_equal(QKV_MASK_CUSTOM, 2);
    assert_int_equal(QKV_FEATURE_ALIBI, 2);
    assert_int_equal(QKV_FEATURE_WINDOW, 4);
    assert_int_equal(QKV_FEATURE_ROPE, 8);
    assert_int_equal(QKV_ATTENTION_BATCH_INVARIANT, 1);
    assert_int_equal(QKV_ATTENTION_HAS_SINK, 4);
    assert_int_equal(QKV_ATTENTION_ONLY_APPENDS, 8);
    assert_int_equal(QKV_JIT_ALLOW, 0);
    assert_int_equal(QKV_JIT_CACHED, 1);
    assert_int_equal(QKV_JIT_NEVER, 2);
    assert_int_equal(QKV_JIT_FILL, 3);
    assert_int_equal(QKV_PARAM_F32, 0);
    assert_int_equal(QKV_PARAM_I32, 1);
    assert_int_equal(QKV_PARAM_TENSOR, 2);
    assert_int_equal(QKV_ATTENTION_LSE_BASE_2, 2);
    assert_int_equal(QKV_LOGITS, 0);
    assert_int_equal(QKV_PROBS, 1);
    assert_int_equal(QKV_TOP_K_FIRST, 0);
    assert_int_equal(QKV_TOP_K_JOINT, 1);
    static const int32_t stages[] = {
        QKV_STAGE_REPETITION, QKV_STAGE_FREQUENCY, QKV_STAGE_PRESENCE,    QKV_STAGE_BIAS,
        QKV_STAGE_BITMASK,    QKV_STAGE_USER,      QKV_STAGE_TEMPERATURE, QKV_STAGE_TOP_N_SIGMA,
        QKV_STAGE_SOFTMAX,    QKV_STAGE_TOP_K,     QKV_STAGE_TOP_P,       QKV_STAGE_MIN_P,
        QKV_STAGE_TYPICAL_P,  QKV_STAGE_SAMPLE};
    for (int32_t i = 0; i < 14; i++) assert_int_equal(stages[i], i);
    assert_int_equal(QKV_SILU, 0);
    assert_int_equal(QKV_GELU, 1);
    assert_int_equal(QKV_GELU_TANH, 2);
    assert_int_equal(QKV_WEIGHT_Q8_0, 0);
    assert_int_equal(QKV_WEIGHT_Q4_0, 1);
    assert_int_equal(QKV_WEIGHT_Q4_1, 2);
}

static void abi_version_is_the_headers(void **state)
{
    (void)state;
    assert_int_equal(qkv_version(),
                     QKV_VERSION_MAJOR * 10000 + QKV_VERSION_MINOR * 100 + QKV_VERSION_PATCH);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(abi_sizes_are_pinned),
        cmocka_unit_test(abi_numbers_are_pinned),
        cmocka_unit_test(abi_version_is_the_headers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
