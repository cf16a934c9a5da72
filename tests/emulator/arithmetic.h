/* arithmetic.h - CUDA's arithmetic on a CPU: the C library's where it has the function, exact where CUDA
 * says how it rounds.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef EMULATOR_ARITHMETIC_H
#define EMULATOR_ARITHMETIC_H

extern "C" {
#define EMULATOR_FUNCTION(name)                                                                    \
    double name(double) noexcept(true);                                                            \
    float name##f(float) noexcept(true);
EMULATOR_FUNCTION(exp)
EMULATOR_FUNCTION(exp2)
EMULATOR_FUNCTION(expm1)
EMULATOR_FUNCTION(log)
EMULATOR_FUNCTION(log2)
EMULATOR_FUNCTION(log10)
EMULATOR_FUNCTION(log1p)
EMULATOR_FUNCTION(sin)
EMULATOR_FUNCTION(cos)
EMULATOR_FUNCTION(tan)
EMULATOR_FUNCTION(tanh)
EMULATOR_FUNCTION(erf)
EMULATOR_FUNCTION(erfc)
EMULATOR_FUNCTION(sinh)
EMULATOR_FUNCTION(cosh)
EMULATOR_FUNCTION(atan)
EMULATOR_FUNCTION(asin)
EMULATOR_FUNCTION(acos)
EMULATOR_FUNCTION(sqrt)
EMULATOR_FUNCTION(cbrt)
EMULATOR_FUNCTION(fabs)
EMULATOR_FUNCTION(ceil)
EMULATOR_FUNCTION(floor)
EMULATOR_FUNCTION(trunc)
EMULATOR_FUNCTION(round)
EMULATOR_FUNCTION(rint)
EMULATOR_FUNCTION(nearbyint)
#undef EMULATOR_FUNCTION
#define EMULATOR_FUNCTION(name)                                                                    \
    double name(double, double) noexcept(true);                                                    \
    float name##f(float, float) noexcept(true);
EMULATOR_FUNCTION(pow)
EMULATOR_FUNCTION(fmod)
EMULATOR_FUNCTION(remainder)
EMULATOR_FUNCTION(fmax)
EMULATOR_FUNCTION(fmin)
EMULATOR_FUNCTION(copysign)
EMULATOR_FUNCTION(atan2)
#undef EMULATOR_FUNCTION
double fma(double, double, double) noexcept(true);
float fmaf(float, float, float) noexcept(true);
double ldexp(double, int) noexcept(true);
float ldexpf(float, int) noexcept(true);
double frexp(double, int *) noexcept(true);
float frexpf(float, int *) noexcept(true);
int abs(int) noexcept(true);
long long llabs(long long) noexcept(true);
long lrintf(float) noexcept(true);
long long llrint(double) noexcept(true);
void *memcpy(void *, const void *, unsigned long) noexcept(true);
void *memset(void *, int, unsigned long) noexcept(true);
}

template <class A, class B> static inline auto min(A a, B b) -> decltype(a + b)
{
    typedef decltype(a + b) T;
    return (T)b < (T)a || (T)a != (T)a ? (T)b : (T)a;
}

template <class A, class B> static inline auto max(A a, B b) -> decltype(a + b)
{
    typedef decltype(a + b) T;
    return (T)b > (T)a || (T)a != (T)a ? (T)b : (T)a;
}

static inline float abs(float x)
{
    return fabsf(x);
}
static inline double abs(double x)
{
    return fabs(x);
}
template <class T> static inline int isnan(T x)
{
    return x != x;
}
template <class T> static inline int isinf(T x)
{
    return __builtin_isinf(x);
}
template <class T> static inline int isfinite(T x)
{
    return __builtin_isfinite(x);
}

/* ---- bits --------------------------------------------------------------------------------- */

template <class To, class From> static inline To emulator_as(From from)
{
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

static inline int __float_as_int(float x)
{
    return emulator_as<int>(x);
}
static inline unsigned __float_as_uint(float x)
{
    return emulator_as<unsigned>(x);
}
static inline float __int_as_float(int x)
{
    return emulator_as<float>(x);
}
static inline float __uint_as_float(unsigned x)
{
    return emulator_as<float>(x);
}
static inline long long __double_as_longlong(double x)
{
    return emulator_as<long long>(x);
}
static inline double __longlong_as_double(long long x)
{
    return emulator_as<double>(x);
}

static inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}
static inline int __popcll(unsigned long long x)
{
    return __builtin_popcountll(x);
}
static inline int __ffs(int x)
{
    return __builtin_ffs(x);
}
static inline int __ffsll(long long x)
{
    return __builtin_ffsll(x);
}
static inline int __clz(int x)
{
    return x ? __builtin_clz((unsigned)x) : 32;
}
static inline int __clzll(long long x)
{
    return x ? __builtin_clzll((unsigned long long)x) : 64;
}

static inline unsigned __brev(unsigned x)
{
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}

