/* test_variant_jit.c - a variant from its declaration to a loaded kernel: what is refused and how, what
 * is compiled how often, and what the cache and the policies do. One CPU level, the plainest: how
 * kernels compute is test_variants.c's.
 * SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "variant_case.h"

/* ---- a small problem ----------------------------------------------------------------------- */

enum { DIM = 8, KEYS = 3 };

static const char *level; /* the last usable one: kernels of narrow vectors compile fastest */
static char cache_dir[256];

static int find_level(void **state)
{
    (void)state;
    int32_t usable;
    const char *name;
    for (int32_t i = 0; (name = qkv_cpu_level(i, &usable)); i++)
        if (usable) level = name;
    return level ? 0 : -1;
}

/* Each test has an empty cache. */
static int new_cache(void **state)
{
    (void)state;
    folder_new(cache_dir);
    return 0;
}

static int free_cache(void **state)
{
    (void)state;
    folder_free(cache_dir);
    return 0;
}

/* One thread: the tests fork. */
static qkv_context *context_with(int32_t policy, const char *compiler, progress *counts)
{
    qkv_context *ctx;
    EXPECT_OK(qkv_context_create(
        &(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .isa = level, .num_threads = 1,
                               .jit_policy = policy, .compiler = compiler, .cache_dir = cache_dir,
                               .jit_progress = counts ? count_progress : NULL, .jit_user = counts},
        &ctx));
    return ctx;
}

static qkv_attention_spec small_spec(const qkv_variant *variant)
{
    return (qkv_attention_spec){QKV_ATTENTION_SPEC_INIT, .num_qo_heads = 1,  .num_kv_heads = 1,
                                .head_dim_qk = DIM,      .head_dim_vo = DIM, .dtype_q = QKV_F32,
                                .dtype_kv = QKV_F32,     .dtype_o = QKV_F32, .variant = variant};
}

static const qkv_attention_limits small_limits = {QKV_ATTENTION_LIMITS_INIT, .max_requests = 1,
                                                  .max_tokens = 1, .max_kv_len = KEYS};

static qkv_status create(qkv_context *ctx, const qkv_variant *variant, qkv_attention **op)
{
    const qkv_attention_spec spec = small_spec(variant);
    return qkv_attention_create(ctx, &spec, &small_limits, NULL, op);
}

/* One row of zeros over three keys of zeros, all values 1: o = 1 without a variant. */
typedef struct small_layer {
    float q[DIM], k[KEYS * DIM], v[KEYS * DIM], o[DIM], lse[1];
    test_tensor tensors[5];
    qkv_attention_io io;
} small_layer;

static void layer_init(small_layer *x)
{
    memset(x, 0, sizeof *x);
    for (int i = 0; i < KEYS * DIM; i++) x->v[i] = 1.f;
    memset(x->o, 0xff, sizeof x->o);
    memset(x->lse, 0xff, sizeof x->lse);
    x->io = (qkv_attention_io){
        QKV_ATTENTION_IO_INIT,
        .q = &test_tensor_init(&x->tensors[0], x->q, QKV_F32, TEST_SHAPE(1, 1, DIM))->t,
        .k = &test_tensor_init(&x->tensors[1], x->k, QKV_F32, TEST_SHAPE(KEYS, 1, DIM))->t,
        .v = &test_tensor_init(&x->tensors[2], x->v, QKV_F32, TEST_SHAPE(KEYS, 1, DIM))->t,
        .o = &test_tensor_init(&x->tensors[3], x->o, QKV_F32, TEST_SHAPE(1, 1, DIM))->t};
}

static void plan_small(qkv_attention *op)
{
    int32_t qo_indptr[] = {0, 1}, kv_indptr[] = {0, KEYS};
    const qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(qo_indptr, QKV_I32, 2),
                                .kv_indptr = TENSOR(kv_indptr, QKV_I32, 2)};
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1, .levels = &index};
    EXPECT_OK(qkv_attention_plan(op, &batch, NULL));
}

/* Plans, runs, destroys; what every element of o is. */
static float result_of(qkv_attention *op, const arguments *args)
{
    small_layer x;
    layer_init(&x);
    x.io.args = args ? args->args : NULL;
    x.io.num_args = args ? args->num : 0;
    plan_small(op);
    EXPECT_OK(qkv_attention_run(op, &x.io, NULL));
    qkv_attention_destroy(op);
    for (int d = 1; d < DIM; d++) assert_true(x.o[d] == x.o[0]);
    return x.o[0];
}

