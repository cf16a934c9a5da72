/* test_device_plan.c - plans of arrays on the device are those of the host, inside graphs too, and what is
 * outside of the limits is refused there. Needs a GPU.
 *
 * All memory of the tests is the GPU's too: an array is on the device if its tensor says so.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_case_random.h"
#include "graphs.h"
#include "plan_bytes.h"

static const DLDevice gpu = {kDLCUDA, 0};
static qkv_context *ctx;

/* ---- random batches ----------------------------------------------------------------------- */

/* A copy of what an operator's plan is on the device. */
static qi_plan copy_plan(const qkv_attention *a, char *copy, size_t bytes)
{
    const char *block = a->cuda.block;
    qi_plan p = a->cuda.plan;
    memcpy(copy, block, bytes);
#define MOVE(field) p.field = (void *)(copy + ((char *)p.field - block))
    MOVE(header), MOVE(work_indptr), MOVE(work), MOVE(merge), MOVE(ticket), MOVE(groups);
    MOVE(rows), MOVE(row_merge), MOVE(token_request), MOVE(qo_indptr), MOVE(kv_len), MOVE(qo_pos);
    MOVE(mask_first), MOVE(pages);
#undef MOVE
    return p;
}

static const any_features features = {.custom_mask = 4, .invariant = 4, .levels = 2};

/* In f32, so that one kernel serves all: NVRTC takes a second for each of the others. */
static case_config any_plain_config(void)
{
    qkv_attention_spec spec = any_spec(&features);
    spec.dtype_q = spec.dtype_kv = spec.dtype_o = QKV_F32;
    return any_config(spec, &features);
}

static void planners_write_the_same_bytes(void **state)
{
    (void)state;
    for (int64_t i = 0; i < case_count(2000); i++) {
        const case_config config = any_plain_config();
        attn_case c;
        case_build_index(&c, &config);
        case_op op = case_op_new(ctx, &c);
        char *copy = malloc(op.workspace.plan_bytes);
        EXPECT_OK(qkv_attention_plan(op.op, &c.batch, NULL));
        const qi_plan want = copy_plan(op.op, copy, op.workspace.plan_bytes);
        memset(op.op->cuda.plan.work, 0x5a, (size_t)want.header->num_work * sizeof *want.work);
        case_arrays_on(&c, gpu);
        EXPECT_OK(qkv_attention_plan(op.op, &c.batch, NULL));
        EXPECT_OK(qkv_attention_status(op.op, NULL));
        expect_same_plan(op.op, &want, &op.op->cuda.plan, num_groups_of(&c.batch), i);
        if (c.batch.mask_bits)
            assert_memory_equal(qi_attention_on_device(op.op, op.op->mask_indptr),
                                case_data(&c.mask_indptr),
                                (size_t)c.config.num_requests * sizeof(int64_t));
        free(copy);
        case_op_free(&op);
        case_free_index(&c);
    }
}

static void runs_give_the_same_bits(void **state)
{
    (void)state;
    for (int64_t i = 0; i < case_count(200); i++) {
        const case_config config = any_plain_config();
        attn_case c;
        case_build(&c, &config);
        if (c.tokens == 0) {
            case_free(&c);
            continue;
        }
        case_op op = case_op_new(ctx, &c);
        EXPECT_OK(qkv_attention_plan(op.op, &c.batch, NULL));
        case_run(&c, op.op);
        char *want_o = malloc(case_o_bytes(&c) + 1), *want_lse = malloc(case_lse_bytes(&c) + 1);
        memcpy(want_o, c.got_o, case_o_bytes(&c));
        memcpy(want_lse, c.got_lse, case_lse_bytes(&c));
        case_arrays_on(&c, gpu);
        if (c.rows < c.limits.max_tokens || test_below(2)) c.batch.max_tokens = (int32_t)c.tokens;
        EXPECT_OK(qkv_attention_plan(op.op, &c.batch, NULL));
        case_run(&c, op.op);
        EXPECT_OK(qkv_attention_status(op.op, NULL));
        assert_memory_equal(c.got_o, want_o, case_o_bytes(&c));
        assert_memory_equal(c.got_lse, want_lse, case_lse_bytes(&c));
        free(want_o), free(want_lse);
        case_op_free(&op);
        case_free(&c);
    }
}

/* ---- a batch of slots, in place ----------------------------------------------------------- */

