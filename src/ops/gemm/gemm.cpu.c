/* gemm.cpu.c - out = x w^T: w is transposed on its way in, so that lanes are columns of out.
 *
 * Each output is a sum of chains of multiply-adds in f32, one for every PIECE of k, all ascending
 * from 0: its bits depend on its row of x and its row of w alone, not on m, the blocking, the
 * threads or the ISA level (batch invariance), and rounding errors grow with PIECE, not with k.
 *
 * A task owns a range of columns (rows of w), or of rows of x when those are the more. It walks
 * blocks of columns, rows and k, and widens the block's x to f32 in scratch.
 *
 * Many rows of x: panels of COLUMNS rows of w, a piece of k at a time, are packed in scratch, and
 * the rows of x pass in register tiles of up to ROWS. Bound: multiply-adds, 2 * m * n * k flops.
 *
 * Few rows: squares of w are transposed in registers and multiplied there, along whole rows of w.
 * Bound: memory, n * k * size of w. NOTES.md has the reasons and figures.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cpu/tile.h"
#include "ops/gemm/gemm_amx.cpu.h"
#include "ops/gemm/gemm_block.cpu.h"

enum {
    /* many rows */
    ROWS = QI_TILE_M,
    COLUMNS = QI_TILE_N,
    PIECE = 256, /* k of a packed panel: with a tile's rows of x, what L1 holds */
    MAX_M = 192, /* rows of a block: they share the packing of a panel */
    /* few rows */
    FEW = QI_VW == 16 ? 16 : 8,        /* sums of a square's columns that registers hold */
    FEW_VECTORS = QI_VW == 16 ? 1 : 2, /* of one or two rows, where one chain a row is too slow */
    AHEAD_BYTES = 512,                 /* of a row of w, to bring closer */
    /* scratch */
    LINE = 16, /* floats between rows of x, so that they do not meet in the same cache sets */
    MAX_X = MAX_M * (PIECE + LINE),
    MAX_SUMS = MAX_M * 320,
};

typedef struct scratch {
    float w[PIECE * COLUMNS]; /* [piece][COLUMNS] of the panel */
    float x[MAX_X];           /* [padded_m, k] of the block, x_stride apart */
    float sums[MAX_SUMS];     /* [padded_m, n] of the block so far, sum_stride apart */
} scratch;
_Static_assert(sizeof(scratch) <= QI_TASK_SCRATCH_BYTES, "blocks live in task scratch");

/* ---- many rows of x: pack, then multiply ----------------------------------------------------- */

/* Columns [i, i + n) of QI_VW rows of w to out [square_k][COLUMNS], zeros after n. */
QI_INLINE void pack_square(float *out, const char *const rows[QI_VW], i64 i, i64 n,
                           const qi_dtype wt)
{
    vf square[QI_VW];
    load_square(square, rows, i, n, wt);
    QI_UNROLL(32)
    for (int j = 0; j < square_k(wt); j++)
        vf_store(out + j * COLUMNS, square_column(square, j, wt));
}

/* Packs the panel of w at (column, k0) of the block, and brings the next one closer: in so many
 * short rows the hardware sees no stream to follow. A prefetch may miss w; it cannot fault. */
QI_INLINE void pack_panel(const gemm_params *p, const block *b, float *out, i64 column, i64 k0,
                          i64 k, const qi_dtype wt)
{
    const i64 step = square_k(wt);
    const int wraps = k0 + k == b->k;
    for (int v = 0; v < COLUMNS / QI_VW; v++, out += QI_VW) {
        const char *rows[QI_VW], *next[QI_VW];
        for (int j = 0; j < QI_VW; j++) {
            const i64 c = column + v * QI_VW + j;
            rows[j] = w_row(p, b, c, k0, wt);
            next[j] = wraps ? w_row(p, b, c + COLUMNS, 0, wt) : w_row(p, b, c, k0 + k, wt);
        }
        i64 i = 0;
        for (; i + step <= k; i += step) {
            QI_UNROLL(16)
            for (int j = 0; j < QI_VW; j++) qi_prefetch(qi_at(next[j], wt, i));
            pack_square(out + i * COLUMNS, rows, i, step, wt);
        }
        if (i < k) pack_square(out + i * COLUMNS, rows, i, k - i, wt);
    }
}

