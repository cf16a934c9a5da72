/* plan.c - qkv_attention_plan: read one step's index arrays, copy what run needs, cut the work; or have the
 * device do it.
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "ops/attention/attention.h"

static const qi_lanes one_lane = {.id = 0, .count = 1};

/* ---- the plan ----------------------------------------------------------------------------- */

/* Groups of the batch in the spare halves; no shared ones where their partial rows would not fit. */
static qkv_status make_groups(qkv_attention *a, const batch_view *batch, group_list *list)
{
    *list = (group_list){.groups = a->spare_groups, .rows = a->spare_rows};
    if (batch->bsr.indptr)
        qi_groups_by_block(batch, &a->schedule, list);
    else if (batch->detect_shared_prefix)
        qi_groups_by_prefix(batch, &a->schedule, a->limits.max_levels, a->order, list);
    else
        qi_groups_by_level(one_lane, batch, list);
    if (list->num_levels == 1 && !a->schedule.fixed_cuts) return QKV_OK;
    const qi_lengths lengths = qi_lengths_of(batch, list, a->spans, a->strips);
    const i64 needed = qi_schedule_rows_needed(&lengths, &a->schedule);
    if (needed <= a->limits.max_split_rows) return QKV_OK;
    if (batch->detect_shared_prefix) {
        qi_groups_by_level(one_lane, batch, list);
        return QKV_OK;
    }
    QI_FAIL(QKV_ERR_INVALID,
            "max_split_rows: expected at least the %lld partial rows of this batch, got %lld",
            (long long)needed, (long long)a->limits.max_split_rows);
}

/* Page lists of a level, one after another; those of a CSR table are. Returns how many pages they have. */
static i32 copy_pages(const qi_kv_view *v, i32 *out)
{
    const i64 lists = v->kv_indices ? v->num_requests > 0 : v->num_requests;
    i32 listed = 0;
    for (i64 r = 0; r < lists; r++) {
        const i32 n = (i32)(v->kv_indices ? v->num_pages_listed : qi_kv_num_pages(v, r));
        if (n) memcpy(out + listed, qi_kv_pages(v, r), (size_t)n * sizeof(i32));
        listed += n;
    }
    return listed;
}

/* Copies lengths, positions and page lists into the plan block. */
static void copy_batch(qkv_attention *a, const batch_view *batch)
{
    const qi_plan *plan = &a->plan;
    const qi_kv_view *last = &batch->level[batch->num_levels - 1];
    i32 listed = 0;
    a->num_tokens = last->qo_indptr[last->num_requests];
    a->ragged_end = 0;
    a->max_page = -1;
    for (i32 l = 0; l < batch->num_levels; l++) {
        const qi_kv_view *v = &batch->level[l];
        if (a->spec.page_size == 0) {
            const i64 end = v->kv_indptr[v->num_requests];
            a->ragged_end = end > a->ragged_end ? end : a->ragged_end;
        }
        listed += copy_pages(v, plan->pages + listed);
        if (v->max_page <= a->max_page) continue;
        a->max_page = v->max_page;
        a->max_page_request = v->max_page_request;
        a->max_page_entry = v->max_page_entry;
    }
    a->num_listed = listed;
    a->bsr = batch->bsr;
    a->mask_bits = batch->mask_bits;
    qi_copy_requests(one_lane, batch, plan, a->mask_indptr);
}

static void log_plan(const qkv_attention *a, i64 ns)
{
    const qi_plan_header *h = a->plan.header;
    if (a->on_device) {
        qi_log(&a->ctx->logger, "plan,%s,on the device,us=%.1f", a->row->name, (double)ns * 1e-3);
        return;
    }
    qi_log(&a->ctx->logger,
           "plan,%s,requests=%d,tokens=%d,levels=%d,work=%d,merges=%d,split_rows=%lld,strips=%d,"
           "cost_per_worker=%lld,us=%.1f",
           a->row->name, (int)h->num_requests, (int)h->num_tokens, (int)h->num_levels,
           (int)h->num_work, (int)h->num_merges, (long long)h->num_split_rows, (int)h->num_strips,
           (long long)h->cost_per_worker, (double)ns * 1e-3);
}

/* Exchanges what the former plan uses with what the new one was built in. */
static void swap_spare(qkv_attention *a)
{
    qi_group *groups = a->plan.groups;
    i32 *rows = a->plan.rows;
    a->plan.groups = a->spare_groups;
    a->plan.rows = a->spare_rows;
    a->spare_groups = groups;
    a->spare_rows = rows;
}

static qkv_status plan_on_host(qkv_attention *a, const batch_view *batch, void *stream)
{
    const int cuda = a->ctx->device.device_type == kDLCUDA;
    group_list list;
    QI_TRY(make_groups(a, batch, &list));

    /* Only the upload can fail from here on: the former plan gives way to this one. */
    a->planned = 0;
    swap_spare(a);
    copy_batch(a, batch);
    const qi_lengths lengths = qi_lengths_of(batch, &list, a->spans, a->strips);
    qi_schedule(one_lane, &lengths, &a->schedule, &a->plan);
    a->on_device = 0;
    if (cuda) QI_TRY(qi_attention_cuda_upload(a, &lengths, stream));
    a->planned = 1;
    return QKV_OK;
}

/* What run needs to know of a plan on the device. */
static qkv_status plan_on_device(qkv_attention *a, const batch_view *batch, void *stream)
{
    QI_TRY(qi_attention_cuda_plan(a, batch, stream));
    a->num_tokens = batch->max_tokens;
    a->max_page = -1; /* not known */
    a->ragged_end = 0;
    a->bsr = batch->bsr;
    a->mask_bits = batch->mask_bits;
    a->planned = 1;
    a->on_device = 1;
    return QKV_OK;
}

qkv_status qkv_attention_plan(qkv_attention *attention, const qkv_attention_batch *batch,
                              void *stream)
{
    qkv_attention *a = attention;
    QI_REQUIRE(a, "attention: expected an operator, got NULL");
    QI_REQUIRE_CONTEXT(a->ctx);
    const int verbose = qi_verbose(&a->ctx->logger, QI_VERBOSE_PLAN);
    const i64 start = verbose ? qi_now_ns() : 0;
    batch_view view;
    QI_TRY(qi_attention_read_batch(a, batch, &view));
    if (view.in_place) {
        QI_TRY(plan_on_device(a, &view, stream));
    } else if (a->ctx->device.device_type == kDLCUDA) {
        QI_TRY(qi_attention_cuda_begin_plan(a, stream));
        const qkv_status status = plan_on_host(a, &view, stream);
        if (status != QKV_OK) qi_attention_cuda_cancel_plan(a);
        QI_TRY(status);
    } else {
        QI_TRY(plan_on_host(a, &view, stream));
    }
    if (verbose) log_plan(a, qi_now_ns() - start);
    return QKV_OK;
}
