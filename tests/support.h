/* support.h - what the tests share: seeded random data, tensors over plain arrays, every CPU level.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_SUPPORT_H
#define QKV_TESTS_SUPPORT_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "cuda.h"
#include "qkv/qkv.h"

/* ---- checks ------------------------------------------------------------------------------- */

#define EXPECT_OK(expr)                                                                            \
    do {                                                                                           \
        const qkv_status expect_ = (expr);                                                         \
        if (expect_ != QKV_OK)                                                                     \
            fail_msg("%s: %s: %s", #expr, qkv_status_name(expect_), qkv_last_error());             \
        const int on_gpu_ = test_synchronize();                                                    \
        if (on_gpu_ != 0) fail_msg("%s: the GPU ended with error %d", #expr, on_gpu_);             \
    } while (0)

/* The call fails with this status, and the message contains text. */
#define EXPECT_FAIL(status, text, expr)                                                            \
    do {                                                                                           \
        const qkv_status expect_ = (expr);                                                         \
        if (expect_ != (status) || !strstr(qkv_last_error(), (text)))                              \
            fail_msg("%s: expected %s with \"%s\", got %s: %s", #expr, qkv_status_name(status),    \
                     (text), qkv_status_name(expect_), qkv_last_error());                          \
    } while (0)

/* On a GPU elements are not checked: does the message name one, "(request 1, entry 2)"? */
static inline bool test_unchecked(const char *message)
{
    static const char *const places[] = {"(request ", "(entry ",   "(row ",
                                         "(head ",    "rows of k", " rows, got"};
    for (size_t i = 0; test_on_cuda() && i < sizeof places / sizeof places[0]; i++)
        if (strstr(message, places[i])) return true;
    return false;
}

/* ---- random data: one 64-bit counter hashed (splitmix64) ---------------------- */

static uint64_t test_state;

static inline uint64_t test_u64(void)
{
    uint64_t z = (test_state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* [0, n) */
static inline int64_t test_below(int64_t n)
{
    return (int64_t)(test_u64() % (uint64_t)n);
}

/* [-scale, scale) */
static inline double test_uniform(double scale)
{
    return ((double)(int64_t)(test_u64() >> 11) / 4503599627370496.0 - 1.0) * scale;
}

/* A fresh seed each run, printed; QKV_TEST_SEED repeats one. Call first in main(). */
static inline void test_seed(void)
{
    if (test_on_cuda()) test_cuda_open();
    const char *text = getenv("QKV_TEST_SEED");
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    const uint64_t seed =
        text ? strtoull(text, NULL, 0) : (uint64_t)now.tv_sec * 1000003u + (uint64_t)now.tv_nsec;
    test_state = seed;
    printf("QKV_TEST_SEED=%llu\n", (unsigned long long)seed);
}

/* ---- scalar conversions, by the book ------------------------------------------------------- */

static inline float test_bits_float(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* 2^e, a normal number. Tests convert so many numbers that ldexp() and frexp(), calls, took a fifth of some. */
static inline double test_exp2(int e)
{
    const uint64_t bits = (uint64_t)(e + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

/* The e of a = m * 2^e with m in [1/2, 1); of a subnormal number, that of the smallest normal one. */
static inline int test_exponent(double a)
{
    uint64_t bits;
    memcpy(&bits, &a, sizeof bits);
    const int e = (int)(bits >> 52 & 0x7ff) - 1022;
    return e > -1021 ? e : -1021;
}

static inline uint16_t test_to_bf16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if (f != f) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline double test_f16_value(uint16_t h)
{
    const int exponent = (h >> 10) & 31, mantissa = h & 1023;
    const double sign = h & 0x8000 ? -1 : 1;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? (1024 + mantissa) * test_exp2(exponent - 25) : mantissa * 0x1p-24);
}

static inline uint16_t test_to_f16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    const float a = test_bits_float(bits);
    if (f != f) return 0x7e00;
    if (a >= 65520) return sign | 0x7c00;
    if (a < 0x1p-14f) return sign | (uint16_t)nearbyintf(a * 0x1p24f); /* 0 .. 1024 units */
    bits -= (127 - 15) << 23;
    return sign | (uint16_t)((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

/* An 8-bit float: a sign, an exponent with this bias, mantissa_bits. Codes past `largest` are e4m3's
 * NaN, or e5m2's infinity and NaNs. */
typedef struct test_fp8 {
    int mantissa_bits, bias, largest;
} test_fp8;

enum { TEST_E4M3 = 10, TEST_E5M2 = 12 }; /* DLPack's codes */

static inline test_fp8 test_fp8_of(DLDataType t)
{
    return t.code == TEST_E4M3 ? (test_fp8){3, 7, 0x7e} : (test_fp8){2, 15, 0x7b};
}

static inline double test_fp8_value(test_fp8 f, uint8_t h)
{
    const int one = 1 << f.mantissa_bits;
    const int exponent = (h & 0x7f) >> f.mantissa_bits, mantissa = h & (one - 1);
    const double sign = h & 0x80 ? -1 : 1;
    if ((h & 0x7f) > f.largest)
        return f.mantissa_bits == 2 && mantissa == 0 ? sign * INFINITY : (double)NAN;
    const int unit = (exponent ? exponent : 1) - f.bias - f.mantissa_bits;
    return sign * (exponent ? one + mantissa : mantissa) * test_exp2(unit);
}

/* To the nearest, ties to even; what is too large, to the largest. */
static inline uint8_t test_to_fp8(test_fp8 f, double x)
{
    const int one = 1 << f.mantissa_bits, lowest = 1 - f.bias - f.mantissa_bits;
    const uint8_t sign = signbit(x) ? 0x80 : 0;
    const double a = fabs(x);
    if (x != x) return 0x7f;
    if (a >= test_fp8_value(f, (uint8_t)f.largest)) return sign | (uint8_t)f.largest;
    if (a == 0) return sign;
    const int e = test_exponent(a);
    const int unit = e - 1 - f.mantissa_bits < lowest ? lowest : e - 1 - f.mantissa_bits;
    const int n = (int)nearbyint(a * test_exp2(-unit)); /* 0 .. 2 * one units */
    return (uint8_t)(sign | (n + (unit - lowest) * one));
}

static inline double test_8bit_value(DLDataType t, uint8_t c)
{
    return t.code == 0 ? (double)(int8_t)c : test_fp8_value(test_fp8_of(t), c);
}

static inline size_t test_bytes(DLDataType t)
{
    return t.bits / 8u;
}

static inline double test_get(const void *data, DLDataType t, int64_t i)
{
    if (t.bits == 8) return test_8bit_value(t, ((const uint8_t *)data)[i]);
    if (t.code == 2 && t.bits == 32) return (double)((const float *)data)[i];
    const uint16_t h = ((const uint16_t *)data)[i];
    return t.code == 4 ? (double)test_bits_float((uint32_t)h << 16) : test_f16_value(h);
}

/* 8-bit types saturate, i8 at 127 either way; an integer of NaN is 0. */
static inline void test_put(void *data, DLDataType t, int64_t i, double value)
{
    if (t.code == 0)
        ((int8_t *)data)[i] = (int8_t)(isnan(value) ? 0 : nearbyint(fmax(-127, fmin(127, value))));
    else if (t.bits == 8)
        ((uint8_t *)data)[i] = test_to_fp8(test_fp8_of(t), value);
    else if (t.code == 2 && t.bits == 32)
        ((float *)data)[i] = (float)value;
    else
        ((uint16_t *)data)[i] =
            t.code == 4 ? test_to_bf16((float)value) : test_to_f16((float)value);
}

/* Half the distance of neighbouring numbers at 1: the rounding of one store. */
static inline double test_eps(DLDataType t)
{
    if (t.code == 0) return 0.5;
    if (t.bits == 8) return ldexp(0.5, -test_fp8_of(t).mantissa_bits);
    return t.bits == 32 ? 0x1p-24 : t.code == 4 ? 0x1p-8 : 0x1p-11;
}

/* What attention's weights are rounded by, for q and keys of these types: tensor cores multiply them in the
 * type of the keys (8-bit keys as f16), CPU levels that multiply bf16 pairs those of bf16 queries in bf16; 0:
 * they stay in f32. */
static inline double test_weight_eps(const char *device, DLDataType q, DLDataType kv)
{
    const DLDataType bf16 = {4, 16, 1}, f16 = {2, 16, 1};
    if (strncmp(device, "cuda", 4) == 0)
        return q.bits == 32 || kv.bits == 32 ? 0 : test_eps(kv.code == 4 ? bf16 : f16);
    const bool pairs = strstr(device, "bf16") || strstr(device, "amx");
    return pairs && q.code == 4 && (kv.code == 4 || kv.bits == 8) ? test_eps(bf16) : 0;
}

/* Half the distance of the smallest numbers, where it matters. */
static inline double test_tiny(DLDataType t)
{
    if (t.bits == 8) return test_fp8_value(test_fp8_of(t), 1) / 2;
    return t.code == 4 ? 0x1p-134 : t.bits == 16 ? 0x1p-25 : 0;
}

/* The largest number of a type that saturates; of others, infinity. */
static inline double test_largest(DLDataType t)
{
    if (t.bits != 8) return (double)INFINITY;
    return test_fp8_value(test_fp8_of(t), (uint8_t)test_fp8_of(t).largest);
}

/* ---- tensors ------------------------------------------------------------------------------ */

/* A tensor that owns its shape and strides; data by test_tensor_new belongs to it. */
typedef struct test_tensor {
    DLTensor t;
    int64_t shape[8], strides[8];
    void *owned;
} test_tensor;

/* A contiguous tensor over data: TENSOR(data, QKV_F32, 2, 3). */
static inline test_tensor *test_tensor_init(test_tensor *x, void *data, DLDataType dtype, int ndim,
                                            const int64_t *shape)
{
    memset(x, 0, sizeof *x);
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        x->shape[i] = shape[i];
        x->strides[i] = stride;
        stride *= shape[i];
    }
    x->t = (DLTensor){.data = data,
                      .device = test_device(),
                      .ndim = ndim,
                      .dtype = dtype,
                      .shape = x->shape,
                      .strides = x->strides};
    return x;
}

#define TEST_SHAPE(...)                                                                            \
    (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (const int64_t[])                   \
    {                                                                                              \
        __VA_ARGS__                                                                                \
    }
/* A DLTensor * that lives to the end of the enclosing block. */
#define TENSOR(data, dtype, ...)                                                                   \
    (&test_tensor_init(&(test_tensor){.owned = NULL}, (data), (dtype), TEST_SHAPE(__VA_ARGS__))->t)

/* ---- contexts ----------------------------------------------------------------------------- */

#define TEST_CONTEXT_INIT QKV_CONTEXT_OPTIONS_INIT, .device = {test_on_cuda() ? kDLCUDA : kDLCPU, 0}

/* The fastest level of the CPU, or the GPU. */
static inline qkv_status test_context_create(qkv_context **out)
{
    return qkv_context_create(&(qkv_context_options){TEST_CONTEXT_INIT}, out);
}

/* The i-th level of the CPU as qkv_cpu_level has it; on a GPU its only one. */
static inline const char *test_level(int32_t i, int32_t *usable)
{
    if (!test_on_cuda()) return qkv_cpu_level(i, usable);
    *usable = 1;
    return i == 0 ? "cuda" : NULL;
}

/* Calls body(ctx, user) with a context of every level that this machine can run, or the GPU. */
static inline void test_every_level(int32_t num_threads, void (*body)(qkv_context *ctx, void *user),
                                    void *user)
{
    int32_t usable, count = 0;
    const char *level;
    if (test_on_cuda()) {
        qkv_context *ctx;
        EXPECT_OK(test_context_create(&ctx));
        body(ctx, user);
        qkv_context_destroy(ctx);
        return;
    }
    for (int32_t i = 0; (level = qkv_cpu_level(i, &usable)); i++) {
        if (!usable) {
            printf("skipped: this machine cannot run %s\n", level);
            continue;
        }
        qkv_context *ctx;
        EXPECT_OK(qkv_context_create(&(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .isa = level,
                                                            .num_threads = num_threads},
                                     &ctx));
        body(ctx, user);
        qkv_context_destroy(ctx);
        count++;
    }
    assert_true(count > 0);
}

#endif
