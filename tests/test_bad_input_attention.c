/* test_bad_input_attention.c - every fault that a tensor can have, in every place of plan and run; calls
 * out of order; and workspaces, limits and positions at their extremes.
 * SPDX-License-Identifier: Apache-2.0 */
#include "bad_input.h"

/* Two requests of 3 and 5 keys on pages of 4, with 1 and 2 rows; 4 query heads on 2 KV heads. */
enum { TOKENS = 3, HEADS = 4, KV_HEADS = 2, DIM = 8, PAGE = 4, PAGES = 3, KEYS = 8 };
static int32_t qo_indptr[] = {0, 1, 3}, kv_indptr[] = {0, 1, 3}, kv_indices[] = {2, 0, 1};
static int32_t kv_last_page_len[] = {3, 1}, block_table[] = {2, -1, 0, 1}, kv_lens[] = {3, 5};
static int32_t ragged_indptr[] = {0, 3, 8}, qo_pos[] = {0, -7};
static int32_t bsr_indptr[] = {0, 1, 3, 4}, bsr_indices[] = {0, 0, 1, 1};
static uint8_t mask_bits[] = {7, 0xff, 3}, bsr_mask[] = {15, 7, 1, 1};
static int64_t mask_indptr[] = {0, 1, 3};
static float q[TOKENS * HEADS * DIM], kv[2][PAGES * PAGE * KV_HEADS * DIM];
static const float scales[] = {1, 2, 1, 2}, slopes[] = {0, 1, -1, 0.5f};

static qkv_attention *op;

static qkv_attention_spec plain_spec(int32_t page_size)
{
    return (qkv_attention_spec){
        QKV_ATTENTION_SPEC_INIT, .num_qo_heads = HEADS, .num_kv_heads = KV_HEADS,
        .head_dim_qk = DIM,      .head_dim_vo = DIM,    .page_size = page_size,
        .dtype_q = QKV_F32,      .dtype_kv = QKV_F32,   .dtype_o = QKV_F32};
}

static const qkv_attention_limits limits = {
    QKV_ATTENTION_LIMITS_INIT, .max_requests = 2,   .max_tokens = TOKENS,    .max_kv_len = KEYS,
    .max_pages = 2 * PAGES,    .pool_pages = PAGES, .max_row_blocks = TOKENS};

/* ---- plan ---------------------------------------------------------------------------------- */

static qkv_status plan_index(const qkv_kv_index *index, const DLTensor *pos, const DLTensor *bits,
                             const DLTensor *indptr)
{
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1,
                                       .levels = index,          .qo_pos = pos,
                                       .mask_bits = bits,        .mask_indptr = indptr};
    return qkv_attention_plan(op, &batch, NULL);
}

static qkv_status plan_csr(DLTensor *const *t)
{
    return plan_index(&(qkv_kv_index){QKV_KV_INDEX_INIT, .qo_indptr = t[0], .kv_indptr = t[1],
                                      .kv_indices = t[2], .kv_last_page_len = t[3]},
                      t[4], NULL, NULL);
}

static qkv_status plan_table(DLTensor *const *t)
{
    return plan_index(
        &(qkv_kv_index){QKV_KV_INDEX_INIT, .qo_indptr = t[0], .block_table = t[1], .kv_lens = t[2]},
        NULL, NULL, NULL);
}

static qkv_status plan_ragged(DLTensor *const *t)
{
    return plan_index(&(qkv_kv_index){QKV_KV_INDEX_INIT, .qo_indptr = t[0], .kv_indptr = t[1]},
                      NULL, NULL, NULL);
}

static qkv_status plan_mask(DLTensor *const *t)
{
    return plan_index(&(qkv_kv_index){QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(qo_indptr, QKV_I32, 3),
                                      .block_table = TENSOR(block_table, QKV_I32, 2, 2),
                                      .kv_lens = TENSOR(kv_lens, QKV_I32, 2)},
                      NULL, t[0], t[1]);
}

