/* test_cuda_faults.c - what a GPU does to a program and what it hears of it: every call of the driver
 * failing in turn, a lost device, a kernel's fault, no driver, no such device, fork().
 * SPDX-License-Identifier: Apache-2.0 */
#include <limits.h>
#include <spawn.h>
#include <sys/wait.h>

#include "cuda_table.h"

extern char **environ;

enum { CONTEXT_IS_DESTROYED = 709, ILLEGAL_ADDRESS = 700, ECC_UNCORRECTABLE = 214 };

/* ---- one call fails -------------------------------------------------------------------------- */

/* Something that a program does; undo takes back a success. */
typedef struct action {
    const char *what;
    qkv_status (*run)(void);
    void (*undo)(void);
} action;

/* Whose failure is nobody's: what they would free is lost with the device, or the call has been made. */
static bool is_silent(int entry)
{
    return entry == TABLE_memory_free || entry == TABLE_host_free || entry == TABLE_event_destroy ||
           entry == TABLE_primary_release || entry == TABLE_library_unload ||
           entry == TABLE_context_set;
}

/* The driver's words. */
static const char *text_of(int result)
{
    const char *text = NULL;
    const int got = table_driver.error_string(result, &text);
    return got == CU_SUCCESS && text ? text : "";
}

static void expect_named(const char *what, int entry, int result, qkv_status status)
{
    const qkv_status want = result == CU_OUT_OF_MEMORY ? QKV_ERR_MEMORY : QKV_ERR_DEVICE;
    char number[32];
    snprintf(number, sizeof number, "error %d", result);
    const char *message = qkv_last_error();
    /* One name for both ways of making a context current. */
    const char *call = entry == TABLE_context_current ? "cuCtx" : table_names[entry];
    if (status != want || !strstr(message, call) || !strstr(message, number) ||
        !strstr(message, text_of(result)))
        fail_msg("%s, while %s gives %d: got %s: %s", what, table_names[entry], result,
                 qkv_status_name(status), message);
}

/* Every call that it makes fails once, by every result. Returns how many did. */
static int fail_each_call(const action *a)
{
    static const int results[] = {CU_OUT_OF_MEMORY, CONTEXT_IS_DESTROYED, ILLEGAL_ADDRESS,
                                  ECC_UNCORRECTABLE};
    int num_faults = 0;
    for (int entry = 0; entry < TABLE_COUNT; entry++)
        for (size_t r = 0; r < sizeof results / sizeof *results; r++)
            for (int skip = 0;; skip++) {
                if (entry == TABLE_error_string) break;
                table_fail(entry, skip, 1, results[r]);
                const qkv_status status = a->run();
                const bool hit = table_heal();
                if (status == QKV_OK && a->undo) a->undo();
                if (!hit) {
                    if (status != QKV_OK) fail_msg("%s: %s", a->what, qkv_last_error());
                    break;
                }
                if (!is_silent(entry)) expect_named(a->what, entry, results[r], status);
                num_faults++;
            }
    return num_faults;
}

/* ---- what there is to do ------------------------------------------------------------------------ */

static qkv_context *ctx;
static ops s;

static qkv_context *made_context;
static qkv_status make_context(void)
{
    const qkv_status status = test_context_create(&made_context);
    assert_true((status == QKV_OK) == (made_context != NULL));
    return status;
}

static void drop_context(void)
{
    qkv_context_destroy(made_context);
}

static qkv_attention *made_attention;
static qkv_status make_attention(void)
{
    const qkv_attention_spec spec = {
        QKV_ATTENTION_SPEC_INIT, .num_qo_heads = 2,   .num_kv_heads = 1,
        .head_dim_qk = 24,       .head_dim_vo = 24,   .page_size = 1,
        .dtype_q = QKV_F16,      .dtype_kv = QKV_F16, .dtype_o = QKV_F16};
    const qkv_attention_limits limits = {QKV_ATTENTION_LIMITS_INIT, .max_requests = 2,
                                         .max_tokens = 2,           .max_qo_len = 1,
                                         .max_kv_len = 20,          .max_pages = 40};
    const qkv_status status = qkv_attention_create(ctx, &spec, &limits, NULL, &made_attention);
    assert_true((status == QKV_OK) == (made_attention != NULL));
    return status;
}

