/* attention_case.h - what the attention tests share: a configuration becomes tensors, index arrays
 * and reference results. attention_run.h runs and judges it.
 *
 * Inputs lie between NaNs: unused pages, slots past a request's end, padding of strides, rows past
 * the last request. Outputs are all NaN.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_ATTENTION_CASE_H
#define QKV_TESTS_ATTENTION_CASE_H

#include "attention_case_index.h"

/* ---- one number a head -------------------------------------------------------------------- */

/* f32 [n] of low + (high - low) * [0, 1). */
static inline float *case_heads_new(attn_case *a, case_view *view, int64_t n, double low,
                                    double high)
{
    case_view_new(view, QKV_F32, 1, &n, a->config.strided, false);
    float *x = case_data(view);
    for (int64_t h = 0; h < n; h++)
        x[h] = (float)((low + high) / 2 + test_uniform((high - low) / 2));
    return x;
}

static inline qkv_scale case_scale_new(attn_case *a, int which, int64_t num_heads)
{
    const case_scale *c = &a->config.scales[which];
    case_view *view = &a->scales[which];
    const float value = (float)(c->value * (1.25 + test_uniform(0.75)));
    if (c->kind == CASE_NO_SCALE) return (qkv_scale){.value = 0};
    if (c->kind == CASE_NUMBER) return (qkv_scale){.value = value};
    case_heads_new(a, view, c->kind == CASE_TENSOR ? 1 : num_heads, c->value / 2, c->value * 2);
    return (qkv_scale){.value = test_below(2) ? 77 : 0, .tensor = &view->x.t}; /* no number */
}

static inline double case_scale_of(const qkv_scale *s, int64_t head)
{
    if (!s->tensor) return s->value > 0 ? (double)s->value : 1;
    const char *data = (const char *)s->tensor->data + s->tensor->byte_offset;
    return test_get(data, QKV_F32, s->tensor->shape[0] > 1 ? head : 0);
}

static inline void case_build_heads(attn_case *a)
{
    const case_config *c = &a->config;
    const qkv_attention_spec *s = &c->spec;
    const int64_t heads = s->num_qo_heads, kv_heads = s->num_kv_heads;
    a->io.q_scale = case_scale_new(a, CASE_Q, heads);
    a->io.k_scale = case_scale_new(a, CASE_K, kv_heads);
    a->io.v_scale = case_scale_new(a, CASE_V, kv_heads);
    a->io.o_scale = case_scale_new(a, CASE_O, heads);
    if (s->features & QKV_FEATURE_ALIBI) {
        case_heads_new(a, &a->slopes, heads, -c->max_slope / 4, c->max_slope);
        a->io.alibi_slopes = &a->slopes.x.t;
    }
    if (s->flags & QKV_ATTENTION_HAS_SINK) {
        float *sink = case_heads_new(a, &a->sink, heads, -c->max_sink, c->max_sink);
        for (int64_t h = 0; h < heads; h++)
            if (test_below(8) == 0) sink[h] = -INFINITY;
        a->io.sink = &a->sink.x.t;
    }
}

/* ---- q, k, v ------------------------------------------------------------------------------ */

/* K or V as the kernel finds it. */
typedef struct case_kv {
    const case_view *view;
    int64_t page_stride, slot_stride, head_stride, first, dim;
    double size, bias; /* of the data as the formula sees them */
    const double *rises;
    const qkv_scale *scale;
} case_kv;

/* Keys or values of one list from `begin` on, the list from this page list or token on. */
static inline void case_fill_list(const attn_case *a, const case_kv *kv, int32_t begin, int32_t len,
                                  const int32_t *pages, int64_t token)
{
    const qkv_attention_spec *s = &a->config.spec;
    for (int64_t j = begin; j < len; j++) {
        const int64_t page = s->page_size ? pages[j / s->page_size] : 0;
        const int64_t slot = s->page_size ? j % s->page_size : token + j;
        for (int64_t h = 0; h < s->num_kv_heads; h++) {
            const int64_t at =
                kv->first + page * kv->page_stride + slot * kv->slot_stride + h * kv->head_stride;
            const double scale = case_scale_of(kv->scale, h);
            const double rise = kv->rises ? kv->rises[j / CASE_RISE % CASE_RISES] : 0;
            for (int64_t d = 0; d < kv->dim; d++)
                test_put(case_data(kv->view), s->dtype_kv, at + d,
                         (kv->bias + rise + test_uniform(kv->size)) / scale);
        }
    }
}

/* values: V, which may be the second half of K's tensor. */
static inline void case_fill_kv(attn_case *a, bool values)
{
    const case_config *c = &a->config;
    const qkv_attention_spec *s = &c->spec;
    const case_view *view = values && !c->combined ? &a->v : &a->k;
    const int64_t *strides = view->x.strides;
    const int inner = s->page_size == 0 ? 0 : c->combined ? 2 : 1;
    const bool nhd = s->kv_layout == QKV_NHD;
    const case_kv kv = {.view = view,
                        .page_stride = strides[0],
                        .slot_stride = strides[nhd ? inner : inner + 1],
                        .head_stride = strides[nhd ? inner + 1 : inner],
                        .first = values && c->combined ? strides[1] : 0,
                        .dim = values ? s->head_dim_vo : s->head_dim_qk,
                        .size = values && c->v_scale > 0 ? c->v_scale : 1,
                        .bias = values ? 0 : c->k_bias,
                        .rises = values ? NULL : c->k_rises,
                        .scale = values ? &a->io.v_scale : &a->io.k_scale};
    for (int32_t level = 0; level <= c->num_shared_levels; level++) {
        const case_level *l = case_level_at(a, level);
        for (int32_t g = 0; g < case_num_groups(c, level); g++) {
            const int32_t len = case_group_len(c, level, g);
            const int32_t unseen = c->forgets ? len - c->qo_len[g] - s->window_left : 0;
            case_fill_list(a, &kv, unseen > 0 ? unseen : 0, len, a->pages + l->first_page[g],
                           s->page_size ? 0 : case_ints(&l->kv_indptr)[g]);
        }
    }
}

