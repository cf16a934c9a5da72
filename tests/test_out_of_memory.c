/* test_out_of_memory.c - every allocation of every call fails in turn: a status, no object, no leak, and
 * the same call works afterwards.
 * SPDX-License-Identifier: Apache-2.0 */
#include <fcntl.h>
#include <glob.h>
#include <limits.h>
#include <sys/wait.h>
#include <unistd.h>

#include "folder.h"
#include "heap.h"

/* ---- one call, each of its allocations failing ------------------------------------------------ */

typedef struct attempt {
    const char *why;
    account memory;
    qkv_context_options options;
    qkv_context *ctx; /* NULL: what is attempted is to create it */
    attn_case a;
    qkv_workspace *workspace;
    void *out; /* what the call made */
} attempt;

static qkv_status try_once(attempt *t)
{
    t->out = t; /* no object, but not NULL */
    if (!t->ctx) return qkv_context_create(&t->options, (qkv_context **)&t->out);
    return qkv_attention_create(t->ctx, &t->a.config.spec, &t->a.limits, t->workspace,
                                (qkv_attention **)&t->out);
}

static void undo(attempt *t)
{
    if (t->ctx)
        qkv_attention_destroy(t->out);
    else
        qkv_context_destroy(t->out);
}

/* All from the n-th on fail, or the n-th alone. Returns how many points there are. */
static long fail_each(attempt *t, bool and_all_after)
{
    const long blocks = t->memory.num_blocks;
    for (long n = 1;; n++) {
        const long live = heap_state.num_live;
        heap_arm(n, and_all_after ? LONG_MAX : n + 1);
        const qkv_status status = try_once(t);
        const bool hit = heap_disarm();
        if (status == QKV_OK) undo(t);
        if (!hit) {
            EXPECT_OK(status);
            return n - 1;
        }
        if (status == QKV_OK || (status != QKV_ERR_MEMORY && status != QKV_ERR_DEVICE) ||
            !qkv_last_error()[0] || t->out)
            fail_msg("%s, allocation %ld: got %s: %s, object %p", t->why, n,
                     qkv_status_name(status), qkv_last_error(), t->out);
        if (t->memory.num_blocks != blocks || t->memory.num_wrong || heap_state.num_live != live)
            fail_msg("%s, allocation %ld: %ld blocks are left of the context's, %ld of the "
                     "C library's; %ld were freed with a wrong size",
                     t->why, n, t->memory.num_blocks - blocks, heap_state.num_live - live,
                     t->memory.num_wrong);
        EXPECT_OK(try_once(t));
        undo(t);
    }
}

static void fail_all(attempt *t, long at_least)
{
    EXPECT_OK(try_once(t)); /* what is kept for the process's life, and thread stacks */
    undo(t);
    for (int all = 0; all < 2; all++) {
        const long points = fail_each(t, all);
        if (points < at_least)
            fail_msg("%s: expected %ld allocations or more, got %ld", t->why, at_least, points);
    }
    assert_int_equal(t->memory.num_wrong, 0);
}

/* ---- contexts ------------------------------------------------------------------------------- */

static void run_in_turn(void *user, int32_t num_tasks, void (*task)(void *arg, int32_t index),
                        void *arg)
{
    (void)user;
    for (int32_t i = 0; i < num_tasks; i++) task(arg, i);
}

static void out_of_memory_leaves_no_half_context(void **state)
{
    (void)state;
    static attempt rows[] = {
        {.why = "one thread", .options = {QKV_CONTEXT_OPTIONS_INIT, .num_threads = 1}},
        {.why = "some threads", .options = {QKV_CONTEXT_OPTIONS_INIT, .num_threads = 5}},
        {.why = "as many threads as CPUs", .options = {QKV_CONTEXT_OPTIONS_INIT}},
        {.why = "the engine's threads",
         .options = {QKV_CONTEXT_OPTIONS_INIT, .parallel = {.run = run_in_turn, .num_threads = 4}}},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        attempt *t = &rows[i];
        t->memory = (account){ACCOUNT_INIT};
        t->options.allocator = account_allocator(&t->memory);
        fail_all(t, 3);
        assert_int_equal(t->memory.num_blocks, 0);
    }
    static attempt plain = {.why = "the C library's allocator",
                            .options = {QKV_CONTEXT_OPTIONS_INIT, .num_threads = 3}};
    fail_all(&plain, HEAP_COUNTS_MALLOC ? 3 : 0);
}