static qkv_status plan_bsr(DLTensor *const *t)
{
    return plan_index(&(qkv_kv_index){QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(qo_indptr, QKV_I32, 3),
                                      .block_table = TENSOR(block_table, QKV_I32, 2, 2),
                                      .kv_lens = TENSOR(kv_lens, QKV_I32, 2), .bsr_rows = 1,
                                      .bsr_cols = PAGE, .bsr_indptr = t[0], .bsr_indices = t[1],
                                      .bsr_mask = t[2]},
                      NULL, NULL, NULL);
}

static const bad_entry csr_entries[] = {
    {"qo_indptr", 0, 1, NULL},
    {"qo_indptr", 1, -1, NULL},
    {"qo_indptr", 1, 4, NULL},
    {"qo_indptr", 2, 4, NULL},
    {"qo_indptr", 2, INT32_MAX, NULL},
    {"kv_indptr", 0, -1, NULL},
    {"kv_indptr", 1, INT32_MIN, NULL},
    {"kv_indptr", 1, 4, NULL},
    {"kv_indptr", 2, 4, "kv_indices"},
    {"kv_indptr", 2, INT32_MAX, "kv_indices"},
    {"kv_indices", 0, -1, NULL},
    {"kv_indices", 1, PAGES, NULL},
    {"kv_indices", 2, INT32_MAX, NULL},
    {"kv_indices", 2, INT32_MIN, NULL},
    {"kv_last_page_len", 0, 0, NULL},
    {"kv_last_page_len", 1, PAGE + 1, NULL},
    {"kv_last_page_len", 1, INT32_MIN, NULL},
    {0},
};
static const bad_entry table_entries[] = {
    {"block_table", 0, PAGES, NULL},
    {"block_table", 3, -1, NULL},
    {"kv_lens", 0, -1, NULL},
    {"kv_lens", 1, INT32_MIN, NULL},
    {"kv_lens", 1, KEYS + 1, NULL},
    {"kv_lens", 1, INT32_MAX, NULL},
    {0},
};
static const bad_entry ragged_entries[] = {
    {"kv_indptr", 0, -1, NULL},
    {"kv_indptr", 1, KEYS + 1, NULL},
    {"kv_indptr", 2, 3 + KEYS + 1, NULL},
    {"kv_indptr", 2, INT32_MAX, NULL},
    {0},
};
static const bad_entry mask_entries[] = {
    {"mask_indptr", 0, -1, NULL},
    {"mask_indptr", 1, 0, NULL},
    {"mask_indptr", 1, -0x1p62, NULL},
    {"mask_indptr", 2, 2, NULL},
    {"mask_indptr", 2, 4, "mask_bits"},
    {"mask_indptr", 2, 0x1p62, "mask_bits"},
    {0},
};
static const bad_entry bsr_entries[] = {
    {"bsr_indptr", 0, -1, NULL},         {"bsr_indptr", 1, INT32_MIN, NULL},
    {"bsr_indptr", 2, 0, NULL},          {"bsr_indptr", 3, 5, NULL},
    {"bsr_indptr", 3, INT32_MAX, NULL},  {"bsr_indices", 0, 1, NULL},
    {"bsr_indices", 1, -1, NULL},        {"bsr_indices", 2, 0, NULL},
    {"bsr_indices", 3, 2, NULL},         {"bsr_indices", 3, INT32_MAX, NULL},
    {"bsr_indices", 3, INT32_MIN, NULL}, {0},
};

static float planned_o[TOKENS * HEADS * DIM]; /* by the plan before the faults */

static void compute(float *o)
{
    memset(o, BAD_POISON, sizeof planned_o);
    DLTensor *keys[2];
    test_tensor paged[2], flat[2];
    for (int i = 0; i < 2; i++) {
        test_tensor_init(&paged[i], kv[i], QKV_F32, TEST_SHAPE(PAGES, PAGE, KV_HEADS, DIM));
        test_tensor_init(&flat[i], kv[i], QKV_F32, TEST_SHAPE(PAGES * PAGE, KV_HEADS, DIM));
        keys[i] = &paged[i].t;
    }
    qkv_attention_io io = {QKV_ATTENTION_IO_INIT, .q = TENSOR(q, QKV_F32, TOKENS, HEADS, DIM),
                           .k = keys[0], .v = keys[1], .o = TENSOR(o, QKV_F32, TOKENS, HEADS, DIM)};
    if (qkv_attention_run(op, &io, NULL) == QKV_OK) return;
    io.k = &flat[0].t; /* of a ragged operator */
    io.v = &flat[1].t;
    EXPECT_OK(qkv_attention_run(op, &io, NULL));
}

