/* plan.c - qkv_attention_plan: check one step's index arrays, copy what run needs, cut the work.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "ops/attention/attention.h"

/* ---- checks ------------------------------------------------------------------------------- */

static qkv_status check_limits(const qkv_attention *a, const batch_view *batch)
{
    const qkv_attention_limits *l = &a->limits;
    const qi_kv_view *last = &batch->level[batch->num_levels - 1];
    const i64 tokens = last->qo_indptr[last->num_requests];
    QI_REQUIRE(tokens <= l->max_tokens, "qo_indptr: expected at most max_tokens = %lld, got %lld",
               (long long)l->max_tokens, (long long)tokens);
    for (i64 r = 0; r < last->num_requests; r++) {
        const i64 qo_len = last->qo_indptr[r + 1] - last->qo_indptr[r];
        QI_REQUIRE(qo_len <= l->max_qo_len,
                   "qo_indptr: expected at most max_qo_len = %d rows a request, got %lld (request "
                   "%lld)",
                   (int)l->max_qo_len, (long long)qo_len, (long long)r);
    }
    i64 pages = 0;
    for (i32 level = 0; level < batch->num_levels; level++) {
        const qi_kv_view *v = &batch->level[level];
        QI_REQUIRE(v->num_requests <= l->max_requests,
                   "qo_indptr: expected at most max_requests = %d requests, got %lld (level %d)",
                   (int)l->max_requests, (long long)v->num_requests, (int)level);
        for (i64 r = 0; r < v->num_requests; r++) {
            const i64 kv_len = qi_kv_len(v, r);
            QI_REQUIRE(
                kv_len <= l->max_kv_len,
                "%s: expected at most max_kv_len = %lld keys a request, got %lld (request %lld)",
                v->block_table ? "kv_lens" : "kv_indptr", (long long)l->max_kv_len,
                (long long)kv_len, (long long)r);
            pages += qi_kv_num_pages(v, r);
        }
    }
    QI_REQUIRE(pages <= l->max_pages || a->spec.page_size == 0,
               "%s: expected at most max_pages = %lld pages in use, got %lld",
               last->block_table ? "block_table" : "kv_indices", (long long)l->max_pages,
               (long long)pages);
    return QKV_OK;
}

/* Each level's groups are runs of whole groups of the next, and no request grows too long. */
static qkv_status check_nesting(const qkv_attention *a, const batch_view *batch)
{
    for (i32 level = 0; level + 1 < batch->num_levels; level++) {
        const qi_kv_view *outer = &batch->level[level], *inner = &batch->level[level + 1];
        i64 r = 0;
        for (i64 g = 0; g <= outer->num_requests; g++) {
            while (r < inner->num_requests && inner->qo_indptr[r] < outer->qo_indptr[g]) r++;
            QI_REQUIRE(inner->qo_indptr[r] == outer->qo_indptr[g],
                       "qo_indptr: expected row %d, where a group of level %d ends, to end one of "
                       "level %d too (entry %lld)",
                       (int)outer->qo_indptr[g], (int)level, (int)level + 1, (long long)g);
        }
        QI_REQUIRE(outer->qo_indptr[outer->num_requests] == inner->qo_indptr[inner->num_requests],
                   "qo_indptr: expected %d rows in level %d as in level %d, got %d",
                   (int)inner->qo_indptr[inner->num_requests], (int)level, (int)level + 1,
                   (int)outer->qo_indptr[outer->num_requests]);
    }
    if (batch->num_levels == 1) return QKV_OK;
    const qi_kv_view *last = &batch->level[batch->num_levels - 1];
    i64 at[MAX_LEVELS] = {0};
    for (i64 r = 0; r < last->num_requests; r++) {
        if (last->qo_indptr[r] == last->qo_indptr[r + 1]) continue;
        i64 kv_len = qi_kv_len(last, r);
        for (i32 level = 0; level + 1 < batch->num_levels; level++) {
            const qi_kv_view *v = &batch->level[level];
            while (v->qo_indptr[at[level] + 1] <= last->qo_indptr[r]) at[level]++;
            kv_len += qi_kv_len(v, at[level]);
        }
        QI_REQUIRE(kv_len <= a->limits.max_kv_len,
                   "levels: expected at most max_kv_len = %lld keys a request over all levels, got "
                   "%lld (request %lld)",
                   (long long)a->limits.max_kv_len, (long long)kv_len, (long long)r);
    }
    return QKV_OK;
}