enum {
    SLOTS = 6,
    GROUPS = 2,
    COLUMNS = 12,
    PAGE = 4,
    POOL = 90,
    ROWS = 24,
    HEADS = 4,
    KV_HEADS = 2,
    DIM = 64,
    MASK_BYTES = 4096,
};
enum { TABLE, CSR, LEVELS, MASKED, NUM_FORMS };

/* Where index arrays stay, and what is in them changes. */
static struct {
    int32_t qo_indptr[SLOTS + 1], kv_lens[SLOTS], table[SLOTS][COLUMNS];
    int32_t kv_indptr[SLOTS + 1], kv_indices[SLOTS * COLUMNS], kv_last_page_len[SLOTS];
    int32_t shared_indptr[GROUPS + 1], shared_lens[GROUPS], shared_table[GROUPS][COLUMNS];
    int64_t mask_indptr[SLOTS + 1];
    uint8_t mask_bits[MASK_BYTES];
} at;

static float q[ROWS * HEADS * DIM], k[POOL * PAGE * KV_HEADS * DIM],
    v[POOL * PAGE * KV_HEADS * DIM];
static float o[2][ROWS * HEADS * DIM], lse[2][ROWS * HEADS];

/* Slots without rows are free, those without keys see nothing. */
static void draw_step(void)
{
    int32_t listed = 0;
    at.mask_indptr[0] = 0;
    for (int32_t s = 0; s < SLOTS; s++) {
        const int32_t left = ROWS - at.qo_indptr[s];
        int32_t rows = (int32_t)(test_below(3) ? test_below(3) : test_below(12));
        if (rows > left) rows = left;
        const int32_t keys = (int32_t)(test_below(5) ? test_below(COLUMNS * PAGE + 1) : 0);
        const int32_t pages = (keys + PAGE - 1) / PAGE;
        at.qo_indptr[s + 1] = at.qo_indptr[s] + rows;
        at.kv_lens[s] = keys;
        at.kv_indptr[s] = listed;
        at.kv_last_page_len[s] = keys ? (keys - 1) % PAGE + 1 : 0;
        for (int32_t i = 0; i < COLUMNS; i++) at.table[s][i] = (int32_t)test_below(POOL);
        memcpy(at.kv_indices + listed, at.table[s], (size_t)pages * sizeof(int32_t));
        listed += pages;
        at.mask_indptr[s + 1] = at.mask_indptr[s] + (rows * keys + 7) / 8;
    }
    at.kv_indptr[SLOTS] = listed;
    at.shared_indptr[1] = at.qo_indptr[test_below(SLOTS + 1)];
    at.shared_indptr[GROUPS] = at.qo_indptr[SLOTS];
    for (int32_t g = 0; g < GROUPS; g++) {
        at.shared_lens[g] = (int32_t)(test_below(4) ? test_below(COLUMNS * PAGE + 1) : 0);
        for (int32_t i = 0; i < COLUMNS; i++) at.shared_table[g][i] = (int32_t)test_below(POOL);
    }
    for (int i = 0; i < MASK_BYTES; i++) at.mask_bits[i] = (uint8_t)test_u64();
}

/* An operator, and its batch of `at` as arrays of the host and of the device. */
typedef struct slots {
    qkv_attention *op;
    test_tensor tensors[2][12];
    qkv_kv_index levels[2][2];
    qkv_attention_batch batch[2];
    test_tensor q, k, v, o[2], lse[2];
    qkv_attention_io io[2];
} slots;

static DLTensor *on(test_tensor *x, DLDevice device)
{
    x->t.device = device;
    return &x->t;
}

