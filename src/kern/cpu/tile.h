/* tile.h - the register tile that dense CPU kernels are built from.
 *
 *   C[i][j] = scale(i) * C[i][j] + sum_k A[i][k] * B[k][j],  i < QI_TILE_M, j < QI_TILE_N
 *
 * A is row-major and broadcast element by element; B is a packed panel, so each step loads two
 * vectors of B and one splat of A per row for 2 * QI_TILE_M multiply-adds. The element is a 32-bit
 * word: one f32, or with dot a pair of bf16 along k (vdpbf16ps), so that one loop serves both.
 * Bound: multiply-add rate; 24 of 32 registers (12 of 16 on AVX2) hold C.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CPU_TILE_H
#define QI_KERN_CPU_TILE_H

#include "kern/cpu/simd.h"

#if QI_NUM_VREGS == 32
#define QI_TILE_M 12
#else
#define QI_TILE_M 6
#endif
#define QI_TILE_N (2 * QI_VW)

/* acc + a * b, or acc + the two products of each pair. */
QI_INLINE vf qi_mac(vf acc, vf a, vf b, const int dot)
{
#if defined(__AVX512BF16__)
    if (dot) return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#endif
    (void)dot;
    return acc + a * b;
}

/*
 * a [rows of lda words], b [k][QI_TILE_N] words, c [rows of ldc floats]; rows <= QI_TILE_M, a
 * constant. scale NULL: C is not read; else row i of C is multiplied by scale[i] and added.
 */
QI_INLINE void qi_tile_mac(const float *a, i64 lda, const float *b, i64 k, float *c, i64 ldc,
                           const float *scale, const int rows, const int dot)
{
    vf acc[QI_TILE_M][2];
    QI_UNROLL(12)
    for (int i = 0; i < rows; i++) acc[i][0] = acc[i][1] = vf_set1(0.f);
    for (i64 s = 0; s < k; s++) {
        const vf b0 = vf_load(b + s * QI_TILE_N), b1 = vf_load(b + s * QI_TILE_N + QI_VW);
        QI_UNROLL(12)
        for (int i = 0; i < rows; i++) {
            const vf x = vf_splat(a + i * lda + s);
            acc[i][0] = qi_mac(acc[i][0], x, b0, dot);
            acc[i][1] = qi_mac(acc[i][1], x, b1, dot);
        }
    }
    QI_UNROLL(12)
    for (int i = 0; i < rows; i++) {
        if (scale) {
            acc[i][0] = acc[i][0] + vf_load(c + i * ldc) * scale[i];
            acc[i][1] = acc[i][1] + vf_load(c + i * ldc + QI_VW) * scale[i];
        }
        vf_store(c + i * ldc, acc[i][0]);
        vf_store(c + i * ldc + QI_VW, acc[i][1]);
    }
}

#endif
