/* argmax.cu - the first index of a row's largest value, NaN counting as -inf: a block a row.
 *
 * JIT constants: DTYPE; VEC, elements of an access; THREADS.
 * Bound: HBM, vocab x size bytes a row.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/sampling/sampling_params.h"

/* Larger is better: a value's bits in the order of values above its index's complement. NaN and -inf are
 * nothing: 0. */
QI_INLINE u64 rank_of(float x, i64 index)
{
    if (!(x > -QI_INFINITY)) return 0;
    const u32 bits = (u32)__float_as_int(x + 0.f); /* -0 becomes +0: they are equal */
    const u32 order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)order << 32 | (u32) ~(u32)index;
}

QI_INLINE u64 larger(u64 a, u64 b)
{
    return a > b ? a : b;
}

QI_KERNEL(argmax, argmax_params)
{
    __shared__ u64 room[THREADS / WARP];
    const char *row = qi_at(p.logits, DTYPE, blockIdx.x * p.logits_stride);
    u64 best = 0;
    for (i64 i = threadIdx.x * VEC; i < p.vocab; i += THREADS * VEC) {
        float x[VEC];
        qi_load(x, qi_at(row, DTYPE, i), DTYPE, VEC);
        for (int e = 0; e < VEC; e++) best = larger(best, rank_of(x[e], i + e));
    }
    for (int step = WARP / 2; step > 0; step /= 2)
        best = larger(best, __shfl_xor_sync(ALL_LANES, best, step));
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = best;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 0; i < THREADS / WARP; i++) best = larger(best, room[i]);
    p.tokens[blockIdx.x] = best ? (i32) ~(u32)best : 0;
}
