/* test_struct_size.c - structs of programs older and newer than this library. An older one is the same
 * as one whose missing fields are zero; a newer one is taken as long as what it adds is zero. Each
 * struct stands in a block of exactly struct_size bytes, so that a sanitizer sees who reads beyond.
 * SPDX-License-Identifier: Apache-2.0 */
#include "bad_input.h"

enum { HEADS = 2, DIM = 8, PAGE = 4, MAX_SIZE = 4096 /* of any struct to come */ };

static qkv_attention *op;

static float o[HEADS * DIM], q[HEADS * DIM], pool[2][PAGE * HEADS * DIM], logits[8];
static int32_t qo_indptr[] = {0, 1}, page[] = {0}, len[] = {3}, zero[1], token[1];
static uint64_t seed[1];

static const qkv_attention_spec plain_spec = {
    QKV_ATTENTION_SPEC_INIT, .num_qo_heads = HEADS, .num_kv_heads = HEADS,
    .head_dim_qk = DIM,      .head_dim_vo = DIM,    .page_size = PAGE,
    .dtype_q = {2, 32, 1},   .dtype_o = {2, 32, 1}, .dtype_kv = {2, 32, 1}};
static const qkv_attention_limits plain_limits = {QKV_ATTENTION_LIMITS_INIT, .max_requests = 1,
                                                  .max_tokens = 1, .max_kv_len = PAGE,
                                                  .max_pages = 1};

#define Q    TENSOR(q, QKV_F32, 1, HEADS, DIM)
#define O    TENSOR(o, QKV_F32, 1, HEADS, DIM)
#define K    TENSOR(pool[0], QKV_F32, 1, PAGE, HEADS, DIM)
#define V    TENSOR(pool[1], QKV_F32, 1, PAGE, HEADS, DIM)
#define ROWS TENSOR(q, QKV_F32, 1, HEADS, DIM)

/* ---- one call for each struct: it refuses without writing ----------------------------------- */

static qkv_status use_context_options(const void *s)
{
    qkv_context *made = ctx;
    const qkv_status status = qkv_context_create(s, &made);
    assert_true((status == QKV_OK) == (made != NULL));
    qkv_context_destroy(made);
    return status;
}

static qkv_status create(const qkv_attention_spec *spec, const qkv_attention_limits *limits,
                         const qkv_workspace *workspace)
{
    qkv_attention *made = op;
    const qkv_status status = qkv_attention_create(ctx, spec, limits, workspace, &made);
    assert_true((status == QKV_OK) == (made != NULL));
    qkv_attention_destroy(made);
    return status;
}

static qkv_status use_spec(const void *s)
{
    return create(s, &plain_limits, NULL);
}

static qkv_status use_limits(const void *s)
{
    return create(&plain_spec, s, NULL);
}

static qkv_status use_workspace(const void *s)
{
    return create(&plain_spec, &plain_limits, s);
}

static qkv_status use_batch(const void *s)
{
    return qkv_attention_plan(op, s, NULL);
}

static qkv_status use_level(const void *s)
{
    return use_batch(
        &(qkv_attention_batch){QKV_ATTENTION_BATCH_INIT, .num_levels = 1, .levels = s});
}

static qkv_status use_index(const void *s)
{
    return qkv_kv_append(ctx, K, V, QKV_NHD, ROWS, ROWS, s, NULL, NULL, NULL);
}

static qkv_status use_io(const void *s)
{
    return qkv_attention_run(op, s, NULL);
}

static qkv_status use_rope(const void *s)
{
    return qkv_rope(ctx, s, O, Q, NULL, NULL, TENSOR(zero, QKV_I32, 1), NULL, NULL, NULL);
}

static qkv_status use_rope_of_spec(const void *s)
{
    qkv_attention_spec spec = plain_spec;
    spec.features = QKV_FEATURE_ROPE;
    spec.rope = s;
    return use_spec(&spec);
}

static qkv_status use_append_options(const void *s)
{
    return qkv_kv_append_slots(ctx, K, V, QKV_NHD, ROWS, ROWS, TENSOR(zero, QKV_I32, 1), s, NULL);
}

static qkv_status use_sampling_params(const void *s)
{
    return qkv_sample(ctx, TENSOR(token, QKV_I32, 1), TENSOR(logits, QKV_F32, 1, 8), s, NULL);
}

static qkv_status use_variant(const void *s)
{
    qkv_attention_spec spec = plain_spec;
    spec.variant = s;
    qkv_workspace_size size;
    return qkv_attention_workspace_size(ctx, &spec, &plain_limits, &size); /* compiles nothing */
}

/* ---- sizes ---------------------------------------------------------------------------------- */

typedef struct sized {
    const char *name; /* in messages */
    const void *good;
    size_t bytes, alignment;
    qkv_status (*use)(const void *s);
} sized;

