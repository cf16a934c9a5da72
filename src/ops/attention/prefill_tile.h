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
    const qi_group *g;
    i32 group, rows;          /* rows = tokens * group */
    i32 words_qk;             /* words of a row of q: dims, or pairs of dims */
    i32 dim_vo_padded;        /* multiple of QI_TILE_N */
    i32 keys;                 /* keys a block, multiple of QI_TILE_N */
    i64 score_stride;         /* row of scores, padded against set conflicts */
    tile_row row[PREFILL_M];  /* of each token; their positions may be in any order */
    i32 kv_pos[BLOCK_N];      /* of the block at hand */
    float *q, *o, *max, *sum; /* [rows padded to QI_TILE_M][words_qk | dim_vo_padded | 1 | 1] */
    float *k, *v;             /* packed block */
    float *scores;            /* [QI_TILE_M][score_stride] */
    float *buffer, *angles;   /* a vector's worth of keys as f32 and a row; cosines and sines */
} prefill;

/* Words [word, word + n) of one row as a vector: f32 values, or raw bf16 pairs. n <= QI_VW. */
QI_INLINE vf load_words(const char *row, i32 word, i32 n, const qi_dtype kv, const int dot)
{
    const qi_dtype t = dot ? QI_F32 : kv; /* a pair of bf16 is a word of 4 bytes */
    return n >= QI_VW ? qi_load(qi_at(row, t, word), t) : qi_load_n(qi_at(row, t, word), t, n);
}

/* QI_VW keys from j on, as f32 rows in f->buffer, changed as the operator and the variant say. */
static __attribute__((noinline)) void load_panel(const prefill *f, const i64 *offset, i32 j, i32 n)
{
    const attention_params *p = f->p;
    const i64 head = f->w->kv_head * p->k_stride[2], stride = round_up(p->head_dim_qk, QI_VW);
    for (i32 i = 0; i < QI_VW && j + i < n; i++) {
        load_angles(p, f->kv_pos[j + i], f->angles);
        load_key(p, qi_at(p->k, p->dtype_kv, offset[j + i] + head), f->kv_pos[j + i], f->w->kv_head,
                 f->buffer + i * stride, f->angles, f->buffer + QI_VW * stride);
    }
}