/* A text that no other test or run compiles: o = value. */
typedef char variant_text[512];

static void constant_text(variant_text text, uint64_t salt, int value)
{
    snprintf(text, sizeof(variant_text),
             "/* %016llx */\n"
             "#define VARIANT_OUTPUT 1\n"
             "QI_FN float variant_output(const variant_params *v, qi_pos pos, int dim, float o)\n"
             "{\n"
             "    (void)v, (void)pos, (void)dim;\n"
             "    return o * %d.f;\n"
             "}\n",
             (unsigned long long)salt, value);
}

static qkv_variant plain_variant(const char *name, const char *source)
{
    return (qkv_variant){QKV_VARIANT_INIT, .name = name, .source = source};
}

static void expect_builtin_works(qkv_context *ctx)
{
    qkv_attention *op;
    EXPECT_OK(create(ctx, NULL, &op));
    assert_true(fabsf(result_of(op, NULL) - 1.f) < 1e-6f);
}

/* ---- declarations -------------------------------------------------------------------------- */

#define SCALAR(name_)                                                                              \
    {                                                                                              \
        .name = (name_), .type = QKV_PARAM_F32                                                     \
    }
#define ARRAY(name_, ndim_, t)                                                                     \
    {                                                                                              \
        .name = (name_), .type = QKV_PARAM_TENSOR, .ndim = (ndim_), .dtype = t                     \
    }

static void variant_jit_names_the_bad_parameter(void **state)
{
    (void)state;
    char long_name[65];
    memset(long_name, 'x', 64);
    long_name[64] = 0;
    const struct {
        const char *why, *message;
        qkv_param second; /* behind a good one */
    } rows[] = {
        {"no name", "params", SCALAR(NULL)},
        {"an empty name", "params", SCALAR("")},
        {"no identifier", "two words", SCALAR("two words")},
        {"begins with a digit", "1st", SCALAR("1st")},
        {"a word of C", "float", SCALAR("float")},
        {"a word of C++", "class", SCALAR("class")},
        {"the first one's name", "good", SCALAR("good")},
        {"no such type", "odd", {.name = "odd", .type = 3}},
        {"a negative type", "odd", {.name = "odd", .type = -1}},
        {"a number with axes", "odd", {.name = "odd", .type = QKV_PARAM_I32, .ndim = 1}},
        {"a tensor without axes", "odd", ARRAY("odd", 0, QKV_F32)},
        {"too many axes", "odd", ARRAY("odd", 5, QKV_F32)},
        {"negative axes", "odd", ARRAY("odd", -1, QKV_F32)},
        {"no dtype", "odd", {.name = "odd", .type = QKV_PARAM_TENSOR, .ndim = 1}},
        {"a dtype that variants cannot read", "odd", ARRAY("odd", 1, QKV_F16)},
        {"another one", "odd", ARRAY("odd", 1, QKV_BF16)},
    };
    progress counts = {0};
    qkv_context *ctx = context_with(QKV_JIT_ALLOW, NULL, &counts);
    qkv_attention *op = NULL;
    variant_text text;
    constant_text(text, test_u64(), 1);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const qkv_param params[] = {SCALAR("good"), rows[i].second};
        qkv_variant v = plain_variant("bad_parameter", text);
        v.params = params, v.num_params = 2;
        const qkv_attention_spec spec = small_spec(&v);
        const qkv_status status = create(ctx, &v, &op);
        if (status != QKV_ERR_INVALID || !strstr(qkv_last_error(), rows[i].message) || op)
            fail_msg("%s: got %s: %s", rows[i].why, qkv_status_name(status), qkv_last_error());
        EXPECT_FAIL(QKV_ERR_INVALID, rows[i].message,
                    qkv_attention_warm_up(ctx, &spec, &small_limits));
    }

    qkv_param many[33];
    char names[33][8];
    for (int i = 0; i < 33; i++) {
        snprintf(names[i], sizeof names[i], "p%d", i);
        many[i] = (qkv_param)SCALAR(names[i]);
    }
    qkv_variant v = plain_variant("many", text);
    v.params = many, v.num_params = 33;
    EXPECT_FAIL(QKV_ERR_INVALID, "num_params", create(ctx, &v, &op));
    v.num_params = -1;
    EXPECT_FAIL(QKV_ERR_INVALID, "num_params", create(ctx, &v, &op));
    v = plain_variant("none", text);
    v.num_params = 1;
    EXPECT_FAIL(QKV_ERR_INVALID, "params", create(ctx, &v, &op));
    v = plain_variant("no_source", NULL);
    EXPECT_FAIL(QKV_ERR_INVALID, "source", create(ctx, &v, &op));
    const char *const bad_names[] = {NULL, "", "two words", "quote\"", "slash/", long_name};
    for (size_t i = 0; i < sizeof bad_names / sizeof *bad_names; i++) {
        v = plain_variant(bad_names[i], text);
        EXPECT_FAIL(QKV_ERR_INVALID, "name", create(ctx, &v, &op));
    }
    v = plain_variant("no_size", text);
    v.struct_size = 0;
    EXPECT_FAIL(QKV_ERR_INVALID, "variant", create(ctx, &v, &op));
    assert_int_equal(counts.begun, 0); /* refused before anything is compiled */
    expect_builtin_works(ctx);
    qkv_context_destroy(ctx);
}

