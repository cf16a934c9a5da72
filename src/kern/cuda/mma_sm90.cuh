/* mma_sm90.cuh - Hopper's warpgroup products: d += a b with a 64 x 16 of shared memory or registers, b 16 x n of
 * shared memory, d in the f32 registers of the warpgroup's 128 threads; of e4m3, 64 x 32. And what turns 8 bits for
 * them. Functions named after the instruction; like ptx.cuh it has a twin in tests/emulator. sm_90a only.
 *
 * With w = warp of the warpgroup, g = lane / 4, c = lane % 4: d[4 j], d[4 j + 1] are row 16 w + g, columns
 * 8 j + 2 c and the next; d[4 j + 2], d[4 j + 3] the same of row + 8. a[0] is row g, columns 2 c and the next; a[1]
 * row g + 8; a[2], a[3] the same with columns 8 further: so d of one product, rounded to pairs, is a of the next. Of
 * e4m3 a[0] is row g, columns 4 c to 4 c + 3; a[1] row g + 8; a[2], a[3] the same with columns 16 further.
 *
 * Tiles in shared memory have rows of 128 bytes, whose eight 16-byte pieces are exchanged as the copy engine does:
 * piece i of the row at address r lies at i ^ (r / 128) % 8. A row of k ("K-major": Q, K) or of n ("MN-major": V as
 * b); wider ones follow as whole tiles. 8 rows are 1024 bytes. Of e4m3 all are K-major.
 *
 * Where e4m3 products meet a term of 2^13 times their size, in d or beside them, their lower bits are cut off: sums of
 * more than some 128 belong elsewhere.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CUDA_MMA_SM90_H
#define QI_KERN_CUDA_MMA_SM90_H

#include "kern/cuda/ptx.cuh"

/* A tile at `shared`, aligned to 1024 bytes, as products describe it, the same in all lanes: in a register of the
 * warp, or each product would fetch it there. next: bytes to the next tile in the direction of rows, of an MN-major
 * one; otherwise it is not used. */
QI_INLINE u32 wgmma_tile(const void *shared, u32 next)
{
    const u32 low = (shared_address(shared) & 0x3ffff) >> 4 | ((next >> 4) & 0x3fff) << 16;
    return __reduce_max_sync(0xffffffffu, low);
}

/* The operand `bytes` into a tile. */
QI_INLINE u64 wgmma_descriptor(u32 tile, u32 bytes)
{
    const u64 rows_of_8 = 1024, swizzled_128 = 1;
    return (rows_of_8 >> 4 | swizzled_128 << 30) << 32 | (tile + (bytes >> 4));
}

/* Before the first product, and whenever registers of one were written by something else. */
QI_INLINE void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/* Closes the warpgroup's group of products. */
QI_INLINE void wgmma_commit_group()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until at most n groups are under way; n is a constant. */
#define wgmma_wait_group(n) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory")

/* After a wait: reads of an accumulator are not moved across. */
#define wgmma_hold(x) asm volatile("" : "+f"(x)::"memory")

/* Constraints of d[i] and what follows it. */
#define QI_D8(i)                                                                                   \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),    \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define QI_D_32(i) QI_D8(i), QI_D8(i + 8), QI_D8(i + 16), QI_D8(i + 24)
#define QI_D16     QI_D8(0), QI_D8(8)
#define QI_D32     QI_D_32(0)
#define QI_D40     QI_D_32(0), QI_D8(32)
#define QI_D48     QI_D40, QI_D8(40)
#define QI_D64     QI_D_32(0), QI_D_32(32)
#define QI_D96     QI_D64, QI_D_32(64)
#define QI_D128    QI_D96, QI_D_32(96)

/* The names of so many registers. */
#define QI_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define QI_R32                                                                                     \
    QI_R16                                                                                         \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QI_R40                                                                                     \
    QI_R32                                                                                         \
    ", %32, %33, %34, %35, %36, %37, %38, %39"
#define QI_R48                                                                                     \
    QI_R40                                                                                         \
    ", %40, %41, %42, %43, %44, %45, %46, %47"
#define QI_R64                                                                                     \
    QI_R48                                                                                         \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QI_R96                                                                                     \
    QI_R64                                                                                         \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define QI_R128                                                                                    \
    QI_R96                                                                                         \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109"             \
    ", %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122"               \
    ", %123, %124, %125, %126, %127"

/* Both operands K-major in shared memory; d = a b where not `accumulate`. p0 .. p2: numbers of the operands after
 * d's. */
