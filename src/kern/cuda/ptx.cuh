/* ptx.cuh - the instructions that CUDA C has no word for, a function each, named after the instruction. No
 * other file has assembler, so that the tests can put functions of the same names in this file's place and
 * run kernels on a CPU (tests/emulator).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CUDA_PTX_H
#define QI_KERN_CUDA_PTX_H

#include "kern/abi.h"

#define QI_INLINE static __device__ __forceinline__

/* ---- conversions -------------------------------------------------------------------------- */

QI_INLINE float f16_to_f32(u32 bits)
{
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((u16)bits));
    return x;
}

QI_INLINE u32 f32_to_f16(float x)
{
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

QI_INLINE float bf16_to_f32(u32 bits)
{
    return __int_as_float((int)(bits << 16));
}

QI_INLINE u32 f32_to_bf16(float x)
{
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

/* The larger; NaN if one is. */
QI_INLINE float max_nan(float a, float b)
{
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
}

/* Two at a time, x in the lower half. */
QI_INLINE u32 f32_to_bf16x2(float x, float y)
{
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(y), "f"(x));
    return bits;
}

QI_INLINE u32 f32_to_f16x2(float x, float y)
{
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(y), "f"(x));
    return bits;
}

QI_INLINE u32 hmul2_f16(u32 a, u32 b)
{
    u32 product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

QI_INLINE u32 hadd2_f16(u32 a, u32 b)
{
    u32 sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}

/* The two 8-bit floats in the lower half of `bits` as two f16, exactly; NaN stays NaN. */
QI_INLINE u32 e4m3x2_to_f16x2(u32 bits)
{
#if __CUDA_ARCH__ >= 890
    u32 pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"((u16)bits));
    return pair;
#else /* exponent and mantissa where f16 has them make a number 2^8 too small */
    const u32 wide = (bits & 0xff) | (bits & 0xff00) << 8;
    u32 pair = hmul2_f16((wide & 0x800080) << 8 | (wide & 0x7f007f) << 7, 0x5c005c00);
    if ((wide & 0x7f) == 0x7f) pair |= 0x7fff;
    if ((wide & 0x7f0000) == 0x7f0000) pair |= 0x7fff0000;
    return pair;
#endif
}

QI_INLINE u32 e5m2x2_to_f16x2(u32 bits)
{
    return __byte_perm(bits, 0, 0x1404);
}

/* The two signed bytes in the lower half of `bits`: as the last bits of 1024 + 128 + x. */
QI_INLINE u32 i8x2_to_f16x2(u32 bits)
{
    return hadd2_f16(__byte_perm(bits ^ 0x8080, 0x64646464, 0x4140), 0xe480e480);
}

/* 2^x, within 2 units of the last place; subnormal results are 0. */
QI_INLINE float ex2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* log2(x), within 2^-22, or as much of itself where that is more; of a subnormal number -infinity. */
QI_INLINE float lg2(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1 / x, within 1 unit of the last place; of a subnormal number infinity. */
QI_INLINE float rcp(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* ---- registers ---------------------------------------------------------------------------- */

/* threadIdx.x, read at this place: what follows from it takes no registers through a loop around. */
QI_INLINE int tid_x()
{
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    __builtin_assume(x >= 0 && x < 1024);
    return x;
}

/* ---- shared memory and the tensor cores --------------------------------------------------- */

QI_INLINE u32 shared_address(const void *p)
{
    return (u32)__cvta_generic_to_shared(p);
}

/* Four 8x8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8; of matrix
 * m, lane l receives row l / 4, elements 2 (l % 4) and the next, in r[m]. */
QI_INLINE void ldmatrix_x4(u32 r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* The same of the transposed matrices: column l / 4, rows 2 (l % 4) and the next. */
QI_INLINE void ldmatrix_x4_trans(u32 r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* Transposes the 8x8 matrix that a warp holds as ldmatrix gives one. */
QI_INLINE u32 movmatrix_trans(u32 r)
{
    u32 t;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(r));
    return t;
}

/* d += a b, a 16x16, b 16x8, d 16x8 in f32. With g = lane / 4, c = lane % 4: d[0], d[1] are row g, columns
 * 2c, 2c + 1; d[2], d[3] row g + 8. a[0] row g, columns 2c, 2c + 1; a[1] row g + 8; a[2], a[3] the same
 * with columns 8 further. b[0] rows 2c, 2c + 1 of column g; b[1] rows 8 further. */
QI_INLINE void mma_m16n8k16_bf16(float d[4], const u32 a[4], u32 b0, u32 b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

QI_INLINE void mma_m16n8k16_f16(float d[4], const u32 a[4], u32 b0, u32 b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* ---- asynchronous copies ------------------------------------------------------------------ */

/* 16 bytes to shared memory past L1; of them the first `bytes` (0 to 16) are read, the rest becomes 0. */
QI_INLINE void cp_async_16(void *to, const void *from, u32 bytes)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
}

/* The same where `on`, without a branch around it, which other instructions would not be moved across. */
QI_INLINE void cp_async_16_if(int on, void *to, const void *from, u32 bytes)
{
    asm volatile(
        "{ .reg .pred on; setp.ne.s32 on, %3, 0;"
        "@on cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2; }" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(on)
        : "memory");
}

/* The same of what is not read again soon: it goes from L2 before anything else. */
QI_INLINE void cp_async_16_evict_first(void *to, const void *from, u32 bytes)
{
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "l"(policy)
                 : "memory");
}

/* Closes this thread's group of copies. */
QI_INLINE void cp_async_commit_group()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most n of this thread's groups are under way; n is a constant. */
#define cp_async_wait_group(n) asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory")

/* Brings the line at p into L2. */
QI_INLINE void prefetch_l2(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* Adds in global memory, and returns what was there. Whoever sees the new number also sees what this thread,
 * and those it had a barrier with, wrote before; and the other way round. */
QI_INLINE int atom_add_acq_rel(int *to, int value)
{
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(to), "r"(value)
                 : "memory");
    return before;
}

/* ---- dependent launches ------------------------------------------------------------------- */

/* Waits for what precedes this kernel in its stream; then its results are visible. A kernel launched with
 * overlaps_before must call it before it reads or writes what others do. */
QI_INLINE void griddepcontrol_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Lets the next kernel of the stream, if it may overlap, begin. */
QI_INLINE void griddepcontrol_launch_dependents()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif
