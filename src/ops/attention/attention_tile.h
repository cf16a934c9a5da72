/* attention_tile.h - what decode and prefill tiles share: which rows and keys they have, what a row
 * sees, where its result goes. Included by attention.cpu.c only.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_TILE_H
#define QI_ATTENTION_TILE_H

#include "kern/cpu/rope.h"
#include "kern/cpu/simd.h"
#include "ops/attention/hooks.cpu.h"

/* ---- rows --------------------------------------------------------------------------------- */

typedef struct tile_row {
    i64 position;
    i32 token, request;
} tile_row;

/* The row of q that stands at `row` in the plan's order. */
QI_INLINE tile_row row_at(const attention_params *p, i32 row)
{
    tile_row r;
    r.token = p->plan.header->num_levels > 1 ? p->plan.rows[row] : row;
    r.request = p->plan.token_request[r.token];
    r.position = (i64)p->plan.qo_pos[r.request] + (r.token - p->plan.qo_indptr[r.request]);
    return r;
}

/* A row as hooks see it; kv_pos is theirs to set. */
QI_INLINE qi_pos hook_pos(const attention_params *p, const tile_row *row, i32 qo_head)
{
    const i32 first = p->plan.qo_indptr[row->request];
    return (qi_pos){.request = row->request,
                    .qo_head = qo_head,
                    .kv_head = qo_head / (p->num_qo_heads / p->num_kv_heads),
                    .qo_pos = (i32)row->position,
                    .qo_idx = row->token - first,
                    .qo_len = p->plan.qo_indptr[row->request + 1] - first,
                    .kv_len = p->plan.kv_len[row->request]};
}

/* One row of q as f32, rotated and changed by the variant, the tail of its last vector zero. angles:
 * cosines and sines of the row's position, [2][head_dim_qk]; buffer: [padded], for the hook. */
static void load_query(const attention_params *p, const tile_row *row, i32 qo_head, float *out,
                       i64 padded, const float *angles,
                       float *buffer) /* NOLINT(readability-non-const-parameter) */
{
    const i64 at = row->token * p->q_stride[0] + qo_head * p->q_stride[1];
    qi_widen_any(out, qi_at(p->q, p->dtype_q, at), p->dtype_q, p->head_dim_qk);
    if (p->rope.num_pairs > 0) qi_rope_rotate(&p->rope, out, angles, angles + p->head_dim_qk);
#ifdef VARIANT_QUERY
    memcpy(buffer, out, (size_t)p->head_dim_qk * sizeof *out);
    hook_query(p->variant, hook_pos(p, row, qo_head), buffer, out, p->head_dim_qk);
#endif
    (void)buffer;
    for (i64 d = p->head_dim_qk; d < padded; d++) out[d] = 0.f;
}

/* Cosines and sines of a position, as load_query and change_key take them. */
QI_INLINE void load_angles(const attention_params *p, i64 position, float *angles)
{
    if (p->rope.num_pairs > 0)
        qi_rope_angles(&p->rope, p->rope_turns, (double)position, angles, angles + p->head_dim_qk);
}

/* ---- keys --------------------------------------------------------------------------------- */

/* Offsets, in elements, of keys [begin, begin + n) of a page list that starts at entry `list` (or
 * token, when ragged): token_offsets in k and in v, head 0. Walks the list run by run, so any page
 * size costs one division a run. */
QI_INLINE void locate_run(const attention_params *p, i64 list, i32 begin, i32 n, i64 *k_offset,
                          i64 *v_offset)
{
    if (p->page_size == 0) {
        for (i32 j = 0; j < n; j++) {
            k_offset[j] = (list + begin + j) * p->k_stride[1];
            v_offset[j] = (list + begin + j) * p->v_stride[1];
        }
        return;
    }
    i64 entry = list + begin / p->page_size;
    i32 slot = begin % p->page_size;
    for (i32 j = 0; j < n; entry++, slot = 0) {
        const i64 page = p->plan.pages[entry];
        const i64 k_page = page * p->k_stride[0], v_page = page * p->v_stride[0];
        for (; slot < p->page_size && j < n; slot++, j++) {
            k_offset[j] = k_page + slot * p->k_stride[1];
            v_offset[j] = v_page + slot * p->v_stride[1];
        }
    }
}

