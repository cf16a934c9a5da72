/* prefill_tile.h - many query rows of one request against its keys, one KV head.
 *
 * The rows of a KV head are tokens x group, folded (row = token * group + head), so that every
 * packed key serves the whole group and the causal edge is only a few keys wide per panel. Keys
 * pass in blocks of up to BLOCK_N; K is packed as K^T panels [dim][QI_TILE_N keys], V as panels
 * [key][QI_TILE_N dims]. For each panel of QI_TILE_M rows: S = Q K^T into L1, softmax of each row
 * in place, O = scale * O + P V with the rescale done as the O tile is loaded. Only the columns
 * that some row of the panel sees are computed, rounded to whole tiles.
 *
 * With dot (bf16 q, a cache of bf16 or 8 bits, and an instruction for products of bf16) words are bf16
 * pairs: of two dims in K and Q, of two keys in V and P; P is rounded to bf16, sums stay f32. At level amx the
 * products are taken by the tile unit, 32 rows a panel.
 *
 * Bound: multiply-adds, 2 * (head_dim_qk + head_dim_vo) flops a (row, key) pair; packing costs
 * about 1 / PREFILL_M of it. Source: FlashAttention-2, arXiv:2307.08691.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_PREFILL_TILE_H
#define QI_ATTENTION_PREFILL_TILE_H

#include "kern/cpu/amx.h"
#include "kern/cpu/tile.h"
#include "ops/attention/attention_tile.h"

enum {
#if defined(__AMX_BF16__)
    DOT_TILE_M = 2 * QI_AMX_ROWS,
    DOT_WORDS = QI_AMX_WORDS, /* granule of the words of a row */
    DOT_SCALES_APART = 1,     /* does O need a pass of its own to be rescaled? */
#else
    DOT_TILE_M = QI_TILE_M,
    DOT_WORDS = 1,
    DOT_SCALES_APART = 0,
#endif
};

/* Keys to pack, the last one repeated to BLOCK_N. */
typedef struct key_block {
    i64 k_offset[BLOCK_N], v_offset[BLOCK_N];
    i32 kv_pos[BLOCK_N];
    i32 begin, n; /* keys [begin, begin + n) of the group's list */
} key_block;

enum { MAX_ROWS = PREFILL_M + MAX_TILE_M };
_Static_assert((int)MAX_GROUP <= (int)PREFILL_M, "rows of a tile: PREFILL_M, or one token's");

/* The tile's private memory and sizes. */
typedef struct prefill {
    const attention_params *p;
    const qi_work *w;
    const qi_group *g;
    i32 group, rows;          /* rows = tokens * group */
    i32 tile_m;               /* rows of a panel */
    i32 words;                /* of a row of q: dims, or pairs of dims */
    i32 words_qk;             /* the same with zeros after them */
    i32 dim_vo_padded;        /* multiple of QI_TILE_N */
    i32 keys;                 /* keys a block, multiple of QI_TILE_N */
    i64 score_stride;         /* row of scores, padded against set conflicts */
    tile_row row[PREFILL_M];  /* of each token; their positions may be in any order */
    i32 sees_begin[MAX_ROWS]; /* the keys that each row sees; rows of padding repeat the last */
    i32 sees_end[MAX_ROWS];
    float unit[MAX_ROWS];     /* what makes each row's products scores, in log2 units */
    float *q, *o, *max, *sum; /* [rows padded to tile_m][words_qk | dim_vo_padded | 1 | 1] */
    float *k, *v;             /* packed block */
    float *scores;            /* [tile_m][score_stride] */
    float *buffer, *angles;   /* a vector's worth of keys as f32 and a row; cosines and sines */
} prefill;

/* Two vectors to bf16 at out, in order. */
QI_INLINE void store_bf16(float *out, vf low, vf high)
{
#if defined(__AVX512BF16__)
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    memcpy(out, &both, sizeof both);
#else
    qi_store(out, QI_BF16, low);
    qi_store((char *)out + QI_VW * 2, QI_BF16, high);
#endif
}

/* Words [word, word + n) of one row as a vector: f32 values, or with dot pairs of bf16, which 8-bit types
 * become exactly. n <= QI_VW. */
