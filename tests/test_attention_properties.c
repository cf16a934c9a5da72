/* test_attention_properties.c - what must hold between runs of attention: same bits, same plan.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_bits.h"

/* Long requests of 1, 5 and 200 rows. */
static void add_long_requests(case_config *c)
{
    case_add(c, 1, 6000 + (int32_t)test_below(500));
    case_add(c, 5, 2500);
    case_add(c, 0, 7);
    case_add(c, 200, 900 + (int32_t)test_below(100));
}

/* ---- splits ------------------------------------------------------------------------------- */

static void split_and_whole(qkv_context *ctx, void *user)
{
    attn_case *a = user;
    run_with(a, ctx, 1, 0);
    bits whole = bits_of(a);
    run_with(a, ctx, 7, 1);
    if (!bits_equal(&whole, a)) fail_msg("without room for partial rows nothing may be split");
    run_with(a, ctx, 7, 0);
    if (a->config.spec.dtype_o.bits == 32 && bits_equal(&whole, a))
        fail_msg("seven workers and a long request: expected a split, got the bits of one worker");
    bits_free(&whole);
}

/* Each is also compared with the reference, by case_try. */
static void attention_split_equals_whole(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        attn_case a;
        case_config c = any_dims(i, 16);
        case_add(&c, 1, 9000);
        case_add(&c, 3, 2500);
        case_build(&a, &c);
        test_every_level(2, split_and_whole, &a);
        case_free(&a);
    }
}

/* ---- same bits ---------------------------------------------------------------------------- */

static void run_backwards(void *user, int32_t num_tasks, void (*task)(void *, int32_t), void *arg)
{
    (void)user;
    for (int32_t i = num_tasks - 1; i >= 0; i--) task(arg, i);
}

static void same_bits_with_any_threads(qkv_context *ctx, void *user)
{
    attn_case *a = user;
    const char *level = strchr(qkv_context_device_name(ctx), ':') + 1;
    run_with(a, ctx, 5, 0);
    bits first = bits_of(a);
    const int32_t most = test_is_emulated() ? 0 : 8; /* a GPU has no threads here */
    for (int32_t threads = 0; threads <= most;
         threads += threads < 3 ? 1 : 5) { /* 0: the engine's */
        qkv_context_options o = {TEST_CONTEXT_INIT, .isa = level, .num_threads = threads};
        if (threads == 0) o.parallel = (qkv_parallel){.run = run_backwards, .num_threads = 4};
        qkv_context *other;
        EXPECT_OK(qkv_context_create(&o, &other));
        case_op op = case_op_new(other, a);
        for (int repeat = 0; repeat < 3; repeat++) {
            if (repeat < 2) CASE_OK(a, qkv_attention_plan(op.op, &a->batch, NULL));
            case_run(a, op.op);
            if (!bits_equal(&first, a)) {
                case_print(0, &a->config);
                fail_msg("%s: %d threads, repeat %d: other bits than the first run", level, threads,
                         repeat);
            }
        }
        case_op_free(&op);
        qkv_context_destroy(other);
    }
    bits_free(&first);
}

static void attention_gives_the_same_bits_with_any_threads(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        attn_case a;
        case_config c = any_dims(i, 16);
        add_long_requests(&c);
        case_build(&a, &c);
        test_every_level(4, same_bits_with_any_threads, &a);
        case_free(&a);
    }
}

static void same_bits_after_permutation(qkv_context *ctx, void *user)
{
    attn_case *a = user;
    const int64_t pool = a->k.x.shape[0];
    run_with(a, ctx, 5, 0);
    bits first = bits_of(a);
    /* swap page p with page pool - 1 - p, in the pool and in the list */
    case_view *views[] = {&a->k, &a->v};
    for (int v = 0; v < 2; v++) {
        const size_t page = views[v]->bytes / (size_t)pool;
        char *data = views[v]->x.owned, *tmp = case_alloc(page, 1);
        for (int64_t i = 0; i < pool / 2; i++) {
            char *x = data + (size_t)i * page, *y = data + (size_t)(pool - 1 - i) * page;
            memcpy(tmp, x, page);
            memcpy(x, y, page);
            memcpy(y, tmp, page);
        }
        free(tmp);
    }
    int32_t *indices = case_ints(&a->kv_indices);
    for (int64_t i = 0; i < a->kv_indices.x.shape[0]; i++)
        indices[i] = (int32_t)pool - 1 - indices[i];
    run_with(a, ctx, 5, 0);
    assert_true(bits_equal(&first, a));
    bits_free(&first);
}

