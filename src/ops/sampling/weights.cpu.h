/* weights.cpu.h - the arithmetic of weights.h, a vector at a time: the same bits.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_WEIGHTS_CPU_H
#define QI_WEIGHTS_CPU_H

#include "kern/cpu/simd.h"
#include "ops/sampling/weights.h"

/* x where the mask is set, else 0 */
QI_INLINE vf vf_where(vi mask, vf x)
{
    return (vf)(mask & (vi)x);
}

QI_INLINE vf vf_clean_logit(vf x)
{
    return vf_min(vf_max_number(x, vf_set1(NO_LOGIT)), vf_set1(LARGEST));
}

QI_INLINE vi vi_bad_logit(vf x)
{
    return ~(vi)(x <= vf_set1(LARGEST));
}

QI_INLINE vf vf_clean_prob(vf x)
{
    return vf_where(x >= vf_set1(LEAST_NORMAL), vf_min(x, vf_set1(LARGEST)));
}

QI_INLINE vi vi_bad_prob(vf x)
{
    return ~((vi)(x >= vf_set1(0.f)) & (vi)(x <= vf_set1(LARGEST)));
}

/* Integers of |x| < 2^22, nearest, ties to even. */
QI_INLINE vi vi_round(vf x)
{
    return (vi)(x + ROUND_MAGIC) - (i32)ROUND_BITS;
}

/* WEIGHTS vectors of logits become weights, side by side: one alone would wait for each of its steps. */
enum { WEIGHTS = 4 };
#define FOR_EACH(i)                                                                                \
    QI_UNROLL(4)                                                                                   \
    for (int i = 0; i < WEIGHTS; i++)

/* exp(x) times 2^lift, for x from NO_WEIGHT to 0. */
QI_INLINE void vf_powers(vf x[WEIGHTS], const int lift)
{
    static const float coefficient[] = {1.339887456e-3f, 9.618437358e-3f, 5.550332471e-2f,
                                        2.402264791e-1f, 6.931472029e-1f, 1.f};
    const vf magic = vf_set1(ROUND_MAGIC + (float)lift), log2e = vf_set1(QI_LOG2E);
    vf shifted[WEIGHTS], p[WEIGHTS];
    FOR_EACH(i) shifted[i] = vf_fma(x[i], log2e, magic);
    FOR_EACH(i) x[i] = vf_fma(x[i], log2e, magic - shifted[i]);
    FOR_EACH(i) p[i] = vf_set1(1.535336206e-4f);
    QI_UNROLL(6)
    for (int k = 0; k < 6; k++) FOR_EACH(i) p[i] = vf_fma(p[i], x[i], vf_set1(coefficient[k]));
    FOR_EACH(i) x[i] = (vf)((vu)p[i] + ((vu)shifted[i] << 23));
}

QI_INLINE void vf_weigh(vf x[WEIGHTS], vf max)
{
    vf power[WEIGHTS];
    FOR_EACH(i) power[i] = x[i] = x[i] - max;
    vf_powers(power, 0);
    FOR_EACH(i) x[i] = vf_where(x[i] >= NO_WEIGHT, power[i]);
}

/* Weights for their masses alone, lifted: the mass is the whole part. That of 0 is something small instead. */
QI_INLINE void vf_weigh_lifted(vf x[WEIGHTS], vf max)
{
    FOR_EACH(i) x[i] = vf_max_number(x[i] - max, vf_set1(NO_WEIGHT));
    vf_powers(x, MASS_BITS);
}

enum { LIFTED = EXPONENT_BIAS + MASS_BITS }; /* the unit of lifted weights */

/* Of the unit: mass = floor(w * scale), exactly; a whole number of 24 bits times a power of 2. Units are at
 * least 64 on the CPU (see load_row). */
QI_INLINE float mass_scale(int unit)
{
    return float_of((u32)(MASS_BITS + 2 * EXPONENT_BIAS - unit) << 23);
}

QI_INLINE vf vf_mass(vf w, vf scale)
{
    return vf_floor(w * scale);
}

/* A sum of masses, or other whole numbers below 2^43, of at most 1024 vectors. */
typedef struct exact_sum {
    vd lower, upper;
} exact_sum;

QI_INLINE void exact_add(exact_sum *s, vf x)
{
    s->lower += vd_lower(x);
    s->upper += vd_upper(x);
}

/* Products whose sum is below 2^53. */
QI_INLINE void exact_add_products(exact_sum *s, vf x, vf y)
{
    s->lower += vd_lower(x) * vd_lower(y);
    s->upper += vd_upper(x) * vd_upper(y);
}

/* Of at most 1024 numbers. */
QI_INLINE u64 exact_total(const exact_sum *s)
{
    return (u64)vd_sum(s->lower + s->upper);
}

/* The same of lifted weights that are normal numbers, of at most 256: two sums of 21 bits each of a mass. */
typedef struct mass_sum {
    vi upper, lower;
} mass_sum;

enum { HALF_MASS = MASS_BITS / 2 };

QI_INLINE mass_sum mass_parts(vf x)
{
    const vi upper = vi_truncate((vf)((vu)x - ((u32)HALF_MASS << 23)));
    const vf rest = vf_fma(vf_from_i32(upper), vf_set1(-(float)(1 << HALF_MASS)), x);
    return (mass_sum){upper, vi_truncate(rest)};
}

QI_INLINE u64 mass_total(const mass_sum *s)
{
    return ((u64)vi_sum(s->upper) << HALF_MASS) + (u64)vi_sum(s->lower);
}

QI_INLINE vi vi_information(vf w, int unit)
{
    const vu bits = (vu)w;
    const vi n = (vi)(bits - 0x3f3504f3u) >> 23;
    const vf x = (vf)(bits - ((vu)n << 23)) - 1.f;
    vf p = vf_set1(1.23109685e-1f);
    p = vf_fma(p, x, vf_set1(-2.05861881e-1f));
    p = vf_fma(p, x, vf_set1(2.16078226e-1f));
    p = vf_fma(p, x, vf_set1(-2.39169881e-1f));
    p = vf_fma(p, x, vf_set1(2.87903261e-1f));
    p = vf_fma(p, x, vf_set1(-3.60693268e-1f));
    p = vf_fma(p, x, vf_set1(4.80910753e-1f));
    p = vf_fma(p, x, vf_set1(-7.21347468e-1f));
    p = vf_fma(p, x, vf_set1(1.44269500f));
    const vf log2_w = vf_fma(p, x, vf_from_i32(n - (unit - EXPONENT_BIAS)));
    return vi_round((1.f - log2_w) * 16384.f);
}

QI_INLINE vf vf_typical(vi information, double mean)
{
    const vf q = vf_from_i32(information);
    const vd lower = vd_lower(q) - mean, upper = vd_upper(q) - mean;
    /* Rounding is the same on both sides of 0. */
    const vf doubled = vf_from_halves(2. * lower, 2. * upper);
    const vf whole = vf_abs(doubled) + 8388608.f - 8388608.f;
    return -(whole * 2.f + vf_where(doubled > 0.f, vf_set1(1.f)));
}

#endif