/* The former plan is in force, to the bit. */
static void expect_former_plan(void)
{
    float o[TOKENS * HEADS * DIM];
    compute(o);
    assert_memory_equal(o, planned_o, sizeof o);
}

enum { AXIS_0 = 1, AXIS_1 = 2 }; /* bits */

static const bad_call plans[] = {
    {.what = "plan of CSR",
     .run = plan_csr,
     .entries = csr_entries,
     .args = {ARG("qo_indptr", I32, SHAPE(3), .init = qo_indptr, .also = "kv_indptr",
                  .longer = AXIS_0),
              ARG("kv_indptr", I32, SHAPE(3), .init = kv_indptr),
              ARG("kv_indices", I32, SHAPE(3), .init = kv_indices, .longer = AXIS_0),
              ARG("kv_last_page_len", I32, SHAPE(2), .init = kv_last_page_len),
              ARG("qo_pos", I32, SHAPE(2), .init = qo_pos, .optional = true)}},
    {.what = "plan of a block table",
     .run = plan_table,
     .entries = table_entries,
     .args = {ARG("qo_indptr", I32, SHAPE(3), .init = qo_indptr, .also = "block_table",
                  .longer = AXIS_0),
              ARG("block_table", I32, SHAPE(2, 2), .init = block_table, .longer = AXIS_1,
                  .also = "kv_lens"),
              ARG("kv_lens", I32, SHAPE(2), .init = kv_lens)}},
    {.what = "plan of ragged keys",
     .run = plan_ragged,
     .entries = ragged_entries,
     .args = {ARG("qo_indptr", I32, SHAPE(3), .init = qo_indptr, .also = "kv_indptr",
                  .longer = AXIS_0),
              ARG("kv_indptr", I32, SHAPE(3), .init = ragged_indptr)}},
    {.what = "plan with a mask",
     .run = plan_mask,
     .entries = mask_entries,
     .args = {ARG("mask_bits", U8, SHAPE(3), .init = mask_bits, .longer = AXIS_0),
              ARG("mask_indptr", I64, SHAPE(3), .init = mask_indptr)}},
    {.what = "plan of sparse blocks",
     .run = plan_bsr,
     .entries = bsr_entries,
     .args = {ARG("bsr_indptr", I32, SHAPE(1, 4), .init = bsr_indptr, .longer = AXIS_0),
              ARG("bsr_indices", I32, SHAPE(4), .init = bsr_indices, .also = "bsr_mask"),
              ARG("bsr_mask", U8, SHAPE(4, 1), .init = bsr_mask, .optional = true)}},
};

static void plan_names_the_faulty_tensor_and_keeps_the_former_plan(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(q); i++) q[i] = (float)test_uniform(1);
    for (size_t i = 0; i < COUNT(kv[0]); i++)
        for (int j = 0; j < 2; j++) kv[j][i] = (float)test_uniform(1);
    for (size_t i = 0; i < COUNT(plans); i++) {
        qkv_attention_spec spec = plain_spec(plans[i].run == plan_ragged ? 0 : PAGE);
        if (plans[i].run == plan_mask) spec.mask = QKV_MASK_CUSTOM;
        EXPECT_OK(qkv_attention_create(ctx, &spec, &limits, NULL, &op));
        bad_call call = plans[i];
        call.no_context = true;
        DLTensor *good[BAD_MAX_ARGS];
        bad_block blocks[BAD_MAX_ARGS] = {{.bytes = 0}};
        for (int j = 0; j < bad_num_args(&call); j++) {
            bad_block_new(&blocks[j], &call.args[j]);
            good[j] = &blocks[j].t;
        }
        EXPECT_OK(call.run(good));
        compute(planned_o);
        call.after = expect_former_plan;
        bad_check(&call);
        for (int j = 0; j < bad_num_args(&call); j++) bad_block_free(&blocks[j]);
        qkv_attention_destroy(op);
    }
}