static void drop_attention(void)
{
    qkv_attention_destroy(made_attention);
}

static qkv_status make_plan(void)
{
    return ops_plan(&s, OPS_MIXED, 5, NULL);
}

/* In a context that has not loaded the kernel yet; what is not the call's is left alone. */
static qkv_status call_first(void)
{
    const int entry = table_fault.entry;
    ops fresh = s;
    table_fault.entry = TABLE_NONE;
    EXPECT_OK(test_context_create(&fresh.ctx));
    table_fault.entry = entry;
    const qkv_status status = ops_rmsnorm(&fresh, NULL);
    table_fault.entry = TABLE_NONE;
    qkv_context_destroy(fresh.ctx);
    table_fault.entry = entry;
    return status;
}

static int called; /* in ops_list */
static qkv_status call_operator(void)
{
    return ops_list[called].call(&s, NULL);
}

/* Results are what they are without faults. */
static void expect_all_works(void)
{
    ops_data *want = malloc(sizeof *want);
    assert_non_null(want);
    for (int i = 0; i < OPS_NUM_ATTENTION; i++) EXPECT_OK(ops_plan(&s, i, 11, NULL));
    ops other = ops_new(ctx, 11);
    for (int i = 0; i < OPS_COUNT; i++) {
        ops_expected(&other, i, 12, want);
        ops_fill(s.d, 12);
        EXPECT_OK(ops_list[i].call(&s, NULL));
        ops_compare(ops_list[i].name, s.d, want);
    }
    ops_free(&other);
    free(want);
}

/* ---- tests ------------------------------------------------------------------------------------- */

static void a_failed_load_is_no_matter_of_the_compiler(void **state)
{
    (void)state;
    const int results[] = {CU_OUT_OF_MEMORY, CONTEXT_IS_DESTROYED};
    for (size_t i = 0; i < sizeof results / sizeof *results; i++) {
        table_fail(TABLE_library_load, 0, INT_MAX, results[i]);
        const qkv_status status = make_attention();
        assert_true(table_heal());
        expect_named("create", TABLE_library_load, results[i], status);
    }
    table_fail(TABLE_library_load, 0, INT_MAX, CU_INVALID_IMAGE);
    EXPECT_FAIL(QKV_ERR_COMPILE, "cannot be loaded", make_attention());
    assert_true(table_heal());
    EXPECT_OK(make_attention());
    drop_attention();
}

static void every_failing_call_is_named(void **state)
{
    (void)state;
    const action actions[] = {{"context_create", make_context, drop_context},
                              {"attention_create", make_attention, drop_attention},
                              {"plan", make_plan, NULL},
                              {"an operator's first call", call_first, NULL}};
    const int at_least[] = {40, 40, 12, 12};
    EXPECT_OK(make_attention());
    drop_attention();
    table_zero();
    for (size_t i = 0; i < sizeof actions / sizeof *actions; i++) {
        const int faults = fail_each_call(&actions[i]);
        if (faults < at_least[i]) fail_msg("%s: only %d faults", actions[i].what, faults);
        assert_int_equal(test_synchronize(), 0);
    }
    for (called = 0; called < OPS_COUNT; called++)
        assert_true(fail_each_call(&(action){ops_list[called].name, call_operator, NULL}) >= 8);
    expect_all_works();
}

/* Whatever failed half-way has given back what it had; calls that fail give nothing to give back. */
static void failed_creations_leave_nothing_behind(void **state)
{
    (void)state;
    static const int pairs[][2] = {{TABLE_memory_alloc, TABLE_memory_free},
                                   {TABLE_host_alloc, TABLE_host_free},
                                   {TABLE_event_create, TABLE_event_destroy},
                                   {TABLE_primary_retain, TABLE_primary_release}};
    const action actions[] = {{"context_create", make_context, drop_context},
                              {"attention_create", make_attention, drop_attention}};
    for (size_t a = 0; a < sizeof actions / sizeof *actions; a++)
        for (int entry = 0; entry < TABLE_COUNT; entry++)
            for (int skip = 0;; skip++) {
                /* without a current context nothing is given back: the device is gone */
                if (is_silent(entry) || entry == TABLE_error_string ||
                    entry == TABLE_context_current)
                    break;
                table_zero();
                table_fail(entry, skip, 1, CONTEXT_IS_DESTROYED);
                if (actions[a].run() == QKV_OK) actions[a].undo();
                if (!table_heal()) break;
                for (size_t p = 0; p < sizeof pairs / sizeof *pairs; p++)
                    if (table_calls[pairs[p][0]] - (entry == pairs[p][0]) !=
                        table_calls[pairs[p][1]])
                        fail_msg("%s, while %s fails: %d calls of %s, %d of %s", actions[a].what,
                                 table_names[entry], table_calls[pairs[p][0]],
                                 table_names[pairs[p][0]], table_calls[pairs[p][1]],
                                 table_names[pairs[p][1]]);
            }
}