/* The same for keys of a group's list, and their positions. */
static void locate_keys(const attention_params *p, const qi_group *g, i32 begin, i32 n,
                        i64 *k_offset, i64 *v_offset, i32 *kv_pos)
{
    if (!(g->flags & QI_GROUP_SPARSE)) {
        for (i32 j = 0; j < n; j++) kv_pos[j] = g->kv_offset + begin + j;
        locate_run(p, g->kv_begin, begin, n, k_offset, v_offset);
        return;
    }
    const i32 cols = p->bsr_cols;
    i32 entry = g->block_begin + begin / cols, slot = begin % cols;
    for (i32 j = 0; j < n; entry++, slot = 0) {
        const i32 first = p->bsr_indices[entry] * cols + slot;
        const i32 run = cols - slot < n - j ? cols - slot : n - j;
        for (i32 i = 0; i < run; i++) kv_pos[j + i] = first + i;
        locate_run(p, g->kv_begin, first, run, k_offset + j, v_offset + j);
        j += run;
    }
}

/* One key as f32, rotated and changed by the variant. angles: of its position, see load_angles. */
static void load_key(const attention_params *p, const char *key, i32 kv_pos, i32 kv_head,
                     float *out, const float *angles,
                     float *buffer) /* NOLINT(readability-non-const-parameter) */
{
    qi_widen_any(out, key, p->dtype_kv, p->head_dim_qk);
    if (p->rope.num_pairs > 0) qi_rope_rotate(&p->rope, out, angles, angles + p->head_dim_qk);
#ifdef VARIANT_KEY
    qi_pos pos = {.kv_head = kv_head, .kv_pos = kv_pos};
    memcpy(buffer, out, (size_t)p->head_dim_qk * sizeof *out);
    hook_key(p->variant, pos, buffer, out, p->head_dim_qk);
#endif
    (void)kv_pos, (void)kv_head, (void)buffer;
}

/* ---- scores ------------------------------------------------------------------------------- */

/* The keys [*begin, *end) that a row at this position, relative to key 0, sees, clamped to [from,
 * to]; none where *begin >= *end. Both grow with position, so the first row's begin and the last
 * row's end bound what rows in between see. */
QI_INLINE void row_sees(const attention_params *p, i64 position, i32 from, i32 to, i32 *begin,
                        i32 *end)
{
    i64 lo = p->window_left >= 0 ? position - p->window_left : from;
    i64 hi = p->window_right >= 0 ? position + p->window_right + 1 : to;
    if (p->causal && hi > position + 1) hi = position + 1;
    *begin = (i32)(lo < from ? from : lo > to ? to : lo);
    *end = (i32)(hi < from ? from : hi > to ? to : hi);
}

/* Scores of products q.k: natural units times log2(e), so that exp2 is the softmax's exponential.
 * scale: of the row, see logit_scale. */
QI_INLINE vf score(const attention_params *p, vf product, vf scale)
{
    if (p->logits_soft_cap > 0.f)
        return vf_tanh(product * (scale / p->logits_soft_cap)) * (p->logits_soft_cap * QI_LOG2E);
    return product * (scale * QI_LOG2E);
}

/* The batch's bits, and those of sparse blocks: keep[j] of key `first + j` of the group's list. */
static inline void apply_bits(const attention_params *p, const qi_group *g, const tile_row *row,
                              const i32 *kv_pos, i32 first, i32 n, i32 *keep)
{
    const i32 request = row->request, qo_idx = row->token - p->plan.qo_indptr[request];
    if (p->mask_bits) {
        const i32 mask_first = p->plan.mask_first[request];
        const i64 columns = p->plan.kv_len[request] - mask_first;
        const i64 bit = p->mask_indptr[request] * 8 + qo_idx * columns - mask_first;
        for (i32 j = 0; j < n; j++) {
            const i64 at = bit + kv_pos[j];
            if (kv_pos[j] >= mask_first) keep[j] &= p->mask_bits[at / 8] >> (at % 8);
        }
    }
    if (p->bsr_mask && g->flags & QI_GROUP_SPARSE) {
        const i32 cols = p->bsr_cols, bit = qo_idx % p->bsr_rows * cols;
        for (i32 j = 0; j < n; j++) {
            const i32 entry = g->block_begin + (first + j) / cols, at = bit + (first + j) % cols;
            keep[j] &= p->bsr_mask[entry * p->bsr_mask_stride + at / 8] >> (at % 8);
        }
    }
}

/* Whatever the operator can do to the products x[0, n) of one row and keys `first`, ... of a group's
 * list, at kv_pos: in place, to scores as of score(), or to weights without a softmax. x and kv_pos
 * are padded to whole vectors, the latter by a position in use; what is invisible or beyond n becomes
 * -inf (0 without a softmax). */
