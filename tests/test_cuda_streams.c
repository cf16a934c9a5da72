/* test_cuda_streams.c - streams of every kind, several of them and several contexts at once, on one thread
 * and on two: each gives what it gives alone, though nothing is awaited in between.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_run.h"
#include "cuda_ops.h"

/* A step plans every attention operator anew and calls every operator on data of its own. */
typedef struct line {
    ops s;
    void *stream;
    uint64_t seed;
    int64_t num_steps;
    ops_data *data; /* [num_steps] */
    qkv_status status;
    char error[256];
} line;

static void line_fill(line *l)
{
    for (int64_t i = 0; i < l->num_steps; i++) ops_fill(&l->data[i], l->seed + (uint64_t)i);
}

static void line_open(line *l, qkv_context *ctx, void *stream, int64_t num_steps)
{
    *l = (line){.s = {.ctx = ctx}, .stream = stream, .seed = test_u64(), .num_steps = num_steps};
    for (int i = 0; i < OPS_NUM_ATTENTION; i++) l->s.attention[i] = ops_attention_new(ctx, i);
    l->data = calloc((size_t)num_steps, sizeof *l->data);
    assert_non_null(l->data);
    line_fill(l);
}

static void line_close(line *l)
{
    for (int i = 0; i < OPS_NUM_ATTENTION; i++) qkv_attention_destroy(l->s.attention[i]);
    free(l->data);
}

/* Only enqueues. */
static qkv_status line_step(line *l, int64_t step, void *stream)
{
    l->s.d = &l->data[step];
    for (int i = 0; i < OPS_NUM_ATTENTION && l->status == QKV_OK; i++)
        l->status = ops_plan(&l->s, i, l->seed ^ (uint64_t)(step * 8 + i + 1), stream);
    for (int i = 0; i < OPS_COUNT && l->status == QKV_OK; i++)
        l->status = ops_list[i].call(&l->s, stream);
    if (l->status != QKV_OK) snprintf(l->error, sizeof l->error, "%s", qkv_last_error());
    return l->status;
}

/* The results, against those of single steps on the legacy stream by other operators. */
static void line_check(line *l, const char *what)
{
    stream_wait(l->stream);
    if (l->status != QKV_OK) fail_msg("%s: %s", what, l->error);
    line alone = *l;
    alone.data = calloc((size_t)l->num_steps, sizeof *l->data);
    assert_non_null(alone.data);
    line_fill(&alone);
    for (int i = 0; i < OPS_NUM_ATTENTION; i++)
        alone.s.attention[i] = ops_attention_new(l->s.ctx, i);
    for (int64_t i = 0; i < l->num_steps; i++) {
        EXPECT_OK(line_step(&alone, i, NULL));
        ops_compare(what, &l->data[i], &alone.data[i]);
    }
    line_close(&alone);
}

/* Random cases of other tests are as many as there is time for; steps need memory, too. */
static int64_t num_steps(int64_t most)
{
    const int64_t n = case_count(most);
    return n < most ? n : most;
}

static qkv_context *context_new(void)
{
    qkv_context *ctx;
    EXPECT_OK(test_context_create(&ctx));
    return ctx;
}

/* ---- one stream --------------------------------------------------------------------------------- */

static void every_kind_of_stream_serves(void **state)
{
    (void)state;
    qkv_context *ctx = context_new();
    void *blocking = NULL, *apart = stream_new();
    DRIVER("cuStreamCreate", (void **, unsigned), &blocking, 0);
    const struct {
        const char *what;
        void *stream;
    } rows[] = {{"NULL", NULL},
                {"the legacy stream", LEGACY_STREAM},
                {"the thread's stream", PER_THREAD_STREAM},
                {"a stream", blocking},
                {"a stream that does not wait for the legacy one", apart}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        line l;
        line_open(&l, ctx, rows[i].stream, 3);
        for (int64_t step = 0; step < l.num_steps; step++) line_step(&l, step, l.stream);
        line_check(&l, rows[i].what);
        line_close(&l);
    }
    stream_free(blocking), stream_free(apart);
    qkv_context_destroy(ctx);
}