/* Like qi_expect, for what kernels read where it is. */
static qkv_status expect_kernels_read(const qkv_attention *a, const DLTensor *t, const char *name,
                                      DLDataType dtype, int ndim, const int64_t *shape)
{
    qi_tensors_on(a->ctx->device);
    const qkv_status status = qi_expect(t, name, dtype, ndim, shape);
    qi_tensors_on((DLDevice){kDLCPU, 0});
    return status;
}

/* The custom mask: bits of the last level's keys. */
static qkv_status read_mask(const qkv_attention *a, const qkv_attention_batch *b, batch_view *batch)
{
    const qi_kv_view *last = &batch->level[batch->num_levels - 1];
    if (a->spec.mask != QKV_MASK_CUSTOM) {
        QI_REQUIRE(!b->mask_bits && !b->mask_indptr,
                   "mask_bits, mask_indptr: expected NULL without QKV_MASK_CUSTOM");
        return QKV_OK;
    }
    QI_TRY(expect_kernels_read(a, b->mask_bits, "mask_bits", QKV_U8, QI_SHAPE(QI_ANY)));
    QI_TRY(qi_expect(b->mask_indptr, "mask_indptr", QKV_I64, QI_SHAPE(last->num_requests + 1)));
    const i64 *indptr = qi_data(b->mask_indptr);
    for (i64 r = 0; r < last->num_requests; r++) {
        const i64 rows = last->qo_indptr[r + 1] - last->qo_indptr[r];
        const i64 bytes = (rows * qi_kv_len(last, r) + 7) / 8;
        QI_REQUIRE(indptr[r] >= 0 && indptr[r + 1] >= indptr[r] &&
                       indptr[r + 1] - indptr[r] >= bytes,
                   "mask_indptr: expected at least %lld bytes from an offset >= 0 on, got %lld to "
                   "%lld (request %lld)",
                   (long long)bytes, (long long)indptr[r], (long long)indptr[r + 1], (long long)r);
    }
    QI_REQUIRE(indptr[last->num_requests] <= b->mask_bits->shape[0],
               "mask_bits: expected at least %lld bytes, as mask_indptr says, got %lld",
               (long long)indptr[last->num_requests], (long long)b->mask_bits->shape[0]);
    static const u8 none;
    batch->mask_bits = qi_data(b->mask_bits) ? qi_data(b->mask_bits) : &none;
    batch->mask_indptr = indptr;
    return QKV_OK;
}

/* One list of column blocks for each row block (and KV head): ascending, within the keys. */
static qkv_status check_blocks(const bsr_view *bsr, const qi_kv_view *view, i64 num_indices)
{
    for (i32 list = 0; list < bsr->num_lists; list++) {
        const i32 *indptr = bsr->indptr + list * bsr->indptr_stride;
        QI_REQUIRE(indptr[0] >= 0, "bsr_indptr: expected a first entry >= 0, got %d (list %d)",
                   (int)indptr[0], (int)list);
        i64 block = 0;
        for (i64 r = 0; r < view->num_requests; r++) {
            const i64 kv_len = qi_kv_len(view, r), columns = (kv_len + bsr->cols - 1) / bsr->cols;
            const i64 qo_len = view->qo_indptr[r + 1] - view->qo_indptr[r];
            for (i64 end = block + (qo_len + bsr->rows - 1) / bsr->rows; block < end; block++) {
                QI_REQUIRE(indptr[block + 1] >= indptr[block] && indptr[block + 1] <= num_indices,
                           "bsr_indptr: expected entries that do not fall, at most %lld, got %d "
                           "after %d (list %d, row block %lld)",
                           (long long)num_indices, (int)indptr[block + 1], (int)indptr[block],
                           (int)list, (long long)block);
                i64 before = -1;
                for (i32 i = indptr[block]; i < indptr[block + 1]; i++) {
                    QI_REQUIRE(bsr->indices[i] > before && bsr->indices[i] < columns,
                               "bsr_indices: expected ascending column blocks below %lld, got %d "
                               "after %lld (entry %d, row block %lld of request %lld)",
                               (long long)columns, (int)bsr->indices[i], (long long)before, (int)i,
                               (long long)block, (long long)r);
                    before = bsr->indices[i];
                }
            }
        }
    }
    return QKV_OK;
}

