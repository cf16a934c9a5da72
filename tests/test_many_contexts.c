/* test_many_contexts.c - contexts with any number of threads, or with the engine's, side by side: shared by
 * several threads, each with operators of its own, every one gives the same bits. Also under TSan.
 * SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <stdatomic.h>

#include "attention_run.h"

/* ---- an engine's threads --------------------------------------------------------------------- */

enum { MAX_OS_THREADS = 8 };

/* So many threads take tasks from the highest down, whatever num_threads says. */
typedef struct engine {
    int num_os_threads;
    atomic_int wrong; /* launches of more tasks than may run at a time */
    atomic_long num_launches;
} engine;

typedef struct launch {
    atomic_int left;
    void (*task)(void *arg, int32_t index);
    void *arg;
} launch;

static void *take_tasks(void *arg)
{
    launch *l = arg;
    for (int i; (i = atomic_fetch_sub(&l->left, 1)) > 0;) l->task(l->arg, i - 1);
    return NULL;
}

enum { ENGINE_THREADS = 4 }; /* num_threads of every engine */

static void engine_run(void *user, int32_t num_tasks, void (*task)(void *arg, int32_t index),
                       void *arg)
{
    engine *e = user;
    pthread_t threads[MAX_OS_THREADS];
    launch l = {.task = task, .arg = arg};
    atomic_init(&l.left, num_tasks);
    e->wrong += num_tasks < 1 || num_tasks > ENGINE_THREADS;
    e->num_launches++;
    for (int i = 1; i < e->num_os_threads; i++)
        if (pthread_create(&threads[i], NULL, take_tasks, &l) != 0) abort();
    take_tasks(&l);
    for (int i = 1; i < e->num_os_threads; i++) pthread_join(threads[i], NULL);
}

/* ---- contexts -------------------------------------------------------------------------------- */

/* Thread counts, or the engine's OS threads where there is an engine. */
static const struct {
    const char *why;
    int32_t num_threads;
    int os_threads; /* of an engine; 0 = the library's pool */
} kinds[] = {
    {"one thread", 1, 0},
    {"two threads", 2, 0},
    {"more threads than most machines have cores", 67, 0},
    {"as many threads as there are CPUs", 0, 0},
    {"an engine that uses the caller alone", ENGINE_THREADS, 1},
    {"an engine of fewer OS threads than num_threads", ENGINE_THREADS, 2},
    {"an engine of more OS threads than num_threads", ENGINE_THREADS, 7},
};
enum { NUM_KINDS = sizeof kinds / sizeof *kinds };

static engine engines[NUM_KINDS];

static qkv_context *context_of_kind(int kind)
{
    qkv_context_options options = {QKV_CONTEXT_OPTIONS_INIT,
                                   .num_threads = kinds[kind].num_threads};
    if (kinds[kind].os_threads) {
        engines[kind].num_os_threads = kinds[kind].os_threads;
        options.num_threads = 0;
        options.parallel = (qkv_parallel){
            .user = &engines[kind], .run = engine_run, .num_threads = kinds[kind].num_threads};
    }
    qkv_context *ctx = NULL;
    return qkv_context_create(&options, &ctx) == QKV_OK ? ctx : NULL;
}

/* ---- a problem of every sort ------------------------------------------------------------------- */

enum { ROWS = 70, SIZE = 96, VOCAB = 500, LONG_ROWS = 2, LONG_VOCAB = 40000 };

/* Attention, a matrix product, a norm and sampling, with what they give. One thread's. */
typedef struct problem {
    attn_case a;
    float x[ROWS * SIZE], w[SIZE * SIZE], logits[ROWS * VOCAB];
    uint64_t seeds[ROWS];
    float product[ROWS * SIZE], normed[ROWS * SIZE];
    int32_t tokens[ROWS];
    float long_logits[LONG_ROWS * LONG_VOCAB]; /* rows that threads share */
    int32_t long_tokens[LONG_ROWS];
    void *expected_o;
    float expected_product[ROWS * SIZE], expected_normed[ROWS * SIZE];
    int32_t expected_tokens[ROWS], expected_long_tokens[LONG_ROWS];
} problem;

