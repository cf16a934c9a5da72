/* mass.cuh - sums of masses, mass_of() of weights.h, by a few instructions of f32 each.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_MASS_CUH
#define QI_SAMPLING_MASS_CUH

#include "ops/sampling/weights.h"

/* In two halves: 2^-21 of the row's unit, and 2^-42. 512 masses fit. */
typedef struct mass_sum {
    u32 high, low;
} mass_sum;

/* A value of the row times this is below 2. */
QI_INLINE float to_unit_of(int unit)
{
    return unit == 254 ? float_of(0x400000u) : float_of((u32)(254 - unit) << 23);
}

/* w: times to_unit_of(). Truncating additions leave integers in the low bits; every other step is exact. */
QI_INLINE mass_sum split_mass(float w)
{
    const float half = 2097152.f, magic = 8388608.f; /* 2^21, 2^23 */
    const float high = __fmaf_rz(w, half, magic);
    const float without =
        rn_fma(high, -half, rn_add(half * magic, magic)); /* magic - its integer * half */
    return {bits_of(high) - bits_of(magic),
            bits_of(__fmaf_rz(w, half * half, without)) - bits_of(magic)};
}

QI_INLINE void add_mass_if(mass_sum *sum, int on, mass_sum mass)
{
    if (on) sum->high += mass.high, sum->low += mass.low;
}

QI_INLINE void add_mass(mass_sum *sum, float w)
{
    add_mass_if(sum, 1, split_mass(w));
}

QI_INLINE u64 whole_mass(mass_sum sum)
{
    return ((u64)sum.high << 21) + sum.low;
}

#endif
