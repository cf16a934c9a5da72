/* floats.h - 16-bit and 8-bit floats in C that kernels and the machine share; rounding to nearest, ties to even.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef EMULATOR_FLOATS_H
#define EMULATOR_FLOATS_H

static inline float emulator_float(unsigned bits)
{
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

static inline unsigned emulator_bits(float x)
{
    unsigned bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float emulator_from_bf16(unsigned bits)
{
    return emulator_float(bits << 16);
}

static inline unsigned emulator_to_bf16(float x)
{
    const unsigned bits = emulator_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff; /* the one NaN */
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* f16's exponent, put where f32 has it, is 112 too small: subnormal numbers come out right too. */
static inline float emulator_from_f16(unsigned bits)
{
    const unsigned sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
    if (rest >= 0x0f800000u) return emulator_float(sign | 0x70000000u | rest); /* inf, NaN */
    return emulator_float(sign | emulator_bits(emulator_float(rest) * 0x1p112f));
}

static inline unsigned emulator_to_f16(float x)
{
    const unsigned sign = emulator_bits(x) >> 16 & 0x8000, a = emulator_bits(x) & 0x7fffffffu;
    if (a > 0x7f800000u) return 0x7fff;
    if (a >= 0x477ff000u) return sign | 0x7c00; /* 65520 rounds to infinity */
    if (a < 0x38800000u)                        /* subnormal: a multiple of 2^-24 */
        return sign | (emulator_bits(emulator_float(a) + 0.5f) - 0x3f000000u);
    return sign | (a + 0xfff + (a >> 13 & 1) - 0x38000000u) >> 13;
}

/* e4m3's exponent, put where f16 has it, is 8 too small. */
static inline float emulator_from_e4m3(unsigned bits)
{
    if ((bits & 0x7f) == 0x7f) return emulator_float(0x7fffffffu);
    return emulator_from_f16((bits & 0x80) << 8 | (bits & 0x7f) << 7) * 256.f;
}

/* Larger ones to the largest, 448. */
static inline unsigned emulator_to_e4m3(float x)
{
    const unsigned sign = emulator_bits(x) >> 24 & 0x80, a = emulator_bits(x) & 0x7fffffffu;
    if (a > 0x7f800000u) return 0x7f;
    if (a >= 0x43e00000u) return sign | 0x7e;
    if (a < 0x3c800000u) /* subnormal: a multiple of 2^-9 */
        return sign | (emulator_bits(emulator_float(a) + 0x1p14f) - 0x46800000u);
    return sign | (a + 0x7ffff + (a >> 20 & 1) - 0x3c000000u) >> 20;
}

#endif