/* sums [rows, COLUMNS] += x [rows, k] times w [k][COLUMNS], k at most PIECE: one chain each. */
QI_INLINE void multiply_tile(const block *b, float *sums, const float *x, const float *w, i64 k,
                             const int rows)
{
    static const float ones[] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    qi_tile_mac(x, b->x_stride, w, k, sums, b->sum_stride, ones, rows, 0);
}

/* All rows of the block with a packed panel. */
static void multiply_panel(const block *b, float *sums, const float *x, const float *w, i64 k)
{
    for (i64 m = b->m, rows; m > 0; m -= rows) {
        rows = m >= ROWS ? ROWS : m >= 4 ? 4 : m >= 2 ? 2 : 1;
        switch (rows) {
        case ROWS: multiply_tile(b, sums, x, w, k, ROWS); break;
        case 4: multiply_tile(b, sums, x, w, k, 4); break;
        case 2: multiply_tile(b, sums, x, w, k, 2); break;
        default: multiply_tile(b, sums, x, w, k, 1); break;
        }
        sums += rows * b->sum_stride;
        x += rows * b->x_stride;
    }
}

/* The block over its k from first on. */
QI_INLINE void multiply_many(const gemm_params *p, const block *b, scratch *s, i64 first,
                             const qi_dtype wt)
{
    for (i64 c = 0; c < b->n; c += COLUMNS) {
        for (i64 i = first; i < b->k; i += PIECE) {
            const i64 k = least(b->k - i, PIECE);
            pack_panel(p, b, s->w, c, i, k, wt);
            multiply_panel(b, s->sums + c, s->x + i, s->w, k);
        }
    }
}

/* ---- few rows of x: multiply what is read ---------------------------------------------------- */

/* acc += x [rows, square_k] times the square of w at i. */
QI_INLINE void multiply_square(vf acc[FEW], const float *x, i64 x_stride,
                               const char *const w[QI_VW], i64 i, const int rows, const qi_dtype wt)
{
    vf square[QI_VW];
    load_square(square, w, i, square_k(wt), wt);
    QI_UNROLL(32)
    for (int j = 0; j < square_k(wt); j++) {
        const vf column = square_column(square, j, wt);
        QI_UNROLL(16)
        for (int r = 0; r < rows; r++) acc[r] = acc[r] + vf_set1(x[r * x_stride + i + j]) * column;
    }
}

/* sums [rows, vectors] += x [rows, k] times rows of w, k in squares; next: the rows after these. */
QI_INLINE void stream_rows(const block *b, float *sums, const float *x, const char *const w[],
                           const char *const next[], i64 k, const int rows, const int vectors,
                           const qi_dtype wt)
{
    const i64 step = square_k(wt), ahead = AHEAD_BYTES / (i64)qi_size_of(wt);
    vf acc[FEW_VECTORS][FEW];
    QI_UNROLL(2)
    for (int v = 0; v < vectors; v++) {
        QI_UNROLL(16)
        for (int r = 0; r < rows; r++) acc[v][r] = vf_set1(0.f);
    }
    for (i64 i = 0; i < k; i += step) {
        const int wraps = i + ahead >= k;
        QI_UNROLL(2)
        for (int v = 0; v < vectors; v++) {
            const char *const *later = (wraps ? next : w) + v * QI_VW;
            QI_UNROLL(16)
            for (int j = 0; j < QI_VW; j++)
                qi_prefetch(qi_at(later[j], wt, i + ahead - (wraps ? k : 0)));
            multiply_square(acc[v], x, b->x_stride, w + v * QI_VW, i, rows, wt);
        }
        if ((i + step) % PIECE && i + step < k) continue;
        QI_UNROLL(2)
        for (int v = 0; v < vectors; v++) {
            QI_UNROLL(16)
            for (int r = 0; r < rows; r++) {
                float *sum = sums + r * b->sum_stride + v * QI_VW;
                vf_store(sum, vf_load(sum) + acc[v][r]);
                acc[v][r] = vf_set1(0.f); /* for the next chain */
            }
        }
    }
}

QI_INLINE void stream_block(const gemm_params *p, const block *b, scratch *s, i64 k, const int rows,
                            const int vectors, const qi_dtype wt)
{
    const int columns = vectors * QI_VW;
    for (i64 c = 0; c < b->n; c += columns) {
        const char *w[FEW_VECTORS * QI_VW], *next[FEW_VECTORS * QI_VW];
        for (int j = 0; j < columns; j++) {
            w[j] = w_row(p, b, c + j, 0, wt);
            next[j] = w_row(p, b, c + columns + j, 0, wt);
        }
        stream_rows(b, s->sums + c, s->x, w, next, k, rows, vectors, wt);
    }
}

