/* amx.h - products of bf16 matrices by the tile unit (level amx).
 *
 * A tile register holds 16 rows of 64 bytes; tdpbf16ps adds the products of 16 rows of 32 bf16 by 16
 * columns, one pair along k a word, to 16 x 16 floats in 16 cycles: eight times the rate of FMA in
 * f32. Sums of a column run along k in steps of two, subnormals count as 0. Two by two tiles share
 * each other's loads: C in tiles 0 to 3, A in 4 and 5, B in 6 and 7.
 * Source: Intel SDM volume 2, TDPBF16PS; volume 1, chapter 18.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CPU_AMX_H
#define QI_KERN_CPU_AMX_H

#include "kern/cpu/simd.h"

#if defined(__AMX_BF16__)

enum {
    QI_AMX_ROWS = 16,
    QI_AMX_WORDS = 16, /* of a row: pairs of bf16, or floats */
};

/* Makes all eight tiles 16 rows of 64 bytes, on this thread; a kernel's first and last step. */
QI_INLINE void qi_amx_begin(void)
{
    struct {
        u8 palette, start_row, reserved[14];
        u16 row_bytes[16];
        u8 rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = QI_AMX_ROWS;
    }
    _tile_loadconfig(&config);
}

QI_INLINE void qi_amx_end(void)
{
    _tile_release();
}

/* C [32 rows of ldc floats][32] = A [32 rows of lda words] B [k][32 words], or added to C. k: words, a
 * multiple of 16; ldb: words between rows of B. */
QI_INLINE void qi_amx_mac(const float *a, i64 lda, const float *b, i64 ldb, i64 k, float *c,
                          i64 ldc, const int add)
{
    const i64 a_row = lda * 4, b_row = ldb * 4, c_row = ldc * 4;
    if (add) {
        _tile_loadd(0, c, c_row);
        _tile_loadd(1, c + 16, c_row);
        _tile_loadd(2, c + 16 * ldc, c_row);
        _tile_loadd(3, c + 16 * ldc + 16, c_row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (i64 s = 0; s < k; s += QI_AMX_WORDS) {
        _tile_loadd(4, a + s, a_row);
        _tile_loadd(6, b + s * ldb, b_row);
        _tile_loadd(7, b + s * ldb + 16, b_row);
        _tile_loadd(5, a + 16 * lda + s, a_row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_row);
    _tile_stored(1, c + 16, c_row);
    _tile_stored(2, c + 16 * ldc, c_row);
    _tile_stored(3, c + 16 * ldc + 16, c_row);
}

#endif
#endif
