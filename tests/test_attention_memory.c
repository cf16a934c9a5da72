/* test_attention_memory.c - who allocates what: exact workspaces, and no allocation in plan and
 * run.
 * SPDX-License-Identifier: Apache-2.0 */
#include "heap.h"

static qkv_context *context_of(account *a, int32_t num_threads)
{
    qkv_context *ctx;
    EXPECT_OK(
        qkv_context_create(&(qkv_context_options){TEST_CONTEXT_INIT, .num_threads = num_threads,
                                                  .allocator = account_allocator(a)},
                           &ctx));
    return ctx;
}

/* A batch that is split: decode, append and prefill. */
static void build_mixed(attn_case *a)
{
    qkv_attention_spec s = case_spec(6, 2, 64, 16);
    case_config c = case_config_init(s);
    c.limits.max_workers = 5;
    case_add(&c, 1, 7000);
    case_add(&c, 4, 900);
    case_add(&c, 60, 300);
    case_build(a, &c);
}

static void attention_allocates_in_create_alone(void **state)
{
    (void)state;
    account heap = {ACCOUNT_INIT};
    attn_case a;
    build_mixed(&a);
    qkv_context *ctx = context_of(&heap, 3);
    const long blocks = heap.num_blocks;
    const size_t bytes = heap.num_bytes;

    const long before_size = heap.num_calls;
    qkv_workspace_size size;
    EXPECT_OK(qkv_attention_workspace_size(ctx, &a.config.spec, &a.limits, &size));
    assert_int_equal(heap.num_calls, before_size);

    qkv_attention *op;
    EXPECT_OK(qkv_attention_create(ctx, &a.config.spec, &a.limits, NULL, &op));
    assert_true(heap.num_bytes >= bytes + size.plan_bytes + size.scratch_bytes);
    const long calls = heap.num_calls, allocs = heap_num_allocs;
    assert_true(!HEAP_COUNTS_MALLOC || allocs > 0);
    qkv_status status = QKV_OK;
    for (int i = 0; i < 4; i++) { /* the first time as the others */
        if (status == QKV_OK) status = qkv_attention_plan(op, &a.batch, NULL);
        for (int layer = 0; layer < 3; layer++)
            if (status == QKV_OK) status = qkv_attention_run(op, &a.io, NULL);
    }
    const long allocs_after = heap_num_allocs;
    EXPECT_OK(status);
    assert_int_equal(heap.num_calls, calls);
    assert_int_equal(allocs_after, allocs);

    qkv_attention_destroy(op);
    assert_int_equal(heap.num_blocks, blocks);
    assert_int_equal(heap.num_bytes, bytes);
    qkv_context_destroy(ctx);
    assert_int_equal(heap.num_blocks, 0);
    assert_int_equal(heap.num_bytes, 0);
    assert_int_equal(heap.num_wrong, 0);
    case_free(&a);
}

/* ---- workspaces --------------------------------------------------------------------------- */

/* That exact sizes do, with guards intact, every other attention test shows by case_op_new. */
static void attention_refuses_a_workspace_too_small(void **state)
{
    (void)state;
    attn_case a;
    build_mixed(&a);
    qkv_context *ctx = context_of(&(account){ACCOUNT_INIT}, 2);
    case_op op = case_op_new(ctx, &a);
    const qkv_workspace exact = op.workspace;
    assert_true(exact.plan_bytes > 0 && exact.scratch_bytes > 0);
    qkv_workspace w = exact;
    qkv_attention *other;
    w.plan_bytes--;
    EXPECT_FAIL(QKV_ERR_MEMORY, "plan",
                qkv_attention_create(ctx, &a.config.spec, &a.limits, &w, &other));
    assert_null(other);
    w = exact;
    w.scratch_bytes--;
    EXPECT_FAIL(QKV_ERR_MEMORY, "scratch",
                qkv_attention_create(ctx, &a.config.spec, &a.limits, &w, &other));
    w = exact;
    w.plan = (char *)w.plan + 32;
    EXPECT_FAIL(QKV_ERR_INVALID, "plan",
                qkv_attention_create(ctx, &a.config.spec, &a.limits, &w, &other));
    w = exact;
    w.scratch = (char *)w.scratch + 16;
    EXPECT_FAIL(QKV_ERR_INVALID, "scratch",
                qkv_attention_create(ctx, &a.config.spec, &a.limits, &w, &other));
    w = exact;
    w.plan = NULL;
    EXPECT_FAIL(QKV_ERR_INVALID, "plan",
                qkv_attention_create(ctx, &a.config.spec, &a.limits, &w, &other));
    w = exact;
    w.struct_size = 0;
    EXPECT_FAIL(QKV_ERR_INVALID, "struct_size",
                qkv_attention_create(ctx, &a.config.spec, &a.limits, &w, &other));
    case_op_free(&op);
    qkv_context_destroy(ctx);
    case_free(&a);
}