/* ---- operators ------------------------------------------------------------------------------ */

/* Everything that takes a part of the workspace, in three specs. */
static void build_operator(attn_case *a, int kind)
{
    qkv_attention_spec s = case_spec(6, 2, 64, 16);
    s.flags = QKV_ATTENTION_HAS_SINK;
    s.features = QKV_FEATURE_ROPE;
    if (kind == 1) s.mask = QKV_MASK_CUSTOM;
    if (kind == 2) s.flags |= QKV_ATTENTION_BATCH_INVARIANT;
    case_config c = case_config_init(s);
    c.limits.max_workers = 5;
    c.limits.max_levels = kind == 1 ? 3 : 1;
    c.limits.max_row_blocks = kind == 1 ? 64 : 0;
    case_add(&c, 1, 5000);
    case_add(&c, 30, 300);
    case_build(a, &c);
}

/* The operator computes, while nothing at all can be allocated. */
static void expect_works_without_memory(attempt *t)
{
    EXPECT_OK(try_once(t));
    heap_arm(1, LONG_MAX);
    qkv_status status = qkv_attention_warm_up(t->ctx, &t->a.config.spec, &t->a.limits);
    for (int i = 0; i < 2 && status == QKV_OK; i++)
        status = qkv_attention_plan(t->out, &t->a.batch, NULL);
    if (status == QKV_OK) status = qkv_attention_run(t->out, &t->a.io, NULL);
    heap_disarm();
    EXPECT_OK(status);
    case_collect(&t->a);
    case_check(&t->a, qkv_context_device_name(t->ctx));
    undo(t);
}

static void out_of_memory_leaves_no_half_operator(void **state)
{
    (void)state;
    static attempt t;
    t.memory = (account){ACCOUNT_INIT};
    EXPECT_OK(qkv_context_create(&(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .num_threads = 3,
                                                        .allocator = account_allocator(&t.memory)},
                                 &t.ctx));
    for (int kind = 0; kind < 6; kind++) {
        const char *const names[] = {"plain", "levels, blocks and masks", "batch invariant"};
        t.why = names[kind % 3];
        build_operator(&t.a, kind % 3);
        case_op guarded = case_op_new(t.ctx, &t.a);
        t.workspace = kind < 3 ? NULL : &guarded.workspace;
        fail_all(&t, kind < 3 ? 3 : 1);
        expect_works_without_memory(&t);
        case_op_free(&guarded);
        case_free(&t.a);
    }
    qkv_context_destroy(t.ctx);
    assert_int_equal(t.memory.num_blocks, 0);
    assert_int_equal(t.memory.num_wrong, 0);
}

/* ---- other calls ----------------------------------------------------------------------------- */

static void out_of_memory_does_not_matter_to_stateless_calls(void **state)
{
    (void)state;
    enum { ROWS = 40, SIZE = 64 };
    static float x[ROWS * SIZE], w[SIZE * SIZE], out[ROWS * SIZE], weight[SIZE];
    int32_t tokens[ROWS];
    for (int i = 0; i < ROWS * SIZE; i++) x[i] = (float)test_uniform(1);
    DLTensor *tx = TENSOR(x, QKV_F32, ROWS, SIZE), *to = TENSOR(out, QKV_F32, ROWS, SIZE);
    DLTensor *tw = TENSOR(w, QKV_F32, SIZE, SIZE), *tn = TENSOR(weight, QKV_F32, SIZE);
    DLTensor *tt = TENSOR(tokens, QKV_I32, ROWS);
    uint64_t seeds[ROWS] = {0};
    const qkv_sampling_params sampling = {QKV_SAMPLING_PARAMS_INIT,
                                          .seed = TENSOR(seeds, QKV_U64, ROWS)};
    qkv_context *ctx;
    EXPECT_OK(qkv_context_create(&(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .num_threads = 3},
                                 &ctx));
    const struct {
        const char *call;
        qkv_status status;
    } calls[] = {
        {"nothing", (heap_arm(1, LONG_MAX), QKV_OK)},
        {"gemm", qkv_gemm(ctx, to, tx, tw, NULL)},
        {"rmsnorm", qkv_rmsnorm(ctx, to, tx, tn, 1e-5f, 0, NULL)},
        {"gated", qkv_gated_activation(ctx, to, tx, tx, 0, NULL)},
        {"argmax", qkv_argmax(ctx, tt, tx, NULL)},
        {"sample", qkv_sample(ctx, tt, tx, &sampling, NULL)},
        {"top_k", qkv_top_k(ctx, NULL, TENSOR(tokens, QKV_I32, ROWS, 1), tx, 1, NULL)},
        {"log_probs", qkv_log_probs(ctx, TENSOR(out, QKV_F32, ROWS, 1), NULL, tx,
                                    TENSOR(tokens, QKV_I32, ROWS, 1), NULL)},
    };
    const bool hit = heap_disarm();
    assert_false(hit);
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (calls[i].status != QKV_OK)
            fail_msg("%s: got %s", calls[i].call, qkv_status_name(calls[i].status));
    qkv_context_destroy(ctx);
}

