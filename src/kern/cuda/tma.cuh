/* tma.cuh - Hopper's copy engine and what goes with it: barriers in shared memory that count bytes, named
 * barriers, and registers that warps hand each other. A function each, named after the instruction; like
 * ptx.cuh it has a twin in tests/emulator. sm_90a and up.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CUDA_TMA_H
#define QI_KERN_CUDA_TMA_H

#include "kern/cuda/ptx.cuh"
#include "kern/tensor_map.h"

/* ---- barriers in shared memory -------------------------------------------------------------- */

/* A phase of it ends after `count` arrivals, when all bytes that it expects have come. By one thread, before
 * mbarrier_fence_init() and a barrier of the block. */
QI_INLINE void mbarrier_init(u64 *barrier, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(count)
                 : "memory");
}

/* Its memory may be used for something else from the next barrier of the block on. By one thread, when nobody waits for
 * it or will. */
QI_INLINE void mbarrier_inval(u64 *barrier)
{
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

QI_INLINE void mbarrier_fence_init()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

QI_INLINE void mbarrier_arrive(u64 *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

/* Arrives, and makes the phase wait for so many bytes more. */
QI_INLINE void mbarrier_arrive_expect_tx(u64 *barrier, int bytes)
{
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

/* Has the phase of this parity ended? Phases count from 0; before its first one ends, a barrier is in the state
 * that follows a phase of parity 1. */
QI_INLINE int mbarrier_test_wait(u64 *barrier, u32 parity)
{
    int done;
    asm volatile("{ .reg .pred p;"
                 "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;"
                 "selp.s32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
    return done;
}

/* Waits until it has. */
QI_INLINE void mbarrier_wait(u64 *barrier, u32 parity)
{
    asm volatile("{ .reg .pred p;\n"
                 "again_%=:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done_%=;\n"
                 "bra again_%=;\n"
                 "done_%=:\n }" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* ---- copies --------------------------------------------------------------------------------- */

/* The box of `map` at coordinates x (elements of a row), y, z, w to shared memory; its bytes count at
 * `barrier`. What lies outside the tensor becomes 0. */
QI_INLINE void tma_load_4d(void *to, const qi_tensor_map *map, u64 *barrier, int x, int y, int z,
                           int w)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
                 "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}

/* A box of five axes, which is the first to leave L2 again. */
QI_INLINE void tma_load_5d_evict_first(void *to, const qi_tensor_map *map, u64 *barrier, int x,
                                       int y, int z, int w, int u)
{
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w), "r"(u), "l"(policy)
        : "memory");
}

/* The box of `map` at these coordinates, none of them negative, from shared memory; of what lies past the tensor nothing
 * is written. */
QI_INLINE void tma_store_4d(const qi_tensor_map *map, const void *from, int x, int y, int z, int w)
{
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group "
                 "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}

/* Waits until this thread's stores have read shared memory. */
QI_INLINE void tma_await_reads()
{
    asm volatile("cp.async.bulk.commit_group;\n"
                 "cp.async.bulk.wait_group.read 0;" ::
                     : "memory");
}

QI_INLINE void tma_prefetch_map(const qi_tensor_map *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* Makes this thread's ordinary writes to shared memory seen by the copy engine and by wgmma, once there has
 * been a barrier after it. */
QI_INLINE void fence_proxy_async()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- threads ---------------------------------------------------------------------------------- */

/* A barrier of `threads` threads, whole warps; id 1 to 15. */
QI_INLINE void bar_sync(int id, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* Registers of each thread of this warpgroup from here on; n is a constant, a multiple of 8. */
#define setmaxnreg_dec(n) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n))
#define setmaxnreg_inc(n) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n))

/* A value that all lanes have, in a register of the warp. */
QI_INLINE u32 uniform(u32 x)
{
    return __reduce_max_sync(0xffffffffu, x);
}

#endif
