/* test_base.c - status, contexts, levels, threads.
 * SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#include "device/cpu.h"
#include "support.h"

static void run_backwards(void *user, int32_t num_tasks, void (*task)(void *, int32_t), void *arg)
{
    ++*(int *)user;
    for (int32_t i = num_tasks - 1; i >= 0; i--) task(arg, i);
}

static void context_opens_a_usable_level(void **state)
{
    (void)state;
    qkv_context *ctx;
    EXPECT_OK(qkv_context_create(NULL, &ctx));
    /* a usable level of the list; which one is fastest depends on the CPU's maker */
    int32_t usable, found = 0;
    const char *level;
    for (int32_t i = 0; (level = qkv_cpu_level(i, &usable)); i++)
        found += usable && strcmp(qkv_context_device_name(ctx) + 4, level) == 0;
    assert_int_equal(found, 1);
    assert_true(qkv_context_num_threads(ctx) > 0);
    qkv_context_destroy(ctx);
    qkv_context_destroy(NULL);
}

static void context_names_the_bad_option(void **state)
{
    (void)state;
    qkv_context *ctx = (qkv_context *)state;
    qkv_context_options o = {QKV_CONTEXT_OPTIONS_INIT, .isa = "sse9"};
    EXPECT_FAIL(QKV_ERR_UNSUPPORTED, "isa: expected a level", qkv_context_create(&o, &ctx));
    assert_null(ctx);
    o = (qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .num_threads = -1};
    EXPECT_FAIL(QKV_ERR_INVALID, "num_threads", qkv_context_create(&o, &ctx));
    o = (qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .num_threads = 4097};
    EXPECT_FAIL(QKV_ERR_INVALID, "num_threads: expected 1 to 4096, got 4097",
                qkv_context_create(&o, &ctx));
    assert_true(strncmp(qkv_last_error(), "num_threads", 11) == 0);
    o = (qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .parallel.run = run_backwards};
    EXPECT_FAIL(QKV_ERR_INVALID, "parallel.num_threads: expected 1 to 4096, got 0",
                qkv_context_create(&o, &ctx));
    o.parallel.num_threads = 1;
    o.parallel.reserved = -5;
    EXPECT_FAIL(QKV_ERR_INVALID, "parallel.reserved: expected 0, got -5",
                qkv_context_create(&o, &ctx));
    o = (qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .parallel.reserved = 1};
    EXPECT_FAIL(QKV_ERR_INVALID, "parallel.reserved: expected 0, got 1",
                qkv_context_create(&o, &ctx));
    o = (qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .device = {kDLCUDA, 0}};
    EXPECT_FAIL(QKV_ERR_UNSUPPORTED, "device", qkv_context_create(&o, &ctx));
    o = (qkv_context_options){.struct_size = 0};
    EXPECT_FAIL(QKV_ERR_INVALID, "struct_size", qkv_context_create(&o, &ctx));
    EXPECT_FAIL(QKV_ERR_INVALID, "out", qkv_context_create(NULL, NULL));
}

static void context_refuses_a_tail_it_does_not_know(void **state)
{
    (void)state;
    struct {
        qkv_context_options known;
        int64_t newer;
    } o = {.known = {.struct_size = sizeof o, .num_threads = 1}};
    qkv_context *ctx;
    EXPECT_OK(qkv_context_create(&o.known, &ctx));
    qkv_context_destroy(ctx);
    o.newer = 1;
    EXPECT_FAIL(QKV_ERR_INVALID, "does not know", qkv_context_create(&o.known, &ctx));
}

typedef struct counts {
    atomic_int runs[8];
    int32_t num_tasks;
} counts;

static void count_task(const void *arg, qi_task task)
{
    counts *c = (counts *)(uintptr_t)arg;
    assert_int_equal(task.count, c->num_tasks);
    /* all of its scratch once, then its ends: all of it each time takes minutes under TSan */
    char *scratch = task.scratch;
    if (atomic_fetch_add(&c->runs[task.index], 1) == 0)
        memset(scratch, task.index, QI_TASK_SCRATCH_BYTES);
    else
        scratch[0] = scratch[QI_TASK_SCRATCH_BYTES - 1] = (char)task.index;
}