/* A copy of the first bytes in a block of its own, zeros behind the struct's end. */
static unsigned char *resized(const sized *x, size_t bytes)
{
    unsigned char *s = calloc(1, bytes);
    assert_non_null(s);
    memcpy(s, x->good, bytes < x->bytes ? bytes : x->bytes);
    memcpy(s, &(uint32_t){(uint32_t)bytes}, bytes < 4 ? bytes : 4);
    return s;
}

/* use(s), with outputs that a refusal leaves alone. */
static qkv_status use(const sized *x, const void *s, const char *why)
{
    memset(o, BAD_POISON, sizeof o);
    memset(pool, BAD_POISON, sizeof pool);
    memset(token, BAD_POISON, sizeof token);
    const qkv_status status = x->use(s);
    const unsigned char *const outputs[] = {(void *)o, (void *)pool, (void *)token};
    const size_t bytes[] = {sizeof o, sizeof pool, sizeof token};
    for (int i = 0; status && i < 3; i++)
        for (size_t j = 0; j < bytes[i]; j++)
            if (outputs[i][j] != BAD_POISON) fail_msg("%s: %s: written", x->name, why);
    return status;
}

static void try_struct(const sized *x)
{
    char why[64];
    if (use(x, x->good, "as it is")) fail_msg("%s: %s", x->name, qkv_last_error());

    /* no struct at all, or none that a compiler makes: of 4 bytes, but for the last few */
    static const uint32_t wrong[] = {0,         1, 2, 3, MAX_SIZE + 8, INT32_MAX, UINT32_MAX - 7,
                                     UINT32_MAX};
    for (size_t i = 0; i < COUNT(wrong); i++) {
        unsigned char *s = resized(x, 4);
        memcpy(s, &wrong[i], 4);
        snprintf(why, sizeof why, "struct_size %u", (unsigned)wrong[i]);
        bad_expect("struct", why, use(x, s, why), x->name, NULL);
        assert_non_null(strstr(qkv_last_error(), "struct_size"));
        free(s);
    }

    for (size_t bytes = 4; bytes < x->bytes; bytes++) {
        unsigned char *old = resized(x, bytes), *same = resized(x, x->bytes);
        memset(same + bytes, 0, x->bytes - bytes);
        memcpy(same, &(uint32_t){(uint32_t)x->bytes}, 4);
        snprintf(why, sizeof why, "cut to %d bytes", (int)bytes);
        const qkv_status status = use(x, old, why);
        if (bytes % x->alignment) {
            bad_expect("struct", why, status, x->name, NULL);
        } else {
            char message[512];
            snprintf(message, sizeof message, "%s", qkv_last_error());
            if (use(x, same, why) != status || (status && strcmp(message, qkv_last_error()) != 0))
                fail_msg("%s: %s: got %s, but %s of one with zeros", x->name, why,
                         status ? message : "no error", qkv_last_error());
            if (status && !strstr(message, ": expected"))
                fail_msg("%s: %s: expected the name of a field, got: %s", x->name, why, message);
        }
        free(old), free(same);
    }

    for (size_t bytes = x->bytes + x->alignment; bytes <= x->bytes + 64; bytes += x->alignment) {
        unsigned char *s = resized(x, bytes);
        snprintf(why, sizeof why, "grown to %d bytes", (int)bytes);
        if (use(x, s, why)) fail_msg("%s: %s: %s", x->name, why, qkv_last_error());
        for (size_t i = x->bytes; i < bytes; i++) {
            s[i] = 0x80;
            bad_expect("struct", why, use(x, s, why), x->name, NULL);
            char place[32];
            snprintf(place, sizeof place, "at offset %d ", (int)i);
            if (!strstr(qkv_last_error(), place))
                fail_msg("%s: %s: expected %s, got: %s", x->name, why, place, qkv_last_error());
            s[i] = 0;
        }
        free(s);
    }
    unsigned char *most = resized(x, MAX_SIZE);
    if (use(x, most, "the largest")) fail_msg("%s: %s", x->name, qkv_last_error());
    most[MAX_SIZE - 1] = 1;
    bad_expect("struct", "the last byte", use(x, most, "the last byte"), x->name, NULL);
    free(most);
}

