/* decode_tile.h - a few query rows of one request against its keys, all KV heads at once.
 *
 * Keys pass in blocks of BLOCK = 16 tokens, in order; for each block the KV heads are walked in
 * memory order, so that a page is read once, and the unit (block, head) AHEAD units further is
 * prefetched along the page table while this one is computed. Query rows of a KV head (tokens x
 * group) are taken in fours. Scores live as vectors [token][4 rows], so that the softmax of all
 * rows is elementwise; K needs no transposition: QI_VW dot products at a time are summed by
 * vf_sum_each. K and V are widened to f32 and multiplied by FMA, so the result has f32 accuracy for
 * every cache dtype.
 *
 * Bound: memory, 2 * head_dim * size bytes a key and head. The state of a head (O, max, sum) lives
 * in L1/L2. Source: FlashAttention-2's online softmax (arXiv:2307.08691), FlashDecoding's splits.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_DECODE_TILE_H
#define QI_ATTENTION_DECODE_TILE_H

#include "ops/attention/attention_tile.h"

enum {
    BLOCK = 16,                /* keys a block */
    ROWS = 4,                  /* query rows computed together */
    TOKENS = QI_VW / ROWS,     /* keys in one score vector */
    SCORES = BLOCK / TOKENS,   /* score vectors of a block */
    AHEAD = 4,                 /* units of prefetch distance */
    WIDE = QI_VW == 8 ? 2 : 4, /* vectors of O per pass of P.V: ROWS * WIDE accumulators */
};

/* Everything a block of keys needs, and the same for the block to prefetch. */
typedef struct decode_block {
    i64 k_offset[BLOCK], v_offset[BLOCK];
    i32 begin, n; /* keys [begin, begin + n) */
} decode_block;

/* State of four rows of one KV head. */
typedef struct decode_state {
    float *q;                         /* [ROWS][q_stride] */
    float *o;                         /* [ROWS][o_stride], unnormalised */
    float *max;                       /* [QI_VW] lanes [token][row]: the same for every token */
    float *sum;                       /* [QI_VW] partial sums over the lanes' tokens */
    const i32 *sees_begin, *sees_end; /* [ROWS] keys that each row sees */
    int edge;                         /* does some row not see every key of the block? */
} decode_state;

