/* argmax.cpu.h - the first index of a row's largest value, for the kernels of this folder.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ARGMAX_CPU_H
#define QI_ARGMAX_CPU_H

#include "kern/cpu/simd.h"

/* x, or -inf for NaN */
QI_INLINE vf argmax_ordered(vf x)
{
    return vf_select(x == x, x, vf_set1(-INFINITY));
}

/* The largest of n values, NaN counting as -inf; -inf if there is none. */
QI_INLINE float argmax_value(const void *row, i64 n, const qi_dtype t)
{
    vf best[4];
    QI_UNROLL(4)
    for (int c = 0; c < 4; c++) best[c] = vf_set1(-INFINITY);
    i64 i = 0;
    for (; i + 4 * QI_VW <= n; i += 4 * QI_VW) {
        QI_UNROLL(4)
        for (int c = 0; c < 4; c++)
            best[c] = vf_max(best[c], argmax_ordered(qi_load(qi_at(row, t, i + c * QI_VW), t)));
    }
    float value = vf_max_lane(vf_max(vf_max(best[0], best[1]), vf_max(best[2], best[3])));
    for (; i < n; i++) {
        const float x = qi_load1(qi_at(row, t, i), t);
        value = x > value ? x : value;
    }
    return value;
}

/* The first index that holds value; 0 if none does (a row of NaN alone). */
QI_INLINE i64 argmax_find(const void *row, i64 n, const qi_dtype t, float value)
{
    if (value == -INFINITY) return 0; /* nothing but NaN and -inf, which count the same */
    i64 i = 0;
    for (; i + 2 * QI_VW <= n; i += 2 * QI_VW) {
        const vi found = (qi_load(qi_at(row, t, i), t) == value) |
                         (qi_load(qi_at(row, t, i + QI_VW), t) == value);
        if (vi_any(found)) break;
    }
    for (; i < n; i++)
        if (qi_load1(qi_at(row, t, i), t) == value) return i;
    return 0;
}

#endif