static void set_batch(slots *s, int form, int which)
{
    const DLDevice device = which ? gpu : test_device();
    test_tensor *t = s->tensors[which];
#define ARRAY(data, ...) on(test_tensor_init(t++, (data), QKV_I32, TEST_SHAPE(__VA_ARGS__)), device)
    qkv_kv_index own = {QKV_KV_INDEX_INIT, .qo_indptr = ARRAY(at.qo_indptr, SLOTS + 1)};
    if (form == CSR) {
        own.kv_indptr = ARRAY(at.kv_indptr, SLOTS + 1);
        own.kv_indices = ARRAY(at.kv_indices, SLOTS * COLUMNS);
        own.kv_last_page_len = ARRAY(at.kv_last_page_len, SLOTS);
    } else {
        own.block_table = ARRAY(at.table, SLOTS, COLUMNS);
        own.kv_lens = ARRAY(at.kv_lens, SLOTS);
    }
    s->levels[which][form == LEVELS] = own;
    if (form == LEVELS) {
        qkv_kv_index shared = {QKV_KV_INDEX_INIT, .qo_indptr = ARRAY(at.shared_indptr, GROUPS + 1)};
        shared.block_table = ARRAY(at.shared_table, GROUPS, COLUMNS);
        shared.kv_lens = ARRAY(at.shared_lens, GROUPS);
        s->levels[which][0] = shared;
    }
#undef ARRAY
    s->batch[which] = (qkv_attention_batch){
        QKV_ATTENTION_BATCH_INIT, .num_levels = 1 + (form == LEVELS), .levels = s->levels[which]};
    if (form != MASKED) return;
    test_tensor_init(t, at.mask_bits, QKV_U8, TEST_SHAPE(MASK_BYTES));
    s->batch[which].mask_bits = on(t++, device);
    test_tensor_init(t, at.mask_indptr, QKV_I64, TEST_SHAPE(SLOTS + 1));
    s->batch[which].mask_indptr = on(t, device);
}

static void slots_new(slots *s, int form, DLDataType dtype)
{
    qkv_attention_spec spec = case_spec(HEADS, KV_HEADS, DIM, PAGE);
    spec.dtype_q = spec.dtype_kv = spec.dtype_o = dtype;
    if (form == MASKED) spec.mask = QKV_MASK_CUSTOM;
    const qkv_attention_limits limits = {QKV_ATTENTION_LIMITS_INIT,
                                         .max_requests = SLOTS,
                                         .max_tokens = ROWS,
                                         .max_qo_len = 14,
                                         .max_kv_len = 2 * COLUMNS * PAGE,
                                         .max_pages = (SLOTS + GROUPS) * COLUMNS,
                                         .max_workers = 7,
                                         .max_levels = 1 + (form == LEVELS)};
    EXPECT_OK(qkv_attention_create(ctx, &spec, &limits, NULL, &s->op));
    memset(&at, 0, sizeof at);
    for (int i = 0; i < ROWS * HEADS * DIM; i++) test_put(q, dtype, i, test_uniform(1));
    for (int i = 0; i < POOL * PAGE * KV_HEADS * DIM; i++) {
        test_put(k, dtype, i, test_uniform(1));
        test_put(v, dtype, i, test_uniform(1));
    }
    test_tensor_init(&s->q, q, dtype, TEST_SHAPE(ROWS, HEADS, DIM));
    test_tensor_init(&s->k, k, dtype, TEST_SHAPE(POOL, PAGE, KV_HEADS, DIM));
    test_tensor_init(&s->v, v, dtype, TEST_SHAPE(POOL, PAGE, KV_HEADS, DIM));
    for (int i = 0; i < 2; i++) {
        set_batch(s, form, i);
        test_tensor_init(&s->o[i], o[i], dtype, TEST_SHAPE(ROWS, HEADS, DIM));
        test_tensor_init(&s->lse[i], lse[i], QKV_F32, TEST_SHAPE(ROWS, HEADS));
        s->io[i] = (qkv_attention_io){QKV_ATTENTION_IO_INIT, .q = &s->q.t,    .k = &s->k.t,
                                      .v = &s->v.t,          .o = &s->o[i].t, .lse = &s->lse[i].t};
    }
}

/* Output 0: by a plan of the host. */
static void run_on_host_plan(slots *s)
{
    memset(o, 0xff, sizeof o);
    memset(lse, 0xff, sizeof lse);
    EXPECT_OK(qkv_attention_plan(s->op, &s->batch[0], NULL));
    EXPECT_OK(qkv_attention_run(s->op, &s->io[0], NULL));
}

static void expect_same_outputs(void)
{
    assert_int_equal(test_synchronize(), 0);
    assert_memory_equal(o[1], o[0], sizeof o[0]);
    assert_memory_equal(lse[1], lse[0], sizeof lse[0]);
}

/* ---- graphs ------------------------------------------------------------------------------- */