/* NaN, or what no integer of the data is. */
static inline void case_poison_kv(const case_view *view, DLDataType dtype)
{
    if (dtype.bits == 8) memset(view->x.owned, dtype.code ? 0x7f : 0x80, view->bytes);
}

static inline void case_build_kv(attn_case *a, int64_t pool)
{
    const case_config *c = &a->config;
    const qkv_attention_spec *s = &c->spec;
    const bool nhd = s->kv_layout == QKV_NHD;
    case_view *views[] = {&a->k, &a->v};
    for (int i = 0; i < (c->combined ? 1 : 2); i++) {
        int64_t shape[5];
        int ndim = 0;
        int64_t tokens = s->page_size;
        if (s->page_size == 0)
            tokens = a->ragged_end + test_below(4);
        else
            shape[ndim++] = pool;
        if (c->combined) shape[ndim++] = 2;
        shape[ndim++] = nhd ? tokens : s->num_kv_heads;
        shape[ndim++] = nhd ? s->num_kv_heads : tokens;
        shape[ndim++] = i ? s->head_dim_vo : s->head_dim_qk;
        case_view_new(views[i], s->dtype_kv, ndim, shape, c->strided, false);
        case_poison_kv(views[i], s->dtype_kv);
    }
    case_fill_kv(a, false);
    case_fill_kv(a, true);
}

static inline void case_build_q(attn_case *a)
{
    const case_config *c = &a->config;
    const qkv_attention_spec *s = &c->spec;
    const int64_t heads = s->num_qo_heads;
    case_view_new(&a->q, s->dtype_q, 3, (int64_t[]){a->rows, heads, s->head_dim_qk}, c->strided,
                  false);
    for (int64_t t = 0; t < a->tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t d = 0; d < s->head_dim_qk; d++)
                test_put(case_data(&a->q), s->dtype_q,
                         t * a->q.x.strides[0] + h * a->q.x.strides[1] + d,
                         (test_uniform(c->q_scale > 0 ? c->q_scale : 1) + c->k_bias) /
                             case_scale_of(&a->io.q_scale, h));
}

/* ---- all of it ---------------------------------------------------------------------------- */

/* Built in place: its parts point at each other. */
static inline void case_build(attn_case *a, const case_config *config)
{
    memset(a, 0, sizeof *a);
    a->config = *config;
    const case_config *c = &a->config;
    const qkv_attention_spec *s = &c->spec;
    const int64_t heads = s->num_qo_heads;
    if (s->features & QKV_FEATURE_ROPE) a->config.spec.rope = &a->config.rope;
    for (int32_t r = 0; r < c->num_requests; r++) a->tokens += c->qo_len[r];
    a->rows = a->tokens + (c->strided ? test_below(4) : 0);

    const int64_t pool = case_deal_pages(a);
    case_build_batch(a);
    case_complete_limits(a);
    case_build_heads(a);
    case_build_kv(a, pool);
    case_build_q(a);
    case_view_new(&a->o, s->dtype_o, 3, (int64_t[]){a->rows, heads, s->head_dim_vo}, c->strided,
                  false);
    case_view_new(&a->lse, QKV_F32, 2, (int64_t[]){a->rows, heads}, c->strided, true);
    a->io.struct_size = sizeof a->io;
    a->io.q = &a->q.x.t;
    a->io.k = &a->k.x.t;
    a->io.v = c->combined ? NULL : &a->v.x.t;
    a->io.o = &a->o.x.t;
    a->io.lse = c->no_lse ? NULL : &a->lse.x.t;
    a->io.sm_scale = c->io_sm_scale;
    a->io.logits_soft_cap = c->io_soft_cap;
    a->io.set_window = c->set_window;
    a->io.window_left = c->io_window_left;
    a->io.window_right = c->io_window_right;
    const size_t n = (size_t)(a->tokens * heads);
    a->ref_o = case_alloc(n * (size_t)s->head_dim_vo, sizeof(double));
    a->ref_rows = case_alloc(n, sizeof *a->ref_rows);
    a->got_o = case_alloc(n * (size_t)s->head_dim_vo, test_bytes(s->dtype_o));
    a->got_lse = case_alloc(n, sizeof(float));
    attention_ref(s, &a->batch, &a->io, a->ref_o, a->ref_rows);
}

static inline void case_free(attn_case *a)
{
    case_view *views[] = {&a->q, &a->k, &a->v, &a->o, &a->lse, &a->sink, &a->slopes};
    for (size_t i = 0; i < sizeof views / sizeof *views; i++) free(views[i]->x.owned);
    for (int i = 0; i < CASE_NUM_SCALES; i++) free(a->scales[i].x.owned);
    case_free_index(a);
    free(a->ref_o), free(a->ref_rows), free(a->got_o), free(a->got_lse);
}

#endif
