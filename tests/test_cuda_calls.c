/* test_cuda_calls.c - what operators ask of the CUDA driver once their kernels are loaded: launches, the
 * current context, whether a stream is captured, and nothing else; and no memory of the host.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda_table.h"
#include "heap.h"

enum { TIMES = 3 };

static qkv_context *ctx;
static void *stream;

static const int allowed[] = {TABLE_launch,           TABLE_context_current,   TABLE_context_set,
                              TABLE_stream_capturing, TABLE_encode_tensor_map, -1};

static void operators_only_launch(void **state)
{
    (void)state;
    void *const streams[] = {NULL, stream};
    ops s = ops_new(ctx, test_u64());
    for (int i = 0; i < OPS_COUNT; i++)
        for (size_t on = 0; on < 2; on++) {
            table_zero();
            const long allocs = heap_num_allocs;
            for (int times = 0; times < TIMES; times++)
                if (ops_list[i].call(&s, streams[on]) != QKV_OK)
                    fail_msg("%s: %s", ops_list[i].name, qkv_last_error());
            const long allocated = heap_num_allocs - allocs;
            table_expect_only(ops_list[i].name, allowed);
            if (table_calls[TABLE_launch] != TIMES * ops_list[i].num_launches)
                fail_msg("%s: expected %d launches a call, got %d in %d calls", ops_list[i].name,
                         ops_list[i].num_launches, table_calls[TABLE_launch], (int)TIMES);
            /* The test is itself in the way: its context is current already. */
            assert_int_equal(table_calls[TABLE_context_set], 0);
            if (allocated) fail_msg("%s: allocates %ld times", ops_list[i].name, allocated);
        }
    assert_int_equal(test_synchronize(), 0);
    ops_free(&s);
}

/* The device is made current for the time of a call, on a thread that has another, or none. */
static void calls_leave_the_current_context(void **state)
{
    (void)state;
    ops s = ops_new(ctx, test_u64());
    cu_context mine = NULL, now = NULL;
    assert_int_equal(table_driver.context_current(&mine), CU_SUCCESS);
    assert_non_null(mine);
    for (int i = 0; i < OPS_COUNT; i++) {
        assert_int_equal(table_driver.context_set(NULL), CU_SUCCESS);
        table_zero();
        const qkv_status status = ops_list[i].call(&s, stream);
        assert_int_equal(table_driver.context_current(&now), CU_SUCCESS);
        assert_int_equal(table_driver.context_set(mine), CU_SUCCESS);
        if (status != QKV_OK) fail_msg("%s: %s", ops_list[i].name, qkv_last_error());
        assert_null(now);
        table_expect_only(ops_list[i].name, allowed);
        assert_true(table_calls[TABLE_context_set] <= 2 * ops_list[i].num_launches + 2);
    }
    assert_int_equal(test_synchronize(), 0);
    ops_free(&s);
}

/* A plan may copy and mark, and waits for its own block alone; it allocates nothing. */
static void plans_copy_and_mark(void **state)
{
    (void)state;
    static const int also[] = {TABLE_launch,
                               TABLE_context_current,
                               TABLE_context_set,
                               TABLE_stream_capturing,
                               TABLE_copy_async,
                               TABLE_event_record,
                               TABLE_event_synchronize,
                               TABLE_encode_tensor_map,
                               -1};
    ops s = ops_new(ctx, test_u64());
    for (int i = 0; i < OPS_NUM_ATTENTION; i++) {
        table_zero();
        const long allocs = heap_num_allocs;
        for (int times = 0; times < TIMES; times++)
            assert_int_equal(ops_plan(&s, i, test_u64(), stream), QKV_OK);
        assert_int_equal(heap_num_allocs - allocs, 0);
        table_expect_only("plan", also);
    }
    ops_free(&s);
}

/* What create takes, destroy gives back. */
static void nothing_is_left_behind(void **state)
{
    (void)state;
    ops warm = ops_new(ctx, test_u64());
    ops_free(&warm);
    table_zero();
    ops s = ops_new(ctx, test_u64());
    ops_free(&s);
    assert_int_equal(table_calls[TABLE_memory_alloc], table_calls[TABLE_memory_free]);
    assert_int_equal(table_calls[TABLE_host_alloc], table_calls[TABLE_host_free]);
    assert_int_equal(table_calls[TABLE_event_create], table_calls[TABLE_event_destroy]);
    assert_true(table_calls[TABLE_memory_alloc] > 0 && table_calls[TABLE_event_create] > 0);
    assert_int_equal(table_calls[TABLE_library_load], 0); /* modules are the process's */

    qkv_context *another;
    EXPECT_OK(test_context_create(&another));
    qkv_context_destroy(another);
    assert_int_equal(table_calls[TABLE_primary_retain], 1);
    assert_int_equal(table_calls[TABLE_primary_release], 1);
}

static int open_all(void **state)
{
    (void)state;
    table_interpose();
    table_allocs = &heap_num_allocs;
    if (test_context_create(&ctx) != QKV_OK) {
        printf("%s\n", qkv_last_error());
        return -1;
    }
    stream = stream_new();
    return 0;
}

static int close_all(void **state)
{
    (void)state;
    stream_free(stream);
    qkv_context_destroy(ctx);
    qi_cuda = table_driver;
    return 0;
}

int main(void)
{
    if (ops_skip()) return 0;
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(operators_only_launch),
        cmocka_unit_test(calls_leave_the_current_context),
        cmocka_unit_test(plans_copy_and_mark),
        cmocka_unit_test(nothing_is_left_behind),
    };
    return cmocka_run_group_tests_name("cuda_calls", tests, open_all, close_all);
}
