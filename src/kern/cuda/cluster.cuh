/* cluster.cuh - clusters: blocks that run at the same time and reach each other's shared memory. A function each,
 * named after the instruction; like ptx.cuh it has a twin in tests/emulator. sm_90 and up, in kernels launched
 * with qi_grid's `cluster`.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CUDA_CLUSTER_H
#define QI_KERN_CUDA_CLUSTER_H

#include "kern/cuda/ptx.cuh"

/* Of this block in its cluster, which are consecutive along x: blockIdx.x modulo the cluster's size. */
QI_INLINE u32 cluster_rank()
{
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* A barrier of all threads of the cluster, in two steps that every warp takes in turn, as a whole. What a thread wrote
 * before it arrives, to any block's shared memory, is seen by all that have waited. */
QI_INLINE void cluster_arrive()
{
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

/* The same where nothing but mbarriers was written, and mbarrier_fence_init() called: no fence of all memory. */
QI_INLINE void cluster_arrive_relaxed()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

QI_INLINE void cluster_wait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

QI_INLINE void cluster_sync()
{
    cluster_arrive();
    cluster_wait();
}

/* Where block `rank` of the cluster has what this block has at p, in shared memory: for loads, stores and
 * atomics. That block's memory is there from a cluster's barrier that it has come to until it ends; so there is
 * one before the first use and one after the last. */
QI_INLINE void *cluster_at(const void *p, u32 rank)
{
    void *there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
    return there;
}

/* Stores a value where block `rank` has what this block has at p, and then tells its mbarrier of 8 bytes. Whoever has
 * waited for them there sees the value. */
QI_INLINE void store_async(u64 *p, u64 value, u64 *barrier, u32 rank)
{
    asm volatile(
        "{ .reg .b32 there, told;"
        "mapa.shared::cluster.u32 there, %0, %3;"
        "mapa.shared::cluster.u32 told, %2, %3;"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [there], %1, [told]; }" ::"r"(
            shared_address(p)),
        "l"(value), "r"(shared_address(barrier)), "r"(rank)
        : "memory");
}

#endif
