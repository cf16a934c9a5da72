/* mass.cuh - sums of masses, mass_of() of weights.h, by a few instructions of f32 each.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_MASS_CUH
#define QI_SAMPLING_MASS_CUH

#include "ops/sampling/weights.h"

/* In two halves: 2^-21 of the row's unit, and 2^-42; each of n masses with MAGIC added, modulo 2^32: to take it away at the
 * end is an instruction less for each. 512 masses fit. */
typedef struct mass_sum {
    u32 high, low;
} mass_sum;
enum { MAGIC = 0x4b000000 }; /* bits of 2^23 */

/* A value of the row times this is below 2. */
QI_INLINE float to_unit_of(int unit)
{
    return unit == 254 ? float_of(0x400000u) : float_of((u32)(254 - unit) << 23);
}

/* w: times to_unit_of(). Truncating additions leave integers in the low bits; every other step is exact. */
QI_INLINE mass_sum split_mass(float w)
{
    const float half = 2097152.f, magic = float_of(MAGIC); /* half: 2^21 */
    const float high = __fmaf_rz(w, half, magic);
    const float without =
        rn_fma(high, -half, rn_add(half * magic, magic)); /* magic - its integer * half */
    return {bits_of(high), bits_of(__fmaf_rz(w, half * half, without))};
}

/* Adds the mass, or 0. */
QI_INLINE void add_mass_if(mass_sum *sum, int on, mass_sum mass)
{
    sum->high += on ? mass.high : MAGIC;
    sum->low += on ? mass.low : MAGIC;
}

QI_INLINE void add_mass(mass_sum *sum, float w)
{
    add_mass_if(sum, 1, split_mass(w));
}

/* The sum of n. */
QI_INLINE u64 whole_mass(mass_sum sum, u32 n)
{
    return ((u64)(sum.high - n * MAGIC) << 21) + (sum.low - n * MAGIC);
}

/* Adds to a sum in shared memory, that of many threads: a word of it at a time, since there only words are added to in one
 * step. */
QI_INLINE void add_shared(u64 *sum, u64 x)
{
    u32 *const words = (u32 *)sum, low = (u32)x;
    const u32 carry = atomicAdd(words, low) + low < low, high = (u32)(x >> 32) + carry;
    if (high) atomicAdd(words + 1, high);
}

#endif