/* ---- compiled kernels ------------------------------------------------------------------------- */

/* A kernel stays loaded for the life of a process, so each fault has a process of its own. */
enum { DIM = 8, NO_FAULT = 0, GOOD = 1, BAD = 2 };

static char folder[256], cache[300], script[300], kernel[300];

static const qkv_variant doubled = {
    QKV_VARIANT_INIT, .name = "doubled",
    .source = "#define VARIANT_OUTPUT 1\n"
              "QI_FN float variant_output(const variant_params *v, qi_pos pos, int dim, float o)\n"
              "{\n"
              "    (void)v, (void)pos, (void)dim;\n"
              "    return o * 2.f;\n"
              "}\n"};

static qkv_context *context_for(int32_t policy, const char *compiler, const char *cache_dir)
{
    int32_t usable;
    const char *level = NULL, *name;
    for (int32_t i = 0; (name = qkv_cpu_level(i, &usable)); i++)
        if (usable) level = name; /* the plainest, which compiles fastest */
    qkv_context *ctx;
    EXPECT_OK(qkv_context_create(
        &(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .isa = level, .num_threads = 1,
                               .jit_policy = policy, .compiler = compiler, .cache_dir = cache_dir},
        &ctx));
    return ctx;
}

static qkv_status create_doubled(qkv_context *ctx, qkv_attention **op)
{
    qkv_attention_spec spec = case_spec(1, 1, DIM, 0);
    spec.variant = &doubled;
    const qkv_attention_limits limits = {QKV_ATTENTION_LIMITS_INIT, .max_requests = 1,
                                         .max_tokens = 1, .max_kv_len = 1};
    *op = (qkv_attention *)ctx;
    return qkv_attention_create(ctx, &spec, &limits, NULL, op);
}

/* One row, one key, values 1: the output is 2. */
static bool computes(qkv_attention *op)
{
    float q[DIM] = {0}, k[DIM] = {0}, v[DIM], o[DIM] = {0};
    int32_t indptr[] = {0, 1};
    for (int d = 0; d < DIM; d++) v[d] = 1;
    const qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(indptr, QKV_I32, 2),
                                .kv_indptr = TENSOR(indptr, QKV_I32, 2)};
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1, .levels = &index};
    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT, .q = TENSOR(q, QKV_F32, 1, 1, DIM),
                                 .k = TENSOR(k, QKV_F32, 1, 1, DIM),
                                 .v = TENSOR(v, QKV_F32, 1, 1, DIM),
                                 .o = TENSOR(o, QKV_F32, 1, 1, DIM)};
    return qkv_attention_plan(op, &batch, NULL) == QKV_OK &&
           qkv_attention_run(op, &io, NULL) == QKV_OK && o[0] == 2 && o[DIM - 1] == 2;
}

