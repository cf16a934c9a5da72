/* simd.h - the vectors that CPU kernels are written in: GCC/Clang vector extensions, with an
 * intrinsic only where they have no word for it (conversions, max, rounding to bf16 pairs).
 *
 * vf holds QI_VW floats: 16 (AVX-512), 8 (AVX2), 4 (NEON). vi holds as many i32; comparisons of vf
 * give vi masks of 0 and -1. Loads and stores need no alignment. a * b + c becomes one FMA: kernels
 * are compiled with -ffp-contract=fast.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CPU_SIMD_H
#define QI_KERN_CPU_SIMD_H

#include "kern/cpu/prelude.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define QI_VW        16
#define QI_NUM_VREGS 32
#elif defined(__AVX2__)
#include <immintrin.h>
#define QI_VW        8
#define QI_NUM_VREGS 16
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#define QI_VW        4
#define QI_NUM_VREGS 32
#else
#error "no vector unit for this level"
#endif

typedef float vf __attribute__((vector_size(QI_VW * 4), may_alias));
typedef i32 vi __attribute__((vector_size(QI_VW * 4), may_alias));
typedef u32 vu __attribute__((vector_size(QI_VW * 4), may_alias));
typedef double vd __attribute__((vector_size(QI_VW * 4), may_alias)); /* QI_VW / 2 of them */
typedef u16 vu16 __attribute__((vector_size(QI_VW * 2), may_alias));  /* half a register */
typedef u8 vu8 __attribute__((vector_size(QI_VW), may_alias));        /* a quarter */

/* ---- plain loads, stores, splats ---------------------------------------------------------- */

QI_INLINE vf vf_load(const float *p)
{
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

QI_INLINE void vf_store(float *p, vf v)
{
    memcpy(p, &v, sizeof v);
}

QI_INLINE vf vf_set1(float x)
{
    return x - (vf){0};
}

QI_INLINE vi vi_set1(i32 x)
{
    return x - (vi){0};
}

QI_INLINE vi vi_load(const i32 *p)
{
    vi v;
    memcpy(&v, p, sizeof v);
    return v;
}

QI_INLINE vf vf_from_i32(vi v)
{
    return __builtin_convertvector(v, vf);
}

/* The integer towards 0, of |x| < 2^31. */
QI_INLINE vi vi_truncate(vf x)
{
    return __builtin_convertvector(x, vi);
}

QI_INLINE i32 vi_sum(vi v)
{
#if QI_VW == 16
    return _mm512_reduce_add_epi32((__m512i)v);
#elif QI_VW == 8
    __m128i x =
        _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    x = _mm_add_epi32(x, _mm_unpackhi_epi64(x, x));
    return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 1)));
#else
    return vaddvq_s32((int32x4_t)v);
#endif
}

/* The lower and the upper half of the lanes as doubles. */
QI_INLINE vd vd_lower(vf v)
{
#if QI_VW == 16
    return (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
#elif QI_VW == 8
    return (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
#else
    return (vd)vcvt_f64_f32(vget_low_f32((float32x4_t)v));
#endif
}

QI_INLINE vd vd_upper(vf v)
{
#if QI_VW == 16
    return (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif QI_VW == 8
    return (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#else
    return (vd)vcvt_high_f64_f32((float32x4_t)v);
#endif
}

/* The reverse, rounded to nearest. */
QI_INLINE vf vf_from_halves(vd lower, vd upper)
{
#if QI_VW == 16
    return (vf)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)lower)),
                                  _mm512_cvtpd_ps((__m512d)upper), 1);
#elif QI_VW == 8
    return (vf)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)upper), _mm256_cvtpd_ps((__m256d)lower));
#else
    return (vf)vcvt_high_f32_f64(vcvt_f32_f64((float64x2_t)lower), (float64x2_t)upper);
#endif
}

QI_INLINE double vd_sum(vd v)
{
#if QI_VW == 16
    return _mm512_reduce_add_pd((__m512d)v);
#elif QI_VW == 8
    const __m128d x =
        _mm_add_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
#else
    return vaddvq_f64((float64x2_t)v);
#endif
}

