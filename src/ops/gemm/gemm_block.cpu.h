/* gemm_block.cpu.h - what the ways to multiply share: the block at hand, squares of w, the last store.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_GEMM_BLOCK_H
#define QI_GEMM_BLOCK_H

#include "kern/cpu/simd.h"
#include "ops/gemm/gemm_params.h"

/* The part of the problem at hand: rows [m0, m0 + m) by columns [n0, n0 + n) over [k0, k0 + k). */
typedef struct block {
    i64 m0, m, n0, n, k0, k;
    i64 padded_m; /* with rows of zeros, when few, to a power of 2 */
    i64 x_stride, sum_stride;
} block;

QI_INLINE i64 round_up(i64 n, i64 grain)
{
    return (n + grain - 1) / grain * grain;
}

QI_INLINE i64 least(i64 a, i64 b)
{
    return a < b ? a : b;
}

/* The size of equal parts of n > 0, multiples of grain, none above max (itself such a multiple). */
QI_INLINE i64 even_part(i64 n, i64 max, i64 grain)
{
    const i64 parts = (n + max - 1) / max;
    return round_up((n + parts - 1) / parts, grain);
}

/* ---- squares of w ---------------------------------------------------------------------------- */

/* The row of w for a column of the block, at k. Columns past the end repeat the last. */
QI_INLINE const char *w_row(const gemm_params *p, const block *b, i64 column, i64 k,
                            const qi_dtype wt)
{
    const i64 n = b->n0 + least(column, b->n - 1);
    return qi_at(p->w, wt, n * p->w_stride + b->k0 + k);
}

/* k of a square: its rows are QI_VW words. A word of bf16 is a pair, split after the transposition.
 */
QI_INLINE i64 square_k(const qi_dtype wt)
{
    return wt == QI_BF16 ? 2 * QI_VW : QI_VW;
}

/* QI_VW rows of w at [i, i + n), n <= square_k, transposed; for square_column() to read. */
QI_INLINE void load_square(vf square[QI_VW], const char *const rows[QI_VW], i64 i, i64 n,
                           const qi_dtype wt)
{
    QI_UNROLL(16)
    for (int j = 0; j < QI_VW; j++) {
        const char *from = qi_at(rows[j], wt, i);
        float last[QI_VW] = {0};
        if (n < square_k(wt)) from = memcpy(last, from, (size_t)n * qi_size_of(wt));
        square[j] = qi_load(from, wt == QI_BF16 ? QI_F32 : wt);
    }
    vf_transpose(square);
}

/* Elements j of the rows. */
QI_INLINE vf square_column(const vf square[QI_VW], int j, const qi_dtype wt)
{
    if (wt != QI_BF16) return square[j];
    if (j % 2) return (vf)((vu)square[j / 2] & 0xffff0000u);
    return (vf)((vu)square[j / 2] << 16);
}

static void store_block(const gemm_params *p, const block *b, const float *sums)
{
    for (i64 r = 0; r < b->m; r++) {
        const i64 at = (b->m0 + r) * p->out_stride + b->n0;
        qi_narrow((char *)p->out + at * (i64)qi_size_of(p->dtype_out), p->dtype_out,
                  sums + r * b->sum_stride, b->n);
    }
}

#endif