static qkv_status read_bsr(const qkv_attention *a, const qkv_kv_index *index, batch_view *batch)
{
    if (!index->bsr_indptr) {
        QI_REQUIRE(!index->bsr_indices && !index->bsr_mask && !index->bsr_rows && !index->bsr_cols,
                   "bsr_indptr: expected a tensor with the other bsr fields, got NULL");
        return QKV_OK;
    }
    QI_REQUIRE(batch->num_levels == 1, "bsr_indptr: expected one level, got %d",
               (int)batch->num_levels);
    QI_REQUIRE(index->bsr_rows > 0 && index->bsr_cols > 0,
               "bsr_rows, bsr_cols: expected >= 1, got %d, %d", (int)index->bsr_rows,
               (int)index->bsr_cols);
    const qi_kv_view *view = &batch->level[0];
    bsr_view *bsr = &batch->bsr;
    bsr->rows = index->bsr_rows;
    bsr->cols = index->bsr_cols;
    for (i64 r = 0; r < view->num_requests; r++) {
        const i64 qo_len = view->qo_indptr[r + 1] - view->qo_indptr[r];
        bsr->num_blocks += (qo_len + bsr->rows - 1) / bsr->rows;
    }
    const DLTensor *indptr = index->bsr_indptr;
    QI_TRY(qi_expect(indptr, "bsr_indptr", QKV_I32, QI_SHAPE(QI_ANY, bsr->num_blocks + 1)));
    QI_REQUIRE(indptr->shape[0] == 1 || indptr->shape[0] == a->spec.num_kv_heads,
               "bsr_indptr: expected 1 or num_kv_heads = %d lists, got %lld",
               (int)a->spec.num_kv_heads, (long long)indptr->shape[0]);
    bsr->num_lists = (i32)indptr->shape[0];
    QI_REQUIRE(
        bsr->num_lists * bsr->num_blocks <= a->limits.max_row_blocks,
        "bsr_indptr: expected at most max_row_blocks = %d row blocks (times lists), got %lld",
        (int)a->limits.max_row_blocks, (long long)(bsr->num_lists * bsr->num_blocks));
    bsr->indptr = qi_data(indptr);
    bsr->indptr_stride = qi_stride(indptr, 0);
    QI_TRY(expect_kernels_read(a, index->bsr_indices, "bsr_indices", QKV_I32, QI_SHAPE(QI_ANY)));
    QI_TRY(qi_expect(index->bsr_indices, "bsr_indices", QKV_I32, QI_SHAPE(QI_ANY)));
    bsr->indices = qi_data(index->bsr_indices);
    if (index->bsr_mask) {
        const i64 bits = (i64)bsr->rows * bsr->cols;
        QI_TRY(expect_kernels_read(a, index->bsr_mask, "bsr_mask", QKV_U8,
                                   QI_SHAPE(index->bsr_indices->shape[0], (bits + 7) / 8)));
        bsr->mask = qi_data(index->bsr_mask);
        bsr->mask_stride = qi_stride(index->bsr_mask, 0);
    }
    return check_blocks(bsr, view, index->bsr_indices->shape[0]);
}

/* One level's page table; messages say which where there are several. */
static qkv_status read_level(const qkv_attention *a, const qkv_kv_index *in, i32 num_levels,
                             i32 level, qkv_kv_index *index, qi_kv_view *out)
{
    char name[24], message[512];
    snprintf(name, sizeof name, "levels[%d]", (int)level);
    QI_TRY(qi_read_struct(index, sizeof *index, in, name));
    const qkv_status status = qi_kv_index_check(in, a->spec.page_size, a->limits.pool_pages, out);
    if (status == QKV_OK || num_levels == 1) return status;
    snprintf(message, sizeof message, "%s", qkv_last_error());
    QI_FAIL(status, "%s: %s", name, message);
}