/* The 32-bit word at p in every lane, whatever it means. */
QI_INLINE vf vf_splat(const void *p)
{
    i32 word;
    memcpy(&word, p, sizeof word);
    return (vf)vi_set1(word);
}

/* {0, 1, 2, ...} */
QI_INLINE vi vi_iota(void)
{
#if QI_VW == 16
    return (vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif QI_VW == 8
    return (vi){0, 1, 2, 3, 4, 5, 6, 7};
#else
    return (vi){0, 1, 2, 3};
#endif
}

/* mask ? a : b, lane by lane */
QI_INLINE vf vf_select(vi mask, vf a, vf b)
{
    return (vf)((mask & (vi)a) | (~mask & (vi)b));
}

/* Is a lane of a mask set? */
QI_INLINE int vi_any(vi mask)
{
#if QI_VW == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif QI_VW == 8
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    return vmaxvq_u32((uint32x4_t)mask) != 0;
#endif
}

QI_INLINE vf vf_max(vf a, vf b)
{
#if QI_VW == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif QI_VW == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#endif
}

QI_INLINE vf vf_min(vf a, vf b)
{
#if QI_VW == 16
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif QI_VW == 8
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b);
#endif
}

/* The larger one; b where a is NaN. */
QI_INLINE vf vf_max_number(vf a, vf b)
{
#if QI_VW == 4
    return vf_max(vf_select(a == a, a, b), b); /* fmaxnm gives NaN for one that signals */
#else
    return vf_max(a, b); /* as the instruction has it */
#endif
}

/* a * b + c, rounded once, whatever the compiler may contract. */
QI_INLINE vf vf_fma(vf a, vf b, vf c)
{
#if QI_VW == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif QI_VW == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}

QI_INLINE vf vf_floor(vf x)
{
#if QI_VW == 16
    return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif QI_VW == 8
    return (vf)_mm256_floor_ps((__m256)x);
#else
    return (vf)vrndmq_f32((float32x4_t)x);
#endif
}

/* A bit a lane of a mask, the lowest for lane 0. */
QI_INLINE u32 vi_bits(vi mask)
{
#if QI_VW == 16
    return _mm512_movepi32_mask((__m512i)mask);
#elif QI_VW == 8
    return (u32)_mm256_movemask_ps((__m256)mask);
#else
    return vaddvq_u32((uint32x4_t)(mask & (vi){1, 2, 4, 8}));
#endif
}

/* The lanes of v whose bits are set, moved to the front; the others are undefined. */
QI_INLINE vf vf_pack(vf v, u32 bits)
{
#if QI_VW == 16
    return (vf)_mm512_maskz_compress_ps((__mmask16)bits, (__m512)v);
#else
/* The numbers of a byte's bits that are set, a byte each, the lowest first. */
#define QI_BELOW(b, i)                                                                             \
    ((b) >> 0 & 1) * ((i) > 0) + ((b) >> 1 & 1) * ((i) > 1) + ((b) >> 2 & 1) * ((i) > 2) +         \
        ((b) >> 3 & 1) * ((i) > 3) + ((b) >> 4 & 1) * ((i) > 4) + ((b) >> 5 & 1) * ((i) > 5) +     \
        ((b) >> 6 & 1) * ((i) > 6)
#define QI_LANE(b, i) (u64)((b) >> (i)&1) * (i) << 8 * (QI_BELOW(b, i))
#define QI_LANES(b)                                                                                \
    QI_LANE(b, 1) | QI_LANE(b, 2) | QI_LANE(b, 3) | QI_LANE(b, 4) | QI_LANE(b, 5) |                \
        QI_LANE(b, 6) | QI_LANE(b, 7)
#define QI_LANES_4(b)  QI_LANES(b), QI_LANES(b + 1), QI_LANES(b + 2), QI_LANES(b + 3)
#define QI_LANES_16(b) QI_LANES_4(b), QI_LANES_4(b + 4), QI_LANES_4(b + 8), QI_LANES_4(b + 12)
#if QI_VW == 8
#define QI_LANES_64(b) QI_LANES_16(b), QI_LANES_16(b + 16), QI_LANES_16(b + 32), QI_LANES_16(b + 48)
    static const u64 lanes[] = {QI_LANES_64(0), QI_LANES_64(64), QI_LANES_64(128),
                                QI_LANES_64(192)};
    const __m128i order = _mm_loadl_epi64((const __m128i *)(lanes + bits));
    return (vf)_mm256_permutevar8x32_ps((__m256)v, _mm256_cvtepu8_epi32(order));
#else
    static const u64 lanes[] = {QI_LANES_16(0)};
    const uint32x4_t order = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(lanes[bits]))));
    const uint8x16_t bytes = vreinterpretq_u8_u32(order * 0x04040404u + 0x03020100u);
    return (vf)vqtbl1q_u8((uint8x16_t)v, bytes);
