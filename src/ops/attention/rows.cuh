/* rows.cuh - what GPU kernels of attention share: which rows and keys a work item has, what a row sees, and
 * where its result goes. The twin of attention_tile.h.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_ROWS_CUH
#define QI_ATTENTION_ROWS_CUH

#include "ops/attention/hooks.cuh"

/* ---- rows --------------------------------------------------------------------------------- */

typedef struct tile_row {
    int position, token, request;
} tile_row;

/* The token of the row that stands at `row` in the plan's order. */
QI_INLINE int token_at(const attention_params *p, int row)
{
#if defined(MIXED) && !MIXED /* for one level, and nothing is to be looked up */
    return row;
#else
    return p->plan.header->num_levels > 1 ? p->plan.rows[row] : row;
#endif
}

QI_INLINE tile_row row_at(const attention_params *p, int row)
{
    tile_row r;
    r.token = token_at(p, row);
    r.request = p->plan.token_request[r.token];
    r.position = p->plan.qo_pos[r.request] + (r.token - p->plan.qo_indptr[r.request]);
    return r;
}

/* A row as hooks see it; kv_pos is theirs to set. */
QI_INLINE qi_pos hook_pos(const attention_params *p, tile_row row, int qo_head)
{
    const int first = p->plan.qo_indptr[row.request];
    qi_pos pos = {};
    pos.request = row.request;
    pos.qo_head = qo_head;
    pos.kv_head = qo_head / (p->num_qo_heads / p->num_kv_heads);
    pos.qo_pos = row.position;
    pos.qo_idx = row.token - first;
    pos.qo_len = p->plan.qo_indptr[row.request + 1] - first;
    pos.kv_len = p->plan.kv_len[row.request];
    return pos;
}

/* ---- keys --------------------------------------------------------------------------------- */

/* Key `index` of a group's list: its position, and its offset in elements in k and v, head 0. */
typedef struct key_place {
    i64 k, v;
    int position;
} key_place;

QI_INLINE key_place key_at(const attention_params *p, const qi_group *g, int index)
{
    key_place at;
    int in_list = index;
    at.position = g->kv_offset + index;
    if (g->flags & QI_GROUP_SPARSE)
        at.position = in_list = p->bsr_indices[g->block_begin + index / p->bsr_cols] * p->bsr_cols +
                                index % p->bsr_cols;
    i64 page = 0, slot = g->kv_begin + in_list;
    if (p->page_size > 0) {
        page = p->plan.pages[g->kv_begin + in_list / p->page_size];
        slot = in_list % p->page_size;
    }
    at.k = page * p->k_stride[0] + slot * p->k_stride[1];
    at.v = page * p->v_stride[0] + slot * p->v_stride[1];
    return at;
}

/* ---- scores ------------------------------------------------------------------------------- */

/* The batch's bits, and those of sparse blocks, of key `index` of the group's list. */
QI_INLINE int has_bit(const attention_params *p, const qi_group *g, tile_row row, int index,
                      int kv_pos)
{
    const int qo_idx = row.token - p->plan.qo_indptr[row.request];
    int keep = 1;
    if (p->mask_bits) {
        const int first = p->plan.mask_first[row.request];
        const i64 columns = p->plan.kv_len[row.request] - first;
        const i64 at = p->mask_indptr[row.request] * 8 + qo_idx * columns + (kv_pos - first);
        if (kv_pos >= first) keep &= p->mask_bits[at / 8] >> (at % 8);
    }
    if (p->bsr_mask && g->flags & QI_GROUP_SPARSE) {
        const i64 entry = g->block_begin + index / p->bsr_cols;
        const int at = qo_idx % p->bsr_rows * p->bsr_cols + index % p->bsr_cols;
        keep &= p->bsr_mask[entry * p->bsr_mask_stride + at / 8] >> (at % 8);
    }
    return keep & 1;
}

/* A product q.k to the score that the softmax takes, natural units times log2(e), or -infinity where
 * the row does not see the key (without a softmax to a weight, or 0). scale: of the head's logits. */
QI_INLINE float score(const attention_cuda_params *c, const qi_group *g, tile_row row, int qo_head,
                      int index, int kv_pos, float product, float scale)
{
    const attention_params *p = &c->at;
    int seen = has_bit(p, g, row, index, kv_pos);
    if (p->causal) seen &= kv_pos <= row.position;
    if (p->window_left >= 0) seen &= kv_pos >= (i64)row.position - p->window_left;
    if (p->window_right >= 0) seen &= kv_pos <= (i64)row.position + p->window_right;
    qi_pos pos = hook_pos(p, row, qo_head);
    pos.kv_pos = kv_pos;
    /* hooks may index by what they are given, so they are asked of keys in sight only */
    if (!seen || !hook_mask(c, pos)) return SOFTMAX ? -QI_INFINITY : 0.f;
    float s = product * scale;
    if (p->logits_soft_cap > 0.f) s = tanhf(s / p->logits_soft_cap) * p->logits_soft_cap;
    if (p->alibi_slopes) s += (float)(kv_pos - row.position) * p->alibi_slopes[qo_head];
    s = hook_logit(c, pos, s);
    return SOFTMAX ? s * QI_LOG2E : s;
}

