/* gemm_amx.cpu.h - out = x w^T of bf16 by the tile unit (level amx).
 *
 * Panels of 32 rows of x, read where they are, meet slabs of 32 rows of w by SLAB_K, transposed in
 * scratch to pairs along k (squares of 16 x 16 words). While a slab is multiplied, the next one is
 * packed between the tile products, which leave the vector units idle, and the one after it is
 * prefetched. Each output is one chain along k of the sums of 32 products, whatever m is: the same
 * bits for a row of x in any batch.
 *
 * Bound: tile products, 16 cycles for 16 x 16 x 32; for few rows memory, n * k * 2 bytes.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_GEMM_AMX_H
#define QI_GEMM_AMX_H

#include "kern/cpu/amx.h"
#include "ops/gemm/gemm_block.cpu.h"

#if defined(__AMX_BF16__)

enum {
    TILE = 16,         /* rows of a tile, and words of its rows */
    TILE_K = 2 * TILE, /* bf16 of a row */
    PANEL = 2 * TILE,
    SLAB_K = 512,          /* a slab is 32 KB of L1, which the stream of x must not evict */
    STEP = PANEL * TILE_K, /* bf16 of a slab for one step along k: two tiles */
    /* scratch */
    TILES_MAX_M = 512,
    TILES_MAX_X = 512 * 1024, /* elements of x that stay in L2, if rows fit */
    TILES_MAX_K = 2048,       /* of rows of x that are copied */
    EDGE_STRIDE = TILES_MAX_K + TILE_K,
    X_STRIDE = SLAB_K + TILE_K,
    TILES_MAX_SUMS = 140 * 1024,
    /* few rows */
    TILES_AHEAD = 512, /* bytes of a row of w to bring closer */
};

typedef struct tile_scratch {
    u16 slabs[2][SLAB_K / TILE_K * STEP]; /* or few rows of x, packed */
    u16 x[TILES_MAX_M * X_STRIDE];        /* of the block along the slab, where it is copied */
    u16 edge[PANEL * EDGE_STRIDE];        /* the last rows of x, zeros after them */
    u16 tail[TILES_MAX_M * TILE_K]; /* the last k % TILE_K of the rows of x, zeros after them */
    float sums[TILES_MAX_SUMS];     /* [padded m, n] of the block so far */
} tile_scratch;
_Static_assert(2 * SLAB_K / TILE_K * STEP >= TILE * TILES_MAX_K, "16 rows of x fit the slabs");
_Static_assert(sizeof(tile_scratch) <= QI_TASK_SCRATCH_BYTES, "blocks live in task scratch");

/* A slab of the block: columns [c, c + PANEL) by [k0, k0 + k), k <= SLAB_K: whole steps, or less than
 * one. */
typedef struct slab {
    i64 c, k0, k;
} slab;

/* The packing of a slab, spread over the products of the one before. */
typedef struct packing {
    i64 offsets[2]
               [PANEL]; /* bytes between rows of w and the slab's first, of most and of the last */
    const char *w, *later;      /* first row of the slab, and of the one after it */
    const i64 *row, *later_row; /* their offsets */
    u16 *out;                   /* [steps][2 tiles] */
    i64 k;
    i64 at, steps;
    i64 credit, slots; /* 2 steps tiles in so many products */
} packing;

QI_INLINE i64 slab_end(const slab *s)
{
    return s->k0 + s->k;
}

QI_INLINE i64 num_steps(const slab *s)
{
    return (s->k + TILE_K - 1) / TILE_K;
}

/* Is x copied along each slab? Rows a multiple of 4 KB apart share a few sets of the caches, and a
 * block's would not stay: from memory a step takes 220 cycles instead of 75. */
QI_INLINE int copies_x(const gemm_params *p, const block *b)
{
    return b->m > PANEL && p->x_stride * 2 % 4096 == 0;
}

/* The slab at (c, k0) of the block. */
QI_INLINE slab make_slab(const block *b, i64 c, i64 k0)
{
    const i64 left = b->k - k0;
    return (slab){c, k0, left < TILE_K ? left : least(left / TILE_K * TILE_K, SLAB_K)};
}

/* The slab after s; k 0 past the last. Few rows go along rows of w, which memory likes; many take all
 * columns first, while their part of x is in L2. */