/* ---- arguments ----------------------------------------------------------------------------- */

static const char table_text[] =
    "#define VARIANT_NO_SOFTMAX 1\n"
    "#define VARIANT_LOGIT 1\n"
    "QI_FN float variant_logit(const variant_params *v, qi_pos pos, float logit)\n"
    "{\n"
    "    return logit + v->factor * v->table.data[pos.kv_pos * v->table.stride[1]];\n"
    "}\n";

static void expect_untouched(const small_layer *x)
{
    expect_poison(x->o, 0, sizeof x->o, "o");
    expect_poison(x->lse, 0, sizeof x->lse, "lse");
}

/* The operator of table_text, from strings and tables that are overwritten afterwards. */
static qkv_attention *create_from_copies(qkv_context *ctx)
{
    char name[] = "table", factor[] = "factor", table[] = "table", text[sizeof table_text];
    memcpy(text, table_text, sizeof text);
    qkv_param params[] = {SCALAR(factor), ARRAY(table, 2, QKV_F32)};
    qkv_variant v = plain_variant(name, text);
    v.params = params, v.num_params = 2;
    qkv_attention *op;
    EXPECT_OK(create(ctx, &v, &op));
    memset(name, 'x', sizeof name), memset(factor, 'x', sizeof factor);
    memset(table, 'x', sizeof table), memset(text, 'x', sizeof text);
    memset(params, 0xff, sizeof params), memset(&v, 0xff, sizeof v);
    return op;
}

static void variant_jit_names_the_bad_argument(void **state)
{
    (void)state;
    qkv_context *ctx = context_with(QKV_JIT_ALLOW, NULL, NULL);
    qkv_attention *op = create_from_copies(ctx);
    plan_small(op);

    float numbers[2 * KEYS] = {1, 2, 3, NAN, NAN, NAN};
    DLTensor *good = TENSOR(numbers, QKV_F32, 2, KEYS);
    DLTensor *flat = TENSOR(numbers, QKV_F32, 2 * KEYS), *i32 = TENSOR(numbers, QKV_I32, 2, KEYS);
    DLTensor away = *good;
    away.device.device_type = kDLCUDA;
    const struct {
        const char *why, *message;
        const DLTensor *table;
        int32_t num_args;
        bool no_args;
    } rows[] = {
        {"no argument", "num_args", good, 0, true},
        {"too few", "num_args", good, 1, false},
        {"too many", "num_args", good, 3, false},
        {"no array", "args", good, 2, true},
        {"no tensor", "table", NULL, 2, false},
        {"wrong number of axes", "table", flat, 2, false},
        {"wrong dtype", "table", i32, 2, false},
        {"not on this device", "table", &away, 2, false},
    };
    small_layer x;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        layer_init(&x);
        const qkv_arg args[3] = {{.f32 = 2.f}, {.tensor = rows[i].table}};
        x.io.args = rows[i].no_args ? NULL : args;
        x.io.num_args = rows[i].num_args;
        const qkv_status status = qkv_attention_run(op, &x.io, NULL);
        if (status != QKV_ERR_INVALID || !strstr(qkv_last_error(), rows[i].message))
            fail_msg("%s: got %s: %s", rows[i].why, qkv_status_name(status), qkv_last_error());
        expect_untouched(&x);
    }

    layer_init(&x);
    const qkv_arg args[] = {{.f32 = 2.f}, {.tensor = good}};
    x.io.args = args, x.io.num_args = 2;
    x.io.lse = TENSOR(x.lse, QKV_F32, 1, 1);
    EXPECT_FAIL(QKV_ERR_INVALID, "lse", qkv_attention_run(op, &x.io, NULL)); /* no softmax */
    expect_untouched(&x);
    x.io.lse = NULL;
    EXPECT_OK(qkv_attention_run(op, &x.io, NULL));
    for (int d = 0; d < DIM; d++) assert_true(x.o[d] == 2.f * (1 + 2 + 3));
    qkv_attention_destroy(op);

    EXPECT_OK(create(ctx, NULL, &op));
    plan_small(op);
    layer_init(&x);
    x.io.args = args, x.io.num_args = 2;
    EXPECT_FAIL(QKV_ERR_INVALID, "num_args", qkv_attention_run(op, &x.io, NULL)); /* no variant */
    expect_untouched(&x);
    qkv_attention_destroy(op);
    qkv_context_destroy(ctx);
}

