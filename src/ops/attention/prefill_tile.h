/* prefill_tile.h - many query rows of one request against its keys, one KV head.
 *
 * The rows of a KV head are tokens x group, folded (row = token * group + head), so that every
 * packed key serves the whole group and the causal edge is only a few keys wide per panel. Keys
 * pass in blocks of up to BLOCK_N; K is packed as K^T panels [dim][QI_TILE_N keys], V as panels
 * [key][QI_TILE_N dims]. For each panel of QI_TILE_M rows: S = Q K^T into L1, softmax of each row
 * in place, O = scale * O + P V with the rescale done as the O tile is loaded. Only the columns
 * that some row of the panel sees are computed, rounded to whole tiles.
 *
 * With dot (bf16 q and cache on a CPU whose vdpbf16ps is faster than FMA) words are bf16 pairs: of
 * two dims in K and Q, of two keys in V and P; P is rounded to bf16, sums stay f32.
 *
 * Bound: multiply-adds, 2 * (head_dim_qk + head_dim_vo) flops a (row, key) pair; packing costs
 * about 1 / PREFILL_M of it. Source: FlashAttention-2, arXiv:2307.08691.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_PREFILL_TILE_H
#define QI_ATTENTION_PREFILL_TILE_H

#include "kern/cpu/tile.h"
#include "ops/attention/attention_tile.h"

/* The tile's private memory and sizes. */
typedef struct prefill {
    const attention_params *p;
    const qi_work *w;
    i32 group, rows;          /* rows = tokens * group */
    i32 words_qk;             /* words of a row of q: dims, or pairs of dims */
    i32 dim_vo_padded;        /* multiple of QI_TILE_N */
    i32 keys;                 /* keys a block, multiple of QI_TILE_N */
    i64 score_stride;         /* row of scores, padded against set conflicts */
    i64 position;             /* of the first token */
    float *q, *o, *max, *sum; /* [rows padded to QI_TILE_M][words_qk | dim_vo_padded | 1 | 1] */
    float *k, *v;             /* packed block */
    float *scores;            /* [QI_TILE_M][score_stride] */
} prefill;

/* Words [word, word + n) of one row as a vector: f32 values, or raw bf16 pairs. n <= QI_VW. */
QI_INLINE vf load_words(const char *row, i32 word, i32 n, const qi_dtype kv, const int dot)
{
    const qi_dtype t = dot ? QI_F32 : kv; /* a pair of bf16 is a word of 4 bytes */
    return n >= QI_VW ? qi_load(qi_at(row, t, word), t) : qi_load_n(qi_at(row, t, word), t, n);
}

/* K^T panels of keys [0, n): k[(j / TILE_N)][word][j % TILE_N]; missing keys of the last are zero. */
QI_INLINE void pack_k(const prefill *f, const i64 *offset, i32 n, const qi_dtype kv, const int dot)
{
    const i64 head = f->w->kv_head * f->p->k_stride[2];
    for (i32 j = 0; j < round_up(n, QI_TILE_N); j += QI_VW) {
        float *panel = f->k + (i64)(j / QI_TILE_N) * f->words_qk * QI_TILE_N + j % QI_TILE_N;
        for (i32 d = 0; d < f->words_qk; d += QI_VW) {
            const i32 words = f->words_qk - d < QI_VW ? f->words_qk - d : QI_VW;
            vf tile[QI_VW];
            QI_UNROLL(16)
            for (i32 i = 0; i < QI_VW; i++)
                tile[i] = j + i < n ? load_words(qi_at(f->p->k, kv, offset[j + i] + head), d, words,
                                                 kv, dot)
                                    : vf_set1(0.f);
            vf_transpose(tile);
            for (i32 i = 0; i < words; i++) vf_store(panel + (i64)(d + i) * QI_TILE_N, tile[i]);
        }
    }
}

/* Two rows of bf16 as words (low: first row, high: second). */
QI_INLINE vf pair_rows(vf first, vf second)
{
    return (vf)((vu)first >> 16 | ((vu)second & 0xffff0000u));
}

