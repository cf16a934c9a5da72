/* test_early_keys.c - what decode reads before its launch's turn (QKV_ATTENTION_ONLY_APPENDS): keys and values that the
 * launch before may still write are none of it, nor is a plan that no run has waited for. The emulated GPU lets the test
 * play the launch before; on another there is nothing to see.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/attention.h"
#include "support.h"

enum { REQUESTS = 3, HEADS = 8, KV_HEADS = 2, DIM = 64, MAX_KEYS = 512, MOST_ROWS = 2 * REQUESTS };
enum { SLOT = KV_HEADS * DIM }; /* elements of a token */

typedef struct shape {
    int page_size; /* 0: ragged */
    int qo_len;
    int kv_len[REQUESTS];
    int window;
} shape;

static const shape shapes[] = {
    {16, 1, {17, 500, 33}, -1}, {16, 2, {16, 256, 2}, -1}, {8, 1, {40, 9, 300}, -1},
    {64, 1, {512, 1, 65}, -1},  {1, 1, {100, 31, 1}, -1},  {0, 2, {70, 400, 16}, -1},
    {16, 1, {400, 90, 16}, 40},
};
enum { NUM_SHAPES = sizeof shapes / sizeof shapes[0] };

/* An operator on its inputs; all memory is the GPU's too. */
typedef struct early {
    const shape *shape;
    qkv_attention *op;
    qkv_workspace workspace;
    int32_t qo_indptr[REQUESTS + 1], kv_indptr[REQUESTS + 1], pages[REQUESTS * MAX_KEYS];
    int32_t last_page_len[REQUESTS];
    uint16_t q[MOST_ROWS * HEADS * DIM], o[MOST_ROWS * HEADS * DIM];
    uint16_t k[REQUESTS * MAX_KEYS * SLOT], v[REQUESTS * MAX_KEYS * SLOT];
    uint16_t new_k[MOST_ROWS * SLOT],
        new_v[MOST_ROWS * SLOT]; /* as the launch before writes them */
} early;

static qkv_context *ctx;

static int page_of(const early *e)
{
    return e->shape->page_size ? e->shape->page_size : 1;
}

/* Where key `key` of a request is, in elements. */
static size_t place_of(const early *e, int request, int key)
{
    const int page = page_of(e), first = e->kv_indptr[request];
    if (e->shape->page_size == 0) return (size_t)(first + key) * SLOT;
    return ((size_t)e->pages[first + key / page] * (size_t)page + (size_t)(key % page)) * SLOT;
}

/* Calls once for each new row, with its place in the caches and among new ones. */
typedef void on_row(early *e, size_t place, size_t row);
static void each_new_row(early *e, on_row *what)
{
    for (int r = 0; r < REQUESTS; r++)
        for (int i = 0; i < e->shape->qo_len; i++)
            what(e, place_of(e, r, e->shape->kv_len[r] - e->shape->qo_len + i),
                 (size_t)(r * e->shape->qo_len + i) * SLOT);
}

static void save_row(early *e, size_t place, size_t row)
{
    memcpy(e->new_k + row, e->k + place, SLOT * sizeof *e->k);
    memcpy(e->new_v + row, e->v + place, SLOT * sizeof *e->v);
}

static void write_row(early *e, size_t place, size_t row)
{
    memcpy(e->k + place, e->new_k + row, SLOT * sizeof *e->k);
    memcpy(e->v + place, e->new_v + row, SLOT * sizeof *e->v);
}

static void forget_row(early *e, size_t place, size_t row)
{
    (void)row;
    memset(e->k + place, 0xff, SLOT * sizeof *e->k);
    memset(e->v + place, 0xff, SLOT * sizeof *e->v);
}

static qkv_status plan(early *e)
{
    const qkv_kv_index index = {
        QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(e->qo_indptr, QKV_I32, REQUESTS + 1),
        .kv_indptr = TENSOR(e->kv_indptr, QKV_I32, REQUESTS + 1),
        .kv_indices =
            e->shape->page_size ? TENSOR(e->pages, QKV_I32, e->kv_indptr[REQUESTS]) : NULL,
        .kv_last_page_len =
            e->shape->page_size ? TENSOR(e->last_page_len, QKV_I32, REQUESTS) : NULL};
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1, .levels = &index};
    return qkv_attention_plan(e->op, &batch, NULL);
}