/* A plan that fails late, when its groups are made, leaves the former one in force too. */
static void plan_without_room_keeps_the_former_plan(void **state)
{
    (void)state;
    const qkv_attention_spec spec = plain_spec(PAGE);
    qkv_attention_limits few = limits;
    few.max_split_rows = 1;
    few.max_levels = 2;
    few.max_row_blocks = 0;
    EXPECT_OK(qkv_attention_create(ctx, &spec, &few, NULL, &op));
    DLTensor *const good[] = {TENSOR(qo_indptr, QKV_I32, 3), TENSOR(block_table, QKV_I32, 2, 2),
                              TENSOR(kv_lens, QKV_I32, 2)};
    EXPECT_OK(plan_table(good));
    compute(planned_o);
    int32_t shared_qo[] = {0, 3}, shared_len[] = {4}, own_len[] = {1, 2};
    const qkv_kv_index levels[] = {{QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(shared_qo, QKV_I32, 2),
                                    .block_table = TENSOR(block_table, QKV_I32, 1, 1),
                                    .kv_lens = TENSOR(shared_len, QKV_I32, 1)},
                                   {QKV_KV_INDEX_INIT, .qo_indptr = good[0],
                                    .block_table = TENSOR(kv_indices, QKV_I32, 2, 1),
                                    .kv_lens = TENSOR(own_len, QKV_I32, 2)}};
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 2, .levels = levels};
    EXPECT_FAIL(QKV_ERR_INVALID, "max_split_rows: expected at least",
                qkv_attention_plan(op, &batch, NULL));
    expect_former_plan();
    qkv_attention_destroy(op);
}

/* ---- run ------------------------------------------------------------------------------------ */

static qkv_status run_layer(DLTensor *const *t)
{
    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT,
                                 .q = t[0],
                                 .k = t[1],
                                 .v = t[2],
                                 .o = t[3],
                                 .lse = t[4],
                                 .sink = t[5],
                                 .alibi_slopes = t[6],
                                 .q_scale = {.tensor = t[7]},
                                 .k_scale = {.tensor = t[8]},
                                 .v_scale = {.tensor = t[9]},
                                 .o_scale = {.tensor = t[10]}};
    return qkv_attention_run(op, &io, NULL);
}

static qkv_status run_combined(DLTensor *const *t)
{
    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT, .q = t[0], .k = t[1], .o = t[2]};
    return qkv_attention_run(op, &io, NULL);
}

static const bad_entry layer_entries[] = {
    {"q_scale", 0, 0, NULL},        {"q_scale", 3, NAN, NULL},       {"k_scale", 1, -1, NULL},
    {"v_scale", 0, INFINITY, NULL}, {"o_scale", 2, -INFINITY, NULL}, {0},
};

enum { SCALES = 0x780 }; /* bits of the arguments that run has read before it computes */

