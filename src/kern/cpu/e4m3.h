/* e4m3.h - codes of e4m3 to bf16, exactly, by table (levels with AVX512-VBMI).
 *
 * Every e4m3, subnormals and NaN too, is a bf16. Without its sign a code has 7 bits, and vpermi2b looks
 * up 64 such codes in 128 bytes at once: one lookup for each byte of the bf16, so 64 elements cost 6
 * instructions; by way of f16 (vf_from_8bit) 40.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CPU_E4M3_H
#define QI_KERN_CPU_E4M3_H

#include "kern/cpu/simd.h"

#if defined(__AVX512VBMI__)
#define QI_HAS_E4M3_TABLE 1

/* Bytes of the bf16 of codes 0 to 127. */
typedef struct qi_e4m3_table {
    u8 low[128], high[128];
} qi_e4m3_table;

static void qi_e4m3_fill(qi_e4m3_table *table)
{
    u8 codes[128];
    float values[128];
    for (int i = 0; i < 128; i++) codes[i] = (u8)i;
    qi_widen(values, codes, QI_E4M3, 128);
    for (int i = 0; i < 128; i++) {
        u32 bits;
        memcpy(&bits, &values[i], sizeof bits);
        table->low[i] = (u8)(bits >> 16);
        table->high[i] = (u8)(bits >> 24);
    }
}

/* 64 codes at `in` to bf16 at `out`. */
QI_INLINE void qi_e4m3_to_bf16(u16 *out, const void *in, const qi_e4m3_table *table)
{
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); /* for the unpacking */
    const __m512i code = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(in));
    const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table->low), code,
                                                 _mm512_loadu_si512(table->low + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(table->high), code,
                                                  _mm512_loadu_si512(table->high + 64));
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    const __m512i with_sign = _mm512_ternarylogic_epi64(high, code, sign, 0xf8); /* a | b & c */
    _mm512_storeu_si512(out, _mm512_unpacklo_epi8(low, with_sign));
    _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi8(low, with_sign));
}

#else
#define QI_HAS_E4M3_TABLE 0
typedef struct qi_e4m3_table {
    u8 unused;
} qi_e4m3_table;
#endif
#endif
