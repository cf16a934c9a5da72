/* ptx.cuh - stands in the place of src/kern/cuda/ptx.cuh when kernels run on a CPU: the same functions.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CUDA_PTX_H
#define QI_KERN_CUDA_PTX_H

#include "kern/abi.h"

#define QI_INLINE static __device__ __forceinline__

/* ---- conversions -------------------------------------------------------------------------- */

QI_INLINE float f16_to_f32(u32 bits)
{
    return emulator_from_f16(bits & 0xffff);
}
QI_INLINE u32 f32_to_f16(float x)
{
    return emulator_to_f16(x);
}
QI_INLINE float bf16_to_f32(u32 bits)
{
    return emulator_from_bf16(bits);
}
QI_INLINE u32 f32_to_bf16(float x)
{
    return emulator_to_bf16(x);
}
QI_INLINE u32 f32_to_bf16x2(float x, float y)
{
    return f32_to_bf16(x) | f32_to_bf16(y) << 16;
}
QI_INLINE u32 f32_to_f16x2(float x, float y)
{
    return f32_to_f16(x) | f32_to_f16(y) << 16;
}

QI_INLINE u32 hmul2_f16(u32 a, u32 b)
{
    return f32_to_f16x2(f16_to_f32(a) * f16_to_f32(b), f16_to_f32(a >> 16) * f16_to_f32(b >> 16));
}

QI_INLINE u32 hadd2_f16(u32 a, u32 b)
{
    return f32_to_f16x2(f16_to_f32(a) + f16_to_f32(b), f16_to_f32(a >> 16) + f16_to_f32(b >> 16));
}

QI_INLINE u32 i8x2_to_f16x2(u32 bits)
{
    return f32_to_f16x2((float)(i8)bits, (float)(i8)(bits >> 8));
}

QI_INLINE float rcp(float x)
{
    return 1.f / x;
}

QI_INLINE u32 emulator_e4m3_to_f16(u32 bits)
{
    return (bits & 0x7f) == 0x7f ? (bits & 0x80) << 8 | 0x7fff
                                 : f32_to_f16(emulator_from_e4m3(bits));
}

QI_INLINE u32 e4m3x2_to_f16x2(u32 bits)
{
    return emulator_e4m3_to_f16(bits & 0xff) | emulator_e4m3_to_f16(bits >> 8 & 0xff) << 16;
}

QI_INLINE u32 e5m2x2_to_f16x2(u32 bits)
{
    return (bits & 0xff) << 8 | (bits & 0xff00) << 16;
}

QI_INLINE float max_nan(float a, float b)
{
    return a != a ? a : b != b ? b : a > b ? a : b;
}

QI_INLINE float ex2(float x)
{
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.f : y;
}

QI_INLINE float lg2(float x)
{
    return log2f(x < 0x1p-126f ? 0.f : x);
}

QI_INLINE int tid_x()
{
    return (int)threadIdx.x;
}

/* ---- shared memory and the tensor cores --------------------------------------------------- */

QI_INLINE void ldmatrix_x4(u32 r[4], const void *row)
{
    emulator_ldmatrix m = {row, 4, r};
    emulator->sync_warp(0xffffffffu, EMULATOR_LDMATRIX, &m);
}

QI_INLINE void ldmatrix_x4_trans(u32 r[4], const void *row)
{
    emulator_ldmatrix m = {row, 4, r};
    emulator->sync_warp(0xffffffffu, EMULATOR_LDMATRIX_TRANS, &m);
}

QI_INLINE u32 movmatrix_trans(u32 r)
{
    emulator_movmatrix m = {r, 0};
    emulator->sync_warp(0xffffffffu, EMULATOR_MOVMATRIX, &m);
    return m.result;
}

QI_INLINE void mma_m16n8k16_bf16(float d[4], const u32 a[4], u32 b0, u32 b1)
{
    emulator_mma m = {d, a, {b0, b1}};
    emulator->sync_warp(0xffffffffu, EMULATOR_MMA_BF16, &m);
}

QI_INLINE void mma_m16n8k16_f16(float d[4], const u32 a[4], u32 b0, u32 b1)
{
    emulator_mma m = {d, a, {b0, b1}};
    emulator->sync_warp(0xffffffffu, EMULATOR_MMA_F16, &m);
}

/* ---- asynchronous copies ------------------------------------------------------------------ */

QI_INLINE void cp_async_16(void *to, const void *from, u32 bytes)
{
    emulator->copy_async(to, from, bytes, 16);
}

QI_INLINE void cp_async_16_if(int on, void *to, const void *from, u32 bytes)
{
    if (on) cp_async_16(to, from, bytes);
}

QI_INLINE void cp_async_16_evict_first(void *to, const void *from, u32 bytes)
{
    cp_async_16(to, from, bytes);
}

QI_INLINE void cp_async_commit_group()
{
    emulator->commit_group();
}

#define cp_async_wait_group(n) emulator->wait_group(n)

QI_INLINE int atom_add_acq_rel(int *to, int value)
{
    return atomicAdd(to, value);
}

/* ---- dependent launches: one after the other here, unless a test plays the one before --------- */

QI_INLINE void griddepcontrol_wait()
{
    emulator->await_turn();
}
QI_INLINE void griddepcontrol_launch_dependents()
{
}

/* Reads, so that an address of nothing is found. */
QI_INLINE void prefetch_l2(const void *p)
{
    (void)*(const volatile char *)p;
}

#endif
