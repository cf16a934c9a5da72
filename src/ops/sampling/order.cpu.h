/* order.cpu.h - tokens in the order of sampling.h, the largest first and equal ones by index: integer keys, and a
 * radix sort by them.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ORDER_CPU_H
#define QI_ORDER_CPU_H

#include "kern/cpu/simd.h"

enum { DIGIT_BITS = 8, NUM_DIGITS = 1 << DIGIT_BITS, MAX_DIGITS = 4 };

/* Digits of a type's keys. */
QI_INLINE int order_digits(const qi_dtype t)
{
    return t == QI_F32 ? 4 : 2;
}

/* The bits of an element; of NaN those of -inf. */
QI_INLINE u32 order_bits(const void *row, i64 i, const qi_dtype t)
{
    const u32 infinity = t == QI_F32 ? 0x7f800000 : t == QI_F16 ? 0x7c00 : 0x7f80;
    const u32 sign = t == QI_F32 ? 0x80000000 : 0x8000;
    const u32 bits = t == QI_F32 ? ((const u32 *)row)[i] : ((const u16 *)row)[i];
    return (bits & ~sign) > infinity ? sign | infinity : bits;
}

/* Larger elements have larger keys, equal ones the same: -0 and +0, NaN and -inf, +inf and the largest f32. */
QI_INLINE u32 order_key(const void *row, i64 i, const qi_dtype t)
{
    const u32 sign = t == QI_F32 ? 0x80000000 : 0x8000;
    u32 bits = order_bits(row, i, t);
    if (bits == sign) bits = 0;
    if (t == QI_F32 && bits == 0x7f800000) bits = 0x7f7fffff;
    return bits & sign ? ~bits & (2 * sign - 1) : bits | sign;
}

QI_INLINE u32 order_digit(u32 key, int digit)
{
    return key >> digit * DIGIT_BITS & (NUM_DIGITS - 1);
}

/* Sorts n tokens that are in order of index; room has as many. */
QI_INLINE void order_sort(i32 *tokens, i32 *room, i64 n, const void *row, const qi_dtype t)
{
    u32 place[MAX_DIGITS][NUM_DIGITS] = {{0}};
    for (i64 i = 0; i < n; i++) {
        const u32 key = order_key(row, tokens[i], t);
        for (int d = 0; d < order_digits(t); d++) place[d][order_digit(key, d)]++;
    }
    for (int d = 0; d < order_digits(t); d++) {
        u32 before = 0;
        for (int v = NUM_DIGITS - 1; v >= 0; v--) {
            const u32 count = place[d][v];
            place[d][v] = before;
            before += count;
        }
    }
    for (int d = 0; d < order_digits(t); d++) { /* an even number: they end where they began */
        for (i64 i = 0; i < n; i++)
            room[place[d][order_digit(order_key(row, tokens[i], t), d)]++] = tokens[i];
        i32 *const other = tokens;
        tokens = room;
        room = other;
    }
}

#endif
