/* test_attention_spec_errors.c - every wrong field of a spec or of limits is refused by its name.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_errors.h"

static const qkv_attention_limits plain_limits = {QKV_ATTENTION_LIMITS_INIT, .max_requests = 4,
                                                  .max_tokens = 64, .max_kv_len = 256,
                                                  .max_pages = 64};

/* All three calls that take a spec say the same. */
static void expect_no_operator(const char *why, qkv_status status, const char *name,
                               const qkv_attention_spec *spec, const qkv_attention_limits *limits)
{
    qkv_workspace_size size = {1, 2, 3};
    expect_refusal(why, qkv_attention_workspace_size(ctx, spec, limits, &size), status, name);
    assert_true(size.plan_bytes == 1 && size.scratch_bytes == 2 && size.pinned_bytes == 3);
    expect_refusal(why, qkv_attention_can_run(ctx, spec, limits, NULL, 0), status, name);
    qkv_attention *op = (qkv_attention *)&size;
    expect_refusal(why, qkv_attention_create(ctx, spec, limits, NULL, &op), status, name);
    assert_null(op);
}

static void attention_names_the_wrong_field_of_a_spec(void **state)
{
    (void)state;
    enum { CAP = QKV_FEATURE_SOFT_CAP, WINDOW = QKV_FEATURE_WINDOW };
#define F(field) #field, offsetof(qkv_attention_spec, field)
    static const wrong_field rows[] = {
        {"no struct_size", F(struct_size), 'u', 0, 0},
        {"an unknown flag", F(flags), 'u', 16, 0},
        {"another", F(flags), 'u', 1 << 20, 0},
        {"no query heads", F(num_qo_heads), 'i', 0, 0},
        {"negative", F(num_qo_heads), 'i', -4, 0},
        {"not a multiple of the KV heads", F(num_qo_heads), 'i', 7, 0},
        {"fewer than the KV heads", F(num_qo_heads), 'i', 1, 0},
        {"no KV heads", F(num_kv_heads), 'i', 0, 0},
        {"negative", F(num_kv_heads), 'i', -2, 0},
        {"no dim", F(head_dim_qk), 'i', 0, 0},
        {"not a multiple of 8", F(head_dim_qk), 'i', 68, 0},
        {"too large", F(head_dim_qk), 'i', 520, 0},
        {"negative", F(head_dim_qk), 'i', -8, 0},
        {"no dim", F(head_dim_vo), 'i', 0, 0},
        {"not a multiple of 8", F(head_dim_vo), 'i', 4, 0},
        {"too large", F(head_dim_vo), 'i', 1024, 0},
        {"negative", F(head_dim_vo), 'i', -64, 0},
        {"negative", F(page_size), 'i', -1, 0},
        {"unknown layout", F(kv_layout), 'i', 2, 0},
        {"unknown layout", F(kv_layout), 'i', -1, 0},
        {"unknown mask", F(mask), 'i', 3, 0},
        {"unknown mask", F(mask), 'i', -1, 0},
        {"unknown feature", F(features), 'i', 16, 0},
        {"unknown feature", F(features), 'i', 1 << 30, 0},
        {"negative", F(sm_scale), 'f', -0.5, 0},
        {"not a number", F(sm_scale), 'f', NAN, 0},
        {"infinite", F(sm_scale), 'f', INFINITY, 0},
        {"a cap without the feature", F(logits_soft_cap), 'f', 30, 0},
        {"a window without the feature", F(window_left), 'i', 5, 0},
        {"a window without the feature", F(window_right), 'i', 5, 0},
        {"feature without a cap", F(logits_soft_cap), 'f', 0, CAP},
        {"negative", F(logits_soft_cap), 'f', -30, CAP},
        {"not a number", F(logits_soft_cap), 'f', NAN, CAP},
        {"infinite", F(logits_soft_cap), 'f', INFINITY, CAP},
        {"below -1", F(window_left), 'i', -2, WINDOW},
        {"below -1", F(window_right), 'i', -100, WINDOW},
        {"rope feature without rope", "rope", offsetof(qkv_attention_spec, window_right), 'i', 0,
         QKV_FEATURE_ROPE},
    };
#undef F
    for (size_t i = 0; i < COUNT(rows); i++) {
        qkv_attention_spec s = case_spec(4, 2, 64, 16);
        s.features = rows[i].features;
        if (s.features & CAP) s.logits_soft_cap = 30;
        if (s.features & WINDOW) s.window_left = s.window_right = 5;
        set_field(&s, &rows[i]);
        expect_no_operator(rows[i].why, QKV_ERR_INVALID, rows[i].name, &s, &plain_limits);
    }
}