/* ---- compiling ----------------------------------------------------------------------------- */

static void variant_jit_shows_the_users_line(void **state)
{
    (void)state;
    const struct {
        const char *why, *source, *line, *words;
    } rows[] = {
        {"a slip of the pen",
         "#define VARIANT_STATE 1\n"
         "QI_FN float variant_state(const variant_params *v, qi_pos pos)\n"
         "{\n"
         "    return v->senk + (float)pos.qo_pos;\n"
         "}\n",
         ":4:", "senk"},
        {"a missing semicolon, in the first line", "int x\n#define VARIANT_STATE 1\n",
         ":1:", "error"},
    };
    progress counts = {0};
    qkv_context *ctx = context_with(QKV_JIT_ALLOW, NULL, &counts);
    qkv_attention *op = NULL;
    const qkv_param params[] = {SCALAR("sink")};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qkv_variant v = plain_variant("my_mistake", rows[i].source);
        v.params = params, v.num_params = 1;
        const qkv_status status = create(ctx, &v, &op);
        const char *message = qkv_last_error();
        if (status != QKV_ERR_COMPILE || !strstr(message, "my_mistake") ||
            !strstr(message, rows[i].line) || !strstr(message, rows[i].words) || op)
            fail_msg("%s: got %s: %s", rows[i].why, qkv_status_name(status), message);
        assert_int_equal(counts.begun, (int)i + 1);
        assert_int_equal(counts.ended, (int)i + 1);
    }
    assert_int_equal(counts.wrong, 0);
    expect_builtin_works(ctx);
    qkv_context_destroy(ctx);
}

static void variant_jit_needs_a_compiler(void **state)
{
    (void)state;
    const char *const compilers[] = {"/nonexistent/cc", "no-such-compiler", "/dev/null", "false"};
    variant_text text;
    constant_text(text, test_u64(), 1);
    const qkv_variant v = plain_variant("no_compiler", text);
    for (size_t i = 0; i < sizeof compilers / sizeof *compilers; i++) {
        progress counts = {0};
        qkv_context *ctx = context_with(QKV_JIT_ALLOW, compilers[i], &counts);
        qkv_attention *op = NULL;
        EXPECT_FAIL(QKV_ERR_COMPILE, i < 3 ? "compiler" : "false", create(ctx, &v, &op));
        assert_null(op);
        assert_int_equal(counts.begun, counts.ended);
        expect_builtin_works(ctx);
        qkv_context_destroy(ctx);
    }
}

static void variant_jit_never_serves_another_text(void **state)
{
    (void)state;
    const uint64_t salt = test_u64();
    progress counts = {0};
    qkv_context *ctx = context_with(QKV_JIT_ALLOW, NULL, &counts);
    const struct {
        const char *why;
        int value, compiled;
    } rows[] = {{"new", 3, 1}, {"a constant edited", 5, 2}, {"edited back", 3, 2}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        variant_text text;
        constant_text(text, salt, rows[i].value);
        const qkv_variant v = plain_variant("edited", text);
        qkv_attention *op;
        EXPECT_OK(create(ctx, &v, &op));
        const float got = result_of(op, NULL);
        if (fabsf(got - (float)rows[i].value) > 1e-5f || counts.begun != rows[i].compiled)
            fail_msg("%s: got %g after %d compilations", rows[i].why, (double)got, counts.begun);
    }
    assert_int_equal(counts.ended, 2);
    assert_int_equal(counts.wrong, 0);
    qkv_context_destroy(ctx);
}

