/* argmax.cu - the first index of a row's largest value, NaN counting as -inf: one block a row, or a cluster of them,
 * which take turns in reading it. A thread remembers the first of its accesses that holds its largest value, and looks
 * into it again at the end.
 *
 * JIT constants: DTYPE; VEC, elements of an access; THREADS; CLUSTER, blocks of a row, a power of 2 up to 8, 1 before
 * sm_90.
 * Bound: HBM, vocab x size bytes a row; for few rows latency, with 64 KB under way in a block.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/sampling/exchange.cuh"
#include "ops/sampling/sampling_params.h"

enum { TIMES = 4, WORDS = qi_words(DTYPE, VEC) };

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
    enum { STEP = CLUSTER * THREADS * VEC }; /* elements from a thread's access to its next */
    __shared__ mailbox box;
    const i64 request = blockIdx.x / CLUSTER;
    const char *row = qi_at(p.logits, DTYPE, request * p.logits_stride);
    const u32 vocab = (u32)p.vocab, lane = threadIdx.x % WARP;
    float best = -QI_INFINITY;
    u32 where = 0;
#if CLUSTER > 1
    if (threadIdx.x == 0) open_mailbox(&box);
    cluster_arrive_relaxed();
    const u32 block = cluster_rank();
#else
    const u32 block = 0;
#endif
    place at = {&box, block, block * WARPS + threadIdx.x / WARP, lane, 0};
    griddepcontrol_wait();
    for (u32 i = (at.warp * WARP + lane) * VEC; i < vocab; i += TIMES * STEP) {
        u32 words[TIMES][WORDS];
#pragma unroll
        for (int n = 0; n < TIMES; n++) {
            const u32 first = i + n * STEP;
            if (first < vocab) qi_load_words(words[n], qi_at(row, DTYPE, first), DTYPE, VEC);
        }
#pragma unroll
        for (int n = 0; n < TIMES; n++) {
            const u32 first = i + n * STEP;
            if (first < vocab) look_at(words[n], first, &best, &where);
        }
    }
    u64 rank = 0; /* larger is better; of no number above -inf */
    if (best > -QI_INFINITY) {
        float x[VEC];
        int e = 0;
        qi_load(x, qi_at(row, DTYPE, where), DTYPE, VEC);
        for (int i = VEC - 1; i >= 0; i--)
            if (x[i] == best) e = i;
        rank = (u64)key_of(best) << 32 | ~(where + e);
    }
#if CLUSTER > 1
    cluster_wait();
#endif
    rank = max_row(&at, rank);
    if (block == 0 && threadIdx.x == 0) p.tokens[request] = rank ? (i32) ~(u32)rank : 0;
}