static void attention_gives_the_same_bits_for_permuted_pages(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        attn_case a;
        case_config c = any_dims(i, 1 + i * 8);
        add_long_requests(&c);
        case_build(&a, &c);
        test_every_level(2, same_bits_after_permutation, &a);
        case_free(&a);
    }
}

/* The batch of requests [r, end) alone: the same tensors, a part of each index array. */
static void run_some(attn_case *a, qkv_context *ctx, int32_t r, int32_t end, const bits *together)
{
    const qkv_attention_spec *s = &a->config.spec;
    int32_t *qo = case_ints(&a->qo_indptr), *kv = case_ints(&a->kv_indptr);
    int32_t *last = case_ints(&a->kv_last_page_len);
    const int64_t q_rows = qo[end] - qo[r], first = qo[r], n = end - r;
    int32_t qo_indptr[CASE_MAX_REQUESTS + 1];
    for (int64_t i = 0; i <= n; i++) qo_indptr[i] = qo[r + i] - qo[r];
    const qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(qo_indptr, QKV_I32, n + 1),
                                .kv_indptr = TENSOR(&kv[r], QKV_I32, n + 1),
                                .kv_indices = &a->kv_indices.x.t,
                                .kv_last_page_len = TENSOR(&last[r], QKV_I32, n)};
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1, .levels = &index};
    const size_t row_o = (size_t)s->num_qo_heads * (size_t)s->head_dim_vo * test_bytes(s->dtype_o);
    const size_t row_lse = (size_t)s->num_qo_heads * sizeof(float);
    void *o = case_alloc((size_t)q_rows, row_o), *lse = case_alloc((size_t)q_rows, row_lse);
    qkv_attention_io io = a->io;
    io.q = TENSOR((char *)a->q.x.owned +
                      first * s->num_qo_heads * s->head_dim_qk * (int64_t)test_bytes(s->dtype_q),
                  s->dtype_q, q_rows, s->num_qo_heads, s->head_dim_qk);
    io.o = TENSOR(o, s->dtype_o, q_rows, s->num_qo_heads, s->head_dim_vo);
    io.lse = TENSOR(lse, QKV_F32, q_rows, s->num_qo_heads);
    case_op op = case_op_new(ctx, a);
    EXPECT_OK(qkv_attention_plan(op.op, &batch, NULL));
    EXPECT_OK(qkv_attention_run(op.op, &io, NULL));
    if (memcmp(o, (char *)together->o + (size_t)first * row_o, (size_t)q_rows * row_o) != 0 ||
        memcmp(lse, (char *)together->lse + (size_t)first * row_lse, (size_t)q_rows * row_lse) != 0)
        fail_msg("requests %d to %d: other bits than among all", r, end);
    case_op_free(&op);
    free(o), free(lse);
}

static void same_bits_alone(qkv_context *ctx, void *user)
{
    attn_case *a = user;
    run_with(a, ctx, 5, 1);
    bits together = bits_of(a);
    for (int32_t r = 0; r < a->config.num_requests; r++) run_some(a, ctx, r, r + 1, &together);
    bits_free(&together);
}

/* Without splits, neighbours do not change a request. */
static void attention_without_splits_ignores_neighbours(void **state)
{
    (void)state;
    for (int i = 0; i < 6; i++) {
        attn_case a;
        case_config c = any_dims(i, 16);
        for (int r = 0; r < 12; r++)
            case_add(&c, 1 + (int32_t)test_below(r % 3 ? 1 : 40), 60 + (int32_t)test_below(700));
        case_build(&a, &c);
        test_every_level(2, same_bits_alone, &a);
        case_free(&a);
    }
}