/* Faster than any copy or run ends: only the block of the plan before may be waited for. */
static void plans_follow_each_other_without_a_wait(void **state)
{
    (void)state;
    qkv_context *ctx = context_new();
    void *stream = stream_new();
    line l;
    line_open(&l, ctx, stream, num_steps(400));
    for (int64_t step = 0; step < l.num_steps; step++) {
        l.s.d = &l.data[step];
        for (int i = 0; i < OPS_NUM_ATTENTION && l.status == QKV_OK; i++) {
            l.status = ops_plan(&l.s, i, l.seed + (uint64_t)(step * 8 + i), stream);
            if (l.status == QKV_OK) l.status = ops_run(&l.s, i, stream);
        }
    }
    assert_int_equal(l.status, QKV_OK);
    stream_wait(stream);
    ops_data *got = malloc(sizeof *got);
    assert_non_null(got);
    for (int64_t step = 0; step < l.num_steps; step++) {
        l.s.d = &l.data[step];
        memcpy(got, l.s.d, sizeof *got);
        ops_fill(l.s.d, l.seed + (uint64_t)step);
        for (int i = 0; i < OPS_NUM_ATTENTION; i++) {
            EXPECT_OK(ops_plan(&l.s, i, l.seed + (uint64_t)(step * 8 + i), NULL));
            EXPECT_OK(ops_run(&l.s, i, NULL));
        }
        ops_compare("plans without a wait", got, l.s.d);
    }
    free(got);
    line_close(&l);
    stream_free(stream);
    qkv_context_destroy(ctx);
}

/* ---- two ------------------------------------------------------------------------------------------ */

/* of one context, or of two, each stream with its own operators */
static void alternate(qkv_context *a, qkv_context *b, const char *what)
{
    line l[2];
    line_open(&l[0], a, stream_new(), num_steps(64));
    line_open(&l[1], b, stream_new(), num_steps(64));
    for (int64_t step = 0; step < l[0].num_steps; step++)
        for (int i = 0; i < 2; i++) line_step(&l[i], step, l[i].stream);
    for (int i = 0; i < 2; i++) {
        line_check(&l[i], what);
        stream_free(l[i].stream);
        line_close(&l[i]);
    }
}

static void two_streams_do_not_disturb_each_other(void **state)
{
    (void)state;
    qkv_context *ctx = context_new();
    alternate(ctx, ctx, "two streams");
    qkv_context_destroy(ctx);
}

static void two_contexts_do_not_disturb_each_other(void **state)
{
    (void)state;
    qkv_context *a = context_new(), *b = context_new();
    alternate(a, b, "two contexts");
    qkv_context_destroy(a);
    line l;
    line_open(&l, b, PER_THREAD_STREAM, 2);
    for (int64_t step = 0; step < l.num_steps; step++) line_step(&l, step, l.stream);
    line_check(&l, "after another context is gone");
    line_close(&l);
    qkv_context_destroy(b);
}

/* A thread that never had a context of the driver's. */
static void *run_line(void *arg)
{
    line *l = arg;
    for (int64_t step = 0; step < l->num_steps; step++) line_step(l, step, l->stream);
    return NULL;
}

static void two_threads_share_a_context(void **state)
{
    (void)state;
    qkv_context *ctx = context_new(); /* whose kernels are all to be loaded yet, by both */
    line l[2];
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) line_open(&l[i], ctx, stream_new(), num_steps(64));
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, run_line, &l[i]), 0);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < 2; i++) {
        line_check(&l[i], "two threads");
        stream_free(l[i].stream);
        line_close(&l[i]);
    }
    qkv_context_destroy(ctx);
}

int main(void)
{
    if (ops_skip()) return 0;
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_kind_of_stream_serves),
        cmocka_unit_test(plans_follow_each_other_without_a_wait),
        cmocka_unit_test(two_streams_do_not_disturb_each_other),
        cmocka_unit_test(two_contexts_do_not_disturb_each_other),
        cmocka_unit_test(two_threads_share_a_context),
    };
    return cmocka_run_group_tests_name("cuda_streams", tests, NULL, NULL);
}
