/* cluster.cuh - stands in the place of src/kern/cuda/cluster.cuh when kernels run on a CPU: the same functions.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CUDA_CLUSTER_H
#define QI_KERN_CUDA_CLUSTER_H

#include "kern/cuda/ptx.cuh"

QI_INLINE u32 cluster_rank()
{
    return emulator->rank;
}

QI_INLINE void cluster_arrive()
{
    emulator->cluster_arrive();
}

QI_INLINE void cluster_arrive_relaxed()
{
    emulator->cluster_arrive();
}

QI_INLINE void cluster_wait()
{
    emulator->cluster_wait();
}

QI_INLINE void cluster_sync()
{
    cluster_arrive();
    cluster_wait();
}

QI_INLINE void *cluster_at(const void *p, u32 rank)
{
    return emulator->cluster_at(p, rank);
}

QI_INLINE void store_async(u64 *p, u64 value, u64 *barrier, u32 rank)
{
    emulator->store_async(p, value, barrier, rank);
}

#endif
