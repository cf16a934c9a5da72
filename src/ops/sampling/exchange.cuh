/* exchange.cuh - sums, maxima and messages between the warps of all blocks that share a row. What is sent takes turns
 * between two places, so that it does not meet readers of what was sent before.
 *
 * Sums are of integers: the same however a row is shared.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_EXCHANGE_CUH
#define QI_SAMPLING_EXCHANGE_CUH

#include "kern/cuda/cluster.cuh"
#include "kern/cuda/tma.cuh"
#include "ops/sampling/weights.h"

/* The includer says how much a block sends, if more than its warps do. */
#ifndef FROM_BLOCK
#define FROM_BLOCK 1
#endif

enum {
    WARPS = THREADS / WARP,
    ALL_WARPS = CLUSTER * WARPS,
    PARTIALS = 3, /* of a warp */
    BY_WARPS = PARTIALS * ALL_WARPS,
    BY_BLOCKS = FROM_BLOCK * CLUSTER,
    MOST_SENT = BY_WARPS > BY_BLOCKS ? BY_WARPS : BY_BLOCKS,
    FEW = THREADS / 4 /* tokens of which a block's threads compare each with all others */
};

/* Threads of a warp that share one of n tokens, at most FEW: a power of 2. */
QI_INLINE u32 threads_of_few(u32 n)
{
    u32 each = THREADS / FEW;
    while (each < WARP && 2 * each * n <= THREADS) each *= 2;
    return each;
}

/* What one thread has to say to all. */
typedef struct notice {
    u64 amount;
    u32 key, index;
} notice;

typedef struct mailbox {
    u64 partials[2][MOST_SENT];
    notice notices[2];
    u64 arrived[2]; /* mbarriers of messages there */
    u64 listed;     /* and of lists */
} mailbox;

enum { LISTED_TURN = 2, PLACE }; /* bits of turns, behind those of arrived[2] */

/* Where a thread stands: its block among those of the row, its warp among all of them. */
typedef struct place {
    mailbox *box;
    u32 rank, warp, lane;
    u32 turns; /* bits: the parities of box->arrived and box->listed; the next of two places */
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

/* Where all send to next: two places take turns. Who sends to one again has what all warps sent to the other, which they
 * did when they had what was sent here before, and had read it. */
QI_INLINE u64 *next_place(place *at)
{
    u64 *const to = at->box->partials[at->turns >> PLACE & 1];
    at->turns ^= 1u << PLACE;
    return to;
}

/* ---- messages ------------------------------------------------------------------------------- */

/* Values of 8 bytes that threads send to places in all blocks. There is no barrier between blocks, and so no fence of all
 * memory, which that is for every warp: a block expects so many values at an mbarrier, and who has awaited it sees
 * them, but not what their senders wrote elsewhere. */
typedef struct message {
    u64 *to, *arrived;
    u32 parity;
} message;

#if CLUSTER > 1
/* By one thread, before the first barrier of the row. */
QI_INLINE void open_mailbox(mailbox *box)
{
    for (int i = 0; i < 2; i++) mbarrier_init(&box->arrived[i], 1);
    mbarrier_init(&box->listed, 1);
    mbarrier_fence_init();
}

QI_INLINE void expect(u64 *arrived, u32 count)
{
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(arrived, (int)(8 * count));
}

QI_INLINE void send(u64 *to, u64 value, u64 *arrived, u32 rank)
{
    store_async(to, value, arrived, rank);
}

QI_INLINE void await(u64 *arrived, u32 parity)
{
    mbarrier_wait(arrived, parity);
}
#else
QI_INLINE void expect(u64 *arrived, u32 count)
{
    (void)arrived, (void)count;
}

QI_INLINE void send(u64 *to, u64 value, u64 *arrived, u32 rank)
{
    (void)arrived, (void)rank;
    *to = value;
}

QI_INLINE void await(u64 *arrived, u32 parity)
{
    (void)arrived, (void)parity;
    __syncthreads();
}
#endif

QI_INLINE message next_message(place *at)
{
    const u32 place = at->turns >> PLACE & 1, parity = at->turns >> place & 1;
    at->turns ^= 1u << place;
    return {next_place(at), &at->box->arrived[place], parity};
}

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
#define DEFINE_WARP_SCAN(name, type)                                                               \
    QI_INLINE type name(type x, u32 lane)                                                          \
    {                                                                                              \
        _Pragma("unroll") for (u32 step = 1; step < WARP; step *= 2)                               \
        {                                                                                          \
            const type below = __shfl_up_sync(ALL_LANES, x, step);                                 \
            if (lane >= step) x += below;                                                          \
        }                                                                                          \
        return x;                                                                                  \
    }
DEFINE_WARP_SCAN(warp_scan, u32)
DEFINE_WARP_SCAN(warp_scan_u64, u64)
DEFINE_WARP_SCAN(warp_scan_f32, float)

/* ---- rows ----------------------------------------------------------------------------------- */

/* Every warp's n values, the same in all its lanes, are sent to all blocks. Returns them, [n][ALL_WARPS]. */
QI_INLINE const u64 *exchange(place *at, const u64 *values, const int n)
{
    u64 *const to = next_place(at);
    if (at->lane < CLUSTER) {
        u64 *const there = (u64 *)at_block(to + at->warp, at->lane);
        for (int i = 0; i < n; i++) there[i * ALL_WARPS] = values[i];
    }
    sync_row();
    return to;
}

/* exchange() by a message. */
QI_INLINE const u64 *swap(place *at, const u64 *values, const int n)
{
    const message m = next_message(at);
    expect(m.arrived, (u32)(ALL_WARPS * n));
    if (at->lane < CLUSTER)
        for (int i = 0; i < n; i++)
            send(m.to + i * ALL_WARPS + at->warp, values[i], m.arrived, at->lane);
    await(m.arrived, m.parity);
    return m.to;
}

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

/* The sums of a thread's n values over the row; the maximum of one. Where threads are to `meet`, they see what all wrote
 * before. */
QI_INLINE void sum_row(place *at, u64 *values, const int n, const int meet)
{
    for (int i = 0; i < n; i++) values[i] = warp_sum_u64(values[i]);
    const u64 *const sent = meet ? exchange(at, values, n) : swap(at, values, n);
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
    notice *const to = &at->box->notices[at->turns >> PLACE & 1];
    at->turns ^= 1u << PLACE;
    if (sender)
        for (u32 rank = 0; rank < CLUSTER; rank++) *(notice *)at_block(to, rank) = n;
    sync_row();
    return *to;
}

#endif