/* V panels: v[(d / TILE_N)][key or pair of keys][d % TILE_N]; missing keys and dims are zero. */
QI_INLINE void pack_v(const prefill *f, const i64 *offset, i32 n, const qi_dtype kv, const int dot)
{
    const i64 head = f->w->kv_head * f->p->v_stride[2];
    const i32 dim = f->p->head_dim_vo, step = dot ? 2 : 1;
    const i64 panel_words = (i64)(f->keys / step) * QI_TILE_N;
    for (i32 j = 0; j < round_up(n, QI_TILE_N); j += step)
        for (i32 d = 0; d < f->dim_vo_padded; d += QI_VW) {
            const i32 dims = dim - d < QI_VW ? dim - d : QI_VW;
            vf x[2] = {vf_set1(0.f), vf_set1(0.f)};
            for (i32 i = 0; i < step; i++)
                if (j + i < n && dims > 0)
                    x[i] = load_words(qi_at(f->p->v, kv, offset[j + i] + head), d, dims, kv, 0);
            vf_store(f->v + d / QI_TILE_N * panel_words + (i64)(j / step) * QI_TILE_N +
                         d % QI_TILE_N,
                     dot ? pair_rows(x[0], x[1]) : x[0]);
        }
}

/* Rows of Q as words; rows beyond the last are zero. */
QI_INLINE void pack_q(const prefill *f, const int dot)
{
    for (i32 i = 0; i < round_up(f->rows, QI_TILE_M); i++) {
        float *out = f->q + (i64)i * f->words_qk;
        const i64 token = f->w->row_begin + i / f->group;
        const i32 head = f->w->kv_head * f->group + i % f->group;
        if (i >= f->rows)
            memset(out, 0, (size_t)f->words_qk * sizeof *out);
        else if (dot)
            memcpy(out,
                   qi_at(f->p->q, QI_BF16, token * f->p->q_stride[0] + head * f->p->q_stride[1]),
                   (size_t)f->words_qk * sizeof *out);
        else
            load_query(f->p, token, head, out, f->words_qk);
    }
}

/* Two vectors of weights to one vector of bf16 pairs of neighbours. */
QI_INLINE void store_pairs(float *out, vf low, vf high)
{
    qi_store(out, QI_BF16, low);
    qi_store((char *)out + QI_VW * 2, QI_BF16, high);
}

/* Scores s[0, n) of one row to weights in place (as bf16 pairs at the front with dot); columns
 * outside [begin, end) get weight 0. n is a multiple of QI_TILE_N. Returns what O must be scaled
 * by. */
QI_INLINE float softmax_row(const attention_params *p, float *s, i32 n, i32 begin, i32 end,
                            float *max, float *sum, const int dot)
{
    vf top = vf_set1(-INFINITY);
    for (i32 j = 0; j < n; j += QI_VW) {
        vf x = score(p, vf_load(s + j));
        if (j < begin || j + QI_VW > end) {
            const vi key = vi_iota() + j;
            x = vf_select((key >= begin) & (key < end), x, vf_set1(-INFINITY));
        }
        vf_store(s + j, x);
        top = vf_max(top, x);
    }
    const float before = *max, block = vf_max_lane(top), now = block > before ? block : before;
    const float safe = now == -INFINITY ? 0.f : now;
    vf total = vf_set1(0.f);
    for (i32 j = 0; j < n; j += QI_TILE_N) {
        const vf a = vf_exp2(vf_load(s + j) - safe), b = vf_exp2(vf_load(s + j + QI_VW) - safe);
        total = total + (a + b);
        if (dot) {
            store_pairs(s + j / 2, a, b);
        } else {
            vf_store(s + j, a);
            vf_store(s + j + QI_VW, b);
        }
    }
    const float scale = now == -INFINITY ? 1.f : vf_exp2(vf_set1(before - safe))[0];
    *max = now;
    *sum = *sum * scale + vf_sum(total);
    return scale;
}

