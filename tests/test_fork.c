/* test_fork.c - after fork(): the child is told that a context is its parent's, nothing hangs, and both
 * go on with contexts of their own.
 * SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attention_run.h"

/* ---- a child ------------------------------------------------------------------------------ */

/* Runs body in a child of fork(): 1 if it returned 1 within half a minute. The child writes to
 * standard error alone: cmocka and its buffers are the parent's. */
static bool in_child(int (*body)(void *arg), void *arg)
{
    fflush(NULL);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        alarm(30);
        _exit(body(arg) ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    if (WIFSIGNALED(status)) fprintf(stderr, "the child ended by signal %d\n", WTERMSIG(status));
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* 1 if the call fails and says that fork() is why. */
static int is_told(qkv_status status, const char *call)
{
    if (status == QKV_ERR_INVALID && strstr(qkv_last_error(), "fork()")) return 1;
    fprintf(stderr, "%s: got %s: %s\n", call, qkv_status_name(status), qkv_last_error());
    return 0;
}
#define IS_TOLD(expr) is_told((expr), #expr)

/* ---- an operator of the parent ------------------------------------------------------------- */

typedef struct layer {
    qkv_context *ctx;
    attn_case a;
    qkv_attention *op;
    void *expected; /* o */
} layer;

static void layer_open(layer *l, const qkv_context_options *options)
{
    EXPECT_OK(qkv_context_create(options, &l->ctx));
    case_config c = case_config_init(case_spec(4, 2, 40, 16));
    c.limits.max_workers = 5;
    case_add(&c, 1, 700);
    case_add(&c, 40, 90);
    case_build(&l->a, &c);
    EXPECT_OK(qkv_attention_create(l->ctx, &c.spec, &l->a.limits, NULL, &l->op));
    EXPECT_OK(qkv_attention_plan(l->op, &l->a.batch, NULL));
    case_run(&l->a, l->op);
    case_check(&l->a, qkv_context_device_name(l->ctx));
    l->expected = case_alloc(case_o_bytes(&l->a), 1);
    memcpy(l->expected, l->a.got_o, case_o_bytes(&l->a));
}

/* The operator computes what it did: o is contiguous, for case_spec's tensors are no views. */
static int still_works(layer *l, qkv_attention *op)
{
    memset(l->a.o.x.owned, 0xff, case_o_bytes(&l->a));
    return qkv_attention_plan(op, &l->a.batch, NULL) == QKV_OK &&
           qkv_attention_run(op, &l->a.io, NULL) == QKV_OK &&
           memcmp(l->a.o.x.owned, l->expected, case_o_bytes(&l->a)) == 0;
}

static void layer_close(layer *l)
{
    qkv_attention_destroy(l->op);
    qkv_context_destroy(l->ctx);
    free(l->expected);
    case_free(&l->a);
}

static int every_call_says_so(const layer *l)
{
    qkv_context *ctx = l->ctx;
    const qkv_attention_spec *spec = &l->a.config.spec;
    const qkv_attention_limits *limits = &l->a.limits;
    qkv_attention *op = (qkv_attention *)ctx;
    qkv_workspace_size size;
    char reasons[4];
    DLTensor *residual = TENSOR(NULL, QKV_F32, 1, 1);
    return IS_TOLD(qkv_attention_can_run(ctx, spec, limits, reasons, sizeof reasons)) &&
           IS_TOLD(qkv_attention_workspace_size(ctx, spec, limits, &size)) &&
           IS_TOLD(qkv_attention_warm_up(ctx, spec, limits)) &&
           IS_TOLD(qkv_attention_create(ctx, spec, limits, NULL, &op)) && !op &&
           IS_TOLD(qkv_attention_plan(l->op, &l->a.batch, NULL)) &&
           IS_TOLD(qkv_attention_run(l->op, &l->a.io, NULL)) &&
           IS_TOLD(qkv_attention_merge(ctx, NULL, NULL, NULL, NULL, 1, 0, NULL)) &&
           IS_TOLD(qkv_gemm(ctx, NULL, NULL, NULL, NULL)) &&
           IS_TOLD(qkv_rmsnorm(ctx, NULL, NULL, NULL, 1e-5f, 0, NULL)) &&
           IS_TOLD(qkv_add_rmsnorm(ctx, NULL, residual, NULL, NULL, 1e-5f, 0, NULL)) &&
           IS_TOLD(qkv_rope(ctx, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)) &&
           IS_TOLD(qkv_gated_activation(ctx, NULL, NULL, NULL, 0, NULL)) &&
           IS_TOLD(qkv_argmax(ctx, NULL, NULL, NULL)) &&
           IS_TOLD(qkv_sample(ctx, NULL, NULL, NULL, NULL)) &&
           IS_TOLD(qkv_top_k(ctx, NULL, NULL, NULL, 1, NULL)) &&
           IS_TOLD(qkv_log_probs(ctx, NULL, NULL, NULL, NULL, NULL)) &&
           IS_TOLD(qkv_verify(ctx, NULL, NULL)) &&
           IS_TOLD(qkv_kv_append(ctx, NULL, NULL, 0, NULL, NULL, NULL, NULL, NULL, NULL)) &&
           IS_TOLD(qkv_kv_append_slots(ctx, NULL, NULL, 0, NULL, NULL, NULL, NULL, NULL)) &&
           IS_TOLD(qkv_kv_copy_pages(ctx, NULL, NULL, NULL, NULL, NULL));
}

/* ---- what the child may do ----------------------------------------------------------------- */

static int is_refused(void *arg)
{
    return every_call_says_so(arg);
}

/* The child of a fork of a child. */
static int child_starts_anew(void *arg)
{
    layer *l = arg;
    const qkv_context_options options = {QKV_CONTEXT_OPTIONS_INIT, .num_threads = 3};
    if (!every_call_says_so(l)) return 0;
    const unsigned char *o = l->a.o.x.owned;
    for (size_t i = 0; i < case_o_bytes(&l->a); i++)
        if (o[i] != 0xff) return 0; /* the failed run wrote */
    qkv_attention_destroy(l->op);
    qkv_context_destroy(l->ctx);

    layer own = *l;
    if (qkv_context_create(&options, &own.ctx) != QKV_OK ||
        qkv_attention_create(own.ctx, &l->a.config.spec, &l->a.limits, NULL, &own.op) != QKV_OK ||
        !still_works(&own, own.op))
        return 0;
    if (!in_child(is_refused, &own)) return 0;
    return still_works(&own, own.op) && (layer_close(&own), 1);
}

/* An engine's run that has no threads at all. */
static void run_in_turn(void *user, int32_t num_tasks, void (*task)(void *arg, int32_t index),
                        void *arg)
{
    (void)user;
    for (int32_t i = 0; i < num_tasks; i++) task(arg, i);
}

static void fork_leaves_contexts_to_the_parent(void **state)
{
    (void)state;
    const struct {
        const char *why;
        qkv_context_options options;
    } rows[] = {
        {"no threads of its own", {QKV_CONTEXT_OPTIONS_INIT, .num_threads = 1}},
        {"a pool", {QKV_CONTEXT_OPTIONS_INIT, .num_threads = 3}},
        {"the engine's threads",
         {QKV_CONTEXT_OPTIONS_INIT, .parallel = {.run = run_in_turn, .num_threads = 3}}},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        layer l;
        layer_open(&l, &rows[i].options);
        for (int times = 0; times < 2; times++) {
            usleep(2000u * (unsigned)times); /* the pool polls, then sleeps */
            if (!in_child(child_starts_anew, &l)) fail_msg("%s: the child failed", rows[i].why);
            if (!still_works(&l, l.op)) fail_msg("%s: the parent failed", rows[i].why);
            memset(l.a.o.x.owned, 0xff, case_o_bytes(&l.a));
        }
        layer_close(&l);
    }
}

/* ---- while others are at work --------------------------------------------------------------- */

typedef struct busy {
    layer l;
    atomic_int stop, failed;
} busy;

static void *run_until_stopped(void *arg)
{
    busy *b = arg;
    while (!b->stop) b->failed |= !still_works(&b->l, b->l.op);
    return NULL;
}

/* Its locks may be held by a thread that is not here. */
static int child_gives_up(void *arg)
{
    layer *l = arg;
    if (!every_call_says_so(l)) return 0;
    qkv_attention_destroy(l->op);
    qkv_context_destroy(l->ctx);
    return 1;
}

static void fork_in_the_middle_of_a_launch_hangs_nobody(void **state)
{
    (void)state;
    static busy b;
    layer_open(&b.l, &(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .num_threads = 2});
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, run_until_stopped, &b), 0);
    int num_failed = 0;
    for (int i = 0; i < 20; i++) num_failed += !in_child(child_gives_up, &b.l);
    b.stop = 1;
    pthread_join(thread, NULL);
    assert_int_equal(num_failed, 0);
    assert_int_equal(b.failed, 0);
    layer_close(&b.l);
}

