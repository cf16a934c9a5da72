/* tma.cuh - stands in the place of src/kern/cuda/tma.cuh when kernels run on a CPU: the same functions.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CUDA_TMA_H
#define QI_KERN_CUDA_TMA_H

#include "kern/cuda/ptx.cuh"
#include "kern/tensor_map.h"

/* ---- barriers in shared memory -------------------------------------------------------------- */

QI_INLINE void mbarrier_init(u64 *barrier, int count)
{
    emulator->mbarrier_init(barrier, count);
}

QI_INLINE void mbarrier_inval(u64 *barrier)
{
    emulator->mbarrier_inval(barrier);
}

QI_INLINE void mbarrier_fence_init()
{
}

QI_INLINE void mbarrier_arrive(u64 *barrier)
{
    emulator->mbarrier_arrive(barrier, 0);
}

QI_INLINE void mbarrier_arrive_expect_tx(u64 *barrier, int bytes)
{
    emulator->mbarrier_arrive(barrier, bytes);
}

QI_INLINE int mbarrier_test_wait(u64 *barrier, u32 parity)
{
    return emulator->mbarrier_test(barrier, parity);
}

QI_INLINE void mbarrier_wait(u64 *barrier, u32 parity)
{
    emulator->mbarrier_wait(barrier, parity);
}

/* ---- copies --------------------------------------------------------------------------------- */

QI_INLINE void tma_load_4d(void *to, const qi_tensor_map *map, u64 *barrier, int x, int y, int z,
                           int w)
{
    const int at[] = {x, y, z, w};
    emulator->tensor_load(to, map, barrier, 4, at);
}

QI_INLINE void tma_load_5d_evict_first(void *to, const qi_tensor_map *map, u64 *barrier, int x,
                                       int y, int z, int w, int u)
{
    const int at[] = {x, y, z, w, u};
    emulator->tensor_load(to, map, barrier, 5, at);
}

QI_INLINE void tma_store_4d(const qi_tensor_map *map, const void *from, int x, int y, int z, int w)
{
    const int at[] = {x, y, z, w};
    emulator->tensor_store(map, from, 4, at);
}

QI_INLINE void tma_await_reads()
{
    emulator->tensor_await_stores();
}

QI_INLINE void tma_prefetch_map(const qi_tensor_map *map)
{
    prefetch_l2(map);
}

QI_INLINE void fence_proxy_async()
{
}

/* ---- threads ---------------------------------------------------------------------------------- */

QI_INLINE void bar_sync(int id, int threads)
{
    if (id < 1 || threads < 1) emulator->fault("bar_sync: id or threads below 1");
    emulator->sync_block((u32)id, (u32)threads, 1);
}

#define setmaxnreg_dec(n) static_assert((n) >= 24 && (n) <= 256 && (n) % 8 == 0)
#define setmaxnreg_inc(n) static_assert((n) >= 24 && (n) <= 256 && (n) % 8 == 0)

QI_INLINE u32 uniform(u32 x)
{
    if (__match_any_sync(0xffffffffu, x) != 0xffffffffu)
        emulator->fault("uniform: lanes have other values");
    return x;
}

#endif