static const bad_call layers[] = {
    {.what = "run",
     .run = run_layer,
     .entries = layer_entries,
     .no_context = true,
     .args = {ARG("q", F32, SHAPE(TOKENS, HEADS, DIM), .longer = AXIS_0),
              ARG("k", F32, SHAPE(PAGES, PAGE, KV_HEADS, DIM), .longer = AXIS_0),
              ARG("v", F32, SHAPE(PAGES, PAGE, KV_HEADS, DIM), .longer = AXIS_0, .also = "k"),
              ARG("o", F32, SHAPE(TOKENS, HEADS, DIM), .output = true, .longer = AXIS_0,
                  .apart = SCALES),
              ARG("lse", F32, SHAPE(TOKENS, HEADS), .output = true, .longer = AXIS_0,
                  .optional = true, .strided = true, .apart = SCALES),
              ARG("sink", F32, SHAPE(HEADS), .init = slopes),
              ARG("alibi_slopes", F32, SHAPE(HEADS), .init = slopes),
              ARG("q_scale", F32, SHAPE(HEADS), .init = scales, .optional = true),
              ARG("k_scale", F32, SHAPE(KV_HEADS), .init = scales, .optional = true,
                  .shorter = AXIS_0),
              ARG("v_scale", F32, SHAPE(KV_HEADS), .init = scales, .optional = true,
                  .shorter = AXIS_0),
              ARG("o_scale", F32, SHAPE(HEADS), .init = scales, .optional = true)}},
    {.what = "run of a combined cache",
     .run = run_combined,
     .no_context = true,
     .args = {ARG("q", F32, SHAPE(TOKENS, HEADS, DIM), .longer = AXIS_0),
              ARG("k", F32, SHAPE(PAGES, 2, PAGE, KV_HEADS, DIM), .longer = AXIS_0),
              ARG("o", F32, SHAPE(TOKENS, HEADS, DIM), .output = true, .longer = AXIS_0)}},
};

static void run_names_the_faulty_tensor(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(layers); i++) {
        qkv_attention_spec spec = plain_spec(PAGE);
        if (layers[i].run == run_layer) {
            spec.features = QKV_FEATURE_ALIBI;
            spec.flags = QKV_ATTENTION_HAS_SINK;
        }
        EXPECT_OK(qkv_attention_create(ctx, &spec, &limits, NULL, &op));
        EXPECT_OK(plan_table((DLTensor *[]){TENSOR(qo_indptr, QKV_I32, 3),
                                            TENSOR(block_table, QKV_I32, 2, 2),
                                            TENSOR(kv_lens, QKV_I32, 2)}));
        bad_check(&layers[i]);
        qkv_attention_destroy(op);
    }
}

/* ---- order and NULL -------------------------------------------------------------------------- */

static void calls_without_their_object_say_so(void **state)
{
    (void)state;
    const qkv_attention_spec spec = plain_spec(PAGE);
    qkv_workspace_size size = {1, 2, 3};
    char reasons[8] = "before";
    const qkv_status bad = QKV_ERR_INVALID;
    qkv_attention *none = (qkv_attention *)&size;
    EXPECT_FAIL(bad, "ctx: expected", qkv_attention_can_run(NULL, &spec, &limits, reasons, 8));
    EXPECT_FAIL(bad, "spec: expected", qkv_attention_can_run(ctx, NULL, &limits, reasons, 8));
    EXPECT_FAIL(bad, "limits: expected", qkv_attention_can_run(ctx, &spec, NULL, reasons, 8));
    EXPECT_FAIL(bad, "ctx: expected", qkv_attention_workspace_size(NULL, &spec, &limits, &size));
    EXPECT_FAIL(bad, "spec: expected", qkv_attention_workspace_size(ctx, NULL, &limits, &size));
    EXPECT_FAIL(bad, "limits: expected", qkv_attention_workspace_size(ctx, &spec, NULL, &size));
    EXPECT_FAIL(bad, "out: expected", qkv_attention_workspace_size(ctx, &spec, &limits, NULL));
    EXPECT_FAIL(bad, "ctx: expected", qkv_attention_warm_up(NULL, &spec, &limits));
    EXPECT_FAIL(bad, "spec: expected", qkv_attention_warm_up(ctx, NULL, &limits));
    EXPECT_FAIL(bad, "limits: expected", qkv_attention_warm_up(ctx, &spec, NULL));
    EXPECT_FAIL(bad, "out: expected", qkv_attention_create(ctx, &spec, &limits, NULL, NULL));
    EXPECT_FAIL(bad, "ctx: expected", qkv_attention_create(NULL, &spec, &limits, NULL, &none));
    assert_null(none);
    EXPECT_FAIL(bad, "attention: expected", qkv_attention_plan(NULL, NULL, NULL));
    EXPECT_FAIL(bad, "attention: expected", qkv_attention_run(NULL, NULL, NULL));
    assert_string_equal(reasons, "before");
    assert_true(size.plan_bytes == 1 && size.scratch_bytes == 2 && size.pinned_bytes == 3);
    EXPECT_OK(qkv_attention_can_run(ctx, &spec, &limits, NULL, 8));
    EXPECT_OK(qkv_attention_can_run(ctx, &spec, &limits, reasons, 0));
    assert_string_equal(reasons, "before");
    EXPECT_OK(qkv_attention_warm_up(ctx, &spec, &limits));

    qkv_attention_destroy(NULL);
    qkv_context_destroy(NULL);
    assert_string_equal(qkv_context_device_name(NULL), "");
    assert_int_equal(qkv_context_num_threads(NULL), 0);
    assert_null(qkv_cpu_level(-1, NULL));
    assert_null(qkv_cpu_level(INT32_MIN, NULL));
    assert_null(qkv_cpu_level(INT32_MAX, NULL));
    assert_non_null(qkv_cpu_level(0, NULL));
    qkv_enumerate_kernels(NULL, NULL);
    for (int status = -1; status < 100; status += 101)
        assert_string_equal(qkv_status_name((qkv_status)status), "unknown status");

    EXPECT_OK(qkv_attention_create(ctx, &spec, &limits, NULL, &op));
    EXPECT_FAIL(bad, "attention: expected a plan", qkv_attention_run(op, NULL, NULL));
    EXPECT_FAIL(bad, "batch: expected", qkv_attention_plan(op, NULL, NULL));
    EXPECT_FAIL(bad, "attention: expected a plan", qkv_attention_run(op, NULL, NULL));
    qkv_attention_destroy(op);
}