static void graphs_replay_with_other_lengths_and_tables(void **state)
{
    (void)state;
    for (int i = 0; i < 2 * NUM_FORMS; i++) {
        const int form = i % NUM_FORMS;
        slots s;
        slots_new(&s, form, i < NUM_FORMS ? QKV_F32 : QKV_BF16);
        draw_step();
        void *stream = graph_stream();
        graph_begin(stream);
        assert_int_equal(qkv_attention_plan(s.op, &s.batch[1], stream), QKV_OK);
        assert_int_equal(qkv_attention_run(s.op, &s.io[1], stream), QKV_OK);
        assert_int_equal(qkv_attention_run(s.op, &s.io[1], stream), QKV_OK);
        void *graph = graph_end(stream);
        for (int step = 0; step < 12; step++) {
            draw_step();
            run_on_host_plan(&s);
            graph_launch(graph, stream);
            expect_same_outputs();
            EXPECT_OK(qkv_attention_status(s.op, stream)); /* of the host's plan */
        }
        graph_free(graph, stream);
        qkv_attention_destroy(s.op);
    }
}

/* Runs that were captured under one plan serve every later one, whoever makes it. */
static void captured_runs_serve_later_plans(void **state)
{
    (void)state;
    for (int i = 0; i < 2 * NUM_FORMS; i++) {
        const int form = i % NUM_FORMS;
        slots s;
        slots_new(&s, form, i < NUM_FORMS ? QKV_F32 : QKV_BF16);
        draw_step();
        run_on_host_plan(&s);
        if (form % 2) EXPECT_OK(qkv_attention_plan(s.op, &s.batch[1], NULL));
        void *stream = graph_stream();
        graph_begin(stream);
        assert_int_equal(qkv_attention_run(s.op, &s.io[1], stream), QKV_OK);
        void *graph = graph_end(stream);
        for (int step = 0; step < 8; step++) {
            draw_step();
            run_on_host_plan(&s);
            EXPECT_OK(qkv_attention_plan(s.op, &s.batch[step % 2], stream));
            graph_launch(graph, stream);
            expect_same_outputs();
        }
        graph_free(graph, stream);
        qkv_attention_destroy(s.op);
    }
}

static void host_plans_are_refused_while_capturing(void **state)
{
    (void)state;
    slots s;
    slots_new(&s, TABLE, QKV_F32);
    draw_step();
    run_on_host_plan(&s);
    void *stream = graph_stream();
    graph_begin(stream);
    assert_int_equal(qkv_attention_plan(s.op, &s.batch[0], stream), QKV_ERR_INVALID);
    assert_non_null(strstr(qkv_last_error(), "stream: expected one that is not being captured"));
    assert_int_equal(qkv_attention_run(s.op, &s.io[1], stream), QKV_OK); /* the plan before */
    void *graph = graph_end(stream);
    graph_launch(graph, stream);
    expect_same_outputs();
    graph_free(graph, stream);
    qkv_attention_destroy(s.op);
}

/* ---- plans one after another ----------------------------------------------------------------- */

/* More plans than stages in flight, none waited for. */
static void host_plans_follow_each_other(void **state)
{
    (void)state;
    enum { STEPS = 9 };
    static float want[STEPS][ROWS * HEADS * DIM], got[STEPS][ROWS * HEADS * DIM];
    slots s;
    slots_new(&s, TABLE, QKV_F32);
    memset(want, 0xff, sizeof want);
    memset(got, 0xff, sizeof got);
    const uint64_t seed = test_state;
    for (int round = 0; round < 2; round++) {
        test_state = seed;
        for (int step = 0; step < STEPS; step++) {
            draw_step();
            s.o[0].t.data = round ? got[step] : want[step];
            assert_int_equal(qkv_attention_plan(s.op, &s.batch[0], NULL), QKV_OK);
            assert_int_equal(qkv_attention_run(s.op, &s.io[0], NULL), QKV_OK);
            if (round == 0) assert_int_equal(test_synchronize(), 0);
        }
    }
    assert_int_equal(test_synchronize(), 0);
    assert_memory_equal(got, want, sizeof want);
    qkv_attention_destroy(s.op);
}

/* ---- outside of the limits ------------------------------------------------------------------ */

/* The plan's call succeeds; then o and lse stay as they are, and the status says why. */
static void expect_refused(slots *s, const char *message)
{
    memset(o, 0xff, sizeof o);
    memset(lse, 0xff, sizeof lse);
    EXPECT_OK(qkv_attention_plan(s->op, &s->batch[1], NULL));
    EXPECT_OK(qkv_attention_run(s->op, &s->io[1], NULL));
    expect_same_outputs(); /* nothing: both are as before */
    EXPECT_FAIL(QKV_ERR_INVALID, message, qkv_attention_status(s->op, NULL));
    assert_int_equal(s->op->found->num_work, 0);
}

