/* exchange.cuh - sums, maxima and messages between the warps of all blocks that share a row. One barrier each:
 * what is sent takes turns between two places, so that the next message does not meet readers of this one.
 *
 * Sums are of integers: the same however a row is shared.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_EXCHANGE_CUH
#define QI_SAMPLING_EXCHANGE_CUH

#include "ops/sampling/weights.h"
#if CLUSTER > 1
#include "kern/cuda/cluster.cuh"
#include "kern/cuda/tma.cuh"
#endif

enum { WARPS = THREADS / WARP, ALL_WARPS = CLUSTER * WARPS, PARTIALS = 3 };

/* A message of one thread to all. */
typedef struct notice {
    u64 amount;
    u32 key, index;
} notice;

typedef struct mailbox {
    u64 partials[2][PARTIALS * ALL_WARPS];
    u64 arrived[2]; /* mbarriers of expect() */
    u64 listed;     /* and of what goes to the first block alone (send_rank() in find.cuh) */
    notice notices[2];
} mailbox;

/* Where a thread stands: its block among those of the row, its warp among all of them. */
typedef struct place {
    mailbox *box;
    u32 rank, warp, lane;
    u32 turn;
    u32 parities; /* a bit for each of box->arrived, and box->listed */
} place;

#if CLUSTER > 1
QI_INLINE void sync_row()
{
    cluster_sync();
}
QI_INLINE void *at_block(const void *p, u32 rank)
{
    return cluster_at(p, rank);
}
#else
QI_INLINE void sync_row()
{
    __syncthreads();
}
QI_INLINE void *at_block(const void *p, u32 rank)
{
    return (void *)p;
}
#endif

/* ---- warps ---------------------------------------------------------------------------------- */

QI_INLINE u64 warp_sum_u64(u64 x)
{
    const u32 low = (u32)x & 0xffff, middle = (u32)x >> 16, high = (u32)(x >> 32);
    return ((u64)__reduce_add_sync(ALL_LANES, high) << 32) +
           ((u64)__reduce_add_sync(ALL_LANES, middle) << 16) + __reduce_add_sync(ALL_LANES, low);
}

QI_INLINE u64 warp_max_u64(u64 x)
{
    const u32 high = __reduce_max_sync(ALL_LANES, (u32)(x >> 32));
    const u32 low = __reduce_max_sync(ALL_LANES, (u32)(x >> 32) == high ? (u32)x : 0u);
    return (u64)high << 32 | low;
}

/* The sum of this lane's and lower lanes' values. */
QI_INLINE u64 warp_scan_u64(u64 x, u32 lane)
{
#pragma unroll
    for (u32 step = 1; step < WARP; step *= 2) {
        const u64 below = __shfl_up_sync(ALL_LANES, x, step);
        if (lane >= step) x += below;
    }
    return x;
}

QI_INLINE u32 warp_scan(u32 x, u32 lane)
{
#pragma unroll
    for (u32 step = 1; step < WARP; step *= 2) {
        const u32 below = __shfl_up_sync(ALL_LANES, x, step);
        if (lane >= step) x += below;
    }
    return x;
}

/* ---- rows ----------------------------------------------------------------------------------- */

/* Every warp's n values, the same in all its lanes, are sent to all blocks. Returns them, [n][ALL_WARPS]. */
QI_INLINE const u64 *exchange(place *at, const u64 *values, const int n)
{
    u64 *const to = at->box->partials[at->turn];
    at->turn ^= 1;
    if (at->lane < CLUSTER) {
        u64 *const there = (u64 *)at_block(to + at->warp, at->lane);
        for (int i = 0; i < n; i++) there[i * ALL_WARPS] = values[i];
    }
    sync_row();
    return to;
}

#if CLUSTER > 1
/* By one thread, before the first barrier of the row. */
QI_INLINE void open_mailbox(mailbox *box)
{
    for (int i = 0; i < 2; i++) mbarrier_init(&box->arrived[i], 1);
    mbarrier_init(&box->listed, 1);
    mbarrier_fence_init();
}

/* Messages by st.async, without a barrier, and so without the fence of all memory that a barrier between blocks is: only
 * the values are passed on, not what threads wrote elsewhere. Of `bytes` for every block, which all of its threads await.
 * Returns the mbarrier to be told. */
QI_INLINE u64 *expect(const place *at, u32 bytes)
{
    u64 *const arrived = &at->box->arrived[at->turn];
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(arrived, (int)bytes);
    return arrived;
}

QI_INLINE void await(place *at)
{
    mbarrier_wait(&at->box->arrived[at->turn], at->parities >> at->turn & 1);
    at->parities ^= 1u << at->turn;
    at->turn ^= 1;
}

/* exchange() by such messages. */
QI_INLINE const u64 *swap(place *at, const u64 *values, const int n)
{
    u64 *const to = at->box->partials[at->turn], *const arrived = expect(at, ALL_WARPS * 8 * n);
    if (at->lane < CLUSTER)
        for (int i = 0; i < n; i++)
            store_async(to + i * ALL_WARPS + at->warp, values[i], arrived, at->lane);
    await(at);
    return to;
}
#else
QI_INLINE const u64 *swap(place *at, const u64 *values, const int n)
{
    return exchange(at, values, n);
}
#endif

/* The sum of what all warps sent. */
QI_INLINE u64 sum_sent(const place *at, const u64 *sent)
{
    u64 sum = 0;
#pragma unroll
    for (u32 i = 0; i < ALL_WARPS; i += WARP)
        if (i + at->lane < ALL_WARPS) sum += sent[i + at->lane];
    return warp_sum_u64(sum);
}

/* The sum of what the warps before this one sent. */
QI_INLINE u64 sum_before(const place *at, const u64 *sent)
{
    u64 sum = 0;
#pragma unroll
    for (u32 i = 0; i < ALL_WARPS; i += WARP)
        if (i + at->lane < at->warp) sum += sent[i + at->lane];
    return warp_sum_u64(sum);
}

QI_INLINE u64 max_sent(const place *at, const u64 *sent)
{
    u64 most = 0;
#pragma unroll
    for (u32 i = 0; i < ALL_WARPS; i += WARP)
        if (i + at->lane < ALL_WARPS && sent[i + at->lane] > most) most = sent[i + at->lane];
    return warp_max_u64(most);
}

/* The sums of a thread's n values over the row; the maximum of one. */
QI_INLINE void sum_row(place *at, u64 *values, const int n)
{
    for (int i = 0; i < n; i++) values[i] = warp_sum_u64(values[i]);
    const u64 *const sent = exchange(at, values, n);
    for (int i = 0; i < n; i++) values[i] = sum_sent(at, sent + i * ALL_WARPS);
}

QI_INLINE u64 max_row(place *at, u64 value)
{
    value = warp_max_u64(value);
    return max_sent(at, swap(at, &value, 1));
}

/* What the one thread of the row that is the sender has to say. */
QI_INLINE notice announce(place *at, int sender, notice n)
{
    notice *const to = &at->box->notices[at->turn];
    at->turn ^= 1;
    if (sender)
        for (u32 rank = 0; rank < CLUSTER; rank++) *(notice *)at_block(to, rank) = n;
    sync_row();
    return *to;
}

#endif