static void attention_shares_scratch_between_operators(void **state)
{
    (void)state;
    enum { NUM_OPS = 3 };
    attn_case a[NUM_OPS];
    qkv_attention *ops[NUM_OPS];
    qkv_workspace w[NUM_OPS];
    qkv_context *ctx = context_of(&(account){ACCOUNT_INIT}, 2);
    uint64_t scratch_bytes = 0;
    for (int i = 0; i < NUM_OPS; i++) {
        const int32_t head_dims[NUM_OPS] = {64, 128, 40};
        case_config c = case_config_init(case_spec(8, i + 1 == 3 ? 4 : i + 1, head_dims[i], 16));
        c.limits.max_workers = 3 + 2 * i;
        case_add(&c, 1, 5000);
        case_add(&c, 3, 3000);
        case_build(&a[i], &c);
        qkv_workspace_size size;
        EXPECT_OK(qkv_attention_workspace_size(ctx, &c.spec, &a[i].limits, &size));
        w[i] = (qkv_workspace){QKV_WORKSPACE_INIT, .plan_bytes = size.plan_bytes,
                               .plan = case_guarded(size.plan_bytes)};
        if (size.scratch_bytes > scratch_bytes) scratch_bytes = size.scratch_bytes;
    }
    assert_true(scratch_bytes > 0);
    void *scratch = case_guarded(scratch_bytes);
    for (int i = 0; i < NUM_OPS; i++) {
        w[i].scratch = scratch;
        w[i].scratch_bytes = scratch_bytes;
        EXPECT_OK(qkv_attention_create(ctx, &a[i].config.spec, &a[i].limits, &w[i], &ops[i]));
        EXPECT_OK(qkv_attention_plan(ops[i], &a[i].batch, NULL));
    }
    for (int step = 0; step < 12; step++) {
        const int i = (int)test_below(NUM_OPS);
        if (test_below(3) == 0) memset(scratch, (int)test_below(256), (size_t)scratch_bytes);
        if (test_below(3) == 0) EXPECT_OK(qkv_attention_plan(ops[i], &a[i].batch, NULL));
        case_run(&a[i], ops[i]);
        case_check(&a[i], qkv_context_device_name(ctx));
    }
    for (int i = 0; i < NUM_OPS; i++) {
        case_guard_check(w[i].plan, w[i].plan_bytes, "plan");
        qkv_attention_destroy(ops[i]);
        free(w[i].plan);
        case_free(&a[i]);
    }
    case_guard_check(scratch, scratch_bytes, "scratch");
    free(scratch);
    qkv_context_destroy(ctx);
}

/* A larger limit never needs less memory, and the sizes are those of the limits alone. */
static void attention_workspace_grows_with_limits(void **state)
{
    (void)state;
    qkv_context *ctx = context_of(&(account){ACCOUNT_INIT}, 2);
    const qkv_attention_spec spec = case_spec(8, 2, 64, 16);
    const qkv_attention_limits base = {
        QKV_ATTENTION_LIMITS_INIT, .max_requests = 20, .max_tokens = 500, .max_qo_len = 100,
        .max_workers = 4,          .max_kv_len = 2000, .max_pages = 1000};
    qkv_workspace_size least, size;
    EXPECT_OK(qkv_attention_workspace_size(ctx, &spec, &base, &least));
    qkv_attention_limits more[] = {base, base, base, base, base, base};
    more[0].max_requests = 200;
    more[1].max_tokens = 50000;
    more[2].max_qo_len = 400;
    more[3].max_workers = 64;
    more[4].max_kv_len = 1000000;
    more[5].max_pages = 100000;
    for (size_t i = 0; i < sizeof more / sizeof *more; i++) {
        EXPECT_OK(qkv_attention_workspace_size(ctx, &spec, &more[i], &size));
        assert_true(size.plan_bytes >= least.plan_bytes);
        assert_true(size.scratch_bytes >= least.scratch_bytes);
        assert_int_equal(size.pinned_bytes, 0);
    }
    EXPECT_OK(qkv_attention_workspace_size(ctx, &spec, &base, &size));
    assert_memory_equal(&size, &least, sizeof size);
    qkv_context_destroy(ctx);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_allocates_in_create_alone),
        cmocka_unit_test(attention_refuses_a_workspace_too_small),
        cmocka_unit_test(attention_shares_scratch_between_operators),
        cmocka_unit_test(attention_workspace_grows_with_limits),
    };
    return cmocka_run_group_tests_name("attention_memory", tests, NULL, NULL);
}