/* Plans and runs as if nothing had been. */
static void expect_accepted(slots *s)
{
    run_on_host_plan(s);
    EXPECT_OK(qkv_attention_plan(s->op, &s->batch[1], NULL));
    EXPECT_OK(qkv_attention_run(s->op, &s->io[1], NULL));
    EXPECT_OK(qkv_attention_status(s->op, NULL));
    expect_same_outputs();
}

static void draw_full_step(void)
{
    do draw_step();
    while (at.qo_indptr[SLOTS] < 5 || at.kv_lens[2] < 9 || at.qo_indptr[2] == at.qo_indptr[3]);
}

static void limits_hold_on_the_device(void **state)
{
    (void)state;
    const struct {
        int form;
        int32_t *at, value;
        const char *message;
    } cases[] = {
        {TABLE, &at.qo_indptr[0], 1,
         "qo_indptr: expected entries from 0 on that do not fall (request 0"},
        {TABLE, &at.qo_indptr[0], -1, "qo_indptr: expected entries from 0 on"},
        {TABLE, &at.qo_indptr[SLOTS], ROWS + 1,
         "qo_indptr: expected at most max_tokens rows (request 5"},
        {TABLE, &at.qo_indptr[SLOTS], -3,
         "qo_indptr: expected entries from 0 on that do not fall (request 5"},
        {TABLE, &at.kv_lens[3], -1, "kv_lens: expected >= 0 (request 3 of level 0"},
        {TABLE, &at.kv_lens[4], COLUMNS * PAGE + 1, "kv_lens: expected at most what the columns"},
        {TABLE, &at.kv_lens[4], 0x7fffffff, "kv_lens: expected at most what the columns"},
        {CSR, &at.kv_indptr[0], -1, "kv_indptr: expected entries >= 0 that do not fall (request 0"},
        {CSR, &at.kv_indptr[SLOTS], -1,
         "kv_indptr: expected entries >= 0 that do not fall (request 5"},
        {CSR, &at.kv_indptr[SLOTS], 99999,
         "kv_indices: expected as many entries as kv_indptr says (request 5"},
        {CSR, &at.kv_last_page_len[2], 0, "kv_last_page_len: expected 1 to page_size (request 2"},
        {CSR, &at.kv_last_page_len[2], PAGE + 1,
         "kv_last_page_len: expected 1 to page_size (request 2"},
        {LEVELS, &at.shared_indptr[GROUPS], ROWS,
         "qo_indptr: expected a group to end where one of the next level does (request 1 of level "
         "0"},
        {LEVELS, &at.shared_lens[1], -5, "kv_lens: expected >= 0 (request 1 of level 0"},
        {MASKED, (int32_t *)&at.mask_indptr[3], 0x7ffffff,
         "mask_indptr: expected a byte for every 8 (row, key) from an offset >= 0 on (request 3"},
        {MASKED, (int32_t *)&at.mask_indptr[SLOTS], MASK_BYTES + 1,
         "mask_bits: expected as many bytes as mask_indptr says (request 5"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        slots s;
        slots_new(&s, cases[i].form, QKV_F32);
        do draw_full_step();
        while (at.qo_indptr[SLOTS] == ROWS && cases[i].form == LEVELS);
        expect_accepted(&s);
        const int32_t kept = *cases[i].at;
        *cases[i].at = cases[i].value;
        expect_refused(&s, cases[i].message);
        *cases[i].at = kept;
        expect_accepted(&s);
        qkv_attention_destroy(s.op);
    }
}

/* Limits of their own: rows of a request, keys of one and of all levels, pages, tokens of the batch. */
static void every_limit_is_looked_at(void **state)
{
    (void)state;
    slots s;
    slots_new(&s, LEVELS, QKV_F32);
    draw_full_step();
    at.shared_lens[0] = at.shared_lens[1] = 7;
    expect_accepted(&s);
    qkv_attention_limits *l = &s.op->limits; /* a lower limit at the same memory */
    const qkv_attention_limits kept = *l;
    l->max_qo_len = 0;
    expect_refused(&s, "qo_indptr: expected at most max_qo_len rows a request (request ");
    *l = kept;
    l->max_kv_len = 8;
    expect_refused(&s, "levels: expected at most max_kv_len keys a request (request ");
    *l = kept;
    at.shared_lens[0] = at.shared_lens[1] = 48;
    l->max_kv_len = 48;
    expect_refused(&s,
                   "levels: expected at most max_kv_len keys a request over all levels (request ");
    *l = kept;
    l->max_pages = 2;
    expect_refused(&s, "levels: expected at most max_pages pages in use (on the device)");
    *l = kept;
    s.op->schedule.max_split_rows = 1;
    expect_refused(&s, "max_split_rows: expected as many partial rows");
    s.op->schedule.max_split_rows = kept.max_split_rows;
    s.batch[1].max_tokens = 1;
    expect_refused(&s, "qo_indptr: expected at most max_tokens rows");
    s.batch[1].max_tokens = at.qo_indptr[SLOTS];
    expect_accepted(&s);
    qkv_attention_destroy(s.op);
}

/* What the host sees at once. */
static void calls_name_what_the_device_cannot_do(void **state)
{
    (void)state;
    slots s;
    slots_new(&s, TABLE, QKV_F32);
    draw_step();
    EXPECT_FAIL(QKV_ERR_INVALID, "attention: expected a plan, got none",
                qkv_attention_status(s.op, NULL));
    qkv_attention_batch *b = &s.batch[1];
    b->detect_shared_prefix = 1;
    EXPECT_FAIL(QKV_ERR_INVALID, "detect_shared_prefix: expected 0 with arrays on the device",
                qkv_attention_plan(s.op, b, NULL));
    b->detect_shared_prefix = 0;
    b->max_tokens = ROWS + 1;
    EXPECT_FAIL(QKV_ERR_INVALID, "max_tokens: expected 0 to limits.max_tokens = 24, got 25",
                qkv_attention_plan(s.op, b, NULL));
    b->max_tokens = 0;
    s.batch[0].max_tokens = 5;
    EXPECT_FAIL(QKV_ERR_INVALID, "max_tokens: expected 0 with arrays on the host, got 5",
                qkv_attention_plan(s.op, &s.batch[0], NULL));
    s.batch[0].max_tokens = 0;
    DLTensor lens = *s.levels[1][0].kv_lens;
    lens.device = (DLDevice){kDLCPU, 0};
    qkv_kv_index mixed = s.levels[1][0];
    mixed.kv_lens = &lens;
    b->levels = &mixed;
    EXPECT_FAIL(QKV_ERR_INVALID, "kv_lens: expected a tensor on CUDA device 0",
                qkv_attention_plan(s.op, b, NULL));
    mixed = s.levels[1][0];
    mixed.bsr_rows = mixed.bsr_cols = 4;
    mixed.bsr_indptr = mixed.bsr_indices = mixed.qo_indptr;
    EXPECT_FAIL(QKV_ERR_UNSUPPORTED, "bsr_indptr: expected arrays on the host",
                qkv_attention_plan(s.op, b, NULL));
    b->levels = s.levels[1];
    EXPECT_OK(qkv_attention_plan(s.op, b, NULL));
    s.o[1].shape[0] = ROWS - 1; /* the plan may use all rows */
    EXPECT_FAIL(QKV_ERR_INVALID, "o: expected at least 24 rows",
                qkv_attention_run(s.op, &s.io[1], NULL));
    qkv_attention_destroy(s.op);
}

int main(void)
{
    if (!test_on_cuda()) {
        printf("skipped: runs on a GPU only (QKV_TEST_DEVICE=cuda)\n");
        return 0;
    }
    test_seed();
    EXPECT_OK(test_context_create(&ctx));
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(planners_write_the_same_bytes),
        cmocka_unit_test(runs_give_the_same_bits),
        cmocka_unit_test(graphs_replay_with_other_lengths_and_tables),
        cmocka_unit_test(captured_runs_serve_later_plans),
        cmocka_unit_test(host_plans_are_refused_while_capturing),
        cmocka_unit_test(host_plans_follow_each_other),
        cmocka_unit_test(limits_hold_on_the_device),
        cmocka_unit_test(every_limit_is_looked_at),
        cmocka_unit_test(calls_name_what_the_device_cannot_do),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    qkv_context_destroy(ctx);
    return failed;
}
