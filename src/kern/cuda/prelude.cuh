/* prelude.cuh - what every CUDA kernel starts from: element types, vector loads and stores, sums over
 * warps and blocks. The C subset of CUDA C++; compiled by NVRTC, where a function without a word
 * before it runs on the device.
 *
 * Types are constants (JIT defines), so that a switch over one leaves a single case.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CUDA_PRELUDE_H
#define QI_KERN_CUDA_PRELUDE_H

#include "kern/cuda/ptx.cuh"

#define QI_KERNEL(name, params_type)                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                          \
        name(const __grid_constant__ params_type p)
#define QI_INFINITY __int_as_float(0x7f800000)
#define QI_LOG2E    1.44269504088896340736f

/* ---- warps and blocks --------------------------------------------------------------------- */

enum { WARP = 32 };
#define ALL_LANES 0xffffffffu

QI_INLINE float warp_sum(float x)
{
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

QI_INLINE float warp_max(float x)
{
    for (int step = WARP / 2; step > 0; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

/* The sum over `warps` warps of a block that stand together, in every thread of them; groups of warps
 * of one block call it together. room: [warps of the block]. */
QI_INLINE float group_sum(float x, int warps, float *room)
{
    x = warp_sum(x);
    if (warps == 1) return x;
    const int warp = threadIdx.x / WARP, first = warp / warps * warps;
    if (threadIdx.x % WARP == 0) room[warp] = x;
    __syncthreads();
    float sum = 0.f;
    for (int i = 0; i < warps; i++) sum += room[first + i];
    __syncthreads(); /* room may be used again */
    return sum;
}

/* A block meets its parameters a line at a time, each after a wait of its own. Those in [begin, end), which it is sure to
 * need, are asked for at once, by `threads`, all of the block's, while the launch before may still run. A warp's lanes
 * ask for one line, since those of several would be brought one after another. What comes is put into shared memory
 * that is free, an int a line, so that it is not left out. */
QI_INLINE void touch_parameters(const void *begin, const void *end, const int threads,
                                volatile int *free)
{
    enum { LINE_OF_CONSTANTS = 64 };
    const int lines =
        (int)((const char *)end - (const char *)begin + LINE_OF_CONSTANTS - 1) / LINE_OF_CONSTANTS;
#pragma unroll
    for (int i = 0; i < lines; i += threads / WARP) {
        const int line = i + (int)threadIdx.x / WARP;
        if (line < lines)
            free[line] = *(const int *)((const char *)begin + line * LINE_OF_CONSTANTS);
    }
}

/* ---- element types ------------------------------------------------------------------------ */

QI_INLINE constexpr int qi_size_of(const int t)
{
    return t == QI_F32 || t == QI_I32                                 ? 4
           : t == QI_F16 || t == QI_BF16                              ? 2
           : t == QI_E4M3 || t == QI_E5M2 || t == QI_I8 || t == QI_U8 ? 1
                                                                      : 8;
}

QI_INLINE const char *qi_at(const void *base, const int t, i64 index)
{
    return (const char *)base + index * qi_size_of(t);
}

QI_INLINE char *qi_to(void *base, const int t, i64 index)
{
    return (char *)base + index * qi_size_of(t);
}

/* e5m2 is the upper half of f16. e4m3 has a sign, 4 bits of exponent (bias 7) and 3 of mantissa: put
 * where f16 has them (bias 15), they make a number 2^8 too small, subnormals too; 0x7f is NaN. */
QI_INLINE float fp8_to_f32(u32 bits, const int t)
{
    if (t == QI_E5M2) return f16_to_f32(bits << 8);
    if ((bits & 0x7f) == 0x7f) return __int_as_float(0x7fffffff);
    return f16_to_f32((bits & 0x80) << 8 | (bits & 0x7f) << 7) * 256.f;
}

/* To the nearest, ties to even, larger values to the largest, NaN to NaN. Adding a power of two rounds
 * at the last bit that the result keeps. */
QI_INLINE u32 f32_to_fp8(float x, const int t)
{
    const u32 sign = ((u32)__float_as_int(x) >> 24) & 0x80;
    const float a = fabsf(x), largest = t == QI_E4M3 ? 448.f : 57344.f;
    const int mantissa = t == QI_E4M3 ? 3 : 2, bias = t == QI_E4M3 ? 7 : 15;
    if (!(a == a)) return 0x7f;
    if (a >= largest) return sign | (t == QI_E4M3 ? 0x7e : 0x7b);
    int exponent = (__float_as_int(a) >> 23) - 127;
    if (exponent < 1 - bias) exponent = 1 - bias; /* subnormal */
    const float units =
        __int_as_float((mantissa - exponent + 127) << 23); /* of the last bit, in 1 */
    const int n = __float2int_rn(a * units);               /* an exact product */
    return sign | (u32)(n + ((exponent + bias - 1) << mantissa));
}

/* Nearest, ties to even, within +-127; 0 for NaN. */
QI_INLINE u32 f32_to_i8(float x)
{
    const int n = __float2int_rn(fminf(fmaxf(x, -127.f), 127.f));
    return x == x ? (u32)n & 0xff : 0;
}

/* Element i of a row of n <= 16 bytes' worth of raw words. */
QI_INLINE float qi_unpack(const u32 *words, const int t, int i)
{
    if (t == QI_F32) return __int_as_float((int)words[i]);
    if (t == QI_F16) return f16_to_f32(words[i / 2] >> i % 2 * 16);
    if (t == QI_BF16)
        return i % 2 ? __int_as_float((int)(words[i / 2] & 0xffff0000u))
                     : bf16_to_f32(words[i / 2]);
    const u32 byte = words[i / 4] >> i % 4 * 8 & 0xff;
    return t == QI_I8 ? (float)(i8)byte : fp8_to_f32(byte, t);
}

/* Words of registers that n raw elements take. */
QI_INLINE constexpr int qi_words(const int t, const int n)
{
    return (n * qi_size_of(t) + 3) / 4;
}

/* Loads n consecutive elements (1, 2, 4, 8 or 16) as they are from an address aligned to all of them, or to
 * 16 bytes where they are more. */
QI_INLINE void qi_load_words(u32 *words, const void *from, const int t, const int n)
{
    const int bytes = n * qi_size_of(t);
    if (bytes >= 16) {
        for (int i = 0; i < bytes / 16; i++) {
            const uint4 v = ((const uint4 *)from)[i];
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z,
                      words[4 * i + 3] = v.w;
        }
    } else if (bytes == 8) {
        const uint2 v = *(const uint2 *)from;
        words[0] = v.x, words[1] = v.y;
    } else if (bytes == 4) {
        words[0] = *(const u32 *)from;
    } else if (bytes == 2) {
        words[0] = *(const u16 *)from;
    } else {
        words[0] = *(const u8 *)from;
    }
}

/* n raw elements as f32. */
QI_INLINE void qi_unpack_all(float *out, const u32 *words, const int t, const int n)
{
    for (int i = 0; i < n; i++) out[i] = qi_unpack(words, t, i);
}

/* Both at once. */
QI_INLINE void qi_load(float *out, const void *from, const int t, const int n)
{
    u32 words[16];
    qi_load_words(words, from, t, n);
    qi_unpack_all(out, words, t, n);
}

QI_INLINE u32 qi_pack(float x, const int t)
{
    if (t == QI_F16) return f32_to_f16(x);
    if (t == QI_BF16) return f32_to_bf16(x);
    if (t == QI_I8) return f32_to_i8(x);
    return f32_to_fp8(x, t);
}

/* The reverse of qi_load_words. */
QI_INLINE void qi_store_words(void *to, const u32 *words, const int t, const int n)
{
    const int bytes = n * qi_size_of(t);
    if (bytes >= 16) {
        for (int i = 0; i < bytes / 16; i++)
            ((uint4 *)to)[i] =
                make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    } else if (bytes == 8) {
        *(uint2 *)to = make_uint2(words[0], words[1]);
    } else if (bytes == 4) {
        *(u32 *)to = words[0];
    } else if (bytes == 2) {
        *(u16 *)to = (u16)words[0];
    } else {
        *(u8 *)to = (u8)words[0];
    }
}

/* The reverse of qi_load. */
QI_INLINE void qi_store(void *to, const float *in, const int t, const int n)
{
    u32 words[16];
    if (t == QI_F32) {
        for (int i = 0; i < n; i++) words[i] = (u32)__float_as_int(in[i]);
    } else if (qi_size_of(t) == 2 && n > 1) {
        for (int i = 0; i < n / 2; i++)
            words[i] = t == QI_F16 ? f32_to_f16x2(in[2 * i], in[2 * i + 1])
                                   : f32_to_bf16x2(in[2 * i], in[2 * i + 1]);
    } else {
        const int per_word = 4 / qi_size_of(t);
        for (int i = 0; i < n; i++) {
            const u32 bits = qi_pack(in[i], t) << i % per_word * 8 * qi_size_of(t);
            words[i / per_word] = i % per_word ? words[i / per_word] | bits : bits;
        }
    }
    qi_store_words(to, words, t, n);
}

/* One element of a type known at run time only. */
QI_INLINE float qi_load1(const void *from, int t)
{
    float x;
    switch (t) {
    case QI_F32: qi_load(&x, from, QI_F32, 1); break;
    case QI_F16: qi_load(&x, from, QI_F16, 1); break;
    case QI_BF16: qi_load(&x, from, QI_BF16, 1); break;
    case QI_E4M3: qi_load(&x, from, QI_E4M3, 1); break;
    case QI_E5M2: qi_load(&x, from, QI_E5M2, 1); break;
    default: qi_load(&x, from, QI_I8, 1); break;
    }
    return x;
}

QI_INLINE void qi_store1(void *to, float x, int t)
{
    switch (t) {
    case QI_F32: qi_store(to, &x, QI_F32, 1); break;
    case QI_F16: qi_store(to, &x, QI_F16, 1); break;
    case QI_BF16: qi_store(to, &x, QI_BF16, 1); break;
    case QI_E4M3: qi_store(to, &x, QI_E4M3, 1); break;
    case QI_E5M2: qi_store(to, &x, QI_E5M2, 1); break;
    default: qi_store(to, &x, QI_I8, 1); break;
    }
}

/* ---- batches ------------------------------------------------------------------------------ */

/* The request whose rows [indptr[r], indptr[r + 1]) hold `row`, -1 if none does. */
QI_INLINE int find_request(const i32 *indptr, int num_requests, i64 row)
{
    if (num_requests == 0 || row >= indptr[num_requests]) return -1;
    int low = 0, high = num_requests; /* indptr[low] <= row < indptr[high] */
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (indptr[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return low;
}

#endif
