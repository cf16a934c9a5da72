/* test_attention_threads.c - one context, several threads, an operator each; also under TSan.
 * SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>

#include "attention_run.h"

enum { NUM_THREADS = 4, NUM_STEPS = CASE_SANITIZED ? 15 : 60 };

/* What one thread does; it judges nothing itself, for cmocka belongs to the main thread. */
typedef struct job {
    qkv_context *ctx;
    attn_case a;
    qkv_attention *op;
    void *expected_o;
    qkv_status status;
    int num_different, message_is_wrong;
} job;

static void *work(void *arg)
{
    job *j = arg;
    const size_t bytes = case_o_bytes(&j->a);
    qkv_attention_batch wrong = j->a.batch;
    wrong.num_levels = 0;
    for (int step = 0; step < NUM_STEPS && j->status == QKV_OK; step++) {
        if (step % 3 == 0) j->status = qkv_attention_plan(j->op, &j->a.batch, NULL);
        memset(j->a.o.x.owned, 0xff, bytes);
        if (j->status == QKV_OK) j->status = qkv_attention_run(j->op, &j->a.io, NULL);
        j->num_different += memcmp(j->a.o.x.owned, j->expected_o, bytes) != 0;
        /* the message is this thread's own */
        if (step % 5 == 0 && (qkv_attention_plan(j->op, &wrong, NULL) != QKV_ERR_INVALID ||
                              !strstr(qkv_last_error(), "levels")))
            j->message_is_wrong++;
        if (step % 20 == 19 && j->status == QKV_OK) { /* create and destroy meet runs of others */
            qkv_attention_destroy(j->op);
            j->status = qkv_attention_create(j->ctx, &j->a.config.spec, &j->a.limits, NULL, &j->op);
            if (j->status == QKV_OK) j->status = qkv_attention_plan(j->op, &j->a.batch, NULL);
        }
    }
    return NULL;
}

static void share_context(qkv_context *ctx, void *user)
{
    (void)user;
    static job jobs[NUM_THREADS];
    pthread_t threads[NUM_THREADS];
    for (int i = 0; i < NUM_THREADS; i++) {
        job *j = &jobs[i];
        *j = (job){.ctx = ctx};
        case_config c = case_config_init(case_spec(4, 1 + i % 2, i % 2 ? 64 : 40, 16));
        c.limits.max_workers = 2 + i;
        case_add(&c, 1, 700 + 300 * i);
        case_add(&c, 30, 60);
        case_build(&j->a, &c);
        EXPECT_OK(qkv_attention_create(ctx, &c.spec, &j->a.limits, NULL, &j->op));
        EXPECT_OK(qkv_attention_plan(j->op, &j->a.batch, NULL));
        case_run(&j->a, j->op);
        case_check(&j->a, qkv_context_device_name(ctx));
        /* o is contiguous: case_spec's tensors are no views */
        j->expected_o = case_alloc(case_o_bytes(&j->a), 1);
        memcpy(j->expected_o, j->a.got_o, case_o_bytes(&j->a));
    }
    for (int i = 0; i < NUM_THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, work, &jobs[i]), 0);
    for (int i = 0; i < NUM_THREADS; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < NUM_THREADS; i++) {
        assert_int_equal(jobs[i].status, QKV_OK);
        assert_int_equal(jobs[i].num_different, 0);
        assert_int_equal(jobs[i].message_is_wrong, 0);
        qkv_attention_destroy(jobs[i].op);
        free(jobs[i].expected_o);
        case_free(&jobs[i].a);
    }
}

static void attention_threads_share_a_context(void **state)
{
    (void)state;
    test_every_level(1, share_context, NULL);
    test_every_level(3, share_context, NULL);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_threads_share_a_context),
    };
    return cmocka_run_group_tests_name("attention_threads", tests, NULL, NULL);
}
