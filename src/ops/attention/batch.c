/* batch.c - reading and checking one step's index arrays. Those on the device are only looked at from outside:
 * planner.h checks what is in them.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "base/kv_index.h"
#include "ops/attention/attention.h"

static qkv_status check_counts(const qkv_attention *a, const batch_view *batch)
{
    for (i32 level = 0; level < batch->num_levels; level++)
        QI_REQUIRE(batch->level[level].num_requests <= a->limits.max_requests,
                   "qo_indptr: expected at most max_requests = %d requests, got %lld (level %d)",
                   (int)a->limits.max_requests, (long long)batch->level[level].num_requests,
                   (int)level);
    return QKV_OK;
}

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

/* Index arrays are the host's, or the device's. */
static void expect_arrays_on(const qkv_attention *a, int on_device)
{
    qi_tensors_on(on_device ? a->ctx->device : (DLDevice){kDLCPU, 0});
}

/* Like qi_expect, for what kernels read where it is. */
static qkv_status expect_kernels_read(const qkv_attention *a, const batch_view *batch,
                                      const DLTensor *t, const char *name, DLDataType dtype,
                                      int ndim, const int64_t *shape)
{
    expect_arrays_on(a, 1);
    const qkv_status status = qi_expect(t, name, dtype, ndim, shape);
    expect_arrays_on(a, batch->in_place);
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
    QI_TRY(expect_kernels_read(a, batch, b->mask_bits, "mask_bits", QKV_U8, QI_SHAPE(QI_ANY)));
    QI_TRY(qi_expect(b->mask_indptr, "mask_indptr", QKV_I64, QI_SHAPE(last->num_requests + 1)));
    const i64 *indptr = qi_data(b->mask_indptr);
    static const u8 none;
    batch->mask_bits = qi_data(b->mask_bits) ? qi_data(b->mask_bits) : &none;
    batch->mask_indptr = indptr;
    batch->num_mask_bytes = b->mask_bits->shape[0];
    for (i64 r = 0; !batch->in_place && r < last->num_requests; r++) {
        const i64 rows = last->qo_indptr[r + 1] - last->qo_indptr[r];
        const i64 bytes = (rows * qi_kv_len(last, r) + 7) / 8;
        QI_REQUIRE(indptr[r] >= 0 && indptr[r + 1] >= indptr[r] &&
                       indptr[r + 1] - indptr[r] >= bytes,
                   "mask_indptr: expected at least %lld bytes from an offset >= 0 on, got %lld to "
                   "%lld (request %lld)",
                   (long long)bytes, (long long)indptr[r], (long long)indptr[r + 1], (long long)r);
    }
    QI_REQUIRE(batch->in_place || indptr[last->num_requests] <= b->mask_bits->shape[0],
               "mask_bits: expected at least %lld bytes, as mask_indptr says, got %lld",
               (long long)indptr[last->num_requests], (long long)b->mask_bits->shape[0]);
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
    if (batch->in_place)
        QI_FAIL(QKV_ERR_UNSUPPORTED,
                "bsr_indptr: expected arrays on the host, since plans on the device have no BSR");
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
    QI_TRY(expect_kernels_read(a, batch, index->bsr_indices, "bsr_indices", QKV_I32,
                               QI_SHAPE(QI_ANY)));
    QI_TRY(qi_expect(index->bsr_indices, "bsr_indices", QKV_I32, QI_SHAPE(QI_ANY)));
    bsr->indices = qi_data(index->bsr_indices);
    if (index->bsr_mask) {
        const i64 bits = (i64)bsr->rows * bsr->cols;
        QI_TRY(expect_kernels_read(a, batch, index->bsr_mask, "bsr_mask", QKV_U8,
                                   QI_SHAPE(index->bsr_indices->shape[0], (bits + 7) / 8)));
        bsr->mask = qi_data(index->bsr_mask);
        bsr->mask_stride = qi_stride(index->bsr_mask, 0);
    }
    return check_blocks(bsr, view, index->bsr_indices->shape[0]);
}

/* One level's page table; messages say which where there are several. */
static qkv_status read_level(const qkv_attention *a, const qkv_kv_index *in,
                             const batch_view *batch, i32 level, qkv_kv_index *index,
                             qi_kv_view *out)
{
    char name[24], message[512];
    snprintf(name, sizeof name, "levels[%d]", (int)level);
    QI_TRY(qi_read_struct(index, sizeof *index, in, name));
    const qkv_status status =
        batch->in_place ? qi_kv_index_read(in, a->spec.page_size, out)
                        : qi_kv_index_check(in, a->spec.page_size, a->limits.pool_pages, out);
    if (status == QKV_OK || batch->num_levels == 1) return status;
    snprintf(message, sizeof message, "%s", qkv_last_error());
    QI_FAIL(status, "%s: %s", name, message);
}