/* ---- results ------------------------------------------------------------------------------ */

/* Adds a logit without a value to a row's maximum and sum; returns what its other weights shrink by. */
QI_INLINE float add_logit(float logit, float *max, float *sum)
{
    const float x = logit * QI_LOG2E, before = *max;
    if (x == -QI_INFINITY) return 1.f;
    *max = fmaxf(before, x);
    const float shrink = before == -QI_INFINITY ? 0.f : exp2f(before - *max);
    *sum = *sum * shrink + exp2f(x - *max);
    return shrink;
}

/* The query heads of a KV head: a constant in kernels that are compiled for one. */
#ifdef GROUP_SIZE
#define HEADS_OF_GROUP(p) GROUP_SIZE
#else
#define HEADS_OF_GROUP(p) ((p)->num_qo_heads / (p)->num_kv_heads)
#endif

/* Adds what a row sees beside its keys, a sink and a variant's state, to its maximum and sum; returns what its other weights
 * shrink by. */
QI_INLINE float add_extra_logits(const attention_cuda_params *c, tile_row row, int qo_head,
                                 float *max, float *sum)
{
    const attention_params *p = &c->at;
    float shrink = p->sink ? add_logit(p->sink[qo_head], max, sum) : 1.f;
    return shrink * add_logit(hook_state(c, hook_pos(p, row, qo_head)), max, sum);
}

/* Was a key seen, by the sum of a row's weights? */
QI_INLINE int any_weight(float sum)
{
    return sum > 0.f || sum != sum;
}

/* The factor of a row's weighted sum of v, whose weights sum to `sum`; of none zero. */
QI_INLINE float norm_of(float sum)
{
    return !SOFTMAX ? 1.f : any_weight(sum) ? rcp(sum) : 0.f;
}

/* The lse, in base 2, of a row whose weights sum to `sum` relative to 2^max. */
QI_INLINE float lse_of(float max, float sum)
{
    return any_weight(sum) ? max + lg2(sum) : -QI_INFINITY;
}

/* The lse of a complete row, by one thread. */
QI_INLINE void store_lse(const attention_params *p, tile_row row, int qo_head, float max, float sum)
{
    p->lse[row.token * p->lse_stride[0] + qo_head * p->lse_stride[1]] =
        lse_of(max, sum) * p->lse_scale;
}

/* Completes a row: returns the factor of its weighted sum of v. One thread a row (first) writes lse. */
QI_INLINE float finish_row(const attention_cuda_params *c, tile_row row, int qo_head, float max,
                           float sum, int first)
{
    float norm = qi_scale_at(&c->v_scale, qo_head / HEADS_OF_GROUP(&c->at));
    if (!SOFTMAX) return norm;
    norm *= add_extra_logits(c, row, qo_head, &max, &sum) * norm_of(sum);
    if (c->at.lse && first) store_lse(&c->at, row, qo_head, max, sum);
    return norm;
}

/* The type of o: a constant in kernels that are compiled for one. */
#ifdef DTYPE_O
#define OUTPUT_TYPE(p) DTYPE_O
#else
#define OUTPUT_TYPE(p) ((p)->dtype_o)
#endif

/* Four neighbouring elements of o, from their final sums. */
QI_INLINE void store_outputs(const attention_cuda_params *c, tile_row row, int qo_head, int d,
                             float o[4])
{
    const attention_params *p = &c->at;
    const float scale = qi_scale_at(&c->o_scale, qo_head);
    for (int i = 0; i < 4; i++) {
        o[i] = hook_output(c, hook_pos(p, row, qo_head), d + i, o[i]);
        if (scale != 1.f) o[i] *= 1.f / scale;
    }
    const int type = OUTPUT_TYPE(p);
    char *to = qi_to(p->o, type, row.token * p->o_stride[0] + qo_head * p->o_stride[1] + d);
#ifdef DTYPE_O
    if (((u64)to & (4 * qi_size_of(DTYPE_O) - 1)) == 0) {
        qi_store(to, o, DTYPE_O, 4);
        return;
    }
#endif
    for (int i = 0; i < 4; i++) qi_store1(to + i * qi_size_of(type), o[i], type);
}

#endif
