/* maxima.cuh - a bound below a row's k-th largest value, from the largest values of its warps' lanes: THREADS of them, known
 * to all blocks.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_MAXIMA_CUH
#define QI_SAMPLING_MAXIMA_CUH

#include "ops/sampling/exchange.cuh"

enum {
    MAXIMA = WARP / CLUSTER,   /* that a warp contributes */
    MOST_BOUNDED = THREADS / 2 /* the largest k that they bound */
};

/* The includer says if none are to be kept. */
#ifndef SHARES_MAXIMA
#define SHARES_MAXIMA 1
#endif

typedef struct maxima {
    u64 keys[SHARES_MAXIMA ? THREADS / 2 : 1]; /* two in one */
    u32 reach[2][WARPS]; /* by how many keys a guess of each warp is reached */
} maxima;

/* Every warp's MAXIMA largest lanes' keys, in m->keys of all blocks. */
QI_INLINE void share_maxima(place *at, maxima *m, u32 key)
{
#if CLUSTER > 1
    const u32 lane = at->lane, pair = lane / CLUSTER;
    u32 mine = 0;
    for (u32 i = 0; i < MAXIMA; i++) {
        const u32 most = __reduce_max_sync(ALL_LANES, key);
        const u32 first = (u32)__ffs((int)__ballot_sync(ALL_LANES, key == most)) - 1;
        if (lane == i) mine = most;
        if (lane == first) key = 0;
    }
    const u64 upper = __shfl_sync(ALL_LANES, mine, (int)(2 * pair % MAXIMA));
    const u64 both = upper << 32 | __shfl_sync(ALL_LANES, mine, (int)((2 * pair + 1) % MAXIMA));
    const message to = next_message(at);
    expect(to.arrived, THREADS / 2);
    if (pair < MAXIMA / 2)
        send(&m->keys[at->warp * (MAXIMA / 2) + pair], both, to.arrived, lane % CLUSTER);
    await(to.arrived, to.parity);
#else
    ((u32 *)m->keys)[threadIdx.x] = key;
    __syncthreads();
#endif
}

/* What at least k of the maxima reach, and few more. The bracket of the answer is cut into sections: each warp counts
 * what reaches the end of one. */
QI_INLINE u32 bound_of_maxima(maxima *m, u32 k)
{
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 keys[WARPS], low = ~0u, high = 0, turn = 0;
    for (u32 i = 0; i < WARPS; i++) {
        keys[i] = ((const u32 *)m->keys)[i * WARP + lane];
        low = min(low, keys[i]), high = max(high, keys[i]);
    }
    low = __reduce_min_sync(ALL_LANES, low);       /* at least k reach it */
    high = __reduce_max_sync(ALL_LANES, high) + 1; /* fewer do */
    for (u32 count = THREADS; count > k + k / 8 && high - low > 1; turn ^= 1) {
        const u32 step = max((high - low) / (WARPS + 1), 1u), end = low + step * (warp + 1);
        u32 reach = 0;
        for (u32 i = 0; i < WARPS; i++) reach += keys[i] >= end;
        reach = __reduce_add_sync(ALL_LANES, reach);
        if (lane == 0) m->reach[turn][warp] = reach;
        __syncthreads();
        reach = lane < WARPS ? m->reach[turn][lane] : 0;
        const u32 ends = (u32)__popc(__ballot_sync(ALL_LANES, reach >= k)); /* reached by k */
        if (ends > 0) count = __shfl_sync(ALL_LANES, reach, (int)ends - 1);
        if (ends < WARPS) high = low + step * (ends + 1);
        low += step * ends;
    }
    return low;
}

#endif
