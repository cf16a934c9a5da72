/* argmax.cu - the first index of a row's largest value, NaN counting as -inf: a block a row, which it reads
 * once. A thread remembers the first of its accesses that holds its largest value, and looks into it again
 * at the end.
 *
 * JIT constants: DTYPE; VEC, elements of an access; THREADS.
 * Bound: HBM, vocab x size bytes a row; for few rows what one SM can read, with 64 KB under way.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/sampling/sampling_params.h"

enum { TIMES = 4, WORDS = qi_words(DTYPE, VEC) };

/* Larger is better: a value's bits in the order of values above its index's complement. */
QI_INLINE u64 rank_of(float x, u32 index)
{
    const u32 bits = (u32)__float_as_int(x + 0.f); /* -0 becomes +0: they are equal */
    const u32 order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)order << 32 | ~index;
}

QI_INLINE u64 larger(u64 a, u64 b)
{
    return a > b ? a : b;
}

/* Takes up an access that begins at element i. */
QI_INLINE void look_at(const u32 *words, u32 i, float *best, u32 *where)
{
    float x[VEC], largest = -QI_INFINITY;
    qi_unpack_all(x, words, DTYPE, VEC);
    for (int e = 0; e < VEC; e++) largest = fmaxf(largest, x[e]); /* not NaN */
    if (largest > *best) *best = largest, *where = i;
}

QI_KERNEL(argmax, argmax_params)
{
    __shared__ u64 room[THREADS / WARP];
    const char *row = qi_at(p.logits, DTYPE, blockIdx.x * p.logits_stride);
    const u32 vocab = (u32)p.vocab;
    float best = -QI_INFINITY;
    u32 where = 0;
    griddepcontrol_wait();
    for (u32 i = threadIdx.x * VEC; i < vocab; i += TIMES * THREADS * VEC) {
        u32 words[TIMES][WORDS];
#pragma unroll
        for (int n = 0; n < TIMES; n++) {
            const u32 at = i + n * THREADS * VEC;
            if (at < vocab) qi_load_words(words[n], qi_at(row, DTYPE, at), DTYPE, VEC);
        }
#pragma unroll
        for (int n = 0; n < TIMES; n++) {
            const u32 at = i + n * THREADS * VEC;
            if (at < vocab) look_at(words[n], at, &best, &where);
        }
    }
    u64 rank = 0; /* of no number above -inf */
    if (best > -QI_INFINITY) {
        float x[VEC];
        int e = 0;
        qi_load(x, qi_at(row, DTYPE, where), DTYPE, VEC);
        for (int i = VEC - 1; i >= 0; i--)
            if (x[i] == best) e = i;
        rank = rank_of(best, where + e);
    }
    for (int step = WARP / 2; step > 0; step /= 2)
        rank = larger(rank, __shfl_xor_sync(ALL_LANES, rank, step));
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = rank;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 0; i < THREADS / WARP; i++) rank = larger(rank, room[i]);
    p.tokens[blockIdx.x] = rank ? (i32) ~(u32)rank : 0;
}
