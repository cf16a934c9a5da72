/* mma_sm90.cuh - stands in the place of src/kern/cuda/mma_sm90.cuh when kernels run on a CPU: the same functions,
 * for every n that the instruction has.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CUDA_MMA_SM90_H
#define QI_KERN_CUDA_MMA_SM90_H

#include "kern/cuda/tma.cuh"

QI_INLINE u32 wgmma_tile(const void *shared, u32 next)
{
    return uniform(emulator->shared_offset(shared) >> 4 | ((next >> 4) & 0x3fff) << 16);
}

QI_INLINE u64 wgmma_descriptor(u32 tile, u32 bytes)
{
    const u64 rows_of_8 = 1024, swizzled_128 = 1;
    return (rows_of_8 >> 4 | swizzled_128 << 30) << 32 | (tile + (bytes >> 4));
}

QI_INLINE void wgmma_fence()
{
}

QI_INLINE void wgmma_commit_group()
{
    emulator->wgmma_commit();
}

#define wgmma_wait_group(n) emulator->wgmma_wait(n)
#define wgmma_hold(x)       ((void)(x))

#define EMULATOR_WGMMA(size, type, of_type)                                                        \
    QI_INLINE void wgmma_m64n##size##k16_ss_##type(float *d, u64 a, u64 b, int accumulate)         \
    {                                                                                              \
        emulator_wgmma w = {d, size, of_type, accumulate != 0, 0, a, b, {0, 0, 0, 0}};             \
        emulator->wgmma(&w);                                                                       \
    }                                                                                              \
    QI_INLINE void wgmma_m64n##size##k16_rs_##type(float *d, const u32 a[4], u64 b)                \
    {                                                                                              \
        emulator_wgmma w = {d, size, of_type, 1, 1, 0, b, {a[0], a[1], a[2], a[3]}};               \
        emulator->wgmma(&w);                                                                       \
    }
#define EMULATOR_WGMMA_E4M3(size)                                                                  \
    QI_INLINE void wgmma_m64n##size##k32_ss_e4m3(float *d, u64 a, u64 b, int accumulate)           \
    {                                                                                              \
        emulator_wgmma w = {d, size, EMULATOR_E4M3, accumulate != 0, 0, a, b, {0, 0, 0, 0}};       \
        emulator->wgmma(&w);                                                                       \
    }                                                                                              \
    QI_INLINE void wgmma_m64n##size##k32_rs_e4m3(float *d, const u32 a[4], u64 b, int accumulate)  \
    {                                                                                              \
        emulator_wgmma w = {d, size, EMULATOR_E4M3,           accumulate != 0, 1,                  \
                            0, b,    {a[0], a[1], a[2], a[3]}};                                    \
        emulator->wgmma(&w);                                                                       \
    }
#define EMULATOR_WGMMA_4(a, b, c, d)                                                               \
    EMULATOR_WGMMA(a, bf16, EMULATOR_BF16)                                                         \
    EMULATOR_WGMMA(b, bf16, EMULATOR_BF16)                                                         \
    EMULATOR_WGMMA(c, bf16, EMULATOR_BF16)                                                         \
    EMULATOR_WGMMA(d, bf16, EMULATOR_BF16)                                                         \
    EMULATOR_WGMMA(a, f16, EMULATOR_F16)                                                           \
    EMULATOR_WGMMA(b, f16, EMULATOR_F16)                                                           \
    EMULATOR_WGMMA(c, f16, EMULATOR_F16)                                                           \
    EMULATOR_WGMMA(d, f16, EMULATOR_F16)                                                           \
    EMULATOR_WGMMA_E4M3(a)                                                                         \
    EMULATOR_WGMMA_E4M3(b)                                                                         \
    EMULATOR_WGMMA_E4M3(c)                                                                         \
    EMULATOR_WGMMA_E4M3(d)
EMULATOR_WGMMA_4(8, 16, 24, 32)
EMULATOR_WGMMA_4(40, 48, 56, 64)
EMULATOR_WGMMA_4(72, 80, 88, 96)
EMULATOR_WGMMA_4(104, 112, 120, 128)
EMULATOR_WGMMA_4(136, 144, 152, 160)
EMULATOR_WGMMA_4(168, 176, 184, 192)
EMULATOR_WGMMA_4(200, 208, 216, 224)
EMULATOR_WGMMA_4(232, 240, 248, 256)
#undef EMULATOR_WGMMA_4
#undef EMULATOR_WGMMA
#undef EMULATOR_WGMMA_E4M3

/* ---- 8 bits --------------------------------------------------------------------------------- */

QI_INLINE u32 f32_to_e4m3x4(float a, float b, float c, float d)
{
    return emulator_to_e4m3(a) | emulator_to_e4m3(b) << 8 | emulator_to_e4m3(c) << 16 |
           emulator_to_e4m3(d) << 24;
}

QI_INLINE void stmatrix_x4(void *row, const u32 r[4])
{
    emulator_stmatrix m = {row, 4, r};
    emulator->sync_warp(0xffffffffu, EMULATOR_STMATRIX, &m);
}

#endif