QI_INLINE vf load_words(const char *row, i32 word, i32 n, const qi_dtype kv, const int dot)
{
    if (dot && kv != QI_BF16) {
        float elements[2 * QI_VW] = {0}, words[QI_VW];
        qi_widen(elements, qi_at(row, kv, 2 * word), kv, 2 * n);
        store_bf16(words, vf_load(elements), vf_load(elements + QI_VW));
        return vf_load(words);
    }
    const qi_dtype t = dot ? QI_F32 : kv; /* a pair of bf16 is a word of 4 bytes */
    return n >= QI_VW ? qi_load(qi_at(row, t, word), t) : qi_load_n(qi_at(row, t, word), t, n);
}

/* QI_VW keys from j on, as f32 rows in f->buffer, changed as the operator and the variant say. */
static __attribute__((noinline)) void load_panel(const prefill *f, const key_block *b, i32 j)
{
    const attention_params *p = f->p;
    const i64 head = f->w->kv_head * p->k_stride[2], stride = round_up(p->head_dim_qk, QI_VW);
    for (i32 i = 0; i < QI_VW; i++) {
        load_angles(p, b->kv_pos[j + i], f->angles);
        load_key(p, qi_at(p->k, p->dtype_kv, b->k_offset[j + i] + head), b->kv_pos[j + i],
                 f->w->kv_head, f->buffer + i * stride, f->angles, f->buffer + QI_VW * stride);
    }
}

/* K^T panels of a block's keys: k[(j / TILE_N)][word][j % TILE_N]; the last key fills up its panel. */
QI_INLINE void pack_k_as(const prefill *f, const key_block *b, const qi_dtype kv, const int dot)
{
    const i64 head = f->w->kv_head * f->p->k_stride[2];
    const i64 stride = round_up(f->p->head_dim_qk, QI_VW);
    const int change = CHANGES_KEYS(f->p);
    for (i32 j = 0; j < round_up(b->n, QI_TILE_N); j += QI_VW) {
        float *panel = f->k + (i64)(j / QI_TILE_N) * f->words_qk * QI_TILE_N + j % QI_TILE_N;
        const char *rows[QI_VW];
        for (i32 i = 0; i < QI_VW; i++) rows[i] = qi_at(f->p->k, kv, b->k_offset[j + i] + head);
        if (change) load_panel(f, b, j);
        for (i32 d = 0; d < f->words_qk; d += QI_VW) {
            const i32 words = f->words - d < QI_VW ? f->words - d : QI_VW;
            const i32 padded = f->words_qk - d < QI_VW ? f->words_qk - d : QI_VW;
            vf tile[QI_VW];
            QI_UNROLL(16)
            for (i32 i = 0; i < QI_VW; i++)
                tile[i] = change ? vf_load(f->buffer + i * stride + d)
                                 : load_words(rows[i], d, words, kv, dot);
            vf_transpose(tile);
            for (i32 i = 0; i < padded; i++) vf_store(panel + (i64)(d + i) * QI_TILE_N, tile[i]);
        }
    }
}

/* Two rows of bf16 as words (low: first row, high: second). */
QI_INLINE vf pair_rows(vf first, vf second)
{
    return (vf)((vu)first >> 16 | ((vu)second & 0xffff0000u));
}

/* V panels: v[(d / TILE_N)][key or pair of keys][d % TILE_N]; missing keys and dims are zero. */
QI_INLINE void pack_v_as(const prefill *f, const key_block *b, const qi_dtype kv, const int dot)
{
    static const float zeros[MAX_HEAD_DIM];
    const i64 head = f->w->kv_head * f->p->v_stride[2];
    const i32 dim = f->p->head_dim_vo, step = dot ? 2 : 1;
    const i64 panel_words = (i64)(f->keys / step) * QI_TILE_N;
    for (i32 j = 0; j < round_up(b->n, QI_TILE_N); j += step) {
        const char *rows[2];
        QI_UNROLL(2)
        for (i32 i = 0; i < 2; i++)
            rows[i] =
                j + i < b->n ? qi_at(f->p->v, kv, b->v_offset[j + i] + head) : (const char *)zeros;
        float *out = f->v + (i64)(j / step) * QI_TILE_N;
        for (i32 d = 0; d < f->dim_vo_padded; d += QI_VW) {
            vf x = vf_set1(0.f), y = x;
            if (d + QI_VW <= dim) {
                x = qi_load(qi_at(rows[0], kv, d), kv);
                if (dot) y = qi_load(qi_at(rows[1], kv, d), kv);
            } else if (d < dim) {
                x = qi_load_n(qi_at(rows[0], kv, d), kv, dim - d);
                if (dot) y = qi_load_n(qi_at(rows[1], kv, d), kv, dim - d);
            }
            vf_store(out + d / QI_TILE_N * panel_words + d % QI_TILE_N, dot ? pair_rows(x, y) : x);
        }
    }
}