/* K^T panels of keys [0, n): k[(j / TILE_N)][word][j % TILE_N]; missing keys of the last are zero. */
QI_INLINE void pack_k_as(const prefill *f, const i64 *offset, i32 n, const qi_dtype kv,
                         const int dot)
{
    const i64 head = f->w->kv_head * f->p->k_stride[2];
    const i64 stride = round_up(f->p->head_dim_qk, QI_VW);
    const int change = CHANGES_KEYS(f->p);
    for (i32 j = 0; j < round_up(n, QI_TILE_N); j += QI_VW) {
        float *panel = f->k + (i64)(j / QI_TILE_N) * f->words_qk * QI_TILE_N + j % QI_TILE_N;
        if (change) load_panel(f, offset, j, n);
        for (i32 d = 0; d < f->words_qk; d += QI_VW) {
            const i32 words = f->words_qk - d < QI_VW ? f->words_qk - d : QI_VW;
            vf tile[QI_VW];
            QI_UNROLL(16)
            for (i32 i = 0; i < QI_VW; i++)
                tile[i] = j + i >= n ? vf_set1(0.f)
                          : change   ? vf_load(f->buffer + i * stride + d)
                                   : load_words(qi_at(f->p->k, kv, offset[j + i] + head), d, words,
                                                kv, dot);
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
QI_INLINE void pack_v_as(const prefill *f, const i64 *offset, i32 n, const qi_dtype kv,
                         const int dot)
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

/* The block's keys [0, n), at these offsets, into panels. */
static void pack_block(const prefill *f, const i64 *k_offset, const i64 *v_offset, i32 n,
                       const int dot)
{
#define PACK(kv)                                                                                   \
    pack_k_as(f, k_offset, n, kv, dot);                                                            \
    pack_v_as(f, v_offset, n, kv, dot);                                                            \
    break
    switch (f->p->dtype_kv) {
    case QI_F32: PACK(QI_F32);
    case QI_F16: PACK(QI_F16);
    case QI_BF16: PACK(QI_BF16);
    case QI_E4M3: PACK(QI_E4M3);
    case QI_E5M2: PACK(QI_E5M2);
    default: PACK(QI_I8);
    }
#undef PACK
}

/* Rows of Q as words; rows beyond the last are zero. */
QI_INLINE void pack_q(const prefill *f, const int dot)
{
    const attention_params *p = f->p;
    const i64 stride = round_up(p->head_dim_qk, QI_VW);
    for (i32 i = 0; i < round_up(f->rows, QI_TILE_M); i++) {
        float *out = f->q + (i64)i * f->words_qk;
        const tile_row *row = &f->row[i < f->rows ? i / f->group : 0];
        const i32 head = f->w->kv_head * f->group + i % f->group;
        if (i % f->group == 0) load_angles(p, row->position, f->angles);
        if (i >= f->rows)
            memset(out, 0, (size_t)f->words_qk * sizeof *out);
        else if (dot)
            memcpy(out, qi_at(p->q, QI_BF16, row->token * p->q_stride[0] + head * p->q_stride[1]),
                   (size_t)f->words_qk * sizeof *out);
        else
            load_query(p, row, head, out, f->words_qk, f->angles, f->buffer + QI_VW * stride);
    }
}

/* Two vectors of weights to one vector of bf16 pairs of neighbours. */
QI_INLINE void store_pairs(float *out, vf low, vf high)
{
    qi_store(out, QI_BF16, low);
    qi_store((char *)out + QI_VW * 2, QI_BF16, high);
}

/* Products s[0, n) of one row to scores in place; columns outside [begin, end) get -inf. n is a
 * multiple of QI_TILE_N. */
QI_INLINE void score_row(const attention_params *p, float scale, float *s, i32 n, i32 begin,
                         i32 end)
{
    for (i32 j = 0; j < n; j += QI_VW) {
        vf x = score(p, vf_load(s + j), vf_set1(scale));
        if (j < begin || j + QI_VW > end) {
            const vi key = vi_iota() + j;
            x = vf_select((key >= begin) & (key < end), x, vf_set1(-INFINITY));
        }
        vf_store(s + j, x);
    }
}

/* Scores s[0, n) of one row to weights in place (as bf16 pairs at the front with dot). Returns what O
 * must be scaled by. */
QI_INLINE float softmax_row(float *s, i32 n, float *max, float *sum, const int dot)
{
    vf top = vf_set1(-INFINITY);
    for (i32 j = 0; j < n; j += QI_VW) top = vf_max(top, vf_load(s + j));
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

/* The keys of the block [from, from + n) that a row sees, counted from `from`. */
QI_INLINE void panel_row_sees(const prefill *f, const tile_row *row, i32 from, i32 n, i32 *begin,
                              i32 *end)
{
    *begin = 0, *end = n;
    if (f->g->flags & QI_GROUP_SPARSE) return;
    row_sees(f->p, row->position - f->g->kv_offset, from, from + n, begin, end);
    *begin -= from;
    *end -= from;
}

/* One panel of rows against the packed block of keys [from, from + n). */
QI_INLINE void prefill_panel(const prefill *f, i32 panel, i32 from, i32 n, const int dot)
{
    const attention_params *p = f->p;
    const i32 step = dot ? 2 : 1, first = panel * QI_TILE_M;
    i32 begin[QI_TILE_M], end[QI_TILE_M], lo = n, hi = 0;
    for (i32 i = 0; i < QI_TILE_M; i++) {
        const i32 r = first + i < f->rows ? first + i : f->rows - 1;
        panel_row_sees(f, &f->row[r / f->group], from, n, &begin[i], &end[i]);
        if (begin[i] < end[i]) {
            lo = begin[i] < lo ? begin[i] : lo;
            hi = end[i] > hi ? end[i] : hi;
        }
    }
    if (lo >= hi) return;
    lo = lo / QI_TILE_N * QI_TILE_N;
    hi = (i32)round_up(hi, QI_TILE_N);

    const float *q = f->q + (i64)first * f->words_qk;
    for (i32 j = lo; j < hi; j += QI_TILE_N)
        qi_tile_mac(q, f->words_qk, f->k + (i64)j * f->words_qk, f->words_qk, f->scores + (j - lo),
                    f->score_stride, NULL, QI_TILE_M, dot);
    float scale[QI_TILE_M];
    for (i32 i = 0; i < QI_TILE_M; i++) {
        float *s = f->scores + i * f->score_stride;
        const i32 r = first + i < f->rows ? first + i : f->rows - 1;
        const i32 head = f->w->kv_head * f->group + r % f->group;
        if (GENERAL_SCORES(p)) {
            general_scores(p, f->g, &f->row[r / f->group], head, f->kv_pos + lo, from + lo,
                           (n < hi ? n : hi) - lo, s);
            for (i32 j = (i32)round_up((n < hi ? n : hi) - lo, QI_VW); j < hi - lo; j++)
                s[j] = SOFTMAX ? -INFINITY : 0.f;
        } else {
            score_row(p, p->logit_scale[head], s, hi - lo, begin[i] - lo, end[i] - lo);
        }
        scale[i] = 1.f;
        if (SOFTMAX)
            scale[i] = softmax_row(s, hi - lo, f->max + first + i, f->sum + first + i, dot);
    }
    for (i32 d = 0; d < f->dim_vo_padded; d += QI_TILE_N)
        qi_tile_mac(f->scores, f->score_stride,
                    f->v + (i64)d * (f->keys / step) + (i64)(lo / step) * QI_TILE_N,
                    (hi - lo) / step, f->o + (i64)first * f->dim_vo_padded + d, f->dim_vo_padded,
                    scale, QI_TILE_M, dot);
}

/* One work item. dot: words are bf16 pairs. */
QI_INLINE void prefill_tile(const attention_params *p, const qi_work *w, float *scratch,
                            const int dot)
{
    const i32 group = p->num_qo_heads / p->num_kv_heads, rows = w->num_rows * group;
    const i64 padded = round_up(rows, QI_TILE_M), dim_padded = round_up(p->head_dim_qk, QI_VW);
    prefill f = {.p = p,
                 .w = w,
                 .g = &p->plan.groups[w->group],
                 .group = group,
                 .rows = rows,
                 .words_qk = dot ? p->head_dim_qk / 2 : p->head_dim_qk,
                 .dim_vo_padded = (i32)round_up(p->head_dim_vo, QI_TILE_N),
                 .keys = block_keys(p->head_dim_qk, p->head_dim_vo)};
    f.score_stride = f.keys + MAX_VW;
    f.scores = scratch;
    f.k = f.scores + QI_TILE_M * f.score_stride;
    f.v = f.k + (i64)f.keys * f.words_qk;
    f.o = f.v + (i64)f.keys * f.dim_vo_padded;
    f.q = f.o + padded * f.dim_vo_padded;
    f.max = f.q + padded * f.words_qk;
    f.sum = f.max + padded;
    f.buffer = f.sum + padded;
    f.angles = f.buffer + (QI_VW + 1) * dim_padded;

    i32 from = w->kv_end, to = w->kv_begin; /* the keys that some row sees */
    for (i32 i = 0; i < w->num_rows; i++) {
        i32 begin = w->kv_begin, end = w->kv_end;
        f.row[i] = row_at(p, w->row_begin + i);
        if (!(f.g->flags & QI_GROUP_SPARSE))
            row_sees(p, f.row[i].position - f.g->kv_offset, w->kv_begin, w->kv_end, &begin, &end);
        if (begin >= end) continue;
        from = begin < from ? begin : from;
        to = end > to ? end : to;
    }
    pack_q(&f, dot);
    memset(f.o, 0, (size_t)(padded * f.dim_vo_padded) * sizeof *f.o);
    for (i64 i = 0; i < padded; i++) {
        f.max[i] = -INFINITY;
        f.sum[i] = 0.f;
    }
    i64 k_offset[BLOCK_N], v_offset[BLOCK_N];
    for (i32 at = from; at < to; at += f.keys) {
        const i32 n = to - at < f.keys ? to - at : f.keys;
        locate_keys(p, f.g, at, n, k_offset, v_offset, f.kv_pos);
        for (i32 j = n; j < BLOCK_N; j++) f.kv_pos[j] = f.kv_pos[n - 1];
        pack_block(&f, k_offset, v_offset, n, dot);
        for (i32 panel = 0; panel * QI_TILE_M < rows; panel++) prefill_panel(&f, panel, at, n, dot);
    }
    for (i32 i = 0; i < rows; i++) {
        float *o = f.o + (i64)i * f.dim_vo_padded;
        if (w->slot < 0)
            finish_row(p, &f.row[i / group], w->kv_head * group + i % group, o, f.max[i], f.sum[i]);
        else
            store_partial(p, (i64)w->slot + i, o, f.max[i], f.sum[i]);
    }
}

#endif