QI_INLINE slab next_slab(const block *b, const slab *s)
{
    if (b->m <= PANEL) {
        if (slab_end(s) < b->k) return make_slab(b, s->c, slab_end(s));
        return s->c + PANEL < b->n ? make_slab(b, s->c + PANEL, 0) : (slab){0};
    }
    if (s->c + PANEL < b->n) return make_slab(b, s->c + PANEL, s->k0);
    return make_slab(b, 0, slab_end(s));
}

/* A tile [16 pairs along k][16 rows of w] from rows of w [16, k], k <= TILE_K; zeros after k. */
QI_INLINE void transpose_tile(u16 *out, const char *const rows[TILE], i64 k)
{
    vf square[TILE];
    load_square(square, rows, 0, k, QI_BF16);
    QI_UNROLL(16)
    for (int j = 0; j < TILE; j++) vf_store((float *)(void *)out + j * TILE, square[j]);
}

/* Out of line: it is rare, and its code would slow down the other. */
static __attribute__((noinline)) void transpose_part(u16 *out, const char *const rows[TILE], i64 k)
{
    transpose_tile(out, rows, k);
}

/* Packs the next tile, and brings its place in the slab after closer. 16 rows of w at a time: memory
 * follows no more streams well. */
QI_INLINE void pack_tile(packing *p)
{
    const i64 half = p->at >= p->steps, step = p->at - (half ? p->steps : 0);
    const i64 k = p->k - step * TILE_K;
    const char *const w = qi_at(p->w, QI_BF16, step * TILE_K);
    const char *const later = qi_at(p->later, QI_BF16, step * TILE_K), *rows[TILE];
    u16 *const out = p->out + step * STEP + half * (STEP / 2);
    QI_UNROLL(16)
    for (int j = 0; j < TILE; j++) {
        qi_prefetch(later + p->later_row[half * TILE + j]);
        rows[j] = w + p->row[half * TILE + j];
    }
    if (k >= TILE_K)
        transpose_tile(out, rows, TILE_K);
    else
        transpose_part(out, rows, k);
    p->at++;
}

/* Readies the packing of s, within so many products. */
QI_INLINE void start_packing(const gemm_params *p, const block *b, packing *pack, const slab *s,
                             u16 *out, i64 slots)
{
    const slab next = next_slab(b, s), *later = s->k && next.k ? &next : s;
    pack->w = w_row(p, b, s->c, s->k0, QI_BF16);
    pack->later = w_row(p, b, later->c, later->k0, QI_BF16);
    pack->row = pack->offsets[s->c + PANEL > b->n];
    pack->later_row = pack->offsets[later->c + PANEL > b->n];
    pack->out = out;
    pack->k = s->k;
    pack->steps = num_steps(s);
    pack->at = pack->credit = 0;
    pack->slots = slots;
}