/* A block of keys and values into panels. */
static void pack_block(const prefill *f, const key_block *b, const int dot)
{
#define PACK(kv)                                                                                   \
    pack_k_as(f, b, kv, dot);                                                                      \
    pack_v_as(f, b, kv, dot);                                                                      \
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

/* Fills a block with keys from `begin` on, below `end`; none left: n <= 0. */
static void locate_block(const prefill *f, i32 begin, i32 end, key_block *b)
{
    b->begin = begin;
    b->n = end - begin < f->keys ? end - begin : f->keys;
    if (b->n <= 0) return;
    locate_keys(f->p, f->g, begin, b->n, b->k_offset, b->v_offset, b->kv_pos);
    for (i32 j = b->n; j < BLOCK_N; j++) {
        b->k_offset[j] = b->k_offset[b->n - 1];
        b->v_offset[j] = b->v_offset[b->n - 1];
        b->kv_pos[j] = b->kv_pos[b->n - 1];
    }
}

/* Keys [at, end) of a block that are to be prefetched: pages lie anywhere, so no hardware does. */
typedef struct key_fetch {
    const key_block *block;
    i32 at, end;
} key_fetch;

/* Prefetches the next n keys and values. Few at a time, or the core waits for what it has asked for. */
QI_INLINE void fetch_keys(const prefill *f, key_fetch *fetch, i32 n)
{
    const attention_params *p = f->p;
    const i64 size = (i64)qi_size_of(p->dtype_kv);
    const i64 k_head = f->w->kv_head * p->k_stride[2], v_head = f->w->kv_head * p->v_stride[2];
    for (; n > 0 && fetch->at < fetch->end; n--, fetch->at++) {
        const key_block *b = fetch->block;
        qi_prefetch_row(qi_at(p->k, p->dtype_kv, b->k_offset[fetch->at] + k_head),
                        p->head_dim_qk * size);
        qi_prefetch_row(qi_at(p->v, p->dtype_kv, b->v_offset[fetch->at] + v_head),
                        p->head_dim_vo * size);
    }
}

/* Rows of Q as words; rows beyond the last are zero. */
QI_INLINE void pack_q(const prefill *f, const int dot)
{
    const attention_params *p = f->p;
    const i64 stride = round_up(p->head_dim_qk, QI_VW);
    for (i32 i = 0; i < round_up(f->rows, f->tile_m); i++) {
        float *out = f->q + (i64)i * f->words_qk;
        const tile_row *row = &f->row[i < f->rows ? i / f->group : 0];
        const i32 head = f->w->kv_head * f->group + i % f->group;
        if (i % f->group == 0) load_angles(p, row->position, f->angles);
        if (i >= f->rows || dot) memset(out, 0, (size_t)f->words_qk * sizeof *out);
        if (i >= f->rows) continue;
        if (dot)
            memcpy(out, qi_at(p->q, QI_BF16, row->token * p->q_stride[0] + head * p->q_stride[1]),
                   (size_t)f->words * sizeof *out);
        else
            load_query(p, row, head, out, f->words_qk, f->angles, f->buffer + QI_VW * stride);
    }
}

/* Products s[0, n) of one row to scores in place. n is a multiple of QI_VW. */
QI_INLINE void score_row(const attention_params *p, float scale, float *s, i32 n)
{
    for (i32 j = 0; j < n; j += QI_VW) vf_store(s + j, score(p, vf_load(s + j), vf_set1(scale)));
}

/* Sets the columns of a row outside [begin, end) to -inf: those of the pairs of vectors that hold its ends.
 * [*first, *last): the columns of these and the ones between; the others need not be read. */
QI_INLINE void drop_unseen(float *s, i32 begin, i32 end, i32 *first, i32 *last)
{
    *first = begin / QI_TILE_N * QI_TILE_N;
    *last = begin < end ? (i32)round_up(end, QI_TILE_N) : *first;
    for (i32 j = *first; j < begin; j++) s[j] = -INFINITY;
    for (i32 j = end; j < *last; j++) s[j] = -INFINITY;
}

/* The columns of a panel's rows that hold scores, and what makes these log2 units. */
typedef struct panel_rows {
    i32 first[MAX_TILE_M], last[MAX_TILE_M]; /* multiples of QI_TILE_N */
    float unit[MAX_TILE_M];
    float scale[MAX_TILE_M + MAX_VW]; /* what O must be scaled by */
} panel_rows;

/* The largest score of a row in each lane. */
QI_INLINE vf row_max(const float *s, i32 first, i32 last)
{
    vf top = vf_set1(-INFINITY), other = top;
    for (i32 j = first; j < last; j += QI_TILE_N) {
        top = vf_max(top, vf_load(s + j));
        other = vf_max(other, vf_load(s + j + QI_VW));
    }
    return vf_max(top, other);
}

/* Scores of a row, columns [first, last), to weights in place of s[0, n), zero elsewhere (as bf16 at
 * the front with dot). Returns their sums by lane. n is a multiple of QI_TILE_N. */
QI_INLINE vf row_weights(float *s, i32 n, i32 first, i32 last, float unit, float max, const int dot)
{
    vf total = vf_set1(0.f), other = total;
    if (first > 0) memset(s, 0, (size_t)(dot ? first / 2 : first) * sizeof *s);
    for (i32 j = first; j < last; j += QI_TILE_N) {
        const vf low = vf_exp2(vf_load(s + j) * unit - max);
        const vf high = vf_exp2(vf_load(s + j + QI_VW) * unit - max);
        total = total + low;
        other = other + high;
        if (dot) {
            store_bf16(s + j / 2, low, high);
        } else {
            vf_store(s + j, low);
            vf_store(s + j + QI_VW, high);
        }
    }
    if (last < n)
        memset(s + (dot ? last / 2 : last), 0,
               (size_t)(dot ? (n - last) / 2 : n - last) * sizeof *s);
    return total + other;
}

/* The softmax of a panel's scores, n columns: in place to weights, with max and sum of each row kept
 * up and r->scale set. Rows pass QI_VW at a time, so that what is one number a row is a vector;
 * lanes past the panel's rows change nothing. */
QI_INLINE void softmax_rows(const prefill *f, i32 row0, i32 n, panel_rows *r, const int dot)
{
    const i32 tile_m = dot ? DOT_TILE_M : QI_TILE_M;
    for (i32 i0 = 0; i0 < tile_m; i0 += QI_VW) {
        vf each[QI_VW];
        float unit[QI_VW], max[QI_VW];
        for (i32 i = 0; i < QI_VW; i++) {
            const i32 row = i0 + i;
            unit[i] = row < tile_m ? r->unit[row] : 0.f;
            each[i] = vf_set1(-INFINITY);
            if (row < tile_m)
                each[i] = row_max(f->scores + row * f->score_stride, r->first[row], r->last[row]) *
                          unit[i];
        }
        float *max_at = f->max + row0 + i0, *sum_at = f->sum + row0 + i0;
        const vf before = vf_load(max_at), now = vf_max(vf_max_each(each), before);
        const vf safe = vf_select(now == -INFINITY, vf_set1(0.f), now);
        const vf scale = vf_select(now == -INFINITY, vf_set1(1.f), vf_exp2(before - safe));
        vf_store(max_at, now);
        vf_store(r->scale + i0, scale);
        vf_store(max, safe);
        for (i32 i = 0; i < QI_VW; i++) {
            const i32 row = i0 + i;
            each[i] = vf_set1(0.f);
            if (row < tile_m)
                each[i] = row_weights(f->scores + row * f->score_stride, n, r->first[row],
                                      r->last[row], unit[i], max[i], dot);
        }
        vf_store(sum_at, vf_load(sum_at) * scale + vf_sum_each(each));
    }
}

/* C [tile_m][QI_TILE_N] = A B, or scale(row) * C + A B: the products of a panel of rows. k: words. The
 * tile unit cannot scale; there the caller has scaled C. */
QI_INLINE void multiply(const float *a, i64 lda, const float *b, i64 k, float *c, i64 ldc,
                        const float *scale, const int dot)
{
#if defined(__AMX_BF16__)
    if (dot) {
        qi_amx_mac(a, lda, b, QI_TILE_N, k, c, ldc, scale != NULL);
        return;
    }
#endif
    qi_tile_mac(a, lda, b, k, c, ldc, scale, QI_TILE_M, dot);
}

/* Rows of O times scale, where that is not 1. */
QI_INLINE void scale_rows(float *o, i64 stride, i32 rows, const float *scale)
{
    for (i32 i = 0; i < rows; i++, o += stride)
        if (scale[i] != 1.f)
            for (i64 d = 0; d < stride; d += QI_VW) vf_store(o + d, vf_load(o + d) * scale[i]);
}

/* Products of row `index`, columns [lo, lo + columns) of the block, to scores that the softmax takes;
 * row i of the panel. begin, end: what it sees, counted from lo. */
QI_INLINE void score_columns(const prefill *f, const key_block *b, i32 index, i32 lo, i32 columns,
                             i32 begin, i32 end, i32 i, panel_rows *rows)
{
    const attention_params *p = f->p;
    float *s = f->scores + i * f->score_stride;
    const i32 r = index < f->rows ? index : f->rows - 1;
    rows->unit[i] = f->unit[index];
    rows->first[i] = 0;
    rows->last[i] = columns;
    if (GENERAL_SCORES(p)) {
        const i32 keys = b->n - lo < columns ? b->n - lo : columns;
        general_scores(p, f->g, &f->row[r / f->group], f->w->kv_head * f->group + r % f->group,
                       b->kv_pos + lo, b->begin + lo, keys, s);
        for (i32 j = (i32)round_up(keys, QI_VW); j < columns; j++) s[j] = SOFTMAX ? -INFINITY : 0.f;
        rows->unit[i] = 1.f;
        return;
    }
    if (p->logits_soft_cap > 0.f || !(rows->unit[i] > 0.f)) {
        score_row(p, p->logit_scale[f->w->kv_head * f->group + r % f->group], s, columns);
        rows->unit[i] = 1.f;
    }
    drop_unseen(s, begin, end, &rows->first[i], &rows->last[i]);
}

/* One panel of rows against the packed block of keys, while others are fetched. */
QI_INLINE void prefill_panel(const prefill *f, i32 panel, const key_block *b, key_fetch *fetch,
                             const int dot)
{
    const i32 step = dot ? 2 : 1, tile_m = dot ? DOT_TILE_M : QI_TILE_M, row0 = panel * tile_m;
    i32 begin[MAX_TILE_M], end[MAX_TILE_M], lo = b->n, hi = 0;
    for (i32 i = 0; i < tile_m; i++) {
        const i32 from = f->sees_begin[row0 + i] - b->begin, to = f->sees_end[row0 + i] - b->begin;
        begin[i] = from < 0 ? 0 : from > b->n ? b->n : from;
        end[i] = to < begin[i] ? begin[i] : to > b->n ? b->n : to;
        lo = begin[i] < end[i] && begin[i] < lo ? begin[i] : lo;
        hi = begin[i] < end[i] && end[i] > hi ? end[i] : hi;
    }
    if (lo >= hi) return;
    lo = lo / QI_TILE_N * QI_TILE_N;
    const i32 columns = (i32)round_up(hi, QI_TILE_N) - lo;

    const float *q = f->q + (i64)row0 * f->words_qk;
    float *o = f->o + (i64)row0 * f->dim_vo_padded;
    panel_rows rows;
    for (i32 j = 0; j < columns; j += QI_TILE_N) {
        fetch_keys(f, fetch, 1);
        multiply(q, f->words_qk, f->k + (i64)(lo + j) * f->words_qk, f->words_qk, f->scores + j,
                 f->score_stride, NULL, dot);
    }
    for (i32 i = 0; i < tile_m; i++) {
        const int sees = begin[i] < end[i];
        score_columns(f, b, row0 + i, lo, columns, sees ? begin[i] - lo : 0, sees ? end[i] - lo : 0,
                      i, &rows);
        rows.scale[i] = 1.f;
    }
    if (SOFTMAX) softmax_rows(f, row0, columns, &rows, dot);
    if (dot && DOT_SCALES_APART) scale_rows(o, f->dim_vo_padded, tile_m, rows.scale);
    for (i32 d = 0; d < f->dim_vo_padded; d += QI_TILE_N) {
        fetch_keys(f, fetch, 1);
        multiply(f->scores, f->score_stride,
                 f->v + (i64)d * (f->keys / step) + (i64)(lo / step) * QI_TILE_N, columns / step,
                 o + d, f->dim_vo_padded, rows.scale, dot);
    }
}

/* What each row of the tile is and sees, and what its products are scaled by; [*from, *to): the keys
 * that some row sees. */
static void find_tile_rows(prefill *f, i32 padded, i32 *from, i32 *to)
{
    const attention_params *p = f->p;
    const qi_work *w = f->w;
    *from = w->kv_end, *to = w->kv_begin;
    for (i32 i = 0; i < padded; i++) {
        const i32 r = i < f->rows ? i : f->rows - 1, token = r / f->group;
        f->unit[i] = p->logit_scale[w->kv_head * f->group + r % f->group] * QI_LOG2E;
        i32 begin = w->kv_begin, end = w->kv_end;
        if (r % f->group == 0) f->row[token] = row_at(p, w->row_begin + token);
        if (!(f->g->flags & QI_GROUP_SPARSE))
            row_sees(p, f->row[token].position - f->g->kv_offset, begin, end, &begin, &end);
        f->sees_begin[i] = begin, f->sees_end[i] = end;
        if (begin >= end) continue;
        *from = begin < *from ? begin : *from;
        *to = end > *to ? end : *to;
    }
}

/* One work item. dot: words are bf16 pairs. */
QI_INLINE void prefill_tile(const attention_params *p, const qi_work *w, float *scratch,
                            const int dot)
{
    const i32 group = p->num_qo_heads / p->num_kv_heads, rows = w->num_rows * group;
    const i32 tile_m = dot ? DOT_TILE_M : QI_TILE_M, words = p->head_dim_qk / (dot ? 2 : 1);
    const i64 padded = round_up(rows, tile_m), dim_padded = round_up(p->head_dim_qk, QI_VW);
    prefill f = {.p = p,
                 .w = w,
                 .g = &p->plan.groups[w->group],
                 .group = group,
                 .rows = rows,
                 .tile_m = tile_m,
                 .words = words,
                 .words_qk = (i32)round_up(words, dot ? DOT_WORDS : 1),
                 .dim_vo_padded = (i32)round_up(p->head_dim_vo, QI_TILE_N),
                 .keys = block_keys(p->head_dim_qk, p->head_dim_vo)};
    f.score_stride = f.keys + MAX_VW;
    f.scores = scratch;
    f.k = f.scores + tile_m * f.score_stride;
    f.v = f.k + (i64)f.keys * f.words_qk;
    f.o = f.v + (i64)f.keys * f.dim_vo_padded;
    f.q = f.o + padded * f.dim_vo_padded;
    f.max = f.q + padded * f.words_qk;
    f.sum = f.max + padded + MAX_VW;
    f.buffer = f.sum + padded + MAX_VW;
    f.angles = f.buffer + (QI_VW + 1) * dim_padded;

    i32 from, to;
    find_tile_rows(&f, (i32)padded, &from, &to);
    key_block blocks[2] = {{.n = 0}};
    locate_block(&f, from, to, &blocks[0]);
    key_fetch fetch = {&blocks[0], 0, blocks[0].n};
    fetch_keys(&f, &fetch, BLOCK_N);
#if defined(__AMX_BF16__)
    if (dot) qi_amx_begin();
#endif
    pack_q(&f, dot);
    memset(f.o, 0, (size_t)(padded * f.dim_vo_padded) * sizeof *f.o);
    for (i64 i = 0; i < padded + MAX_VW; i++) {
        f.max[i] = -INFINITY;
        f.sum[i] = 0.f;
    }
    const i32 panels = (i32)(padded / tile_m);
    for (i32 at = from, turn = 0; at < to; at += f.keys, turn ^= 1) {
        const key_block *b = &blocks[turn], *next = &blocks[turn ^ 1];
        locate_block(&f, at + f.keys, to, &blocks[turn ^ 1]);
        pack_block(&f, b, dot);
        fetch = (key_fetch){.block = next};
        for (i32 panel = 0; panel < panels; panel++) {
            fetch.end = next->n * (panel + 1) / panels;
            prefill_panel(&f, panel, b, &fetch, dot);
            fetch_keys(&f, &fetch, BLOCK_N);
        }
    }
#if defined(__AMX_BF16__)
    if (dot) qi_amx_end();
#endif
    for (i32 i = 0; i < rows; i++) {
        float *o = f.o + (i64)i * f.dim_vo_padded;
        if (w->slot < 0)
            finish_row(p, &f.row[i / group], w->kv_head * group + i % group, o, f.max[i], f.sum[i]);
        else
            store_partial(p, (i64)w->slot + i, o, f.max[i], f.sum[i]);
    }
}

#endif
