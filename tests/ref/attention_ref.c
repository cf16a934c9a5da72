/* attention_ref.c - each request alone: gather its keys and values as doubles, then row by row.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_ref.h"

#include <stdbool.h>

#include "support.h"

enum { MAX_DIM = 512 };

/* The layer's parameters after the overrides. */
typedef struct layer {
    const qkv_attention_spec *spec;
    double sm_scale, soft_cap; /* soft_cap 0 = none */
    int64_t window_left, window_right;
} layer;

/* One request's keys or values: [kv_head][key][dim]. */
typedef struct kv_rows {
    double *x;
    int64_t num_keys, dim;
} kv_rows;

static void *allocate(int64_t n, size_t bytes)
{
    void *p = calloc((size_t)(n > 0 ? n : 1), bytes);
    if (!p) abort();
    return p;
}

/* Element i0 * strides[0] + ... of a tensor; absent strides are contiguous. */
static int64_t stride_of(const DLTensor *t, int axis)
{
    if (t->strides) return t->strides[axis];
    int64_t stride = 1;
    for (int i = t->ndim - 1; i > axis; i--) stride *= t->shape[i];
    return stride;
}

static double element(const DLTensor *t, int64_t offset)
{
    return test_get((const char *)t->data + t->byte_offset, t->dtype, offset);
}

static int32_t index_at(const DLTensor *t, int64_t offset)
{
    return ((const int32_t *)(const void *)((const char *)t->data + t->byte_offset))[offset];
}

static int64_t num_keys_of(const qkv_attention_spec *spec, const qkv_kv_index *index,
                           int64_t request)
{
    if (index->block_table) return index_at(index->kv_lens, request);
    const int64_t n = index_at(index->kv_indptr, request + 1) - index_at(index->kv_indptr, request);
    if (spec->page_size == 0) return n;
    return n ? (n - 1) * spec->page_size + index_at(index->kv_last_page_len, request) : 0;
}

/* The page (paged) or token (ragged) that holds a request's key. */
static int64_t page_of(const qkv_attention_spec *spec, const qkv_kv_index *index, int64_t request,
                       int64_t key)
{
    if (spec->page_size == 0) return index_at(index->kv_indptr, request) + key;
    const int64_t page = key / spec->page_size;
    if (index->block_table)
        return index_at(index->block_table, request * stride_of(index->block_table, 0) + page);
    return index_at(index->kv_indices, index_at(index->kv_indptr, request) + page);
}

/* second: the V half of a tensor that holds both. */
static kv_rows gather(const qkv_attention_spec *spec, const qkv_kv_index *index, int64_t request,
                      const DLTensor *t, bool combined, bool second, int64_t dim)
{
    const int64_t num_keys = num_keys_of(spec, index, request);
    const int first = combined ? 2 : 1; /* the first axis inside a page */
    const bool paged = spec->page_size > 0, nhd = spec->kv_layout == QKV_NHD;
    const int64_t page_stride = stride_of(t, paged || nhd ? 0 : 1);
    const int64_t slot_stride = paged ? stride_of(t, nhd ? first : first + 1) : 0;
    const int64_t head_stride = stride_of(t, paged ? (nhd ? first + 1 : first) : nhd ? 1 : 0);
    const int64_t base = second ? stride_of(t, 1) : 0;
    const kv_rows out = {allocate(num_keys * spec->num_kv_heads * dim, sizeof(double)), num_keys,
                         dim};
    for (int64_t h = 0; h < spec->num_kv_heads; h++) {
        for (int64_t j = 0; j < num_keys; j++) {
            const int64_t slot = paged ? j % spec->page_size : 0;
            const int64_t at = base + page_of(spec, index, request, j) * page_stride +
                               slot * slot_stride + h * head_stride;
            for (int64_t d = 0; d < dim; d++)
                out.x[(h * num_keys + j) * dim + d] = element(t, at + d);
        }
    }
    return out;
}

static bool visible(const layer *l, int64_t key, int64_t position)
{
    if (l->spec->mask == QKV_MASK_CAUSAL && key > position) return false;
    if (l->window_left >= 0 && key < position - l->window_left) return false;
    if (l->window_right >= 0 && key > position + l->window_right) return false;
    return true;
}

/* *sum_abs: the sum of |a_i b_i|. */
static double dot(const double *a, const double *b, int64_t n, double *sum_abs)
{
    double sum = 0;
    *sum_abs = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += a[i] * b[i];
        *sum_abs += fabs(a[i] * b[i]);
    }
    return sum;
}