static __attribute__((noinline)) void general_scores(const attention_params *p, const qi_group *g,
                                                     const tile_row *row, i32 qo_head,
                                                     const i32 *kv_pos, i32 first, i32 n, float *x)
{
    const i32 padded = (i32)round_up(n, QI_VW);
    const float scale = p->logit_scale[qo_head], cap = p->logits_soft_cap;
    const float slope = p->alibi_slopes ? p->alibi_slopes[qo_head] : 0.f;
    const vi position = vi_set1((i32)row->position);
    for (i32 j = 0; j < padded; j += QI_VW) {
        vf s = vf_load(x + j) * scale;
        if (cap > 0.f) s = vf_tanh(s * (1.f / cap)) * cap;
        if (p->alibi_slopes) s = s + vf_from_i32(vi_load(kv_pos + j) - position) * slope;
        vf_store(x + j, s);
    }
#ifdef VARIANT_LOGIT
    hook_logits(p->variant, hook_pos(p, row, qo_head), kv_pos, x, padded);
#endif

    i32 keep[BLOCK_N + QI_VW];
    i32 from, to; /* positions that the row sees */
    row_sees(p, row->position, INT32_MIN, INT32_MAX, &from, &to);
    for (i32 j = 0; j < padded; j++) keep[j] = (kv_pos[j] >= from) & (kv_pos[j] < to) & (j < n);
    apply_bits(p, g, row, kv_pos, first, n, keep);
#ifdef VARIANT_MASK
    hook_mask(p->variant, hook_pos(p, row, qo_head), kv_pos, keep, padded);
#endif
    const vf dropped = vf_set1(SOFTMAX ? -INFINITY : 0.f);
    for (i32 j = 0; j < padded; j += QI_VW) {
        const vf s = vf_load(x + j) * (SOFTMAX ? QI_LOG2E : 1.f);
        vf_store(x + j, vf_select((vi_load(keep + j) & 1) != 0, s, dropped));
    }
}

/* ---- results ------------------------------------------------------------------------------ */

/* Adds a logit without a value to a row's maximum and sum; returns what its other weights shrink by. */
QI_INLINE float add_logit(float logit, float *max, float *sum)
{
    const float x = logit * QI_LOG2E, before = *max;
    if (x == -INFINITY) return 1.f;
    *max = fmaxf(before, x);
    const float shrink = before == -INFINITY ? 0.f : exp2f(before - *max);
    *sum = *sum * shrink + exp2f(x - *max);
    return shrink;
}

/* A row's final result: acc is its weighted sum of v, sum its weights relative to 2^max. Uses acc as
 * scratch. */
static void finish_row(const attention_params *p, const tile_row *row, i32 qo_head, float *acc,
                       float max, float sum)
{
    const i32 dim = p->head_dim_vo;
    float norm = 1.f;
    if (SOFTMAX) {
        if (p->sink) norm *= add_logit(p->sink[qo_head], &max, &sum);
#ifdef VARIANT_STATE
        norm *=
            add_logit(variant_state((const variant_params *)p->variant, hook_pos(p, row, qo_head)),
                      &max, &sum);
#endif
        const int seen = sum > 0.f || sum != sum;
        norm = seen ? norm / sum : 0.f; /* no key seen: zeros */
        if (p->lse)
            p->lse[row->token * p->lse_stride[0] + qo_head * p->lse_stride[1]] =
                seen ? (max + log2f(sum)) * p->lse_scale : -INFINITY;
    }
    norm *= p->value_scale[qo_head];
    i32 d = 0;
    for (; d + QI_VW <= dim; d += QI_VW) vf_store(acc + d, vf_load(acc + d) * norm);
    for (; d < dim; d++) acc[d] *= norm;
#ifdef VARIANT_OUTPUT
    hook_output(p->variant, hook_pos(p, row, qo_head), acc, dim);
#endif
    const float scale = p->output_scale[qo_head];
    if (scale != 1.f)
        for (d = 0; d < dim; d++) acc[d] *= scale;
    const i64 at = row->token * p->o_stride[0] + qo_head * p->o_stride[1];
    qi_narrow_any((char *)p->o + at * (i64)qi_size_of(p->dtype_o), p->dtype_o, acc, dim);
}

/* The same for a row of a piece, whose result goes to a partial row. */
static void store_partial(const attention_params *p, i64 slot, const float *acc, float max,
                          float sum)
{
    const i32 dim = p->head_dim_vo;
    const int seen = sum > 0.f || sum != sum;
    const float norm = !SOFTMAX ? 1.f : seen ? 1.f / sum : 0.f;
    float *partial = p->plan.o_partial + slot * dim;
    i32 d = 0;
    for (; d + QI_VW <= dim; d += QI_VW) vf_store(partial + d, vf_load(acc + d) * norm);
    for (; d < dim; d++) partial[d] = acc[d] * norm;
    p->plan.lse_partial[slot] = seen ? max + log2f(sum) : -INFINITY;
}

#endif