static void *counted_alloc(void *user, size_t bytes, size_t alignment)
{
    ++*(int *)user;
    return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

static void counted_free(void *user, void *ptr, size_t bytes)
{
    (void)bytes;
    --*(int *)user;
    free(ptr);
}

static void parallel_runs_every_task_once(void **state)
{
    (void)state;
    int engine_calls = 0, blocks = 0;
    const qkv_allocator allocator = {.user = &blocks, .alloc = counted_alloc, .free = counted_free};
    const qkv_parallel pools[] = {
        {.run = NULL},
        {.run = run_backwards, .user = &engine_calls, .num_threads = 5},
    };
    for (size_t p = 0; p < 2; p++) {
        qi_threads *threads;
        EXPECT_OK(qi_threads_create(5, &pools[p], &allocator, &threads));
        for (int32_t n = 1; n <= 5; n++) {
            counts c = {.num_tasks = n};
            for (int i = 0; i < 2000; i++) qi_parallel(threads, n, count_task, &c);
            for (int32_t i = 0; i < 8; i++) assert_int_equal(c.runs[i], i < n ? 2000 : 0);
        }
        qi_threads_destroy(threads);
    }
    assert_int_equal(engine_calls, 4 * 2000); /* one task runs on the caller */
    assert_int_equal(blocks, 0);
}

static void parallel_wakes_threads_that_sleep(void **state)
{
    (void)state;
    int blocks = 0;
    const qkv_allocator allocator = {.user = &blocks, .alloc = counted_alloc, .free = counted_free};
    qi_threads *threads;
    EXPECT_OK(qi_threads_create(3, &(qkv_parallel){.run = NULL}, &allocator, &threads));
    for (int i = 0; i < 20; i++) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        counts c = {.num_tasks = 3};
        qi_parallel(threads, 3, count_task, &c);
        assert_int_equal(c.runs[0] + c.runs[1] + c.runs[2], 3);
    }
    qi_threads_destroy(threads);
}

/* Which signals the tasks of one launch would let through: signals[task]. */
static void read_mask(const void *arg, qi_task task)
{
    sigset_t *signals = (sigset_t *)(uintptr_t)arg;
    pthread_sigmask(SIG_BLOCK, NULL, &signals[task.index]);
}

/* An engine's handlers run on its own threads; a fault of a kernel still reaches a crash reporter. */
static void parallel_threads_take_no_signals(void **state)
{
    (void)state;
    int blocks = 0;
    const qkv_allocator allocator = {.user = &blocks, .alloc = counted_alloc, .free = counted_free};
    sigset_t before, after, signals[3];
    pthread_sigmask(SIG_BLOCK, NULL, &before);
    qi_threads *threads;
    EXPECT_OK(qi_threads_create(3, &(qkv_parallel){.run = NULL}, &allocator, &threads));
    qi_parallel(threads, 3, read_mask, signals);
    qi_threads_destroy(threads);
    pthread_sigmask(SIG_BLOCK, NULL, &after);
    for (int s = 1; s <= SIGRTMAX; s++) {
        assert_int_equal(sigismember(&after, s), sigismember(&before, s));
        assert_int_equal(sigismember(&signals[0], s), sigismember(&before, s));
        if (s == SIGKILL || s == SIGSTOP || (s >= 32 && s < SIGRTMIN)) continue; /* never blocked */
        const int fault = s == SIGSEGV || s == SIGBUS || s == SIGFPE || s == SIGILL;
        for (int task = 1; task < 3; task++)
            assert_int_equal(sigismember(&signals[task], s), !fault);
    }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(context_opens_a_usable_level),
        cmocka_unit_test(context_names_the_bad_option),
        cmocka_unit_test(context_refuses_a_tail_it_does_not_know),
        cmocka_unit_test(parallel_runs_every_task_once),
        cmocka_unit_test(parallel_wakes_threads_that_sleep),
        cmocka_unit_test(parallel_threads_take_no_signals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