/* ---- workspaces ------------------------------------------------------------------------------ */

static void create_names_the_faulty_block(void **state)
{
    (void)state;
    const qkv_attention_spec spec = plain_spec(PAGE);
    qkv_workspace_size size;
    EXPECT_OK(qkv_attention_workspace_size(ctx, &spec, &limits, &size));
    char *const block = aligned_alloc(64, (size_t)(size.plan_bytes + size.scratch_bytes));
    assert_non_null(block);
    const qkv_workspace good = {QKV_WORKSPACE_INIT, .plan = block,
                                .scratch = block + size.plan_bytes, .plan_bytes = size.plan_bytes,
                                .scratch_bytes = size.scratch_bytes};
    qkv_workspace w[9];
    for (size_t i = 0; i < COUNT(w); i++) w[i] = good;
    w[0].plan = NULL;
    w[1].plan = block + 32;
    w[2].scratch = NULL;
    w[3].scratch = block + size.plan_bytes + 1;
    w[4].plan_bytes--;
    w[5].scratch_bytes = 0;
    w[6].reserved = 1;
    w[7].scratch = block;
    w[8].scratch = block + size.plan_bytes - 64;
    static const struct {
        qkv_status status;
        const char *text;
    } rows[] = {{QKV_ERR_INVALID, "workspace.plan: expected a block aligned to 64"},
                {QKV_ERR_INVALID, "workspace.plan: expected a block aligned to 64"},
                {QKV_ERR_INVALID, "workspace.scratch: expected a block aligned to 64"},
                {QKV_ERR_INVALID, "workspace.scratch: expected a block aligned to 64"},
                {QKV_ERR_MEMORY, "workspace.plan_bytes: expected at least"},
                {QKV_ERR_MEMORY, "workspace.scratch_bytes: expected at least"},
                {QKV_ERR_INVALID, "workspace.reserved: expected 0, got 1"},
                {QKV_ERR_INVALID, "workspace.scratch: expected a block apart from workspace.plan"},
                {QKV_ERR_INVALID, "workspace.scratch: expected a block apart from workspace.plan"}};
    for (size_t i = 0; i < COUNT(w); i++) {
        EXPECT_FAIL(rows[i].status, rows[i].text,
                    qkv_attention_create(ctx, &spec, &limits, &w[i], &op));
        assert_null(op);
    }
    EXPECT_OK(qkv_attention_create(ctx, &spec, &limits, &good, &op)); /* side by side is fine */
    qkv_attention_destroy(op);
    free(block);
}

