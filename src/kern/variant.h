/* variant.h - what the text of a variant sees: positions, pairs and a small maths library. The
 * contract is in qkv/variant.h. The functions have no branches, so that loops over them vectorise.
 * Compiles as C11 (CPU) and under NVRTC.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_VARIANT_H
#define QI_KERN_VARIANT_H

typedef struct qi_pos {
    int request, qo_head, kv_head, qo_pos, kv_pos, qo_idx, qo_len, kv_len;
} qi_pos;

typedef struct qi_pair {
    float x, y;
} qi_pair;

#if defined(__CUDACC__)

#define QI_FN static __device__ __forceinline__
QI_FN float qi_exp2(float x)
{
    return exp2f(x);
}
QI_FN float qi_exp(float x)
{
    return expf(x);
}
QI_FN float qi_log2(float x)
{
    return log2f(x);
}
QI_FN float qi_log(float x)
{
    return logf(x);
}
QI_FN float qi_tanh(float x)
{
    return tanhf(x);
}
QI_FN float qi_sigmoid(float x)
{
    return 1.f / (1.f + expf(-x));
}
QI_FN float qi_sin(float x)
{
    return sinf(x);
}
QI_FN float qi_cos(float x)
{
    return cosf(x);
}
QI_FN float qi_sqrt(float x)
{
    return sqrtf(x);
}
QI_FN float qi_abs(float x)
{
    return fabsf(x);
}
QI_FN float qi_min(float a, float b)
{
    return a < b ? a : b;
}
QI_FN float qi_max(float a, float b)
{
    return a > b ? a : b;
}

#else

#define QI_FN static inline __attribute__((always_inline, unused))

typedef union qi_bits {
    float f;
    int i;
} qi_bits;

QI_FN float qi_abs(float x)
{
    return __builtin_fabsf(x);
}

QI_FN float qi_sqrt(float x)
{
    return __builtin_sqrtf(x);
}

QI_FN float qi_min(float a, float b)
{
    return a < b ? a : b;
}

QI_FN float qi_max(float a, float b)
{
    return a > b ? a : b;
}

/* 2^(n + f), n whole in [-151, 130]: 2^f on [-1/2, 1/2] by a minimax polynomial of degree 6, then
 * the exponent in two steps, so that the result has the whole range of f32. */
QI_FN float qi_exp2_parts(float n, float f)
{
    const int exponent = (int)n, half = exponent >> 1;
    qi_bits low, high;
    float p = 1.535336206e-4f;
    p = p * f + 1.339887456e-3f;
    p = p * f + 9.618437358e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472029e-1f;
    p = p * f + 1.f;
    low.i = (half + 127) << 23;
    high.i = (exponent - half + 127) << 23;
    return p * low.f * high.f;
}

/* Rounds to a whole number, for |x| < 2^22. */
QI_FN float qi_whole(float x)
{
    return (x + 12582912.f) - 12582912.f;
}

QI_FN float qi_exp2(float x)
{
    const float y = qi_min(qi_max(x, -150.f), 129.f), n = qi_whole(y); /* NaN becomes -150 */
    return x == x ? qi_exp2_parts(n, y - n) : x;
}

/* log2(e) in two parts, or x * log2(e) would be off by as many ulp as it is large. */
QI_FN float qi_exp(float x)
{
    const float y = qi_min(qi_max(x, -104.f), 89.f), n = qi_whole(y * 1.44269504f);
    const float f = (float)((double)y * 1.4426950408889634 - (double)n);
    return x == x ? qi_exp2_parts(n, f) : x;
}

/* x = m 2^e with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh((m - 1) / (m + 1)) by its series. */
QI_FN float qi_log2(float x)
{
    const int tiny = x < 1.17549435e-38f;
    qi_bits b, m;
    b.f = tiny ? x * 8388608.f : x;
    const int e = (b.i - 0x3f3504f3) >> 23;
    m.i = b.i - (int)((unsigned)e << 23);
    const float s = (m.f - 1.f) / (m.f + 1.f), t = s * s;
    float p = 0.32059890f; /* 2 log2(e) / n for n = 9, 7, 5, 3, 1 */
    p = p * t + 0.41219858f;
    p = p * t + 0.57707802f;
    p = p * t + 0.96179669f;
    p = p * t + 2.88539008f;
    const float r = p * s + (float)(e - (tiny ? 23 : 0));
    const float special = x == 0.f ? -__builtin_inff() : __builtin_nanf("");
    const float positive =
        x < __builtin_inff() ? r : x;    /* one condition each, or gcc keeps loops */
    return x > 0.f ? positive : special; /* over a constant x scalar */
}

QI_FN float qi_log(float x)
{
    return qi_log2(x) * 0.69314718055994530942f;
}

/* An odd polynomial near 0, (1 - e) / (1 + e) with e = exp(-2|x|) beyond. */
QI_FN float qi_tanh(float x)
{
    const float s = x * x, e = qi_exp2(qi_abs(x) * -2.88539008177792681472f);
    float p = -5.704985090e-3f;
    p = p * s + 2.063908562e-2f;
    p = p * s - 5.373971461e-2f;
    p = p * s + 1.333144219e-1f;
    p = p * s - 3.333328194e-1f;
    p = (p * s) * x + x;
    const float big = (1.f - e) / (1.f + e), same_sign = x < 0.f ? -big : big;
    return qi_abs(x) < 0.625f ? p : same_sign;
}

QI_FN float qi_sigmoid(float x)
{
    return 1.f / (1.f + qi_exp(-x));
}

/* sin(x + quarter pi/2): reduced to [-pi/4, pi/4] in double, then Taylor series. */
QI_FN float qi_sin_quarter(float x, int quarter)
{
    const double turns = (double)x * 0.63661977236758134308, shifted = turns + 6755399441055744.0;
    const double whole = shifted - 6755399441055744.0;
    const float r = (float)((turns - whole) * 1.57079632679489661923), s = r * r;
    const int n = (int)whole + quarter;
    float sine = 2.7557319e-6f, cosine = 2.4801587e-5f;
    sine = sine * s - 1.9841270e-4f;
    sine = sine * s + 8.3333333e-3f;
    sine = sine * s - 1.6666667e-1f;
    sine = sine * s * r + r;
    cosine = cosine * s - 1.3888889e-3f;
    cosine = cosine * s + 4.1666668e-2f;
    cosine = cosine * s - 0.5f;
    cosine = cosine * s + 1.f;
    const float value = n & 1 ? cosine : sine;
    return n & 2 ? -value : value;
}

QI_FN float qi_sin(float x)
{
    return qi_sin_quarter(x, 0);
}

QI_FN float qi_cos(float x)
{
    return qi_sin_quarter(x, 1);
}

#endif
#endif