/* c [16 * tiles rows][PANEL] = a b, or added to c; a_row: bytes. */
QI_INLINE void multiply_panel_tiles(const char *a, i64 a_row, const u16 *b, i64 steps, float *c,
                                    i64 ldc, const int add, const int tiles, packing *pack)
{
    const i64 c_row = ldc * 4;
    if (add) {
        _tile_loadd(0, c, c_row);
        _tile_loadd(1, c + TILE, c_row);
        if (tiles == 2) {
            _tile_loadd(2, c + TILE * ldc, c_row);
            _tile_loadd(3, c + TILE * ldc + TILE, c_row);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (i64 s = 0; s < steps; s++, a += 2 * TILE_K, b += STEP) {
        /* a passes by L1, where b shall stay */
        _tile_stream_loadd(4, a, a_row);
        _tile_loadd(6, b, 2 * TILE_K);
        _tile_loadd(7, b + STEP / 2, 2 * TILE_K);
        if (tiles == 2) _tile_stream_loadd(5, a + TILE * a_row, a_row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (tiles == 2) {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            /* c of this panel, or of the next when this has been read */
            const float *soon = c + (2 * s + (add ? PANEL : 0)) * ldc;
            __builtin_prefetch(soon, 1, 3);
            __builtin_prefetch(soon + TILE, 1, 3);
            __builtin_prefetch(soon + ldc, 1, 3);
            __builtin_prefetch(soon + ldc + TILE, 1, 3);
        }
        for (pack->credit += 2 * pack->steps; pack->credit >= pack->slots;
             pack->credit -= pack->slots)
            pack_tile(pack);
    }
    _tile_stored(0, c, c_row);
    _tile_stored(1, c + TILE, c_row);
    if (tiles == 2) {
        _tile_stored(2, c + TILE * ldc, c_row);
        _tile_stored(3, c + TILE * ldc + TILE, c_row);
    }
}

/* The rows of the block with a packed slab. */
static void multiply_slab(const gemm_params *p, const block *b, tile_scratch *t, const slab *s,
                          const u16 *w, int add, packing *pack)
{
    const i64 steps = num_steps(s);
    for (i64 r = 0; r < b->m; r += PANEL) {
        float *c = t->sums + r * b->sum_stride + s->c;
        const int tiles = b->m - r > TILE ? 2 : 1;
        const char *a = qi_at(p->x, QI_BF16, (b->m0 + r) * p->x_stride + b->k0 + s->k0);
        i64 a_row = p->x_stride * 2;
        if (s->k < TILE_K) {
            a = (const char *)(t->tail + r * TILE_K);
            a_row = 2 * TILE_K;
        } else if (copies_x(p, b)) {
            a = (const char *)(t->x + r * X_STRIDE);
            a_row = X_STRIDE * 2;
        } else if (b->m <= PANEL || b->m - r < tiles * TILE) {
            a = (const char *)(t->edge + s->k0);
            a_row = EDGE_STRIDE * 2;
        }
        if (tiles == 2 && add)
            multiply_panel_tiles(a, a_row, w, steps, c, b->sum_stride, 1, 2, pack);
        else if (tiles == 2)
            multiply_panel_tiles(a, a_row, w, steps, c, b->sum_stride, 0, 2, pack);
        else if (add)
            multiply_panel_tiles(a, a_row, w, steps, c, b->sum_stride, 1, 1, pack);
        else
            multiply_panel_tiles(a, a_row, w, steps, c, b->sum_stride, 0, 1, pack);
    }
    while (pack->at < 2 * pack->steps) pack_tile(pack);
}

/* Rows [r, r + rows) of the block's x at [k, k + n), to out [padded_rows][stride] with zeros. */
static void copy_x(const gemm_params *p, const block *b, i64 r, i64 rows, i64 padded_rows, i64 k,
                   i64 n, u16 *out, i64 stride)
{
    memset(out, 0, (size_t)(padded_rows * stride) * sizeof *out);
    for (i64 i = 0; i < rows; i++)
        memcpy(out + i * stride, qi_at(p->x, QI_BF16, (b->m0 + r + i) * p->x_stride + b->k0 + k),
               (size_t)n * sizeof *out);
}

/* ---- few rows: tiles of w as they lie in memory ------------------------------------------------ */

/* out [16, 16] = in^T. */
QI_INLINE void turn_tile(float *out, i64 out_stride, const float *in, i64 in_stride)
{
    vf square[TILE];
    QI_UNROLL(16)
    for (int j = 0; j < TILE; j++) square[j] = vf_load(in + j * in_stride);
    vf_transpose(square);
    QI_UNROLL(16)
    for (int j = 0; j < TILE; j++) vf_store(out + j * out_stride, square[j]);
}

/* sums^T [PANEL, 16] += w [PANEL, k] x^T, x packed [k / 2][16 rows of x][2]; next: the rows of w after
 * these. */
QI_INLINE void stream_panel(const gemm_params *p, const char *w, const char *next, const u16 *x,
                            i64 k, float *sums, i64 sum_stride, int add)
{
    const i64 row = p->w_stride * 2, bytes = k * 2;
    float turned[PANEL * TILE];
    if (add) {
        turn_tile(turned, TILE, sums, sum_stride);
        turn_tile(turned + TILE * TILE, TILE, sums + TILE, sum_stride);
        _tile_loadd(0, turned, 64);
        _tile_loadd(1, turned + TILE * TILE, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    for (i64 i = 0; i < bytes; i += 2 * TILE_K, x += TILE * TILE_K) {
        const char *later =
            i + TILES_AHEAD < bytes ? w + i + TILES_AHEAD : next + (i + TILES_AHEAD - bytes);
        for (i64 j = 0; j < PANEL; j++) qi_prefetch(later + j * row);
        _tile_loadd(6, x, 2 * TILE_K);
        _tile_stream_loadd(4, w + i, row);
        _tile_stream_loadd(5, w + i + TILE * row, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
    }
    _tile_stored(0, turned, 64);
    _tile_stored(1, turned + TILE * TILE, 64);
    turn_tile(sums, sum_stride, turned, TILE);
    turn_tile(sums + TILE, sum_stride, turned + TILE * TILE, TILE);
}

/* Whole panels of columns by all k, a multiple of TILE_K, with the rows of x at edge; how many columns
 * that were. */
static i64 stream_tiles(const gemm_params *p, const block *b, tile_scratch *t)
{
    u16 *const x = t->slabs[0];
    const i64 n = b->n / PANEL * PANEL;
    const char *rows[TILE];
    for (i64 k = 0; n > 0 && k < b->k; k += TILE_K) {
        for (int j = 0; j < TILE; j++) rows[j] = (const char *)(t->edge + j * EDGE_STRIDE + k);
        transpose_tile(x + k * TILE, rows, TILE_K);
    }
    for (i64 c = 0; c < n; c += PANEL) {
        const char *w = w_row(p, b, c, 0, QI_BF16);
        const char *next = c + PANEL < n ? w + PANEL * p->w_stride * 2 : w;
        stream_panel(p, w, next, x, b->k, t->sums + c, b->sum_stride, b->k0 > 0);
    }
    return n;
}

/* ---- blocks ------------------------------------------------------------------------------------ */

static void multiply_tile_block(const gemm_params *p, const block *b, tile_scratch *t)
{
    const i64 whole = b->k / TILE_K * TILE_K;
    const i64 edge = b->m <= PANEL ? b->m : copies_x(p, b) || b->m % TILE == 0 ? 0 : b->m % PANEL;
    if (edge) copy_x(p, b, b->m - edge, edge, round_up(edge, TILE), 0, whole, t->edge, EDGE_STRIDE);
    if (whole < b->k) copy_x(p, b, 0, b->m, b->padded_m, whole, b->k - whole, t->tail, TILE_K);
    const i64 panels = (b->m + PANEL - 1) / PANEL;
    packing pack;
    const i64 first = b->m <= TILE && whole == b->k ? stream_tiles(p, b, t) : 0;
    if (first == b->n) return;
    const i64 last = (b->n - 1) % PANEL;
    for (i64 j = 0; j < PANEL; j++) {
        pack.offsets[0][j] = j * p->w_stride * 2;
        pack.offsets[1][j] = least(j, last) * p->w_stride * 2;
    }
    slab s = make_slab(b, first, 0);
    int turn = 0;
    start_packing(p, b, &pack, &s, t->slabs[turn], 1);
    while (pack.at < 2 * pack.steps) pack_tile(&pack);
    for (slab next; s.k > 0; s = next, turn ^= 1) {
        next = next_slab(b, &s);
        if (copies_x(p, b) && s.c == first && s.k >= TILE_K)
            copy_x(p, b, 0, b->m, b->padded_m, s.k0, s.k, t->x, X_STRIDE);
        start_packing(p, b, &pack, &next, t->slabs[turn ^ 1], panels * num_steps(&s));
        multiply_slab(p, b, t, &s, t->slabs[turn], b->k0 + s.k0 > 0, &pack);
    }
}

/* Columns of a block: more where they share the copying of x, else so few that the sums stay near. Rows
 * of sums do not meet in the same cache sets. */
static i64 columns_of(const gemm_params *p, const block *b, i64 block_m)
{
    const i64 sums = copies_x(p, b) ? TILES_MAX_SUMS : TILES_MAX_SUMS / 2;
    return (sums / block_m - TILE) / PANEL * PANEL;
}

/* Rows [m0, m1), at least one, by columns [n0, n1). */
static void multiply_tiles(const gemm_params *p, tile_scratch *t, i64 m0, i64 m1, i64 n0, i64 n1)
{
    const i64 max_m = p->k <= TILES_MAX_X / TILES_MAX_M ? TILES_MAX_M : TILES_MAX_M / 2;
    const i64 block_m = even_part(m1 - m0, max_m, PANEL);
    block b = {0};
    qi_amx_begin();
    for (b.m0 = m0; b.m0 < m1; b.m0 += block_m) {
        b.m = least(m1 - b.m0, block_m);
        b.padded_m = round_up(b.m, PANEL);
        const i64 block_n = columns_of(p, &b, block_m);
        for (b.n0 = n0; b.n0 < n1; b.n0 += block_n) {
            b.n = least(n1 - b.n0, block_n);
            b.sum_stride = round_up(b.n, PANEL) + TILE;
            if (p->k == 0) memset(t->sums, 0, sizeof t->sums);
            for (b.k0 = 0; b.k0 < p->k; b.k0 += TILES_MAX_K) {
                b.k = least(p->k - b.k0, TILES_MAX_K);
                multiply_tile_block(p, &b, t);
            }
            store_block(p, &b, t->sums);
        }
    }
    qi_amx_end();
}

#endif
#endif
