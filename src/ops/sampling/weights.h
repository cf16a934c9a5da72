/* weights.h - the arithmetic of sampling's stages, one number at a time: the same bits on the CPU and on a
 * GPU. Text of both: the common subset of C11 and CUDA C.
 *
 * Every operation is rounded by itself, as written. A compiler for the CPU does so if -ffp-contract=off; one for
 * a GPU where it is told so by name. Operations on doubles are such that nothing could be contracted.
 *
 * A logit in a row is finite or -inf, a token not there; a weight is 0, a token not there, or normal and finite.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_WEIGHTS_H
#define QI_WEIGHTS_H

#if defined(__CUDACC_RTC__)
#include "kern/cuda/prelude.cuh"
#define rn_add(a, b)    __fadd_rn(a, b)
#define rn_sub(a, b)    __fsub_rn(a, b)
#define rn_mul(a, b)    __fmul_rn(a, b)
#define rn_div(a, b)    __fdiv_rn(a, b)
#define rn_fma(a, b, c) __fmaf_rn(a, b, c)
#else
#include "kern/cpu/prelude.h"
#define rn_add(a, b)    ((a) + (b))
#define rn_sub(a, b)    ((a) - (b))
#define rn_mul(a, b)    ((a) * (b))
#define rn_div(a, b)    ((a) / (b))
#define rn_fma(a, b, c) fmaf(a, b, c)
#endif

/* ---- bits --------------------------------------------------------------------------------- */

QI_INLINE u32 bits_of(float x)
{
#if defined(__CUDACC_RTC__)
    return __float_as_uint(x);
#else
    u32 bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
#endif
}

QI_INLINE float float_of(u32 bits)
{
#if defined(__CUDACC_RTC__)
    return __uint_as_float(bits);
#else
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
#endif
}

QI_INLINE u64 high_product(u64 a, u64 b)
{
#if defined(__CUDACC_RTC__)
    return __umul64hi(a, b);
#else
    const u64 a_lo = (u32)a, a_hi = a >> 32, b_lo = (u32)b, b_hi = b >> 32;
    const u64 mid = a_hi * b_lo + (a_lo * b_lo >> 32), carry = a_lo * b_hi + (u32)mid;
    return a_hi * b_hi + (mid >> 32) + (carry >> 32);
#endif
}

#define NO_LOGIT      float_of(0xff800000u) /* -inf */
#define LARGEST       3.402823466e38f
#define LEAST_NORMAL  1.175494351e-38f
#define ROUND_MAGIC   12582912.f /* 1.5 * 2^23: adding it rounds to an integer, in the low bits */
#define ROUND_BITS    0x4b400000u
#define EXPONENT_BIAS 127

/* The nearest integer, ties to even, of |x| < 2^22. */
QI_INLINE i32 round_int(float x)
{
    return (i32)(bits_of(rn_add(x, ROUND_MAGIC)) - ROUND_BITS);
}