static void a_lost_device_is_a_status_everywhere(void **state)
{
    (void)state;
    qkv_context *own;
    EXPECT_OK(test_context_create(&own));
    ops lost = ops_new(own, 3);
    table_fail(TABLE_ANY, 0, INT_MAX, CONTEXT_IS_DESTROYED);
    for (int i = 0; i < OPS_COUNT; i++)
        EXPECT_FAIL(QKV_ERR_DEVICE, "error 709", ops_list[i].call(&lost, NULL));
    for (int i = 0; i < OPS_NUM_ATTENTION; i++)
        EXPECT_FAIL(QKV_ERR_DEVICE, "error 709", ops_plan(&lost, i, 4, NULL));
    EXPECT_FAIL(QKV_ERR_DEVICE, "error 709", make_attention());
    EXPECT_FAIL(QKV_ERR_DEVICE, "error 709", make_context());
    ops_free(&lost);
    qkv_context_destroy(own);
    table_heal();
    expect_all_works();
}

static void a_device_that_is_not_there_is_refused(void **state)
{
    (void)state;
    const int32_t ids[] = {-1, 1000, INT32_MAX};
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) {
        qkv_context *none = ctx;
        const qkv_context_options options = {QKV_CONTEXT_OPTIONS_INIT, .device = {kDLCUDA, ids[i]}};
        char got[32];
        snprintf(got, sizeof got, "got %d", (int)ids[i]);
        EXPECT_FAIL(QKV_ERR_UNSUPPORTED, got, qkv_context_create(&options, &none));
        assert_null(none);
        assert_non_null(strstr(qkv_last_error(), "device_id"));
    }
}

/* ---- a kernel's fault, in a process of its own --------------------------------------------------- */

static int faulted_status(const char *what, qkv_status status)
{
    if (status == QKV_ERR_DEVICE && strstr(qkv_last_error(), "CUDA driver: cu")) return 0;
    printf("%s: got %s: %s\n", what, qkv_status_name(status), qkv_last_error());
    return 1;
}

/* A tensor that is nowhere: 0 if all later calls say so, and everything can be destroyed. */
static int fault_in_a_kernel(void)
{
    int num_wrong = 0;
    table_interpose();
    EXPECT_OK(test_context_create(&ctx));
    s = ops_new(ctx, 1);
    DLTensor *nowhere = OPS_MATRIX((void *)(uintptr_t)0x100000, OPS_SIZE);
    const qkv_status first = qkv_rmsnorm(ctx, OPS_MATRIX(s.d->out, OPS_SIZE), nowhere,
                                         TENSOR(s.d->weight, QKV_BF16, OPS_SIZE), 1e-5f, 0, NULL);
    if (first != QKV_OK) num_wrong += faulted_status("the call", first); /* it may be fast */
    num_wrong += test_synchronize() == 0;
    for (int i = 0; i < OPS_COUNT; i++)
        num_wrong += faulted_status(ops_list[i].name, ops_list[i].call(&s, NULL));
    num_wrong += faulted_status("plan", make_plan());
    num_wrong += faulted_status("create", make_attention());
    ops_free(&s);
    qkv_context_destroy(ctx);
    return num_wrong;
}