/* Reads and checks all of a batch. */
static qkv_status read_batch(const qkv_attention *a, const qkv_attention_batch *in, batch_view *out)
{
    qkv_attention_batch b;
    QI_TRY(qi_read_struct(&b, sizeof b, in, "batch"));
    QI_REQUIRE(b.num_levels >= 1 && b.num_levels <= a->limits.max_levels,
               "num_levels: expected 1 to max_levels = %d, got %d", (int)a->limits.max_levels,
               (int)b.num_levels);
    QI_REQUIRE(b.levels, "levels: expected %d levels, got NULL", (int)b.num_levels);
    QI_REQUIRE(b.reserved == 0, "reserved: expected 0, got %d", (int)b.reserved);
    *out = (batch_view){.num_levels = b.num_levels};
    qkv_kv_index index;
    for (i32 l = 0; l < b.num_levels; l++) {
        const char *at = (const char *)b.levels + (size_t)l * b.levels->struct_size;
        QI_TRY(read_level(a, (const qkv_kv_index *)(const void *)at, b.num_levels, l, &index,
                          &out->level[l]));
        QI_TRY(read_bsr(a, &index, out));
    }
    QI_TRY(check_limits(a, out));
    QI_TRY(check_nesting(a, out));
    const qi_kv_view *last = &out->level[b.num_levels - 1];
    if (b.qo_pos) {
        QI_TRY(qi_expect(b.qo_pos, "qo_pos", QKV_I32, QI_SHAPE(last->num_requests)));
        out->qo_pos = qi_data(b.qo_pos);
    }
    QI_TRY(read_mask(a, &b, out));
    QI_REQUIRE(b.detect_shared_prefix == 0 || b.detect_shared_prefix == 1,
               "detect_shared_prefix: expected 0 or 1, got %d", (int)b.detect_shared_prefix);
    QI_REQUIRE(!b.detect_shared_prefix || (b.num_levels == 1 && !out->bsr.indptr),
               "detect_shared_prefix: expected 0 with several levels or BSR, got 1");
    QI_REQUIRE(!b.detect_shared_prefix || !(a->spec.flags & QKV_ATTENTION_BATCH_INVARIANT),
               "detect_shared_prefix: expected 0 with QKV_ATTENTION_BATCH_INVARIANT, got 1");
    QI_REQUIRE(!b.detect_shared_prefix || a->spec.page_size > 0,
               "detect_shared_prefix: expected 0 with ragged keys, got 1");
    out->detect_shared_prefix = b.detect_shared_prefix && a->limits.max_levels > 1;
    return QKV_OK;
}

/* ---- the plan ----------------------------------------------------------------------------- */

static qi_lengths lengths_of(const batch_view *batch, const group_list *list)
{
    const qi_kv_view *last = &batch->level[batch->num_levels - 1];
    return (qi_lengths){.groups = list->groups,
                        .num_groups = list->num_groups,
                        .num_requests = (i32)last->num_requests,
                        .num_tokens = last->qo_indptr[last->num_requests],
                        .num_levels = list->num_levels};
}

/* Groups of the batch in the spare halves; no shared ones where their partial rows would not fit. */
static qkv_status make_groups(qkv_attention *a, const batch_view *batch, group_list *list)
{
    *list = (group_list){.groups = a->spare_groups, .rows = a->spare_rows, .leaf = a->leaf};
    if (batch->bsr.indptr)
        qi_groups_by_block(batch, &a->schedule, list);
    else if (batch->detect_shared_prefix)
        qi_groups_by_prefix(batch, &a->schedule, a->limits.max_levels, a->order, list);
    else
        qi_groups_by_level(batch, list);
    if (list->num_levels == 1 && !a->schedule.fixed_cuts) return QKV_OK;
    const qi_lengths lengths = lengths_of(batch, list);
    const i64 needed = qi_schedule_rows_needed(&lengths, &a->schedule);
    if (needed <= a->limits.max_split_rows) return QKV_OK;
    if (batch->detect_shared_prefix) {
        qi_groups_by_level(batch, list);
        return QKV_OK;
    }
    QI_FAIL(QKV_ERR_INVALID,
            "max_split_rows: expected at least the %lld partial rows of this batch, got %lld",
            (long long)needed, (long long)a->limits.max_split_rows);
}