static qkv_status compute(problem *p, qkv_context *ctx, qkv_attention *op)
{
    const qkv_sampling_params sampling = {QKV_SAMPLING_PARAMS_INIT,
                                          .seed = TENSOR(p->seeds, QKV_U64, ROWS)};
    float top_p = 0.8f;
    const qkv_sampling_params long_sampling = {QKV_SAMPLING_PARAMS_INIT,
                                               .top_p = TENSOR(&top_p, QKV_F32, 1),
                                               .seed = TENSOR(p->seeds, QKV_U64, LONG_ROWS)};
    const DLTensor *x = TENSOR(p->x, QKV_F32, ROWS, SIZE);
    memset(p->a.o.x.owned, 0xff, case_o_bytes(&p->a));
    memset(p->product, 0xff, sizeof p->product);
    memset(p->normed, 0xff, sizeof p->normed);
    memset(p->tokens, 0xff, sizeof p->tokens);
    memset(p->long_tokens, 0xff, sizeof p->long_tokens);
    qkv_status status = qkv_attention_run(op, &p->a.io, NULL);
    if (status == QKV_OK)
        status = qkv_gemm(ctx, TENSOR(p->product, QKV_F32, ROWS, SIZE), x,
                          TENSOR(p->w, QKV_F32, SIZE, SIZE), NULL);
    if (status == QKV_OK)
        status = qkv_rmsnorm(ctx, TENSOR(p->normed, QKV_F32, ROWS, SIZE), x,
                             TENSOR(p->w, QKV_F32, SIZE), 1e-5f, 0, NULL);
    if (status == QKV_OK)
        status = qkv_sample(ctx, TENSOR(p->tokens, QKV_I32, ROWS),
                            TENSOR(p->logits, QKV_F32, ROWS, VOCAB), &sampling, NULL);
    if (status == QKV_OK)
        status = qkv_sample(ctx, TENSOR(p->long_tokens, QKV_I32, LONG_ROWS),
                            TENSOR(p->long_logits, QKV_F32, LONG_ROWS, LONG_VOCAB), &long_sampling,
                            NULL);
    return status;
}

static bool is_as_expected(const problem *p)
{
    return memcmp(p->a.o.x.owned, p->expected_o, case_o_bytes(&p->a)) == 0 &&
           memcmp(p->product, p->expected_product, sizeof p->product) == 0 &&
           memcmp(p->normed, p->expected_normed, sizeof p->normed) == 0 &&
           memcmp(p->tokens, p->expected_tokens, sizeof p->tokens) == 0 &&
           memcmp(p->long_tokens, p->expected_long_tokens, sizeof p->long_tokens) == 0;
}

static void fill(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) x[i] = (float)test_uniform(2);
}

/* o is contiguous: case_spec's tensors are no views. */
static void problem_init(problem *p, int32_t number, qkv_context *ctx)
{
    case_config c = case_config_init(case_spec(4, 1 + number % 2, number % 2 ? 64 : 40, 16));
    c.limits.max_workers = 3 + 5 * number; /* fewer and more than threads */
    case_add(&c, 1, 500 + 300 * number);
    case_add(&c, 30, 60);
    case_build(&p->a, &c);
    fill(p->x, ROWS * SIZE);
    fill(p->w, SIZE * SIZE);
    fill(p->logits, ROWS * VOCAB);
    fill(p->long_logits, LONG_ROWS * LONG_VOCAB);
    for (int i = 0; i < ROWS; i++) p->seeds[i] = test_u64();

    qkv_attention *op;
    EXPECT_OK(qkv_attention_create(ctx, &c.spec, &p->a.limits, NULL, &op));
    EXPECT_OK(qkv_attention_plan(op, &p->a.batch, NULL));
    EXPECT_OK(compute(p, ctx, op));
    p->expected_o = case_alloc(case_o_bytes(&p->a), 1);
    memcpy(p->expected_o, p->a.o.x.owned, case_o_bytes(&p->a));
    memcpy(p->expected_product, p->product, sizeof p->product);
    memcpy(p->expected_normed, p->normed, sizeof p->normed);
    memcpy(p->expected_tokens, p->tokens, sizeof p->tokens);
    memcpy(p->expected_long_tokens, p->long_tokens, sizeof p->long_tokens);
    case_collect(&p->a);
    case_check(&p->a, qkv_context_device_name(ctx)); /* other tests check the rest */
    qkv_attention_destroy(op);
}

static void problem_free(problem *p)
{
    free(p->expected_o);
    case_free(&p->a);
}

/* ---- threads that use them ---------------------------------------------------------------------- */

enum { NUM_WORKERS = 4, NUM_STEPS = CASE_SANITIZED ? 14 : 70 };

/* It judges nothing itself, for cmocka belongs to the main thread. */
typedef struct worker {
    int number;
    qkv_context **contexts; /* shared */
    problem p;
    qkv_status status;
    int num_different;
} worker;