static void structs_of_other_versions_are_read_as_promised(void **state)
{
    (void)state;
    qkv_workspace_size size;
    EXPECT_OK(qkv_attention_workspace_size(ctx, &plain_spec, &plain_limits, &size));
    void *const plan = aligned_alloc(64, size.plan_bytes);
    void *const scratch = aligned_alloc(64, size.scratch_bytes);
    assert_true(plan && scratch);
    const qkv_context_options options = {QKV_CONTEXT_OPTIONS_INIT, .num_threads = 1};
    const qkv_workspace workspace = {QKV_WORKSPACE_INIT, .plan = plan, .scratch = scratch,
                                     .plan_bytes = size.plan_bytes,
                                     .scratch_bytes = size.scratch_bytes};
    const qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(qo_indptr, QKV_I32, 2),
                                .block_table = TENSOR(page, QKV_I32, 1, 1),
                                .kv_lens = TENSOR(len, QKV_I32, 1)};
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1, .levels = &index,
                                       .qo_pos = TENSOR(zero, QKV_I32, 1)};
    const qkv_attention_io io = {
        QKV_ATTENTION_IO_INIT,  .q = Q, .k = K, .v = V, .o = O, .sm_scale = 0.5f,
        .k_scale = {.value = 2}};
    const qkv_rope_spec rope = {QKV_ROPE_SPEC_INIT, .rotary_dim = 4,    .interleaved = 1,
                                .theta = 1e6f,      .scale = 8,         .low_freq = 1,
                                .high_freq = 4,     .old_context = 8192};
    const qkv_kv_append_options append = {QKV_KV_APPEND_OPTIONS_INIT,
                                          .k_scale = {.value = 2},
                                          .v_scale = {.value = 3},
                                          .rope = &rope,
                                          .q = Q,
                                          .q_out = O,
                                          .q_scale = {.value = 4},
                                          .positions = TENSOR(zero, QKV_I32, 1)};
    const qkv_sampling_params params = {QKV_SAMPLING_PARAMS_INIT, .top_k = TENSOR(len, QKV_I32, 1),
                                        .seed = TENSOR(seed, QKV_U64, 1),
                                        .offset = TENSOR(seed, QKV_U64, 1)};
    static const qkv_param param = {.name = "slope", .type = QKV_PARAM_F32};
    const qkv_variant variant = {QKV_VARIANT_INIT, .num_params = 1, .name = "steep", .source = "",
                                 .params = &param};
#define SIZED(name, x, use) name, &(x), sizeof(x), _Alignof(__typeof__(x)), use
    const sized rows[] = {
        {SIZED("options", options, use_context_options)},
        {SIZED("spec", plain_spec, use_spec)},
        {SIZED("limits", plain_limits, use_limits)},
        {SIZED("workspace", workspace, use_workspace)},
        {SIZED("index", index, use_index)},
        {SIZED("levels", index, use_level)},
        {SIZED("batch", batch, use_batch)},
        {SIZED("io", io, use_io)},
        {SIZED("spec", rope, use_rope)},
        {SIZED("rope", rope, use_rope_of_spec)},
        {SIZED("options", append, use_append_options)},
        {SIZED("params", params, use_sampling_params)},
        {SIZED("variant", variant, use_variant)},
    };
#undef SIZED
    EXPECT_OK(qkv_attention_create(ctx, &plain_spec, &plain_limits, NULL, &op));
    EXPECT_OK(qkv_attention_plan(op, &batch, NULL));
    for (size_t i = 0; i < COUNT(rows); i++) try_struct(&rows[i]);
    qkv_attention_destroy(op);
    free(plan), free(scratch);
}

/* Levels stand as far apart as the first one's struct_size says. */
static void levels_of_a_newer_program_are_found(void **state)
{
    (void)state;
    struct newer {
        qkv_kv_index known;
        int64_t field;
    } levels[2] = {{.field = 0}};
    int32_t shared_len[] = {PAGE};
    levels[0].known = (qkv_kv_index){.struct_size = sizeof levels[0],
                                     .qo_indptr = TENSOR(qo_indptr, QKV_I32, 2),
                                     .block_table = TENSOR(page, QKV_I32, 1, 1)};
    levels[1] = levels[0];
    levels[0].known.kv_lens = TENSOR(shared_len, QKV_I32, 1);
    levels[1].known.kv_lens = TENSOR(len, QKV_I32, 1);
    qkv_attention_limits limits = plain_limits;
    limits.max_levels = 2;
    limits.max_kv_len = limits.max_pages = 2 * PAGE;
    EXPECT_OK(qkv_attention_create(ctx, &plain_spec, &limits, NULL, &op));
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 2,
                                       .levels = &levels[0].known};
    EXPECT_OK(qkv_attention_plan(op, &batch, NULL));
    levels[1].field = 1;
    EXPECT_FAIL(QKV_ERR_INVALID, "levels[1]: expected zeros", use_batch(&batch));
    levels[1].field = 0;
    levels[1].known.struct_size = 0;
    EXPECT_FAIL(QKV_ERR_INVALID, "levels[1]: expected struct_size", use_batch(&batch));
    levels[1].known.struct_size = sizeof levels[0];
    levels[1].known.reserved = 9;
    EXPECT_FAIL(QKV_ERR_INVALID, "levels[1]: index.reserved: expected 0", use_batch(&batch));
    levels[1].known.reserved = 0;
    levels[0].known.struct_size = sizeof levels[0] + 4;
    EXPECT_FAIL(QKV_ERR_INVALID, "levels[0]: expected struct_size", use_batch(&batch));
    qkv_attention_destroy(op);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(structs_of_other_versions_are_read_as_promised),
        cmocka_unit_test(levels_of_a_newer_program_are_found),
    };
    return cmocka_run_group_tests_name("struct_size", tests, bad_open, bad_close);
}
