/* test_attention_invariance.c - what a request's bits do not depend on: memory that no request uses,
 * and, with BATCH_INVARIANT, its neighbours, limits and threads.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_bits.h"

/* ---- what is not in use ------------------------------------------------------------------- */

/* Every NaN between the data becomes some other nonsense. */
static void replace_nans(const case_view *view)
{
    const double nonsense[] = {0, 1, -400, (double)INFINITY, (double)-INFINITY};
    const DLDataType dtype = view->x.t.dtype;
    for (int64_t i = 0; i < (int64_t)(view->bytes / test_bytes(dtype)); i++)
        if (isnan(test_get(view->x.owned, dtype, i)))
            test_put(view->x.owned, dtype, i, nonsense[test_below(5)]);
}

/* Random entries but for those in use: kept[i] of `view`. */
static void replace_entries(const case_view *view, const bool *kept)
{
    int32_t *x = case_ints(view);
    const int64_t n = (int64_t)((size_t)((char *)view->x.owned + view->bytes - (char *)x) / 4);
    for (int64_t i = 0; i < n; i++)
        if (!kept[i]) x[i] = (int32_t)test_u64();
}

static void replace_unused_pages(attn_case *a, int32_t level)
{
    const case_config *c = &a->config;
    const case_level *l = case_level_at(a, level);
    const bool table = case_form(c, level) == CASE_TABLE;
    const case_view *view = table ? &l->block_table : &l->kv_indices;
    bool *kept = case_alloc(view->bytes, 1);
    for (int32_t g = 0; g < case_num_groups(c, level); g++)
        for (int32_t i = 0; i < case_group_pages(c, level, g); i++)
            kept[i + (table ? g * view->x.strides[0] : case_ints(&l->kv_indptr)[g])] = true;
    replace_entries(view, kept);
    free(kept);
}

static void replace_unused_blocks(attn_case *a)
{
    const DLTensor *indptr = a->index.bsr_indptr;
    bool *kept = case_alloc(a->bsr_indices.bytes, 1);
    for (int64_t list = 0; list < indptr->shape[0]; list++) {
        const int32_t *row = case_ints(&a->bsr_indptr) + list * a->bsr_indptr.x.strides[0];
        for (int32_t i = row[0]; i < row[indptr->shape[1] - 1]; i++) kept[i] = true;
    }
    replace_entries(&a->bsr_indices, kept);
    free(kept);
}

static void same_bits_with_other_garbage(qkv_context *ctx, void *user)
{
    attn_case *a = user;
    run_with(a, ctx, 5, 0);
    bits first = bits_of(a);
    replace_nans(&a->k);
    replace_nans(&a->v);
    for (int32_t level = 0; level <= a->config.num_shared_levels; level++)
        replace_unused_pages(a, level);
    if (a->config.bsr_rows) replace_unused_blocks(a);
    run_with(a, ctx, 5, 0);
    assert_true(bits_equal(&first, a));
    bits_free(&first);
}

static void attention_never_reads_what_is_not_in_use(void **state)
{
    (void)state;
    for (int i = 0; i < 12; i++) {
        case_config c = any_dims(i, 1 + (int32_t)test_below(40));
        c.form = i % 2 ? CASE_TABLE : CASE_CSR;
        c.strided = true;
        if (i % 4 == 1) c.spec.dtype_kv = QKV_E4M3;
        for (int r = 0; r < 8; r++)
            case_add(&c, (int32_t)test_below(r % 3 ? 2 : 30), (int32_t)test_below(500));
        if (i % 3 == 1) {
            c.num_shared_levels = 1;
            c.shared[0] = (case_shared_level){.form = i % 5 ? CASE_TABLE : CASE_CSR,
                                              .num_groups = 3,
                                              .num_members = {4, 0, 4},
                                              .kv_len = {333, 50, 71}};
        }
        if (i % 3 == 2) {
            c.bsr_rows = 1 + (int32_t)test_below(20);
            c.bsr_cols = 1 + (int32_t)test_below(60);
            c.bsr_per_head = c.bsr_masked = i % 2;
        }
        attn_case a;
        case_build(&a, &c);
        test_every_level(2, same_bits_with_other_garbage, &a);
        case_free(&a);
    }
}