/* A context that comes and goes while others compute. */
static qkv_status use_own_context(worker *w, int kind)
{
    qkv_context *ctx = context_of_kind(kind);
    qkv_attention *op = NULL;
    if (!ctx) return QKV_ERR_INTERNAL;
    qkv_status status = qkv_attention_create(ctx, &w->p.a.config.spec, &w->p.a.limits, NULL, &op);
    if (status == QKV_OK) status = qkv_attention_plan(op, &w->p.a.batch, NULL);
    if (status == QKV_OK) status = compute(&w->p, ctx, op);
    w->num_different += !is_as_expected(&w->p);
    qkv_attention_destroy(op);
    qkv_context_destroy(ctx);
    return status;
}

static void *work(void *arg)
{
    worker *w = arg;
    qkv_attention *ops[NUM_KINDS] = {NULL};
    for (int k = 0; k < NUM_KINDS && w->status == QKV_OK; k++) {
        w->status = qkv_attention_create(w->contexts[k], &w->p.a.config.spec, &w->p.a.limits, NULL,
                                         &ops[k]);
        if (w->status == QKV_OK) w->status = qkv_attention_plan(ops[k], &w->p.a.batch, NULL);
    }
    for (int step = 0; step < NUM_STEPS && w->status == QKV_OK; step++) {
        const int k = (step + step / NUM_KINDS * w->number + w->number) % NUM_KINDS;
        if (step % 3 == 0) w->status = qkv_attention_plan(ops[k], &w->p.a.batch, NULL);
        if (w->status == QKV_OK) w->status = compute(&w->p, w->contexts[k], ops[k]);
        w->num_different += !is_as_expected(&w->p);
        /* engines are not made here: they count for the main thread */
        if (step % 10 == w->number && w->status == QKV_OK)
            w->status = use_own_context(w, step / 10 % 2);
    }
    for (int k = 0; k < NUM_KINDS; k++) qkv_attention_destroy(ops[k]);
    return NULL;
}

static void many_contexts_give_the_same_bits(void **state)
{
    (void)state;
    static worker workers[NUM_WORKERS];
    qkv_context *contexts[NUM_KINDS];
    pthread_t threads[NUM_WORKERS];
    for (int k = 0; k < NUM_KINDS; k++) {
        contexts[k] = context_of_kind(k);
        if (!contexts[k]) fail_msg("%s: %s", kinds[k].why, qkv_last_error());
        const int32_t count = qkv_context_num_threads(contexts[k]);
        assert_true(kinds[k].num_threads ? count == kinds[k].num_threads : count >= 1);
    }
    for (int i = 0; i < NUM_WORKERS; i++) {
        workers[i].number = i;
        workers[i].contexts = contexts;
        problem_init(&workers[i].p, i, contexts[0]);
    }
    for (int i = 0; i < NUM_WORKERS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, work, &workers[i]), 0);
    for (int i = 0; i < NUM_WORKERS; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < NUM_WORKERS; i++) {
        assert_int_equal(workers[i].status, QKV_OK);
        assert_int_equal(workers[i].num_different, 0);
        problem_free(&workers[i].p);
    }
    for (int k = 0; k < NUM_KINDS; k++) {
        qkv_context_destroy(contexts[k]);
        assert_int_equal(engines[k].wrong, 0);
        assert_true(!kinds[k].os_threads || engines[k].num_launches > 0);
    }
}

/* One after the other: which kind is at fault is seen here. */
static void many_contexts_do_not_depend_on_threads(void **state)
{
    (void)state;
    static problem p;
    qkv_context *first = context_of_kind(0);
    assert_non_null(first);
    problem_init(&p, 3, first);
    for (int k = 0; k < NUM_KINDS; k++) {
        qkv_context *ctx = context_of_kind(k);
        qkv_attention *op;
        assert_non_null(ctx);
        EXPECT_OK(qkv_attention_create(ctx, &p.a.config.spec, &p.a.limits, NULL, &op));
        EXPECT_OK(qkv_attention_plan(op, &p.a.batch, NULL));
        for (int i = 0; i < 3; i++) {
            EXPECT_OK(compute(&p, ctx, op));
            if (!is_as_expected(&p)) fail_msg("%s: the result is another", kinds[k].why);
        }
        qkv_attention_destroy(op);
        qkv_context_destroy(ctx);
    }
    problem_free(&p);
    qkv_context_destroy(first);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(many_contexts_do_not_depend_on_threads),
        cmocka_unit_test(many_contexts_give_the_same_bits),
    };
    return cmocka_run_group_tests_name("many_contexts", tests, NULL, NULL);
}