/* BATCH_INVARIANT: alone, in other company, with other workers and threads. */
static void invariant_bits(qkv_context *ctx, void *user)
{
    attn_case *a = user;
    const int32_t n = a->config.num_requests;
    run_with(a, ctx, 3, 0);
    bits together = bits_of(a);
    const char *level = strchr(qkv_context_device_name(ctx), ':') + 1;
    const int32_t most = test_is_emulated() ? 1 : 5; /* a GPU has no threads here */
    for (int32_t threads = 1; threads <= most; threads += 2) {
        qkv_context *other;
        EXPECT_OK(qkv_context_create(
            &(qkv_context_options){TEST_CONTEXT_INIT, .isa = level, .num_threads = threads},
            &other));
        run_with(a, other, 1 + (int32_t)test_below(12), 0);
        assert_true(bits_equal(&together, a));
        for (int32_t r = 0; r < n; r++) {
            a->limits.max_workers = 1 + (int32_t)test_below(12);
            run_some(a, other, r, r + 1, &together);
            run_some(a, other, r, r + 1 + (int32_t)test_below(n - r), &together);
        }
        qkv_context_destroy(other);
    }
    bits_free(&together);
}

static void attention_batch_invariant_ignores_company_and_threads(void **state)
{
    (void)state;
    for (int i = 0; i < (CASE_SANITIZED ? 1 : 3); i++) {
        attn_case a;
        case_config c = any_dims(i, 16);
        c.spec.flags |= QKV_ATTENTION_BATCH_INVARIANT;
        if (i % 2) {
            c.spec.features |= QKV_FEATURE_WINDOW;
            c.spec.window_left = 3000;
            c.spec.window_right = -1;
        }
        add_long_requests(&c); /* split, and not */
        for (int r = 0; r < 5; r++)
            case_add(&c, 1 + (int32_t)test_below(6), 1 + (int32_t)test_below(5000));
        case_build(&a, &c);
        test_every_level(2, invariant_bits, &a);
        case_free(&a);
    }
}

/* ---- plans -------------------------------------------------------------------------------- */

/* The caller's arrays are copied by plan, and a plan that fails changes nothing. */
static void keep_plan(qkv_context *ctx, void *user)
{
    attn_case *a = user;
    a->limits.max_workers = 5;
    case_op op = case_op_new(ctx, a);
    CASE_OK(a, qkv_attention_plan(op.op, &a->batch, NULL));
    case_run(a, op.op);
    bits first = bits_of(a);

    case_view *arrays[] = {&a->qo_indptr, &a->kv_indptr, &a->kv_indices, &a->kv_last_page_len};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        void *saved = case_alloc(arrays[i]->bytes, 1);
        memcpy(saved, arrays[i]->x.owned, arrays[i]->bytes);
        /* the last entry breaks, after all others were looked at; then everything does */
        case_ints(arrays[i])[arrays[i]->x.shape[0] - 1] = INT32_MIN;
        EXPECT_FAIL(QKV_ERR_INVALID, "", qkv_attention_plan(op.op, &a->batch, NULL));
        case_run(a, op.op);
        assert_true(bits_equal(&first, a));
        memset(arrays[i]->x.owned, 0xee, arrays[i]->bytes);
        EXPECT_FAIL(QKV_ERR_INVALID, "", qkv_attention_plan(op.op, &a->batch, NULL));
        case_run(a, op.op);
        assert_true(bits_equal(&first, a));
        memcpy(arrays[i]->x.owned, saved, arrays[i]->bytes);
        free(saved);
    }
    case_op_free(&op);
    bits_free(&first);
}

static void attention_keeps_its_plan(void **state)
{
    (void)state;
    attn_case a;
    case_config c = any_dims(0, 16);
    add_long_requests(&c);
    case_build(&a, &c);
    test_every_level(2, keep_plan, &a);
    case_free(&a);
}