/* The block, a last piece of k that ends within a square left to multiply_many(). */
QI_INLINE void multiply_few(const gemm_params *p, const block *b, scratch *s, const qi_dtype wt)
{
    const i64 k = b->k % square_k(wt) ? b->k / PIECE * PIECE : b->k;
    switch (b->padded_m) {
    case 1: stream_block(p, b, s, k, 1, FEW_VECTORS, wt); break;
    case 2: stream_block(p, b, s, k, 2, FEW_VECTORS, wt); break;
    case 4: stream_block(p, b, s, k, 4, 1, wt); break;
    case 8: stream_block(p, b, s, k, 8, 1, wt); break;
    default: stream_block(p, b, s, k, FEW, 1, wt); break;
    }
    multiply_many(p, b, s, k, wt);
}

/* ---- blocks ---------------------------------------------------------------------------------- */

QI_INLINE i64 pad_few(i64 m)
{
    return m > FEW ? m : m > 8 ? FEW : m > 4 ? 8 : m > 2 ? 4 : m;
}

/* The block's rows of x to scratch. */
static void widen_x(const gemm_params *p, const block *b, float *out)
{
    for (i64 r = 0; r < b->m; r++, out += b->x_stride) {
        const i64 at = (b->m0 + r) * p->x_stride + b->k0;
        switch (p->dtype_x) {
        case QI_F32: qi_widen(out, qi_at(p->x, QI_F32, at), QI_F32, b->k); break;
        case QI_F16: qi_widen(out, qi_at(p->x, QI_F16, at), QI_F16, b->k); break;
        default: qi_widen(out, qi_at(p->x, QI_BF16, at), QI_BF16, b->k); break;
        }
    }
    memset(out, 0, (size_t)((b->padded_m - b->m) * b->x_stride) * sizeof *out);
}

/* Rows [m0, m1), at least one, by columns [n0, n1). The fewer the rows, the more of k is in a
 * block, since w is read best in long runs. */
QI_INLINE void multiply(const gemm_params *p, scratch *s, i64 m0, i64 m1, i64 n0, i64 n1,
                        const qi_dtype wt)
{
    const i64 block_m = m1 - m0 > FEW ? even_part(m1 - m0, MAX_M, ROWS) : pad_few(m1 - m0);
    const i64 block_n = MAX_SUMS / block_m / COLUMNS * COLUMNS;
    const i64 block_k = (MAX_X / block_m - LINE) / PIECE * PIECE;
    block b = {0};
    for (b.n0 = n0; b.n0 < n1; b.n0 += block_n) {
        b.n = least(n1 - b.n0, block_n);
        b.sum_stride = round_up(b.n, COLUMNS);
        for (b.m0 = m0; b.m0 < m1; b.m0 += block_m) {
            b.m = least(m1 - b.m0, block_m);
            b.padded_m = pad_few(b.m);
            memset(s->sums, 0, (size_t)(b.padded_m * b.sum_stride) * sizeof *s->sums);
            for (b.k0 = 0; b.k0 < p->k; b.k0 += block_k) {
                b.k = least(p->k - b.k0, block_k);
                b.x_stride = round_up(b.k, LINE) + LINE;
                widen_x(p, &b, s->x);
                if (b.m > FEW)
                    multiply_many(p, &b, s, 0, wt);
                else
                    multiply_few(p, &b, s, wt);
            }
            store_block(p, &b, s->sums);
        }
    }
}

QI_CPU_KERNEL(gemm)
{
    const gemm_params *p = params;
    i64 m0 = 0, m1 = p->m, n0 = 0, n1 = p->n;
    if (p->m > p->n)
        qi_task_share(task, p->m, ROWS, &m0, &m1);
    else
        qi_task_share(task, p->n, COLUMNS, &n0, &n1);
    if (m0 == m1 || n0 == n1) return;
#if defined(__AMX_BF16__)
    if (p->dtype_x == QI_BF16 && p->dtype_w == QI_BF16) {
        multiply_tiles(p, task.scratch, m0, m1, n0, n1);
        return;
    }
#endif
    switch (p->dtype_w) {
    case QI_F32: multiply(p, task.scratch, m0, m1, n0, n1, QI_F32); break;
    case QI_F16: multiply(p, task.scratch, m0, m1, n0, n1, QI_F16); break;
    default: multiply(p, task.scratch, m0, m1, n0, n1, QI_BF16); break;
    }
}