/* The same text over another table of parameters is another variant. */
static void variant_jit_tells_tables_apart(void **state)
{
    (void)state;
    const char text[] =
        "#define VARIANT_OUTPUT 1\n"
        "QI_FN float variant_output(const variant_params *v, qi_pos pos, int dim, float o)\n"
        "{\n"
        "    return (float)(v->x / 2);\n"
        "}\n";
    qkv_context *ctx = context_with(QKV_JIT_ALLOW, NULL, NULL);
    arguments whole = {0}, real = {0};
    add_i32(&whole, "x", 3);
    add_f32(&real, "x", 3);
    const qkv_variant a = variant_with("half", text, &whole), b = variant_with("half", text, &real);
    qkv_attention *op;
    EXPECT_OK(create(ctx, &a, &op));
    assert_true(result_of(op, &whole) == 1.f);
    EXPECT_OK(create(ctx, &b, &op));
    assert_true(result_of(op, &real) == 1.5f);
    qkv_context_destroy(ctx);
}

/* ---- policies and the cache ---------------------------------------------------------------- */

/* In another process: warms the cache up, and compiles exactly once for that. */
static void warm_up_elsewhere(const qkv_variant *v)
{
    fflush(NULL);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        progress counts = {0};
        qkv_context *ctx = context_with(QKV_JIT_ALLOW, NULL, &counts);
        const qkv_attention_spec spec = small_spec(v);
        const bool good = qkv_attention_warm_up(ctx, &spec, &small_limits) == QKV_OK &&
                          counts.begun == 1 && counts.ended == 1 && counts.wrong == 0;
        qkv_context_destroy(ctx);
        _exit(good ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void expect_hit(int32_t policy, const char *compiler, const qkv_variant *v, float value)
{
    progress counts = {0};
    qkv_context *ctx = context_with(policy, compiler, &counts);
    qkv_attention *op;
    EXPECT_OK(create(ctx, v, &op));
    assert_true(fabsf(result_of(op, NULL) - value) < 1e-5f);
    assert_int_equal(counts.begun, 0);
    assert_int_equal(counts.ended, 0);
    qkv_context_destroy(ctx);
}

static void expect_refusal(int32_t policy, const qkv_variant *v)
{
    progress counts = {0};
    qkv_context *ctx = context_with(policy, NULL, &counts);
    qkv_attention *op = NULL;
    EXPECT_FAIL(QKV_ERR_COMPILE, "jit_policy", create(ctx, v, &op));
    assert_null(op);
    const qkv_attention_spec spec = small_spec(v);
    EXPECT_FAIL(QKV_ERR_COMPILE, "jit_policy", qkv_attention_warm_up(ctx, &spec, &small_limits));
    assert_int_equal(counts.begun, 0);
    expect_builtin_works(ctx);
    qkv_context_destroy(ctx);
}

static void variant_jit_obeys_the_policy(void **state)
{
    (void)state;
    variant_text text;
    constant_text(text, test_u64(), 7);
    const qkv_variant v = plain_variant("policy", text);
    expect_refusal(QKV_JIT_NEVER, &v);
    expect_refusal(QKV_JIT_CACHED, &v);
    warm_up_elsewhere(&v);
    expect_refusal(QKV_JIT_NEVER, &v);
    expect_hit(QKV_JIT_CACHED, NULL, &v, 7.f);
    expect_hit(QKV_JIT_ALLOW, NULL, &v, 7.f);

    qkv_context *ctx = (qkv_context *)1;
    const qkv_context_options bad = {QKV_CONTEXT_OPTIONS_INIT, .jit_policy = QKV_JIT_FILL};
    EXPECT_FAIL(QKV_ERR_INVALID, "jit_policy", qkv_context_create(&bad, &ctx));
    assert_null(ctx);
}

static void variant_jit_needs_no_compiler_for_cached_kernels(void **state)
{
    (void)state;
    variant_text text;
    constant_text(text, test_u64(), 9);
    const qkv_variant v = plain_variant("carried", text);
    warm_up_elsewhere(&v);
    expect_hit(QKV_JIT_ALLOW, "/nonexistent/cc", &v, 9.f);
    expect_hit(QKV_JIT_CACHED, "/nonexistent/cc", &v, 9.f);
}

typedef struct racer {
    qkv_context *ctx;
    const qkv_variant *variant;
    pthread_barrier_t *start;
    qkv_attention *op;
    qkv_status status;
} racer;

static void *race(void *arg)
{
    racer *r = arg;
    pthread_barrier_wait(r->start);
    r->status = create(r->ctx, r->variant, &r->op);
    return NULL;
}

static void variant_jit_compiles_once_for_all_threads(void **state)
{
    (void)state;
    enum { NUM_RACERS = 4 };
    variant_text text;
    constant_text(text, test_u64(), 11);
    const qkv_variant v = plain_variant("race", text);
    progress counts = {0};
    pthread_barrier_t start;
    pthread_barrier_init(&start, NULL, NUM_RACERS);
    racer racers[NUM_RACERS];
    pthread_t threads[NUM_RACERS];
    for (int i = 0; i < NUM_RACERS; i++) { /* two contexts, two threads each */
        qkv_context *ctx = i % 2 ? racers[i - 1].ctx : context_with(QKV_JIT_ALLOW, NULL, &counts);
        racers[i] = (racer){.ctx = ctx, .variant = &v, .start = &start};
    }
    for (int i = 0; i < NUM_RACERS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, race, &racers[i]), 0);
    for (int i = 0; i < NUM_RACERS; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < NUM_RACERS; i++) {
        assert_int_equal(racers[i].status, QKV_OK);
        assert_true(fabsf(result_of(racers[i].op, NULL) - 11.f) < 1e-5f);
    }
    assert_int_equal(counts.begun, 1);
    assert_int_equal(counts.ended, 1);
    for (int i = 0; i < NUM_RACERS; i += 2) qkv_context_destroy(racers[i].ctx);
    pthread_barrier_destroy(&start);
}

/* Compiles, or is let have it: how often it compiled, or 100 for whatever went wrong. */
static int race_in_child(const qkv_variant *v, int start)
{
    char byte;
    progress counts = {0};
    if (read(start, &byte, 1) != 0) return 100; /* until the parent closes the other end */
    qkv_context *ctx = context_with(QKV_JIT_ALLOW, NULL, &counts);
    const qkv_attention_spec spec = small_spec(v);
    const bool good = qkv_attention_warm_up(ctx, &spec, &small_limits) == QKV_OK;
    qkv_context_destroy(ctx);
    return good && counts.begun == counts.ended && counts.wrong == 0 ? counts.begun : 100;
}

static void variant_jit_compiles_once_for_all_processes(void **state)
{
    (void)state;
    enum { NUM_RACERS = 4 };
    variant_text text;
    constant_text(text, test_u64(), 13);
    const qkv_variant v = plain_variant("processes", text);
    pid_t children[NUM_RACERS];
    int ends[2], num_compiled = 0;
    assert_int_equal(pipe(ends), 0);
    fflush(NULL);
    for (int i = 0; i < NUM_RACERS; i++) {
        children[i] = fork();
        assert_true(children[i] >= 0);
        if (children[i] == 0) {
            close(ends[1]);
            _exit(race_in_child(&v, ends[0]));
        }
    }
    close(ends[0]), close(ends[1]);
    for (int i = 0; i < NUM_RACERS; i++) {
        int status;
        assert_int_equal(waitpid(children[i], &status, 0), children[i]);
        assert_true(WIFEXITED(status));
        num_compiled += WEXITSTATUS(status);
    }
    assert_int_equal(num_compiled, 1);
    expect_hit(QKV_JIT_CACHED, NULL, &v, 13);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, new_cache, free_cache)

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        TEST(variant_jit_names_the_bad_parameter),
        TEST(variant_jit_names_the_bad_argument),
        TEST(variant_jit_shows_the_users_line),
        TEST(variant_jit_needs_a_compiler),
        TEST(variant_jit_never_serves_another_text),
        TEST(variant_jit_tells_tables_apart),
        TEST(variant_jit_obeys_the_policy),
        TEST(variant_jit_needs_no_compiler_for_cached_kernels),
        TEST(variant_jit_compiles_once_for_all_threads),
        TEST(variant_jit_compiles_once_for_all_processes),
    };
    return cmocka_run_group_tests_name("variant_jit", tests, find_level, NULL);
}