/* Layers with parameters of their own under one plan; the first comes again at the end. */
static void run_layers(qkv_context *ctx, void *user)
{
    attn_case *a = user;
    static const struct {
        const char *why;
        float sm_scale, soft_cap;
        int32_t set_window, window_left, window_right;
    } layers[] = {
        {"the spec's", 0, 0, 0, 0, 0},
        {"a narrow window", 0, 0, 1, 20, 0},
        {"a scale", 0.5f, 0, 0, 0, 0},
        {"a window of the row's own key, and a cap", 0, 1.5f, 1, 0, 0},
        {"the spec's window, given again", 0, 0, 1, 600, 2},
        {"the spec's", 0, 0, 0, 0, 0},
    };
    enum { NUM_LAYERS = sizeof layers / sizeof *layers };
    bits first = {NULL, NULL};
    a->limits.max_workers = 5;
    case_op op = case_op_new(ctx, a);
    CASE_OK(a, qkv_attention_plan(op.op, &a->batch, NULL));
    for (int i = 0; i < NUM_LAYERS; i++) {
        a->io.sm_scale = layers[i].sm_scale;
        a->io.logits_soft_cap = a->config.io_soft_cap = layers[i].soft_cap;
        a->io.set_window = layers[i].set_window;
        a->io.window_left = layers[i].window_left;
        a->io.window_right = layers[i].window_right;
        attention_ref(&a->config.spec, &a->batch, &a->io, a->ref_o, a->ref_rows);
        case_run(a, op.op);
        case_check(a, qkv_context_device_name(ctx));
        if (i == 0) first = bits_of(a);
        if (i == NUM_LAYERS - 1) assert_true(bits_equal(&first, a));
    }
    case_op_free(&op);
    bits_free(&first);
}

static void attention_layers_differ_under_one_plan(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        attn_case a;
        case_config c = any_dims(i, 16);
        c.spec.mask = QKV_MASK_NONE;
        c.spec.features = QKV_FEATURE_WINDOW | QKV_FEATURE_SOFT_CAP;
        c.spec.logits_soft_cap = 30;
        c.spec.window_left = 600;
        c.spec.window_right = 2;
        add_long_requests(&c);
        case_build(&a, &c);
        test_every_level(2, run_layers, &a);
        case_free(&a);
    }
}

/* Many batches, large and small, through one operator: nothing of a former plan is left. */
static void replan(qkv_context *ctx, void *user)
{
    const qkv_attention_limits *limits = user;
    attn_case a;
    case_op op = {.op = NULL};
    for (int64_t i = case_count(60); i >= 0; i--) {
        case_config c = any_dims(0, 8);
        c.form = test_below(2) ? CASE_CSR : CASE_TABLE;
        c.strided = true;
        c.limits = *limits;
        const int64_t n = test_below(30);
        for (int64_t r = 0; r < n; r++)
            case_add(&c, (int32_t)test_below(1 + test_below(30)), (int32_t)test_below(300));
        if (test_below(4) == 0) case_add(&c, (int32_t)test_below(4), 3000);
        case_build(&a, &c);
        if (!op.op) op = case_op_new(ctx, &a);
        CASE_OK(&a, qkv_attention_plan(op.op, &a.batch, NULL));
        case_run(&a, op.op);
        case_check(&a, qkv_context_device_name(ctx));
        case_free(&a);
    }
    case_op_free(&op);
}

static void attention_takes_one_plan_after_another(void **state)
{
    (void)state;
    for (int64_t max_split_rows = 0; max_split_rows <= 20; max_split_rows += 20) {
        qkv_attention_limits limits = {QKV_ATTENTION_LIMITS_INIT,
                                       .max_requests = 31,
                                       .max_tokens = 1000,
                                       .max_workers = 6,
                                       .max_kv_len = 3000,
                                       .max_pages = 2000,
                                       .max_split_rows = max_split_rows};
        test_every_level(2, replan, &limits);
    }
}

