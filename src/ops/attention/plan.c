/* plan.c - qkv_attention_plan: check one step's index arrays, copy what run needs, cut the work.
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "base/kv_index.h"
#include "ops/attention/attention.h"

static qkv_status check_limits(const qkv_attention *a, const qi_kv_view *view)
{
    const qkv_attention_limits *l = &a->limits;
    QI_REQUIRE(view->num_requests <= l->max_requests,
               "qo_indptr: expected at most max_requests = %d requests, got %lld",
               (int)l->max_requests, (long long)view->num_requests);
    const i64 tokens = view->qo_indptr[view->num_requests];
    QI_REQUIRE(tokens <= l->max_tokens, "qo_indptr: expected at most max_tokens = %lld, got %lld",
               (long long)l->max_tokens, (long long)tokens);
    i64 pages = 0;
    for (i64 r = 0; r < view->num_requests; r++) {
        const i64 qo_len = view->qo_indptr[r + 1] - view->qo_indptr[r], kv_len = qi_kv_len(view, r);
        QI_REQUIRE(qo_len <= l->max_qo_len,
                   "qo_indptr: expected at most max_qo_len = %d rows a request, got %lld (request "
                   "%lld)",
                   (int)l->max_qo_len, (long long)qo_len, (long long)r);
        QI_REQUIRE(kv_len <= l->max_kv_len,
                   "%s: expected at most max_kv_len = %lld keys a request, got %lld (request %lld)",
                   view->block_table ? "kv_lens" : "kv_indptr", (long long)l->max_kv_len,
                   (long long)kv_len, (long long)r);
        pages += a->spec.page_size ? qi_kv_num_pages(view, r) : 0;
    }
    QI_REQUIRE(pages <= l->max_pages || a->spec.page_size == 0,
               "%s: expected at most max_pages = %lld pages in use, got %lld",
               view->block_table ? "block_table" : "kv_indices", (long long)l->max_pages,
               (long long)pages);
    return QKV_OK;
}

/* Copies lengths, positions and page lists into the plan block. */
static void copy_batch(qkv_attention *a, const qi_kv_view *view, const i32 *qo_pos)
{
    const qi_plan *plan = &a->plan;
    i32 listed = 0;
    a->ragged_end = 0;
    memcpy(plan->qo_indptr, view->qo_indptr, (size_t)(view->num_requests + 1) * sizeof(i32));
    for (i64 r = 0; r < view->num_requests; r++) {
        const i32 kv_len = (i32)qi_kv_len(view, r);
        plan->kv_len[r] = kv_len;
        plan->qo_pos[r] =
            qo_pos ? qo_pos[r] : kv_len - (view->qo_indptr[r + 1] - view->qo_indptr[r]);
        if (a->spec.page_size == 0) {
            plan->kv_begin[r] = view->kv_indptr[r];
            continue;
        }
        const i32 pages = (i32)qi_kv_num_pages(view, r);
        plan->kv_begin[r] = listed;
        if (pages) memcpy(plan->pages + listed, qi_kv_pages(view, r), (size_t)pages * sizeof(i32));
        listed += pages;
    }
    if (a->spec.page_size == 0) a->ragged_end = view->kv_indptr[view->num_requests];
    a->num_tokens = view->qo_indptr[view->num_requests];
    a->max_page = view->max_page;
    a->max_page_request = view->max_page_request;
    a->max_page_entry = view->max_page_entry;
}

static void log_plan(const qkv_attention *a, i64 ns)
{
    const qi_plan_header *h = a->plan.header;
    qi_log(&a->ctx->logger,
           "plan,%s,requests=%d,tokens=%d,work=%d,merges=%d,split_rows=%lld,strips=%d,"
           "cost_per_worker=%lld,us=%.1f",
           a->row->name, (int)h->num_requests, (int)h->num_tokens, (int)h->num_work,
           (int)h->num_merges, (long long)h->num_split_rows, (int)h->num_strips,
           (long long)h->cost_per_worker, (double)ns * 1e-3);
}

qkv_status qkv_attention_plan(qkv_attention *attention, const qkv_attention_batch *batch,
                              void *stream)
{
    (void)stream;
    qkv_attention *a = attention;
    QI_REQUIRE(a, "attention: expected an operator, got NULL");
    const int verbose = qi_verbose(&a->ctx->logger, QI_VERBOSE_PLAN);
    const i64 start = verbose ? qi_now_ns() : 0;
    qkv_attention_batch b;
    QI_TRY(qi_read_struct(&b, sizeof b, batch, "batch"));
    QI_REQUIRE(b.num_levels == 1 && b.levels, "levels: expected 1 level, got %d",
               (int)b.num_levels);
    qi_kv_view view;
    QI_TRY(qi_kv_index_check(b.levels, a->spec.page_size, a->limits.pool_pages, &view));
    QI_TRY(check_limits(a, &view));
    const i32 *qo_pos = NULL;
    if (b.qo_pos) {
        QI_TRY(qi_expect(b.qo_pos, "qo_pos", QKV_I32, QI_SHAPE(view.num_requests)));
        qo_pos = qi_data(b.qo_pos);
    }

    /* Nothing can fail from here on: the former plan gives way to this one. */
    copy_batch(a, &view, qo_pos);
    const qi_lengths lengths = {.qo_indptr = a->plan.qo_indptr,
                                .kv_len = a->plan.kv_len,
                                .qo_pos = a->plan.qo_pos,
                                .num_requests = (i32)view.num_requests};
    qi_schedule((qi_lanes){.id = 0, .count = 1}, &lengths, &a->schedule, &a->plan);
    a->planned = 1;
    if (verbose) log_plan(a, qi_now_ns() - start);
    return QKV_OK;
}
