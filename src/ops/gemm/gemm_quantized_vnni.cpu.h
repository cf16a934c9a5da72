/* gemm_quantized_vnni.cpu.h - a block of packed weights times x in integers, at levels with VNNI.
 *
 * vpdpbusd adds 64 products of u8 and i8 to 16 sums, with no conversion of the codes. So each block of
 * 32 of x becomes integers of 24 bits with one power of 2, as three digits of i8; codes are u8, with
 * the zero point's share known before: sums begin at -zero * (sum of digits). What is lost is below
 * 2^-23 of the block's largest x, as when f32 products of that size are added up; integers of 24 bits
 * stay exact.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_GEMM_QUANTIZED_VNNI_H
#define QI_GEMM_QUANTIZED_VNNI_H

#include "kern/cpu/simd.h"
#include "ops/gemm/gemm_quantized_params.h"

enum {
    BLOCK = GEMM_BLOCK_SIZE,
    ROWS = 8, /* of x that share the unpacking of weights */
    DIGITS = 3,
    LARGEST = 127 * 65536 + 127 * 256 + 127, /* whose digits are 127 */
};

/* A block of a row of x, as large as its floats: x = unit * (65536 digit[0] + 256 digit[1] + digit[2]). */
typedef struct x_block {
    signed char digit[DIGITS][BLOCK];
    i32 start[DIGITS]; /* -zero * the digits' sum */
    float unit;        /* NaN where some x is not finite */
    i32 unused[4];
} x_block;
_Static_assert(sizeof(x_block) == BLOCK * sizeof(float), "takes the place of the floats");

QI_INLINE int has_min(const gemm_format format)
{
    return format == GEMM_Q4_1;
}

QI_INLINE int zero_point(const gemm_format format)
{
    return format == GEMM_Q8_0 ? 128 : format == GEMM_Q4_0 ? 8 : 0;
}

QI_INLINE x_block *block_at(const float *tile, i64 b, i64 r, i64 rows)
{
    return (x_block *)(void *)tile + b * rows + r;
}

/* The power of 2 by which the largest |x|, of these bits, becomes an integer of 24 bits, or 0 for
 * zeros; NaN if it is not finite. */
QI_INLINE float scale_of(u32 largest)
{
    const u32 wanted = 276 - (largest >> 23), most = 227; /* whose inverse is a normal number too */
    const u32 bits = (wanted < most ? wanted : most) << 23;
    float scale, x;
    memcpy(&scale, &bits, sizeof scale);
    memcpy(&x, &largest, sizeof x);
    if (largest >= 0x7f800000u) return NAN;
    return x == 0.f ? 0.f : x * scale > (float)LARGEST ? 0.5f * scale : scale;
}

/* Block b of row r of x to its tile of [blocks][rows]. */
QI_INLINE void take_block(float *tile, i64 b, i64 r, i64 rows, const float *row,
                          const gemm_format format)
{
    x_block *out = block_at(tile, b, r, rows);
    u32 bits[BLOCK],
        largest = 0; /* as integers absolute values have the same order, NaN above all */
    memcpy(bits, row, sizeof bits);
    for (int i = 0; i < BLOCK; i++) {
        const u32 magnitude = bits[i] & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    const float scale = scale_of(largest);
    memset(out, 0, sizeof *out);
    out->unit = scale == 0.f ? 0.f : 1.f / scale;
    if (!(scale > 0.f)) return;
    for (int i = 0; i < BLOCK; i++) {
        i32 rest = (i32)lrintf(row[i] * scale);
        for (int j = DIGITS - 1; j >= 0; j--) {
            const signed char digit = (signed char)rest;
            out->digit[j][i] = digit;
            out->start[j] -= zero_point(format) * digit;
            rest = (rest - digit) >> 8;
        }
    }
}

/* sum[r] = row r of x times the codes of block b of 16 rows of w; words: 16 bytes and 16 bytes of
 * them, or of 4 bits both times the same. */
QI_INLINE void multiply_block(vf sum[ROWS], const float *tile, i64 b, vf words[2][4],
                              const int rows, const gemm_format format)
{
    const x_block *x = block_at(tile, b, 0, rows);
    __m512i codes[8];
    QI_UNROLL(8)
    for (int i = 0; i < 8; i++) {
        vu word = (vu)words[i / 4][i % 4];
        if (format == GEMM_Q8_0)
            word = word ^ 0x80808080u;
        else
            word = (i < 4 ? word : word >> 4) & 0x0f0f0f0fu;
        codes[i] = (__m512i)word;
    }
    QI_UNROLL(3)
    for (int j = 0; j < DIGITS; j++) {
        const float weight = j == 0 ? 65536.f : j == 1 ? 256.f : 1.f;
        QI_UNROLL(8)
        for (int r = 0; r < rows; r++) {
            __m512i acc = _mm512_set1_epi32(x[r].start[j]);
            QI_UNROLL(8)
            for (int i = 0; i < 8; i++) {
                i32 four;
                memcpy(&four, x[r].digit[j] + 4 * i, sizeof four);
                acc = _mm512_dpbusd_epi32(acc, codes[i], _mm512_set1_epi32(four));
            }
            if (j == 0) sum[r] = vf_set1(0.f);
            sum[r] = sum[r] + vf_from_i32((vi)acc) * weight;
        }
    }
    QI_UNROLL(8)
    for (int r = 0; r < rows; r++) sum[r] = sum[r] * x[r].unit;
}

#endif
