/* cluster.cu - kernels of test_cluster.c.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/cluster.cuh"

#if __CUDA_ARCH__ >= 900

/* In each round every thread stores a message in every block of its cluster, adds to a sum there, and reads a notice
 * of a thread of each; then it writes the sum of all that its block has got. */
extern "C" __global__ void __launch_bounds__(THREADS)
    exchange(const __grid_constant__ cluster_params p)
{
    extern __shared__ __align__(16) i32 inbox[]; /* [cluster_size, THREADS] */
    __shared__ i32 notices[THREADS], sum;
    const i32 me = (i32)threadIdx.x, rank = (i32)cluster_rank();
    const i32 block = (i32)(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
    if (me == 0) sum = 0;
    cluster_sync();
    for (i32 round = 0; round < p.rounds; round++) {
        notices[me] = notice(block, me, round);
        for (i32 r = 0; r < p.cluster_size; r++) {
            *(i32 *)cluster_at(&inbox[rank * THREADS + me], r) = message(block, r, me, round);
            atomicAdd((i32 *)cluster_at(&sum, r), share(block, me, round));
        }
        if (p.mode != FORGETS_BEFORE) cluster_sync();
        i32 got = sum;
        for (i32 r = 0; r < p.cluster_size; r++)
            got +=
                inbox[r * THREADS + me] + *(const i32 *)cluster_at(&notices[(me + r) % THREADS], r);
        if (p.mode != FORGETS_AFTER) cluster_arrive();
        got += __syncthreads_count(votes(block, me));
        p.out[(block * p.rounds + round) * THREADS + me] = got;
        if (p.mode != FORGETS_AFTER) cluster_wait();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    fault(const __grid_constant__ cluster_params p)
{
    extern __shared__ __align__(16) i32 dynamic[];
    __shared__ i32 variable;
    const i32 me = (i32)threadIdx.x, rank = (i32)cluster_rank(), mode = p.mode;
    if (rank == 0 && me == 6) cluster_arrive();
    if (rank == 0 && (me == 5 || me == 6)) return; /* nobody waits for them */
    if (mode == FAULT_ARRIVES_TWICE) cluster_arrive();
    if (mode == FAULT_WAITS_ALONE) cluster_wait();
    if (mode == FAULT_NOT_ALL_ARRIVE && rank == 0 && me == 0) __syncthreads();
    variable = dynamic[me] = 1;
    if (mode == FAULT_USES_FIRST) *(i32 *)cluster_at(&variable, 1 - rank) = 2;
    cluster_sync();
    if (mode == FAULT_NOT_SHARED) cluster_at(p.out, 1);
    if (mode == FAULT_NO_SUCH_BLOCK) cluster_at(&variable, 2);
    if (mode == FAULT_READS_AFTER_END && rank == 0) p.out[me] = *(i32 *)cluster_at(&dynamic[me], 1);
    if (mode == FAULT_WRITES_AFTER_END && rank == 0) *(i32 *)cluster_at(&variable, 1) = 2;
    if (mode == FAULT_USES_LAST && rank == 1) p.out[me] = *(i32 *)cluster_at(&variable, 0);
}

#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    alone(const __grid_constant__ cluster_params p)
{
    p.out[threadIdx.x] = (i32)threadIdx.x;
}
