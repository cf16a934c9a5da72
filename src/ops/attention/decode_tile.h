/* decode_tile.h - a few query rows of one request against its keys, all KV heads at once.
 *
 * Keys pass in blocks of BLOCK = 16 tokens, in order; for each block the KV heads are walked, and the
 * rows of the next block are prefetched in the order of their addresses meanwhile, a head's share at a
 * time: pages lie anywhere, so no hardware prefetcher does. Query rows of a KV head (tokens x group)
 * are taken in fours. Scores live as vectors [token][4 rows], so that the softmax of all rows is
 * elementwise; K needs no transposition: QI_VW dot products at a time are summed by vf_sum_each. K and
 * V are widened to f32 and multiplied by FMA, so the result has f32 accuracy for every cache dtype. In
 * the general row, a block of keys and values that are not f32, or that the operator rotates or a
 * variant changes, is widened into scratch first. Scores that need more than a soft cap and a window
 * are turned into rows of keys and back for general_scores().
 *
 * Bound: memory, 2 * head_dim * size bytes a key and head. The state of a head (O, max, sum) lives
 * in L1/L2. Source: FlashAttention-2's online softmax (arXiv:2307.08691), FlashDecoding's splits.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_DECODE_TILE_H
#define QI_ATTENTION_DECODE_TILE_H

#include "kern/cpu/e4m3.h"
#include "ops/attention/attention_tile.h"

enum {
    BLOCK = DECODE_BLOCK,
    ROWS = 4,                  /* query rows computed together */
    TOKENS = QI_VW / ROWS,     /* keys in one score vector */
    SCORES = BLOCK / TOKENS,   /* score vectors of a block */
    WIDE = QI_VW == 8 ? 2 : 4, /* vectors of O per pass of P.V: ROWS * WIDE accumulators */
    TABLE_DIM = 128,           /* the largest dim that by_table() may have */
};

/* Everything a block of keys needs, and the same for the block to prefetch. */
typedef struct decode_block {
    i64 k_offset[BLOCK], v_offset[BLOCK];
    i32 kv_pos[BLOCK];
    i32 begin, n; /* keys [begin, begin + n) of the group's list */
} decode_block;

/* Where prefetching stands: rows (token, head) of a block, K and V side by side, in the order of
 * their addresses. */
typedef struct decode_fetch {
    const decode_block *block;
    i32 token, head, num_heads, first_head;
    int by_head; /* are a head's tokens neighbours, rather than a token's heads? */
} decode_fetch;

/* Prefetches the next n rows. */
QI_INLINE void fetch_rows(const attention_params *p, decode_fetch *f, i32 n, const i64 k_bytes,
                          const i64 v_bytes, const qi_dtype kv)
{
    for (i32 i = 0; i < n; i++) {
        const i64 head = f->first_head + f->head;
        qi_prefetch_row(qi_at(p->k, kv, f->block->k_offset[f->token] + head * p->k_stride[2]),
                        k_bytes);
        qi_prefetch_row(qi_at(p->v, kv, f->block->v_offset[f->token] + head * p->v_stride[2]),
                        v_bytes);
        if (f->by_head) {
            if (++f->token == BLOCK) f->token = 0, f->head++;
        } else {
            if (++f->head == f->num_heads) f->head = 0, f->token++;
        }
    }
}

