/* attention_tile.h - what decode and prefill tiles share: where keys are, what a row sees, where
 * its result goes. Included by attention.cpu.c only.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_TILE_H
#define QI_ATTENTION_TILE_H

#include "kern/cpu/simd.h"
#include "ops/attention/attention_params.h"

/* Offsets, in elements, of keys [begin, begin + n) of a request: token_offsets in k and in v, head
 * 0. Walks the page list run by run, so any page size costs one division a run. */
QI_INLINE void locate_keys(const attention_params *p, i32 request, i32 begin, i32 n, i64 *k_offset,
                           i64 *v_offset)
{
    const i32 first = p->plan.kv_begin[request];
    if (p->page_size == 0) {
        for (i32 j = 0; j < n; j++) {
            k_offset[j] = ((i64)first + begin + j) * p->k_stride[1];
            v_offset[j] = ((i64)first + begin + j) * p->v_stride[1];
        }
        return;
    }
    i32 entry = first + begin / p->page_size, slot = begin % p->page_size;
    for (i32 j = 0; j < n; entry++, slot = 0) {
        const i64 page = p->plan.pages[entry];
        const i64 k_page = page * p->k_stride[0], v_page = page * p->v_stride[0];
        for (; slot < p->page_size && j < n; slot++, j++) {
            k_offset[j] = k_page + slot * p->k_stride[1];
            v_offset[j] = v_page + slot * p->v_stride[1];
        }
    }
}

/* The keys [*begin, *end) that the row at this position sees, clamped to [from, to]; none where
 * *begin >= *end. Both grow with position, so the first row's begin and the last row's end bound
 * what rows in between see. */
QI_INLINE void row_sees(const attention_params *p, i64 position, i32 from, i32 to, i32 *begin,
                        i32 *end)
{
    i64 lo = p->window_left >= 0 ? position - p->window_left : from;
    i64 hi = p->window_right >= 0 ? position + p->window_right + 1 : to;
    if (p->causal && hi > position + 1) hi = position + 1;
    *begin = (i32)(lo < from ? from : lo > to ? to : lo);
    *end = (i32)(hi < from ? from : hi > to ? to : hi);
}

/* Scores of products q.k: natural units times log2(e), so that exp2 is the softmax's exponential. */
QI_INLINE vf score(const attention_params *p, vf product)
{
    if (p->logits_soft_cap > 0.f)
        return vf_tanh(product * (p->sm_scale / p->logits_soft_cap)) *
               (p->logits_soft_cap * QI_LOG2E);
    return product * (p->sm_scale * QI_LOG2E);
}

/* A row's result: acc is its weighted sum of v, sum its weights relative to 2^max. Final rows go to
 * o and lse, rows of a cut tile to their partial slot. Uses acc as scratch. */
QI_INLINE void finish_row(const attention_params *p, i32 slot, i64 token, i32 qo_head, float *acc,
                          float max, float sum)
{
    const i32 dim = p->head_dim_vo;
    const float norm = sum > 0.f || sum != sum ? 1.f / sum : 0.f; /* no key seen: zeros */
    const float lse = sum > 0.f || sum != sum ? max + log2f(sum) : -INFINITY;
    float *partial = slot < 0 ? acc : p->plan.o_partial + (i64)slot * dim;
    i32 d = 0;
    for (; d + QI_VW <= dim; d += QI_VW) vf_store(partial + d, vf_load(acc + d) * norm);
    for (; d < dim; d++) partial[d] = acc[d] * norm;
    if (slot >= 0) {
        p->plan.lse_partial[slot] = lse;
        return;
    }
    const i64 at = token * p->o_stride[0] + qo_head * p->o_stride[1];
    qi_narrow((char *)p->o + at * (i64)qi_size_of(p->dtype_o), p->dtype_o, acc, dim);
    if (p->lse) p->lse[token * p->lse_stride[0] + qo_head * p->lse_stride[1]] = lse * p->lse_scale;
}

/* One row of q as f32, the tail of its last vector zero. */
QI_INLINE void load_query(const attention_params *p, i64 token, i32 qo_head, float *out, i64 padded)
{
    const i64 at = token * p->q_stride[0] + qo_head * p->q_stride[1];
    qi_widen(out, qi_at(p->q, p->dtype_q, at), p->dtype_q, p->head_dim_qk);
    for (i64 d = p->head_dim_qk; d < padded; d++) out[d] = 0.f;
}

#endif
