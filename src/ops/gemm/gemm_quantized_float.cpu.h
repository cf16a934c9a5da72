/* gemm_quantized_float.cpu.h - a block of packed weights times x in f32, at levels without VNNI.
 *
 * A code is masked where it stands in its word and converted to f32, so that it comes out 2^shift
 * times too large, and x, which is widened to f32 in scratch anyway, is that much smaller. So a vector
 * of weights costs a mask, a conversion and a multiply-add a row of x (Q8_0: a shift more).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_GEMM_QUANTIZED_FLOAT_H
#define QI_GEMM_QUANTIZED_FLOAT_H

#include "kern/cpu/simd.h"
#include "ops/gemm/gemm_quantized_params.h"

enum { BLOCK = GEMM_BLOCK_SIZE, ROWS = 8 /* of x that share the unpacking of weights */ };

/* Is some multiple of the sum of x to be added to a block's product? */
QI_INLINE int has_min(const gemm_format format)
{
    return format != GEMM_Q8_0;
}

/* Where in its word code i of a block stands: the lowest bit. */
QI_INLINE int code_shift(int i, const gemm_format format)
{
    return format == GEMM_Q8_0 ? i % 4 * 8 : i % 4 * 8 + i / 16 * 4;
}

/* How many times the code too large code() gives it. */
QI_INLINE float code_unit(int i, const gemm_format format)
{
    const int shift = code_shift(i, format);
    return format == GEMM_Q8_0 ? 0x1p24f : shift == 28 ? 1.f : (float)(1 << shift);
}

/* Code i of QI_VW blocks, code_unit(i) times too large. words: 4, of the code's half of the block
 * (Q8_0) or of all of it. */
QI_INLINE vf code(const vf words[4], int i, const gemm_format format)
{
    const vu word = (vu)words[i % 16 / 4];
    const int shift = code_shift(i, format);
    if (format == GEMM_Q8_0) return vf_from_i32((vi)(word << (24 - shift) & 0xff000000u));
    if (shift == 28) return vf_from_i32((vi)(word >> 28)); /* or it would be the sign */
    return vf_from_i32((vi)(word & 15u << shift));
}

/* Block b of row r of x to its tile of [blocks][BLOCK][rows], divided by what the codes will be too large
 * by. */
QI_INLINE void take_block(float *tile, i64 b, i64 r, i64 rows, const float *row,
                          const gemm_format format)
{
    float *x = tile + b * BLOCK * rows + r;
    for (int i = 0; i < BLOCK; i++) x[i * rows] = row[i] / code_unit(i, format);
}

/* sum[r] = row r of x times the codes of block b of QI_VW rows of w; words: 16 bytes and 16 bytes of
 * them, or of 4 bits both times the same. A chain takes codes of one word, or of one of each half; all
 * four at a time where there are registers for them, since one would wait for itself. */
QI_INLINE void multiply_block(vf sum[ROWS], const float *tile, i64 b, vf words[2][4],
                              const int rows, const gemm_format format)
{
    const float *x = tile + b * BLOCK * rows;
    const int together = 4 * rows + 8 < QI_NUM_VREGS;
    vf chains[4][ROWS];
    QI_UNROLL(32)
    for (int step = 0; step < BLOCK; step++) {
        const int c = together ? step % 4 : step / 8, nth = together ? step / 4 : step % 8;
        const int half = nth / 4, i = 16 * half + 4 * c + nth % 4;
        const vf w = code(words[half], i, format);
        QI_UNROLL(8)
        for (int r = 0; r < rows; r++) {
            if (nth == 0) chains[c][r] = vf_set1(0.f);
            chains[c][r] = chains[c][r] + vf_set1(x[i * rows + r]) * w;
            if (nth == 7 && c == 0) sum[r] = vf_set1(0.f);
            if (nth == 7) sum[r] = sum[r] + chains[c][r];
        }
    }
}

#endif