#define QI_WGMMA_SS(n, registers, type, p0, p1, p2)                                                \
    QI_INLINE void wgmma_m64n##n##k16_ss_##type(float *d, u64 a, u64 b, int accumulate)            \
    {                                                                                              \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #p2 ", 0;"                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type             \
                     " {" QI_R##registers "}, %" #p0 ", %" #p1 ", p, 1, 1, 0, 0; }"                \
                     : QI_D##registers                                                             \
                     : "l"(a), "l"(b), "r"(accumulate));                                           \
    }

/* a in registers, b MN-major; adds. */
#define QI_WGMMA_RS(n, registers, type, p0, p1, p2, p3, p4)                                        \
    QI_INLINE void wgmma_m64n##n##k16_rs_##type(float *d, const u32 a[4], u64 b)                   \
    {                                                                                              \
        asm volatile("{ .reg .pred p; setp.eq.b32 p, 0, 0;"                                        \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type             \
                     " {" QI_R##registers "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4     \
                                          ", p, 1, 1, 1; }"                                        \
                     : QI_D##registers                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    }

/* Of e4m3, 32 of k. */
#define QI_WGMMA_SS_E4M3(n, registers, p0, p1, p2)                                                 \
    QI_INLINE void wgmma_m64n##n##k32_ss_e4m3(float *d, u64 a, u64 b, int accumulate)              \
    {                                                                                              \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #p2 ", 0;"                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3"                    \
                     " {" QI_R##registers "}, %" #p0 ", %" #p1 ", p, 1, 1; }"                      \
                     : QI_D##registers                                                             \
                     : "l"(a), "l"(b), "r"(accumulate));                                           \
    }

#define QI_WGMMA_RS_E4M3(n, registers, p0, p1, p2, p3, p4, p5)                                     \
    QI_INLINE void wgmma_m64n##n##k32_rs_e4m3(float *d, const u32 a[4], u64 b, int accumulate)     \
    {                                                                                              \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #p5 ", 0;"                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3"                    \
                     " {" QI_R##registers "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4     \
                                          ", p, 1, 1; }"                                           \
                     : QI_D##registers                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));       \
    }

QI_WGMMA_SS(64, 32, bf16, 32, 33, 34)
QI_WGMMA_SS(64, 32, f16, 32, 33, 34)
QI_WGMMA_SS(80, 40, bf16, 40, 41, 42)
QI_WGMMA_SS(80, 40, f16, 40, 41, 42)
QI_WGMMA_SS(96, 48, bf16, 48, 49, 50)
QI_WGMMA_SS(96, 48, f16, 48, 49, 50)
QI_WGMMA_SS(128, 64, bf16, 64, 65, 66)
QI_WGMMA_SS(128, 64, f16, 64, 65, 66)

QI_WGMMA_RS(64, 32, bf16, 32, 33, 34, 35, 36)
QI_WGMMA_RS(64, 32, f16, 32, 33, 34, 35, 36)
QI_WGMMA_RS(128, 64, bf16, 64, 65, 66, 67, 68)
QI_WGMMA_RS(128, 64, f16, 64, 65, 66, 67, 68)
QI_WGMMA_RS(192, 96, bf16, 96, 97, 98, 99, 100)
QI_WGMMA_RS(192, 96, f16, 96, 97, 98, 99, 100)
QI_WGMMA_RS(256, 128, bf16, 128, 129, 130, 131, 132)
QI_WGMMA_RS(256, 128, f16, 128, 129, 130, 131, 132)

QI_WGMMA_SS_E4M3(64, 32, 32, 33, 34)
QI_WGMMA_SS_E4M3(128, 64, 64, 65, 66)
QI_WGMMA_RS_E4M3(32, 16, 16, 17, 18, 19, 20, 21)
QI_WGMMA_RS_E4M3(64, 32, 32, 33, 34, 35, 36, 37)

/* ---- 8 bits --------------------------------------------------------------------------------- */

/* Four as e4m3, a in the lowest byte; to the nearest, ties to even, larger ones to 448. */
QI_INLINE u32 f32_to_e4m3x4(float a, float b, float c, float d)
{
    u32 bits;
    asm("{ .reg .b16 low, high;"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;"
        "mov.b32 %0, {low, high}; }"
        : "=r"(bits)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return bits;
}

/* The reverse of ldmatrix_x4: row i % 8 of matrix i / 8 goes to lane i's address. */
QI_INLINE void stmatrix_x4(void *row, const u32 r[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

#endif