/* Larger values have larger keys; -0 has +0's. */
QI_INLINE u32 key_of(float x)
{
    const u32 bits = bits_of(rn_add(x, 0.f));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

QI_INLINE float value_of(u32 key)
{
    return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/* ---- elements as they come into a row --------------------------------------------------------- */

QI_INLINE float clean_logit(float x)
{
    return !(x == x) ? NO_LOGIT : x > LARGEST ? LARGEST : x;
}

/* Whether it makes the row invalid. */
QI_INLINE int bad_logit(float x)
{
    return !(x <= LARGEST);
}

QI_INLINE float clean_prob(float x)
{
    return !(x >= LEAST_NORMAL) ? 0.f : x > LARGEST ? LARGEST : x;
}

QI_INLINE int bad_prob(float x)
{
    return !(x >= 0.f && x <= LARGEST);
}

/* ---- stages that take one logit to another ---------------------------------------------------- */

/* For tokens of the prompt, or whose count is above 0. */
QI_INLINE float repetition_of(float l, float r)
{
    return clean_logit(l > 0.f ? rn_div(l, r) : rn_mul(l, r));
}

QI_INLINE float frequency_of(float l, float f, i32 count)
{
    return clean_logit(rn_fma(-f, (float)count, l));
}

/* For tokens whose count is above 0. */
QI_INLINE float presence_of(float l, float r)
{
    return clean_logit(rn_sub(l, r));
}

QI_INLINE float bias_of(float l, float bias)
{
    return clean_logit(rn_add(l, bias));
}

/* inverse = rn_div(1.f, T), once a row, T != 0. */
QI_INLINE float temperature_of(float l, float inverse)
{
    return clean_logit(rn_mul(l, inverse));
}

/* ---- top_n_sigma: distances from the largest logit as integers of at most 20 bits, whose sums are exact -- */

/* The power of 2 by which range = max - min, or a shorter distance, is multiplied. */
QI_INLINE int sigma_scale(float range)
{
    const int scale = 146 - (int)(bits_of(range) >> 23);
    return scale < 127 ? scale : 127;
}

/* scale = float_of((sigma_scale(range) + EXPONENT_BIAS) << 23) */
QI_INLINE u32 sigma_distance(float l, float max, float scale)
{
    const float d = rn_fma(-l, scale, rn_mul(max, scale)); /* finite where max - l is not */
    return (u32)round_int(d < 1048576.f ? d : 1048576.f);
}

/* Keep l >= this. n tokens, > 0; sum of their distances, and of their squares. */
QI_INLINE float sigma_threshold(float max, float range, float n_sigma, u64 n, u64 sum, u64 sum_sq)
{
    const double mean = (double)sum / (double)n;
    const double variance = fma(-mean, mean, (double)sum_sq / (double)n);
    if (range == 0.f) return max;
    const float sigma =
        (float)(sqrt(variance > 0. ? variance : 0.) * ldexp(1., -sigma_scale(range)));
    return rn_sub(max, rn_mul(n_sigma, sigma));
}

/* ---- weights ------------------------------------------------------------------------------ */

/* So far from the largest, at about 2^-100 of its weight, a token has none. */
#define NO_WEIGHT -69.3125f

/* exp(l - max) in f32, exactly 1 for the largest: 2^f on [-1/2, 1/2] by a minimax polynomial, times a power of 2. */
QI_INLINE float weight_of(float l, float max)
{
    const float x = rn_sub(l, max);
    const float shifted = rn_fma(x, QI_LOG2E, ROUND_MAGIC);
    const float f = rn_fma(x, QI_LOG2E, rn_sub(ROUND_MAGIC, shifted));
    float p = 1.535336206e-4f;
    p = rn_fma(p, f, 1.339887456e-3f);
    p = rn_fma(p, f, 9.618437358e-3f);
    p = rn_fma(p, f, 5.550332471e-2f);
    p = rn_fma(p, f, 2.402264791e-1f);
    p = rn_fma(p, f, 6.931472029e-1f);
    p = rn_fma(p, f, 1.f);
    return x >= NO_WEIGHT ? float_of(bits_of(p) + (bits_of(shifted) << 23)) : 0.f; /* 0 for NaN */
}

/* A row's unit is the exponent field of its largest weight as it came into the row: EXPONENT_BIAS for what
 * softmax made. A mass counts in 2^-42 of the unit's power of 2. */
enum { MASS_BITS = 42 };

QI_INLINE u64 mass_of(float w, int unit)
{
    const u32 bits = bits_of(w), exponent = bits >> 23, shift = (u32)unit - exponent;
    const u64 mantissa = (bits & 0x7fffffu) | 0x800000u;
    return exponent == 0 || shift > MASS_BITS ? 0 : mantissa << (MASS_BITS - 23) >> shift;
}

/* A prefix of this mass, out of `mass`, is kept by top_p and typical_p, p < 1. */
QI_INLINE u64 wish_of(u64 mass, float p)
{
    const double wish = ceil((double)mass * (double)p);
    return wish > 1. ? (u64)wish : 1;
}

/* Keep w >= this. */
QI_INLINE float min_p_threshold(float min_p, float largest)
{
    return rn_mul(min_p, largest);
}

/* log_total is the logarithm of the sum of all weights. +0, not -0, for the only token: -0 becomes +0 first. */
QI_INLINE float log_prob_of(float l, float max, double log_total)
{
    return (float)((double)rn_add(l, 0.f) - (double)max - log_total);
}

/* w * prob_scale is w's share of `kept`, the mass of all tokens kept, > 0. */
QI_INLINE float prob_scale(u64 kept, int unit)
{
    return (float)(ldexp(1., MASS_BITS + EXPONENT_BIAS - unit) / (double)kept);
}

/* The scale of weights of a large unit could be less than a normal number. They are shrunk before: p =
 * prob_of(rn_mul(w, shrink_of(unit)), prob_scale(kept, shrunk_unit(unit))). */
QI_INLINE float shrink_of(int unit)
{
    return unit > 190 ? 5.421010862e-20f : 1.f; /* 2^-64 */
}

QI_INLINE int shrunk_unit(int unit)
{
    return unit > 190 ? unit - 64 : unit;
}

QI_INLINE float prob_of(float w, float scale)
{
    return rn_mul(w, scale);
}

/* ---- typical_p: information in 2^-14 bits, from 1 bit below the unit ------------------------------ */

/* (1 - log2(w / unit)) * 2^14 for w > 0, below 2^22: log2(m) / (m - 1) on [sqrt(1/2), sqrt(2)) by a minimax
 * polynomial. */
QI_INLINE i32 information_of(float w, int unit)
{
    const u32 bits = bits_of(w), root_half = 0x3f3504f3u;
    const i32 n = (i32)(bits - root_half) >> 23;
    const float x = rn_sub(float_of(bits - ((u32)n << 23)), 1.f);
    float p = 1.23109685e-1f;
    p = rn_fma(p, x, -2.05861881e-1f);
    p = rn_fma(p, x, 2.16078226e-1f);
    p = rn_fma(p, x, -2.39169881e-1f);
    p = rn_fma(p, x, 2.87903261e-1f);
    p = rn_fma(p, x, -3.60693268e-1f);
    p = rn_fma(p, x, 4.80910753e-1f);
    p = rn_fma(p, x, -7.21347468e-1f);
    p = rn_fma(p, x, 1.44269500f);
    const float log2_w = rn_fma(p, x, (float)(n - (unit - EXPONENT_BIAS)));
    return round_int(rn_mul(rn_sub(1.f, log2_w), 16384.f));
}

/* The sum of mass * information, which 64 bits do not hold, has two parts: of each mass's upper bits and of these
 * lower ones. */
enum { LOWER_BITS = 20 };

/* The average information: those sums over that of the masses, > 0. */
QI_INLINE double typical_mean(u64 upper, u64 lower, u64 mass)
{
    return fma((double)upper, (double)(1 << LOWER_BITS), (double)lower) / (double)mass;
}

/* What typical_p orders a row by, as others do by value: the distance from the mean in half steps, negative; of
 * two equal ones the more probable side is the larger. An integer below 2^24. */
QI_INLINE float typical_value(i32 information, double mean)
{
    const double distance = (double)information - mean;
    const float halves = (float)(2. * fabs(distance));
    const float whole = rn_sub(rn_add(halves, 8388608.f), 8388608.f);
    return -(rn_add(rn_mul(whole, 2.f), distance > 0. ? 1.f : 0.f));
}

#endif
