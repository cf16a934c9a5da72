/* test_cuda_graphs.c - every operator captured into a CUDA graph: a replay reads what the inputs hold by
 * then and gives the bits of an eager call; attention's replays follow new plans.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda_ops.h"

static qkv_context *ctx;
static void *stream;

static void every_operator_replays_on_new_contents(void **state)
{
    (void)state;
    ops s = ops_new(ctx, test_u64());
    ops_data *want = malloc(sizeof *want);
    assert_non_null(want);
    for (int i = 0; i < OPS_COUNT; i++) {
        ops_fill(s.d, test_u64());
        ops_data *before = malloc(sizeof *before);
        assert_non_null(before);
        memcpy(before, s.d, sizeof *before);
        capture_begin(stream);
        const qkv_status status = ops_list[i].call(&s, stream);
        void *graph = capture_end(stream);
        if (status != QKV_OK) fail_msg("%s: %s", ops_list[i].name, qkv_last_error());
        stream_wait(stream);
        ops_compare(ops_list[i].name, s.d, before); /* a capture computes nothing */
        free(before);
        for (int times = 0; times < 3; times++) {
            ops_expected(&s, i, test_u64() | 1, want);
            graph_replay(graph, stream);
            ops_compare(ops_list[i].name, s.d, want);
        }
        graph_free(graph);
    }
    free(want);
    ops_free(&s);
}

/* ---- a step of layers -------------------------------------------------------------------------- */

enum { LAYERS = 3 };

/* Layers with data of their own; all under one operator's plan. */
static void layers_fill(ops layers[LAYERS], uint64_t seed)
{
    for (int l = 0; l < LAYERS; l++) ops_fill(layers[l].d, seed + (uint64_t)l * 7919);
}

static void replays_follow_new_plans(void **state)
{
    (void)state;
    for (int which = 0; which < OPS_NUM_ATTENTION; which++) {
        ops layers[LAYERS], eager = {.ctx = ctx};
        ops_data *want = malloc(LAYERS * sizeof *want);
        assert_non_null(want);
        eager.attention[which] = ops_attention_new(ctx, which);
        for (int l = 0; l < LAYERS; l++) {
            layers[l] = (ops){.ctx = ctx, .d = malloc(sizeof *layers[l].d)};
            assert_non_null(layers[l].d);
            layers[l].attention[which] =
                l ? layers[0].attention[which] : ops_attention_new(ctx, which);
        }
        layers_fill(layers, test_u64());
        EXPECT_OK(ops_plan(&layers[0], which, test_u64(), stream));
        EXPECT_OK(ops_run(&layers[0], which, stream));

        capture_begin(stream);
        for (int l = 0; l < LAYERS; l++)
            assert_int_equal(ops_run(&layers[l], which, stream), QKV_OK);
        void *graph = capture_end(stream);
        for (int times = 0; times < 12; times++) {
            const uint64_t lengths = test_u64(), data = test_u64();
            layers_fill(layers, data);
            EXPECT_OK(ops_plan(&eager, which, lengths, NULL));
            for (int l = 0; l < LAYERS; l++) {
                eager.d = layers[l].d;
                EXPECT_OK(ops_run(&eager, which, NULL));
                memcpy(&want[l], layers[l].d, sizeof *want);
            }
            layers_fill(layers, data);
            EXPECT_OK(ops_plan(&layers[0], which, lengths, stream));
            graph_replay(graph, stream);
            for (int l = 0; l < LAYERS; l++)
                ops_compare(ops_list[OPS_COUNT - OPS_NUM_ATTENTION + which].name, layers[l].d,
                            &want[l]);
        }
        graph_free(graph);
        qkv_attention_destroy(layers[0].attention[which]);
        qkv_attention_destroy(eager.attention[which]);
        for (int l = 0; l < LAYERS; l++) free(layers[l].d);
        free(want);
    }
}

/* The plan in force, and the capture, go on as if nobody had asked. */
static void a_host_plan_under_capture_is_refused(void **state)
{
    (void)state;
    ops s = {.ctx = ctx, .d = malloc(sizeof *s.d)};
    ops_data *want = malloc(sizeof *want);
    assert_true(s.d && want);
    s.attention[OPS_MIXED] = ops_attention_new(ctx, OPS_MIXED);
    EXPECT_OK(ops_plan(&s, OPS_MIXED, 1, stream));
    ops_fill(s.d, 2);
    EXPECT_OK(ops_run(&s, OPS_MIXED, stream));
    memcpy(want, s.d, sizeof *want);

    capture_begin(stream);
    const qkv_status plan = ops_plan(&s, OPS_MIXED, 3, stream);
    const bool named = strstr(qkv_last_error(), "stream") && strstr(qkv_last_error(), "captured");
    const qkv_status run = ops_run(&s, OPS_MIXED, stream);
    void *graph = capture_end(stream);
    assert_int_equal(plan, QKV_ERR_INVALID);
    if (!named) fail_msg("got %s", qkv_last_error());
    assert_int_equal(run, QKV_OK);
    ops_fill(s.d, 2);
    graph_replay(graph, stream);
    ops_compare("after a refused plan", s.d, want);
    graph_free(graph);
    qkv_attention_destroy(s.attention[OPS_MIXED]);
    free(s.d), free(want);
}

static int open_all(void **state)
{
    (void)state;
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
    return 0;
}

int main(void)
{
    if (ops_skip()) return 0;
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_operator_replays_on_new_contents),
        cmocka_unit_test(replays_follow_new_plans),
        cmocka_unit_test(a_host_plan_under_capture_is_refused),
    };
    return cmocka_run_group_tests_name("cuda_graphs", tests, open_all, close_all);
}