/* Byte i of the result is byte (selector >> 4 i) & 7 of y:x; bit 3 spreads its sign. */
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector)
{
    const unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned select = selector >> 4 * i & 15;
        unsigned byte = (unsigned)(both >> 8 * (select & 7)) & 0xff;
        if (select & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << 8 * i;
    }
    return result;
}

static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift)
{
    return (unsigned)(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}

static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift)
{
    return (unsigned)(((unsigned long long)high << 32 | low) >> (shift & 31));
}

static inline int __mulhi(int a, int b)
{
    return (int)((long long)a * b >> 32);
}
static inline unsigned __umulhi(unsigned a, unsigned b)
{
    return (unsigned)((unsigned long long)a * b >> 32);
}

static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

static inline int __dp4a(int a, int b, int c)
{
    for (int i = 0; i < 4; i++) c += (signed char)(a >> 8 * i) * (signed char)(b >> 8 * i);
    return c;
}

/* ---- conversions: NaN to 0, what does not fit to the nearest that does ------------------------ */

static inline int emulator_to_int(double x)
{
    return x != x              ? 0
           : x >= 2147483647.  ? 2147483647
           : x <= -2147483648. ? -2147483647 - 1
                               : (int)x;
}

static inline unsigned emulator_to_uint(double x)
{
    return !(x > 0) ? 0 : x >= 4294967295. ? 4294967295u : (unsigned)x;
}

static inline int __float2int_rn(float x)
{
    return emulator_to_int(rint(x));
}
static inline int __float2int_rz(float x)
{
    return emulator_to_int(x);
}
static inline int __float2int_rd(float x)
{
    return emulator_to_int(floor(x));
}
static inline int __float2int_ru(float x)
{
    return emulator_to_int(ceil(x));
}
static inline unsigned __float2uint_rn(float x)
{
    return emulator_to_uint(rint(x));
}
static inline unsigned __float2uint_rz(float x)
{
    return emulator_to_uint(x);
}
static inline int __double2int_rn(double x)
{
    return emulator_to_int(rint(x));
}
static inline float __int2float_rn(int x)
{
    return (float)x;
}
static inline float __uint2float_rn(unsigned x)
{
    return (float)x;
}
static inline float __double2float_rn(double x)
{
    return (float)x;
}

/* ---- f32 ---------------------------------------------------------------------------------- */

static inline float __fadd_rn(float a, float b)
{
    volatile float c = a + b;
    return c;
}
static inline float __fsub_rn(float a, float b)
{
    volatile float c = a - b;
    return c;
}
static inline float __fmul_rn(float a, float b)
{
    volatile float c = a * b;
    return c;
}
static inline float __fdiv_rn(float a, float b)
{
    return a / b;
}
static inline float __fmaf_rn(float a, float b, float c)
{
    return fmaf(a, b, c);
}

/* Towards zero: the rounded sum where that is not too large, else the float before it. */
static inline float __fmaf_rz(float a, float b, float c)
{
    const float nearest = fmaf(a, b, c);
    const long double exact = (long double)a * b + c;
    const int away = nearest > 0.f ? nearest > exact : nearest < exact;
    return away ? emulator_as<float>(emulator_as<unsigned>(nearest) - 1) : nearest;
}

static inline float __frcp_rn(float x)
{
    return 1.f / x;
}
static inline float __fsqrt_rn(float x)
{
    return sqrtf(x);
}
static inline float __frsqrt_rn(float x)
{
    return (float)(1. / sqrt((double)x));
}
static inline float __fdividef(float a, float b)
{
    return a / b;
}
static inline float __saturatef(float x)
{
    return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f;
}
static inline float __expf(float x)
{
    return expf(x);
}
static inline float __logf(float x)
{
    return logf(x);
}
static inline float __log2f(float x)
{
    return log2f(x);
}
static inline float __powf(float x, float y)
{
    return powf(x, y);
}
static inline float __sinf(float x)
{
    return sinf(x);
}
static inline float __cosf(float x)
{
    return cosf(x);
}
static inline void __sincosf(float x, float *s, float *c)
{
    *s = sinf(x), *c = cosf(x);
}
static inline void sincosf(float x, float *s, float *c)
{
    *s = sinf(x), *c = cosf(x);
}
static inline float rsqrtf(float x)
{
    return (float)(1. / sqrt((double)x));
}
static inline double rsqrt(double x)
{
    return 1. / sqrt(x);
}
static inline float fdividef(float a, float b)
{
    return a / b;
}

static inline void sincospi(double x, double *s, double *c)
{
    const double turn = x - 2 * rint(x / 2), angle = 3.14159265358979323846 * turn;
    *s = sin(angle);
    *c = cos(angle);
}

static inline void sincospif(float x, float *s, float *c)
{
    double sine, cosine;
    sincospi(x, &sine, &cosine);
    *s = (float)sine;
    *c = (float)cosine;
}

#endif