static void run(early *e)
{
    const int64_t rows = e->shape->qo_len * REQUESTS, tokens = REQUESTS * MAX_KEYS;
    const int64_t page = page_of(e), pages = tokens / page;
    const bool paged = e->shape->page_size > 0;
    const qkv_attention_io io = {
        QKV_ATTENTION_IO_INIT,
        .q = TENSOR(e->q, QKV_BF16, rows, HEADS, DIM),
        .k = paged ? TENSOR(e->k, QKV_BF16, pages, page, KV_HEADS, DIM)
                   : TENSOR(e->k, QKV_BF16, tokens, KV_HEADS, DIM),
        .v = paged ? TENSOR(e->v, QKV_BF16, pages, page, KV_HEADS, DIM)
                   : TENSOR(e->v, QKV_BF16, tokens, KV_HEADS, DIM),
        .o = TENSOR(e->o, QKV_BF16, rows, HEADS, DIM),
    };
    memset(e->o, 0xff, sizeof e->o);
    EXPECT_OK(qkv_attention_run(e->op, &io, NULL));
}

static void *blocks_of(uint64_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 64) / 64 * 64);
    assert_non_null(p);
    return p;
}

/* Planned, but not run. */
static early *early_new(const shape *of, uint32_t flags)
{
    early *e = calloc(1, sizeof *e);
    assert_non_null(e);
    e->shape = of;
    const int page = page_of(e), pool = REQUESTS * MAX_KEYS / page;
    for (int i = 0; i < pool; i++) {
        const int j = (int)test_below(i + 1);
        e->pages[i] = e->pages[j];
        e->pages[j] = i;
    }
    for (int r = 0; r < REQUESTS; r++) {
        const int used = (of->kv_len[r] + page - 1) / page;
        e->qo_indptr[r + 1] = e->qo_indptr[r] + of->qo_len;
        e->kv_indptr[r + 1] = e->kv_indptr[r] + used;
        e->last_page_len[r] = of->kv_len[r] - (used - 1) * page;
    }
    for (size_t i = 0; i < sizeof e->q / 2; i++) e->q[i] = test_to_bf16((float)test_uniform(2));
    for (size_t i = 0; i < sizeof e->k / 2; i++) {
        e->k[i] = test_to_bf16((float)test_uniform(2));
        e->v[i] = test_to_bf16((float)test_uniform(2));
    }
    const qkv_attention_spec spec = {QKV_ATTENTION_SPEC_INIT,
                                     .flags = flags,
                                     .num_qo_heads = HEADS,
                                     .num_kv_heads = KV_HEADS,
                                     .head_dim_qk = DIM,
                                     .head_dim_vo = DIM,
                                     .page_size = of->page_size,
                                     .mask = QKV_MASK_CAUSAL,
                                     .features = of->window < 0 ? 0 : QKV_FEATURE_WINDOW,
                                     .window_left = of->window,
                                     .window_right = -1,
                                     .dtype_q = QKV_BF16,
                                     .dtype_kv = QKV_BF16,
                                     .dtype_o = QKV_BF16};
    const qkv_attention_limits limits = {QKV_ATTENTION_LIMITS_INIT, .max_requests = REQUESTS,
                                         .max_tokens = MOST_ROWS,   .max_qo_len = of->qo_len,
                                         .max_kv_len = MAX_KEYS,    .max_pages = pool,
                                         .max_workers = 7};
    qkv_workspace_size size;
    EXPECT_OK(qkv_attention_workspace_size(ctx, &spec, &limits, &size));
    e->workspace = (qkv_workspace){QKV_WORKSPACE_INIT,
                                   .plan = blocks_of(size.plan_bytes),
                                   .scratch = blocks_of(size.scratch_bytes),
                                   .pinned = blocks_of(size.pinned_bytes),
                                   .plan_bytes = size.plan_bytes,
                                   .scratch_bytes = size.scratch_bytes,
                                   .pinned_bytes = size.pinned_bytes};
    EXPECT_OK(qkv_attention_create(ctx, &spec, &limits, &e->workspace, &e->op));
    EXPECT_OK(plan(e));
    each_new_row(e, save_row);
    return e;
}