/* The one of several levels. */
static const qkv_kv_index *level_at(const qkv_attention_batch *b, i32 level)
{
    const char *at = (const char *)b->levels + (size_t)level * b->levels->struct_size;
    return (const qkv_kv_index *)(const void *)at;
}

/* On a GPU, arrays are where the last level's qo_indptr is. */
static qkv_status find_arrays(const qkv_attention *a, const qkv_attention_batch *b, i32 *on_device)
{
    qkv_kv_index index;
    *on_device = 0;
    if (a->ctx->device.device_type != kDLCUDA) return QKV_OK;
    QI_TRY(qi_read_struct(&index, sizeof index, level_at(b, b->num_levels - 1), "levels"));
    *on_device = index.qo_indptr && index.qo_indptr->device.device_type == kDLCUDA;
    return QKV_OK;
}

/* Rows that q, o and lse have at least, where qo_indptr cannot be asked. */
static qkv_status read_max_tokens(const qkv_attention *a, const qkv_attention_batch *b,
                                  batch_view *batch)
{
    batch->max_tokens = b->max_tokens ? b->max_tokens : a->limits.max_tokens;
    QI_REQUIRE(batch->in_place || b->max_tokens == 0,
               "max_tokens: expected 0 with arrays on the host, got %d", (int)b->max_tokens);
    QI_REQUIRE(b->max_tokens >= 0 && b->max_tokens <= a->limits.max_tokens,
               "max_tokens: expected 0 to limits.max_tokens = %lld, got %d",
               (long long)a->limits.max_tokens, (int)b->max_tokens);
    return QKV_OK;
}

static qkv_status read_detection(const qkv_attention *a, const qkv_attention_batch *b,
                                 batch_view *batch)
{
    QI_REQUIRE(b->detect_shared_prefix == 0 || b->detect_shared_prefix == 1,
               "detect_shared_prefix: expected 0 or 1, got %d", (int)b->detect_shared_prefix);
    QI_REQUIRE(!b->detect_shared_prefix || (b->num_levels == 1 && !batch->bsr.indptr),
               "detect_shared_prefix: expected 0 with several levels or BSR, got 1");
    QI_REQUIRE(!b->detect_shared_prefix || !(a->spec.flags & QKV_ATTENTION_BATCH_INVARIANT),
               "detect_shared_prefix: expected 0 with QKV_ATTENTION_BATCH_INVARIANT, got 1");
    QI_REQUIRE(!b->detect_shared_prefix || a->spec.page_size > 0,
               "detect_shared_prefix: expected 0 with ragged keys, got 1");
    QI_REQUIRE(!b->detect_shared_prefix || !batch->in_place,
               "detect_shared_prefix: expected 0 with arrays on the device, got 1");
    batch->detect_shared_prefix = b->detect_shared_prefix && a->limits.max_levels > 1;
    return QKV_OK;
}

qkv_status qi_attention_read_batch(const qkv_attention *a, const qkv_attention_batch *in,
                                   batch_view *out)
{
    qkv_attention_batch b;
    QI_TRY(qi_read_struct(&b, sizeof b, in, "batch"));
    QI_REQUIRE(b.num_levels >= 1 && b.num_levels <= a->limits.max_levels,
               "num_levels: expected 1 to max_levels = %d, got %d", (int)a->limits.max_levels,
               (int)b.num_levels);
    QI_REQUIRE(b.levels, "levels: expected %d levels, got NULL", (int)b.num_levels);
    *out = (batch_view){.num_levels = b.num_levels};
    QI_TRY(find_arrays(a, &b, &out->in_place));
    expect_arrays_on(a, out->in_place);
    QI_TRY(read_max_tokens(a, &b, out));
    qkv_kv_index index;
    for (i32 l = 0; l < b.num_levels; l++) {
        QI_TRY(read_level(a, level_at(&b, l), out, l, &index, &out->level[l]));
        QI_TRY(read_bsr(a, &index, out));
    }
    QI_TRY(check_counts(a, out));
    if (!out->in_place) {
        QI_TRY(check_limits(a, out));
        QI_TRY(check_nesting(a, out));
    }
    if (b.qo_pos) {
        const qi_kv_view *last = &out->level[b.num_levels - 1];
        QI_TRY(qi_expect(b.qo_pos, "qo_pos", QKV_I32, QI_SHAPE(last->num_requests)));
        out->qo_pos = qi_data(b.qo_pos);
    }
    QI_TRY(read_mask(a, &b, out));
    return read_detection(a, &b, out);
}
