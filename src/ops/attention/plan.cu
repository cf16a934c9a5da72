/* plan.cu - the planner on the device, one block whose threads are the lanes of groups.c and schedule.c; and
 * the copy of a plan made on the host.
 *
 * JIT constants: THREADS.
 * Bound: latency. Loads of the batch's arrays, some ten barriers, and stores of the work list.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"

#define QI_LANES
#include "ops/attention/lanes.h"

enum { WARPS = THREADS / WARP, MAX_SUMS = 4 };
_Static_assert(WARPS >= MAX_SUMS && WARPS <= WARP, "a warp adds up the sums of the warps");

/* Sums up to this lane of the warp. */
QI_INLINE i64 warp_scan(i64 x)
{
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const i64 below = __shfl_up_sync(ALL_LANES, x, (u32)step);
        if (lane >= step) x += below;
    }
    return x;
}

QI_INLINE void lanes_sync(qi_lanes lanes)
{
    __syncthreads();
}

/* Four at a time, in one place: code that runs again is in the caches then. Each warp adds its own, and one
 * warp for each of the four the warps' sums. */
static __device__ __noinline__ void add_four(i64 *values, i64 *totals)
{
    __shared__ i64 sums[MAX_SUMS][WARP + 1]; /* before each warp; of all */
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    i64 below[MAX_SUMS];
#pragma unroll
    for (int k = 0; k < MAX_SUMS; k++) {
        const i64 through = warp_scan(values[k]);
        if (lane == WARP - 1) sums[k][warp] = through;
        below[k] = through - values[k];
    }
    __syncthreads();
    if (warp < MAX_SUMS) {
        const i64 of_warp = lane < WARPS ? sums[warp][lane] : 0, through = warp_scan(of_warp);
        __syncwarp();
        sums[warp][lane] = through - of_warp;
        if (lane == WARP - 1) sums[warp][WARP] = through;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < MAX_SUMS; k++) {
        values[k] = below[k] + sums[k][warp];
        totals[k] = sums[k][WARP];
    }
    __syncthreads();
}

QI_INLINE void lanes_add(qi_lanes lanes, i64 *values, i64 *totals, const int n)
{
    i64 in[MAX_SUMS] = {0, 0, 0, 0}, all[MAX_SUMS];
#pragma unroll
    for (int k = 0; k < n; k++) in[k] = values[k];
    add_four(in, all);
#pragma unroll
    for (int k = 0; k < n; k++) {
        values[k] = in[k];
        totals[k] = all[k];
    }
}

QI_INLINE int lanes_any(qi_lanes lanes, int value)
{
    return __syncthreads_or(value);
}

QI_INLINE i64 lanes_min(qi_lanes lanes, i64 value)
{
    __shared__ i64 least;
    if (lanes.id == 0) least = value;
    __syncthreads();
    atomicMin(&least, value);
    __syncthreads();
    value = least;
    __syncthreads();
    return value;
}

QI_INLINE void lanes_lower32(i32 *at, i32 value)
{
    atomicMin(at, value);
}

QI_INLINE void lanes_lower(i64 *at, i64 value)
{
    atomicMin(at, value);
}

QI_INLINE void lanes_raise(i64 *at, i64 value)
{
    atomicMax(at, value);
}

#include "ops/attention/groups.c"
#include "ops/attention/schedule.c"

#include "ops/attention/planner.h"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_plan(const __grid_constant__ plan_params p)
{
    const qi_lanes lanes = {.id = (i32)threadIdx.x, .count = THREADS};
    device_plan(lanes, &p);
}

/* Pulls the pieces of a plan out of the host's memory; each block takes a share of each. */
extern "C" __global__ void __launch_bounds__(UPLOAD_THREADS)
    attention_upload(const __grid_constant__ upload_params p)
{
    const i64 first = (i64)blockIdx.x * UPLOAD_THREADS + threadIdx.x;
    const i64 step = (i64)gridDim.x * UPLOAD_THREADS;
    for (int i = 0; i < p.num_parts; i++) {
        char *to = (char *)p.part[i].to;
        const char *from = (const char *)p.part[i].from;
        const i64 bytes = p.part[i].bytes;
        const i64 vectors = ((i64)to | (i64)from) % 16 == 0 ? bytes / 16 : 0;
        for (i64 n = first; n < vectors; n += step) ((uint4 *)to)[n] = ((const uint4 *)from)[n];
        for (i64 n = vectors * 4 + first; n < bytes / 4; n += step)
            ((u32 *)to)[n] = ((const u32 *)from)[n];
    }
}