/* One query row of one head; x is room for a logit per key. */
static attention_ref_row row(const layer *l, const double *q, int64_t position, const double *k,
                             const double *v, int64_t num_keys, double *x, double *o)
{
    const int64_t qk = l->spec->head_dim_qk, vo = l->spec->head_dim_vo;
    attention_ref_row out = {.lse = -INFINITY};
    double max = -INFINITY, sum = 0, sum_abs;
    for (int64_t j = 0; j < num_keys; j++) {
        if (!visible(l, j, position)) continue;
        x[j] = dot(q, k + j * qk, qk, &sum_abs) * l->sm_scale;
        out.max_logit = fmax(out.max_logit, fabs(x[j]));
        out.max_dot = fmax(out.max_dot, sum_abs * l->sm_scale);
        if (l->soft_cap > 0) x[j] = l->soft_cap * tanh(x[j] / l->soft_cap);
        max = fmax(max, x[j]);
        out.num_keys++;
    }
    for (int64_t d = 0; d < vo; d++) o[d] = 0;
    if (out.num_keys == 0) return out;
    for (int64_t j = 0; j < num_keys; j++)
        if (visible(l, j, position)) sum += exp(x[j] - max);
    double means[MAX_DIM] = {0}, squares[MAX_DIM] = {0};
    for (int64_t j = 0; j < num_keys; j++) {
        if (!visible(l, j, position)) continue;
        const double weight = exp(x[j] - max) / sum;
        for (int64_t d = 0; d < vo; d++) {
            const double wv = weight * v[j * vo + d];
            o[d] += wv;
            means[d] += fabs(wv);
            squares[d] += wv * wv;
        }
    }
    for (int64_t d = 0; d < vo; d++) {
        out.mean_v = fmax(out.mean_v, means[d]);
        out.rms_v = fmax(out.rms_v, sqrt(squares[d]));
    }
    out.lse = max + log(sum);
    if (l->spec->flags & QKV_ATTENTION_LSE_BASE_2) out.lse /= log(2);
    return out;
}

void attention_ref(const qkv_attention_spec *spec, const qkv_attention_batch *batch,
                   const qkv_attention_io *io, double *o, attention_ref_row *rows)
{
    const qkv_kv_index *index = batch->levels;
    const bool window = spec->features & QKV_FEATURE_WINDOW;
    const int64_t heads = spec->num_qo_heads, group = heads / spec->num_kv_heads;
    const int64_t qk = spec->head_dim_qk, vo = spec->head_dim_vo;
    layer l = {.spec = spec,
               .window_left = window ? spec->window_left : -1,
               .window_right = window ? spec->window_right : -1};
    l.sm_scale = io->sm_scale > 0     ? (double)io->sm_scale
                 : spec->sm_scale > 0 ? (double)spec->sm_scale
                                      : 1 / sqrt((double)qk);
    if (spec->features & QKV_FEATURE_SOFT_CAP)
        l.soft_cap = io->logits_soft_cap > 0 ? io->logits_soft_cap : spec->logits_soft_cap;
    if (io->set_window) l.window_left = io->window_left, l.window_right = io->window_right;

    double *q = allocate(qk, sizeof *q);
    for (int64_t r = 0; r + 1 < index->qo_indptr->shape[0]; r++) {
        const int64_t begin = index_at(index->qo_indptr, r),
                      end = index_at(index->qo_indptr, r + 1);
        const kv_rows k = gather(spec, index, r, io->k, !io->v, false, qk);
        const kv_rows v = gather(spec, index, r, io->v ? io->v : io->k, !io->v, !io->v, vo);
        const int64_t n = k.num_keys;
        const int64_t first = batch->qo_pos ? index_at(batch->qo_pos, r) : n - (end - begin);
        double *x = allocate(n, sizeof *x);
        for (int64_t t = begin; t < end; t++) {
            for (int64_t h = 0; h < heads; h++) {
                const int64_t at = t * stride_of(io->q, 0) + h * stride_of(io->q, 1);
                for (int64_t d = 0; d < qk; d++) q[d] = element(io->q, at + d);
                rows[t * heads + h] = row(&l, q, first + t - begin, k.x + h / group * n * qk,
                                          v.x + h / group * n * vo, n, x, o + (t * heads + h) * vo);
            }
        }
        free(x), free(k.x), free(v.x);
    }
    free(q);
}