/* ---- batch invariance --------------------------------------------------------------------- */

/* A batch of some of a case's requests, in any order, and what it gives. */
typedef struct company {
    int32_t num_requests, request[16], qo_indptr[17], kv_indptr[17], last_page_len[16];
    int32_t max_qo_len, max_kv_len;
    int32_t *indices;
    char *q, *o;
    float *lse;
} company;

static size_t row_bytes(const attn_case *a, DLDataType dtype, int32_t dim)
{
    return (size_t)(a->config.spec.num_qo_heads * dim) * test_bytes(dtype);
}

static void company_new(company *x, const attn_case *a)
{
    const qkv_attention_spec *s = &a->config.spec;
    const size_t q_row = row_bytes(a, s->dtype_q, s->head_dim_qk);
    x->indices = case_alloc((size_t)a->num_pages, sizeof(int32_t));
    x->q = case_alloc((size_t)a->tokens, q_row);
    x->o = case_alloc((size_t)a->tokens, row_bytes(a, s->dtype_o, s->head_dim_vo));
    x->lse = case_alloc((size_t)a->tokens, (size_t)s->num_qo_heads * sizeof(float));
    x->qo_indptr[0] = x->kv_indptr[0] = x->max_qo_len = 0;
    x->max_kv_len = 1;
    for (int32_t i = 0; i < x->num_requests; i++) {
        const int32_t r = x->request[i], *first_page = a->first_page;
        const int32_t qo_len = a->config.qo_len[r], kv_len = a->config.kv_len[r];
        const int32_t num_pages = first_page[r + 1] - first_page[r];
        memcpy(x->q + (size_t)x->qo_indptr[i] * q_row,
               (char *)case_data(&a->q) + (size_t)case_ints(&a->qo_indptr)[r] * q_row,
               (size_t)qo_len * q_row);
        memcpy(x->indices + x->kv_indptr[i], a->pages + first_page[r],
               (size_t)num_pages * sizeof(int32_t));
        x->qo_indptr[i + 1] = x->qo_indptr[i] + qo_len;
        x->kv_indptr[i + 1] = x->kv_indptr[i] + num_pages;
        x->last_page_len[i] = (kv_len + s->page_size - 1) % s->page_size + 1;
        if (qo_len > x->max_qo_len) x->max_qo_len = qo_len;
        if (kv_len > x->max_kv_len) x->max_kv_len = kv_len;
    }
}

static void company_free(company *x)
{
    free(x->indices), free(x->q), free(x->o), free(x->lse);
}

/* Limits that just fit, or do not matter. */
static qkv_attention_limits company_limits(const company *x)
{
    const int32_t n = x->num_requests, slack = (int32_t)test_below(2);
    const int32_t tokens = x->qo_indptr[n], pages = x->kv_indptr[n];
    return (qkv_attention_limits){QKV_ATTENTION_LIMITS_INIT,
                                  .max_requests = n + slack * (int32_t)test_below(10),
                                  .max_tokens = 1 + tokens + slack * test_below(50),
                                  .max_qo_len = x->max_qo_len && test_below(2) ? x->max_qo_len : 0,
                                  .max_workers = (int32_t)test_below(13),
                                  .max_kv_len = x->max_kv_len + slack * test_below(3000),
                                  .max_pages = 1 + pages + slack * test_below(100)};
}