static void early_free(early *e)
{
    qkv_attention_destroy(e->op);
    free(e->workspace.plan), free(e->workspace.scratch), free(e->workspace.pinned);
    free(e);
}

/* What `before` does is done in place of a launch that this run overlaps. Whether its result is that of a run that nothing
 * went before. */
static bool is_same(early *e, void (*before)(void *e, int ended))
{
    void (*set)(void (*before)(void *user, int ended), void *user);
    *(void **)&set = test_driver("emulator_set_launch_before");
    set(before, e);
    run(e);
    set(NULL, NULL);
    before(e, 1); /* the last block may have ended before its turn */
    uint16_t got[MOST_ROWS * HEADS * DIM];
    memcpy(got, e->o, sizeof got);
    run(e);
    return memcmp(got, e->o, sizeof got) == 0;
}

/* ---- launches before -------------------------------------------------------------------------- */

static void appends(void *user, int ended)
{
    each_new_row(user, ended ? write_row : forget_row);
}

/* All keys and values, which it brings by turning them: twice is nothing. */
static void writes_all(void *user, int ended)
{
    early *e = user;
    static bool turned;
    if (turned != ended) return; /* the block before this one ended before its turn */
    turned = !ended;
    for (size_t i = 0; i < sizeof e->k / 2; i++) e->k[i] ^= 0x4321, e->v[i] ^= 0x4321;
}

/* A plan of other requests. */
static void plans(void *user, int ended)
{
    early *e = user;
    static char *want;
    const size_t bytes = (size_t)e->workspace.plan_bytes;
    if (!want && !ended) {
        want = malloc(bytes);
        assert_non_null(want);
        memcpy(want, e->workspace.plan, bytes);
    }
    if (!ended) {
        memset(e->workspace.plan, 0, bytes);
        return;
    }
    if (want) memcpy(e->workspace.plan, want, bytes);
    free(want);
    want = NULL;
}

/* ---- tests ------------------------------------------------------------------------------------ */

static void new_keys_are_read_when_they_are_there(void **state)
{
    (void)state;
    for (int i = 0; i < NUM_SHAPES; i++) {
        early *e = early_new(&shapes[i], QKV_ATTENTION_ONLY_APPENDS);
        run(e);
        if (!is_same(e, appends)) fail_msg("shape %d: reads a new key too early", i);
        early_free(e);
    }
}

static void old_keys_are_read_early(void **state)
{
    (void)state;
    for (int i = 0; i < NUM_SHAPES; i++) {
        early *e = early_new(&shapes[i], QKV_ATTENTION_ONLY_APPENDS);
        run(e);
        if (is_same(e, writes_all)) fail_msg("shape %d: reads nothing early", i);
        early_free(e);
    }
}

static void nothing_is_read_early_without_the_promise(void **state)
{
    (void)state;
    for (int i = 0; i < NUM_SHAPES; i++) {
        early *e = early_new(&shapes[i], 0);
        run(e);
        if (!is_same(e, writes_all)) fail_msg("shape %d: reads keys early", i);
        early_free(e);
    }
}

static void the_first_run_waits_for_its_plan(void **state)
{
    (void)state;
    for (int i = 0; i < NUM_SHAPES; i++) {
        early *e = early_new(&shapes[i], QKV_ATTENTION_ONLY_APPENDS);
        if (!is_same(e, plans)) fail_msg("shape %d: reads a plan too early", i);
        EXPECT_OK(plan(e));
        if (!is_same(e, writes_all)) fail_msg("shape %d: reads keys before a plan", i);
        early_free(e);
    }
}

static int open_context(void **state)
{
    (void)state;
    return test_context_create(&ctx) == QKV_OK ? 0 : -1;
}

static int close_context(void **state)
{
    (void)state;
    qkv_context_destroy(ctx);
    return 0;
}

int main(void)
{
    if (!test_is_emulated()) {
        printf("skipped: no emulated GPU\n");
        return 0;
    }
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(new_keys_are_read_when_they_are_there),
        cmocka_unit_test(old_keys_are_read_early),
        cmocka_unit_test(nothing_is_read_early_without_the_promise),
        cmocka_unit_test(the_first_run_waits_for_its_plan),
    };
    return cmocka_run_group_tests_name("early_keys", tests, open_context, close_context);
}