/* The largest over tokens, in every token's lanes. */
QI_INLINE vf max_over_tokens(vf v)
{
#if QI_VW == 16
    v = vf_max(v, QI_SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = vf_max(v, QI_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
#elif QI_VW == 8
    v = vf_max(v, QI_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
#endif
    return v;
}

QI_INLINE void prefetch_row(const char *row, const i64 bytes)
{
    for (i64 b = 0; b < bytes; b += 64) qi_prefetch(row + b);
}

/* TOKENS x ROWS products q.k as one vector [token][row]. */
QI_INLINE vf decode_products(const char *const k[TOKENS], const float *q, i64 q_stride,
                             const i32 dim, const qi_dtype kv)
{
    vf acc[QI_VW];
    QI_UNROLL(16)
    for (int i = 0; i < QI_VW; i++) acc[i] = vf_set1(0.f);
    i32 d = 0;
    QI_UNROLL(8)
    for (; d + QI_VW <= dim; d += QI_VW) {
        vf key[TOKENS];
        QI_UNROLL(4)
        for (int t = 0; t < TOKENS; t++) key[t] = qi_load(qi_at(k[t], kv, d), kv);
        QI_UNROLL(4)
        for (int r = 0; r < ROWS; r++) {
            const vf x = vf_load(q + r * q_stride + d);
            QI_UNROLL(4)
            for (int t = 0; t < TOKENS; t++) acc[t * ROWS + r] = acc[t * ROWS + r] + x * key[t];
        }
    }
    if (d < dim) {
        QI_UNROLL(4)
        for (int t = 0; t < TOKENS; t++) {
            const vf key = qi_load_n(qi_at(k[t], kv, d), kv, dim - d);
            QI_UNROLL(4)
            for (int r = 0; r < ROWS; r++)
                acc[t * ROWS + r] = acc[t * ROWS + r] + vf_load(q + r * q_stride + d) * key;
        }
    }
    return vf_sum_each(acc);
}

/* o[r] += sum_t weight[t][r] * v[t] for dims [d, d + count vectors). */
QI_INLINE void decode_accumulate(const decode_state *s, i64 o_stride, const float *weight,
                                 const char *v, const decode_block *b, i64 head, i32 d,
                                 const int count, const i32 dim, const qi_dtype kv)
{
    vf acc[ROWS][4];
    QI_UNROLL(4)
    for (int r = 0; r < ROWS; r++) QI_UNROLL(4)
    for (int c = 0; c < count; c++) acc[r][c] = vf_load(s->o + r * o_stride + d + c * QI_VW);
    for (i32 t = 0; t < b->n; t++) {
        const char *row = qi_at(v, kv, b->v_offset[t] + head + d);
        QI_UNROLL(4)
        for (int c = 0; c < count; c++) {
            const i32 left = dim - d - c * QI_VW;
            const vf x = left >= QI_VW ? qi_load(qi_at(row, kv, c * QI_VW), kv)
                                       : qi_load_n(qi_at(row, kv, c * QI_VW), kv, left);
            QI_UNROLL(4)
            for (int r = 0; r < ROWS; r++) acc[r][c] = acc[r][c] + x * weight[t * ROWS + r];
        }
    }
    QI_UNROLL(4)
    for (int r = 0; r < ROWS; r++) QI_UNROLL(4)
    for (int c = 0; c < count; c++) vf_store(s->o + r * o_stride + d + c * QI_VW, acc[r][c]);
}

/* Four rows of one KV head against one block; next: the block and head to prefetch. */
QI_INLINE void decode_unit(const attention_params *p, const decode_state *s, const decode_block *b,
                           i32 kv_head, const decode_block *next, i32 next_head, const i32 dim_qk,
                           const i32 dim_vo, const qi_dtype kv)
{
    const i64 q_stride = round_up(dim_qk, QI_VW), o_stride = round_up(dim_vo, QI_VW);
    const i64 size = (i64)qi_size_of(kv), head = kv_head * p->k_stride[2];
    const char *k = p->k, *v = p->v;

    vf scores[SCORES], max = vf_load(s->max);
    QI_UNROLL(4)
    for (int j = 0; j < SCORES; j++) {
        const char *rows[TOKENS];
        QI_UNROLL(4)
        for (int t = 0; t < TOKENS; t++) {
            const i32 at = j * TOKENS + t;
            rows[t] = qi_at(k, kv, b->k_offset[at] + head);
            prefetch_row(qi_at(k, kv, next->k_offset[at] + next_head * p->k_stride[2]),
                         dim_qk * size);
        }
        scores[j] = score(p, decode_products(rows, s->q, q_stride, dim_qk, kv));
        if (s->edge) {
            const vi key = b->begin + j * TOKENS + (vi_iota() / ROWS);
            vi begin, end;
            for (int i = 0; i < QI_VW; i++) {
                begin[i] = s->sees_begin[i % ROWS];
                end[i] = s->sees_end[i % ROWS];
            }
            scores[j] = vf_select((key >= begin) & (key < end), scores[j], vf_set1(-INFINITY));
        }
        max = vf_max(max, scores[j]);
    }

    max = max_over_tokens(max);
    const vf before = vf_load(s->max);
    const vf safe = vf_select(max == -INFINITY, vf_set1(0.f), max); /* -inf - -inf is NaN */
    vf sum = vf_load(s->sum);
    const vf scale = vf_exp2(before - safe);
    float rescale[QI_VW];
    vf_store(rescale, scale);
    if (rescale[0] != 1.f || rescale[1] != 1.f || rescale[2] != 1.f || rescale[3] != 1.f) {
        sum = sum * scale;
        vf_store(s->max, max);
        for (int r = 0; r < ROWS; r++)
            for (i64 d = 0; d < o_stride; d += QI_VW)
                vf_store(s->o + r * o_stride + d, vf_load(s->o + r * o_stride + d) * rescale[r]);
    }
    float weight[BLOCK * ROWS];
    QI_UNROLL(4)
    for (int j = 0; j < SCORES; j++) {
        const vf w = vf_exp2(scores[j] - safe);
        sum = sum + w;
        vf_store(weight + j * QI_VW, w);
    }
    vf_store(s->sum, sum);

    for (int t = 0; t < BLOCK; t++)
        prefetch_row(qi_at(v, kv, next->v_offset[t] + next_head * p->v_stride[2]), dim_vo * size);
    const i64 v_head = kv_head * p->v_stride[2];
    i32 d = 0;
    for (; d + WIDE * QI_VW <= dim_vo; d += WIDE * QI_VW)
        decode_accumulate(s, o_stride, weight, v, b, v_head, d, WIDE, dim_vo, kv);
    for (; d < dim_vo; d += QI_VW)
        decode_accumulate(s, o_stride, weight, v, b, v_head, d, 1, dim_vo, kv);
}

/* Fills a block with keys from `begin` on, below `end`. Offsets past the last key repeat it: they
 * are loaded, but their scores are dropped. An empty block prefetches what `b` holds already. */
QI_INLINE void fill_block(const attention_params *p, i32 request, i32 begin, i32 end,
                          decode_block *b)
{
    b->begin = begin;
    b->n = end - begin < BLOCK ? end - begin : BLOCK;
    if (b->n <= 0) return;
    locate_keys(p, request, begin, b->n, b->k_offset, b->v_offset);
    for (i32 j = b->n; j < BLOCK; j++) {
        b->k_offset[j] = b->k_offset[b->n - 1];
        b->v_offset[j] = b->v_offset[b->n - 1];
    }
}

/* One work item. Scratch: for each KV head q [m][q_stride], o [m][o_stride], max and sum a group of
 * four rows. dim_qk, dim_vo, kv: constants in the specialised rows, p's fields in the general one. */
QI_INLINE void decode_tile(const attention_params *p, const qi_work *w, float *scratch,
                           const i32 dim_qk, const i32 dim_vo, const qi_dtype kv)
{
    const i32 group = p->num_qo_heads / p->num_kv_heads, request = w->group;
    const i32 rows = w->num_rows * group, fours = (rows + ROWS - 1) / ROWS, heads = w->num_kv_heads;
    const i64 q_stride = round_up(dim_qk, QI_VW), o_stride = round_up(dim_vo, QI_VW);
    const i64 unit = ROWS * (q_stride + o_stride) + 2 * QI_VW; /* floats of a decode_state */

    /* What each row sees, and what all of them may see. Row i is token i / group, head i % group. */
    const i64 position = (i64)p->plan.qo_pos[request] + (w->row_begin - p->plan.qo_indptr[request]);
    i32 begin[DECODE_M + 512], end[DECODE_M + 512], from = w->kv_end, to = w->kv_begin;
    i32 all_from = w->kv_begin, all_to = w->kv_end; /* the keys that every row sees */
    for (i32 i = 0; i < fours * ROWS; i++) {
        row_sees(p, position + (i < rows ? i : rows - 1) / group, w->kv_begin, w->kv_end, &begin[i],
                 &end[i]);
        if (begin[i] < end[i]) {
            from = begin[i] < from ? begin[i] : from;
            to = end[i] > to ? end[i] : to;
        }
        all_from = begin[i] > all_from ? begin[i] : all_from;
        all_to = end[i] < all_to ? end[i] : all_to;
    }

    for (i32 h = 0; h < heads; h++)
        for (i32 i = 0; i < fours * ROWS; i++) {
            float *state = scratch + ((i64)h * fours + i / ROWS) * unit;
            float *q = state + i % ROWS * q_stride;
            if (i < rows)
                load_query(p, w->row_begin + i / group, (w->kv_head + h) * group + i % group, q,
                           q_stride);
            else
                memset(q, 0, (size_t)q_stride * sizeof *q);
            memset(state + ROWS * q_stride + i % ROWS * o_stride, 0, (size_t)o_stride * sizeof *q);
            vf_store(state + unit - 2 * QI_VW, vf_set1(-INFINITY));
            vf_store(state + unit - QI_VW, vf_set1(0.f));
        }

    decode_block blocks[2];
    fill_block(p, request, from, to, &blocks[0]);
    for (i32 at = from, turn = 0; at < to; at += BLOCK, turn ^= 1) {
        const decode_block *b = &blocks[turn], *next = &blocks[turn ^ 1];
        fill_block(p, request, at + BLOCK, to, &blocks[turn ^ 1]);
        if (next->n <= 0) next = b;
        const int edge = at < all_from || at + BLOCK > all_to;
        for (i32 h = 0; h < heads; h++) {
            const i32 ahead = h + AHEAD;
            const decode_block *fetch = ahead < heads ? b : next;
            const i32 fetch_head = ahead < heads ? ahead : (ahead - heads) % heads;
            for (i32 f = 0; f < fours; f++) {
                float *state = scratch + ((i64)h * fours + f) * unit;
                const decode_state s = {.q = state,
                                        .o = state + ROWS * q_stride,
                                        .max = state + unit - 2 * QI_VW,
                                        .sum = state + unit - QI_VW,
                                        .sees_begin = begin + f * ROWS,
                                        .sees_end = end + f * ROWS,
                                        .edge = edge};
                decode_unit(p, &s, b, w->kv_head + h, fetch, w->kv_head + fetch_head, dim_qk,
                            dim_vo, kv);
            }
        }
    }

    for (i32 h = 0; h < heads; h++)
        for (i32 i = 0; i < rows; i++) {
            float *state = scratch + ((i64)h * fours + i / ROWS) * unit;
            float sum = 0.f;
            for (int t = 0; t < TOKENS; t++) sum += state[unit - QI_VW + t * ROWS + i % ROWS];
            finish_row(p, w->slot < 0 ? -1 : w->slot + h * rows + i, w->row_begin + i / group,
                       (w->kv_head + h) * group + i % group,
                       state + ROWS * q_stride + i % ROWS * o_stride,
                       state[unit - 2 * QI_VW + i % ROWS], sum);
        }
}

#endif