static void company_run(company *x, attn_case *a, qkv_context *ctx, const bits *together)
{
    const qkv_attention_spec *s = &a->config.spec;
    const int32_t n = x->num_requests, tokens = x->qo_indptr[n];
    const int64_t heads = s->num_qo_heads;
    const size_t o_row = row_bytes(a, s->dtype_o, s->head_dim_vo);
    const size_t lse_row = (size_t)heads * sizeof(float);
    const qkv_attention_limits limits = company_limits(x);
    const qkv_kv_index index = {QKV_KV_INDEX_INIT,
                                .qo_indptr = TENSOR(x->qo_indptr, QKV_I32, n + 1),
                                .kv_indptr = TENSOR(x->kv_indptr, QKV_I32, n + 1),
                                .kv_indices = TENSOR(x->indices, QKV_I32, x->kv_indptr[n]),
                                .kv_last_page_len = TENSOR(x->last_page_len, QKV_I32, n)};
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1, .levels = &index};
    qkv_attention_io io = a->io;
    io.q = TENSOR(x->q, s->dtype_q, tokens, heads, s->head_dim_qk);
    io.o = TENSOR(x->o, s->dtype_o, tokens, heads, s->head_dim_vo);
    io.lse = TENSOR(x->lse, QKV_F32, tokens, heads);
    qkv_attention *op;
    CASE_OK(a, qkv_attention_create(ctx, s, &limits, NULL, &op));
    CASE_OK(a, qkv_attention_plan(op, &batch, NULL));
    CASE_OK(a, qkv_attention_run(op, &io, NULL));
    for (int32_t i = 0; i < n; i++) {
        const size_t rows = (size_t)(x->qo_indptr[i + 1] - x->qo_indptr[i]);
        const size_t at = (size_t)x->qo_indptr[i];
        const size_t all = (size_t)case_ints(&a->qo_indptr)[x->request[i]];
        if (memcmp(x->o + at * o_row, (char *)together->o + all * o_row, rows * o_row) == 0 &&
            memcmp((char *)x->lse + at * lse_row, (char *)together->lse + all * lse_row,
                   rows * lse_row) == 0)
            continue;
        case_print(0, &a->config);
        fail_msg("%s: request %d among %d, %d workers: other bits than before",
                 qkv_context_device_name(ctx), x->request[i], n, limits.max_workers);
    }
    qkv_attention_destroy(op);
}

static void same_bits_in_any_company(qkv_context *ctx, void *user)
{
    attn_case *a = user;
    const char *level = strchr(qkv_context_device_name(ctx), ':') + 1;
    case_try(a, ctx);
    bits together = bits_of(a);
    for (int32_t i = 0; i < a->config.num_requests + 12; i++) { /* each alone, then some */
        company x = {.num_requests = 1, .request = {i}};
        if (i >= a->config.num_requests) {
            for (int32_t r = 0; r < a->config.num_requests; r++) x.request[r] = r;
            case_shuffle(x.request, a->config.num_requests);
            x.num_requests = 1 + (int32_t)test_below(a->config.num_requests);
        }
        qkv_context *other;
        EXPECT_OK(
            qkv_context_create(&(qkv_context_options){TEST_CONTEXT_INIT, .isa = level,
                                                      .num_threads = 1 + (int32_t)test_below(6)},
                               &other));
        company_new(&x, a);
        company_run(&x, a, other, &together);
        company_free(&x);
        qkv_context_destroy(other);
    }
    bits_free(&together);
}

static void attention_is_batch_invariant(void **state)
{
    (void)state;
    for (int i = 0; i < 8; i++) {
        attn_case a;
        case_config c = any_dims(i, 1 + 5 * (i % 4));
        c.spec.flags = QKV_ATTENTION_BATCH_INVARIANT;
        if (i & 1) c.spec.flags |= QKV_ATTENTION_HAS_SINK;
        if (i & 2) c.spec.features |= QKV_FEATURE_ALIBI;
        if (i & 4) c.spec.features |= QKV_FEATURE_ROPE;
        if (i == 6) c.spec.dtype_kv = QKV_I8, c.scales[CASE_K] = (case_scale){CASE_NUMBER, 0.01};
        c.max_sink = 3;
        c.max_slope = 0.01;
        c.limits.max_workers = 7;
        case_add(&c, 1, 4000 + (int32_t)test_below(500));
        case_add(&c, 1, 1025);
        case_add(&c, 1, 1024);
        case_add(&c, 1, 3);
        case_add(&c, 0, 700);
        case_add(&c, 2, 2000 + (int32_t)test_below(500));
        case_add(&c, 5, 1500);
        case_add(&c, 17, 1100);
        case_add(&c, 60, 60);
        case_add(&c, 3, 0);
        case_build(&a, &c);
        test_every_level(3, same_bits_in_any_company, &a);
        case_free(&a);
    }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_never_reads_what_is_not_in_use),
        cmocka_unit_test(attention_is_batch_invariant),
    };
    return cmocka_run_group_tests_name("attention_invariance", tests, NULL, NULL);
}