static void attention_names_the_wrong_dtype_of_a_spec(void **state)
{
    (void)state;
    const DLDataType wrong[] = {
        QKV_I32, QKV_U8, {kDLFloat, 64, 1}, {kDLFloat, 32, 2}, {kDLBfloat, 16, 0}, {0, 0, 0}};
    for (size_t i = 0; i < COUNT(wrong); i++) {
        qkv_attention_spec s[3];
        for (int j = 0; j < 3; j++) s[j] = case_spec(4, 2, 64, 16);
        s[0].dtype_q = s[1].dtype_kv = s[2].dtype_o = wrong[i];
        expect_no_operator("dtype", QKV_ERR_UNSUPPORTED, "dtype_q", &s[0], &plain_limits);
        expect_no_operator("dtype", QKV_ERR_UNSUPPORTED, "dtype_kv", &s[1], &plain_limits);
        expect_no_operator("dtype", QKV_ERR_UNSUPPORTED, "dtype_o", &s[2], &plain_limits);
    }
}

/* Fields that do not go together. */
static void attention_names_what_does_not_fit(void **state)
{
    (void)state;
    const qkv_rope_spec rope = {QKV_ROPE_SPEC_INIT}, odd = {QKV_ROPE_SPEC_INIT, .rotary_dim = 7};
    qkv_attention_spec s = case_spec(4, 2, 64, 16);
    s.rope = &rope;
    expect_no_operator("a rope without the feature", QKV_ERR_INVALID, "rope", &s, &plain_limits);
    s.features = QKV_FEATURE_ROPE;
    s.rope = &odd;
    expect_no_operator("an odd rotary_dim", QKV_ERR_INVALID, "rotary_dim", &s, &plain_limits);
    s = case_spec(4, 2, 64, 16);
    s.dtype_q = QKV_I8;
    expect_no_operator("i8 queries", QKV_ERR_UNSUPPORTED, "dtype_q", &s, &plain_limits);
    s = case_spec(4, 2, 64, 16);
    s.dtype_o = QKV_I8;
    expect_no_operator("i8 outputs", QKV_ERR_UNSUPPORTED, "dtype_o", &s, &plain_limits);
    s = case_spec(4, 2, 64, 16);
    s.flags = QKV_ATTENTION_BATCH_INVARIANT;
    qkv_attention_limits l = plain_limits;
    l.max_levels = 2;
    expect_no_operator("batch-invariant levels", QKV_ERR_INVALID, "max_levels", &s, &l);
}

static void attention_names_the_wrong_field_of_limits(void **state)
{
    (void)state;
#define F(field) #field, offsetof(qkv_attention_limits, field)
    static const wrong_field rows[] = {
        {"no struct_size", F(struct_size), 'u', 0, 0},
        {"no request", F(max_requests), 'i', 0, 0},
        {"negative", F(max_requests), 'i', -1, 0},
        {"no token", F(max_tokens), 'l', 0, 0},
        {"negative", F(max_tokens), 'l', -1, 0},
        {"past 2^30", F(max_tokens), 'l', 1073741825, 0},
        {"negative", F(max_qo_len), 'i', -1, 0},
        {"negative", F(max_workers), 'i', -1, 0},
        {"no key", F(max_kv_len), 'l', 0, 0},
        {"negative", F(max_kv_len), 'l', -1, 0},
        {"past 2^30", F(max_kv_len), 'l', 1073741825, 0},
        {"no page", F(max_pages), 'l', 0, 0},
        {"negative", F(max_pages), 'l', -1, 0},
        {"past 32-bit offsets", F(max_pages), 'l', 3e9, 0},
        {"negative", F(max_split_rows), 'l', -1, 0},
        {"negative", F(pool_pages), 'l', -1, 0},
        {"negative", F(max_levels), 'i', -1, 0},
        {"too deep", F(max_levels), 'i', 17, 0},
        {"negative", F(max_row_blocks), 'i', -1, 0},
    };
#undef F
    const qkv_attention_spec s = case_spec(4, 2, 64, 16);
    for (size_t i = 0; i < COUNT(rows); i++) {
        qkv_attention_limits l = plain_limits;
        set_field(&l, &rows[i]);
        expect_no_operator(rows[i].why, QKV_ERR_INVALID, rows[i].name, &s, &l);
    }
}