/* ---- levels ------------------------------------------------------------------------------- */

/* The page lists of all levels, joined for each request. */
typedef struct flat_lists {
    int32_t indptr[CASE_MAX_REQUESTS + 1], last_page_len[CASE_MAX_REQUESTS], *indices;
} flat_lists;

static void flat_lists_new(flat_lists *f, attn_case *a)
{
    const case_config *c = &a->config;
    const int32_t page_size = c->spec.page_size;
    f->indices = case_alloc((size_t)(c->num_requests * a->num_pages), sizeof(int32_t));
    f->indptr[0] = 0;
    for (int32_t r = 0; r < c->num_requests; r++) {
        int32_t at = f->indptr[r];
        for (int32_t level = 0; level <= c->num_shared_levels; level++) {
            const int32_t group = case_group_of(c, level, r);
            const int32_t *pages = a->pages + case_level_at(a, level)->first_page[group];
            for (int32_t i = 0; i < case_group_pages(c, level, group); i++)
                f->indices[at++] = pages[i];
        }
        f->indptr[r + 1] = at;
        f->last_page_len[r] = (case_kv_len(c, r) + page_size - 1) % page_size + 1;
    }
}

static void levels_and_flat(qkv_context *ctx, void *user)
{
    attn_case *a = user;
    const int32_t n = a->config.num_requests;
    const qkv_attention_batch levels = a->batch;
    const size_t o_doubles =
        (size_t)(a->tokens * a->config.spec.num_qo_heads) * (size_t)a->config.spec.head_dim_vo;
    flat_lists flat;
    flat_lists_new(&flat, a);
    const qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = &a->qo_indptr.x.t,
                                .kv_indptr = TENSOR(flat.indptr, QKV_I32, n + 1),
                                .kv_indices = TENSOR(flat.indices, QKV_I32, flat.indptr[n]),
                                .kv_last_page_len = TENSOR(flat.last_page_len, QKV_I32, n)};
    a->limits.max_pages = flat.indptr[n];
    case_try(a, ctx);
    a->batch.num_levels = 1;
    a->batch.levels = &index;
    double *of_levels = case_alloc(o_doubles, sizeof(double));
    memcpy(of_levels, a->ref_o, o_doubles * sizeof(double));
    attention_ref(&a->config.spec, &a->batch, &a->io, a->ref_o, a->ref_rows);
    assert_memory_equal(of_levels, a->ref_o, o_doubles * sizeof(double));
    case_try(a, ctx);
    a->batch = levels;
    free(of_levels), free(flat.indices);
}

/* Both are compared with the one reference, by case_try. */
static void attention_of_levels_equals_the_flat_form(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        case_config c = any_dims(i, 16);
        for (int r = 0; r < 12; r++)
            case_add(&c, 1 + (int32_t)test_below(r % 4 ? 1 : 9), (int32_t)test_below(200));
        c.num_shared_levels = 2;
        c.shared[0] = (case_shared_level){.num_groups = 1, .num_members = {3}, .kv_len = {1024}};
        c.shared[1] = (case_shared_level){
            .num_groups = 3, .num_members = {2, 3, 7}, .kv_len = {16, 0, 16 * 40}};
        attn_case a;
        case_build(&a, &c);
        test_every_level(2, levels_and_flat, &a);
        case_free(&a);
    }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_split_equals_whole),
        cmocka_unit_test(attention_gives_the_same_bits_with_any_threads),
        cmocka_unit_test(attention_gives_the_same_bits_for_permuted_pages),
        cmocka_unit_test(attention_without_splits_ignores_neighbours),
        cmocka_unit_test(attention_batch_invariant_ignores_company_and_threads),
        cmocka_unit_test(attention_keeps_its_plan),
        cmocka_unit_test(attention_layers_differ_under_one_plan),
        cmocka_unit_test(attention_takes_one_plan_after_another),
        cmocka_unit_test(attention_of_levels_equals_the_flat_form),
    };
    return cmocka_run_group_tests_name("attention_properties", tests, NULL, NULL);
}