/* One panel of rows against the packed block of keys [from, from + n). */
QI_INLINE void prefill_panel(const prefill *f, i32 panel, i32 from, i32 n, const int dot)
{
    const attention_params *p = f->p;
    const i32 step = dot ? 2 : 1, row = panel * QI_TILE_M;
    i32 begin[QI_TILE_M], end[QI_TILE_M], lo = n, hi = 0;
    for (i32 i = 0; i < QI_TILE_M; i++) {
        const i32 r = row + i < f->rows ? row + i : f->rows - 1;
        row_sees(p, f->position + r / f->group, from, from + n, &begin[i], &end[i]);
        begin[i] -= from;
        end[i] -= from;
        if (begin[i] < end[i]) {
            lo = begin[i] < lo ? begin[i] : lo;
            hi = end[i] > hi ? end[i] : hi;
        }
    }
    if (lo >= hi) return;
    lo = lo / QI_TILE_N * QI_TILE_N;
    hi = (i32)round_up(hi, QI_TILE_N);

    const float *q = f->q + (i64)row * f->words_qk;
    for (i32 j = lo; j < hi; j += QI_TILE_N)
        qi_tile_mac(q, f->words_qk, f->k + (i64)j * f->words_qk, f->words_qk, f->scores + (j - lo),
                    f->score_stride, NULL, QI_TILE_M, dot);
    float scale[QI_TILE_M];
    for (i32 i = 0; i < QI_TILE_M; i++)
        scale[i] = softmax_row(p, f->scores + i * f->score_stride, hi - lo, begin[i] - lo,
                               end[i] - lo, f->max + row + i, f->sum + row + i, dot);
    for (i32 d = 0; d < f->dim_vo_padded; d += QI_TILE_N)
        qi_tile_mac(f->scores, f->score_stride,
                    f->v + (i64)d * (f->keys / step) + (i64)(lo / step) * QI_TILE_N,
                    (hi - lo) / step, f->o + (i64)row * f->dim_vo_padded + d, f->dim_vo_padded,
                    scale, QI_TILE_M, dot);
}

/* One work item. kv: the cache's dtype as a constant; dot: words are bf16 pairs. */
QI_INLINE void prefill_tile(const attention_params *p, const qi_work *w, float *scratch,
                            const qi_dtype kv, const int dot)
{
    const i32 group = p->num_qo_heads / p->num_kv_heads, rows = w->num_rows * group;
    const i64 padded = round_up(rows, QI_TILE_M);
    prefill f = {.p = p,
                 .w = w,
                 .group = group,
                 .rows = rows,
                 .words_qk = dot ? p->head_dim_qk / 2 : p->head_dim_qk,
                 .dim_vo_padded = (i32)round_up(p->head_dim_vo, QI_TILE_N),
                 .keys = block_keys(p->head_dim_qk, p->head_dim_vo),
                 .position =
                     (i64)p->plan.qo_pos[w->group] + (w->row_begin - p->plan.qo_indptr[w->group])};
    f.score_stride = f.keys + MAX_VW;
    f.scores = scratch;
    f.k = f.scores + QI_TILE_M * f.score_stride;
    f.v = f.k + (i64)f.keys * f.words_qk;
    f.o = f.v + (i64)f.keys * f.dim_vo_padded;
    f.q = f.o + padded * f.dim_vo_padded;
    f.max = f.q + padded * f.words_qk;
    f.sum = f.max + padded;

    pack_q(&f, dot);
    memset(f.o, 0, (size_t)(padded * f.dim_vo_padded) * sizeof *f.o);
    for (i64 i = 0; i < padded; i++) {
        f.max[i] = -INFINITY;
        f.sum[i] = 0.f;
    }
    i64 k_offset[BLOCK_N], v_offset[BLOCK_N];
    i32 from, to, ignored;
    row_sees(p, f.position, w->kv_begin, w->kv_end, &from, &ignored);
    row_sees(p, f.position + w->num_rows - 1, w->kv_begin, w->kv_end, &ignored, &to);
    for (i32 at = from; at < to; at += f.keys) {
        const i32 n = to - at < f.keys ? to - at : f.keys;
        locate_keys(p, w->group, at, n, k_offset, v_offset);
        pack_k(&f, k_offset, n, kv, dot);
        pack_v(&f, v_offset, n, kv, dot);
        for (i32 panel = 0; panel * QI_TILE_M < rows; panel++) prefill_panel(&f, panel, at, n, dot);
    }
    for (i32 i = 0; i < rows; i++)
        finish_row(p, w->slot < 0 ? -1 : w->slot + i, w->row_begin + i / group,
                   w->kv_head * group + i % group, f.o + (i64)i * f.dim_vo_padded, f.max[i],
                   f.sum[i]);
}

#endif