/* ---- while a kernel is compiled -------------------------------------------------------------- */

static const qkv_variant unloved = {QKV_VARIANT_INIT, .name = "unloved", .source = "#error no\n"};

typedef struct compilation {
    sem_t begun, go_on;
    qkv_status status;
} compilation;

static void wait_to_go_on(void *user, const char *kernel, double seconds)
{
    (void)kernel;
    compilation *c = user;
    if (seconds >= 0) return;
    sem_post(&c->begun);
    sem_wait(&c->go_on);
}

/* Its text does not compile: what matters is that somebody is at it. */
static qkv_status warm_up_unloved(compilation *c)
{
    const qkv_context_options options = {QKV_CONTEXT_OPTIONS_INIT, .num_threads = 1,
                                         .cache_dir = "", .jit_progress = c ? wait_to_go_on : NULL,
                                         .jit_user = c};
    qkv_attention_spec spec = case_spec(1, 1, 8, 16);
    spec.variant = &unloved;
    const qkv_attention_limits limits = {QKV_ATTENTION_LIMITS_INIT, .max_requests = 1,
                                         .max_tokens = 1, .max_kv_len = 1, .max_pages = 1};
    qkv_context *ctx;
    qkv_status status = qkv_context_create(&options, &ctx);
    if (status != QKV_OK) return status;
    status = qkv_attention_warm_up(ctx, &spec, &limits);
    qkv_context_destroy(ctx);
    return status;
}

static void *compile(void *arg)
{
    compilation *c = arg;
    c->status = warm_up_unloved(c);
    return NULL;
}

static int compiles_itself(void *arg)
{
    (void)arg;
    return warm_up_unloved(NULL) == QKV_ERR_COMPILE;
}

static void fork_in_the_middle_of_a_compilation_hangs_nobody(void **state)
{
    (void)state;
    compilation c = {.status = QKV_OK};
    sem_init(&c.begun, 0, 0);
    sem_init(&c.go_on, 0, 0);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, compile, &c), 0);
    sem_wait(&c.begun);
    const bool good = in_child(compiles_itself, NULL);
    sem_post(&c.go_on);
    pthread_join(thread, NULL);
    assert_true(good);
    assert_int_equal(c.status, QKV_ERR_COMPILE);
    sem_destroy(&c.begun);
    sem_destroy(&c.go_on);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fork_leaves_contexts_to_the_parent),
        cmocka_unit_test(fork_in_the_middle_of_a_launch_hangs_nobody),
        cmocka_unit_test(fork_in_the_middle_of_a_compilation_hangs_nobody),
    };
    return cmocka_run_group_tests_name("fork", tests, NULL, NULL);
}