/* ---- extremes -------------------------------------------------------------------------------- */

/* The largest of everything is counted without overflow: refused by name, or out of memory. */
static void limits_at_their_largest_are_counted(void **state)
{
    (void)state;
    static const uint32_t flags[] = {0, QKV_ATTENTION_BATCH_INVARIANT};
    static const int32_t page_sizes[] = {0, 1, 1 << 24};
    for (int i = 0; i < 12; i++) {
        qkv_attention_spec spec = plain_spec(page_sizes[i % 3]);
        spec.flags = flags[i / 3 % 2];
        spec.num_kv_heads = 1024;
        spec.num_qo_heads = 1024 * 512;
        spec.head_dim_qk = spec.head_dim_vo = 512;
        const qkv_attention_limits most = {
            QKV_ATTENTION_LIMITS_INIT,  .max_requests = INT32_MAX,
            .max_tokens = 1 << 30,      .max_qo_len = INT32_MAX,
            .max_workers = 4096,        .max_kv_len = 1 << 30,
            .max_pages = INT32_MAX,     .max_split_rows = i < 6 ? 0 : INT32_MAX,
            .pool_pages = INT32_MAX,    .max_levels = spec.flags ? 1 : 16,
            .max_row_blocks = INT32_MAX};
        qkv_workspace_size size = {1, 2, 3};
        EXPECT_FAIL(QKV_ERR_INVALID, "max_tokens: expected at most 2^31 - 1 work items",
                    qkv_attention_workspace_size(ctx, &spec, &most, &size));
        assert_true(size.plan_bytes == 1);
    }
}

/* Any position may be asked for: none overflows. */
static void run_at_the_last_positions(qkv_context *context, void *user)
{
    (void)user;
    static const int32_t first[][2] = {
        {INT32_MAX, INT32_MAX}, {INT32_MIN, INT32_MIN}, {INT32_MIN, INT32_MAX}};
    static const int32_t windows[] = {-1, 0, INT32_MAX};
    const qkv_rope_spec rope = {QKV_ROPE_SPEC_INIT};
    for (size_t i = 0; i < 18 * COUNT(first); i++) {
        qkv_attention_spec spec = plain_spec(PAGE);
        spec.mask = i / 3 % 2 ? QKV_MASK_CAUSAL : QKV_MASK_NONE;
        spec.features = QKV_FEATURE_WINDOW | (i % 2 ? QKV_FEATURE_ROPE : 0);
        spec.rope = i % 2 ? &rope : NULL;
        spec.window_left = windows[i / 6 % 3];
        spec.window_right = windows[i / 18];
        EXPECT_OK(qkv_attention_create(context, &spec, &limits, NULL, &op));
        int32_t pos[2];
        memcpy(pos, first[i % 3], sizeof pos);
        DLTensor *const t[] = {TENSOR(qo_indptr, QKV_I32, 3), TENSOR(kv_indptr, QKV_I32, 3),
                               TENSOR(kv_indices, QKV_I32, 3), TENSOR(kv_last_page_len, QKV_I32, 2),
                               TENSOR(pos, QKV_I32, 2)};
        EXPECT_OK(plan_csr(t));
        float o[TOKENS * HEADS * DIM];
        compute(o);
        for (size_t j = 0; j < COUNT(o); j++) assert_true(isfinite(o[j]));
        qkv_attention_destroy(op);
    }
}

static void positions_at_their_extremes_are_computed(void **state)
{
    (void)state;
    test_every_level(1, run_at_the_last_positions, NULL);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plan_names_the_faulty_tensor_and_keeps_the_former_plan),
        cmocka_unit_test(plan_without_room_keeps_the_former_plan),
        cmocka_unit_test(run_names_the_faulty_tensor),
        cmocka_unit_test(calls_without_their_object_say_so),
        cmocka_unit_test(create_names_the_faulty_block),
        cmocka_unit_test(limits_at_their_largest_are_counted),
        cmocka_unit_test(positions_at_their_extremes_are_computed),
    };
    return cmocka_run_group_tests_name("bad_input_attention", tests, bad_open, bad_close);
}
