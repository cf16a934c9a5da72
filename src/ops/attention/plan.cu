/* plan.cu - the planner on the device, one block whose threads are the lanes of groups.c and schedule.c; and
 * the copy of a plan made on the host.
 *
 * JIT constants: THREADS.
 * Bound: latency. Loads of the batch's arrays, some ten barriers, and stores of the work list.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"

#define QI_LANES
#include "ops/attention/lanes.h"

enum { WARPS = THREADS / WARP };
_Static_assert(WARPS >= NUM_SUMS + NUM_MOST && WARPS <= WARP, "a warp finishes a number of all");

/* Sums up to this lane of the warp. Many are of zeros, as those of partial rows where none is needed. */
QI_INLINE i64 warp_scan(i64 x)
{
    const int lane = threadIdx.x % WARP;
    if (!__any_sync(ALL_LANES, x != 0)) return 0;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const i64 below = __shfl_up_sync(ALL_LANES, x, (u32)step);
        if (lane >= step) x += below;
    }
    return x;
}

/* The largest in the warp of numbers that are not negative. */
QI_INLINE i64 warp_most(i64 x)
{
    const u32 high = (u32)(x >> 32), top = __reduce_max_sync(ALL_LANES, high);
    return (i64)top << 32 | __reduce_max_sync(ALL_LANES, high == top ? (u32)x : 0u);
}

QI_INLINE void lanes_sync(qi_lanes lanes)
{
    __syncthreads();
}

/* Each warp adds its own, and one warp for each number those of the warps. In one place: code that runs again is
 * in the caches then. */
static __device__ __noinline__ void lanes_add(qi_lanes lanes, i64 *values, i64 *totals, i64 *most)
{
    __shared__ i64 sums[NUM_SUMS + NUM_MOST][WARP + 1]; /* before each warp; of all */
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    i64 own[NUM_SUMS], below[NUM_SUMS];
#pragma unroll
    for (int k = 0; k < NUM_SUMS; k++) own[k] = values[k];
#pragma unroll
    for (int k = 0; k < NUM_SUMS; k++) {
        const i64 through = warp_scan(own[k]);
        if (lane == WARP - 1) sums[k][warp] = through;
        below[k] = through - own[k];
    }
#pragma unroll
    for (int k = 0; k < NUM_MOST; k++) {
        const i64 largest = warp_most(most[k]);
        if (lane == 0) sums[NUM_SUMS + k][warp] = largest;
    }
    __syncthreads();
    if (warp < NUM_SUMS + NUM_MOST) {
        const i64 of_warp = lane < WARPS ? sums[warp][lane] : 0;
        const i64 all = warp < NUM_SUMS ? warp_scan(of_warp) : warp_most(of_warp);
        __syncwarp();
        sums[warp][lane] = all - of_warp;
        if (lane == WARP - 1) sums[warp][WARP] = all;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < NUM_SUMS; k++) {
        values[k] = below[k] + sums[k][warp];
        totals[k] = sums[k][WARP];
    }
#pragma unroll
    for (int k = 0; k < NUM_MOST; k++) most[k] = sums[NUM_SUMS + k][WARP];
    __syncthreads();
}

QI_INLINE int lanes_any(qi_lanes lanes, int value)
{
    return __syncthreads_or(value);
}

/* Of numbers below 2^43, none negative. Called once: what it leaves in shared memory is not written again. */
QI_INLINE i64 lanes_sum(qi_lanes lanes, i64 value)
{
    __shared__ i64 sums[WARPS];
    const i64 low = __reduce_add_sync(ALL_LANES, (u32)value & 0xffffu);
    const i64 high = __reduce_add_sync(ALL_LANES, (u32)(value >> 16));
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = (high << 16) + low;
    __syncthreads();
    i64 sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += sums[i];
    return sum;
}

/* Complemented, the smallest is the largest. */
QI_INLINE i64 lanes_min(qi_lanes lanes, i64 value)
{
    i64 none[NUM_SUMS] = {0}, totals[NUM_SUMS];
    i64 most[NUM_MOST] = {0x7fffffffffffffffLL - value, 0};
    lanes_add(lanes, none, totals, most);
    return 0x7fffffffffffffffLL - most[0];
}

QI_INLINE void put_words(void *to, u64 a, u64 b, u64 c, u64 d)
{
    ((ulonglong2 *)to)[0] = make_ulonglong2(a, b);
    ((ulonglong2 *)to)[1] = make_ulonglong2(c, d);
}

/* In double precision where that is exact but for the last unit: the device divides integers step by step. */
static __device__ __noinline__ i64 quotient(i64 a, i64 b)
{
    const u64 bits = (u64)a | (u64)b;
    if (bits >> 32 == 0) return (i64)((u32)a / (u32)b);
    if (bits >> 52 != 0) return a / b;
    const i64 q = (i64)((double)a / (double)b);
    return q * b > a ? q - 1 : q;
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

/* Groups and strips that are noted in shared memory; with more, all are in the plan's. */
enum { NEAR_GROUPS = 288, NEAR_STRIPS = 288 };

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_plan(const __grid_constant__ plan_params p)
{
    __shared__ qi_group groups[NEAR_GROUPS];
    __shared__ qi_span spans[NEAR_GROUPS + 1];
    __shared__ qi_strip strips[NEAR_STRIPS + 1];
    const qi_lanes lanes = {.id = (i32)threadIdx.x, .count = THREADS};
    i64 num_groups = 0;
    QI_ROLLED
    for (i32 l = 0; l < p.batch.num_levels; l++) num_groups += p.batch.level[l].num_requests;
    const int fits = num_groups <= NEAR_GROUPS && p.limits.num_workers <= NEAR_STRIPS;
    const plan_room near = {.groups = fits ? groups : p.plan.groups,
                            .spans = fits ? spans : p.spans,
                            .strips = fits ? strips : p.strips};
    device_plan(lanes, &p, &near);
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