/* Copies lengths, positions and page lists into the plan block. */
static void copy_batch(qkv_attention *a, const batch_view *batch, const group_list *list)
{
    const qi_plan *plan = &a->plan;
    const qi_kv_view *last = &batch->level[batch->num_levels - 1];
    const i64 requests = last->num_requests;
    i32 listed = 0;
    a->num_tokens = last->qo_indptr[requests];
    a->ragged_end = 0;
    a->max_page = -1;
    for (i32 l = 0; l < batch->num_levels; l++) {
        const qi_kv_view *v = &batch->level[l];
        if (a->spec.page_size == 0) {
            const i64 end = v->kv_indptr[v->num_requests];
            a->ragged_end = end > a->ragged_end ? end : a->ragged_end;
        }
        for (i64 r = 0; r < v->num_requests; r++) {
            const i32 pages = (i32)qi_kv_num_pages(v, r);
            if (pages) memcpy(plan->pages + listed, qi_kv_pages(v, r), (size_t)pages * sizeof(i32));
            listed += pages;
        }
        if (v->max_page <= a->max_page) continue;
        a->max_page = v->max_page;
        a->max_page_request = v->max_page_request;
        a->max_page_entry = v->max_page_entry;
    }
    a->num_listed = listed;
    memcpy(plan->qo_indptr, last->qo_indptr, (size_t)(requests + 1) * sizeof(i32));
    for (i32 r = 0; r < requests; r++) {
        const i32 begin = last->qo_indptr[r], end = last->qo_indptr[r + 1];
        plan->mask_first[r] = batch->num_levels > 1 ? list->leaf[r]->kv_offset : 0;
        plan->kv_len[r] = (i32)qi_kv_len(last, r) + plan->mask_first[r];
        plan->qo_pos[r] = (i32)qi_first_position(batch, r, plan->kv_len[r], end - begin);
        for (i32 t = begin; t < end; t++) plan->token_request[t] = r;
    }
    a->bsr = batch->bsr;
    a->mask_bits = batch->mask_bits;
    if (a->mask_bits) memcpy(a->mask_indptr, batch->mask_indptr, (size_t)requests * sizeof(i64));
    if (list->num_levels == 1) return;
    for (i32 l = 0; l < list->num_levels; l++)
        memset(plan->row_merge + l * plan->max_tokens * a->spec.num_kv_heads, 0xff,
               (size_t)(a->num_tokens * a->spec.num_kv_heads) * sizeof(i32));
}

static void log_plan(const qkv_attention *a, i64 ns)
{
    const qi_plan_header *h = a->plan.header;
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

qkv_status qkv_attention_plan(qkv_attention *attention, const qkv_attention_batch *batch,
                              void *stream)
{
    qkv_attention *a = attention;
    QI_REQUIRE(a, "attention: expected an operator, got NULL");
    QI_REQUIRE_CONTEXT(a->ctx);
    const int verbose = qi_verbose(&a->ctx->logger, QI_VERBOSE_PLAN);
    const i64 start = verbose ? qi_now_ns() : 0;
    const int cuda = a->ctx->device.device_type == kDLCUDA;
    batch_view view;
    group_list list;
    if (cuda) QI_TRY(qi_attention_cuda_begin_plan(a, stream));
    qi_tensors_on((DLDevice){kDLCPU, 0}); /* index arrays are the host's */
    QI_TRY(read_batch(a, batch, &view));
    QI_TRY(make_groups(a, &view, &list));

    /* Nothing can fail from here on: the former plan gives way to this one. */
    swap_spare(a);
    copy_batch(a, &view, &list);
    const qi_lengths lengths = lengths_of(&view, &list);
    qi_schedule((qi_lanes){.id = 0, .count = 1}, &lengths, &a->schedule, &a->plan);
    a->planned = 1;
    if (cuda) QI_TRY(qi_attention_cuda_upload(a, &lengths, stream));
    if (verbose) log_plan(a, qi_now_ns() - start);
    return QKV_OK;
}