/* Sizes that no memory holds come out as errors or as they are, never wrapped around. */
static void attention_sizes_do_not_wrap(void **state)
{
    (void)state;
    const qkv_attention_spec s = case_spec(1 << 20, 1 << 20, 512, 16);
    for (int shift = 20; shift < 63; shift++) {
        qkv_attention_limits l = plain_limits;
        l.max_workers = shift < 31 ? 1 << shift : INT32_MAX;
        l.max_requests = shift < 31 ? 1 << shift : INT32_MAX;
        l.max_tokens = l.max_requests;
        l.max_pages = l.max_requests;
        l.max_split_rows = (int64_t)1 << shift;
        qkv_workspace_size size;
        const qkv_status status = qkv_attention_workspace_size(ctx, &s, &l, &size);
        if (status == QKV_OK)
            assert_true(size.plan_bytes > (uint64_t)l.max_requests &&
                        size.scratch_bytes / 2048 >= (uint64_t)1 << shift);
        else
            assert_true(status == QKV_ERR_INVALID || status == QKV_ERR_MEMORY);
    }
}

static void attention_refuses_null_and_newer_structs(void **state)
{
    (void)state;
    const qkv_attention_spec s = case_spec(4, 2, 64, 16);
    qkv_attention *op;
    qkv_workspace_size size;
    EXPECT_FAIL(QKV_ERR_INVALID, "ctx", qkv_attention_create(NULL, &s, &plain_limits, NULL, &op));
    EXPECT_FAIL(QKV_ERR_INVALID, "spec", qkv_attention_create(ctx, NULL, &plain_limits, NULL, &op));
    EXPECT_FAIL(QKV_ERR_INVALID, "limits", qkv_attention_create(ctx, &s, NULL, NULL, &op));
    EXPECT_FAIL(QKV_ERR_INVALID, "out", qkv_attention_create(ctx, &s, &plain_limits, NULL, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "ctx",
                qkv_attention_workspace_size(NULL, &s, &plain_limits, &size));
    EXPECT_FAIL(QKV_ERR_INVALID, "out", qkv_attention_workspace_size(ctx, &s, &plain_limits, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "attention", qkv_attention_plan(NULL, NULL, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "attention", qkv_attention_run(NULL, NULL, NULL));
    qkv_attention_destroy(NULL);

    struct {
        qkv_attention_spec known;
        int64_t newer;
    } tail = {.known = s};
    tail.known.struct_size = sizeof tail;
    EXPECT_OK(qkv_attention_workspace_size(ctx, &tail.known, &plain_limits, &size));
    tail.newer = 1;
    expect_no_operator("a newer field is set", QKV_ERR_INVALID, "spec", &tail.known, &plain_limits);
    struct {
        qkv_attention_limits known;
        int64_t newer;
    } limits = {.known = plain_limits, .newer = 1};
    limits.known.struct_size = sizeof limits;
    expect_no_operator("a newer field is set", QKV_ERR_INVALID, "limits", &s, &limits.known);
}

static void attention_can_run_lists_every_row(void **state)
{
    (void)state;
    const qkv_attention_spec s = case_spec(4, 2, 128, 16);
    char reasons[4096] = "", cut[12];
    EXPECT_OK(qkv_attention_can_run(ctx, &s, &plain_limits, reasons, sizeof reasons));
    if (!strstr(reasons, "attention.") || !strstr(reasons, "runs"))
        fail_msg("expected a line for each row and one that runs, got: %s", reasons);
    memset(cut, 'x', sizeof cut);
    EXPECT_OK(qkv_attention_can_run(ctx, &s, &plain_limits, cut, sizeof cut - 1));
    assert_int_equal(cut[sizeof cut - 2], 0);
    assert_int_equal(cut[sizeof cut - 1], 'x');
    assert_memory_equal(cut, reasons, sizeof cut - 2);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_names_the_wrong_field_of_a_spec),
        cmocka_unit_test(attention_names_the_wrong_dtype_of_a_spec),
        cmocka_unit_test(attention_names_what_does_not_fit),
        cmocka_unit_test(attention_names_the_wrong_field_of_limits),
        cmocka_unit_test(attention_sizes_do_not_wrap),
        cmocka_unit_test(attention_refuses_null_and_newer_structs),
        cmocka_unit_test(attention_can_run_lists_every_row),
    };
    return cmocka_run_group_tests_name("attention_spec_errors", tests, open_context, close_context);
}