static int num_open_files(void)
{
    int n = 0;
    for (int fd = 0; fd < 1000; fd++) n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

/* In a child: the n-th allocation of create fails; then all is well again. */
static int child(int32_t policy, const char *compiler, const char *cache_dir, long n)
{
    qkv_attention *op;
    qkv_context *ctx = context_for(policy, compiler, cache_dir);
    const int files = num_open_files();
    heap_arm(n, n + 1);
    const qkv_status status = create_doubled(ctx, &op);
    const bool hit = heap_disarm();
    if (status == QKV_OK) { /* the library, or the loader, knows another way */
        if (!computes(op)) return BAD;
        qkv_attention_destroy(op);
        qkv_context_destroy(ctx);
        return hit ? GOOD : NO_FAULT;
    }
    if (!hit || op || (status != QKV_ERR_MEMORY && status != QKV_ERR_COMPILE)) {
        fprintf(stderr, "%s: %s\n", qkv_status_name(status), qkv_last_error());
        return BAD;
    }
    if (create_doubled(ctx, &op) != QKV_OK || !computes(op)) {
        fprintf(stderr, "afterwards: %s\n", qkv_last_error());
        return BAD;
    }
    if (num_open_files() != files + 1) { /* that of the loaded kernel */
        fprintf(stderr, "files are left open\n");
        return BAD;
    }
    return GOOD;
}

static int in_child(int32_t policy, const char *compiler, const char *cache_dir, long n)
{
    fflush(NULL);
    const pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        alarm(60);
        _exit(child(policy, compiler, cache_dir, n));
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : BAD;
}

/* Compiles once, for the cache; and makes of that a compiler that takes no time. */
static int prepare(void **state)
{
    (void)state;
    folder_new(folder);
    if (setenv("TMPDIR", folder, 1) != 0) return -1;
    snprintf(cache, sizeof cache, "%s/cache", folder);
    snprintf(script, sizeof script, "%s/cc", folder);
    snprintf(kernel, sizeof kernel, "%s/kernel.so", folder);
    if (in_child(QKV_JIT_ALLOW, NULL, cache, LONG_MAX - 1) != NO_FAULT) return -1;
    char command[2048];
    snprintf(command, sizeof command,
             "for f in %s/*; do tail -c +153 $f >%s; done\n" /* behind the entry's header */
             "printf '#!/bin/sh\\nwhile [ $1 != -o ]; do shift; done\\nexec cp %s $2\\n' >%s\n"
             "chmod +x %s",
             cache, kernel, kernel, script, script);
    return system(command);
}

static int clean_up(void **state)
{
    (void)state;
    char command[2048];
    snprintf(command, sizeof command, "rm -r %s %s %s && rmdir %s", cache, script, kernel, folder);
    return system(command); /* fails if a compilation left its folder */
}

static void fail_each_of_a_variant(int32_t policy, const char *compiler, const char *cache_dir)
{
    long n = 1;
    for (int result = GOOD; result != NO_FAULT; n++) {
        result = in_child(policy, compiler, cache_dir, n);
        if (result == BAD) fail_msg("policy %d, allocation %ld", (int)policy, n);
    }
    assert_true(n > (HEAP_COUNTS_MALLOC ? 7 : 2)); /* a memory file at least */
}

/* Of the compiler's key, and of the one without a compiler. */
static size_t num_entries(void)
{
    char pattern[sizeof cache + 2];
    glob_t found;
    snprintf(pattern, sizeof pattern, "%s/*", cache);
    const size_t n = glob(pattern, 0, NULL, &found) == 0 ? found.gl_pathc : 0;
    globfree(&found);
    return n;
}

static void out_of_memory_spoils_no_cached_kernel(void **state)
{
    (void)state;
    assert_int_equal(num_entries(), 2);
    fail_each_of_a_variant(QKV_JIT_CACHED, NULL, cache);
    assert_int_equal(num_entries(), 2);
}

static void out_of_memory_spoils_no_compilation(void **state)
{
    (void)state;
    fail_each_of_a_variant(QKV_JIT_ALLOW, script, "");
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(out_of_memory_leaves_no_half_context),
        cmocka_unit_test(out_of_memory_leaves_no_half_operator),
        cmocka_unit_test(out_of_memory_does_not_matter_to_stateless_calls),
        cmocka_unit_test(out_of_memory_spoils_no_cached_kernel),
        cmocka_unit_test(out_of_memory_spoils_no_compilation),
    };
    return cmocka_run_group_tests_name("out_of_memory", tests, prepare, clean_up);
}