static void a_kernels_fault_is_a_status(void **state)
{
    (void)state;
    char self[] = "/proc/self/exe", option[] = "kernel-fault";
    char *arguments[] = {self, option, NULL};
    pid_t child;
    int status;
    fflush(NULL);
    assert_int_equal(posix_spawn(&child, self, NULL, NULL, arguments, environ), 0);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

/* ---- fork() ------------------------------------------------------------------------------------- */

static int told_in_child(const char *what, qkv_status got, qkv_status want, const char *text)
{
    if (got == want && strstr(qkv_last_error(), text)) return 0;
    fprintf(stderr, "child, %s: got %s: %s\n", what, qkv_status_name(got), qkv_last_error());
    return 1;
}

/* Nothing works, all says why, and everything can be destroyed. */
static int use_in_child(ops *parents)
{
    qkv_context *own = NULL;
    int num_wrong = 0;
    table_zero();
    for (int i = 0; i < OPS_COUNT; i++)
        num_wrong += told_in_child(ops_list[i].name, ops_list[i].call(parents, NULL),
                                   QKV_ERR_INVALID, "fork()");
    num_wrong += told_in_child("plan", ops_plan(parents, 0, 1, NULL), QKV_ERR_INVALID, "fork()");
    num_wrong += told_in_child("create", make_attention(), QKV_ERR_INVALID, "fork()");
    for (int i = 0; i < OPS_NUM_ATTENTION; i++) qkv_attention_destroy(parents->attention[i]);
    for (int i = 0; i < TABLE_COUNT; i++)
        if (table_calls[i])
            num_wrong++, fprintf(stderr, "child: the parent's driver: %s\n", table_names[i]);
    num_wrong += told_in_child("context", test_context_create(&own), QKV_ERR_DEVICE, "forked");
    qkv_context_destroy(parents->ctx);
    return num_wrong;
}

/* The last test: what a fork does to memory that host and GPU share is the system's matter. */
static void a_forked_child_is_told(void **state)
{
    (void)state;
    ops_data *shared = test_map(2 * sizeof *shared); /* not copied on write */
    assert_non_null(shared);
    ops_data *before = s.d;
    s.d = &shared[0];
    ops_expected(&s, OPS_COUNT - 1, 77, &shared[1]);
    fflush(NULL);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        alarm(30);
        _exit(use_in_child(&s) != 0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    EXPECT_OK(ops_list[OPS_COUNT - 1].call(&s, NULL)); /* the parent goes on */
    ops_compare("after fork()", &shared[0], &shared[1]);
    s.d = before;
    test_unmap(shared, 2 * sizeof *shared);
}

/* ---- no driver ---------------------------------------------------------------------------------- */

static void a_missing_driver_is_named(void **state)
{
    (void)state;
    if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) skip();
    for (int times = 0; times < 2; times++) {
        qkv_context *none = (qkv_context *)&times;
        const qkv_context_options options = {QKV_CONTEXT_OPTIONS_INIT, .device = {kDLCUDA, 0}};
        EXPECT_FAIL(QKV_ERR_UNSUPPORTED, "libcuda.so.1", qkv_context_create(&options, &none));
        assert_non_null(strstr(qkv_last_error(), "kDLCUDA"));
        assert_null(none);
    }
}

static int open_all(void **state)
{
    (void)state;
    table_interpose();
    if (test_context_create(&ctx) != QKV_OK) {
        printf("%s\n", qkv_last_error());
        return -1;
    }
    s = ops_new(ctx, 11);
    return 0;
}

static int close_all(void **state)
{
    (void)state;
    ops_free(&s);
    qkv_context_destroy(ctx);
    return 0;
}

int main(int argc, char **argv)
{
    test_seed();
    if (argc == 2 && strcmp(argv[1], "kernel-fault") == 0) return fault_in_a_kernel() != 0;
    if (!test_on_cuda()) {
        const struct CMUnitTest without[] = {cmocka_unit_test(a_missing_driver_is_named)};
        return cmocka_run_group_tests_name("cuda_faults", without, NULL, NULL);
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_failed_load_is_no_matter_of_the_compiler),
        cmocka_unit_test(every_failing_call_is_named),
        cmocka_unit_test(failed_creations_leave_nothing_behind),
        cmocka_unit_test(a_lost_device_is_a_status_everywhere),
        cmocka_unit_test(a_device_that_is_not_there_is_refused),
        cmocka_unit_test(a_kernels_fault_is_a_status),
        cmocka_unit_test(a_forked_child_is_told),
    };
    return cmocka_run_group_tests_name("cuda_faults", tests, open_all, close_all);
}