#endif
#endif
}

QI_INLINE vf vf_abs(vf x)
{
    return (vf)((vi)x & vi_set1(0x7fffffff));
}

/* ---- element types: widen on load, round on store ------------------------------------------ */

QI_INLINE size_t qi_size_of(const qi_dtype t)
{
    return t == QI_F32 || t == QI_I32 ? 4 : t == QI_F16 || t == QI_BF16 ? 2 : t >= QI_I64 ? 8 : 1;
}

/* Element i of an array of t as an address. */
QI_INLINE const char *qi_at(const void *p, const qi_dtype t, i64 i)
{
    return (const char *)p + i * (i64)qi_size_of(t);
}

QI_INLINE vf vf_from_f16(vu16 h)
{
#if QI_VW == 16
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif QI_VW == 8
    return (vf)_mm256_cvtph_ps((__m128i)h);
#else
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)h));
#endif
}

QI_INLINE vf vf_from_bf16(vu16 h)
{
#if QI_VW == 16
    return (vf)((vu)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#elif QI_VW == 8
    return (vf)((vu)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
    return (vf)((vu)vmovl_u16((uint16x4_t)h) << 16);
#endif
}

/* QI_VW bytes at p as f32. e5m2 is the upper half of an f16; e4m3 has the exponent of an f16 2^8
 * times larger, and NaN as its only special value. */
QI_INLINE vf vf_from_8bit(const void *p, const qi_dtype t)
{
#if QI_VW == 16
    const __m128i bytes = _mm_loadu_si128(p);
    if (t == QI_I8) return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    const vu16 h = (vu16)_mm256_cvtepu8_epi16(bytes);
#elif QI_VW == 8
    const __m128i bytes = _mm_loadl_epi64(p);
    if (t == QI_I8) return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    const vu16 h = (vu16)_mm_cvtepu8_epi16(bytes);
#else
    vu8 bytes;
    memcpy(&bytes, p, sizeof bytes);
    const vu16 h = __builtin_convertvector(bytes, vu16);
    if (t == QI_I8)
        return (vf)vcvtq_f32_s32(vmovl_s16(vreinterpret_s16_u16((uint16x4_t)((h ^ 0x80) - 0x80))));
#endif
    if (t == QI_E5M2) return vf_from_f16(h << 8);
    const vu16 nan = (vu16)((h & 0x7f) == 0x7f) & 0x7e00;
    return vf_from_f16((h & 0x80) << 8 | (h & 0x7f) << 7 | nan) * 256.f;
}

/* QI_VW elements of any float type or i8 at p, as f32. Make t a constant where it matters. */
QI_INLINE vf qi_load(const void *p, const qi_dtype t)
{
    if (t == QI_F32) return vf_load(p);
    if (qi_size_of(t) == 1) return vf_from_8bit(p, t);
    vu16 h;
    memcpy(&h, p, sizeof h);
    return t == QI_BF16 ? vf_from_bf16(h) : vf_from_f16(h);
}

/* f32 to the upper 16 bits of a bf16 in the lower half of each lane; nearest even, NaN stays NaN. */
QI_INLINE vu qi_round_bf16(vf v)
{
    const vu bits = (vu)v;
    const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vu nan = (bits >> 16) | 0x40; /* quiet, payload cut */
    const vu is_nan = (vu)(v != v);
    return (is_nan & nan) | (~is_nan & rounded);
}

/* f32 to the code of an 8-bit type in the low byte of each lane: nearest even, saturating at the
 * largest finite value; NaN stays NaN, or 0 in i8. Subnormals, and integers, are rounded by adding a
 * number whose last bit has their weight. */
QI_INLINE vu qi_round_8bit(vf v, const qi_dtype t)
{
    const float largest = t == QI_I8 ? 127.f : t == QI_E4M3 ? 448.f : 57344.f;
    const vf magic = vf_set1(t == QI_I8 ? 12582912.f : t == QI_E4M3 ? 16384.f : 128.f);
    const vf abs = vf_abs(v), a = vf_select(abs > largest, vf_set1(largest), abs);
    const vu bits = (vu)a, sign = (vu)v >> 31, small = (vu)(a + magic) - (vu)magic;
    const vu is_nan = (vu)(v != v);
    if (t == QI_I8) return ~is_nan & ((small ^ (0 - sign)) + sign);
    const int drop = t == QI_E4M3 ? 20 : 21; /* bits of the mantissa that go */
    const u32 bias = t == QI_E4M3 ? 120u << 3 : 112u << 2;
    const vu normal = ((bits + ((1u << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop) - bias;
    const vu is_small = (vu)(a < (t == QI_E4M3 ? 0x1p-6f : 0x1p-14f));
    const vu code = (is_small & small) | (~is_small & normal);
    return (is_nan & 0x7f) | (~is_nan & code) | sign << 7;
}

/* Stores QI_VW values as t (a float type or i8), rounded to nearest even; 8-bit types saturate. */
QI_INLINE void qi_store(void *p, const qi_dtype t, vf v)
{
    if (t == QI_F32) {
        vf_store(p, v);
        return;
    }
    if (qi_size_of(t) == 1) {
#if QI_VW == 16
        _mm_storeu_si128(p, _mm512_cvtepi32_epi8((__m512i)qi_round_8bit(v, t)));
#else
        const vu8 bytes = __builtin_convertvector(qi_round_8bit(v, t), vu8);
        memcpy(p, &bytes, sizeof bytes);
#endif
        return;
    }
#if QI_VW == 16
    vu16 h;
    if (t != QI_BF16)
        h = (vu16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
    else
#if defined(__AVX512BF16__)
        /* The instruction for it makes 0 of subnormals, which class 0x20 is. */
        if (!_mm512_fpclass_ps_mask((__m512)v, 0x20))
            h = (vu16)_mm512_cvtneps_pbh((__m512)v);
        else
#endif
            h = (vu16)_mm512_cvtepi32_epi16((__m512i)qi_round_bf16(v));
#elif QI_VW == 8
    const vu16 h = t == QI_BF16 ? __builtin_convertvector(qi_round_bf16(v), vu16)
                                : (vu16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    const vu16 h = t == QI_BF16 ? (vu16)vmovn_u32((uint32x4_t)qi_round_bf16(v))
                                : (vu16)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v));
#endif
    memcpy(p, &h, sizeof h);
}

/* The first n < QI_VW elements; the other lanes are 0. Reads nothing beyond them. */
QI_INLINE vf qi_load_n(const void *p, const qi_dtype t, i64 n)
{
    float buffer[QI_VW] = {0};
    memcpy(buffer, p, (size_t)n * qi_size_of(t));
    return qi_load(buffer, t);
}

QI_INLINE void qi_store_n(void *p, const qi_dtype t, vf v, i64 n)
{
    float buffer[QI_VW];
    qi_store(buffer, t, v);
    memcpy(p, buffer, (size_t)n * qi_size_of(t));
}

/* One element. */
QI_INLINE float qi_load1(const void *p, const qi_dtype t)
{
    return t == QI_F32 ? *(const float *)p : qi_load_n(p, t, 1)[0];
}

/* Copies n elements of type t to f32, and back. */
QI_INLINE void qi_widen(float *out, const void *in, const qi_dtype t, i64 n)
{
    i64 i = 0;
    for (; i + QI_VW <= n; i += QI_VW) vf_store(out + i, qi_load(qi_at(in, t, i), t));
    if (i < n) qi_store_n(out + i, QI_F32, qi_load_n(qi_at(in, t, i), t, n - i), n - i);
}

QI_INLINE void qi_narrow(void *out, const qi_dtype t, const float *in, i64 n)
{
    i64 i = 0;
    for (; i + QI_VW <= n; i += QI_VW)
        qi_store((char *)out + i * (i64)qi_size_of(t), t, vf_load(in + i));
    if (i < n)
        qi_store_n((char *)out + i * (i64)qi_size_of(t), t, qi_load_n(in + i, QI_F32, n - i),
                   n - i);
}

/* The same for a type known at run time only. */
static inline void qi_widen_any(float *out, const void *in, qi_dtype t, i64 n)
{
    switch (t) {
    case QI_F32: qi_widen(out, in, QI_F32, n); break;
    case QI_F16: qi_widen(out, in, QI_F16, n); break;
    case QI_BF16: qi_widen(out, in, QI_BF16, n); break;
    case QI_E4M3: qi_widen(out, in, QI_E4M3, n); break;
    case QI_E5M2: qi_widen(out, in, QI_E5M2, n); break;
    default: qi_widen(out, in, QI_I8, n); break;
    }
}

static inline void qi_narrow_any(void *out, qi_dtype t, const float *in, i64 n)
{
    switch (t) {
    case QI_F32: qi_narrow(out, QI_F32, in, n); break;
    case QI_F16: qi_narrow(out, QI_F16, in, n); break;
    case QI_BF16: qi_narrow(out, QI_BF16, in, n); break;
    case QI_E4M3: qi_narrow(out, QI_E4M3, in, n); break;
    case QI_E5M2: qi_narrow(out, QI_E5M2, in, n); break;
    default: qi_narrow(out, QI_I8, in, n); break;
    }
}

/* ---- shuffles ----------------------------------------------------------------------------- */

#if defined(__clang__)
#define QI_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define QI_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

/* {v1 v0 v3 v2 ...} */
QI_INLINE vf vf_swap_pairs(vf v)
{
#if QI_VW == 16
    return QI_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif QI_VW == 8
    return QI_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    return QI_SHUFFLE(v, v, 1, 0, 3, 2);
#endif
}

/* Of each 128-bit lane: {a0 b0 a1 b1}, {a2 b2 a3 b3}; as pairs {a01 b01}, {a23 b23}. */
#if QI_VW == 16
#define QI_LANE_LO(a, b) QI_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define QI_LANE_HI(a, b)                                                                           \
    QI_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define QI_PAIR_LO(a, b) QI_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define QI_PAIR_HI(a, b)                                                                           \
    QI_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#elif QI_VW == 8
#define QI_LANE_LO(a, b) QI_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define QI_LANE_HI(a, b) QI_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define QI_PAIR_LO(a, b) QI_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define QI_PAIR_HI(a, b) QI_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define QI_LANE_LO(a, b) QI_SHUFFLE(a, b, 0, 4, 1, 5)
#define QI_LANE_HI(a, b) QI_SHUFFLE(a, b, 2, 6, 3, 7)
#define QI_PAIR_LO(a, b) QI_SHUFFLE(a, b, 0, 1, 4, 5)
#define QI_PAIR_HI(a, b) QI_SHUFFLE(a, b, 2, 3, 6, 7)
#endif

/* Transposes the 4 x 4 block in each 128-bit lane. */
QI_INLINE void vf_transpose_lanes(vf r[4])
{
    const vf a = QI_LANE_LO(r[0], r[1]), b = QI_LANE_HI(r[0], r[1]);
    const vf c = QI_LANE_LO(r[2], r[3]), d = QI_LANE_HI(r[2], r[3]);
    r[0] = QI_PAIR_LO(a, c);
    r[1] = QI_PAIR_HI(a, c);
    r[2] = QI_PAIR_LO(b, d);
    r[3] = QI_PAIR_HI(b, d);
}

#if QI_VW == 8 /* AVX2 shuffles within 128-bit lanes cheaply, across them not */

/* The lanes themselves. */
#define QI_LOWER(a, b) QI_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define QI_UPPER(a, b) QI_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15)

/* Transposes a tile in registers: 4 x 4 blocks within lanes, then the lanes. 24 shuffles. */
QI_INLINE void vf_transpose(vf r[QI_VW])
{
    vf_transpose_lanes(r);
    vf_transpose_lanes(r + 4);
    QI_UNROLL(4)
    for (int i = 0; i < 4; i++) {
        const vf lower = QI_LOWER(r[i], r[i + 4]);
        r[i + 4] = QI_UPPER(r[i], r[i + 4]);
        r[i] = lower;
    }
}

/* Lane i of the result is OP over the lanes of r[i]. Destroys r. The operations form a tree whose shape
 * is the same for every i. */
#define QI_DEFINE_EACH(name, OP)                                                                   \
    QI_INLINE vf name(vf r[QI_VW])                                                                 \
    {                                                                                              \
        QI_UNROLL(4)                                                                               \
        for (int i = 0; i < 8; i += 2)                                                             \
            r[i] = OP(QI_LANE_LO(r[i], r[i + 1]), QI_LANE_HI(r[i], r[i + 1]));                     \
        const vf a = OP(QI_PAIR_LO(r[0], r[2]), QI_PAIR_HI(r[0], r[2]));                           \
        const vf b = OP(QI_PAIR_LO(r[4], r[6]), QI_PAIR_HI(r[4], r[6]));                           \
        return OP(QI_LOWER(a, b), QI_UPPER(a, b));                                                 \
    }

#else

/* {a0 b0 a1 b1 ...} of the lower halves, and of the upper ones. */
QI_INLINE vf vf_zip_lo(vf a, vf b)
{
#if QI_VW == 16
    return QI_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
    return QI_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}

QI_INLINE vf vf_zip_hi(vf a, vf b)
{
#if QI_VW == 16
    return QI_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
    return QI_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

/* Transposes a QI_VW x QI_VW tile in registers: log2(QI_VW) rounds of zipping row i with row
 * i + QI_VW/2, the perfect-shuffle network. */
QI_INLINE void vf_transpose(vf r[QI_VW])
{
    vf t[QI_VW];
    QI_UNROLL(4)
    for (int span = 1; span < QI_VW; span *= 2) {
        QI_UNROLL(8)
        for (int i = 0; i < QI_VW / 2; i++) {
            t[2 * i] = vf_zip_lo(r[i], r[i + QI_VW / 2]);
            t[2 * i + 1] = vf_zip_hi(r[i], r[i + QI_VW / 2]);
        }
        QI_UNROLL(16)
        for (int i = 0; i < QI_VW; i++) r[i] = t[i];
    }
}

#define QI_DEFINE_EACH(name, OP)                                                                   \
    QI_INLINE vf name(vf r[QI_VW])                                                                 \
    {                                                                                              \
        if (QI_VW == 16) QI_ZIP_ROUND(8, OP);                                                      \
        if (QI_VW == 16) QI_ZIP_ROUND(4, OP);                                                      \
        QI_ZIP_ROUND(2, OP);                                                                       \
        QI_ZIP_ROUND(1, OP);                                                                       \
        return r[0];                                                                               \
    }
/* Constant bounds, or r stays in memory. */
#define QI_ZIP_ROUND(n, OP)                                                                        \
    QI_UNROLL(8)                                                                                   \
    for (int i = 0; i < (n); i++)                                                                  \
    r[i] = OP(vf_zip_lo(r[i], r[i + (n)]), vf_zip_hi(r[i], r[i + (n)]))

#endif

#if QI_VW == 16
#define QI_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define QI_ODD  1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define QI_LOW  0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define QI_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif QI_VW == 8
#define QI_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define QI_ODD  1, 3, 5, 7, 9, 11, 13, 15
#define QI_LOW  0, 8, 1, 9, 2, 10, 3, 11
#define QI_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define QI_EVEN 0, 2, 4, 6
#define QI_ODD  1, 3, 5, 7
#define QI_LOW  0, 4, 1, 5
#define QI_HIGH 2, 6, 3, 7
#endif

/* Each 2 * QI_VW elements to their even ones and then their odd ones, and back. */
QI_INLINE void qi_split_pairs(float *x, i64 n)
{
    for (i64 i = 0; i < n; i += 2 * QI_VW) {
        const vf a = vf_load(x + i), b = vf_load(x + i + QI_VW);
        vf_store(x + i, QI_SHUFFLE(a, b, QI_EVEN));
        vf_store(x + i + QI_VW, QI_SHUFFLE(a, b, QI_ODD));
    }
}

QI_INLINE void qi_join_pairs(float *x, i64 n)
{
    for (i64 i = 0; i < n; i += 2 * QI_VW) {
        const vf even = vf_load(x + i), odd = vf_load(x + i + QI_VW);
        vf_store(x + i, QI_SHUFFLE(even, odd, QI_LOW));
        vf_store(x + i + QI_VW, QI_SHUFFLE(even, odd, QI_HIGH));
    }
}

QI_INLINE vf vf_add(vf a, vf b)
{
    return a + b;
}

QI_DEFINE_EACH(vf_sum_each, vf_add)
QI_DEFINE_EACH(vf_max_each, vf_max)

QI_INLINE float vf_sum(vf v)
{
    float x[QI_VW];
    vf_store(x, v);
    for (int n = QI_VW / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) x[i] += x[i + n];
    return x[0];
}

QI_INLINE float vf_max_lane(vf v)
{
#if QI_VW == 16
    return _mm512_reduce_max_ps((__m512)v);
#elif QI_VW == 8
    __m128 x = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
#else
    return vmaxvq_f32((float32x4_t)v);
#endif
}

/* ---- functions ---------------------------------------------------------------------------- */

/* 2^x for x <= 127; 0 below -126.5, NaN for NaN. Within 2 ulp: 2^f on [-1/2, 1/2] by
 * a degree-6 minimax polynomial, times a power of 2 made as bits. (Adding to the exponent as an
 * integer would turn some NaNs into numbers.) */
QI_INLINE vf vf_exp2(vf x)
{
    /* Adding 1.5 * 2^23 rounds to an integer; 127 more make its low bits an exponent. */
    const vf magic = vf_set1(12582912.f + 127.f);
    x = vf_max(vf_set1(-127.f), x); /* whose exponent's bits are 0; NaN stays */
    const vf shifted = x + magic, f = x - (shifted - magic);
    vf p = vf_set1(1.535336206e-4f);
    p = p * f + 1.339887456e-3f;
    p = p * f + 9.618437358e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472029e-1f;
    p = p * f + 1.f;
    return p * (vf)((vu)shifted << 23);
}

/* tanh, within a few ulp: an odd polynomial near 0, (1 - e) / (1 + e) with e = exp(-2|x|) beyond. */
QI_INLINE vf vf_tanh(vf x)
{
    const vf a = vf_abs(x), s = x * x;
    vf p = vf_set1(-5.704985090e-3f);
    p = p * s + 2.063908562e-2f;
    p = p * s - 5.373971461e-2f;
    p = p * s + 1.333144219e-1f;
    p = p * s - 3.333328194e-1f;
    p = (p * s) * x + x;
    const vf e = vf_exp2(a * (-2.f * QI_LOG2E));
    const vf big = (1.f - e) / (1.f + e);
    const vf signed_big = (vf)((vi)big | ((vi)x & vi_set1((i32)0x80000000)));
    return vf_select(a < 0.625f, p, signed_big);
}

/* Brings the line at p towards the L2 cache. */
QI_INLINE void qi_prefetch(const void *p)
{
    __builtin_prefetch(p, 0, 2);
}

QI_INLINE void qi_prefetch_row(const char *row, const i64 bytes)
{
    for (i64 b = 0; b < bytes; b += 64) qi_prefetch(row + b);
}

#endif