/* State of four rows of one KV head. */
typedef struct decode_state {
    float *q;                         /* [ROWS][q_stride] */
    float *o;                         /* [ROWS][o_stride], unnormalised */
    float *max;                       /* [QI_VW] lanes [token][row]: the same for every token */
    float *sum;                       /* [QI_VW] partial sums over the lanes' tokens */
    float *scale;                     /* [QI_VW] logit_scale of the rows */
    const tile_row *row;              /* [ROWS] */
    i32 kv_head, first, group;        /* row r is query head (first + r) % group of kv_head */
    i32 num_rows;                     /* that exist */
    const i32 *sees_begin, *sees_end; /* [ROWS] keys that each row sees */
    int edge;                         /* does some row not see every key of the block? */
    const qi_e4m3_table *table;       /* where by_table() */
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

/* Are rows of e4m3 turned to bf16 by table first? */
QI_INLINE int by_table(const i32 dim, const qi_dtype kv)
{
    return QI_HAS_E4M3_TABLE && kv == QI_E4M3 && dim <= TABLE_DIM && dim % (4 * QI_VW) == 0;
}

/* A row of e4m3 to bf16 at out; returns out. */
QI_INLINE const char *widen_row(u16 *out, const char *row, const qi_e4m3_table *table,
                                const i32 dim)
{
#if QI_HAS_E4M3_TABLE
    QI_UNROLL(2)
    for (i32 d = 0; d < dim; d += 4 * QI_VW) qi_e4m3_to_bf16(out + d, row + d, table);
#else
    (void)row, (void)table, (void)dim;
#endif
    return (const char *)out;
}

/* bf16 is widened fastest as the even and the odd elements of a vector of pairs: one shift, one mask.
 * So q and O stand in that order wherever rows are whole pairs of vectors. */
QI_INLINE int in_pairs(const i32 dim, const qi_dtype kv)
{
    return (kv == QI_BF16 && dim % (2 * QI_VW) == 0) || by_table(dim, kv);
}

/* Elements [d, d + QI_VW) of a row of K or V, as f32, in the order of in_pairs(). */
QI_INLINE vf load_vector(const char *row, i32 d, const i32 dim, const qi_dtype kv)
{
    if (!in_pairs(dim, kv)) return qi_load(qi_at(row, kv, d), kv);
    const vu pairs =
        (vu)vf_load((const float *)(const void *)qi_at(row, kv, d / (2 * QI_VW) * (2 * QI_VW)));
    return d / QI_VW % 2 ? (vf)(pairs & 0xffff0000u) : (vf)(pairs << 16);
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
        for (int t = 0; t < TOKENS; t++) key[t] = load_vector(k[t], d, dim, kv);
        QI_UNROLL(4)
        for (int r = 0; r < ROWS; r++) {
            const vf x = vf_load(q + r * q_stride + d);
            QI_UNROLL(4)
            for (int t = 0; t < TOKENS; t++) acc[t * ROWS + r] = acc[t * ROWS + r] + x * key[t];
        }
        __asm__ volatile("" ::: "memory"); /* or gcc hoists loads until accumulators spill */
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
                                 const char *const v[BLOCK], i32 n, i32 d, const int count,
                                 const i32 dim, const qi_dtype kv)
{
    vf acc[ROWS][4];
    QI_UNROLL(4)
    for (int r = 0; r < ROWS; r++) QI_UNROLL(4)
    for (int c = 0; c < count; c++) acc[r][c] = vf_load(s->o + r * o_stride + d + c * QI_VW);
    for (i32 t = 0; t < n; t++) {
        QI_UNROLL(4)
        for (int c = 0; c < count; c++) {
            const i32 at = d + c * QI_VW, left = dim - at;
            const vf x = left >= QI_VW ? load_vector(v[t], at, dim, kv)
                                       : qi_load_n(qi_at(v[t], kv, at), kv, left);
            QI_UNROLL(4)
            for (int r = 0; r < ROWS; r++) acc[r][c] = acc[r][c] + x * weight[t * ROWS + r];
        }
    }
    QI_UNROLL(4)
    for (int r = 0; r < ROWS; r++) QI_UNROLL(4)
    for (int c = 0; c < count; c++) vf_store(s->o + r * o_stride + d + c * QI_VW, acc[r][c]);
}

/* Scores of a block to weights; O, max and sum follow the new maximum. */
QI_INLINE void decode_softmax(const decode_state *s, i64 o_stride, const vf scores[SCORES],
                              float *weight)
{
    const vf before = vf_load(s->max);
    vf max = before;
    QI_UNROLL(4)
    for (int j = 0; j < SCORES; j++) max = vf_max(max, scores[j]);
    max = max_over_tokens(max);
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
    QI_UNROLL(4)
    for (int j = 0; j < SCORES; j++) {
        const vf w = vf_exp2(scores[j] - safe);
        sum = sum + w;
        vf_store(weight + j * QI_VW, w);
    }
    vf_store(s->sum, sum);
}

/* Raw products of a block, [token][4 rows], to scores by general_scores(), which takes rows of keys.
 * Rows beyond the last see nothing. */
static __attribute__((noinline)) void decode_general(const attention_params *p, const qi_group *g,
                                                     const decode_state *s, const decode_block *b,
                                                     float *x)
{
    float rows[ROWS][BLOCK];
    for (int t = 0; t < BLOCK; t++)
        for (int r = 0; r < ROWS; r++) rows[r][t] = x[t * ROWS + r];
    for (int r = 0; r < s->num_rows; r++)
        general_scores(p, g, &s->row[r], s->kv_head * s->group + (s->first + r) % s->group,
                       b->kv_pos, b->begin, b->n, rows[r]);
    for (int t = 0; t < BLOCK; t++)
        for (int r = 0; r < ROWS; r++)
            x[t * ROWS + r] = r < s->num_rows && t < b->n ? rows[r][t] : SOFTMAX ? -INFINITY : 0.f;
}

/* Four rows of one KV head against one block. keys, values: the block's as f32 [BLOCK][q_stride |
 * o_stride], or NULL: where they are. fetch: what to prefetch meanwhile, or NULL. */
QI_INLINE void decode_unit(const attention_params *p, const qi_group *g, const decode_state *s,
                           const decode_block *b, const float *keys, const float *values,
                           decode_fetch *fetch, const i32 dim_qk, const i32 dim_vo,
                           const qi_dtype kv)
{
    const i64 q_stride = round_up(dim_qk, QI_VW), o_stride = round_up(dim_vo, QI_VW);
    const i64 size = (i64)qi_size_of(kv), head = s->kv_head * p->k_stride[2];
    const char *k = p->k, *v = p->v;
    const int general = GENERAL_SCORES(p), table = by_table(dim_qk, kv);
    u16 wide[BLOCK * TABLE_DIM]; /* keys, then values, where by table */

    vf scores[SCORES];
    const vf scale = vf_load(s->scale);
    QI_UNROLL(4)
    for (int j = 0; j < SCORES; j++) {
        const char *rows[TOKENS];
        QI_UNROLL(4)
        for (int t = 0; t < TOKENS; t++) {
            const i32 at = j * TOKENS + t;
            rows[t] =
                keys ? (const char *)(keys + at * q_stride) : qi_at(k, kv, b->k_offset[at] + head);
            if (table) rows[t] = widen_row(wide + at * dim_qk, rows[t], s->table, dim_qk);
        }
        if (fetch) fetch_rows(p, fetch, 2, dim_qk * size, dim_vo * size, kv);
        const vf product = decode_products(rows, s->q, q_stride, dim_qk, table ? QI_BF16 : kv);
        scores[j] = general ? product : score(p, product, scale);
        if (s->edge && !general) {
            const vi key = b->begin + j * TOKENS + (vi_iota() / ROWS);
            vi begin, end;
            for (int i = 0; i < QI_VW; i++) {
                begin[i] = s->sees_begin[i % ROWS];
                end[i] = s->sees_end[i % ROWS];
            }
            scores[j] = vf_select((key >= begin) & (key < end), scores[j], vf_set1(-INFINITY));
        }
    }
    float weight[BLOCK * ROWS];
    if (general) {
        for (int j = 0; j < SCORES; j++) vf_store(weight + j * QI_VW, scores[j]);
        decode_general(p, g, s, b, weight);
        for (int j = 0; j < SCORES; j++) scores[j] = vf_load(weight + j * QI_VW);
    }
    if (SOFTMAX) decode_softmax(s, o_stride, scores, weight);

    const char *rows[BLOCK];
    for (int t = 0; t < BLOCK; t++) {
        rows[t] = values ? (const char *)(values + t * o_stride)
                         : qi_at(v, kv, b->v_offset[t] + s->kv_head * p->v_stride[2]);
        if (table) rows[t] = widen_row(wide + t * dim_vo, rows[t], s->table, dim_vo);
    }
    i32 d = 0;
    if (fetch) fetch_rows(p, fetch, BLOCK - 2 * SCORES, dim_qk * size, dim_vo * size, kv);
    for (; d + WIDE * QI_VW <= dim_vo; d += WIDE * QI_VW)
        decode_accumulate(s, o_stride, weight, rows, b->n, d, WIDE, dim_vo, table ? QI_BF16 : kv);
    for (; d < dim_vo; d += QI_VW)
        decode_accumulate(s, o_stride, weight, rows, b->n, d, 1, dim_vo, table ? QI_BF16 : kv);
}

/* Fills a block with keys from `begin` on, below `end`. Offsets past the last key repeat it: they
 * are loaded, but their scores are dropped. An empty block prefetches what `b` holds already. */
QI_INLINE void fill_block(const attention_params *p, const qi_group *g, i32 begin, i32 end,
                          decode_block *b)
{
    b->begin = begin;
    b->n = end - begin < BLOCK ? end - begin : BLOCK;
    if (b->n <= 0) return;
    locate_keys(p, g, begin, b->n, b->k_offset, b->v_offset, b->kv_pos);
    for (i32 j = b->n; j < BLOCK; j++) {
        b->k_offset[j] = b->k_offset[b->n - 1];
        b->v_offset[j] = b->v_offset[b->n - 1];
        b->kv_pos[j] = b->kv_pos[b->n - 1];
    }
}

/* A block's keys and values, all heads of the work item, as f32: keys [head][BLOCK][q_stride], values
 * [head][BLOCK][o_stride]. buffer: a row. */
static void load_block(const attention_params *p, const qi_work *w, const decode_block *b,
                       i64 q_stride, i64 o_stride, float *keys, float *values, float *angles,
                       float *buffer)
{
    for (i32 j = 0; j < BLOCK; j++) {
        load_angles(p, b->kv_pos[j], angles);
        for (i32 h = 0; h < w->num_kv_heads; h++) {
            const i64 head = w->kv_head + h, row = (i64)h * BLOCK + j;
            load_key(p, qi_at(p->k, p->dtype_kv, b->k_offset[j] + head * p->k_stride[2]),
                     b->kv_pos[j], (i32)head, keys + row * q_stride, angles, buffer);
            for (i64 d = p->head_dim_qk; d < q_stride; d++) keys[row * q_stride + d] = 0.f;
            if (j < b->n)
                qi_widen_any(values + row * o_stride,
                             qi_at(p->v, p->dtype_kv, b->v_offset[j] + head * p->v_stride[2]),
                             p->dtype_kv, p->head_dim_vo);
        }
    }
}

/* A work item's rows: what each is and sees. Row i is token i / group, query head i % group. */
typedef struct decode_rows_of {
    tile_row row[DECODE_M + MAX_GROUP];
    i32 begin[DECODE_M + MAX_GROUP], end[DECODE_M + MAX_GROUP];
    i32 from, to;         /* the keys that some row sees */
    i32 all_from, all_to; /* the keys that every row sees */
} decode_rows_of;

QI_INLINE void find_rows(const attention_params *p, const qi_work *w, const qi_group *g, i32 padded,
                         decode_rows_of *out)
{
    const i32 group = p->num_qo_heads / p->num_kv_heads, rows = w->num_rows * group;
    out->from = w->kv_end, out->to = w->kv_begin;
    out->all_from = w->kv_begin, out->all_to = w->kv_end;
    for (i32 i = 0; i < padded; i++) { /* rows of padding repeat the last */
        const i32 row = i < rows ? i : rows - 1;
        out->row[i] =
            i > 0 && row % group ? out->row[i - 1] : row_at(p, w->row_begin + row / group);
        if (g->flags & QI_GROUP_SPARSE)
            out->begin[i] = w->kv_begin, out->end[i] = w->kv_end;
        else
            row_sees(p, out->row[i].position - g->kv_offset, w->kv_begin, w->kv_end, &out->begin[i],
                     &out->end[i]);
        if (out->begin[i] < out->end[i]) {
            out->from = out->begin[i] < out->from ? out->begin[i] : out->from;
            out->to = out->end[i] > out->to ? out->end[i] : out->to;
        }
        out->all_from = out->begin[i] > out->all_from ? out->begin[i] : out->all_from;
        out->all_to = out->end[i] < out->all_to ? out->end[i] : out->all_to;
    }
}

/* One work item's private memory: for each KV head and four of its rows a decode_state's q
 * [ROWS][q_stride], o [ROWS][o_stride], max, sum and scale; then a row, angles and, in the general row, a
 * block's keys and values. */
typedef struct decode {
    const attention_params *p;
    const qi_work *w;
    const qi_group *g;
    i32 group, rows, fours, heads;
    i64 q_stride, o_stride, unit; /* floats */
    float *states, *row_buffer, *angles, *keys, *values;
    decode_rows_of r;
    qi_e4m3_table table;
} decode;

QI_INLINE decode_state state_of(const decode *d, i32 head, i32 four, int edge)
{
    float *at = d->states + ((i64)head * d->fours + four) * d->unit;
    float *o = at + ROWS * d->q_stride, *lanes = o + ROWS * d->o_stride;
    const i32 first = four * ROWS, left = d->rows - first;
    return (decode_state){.q = at,
                          .o = o,
                          .max = lanes,
                          .sum = lanes + QI_VW,
                          .scale = lanes + 2 * QI_VW,
                          .row = d->r.row + first,
                          .kv_head = d->w->kv_head + head,
                          .first = first,
                          .group = d->group,
                          .num_rows = left < ROWS ? left : ROWS,
                          .sees_begin = d->r.begin + first,
                          .sees_end = d->r.end + first,
                          .edge = edge,
                          .table = &d->table};
}

/* Row i of q of every KV head, and a state that has seen no key. */
QI_INLINE void decode_begin(const decode *d, i32 i, const i32 dim, const qi_dtype kv)
{
    const attention_params *p = d->p;
    if (i < d->rows && i % d->group == 0) load_angles(p, d->r.row[i].position, d->angles);
    for (i32 h = 0; h < d->heads; h++) {
        const decode_state s = state_of(d, h, i / ROWS, 0);
        const i32 r = i % ROWS, qo_head = s.kv_head * d->group + i % d->group;
        float *q = s.q + r * d->q_stride;
        if (i < d->rows)
            load_query(p, &s.row[r], qo_head, q, d->q_stride, d->angles, d->row_buffer);
        else
            memset(q, 0, (size_t)d->q_stride * sizeof *q);
        if (in_pairs(dim, kv)) qi_split_pairs(q, dim);
        for (i32 lane = r; lane < QI_VW; lane += ROWS) s.scale[lane] = p->logit_scale[qo_head];
        memset(s.o + r * d->o_stride, 0, (size_t)d->o_stride * sizeof *s.o);
        vf_store(s.max, vf_set1(-INFINITY));
        vf_store(s.sum, vf_set1(0.f));
    }
}

/* The results of row i of KV head `head`. */
QI_INLINE void decode_end(const decode *d, i32 head, i32 i, const i32 dim, const qi_dtype kv)
{
    const decode_state s = state_of(d, head, i / ROWS, 0);
    const i32 r = i % ROWS;
    float *o = s.o + r * d->o_stride, sum = 0.f;
    if (in_pairs(dim, kv)) qi_join_pairs(o, dim);
    for (int t = 0; t < TOKENS; t++) sum += s.sum[t * ROWS + r];
    if (d->w->slot < 0)
        finish_row(d->p, &d->r.row[i], s.kv_head * d->group + i % d->group, o, s.max[r], sum);
    else
        store_partial(d->p, (i64)d->w->slot + head * d->rows + i, o, s.max[r], sum);
}

/* One work item. dim_qk, dim_vo, kv: constants in the specialised rows, p's fields in the general
 * one. own_rows: the general row, whose kv is f32. */
QI_INLINE void decode_tile(const attention_params *p, const qi_work *w, float *scratch,
                           const i32 dim_qk, const i32 dim_vo, const qi_dtype kv,
                           const int own_rows)
{
    const i32 group = p->num_qo_heads / p->num_kv_heads, rows = w->num_rows * group;
    decode d = {.p = p,
                .w = w,
                .g = &p->plan.groups[w->group],
                .group = group,
                .rows = rows,
                .fours = (rows + ROWS - 1) / ROWS,
                .heads = w->num_kv_heads,
                .q_stride = round_up(dim_qk, QI_VW),
                .o_stride = round_up(dim_vo, QI_VW),
                .states = scratch};
    d.unit = ROWS * (d.q_stride + d.o_stride) + 3 * QI_VW;
    d.row_buffer = scratch + (i64)d.heads * d.fours * d.unit;
    d.angles = d.row_buffer + d.q_stride;
    d.keys = d.angles + 2 * (i64)dim_qk;
    d.values = d.keys + (i64)d.heads * BLOCK * d.q_stride;
    find_rows(p, w, d.g, d.fours * ROWS, &d.r);
#if QI_HAS_E4M3_TABLE
    if (by_table(dim_qk, kv)) qi_e4m3_fill(&d.table);
#endif
    for (i32 i = 0; i < d.fours * ROWS; i++) decode_begin(&d, i, dim_qk, kv);

    const int load = own_rows && (CHANGES_KEYS(p) || p->dtype_kv != QI_F32);
    decode_block blocks[2] = {{.n = 0}};
    fill_block(p, d.g, d.r.from, d.r.to, &blocks[0]);
    for (i32 at = d.r.from, turn = 0; at < d.r.to; at += BLOCK, turn ^= 1) {
        const decode_block *b = &blocks[turn], *next = &blocks[turn ^ 1];
        fill_block(p, d.g, at + BLOCK, d.r.to, &blocks[turn ^ 1]);
        if (next->n <= 0) next = b;
        if (load)
            load_block(p, w, b, d.q_stride, d.o_stride, d.keys, d.values, d.angles, d.row_buffer);
        decode_fetch fetch = {.block = next,
                              .num_heads = d.heads,
                              .first_head = w->kv_head,
                              .by_head = p->k_stride[2] > p->k_stride[1]};
        const int edge = at < d.r.all_from || at + BLOCK > d.r.all_to;
        for (i32 h = 0; h < d.heads; h++)
            for (i32 f = 0; f < d.fours; f++) {
                const decode_state s = state_of(&d, h, f, edge);
                decode_unit(p, d.g, &s, b, load ? d.keys + (i64)h * BLOCK * d.q_stride : NULL,
                            load ? d.values + (i64)h * BLOCK * d.o_stride : NULL,
                            f == 0 ? &fetch : NULL, dim_qk, dim_vo, kv);
            }
    }
    for (i32 h = 0; h < d.heads; h++)
        for (i32 i = 0; i < rows; i++) decode_end(&d, h, i, dim_vo, kv);
}

#endif
