/* attention_wgmma.cu - attention on Hopper, for operators that have tiles of many rows. Of a block's first warps LOADERS
 * bring keys, as many values, two prepare items, and for products of e4m3 four transpose values; whole warpgroups follow
 * that compute. Tiles of few rows pass the same way, with a warpgroup's other rows unused, warpgroups in turn: memory is
 * slower than that.
 *
 * JIT constants: HEAD_DIM_QK, HEAD_DIM_VO (to 256), GROUP_SIZE, PAGE_SIZE (0 = ragged), DTYPE_Q, DTYPE_KV, DTYPE_O,
 * CAUSAL, WINDOW, SOFT_CAP, ALIBI, CUSTOM_MASK, SPARSE = 0, MIXED; KEYS of a block; COLUMNS, head_dim_vo in whole 64;
 * PIECE, the keys that one copy brings, 0 where none can; WARPGROUPS that compute; STAGES of the rings; BUFFERS of
 * queries; THREADS: one or two warpgroups load; FP8: products are of e4m3, as q, k and v; QI_VARIANT.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/attention/wgmma_ahead.cuh"
#include "ops/attention/wgmma_loads.cuh"
#include "ops/attention/wgmma_tile.cuh"
#include "ops/attention/wgmma_transpose.cuh"

/* Registers of a thread, of those that the block is launched with: a warpgroup that asks for more waits for ever. */
#define LOADING_GROUPS (THREADS / 128 - WARPGROUPS)
#if WARPGROUPS == 3
#define LOADING_REGISTERS   32
#define COMPUTING_REGISTERS 160
#elif LOADING_GROUPS == 2
#define LOADING_REGISTERS   40
#define COMPUTING_REGISTERS 216
#elif PIECE > 0
#define LOADING_REGISTERS   40
#define COMPUTING_REGISTERS 232
#else
#define LOADING_REGISTERS   56
#define COMPUTING_REGISTERS 224
#endif
_Static_assert(LOADING_REGISTERS *LOADING_GROUPS * 128 + COMPUTING_REGISTERS * CONSUMERS <=
                   65536 / THREADS / 8 * 8 * THREADS,
               "as launched");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention(const __grid_constant__ wgmma_params p)
{
    extern __shared__ __align__(1024) char shared[];
    const int warp = (int)uniform(threadIdx.x / WARP);
    touch_parameters(&p.q_by_tma, END_OF_PARAMETERS(&p.c), THREADS,
                     (int *)item_notes(shared, WGMMA_NOTES - 1));
    if (threadIdx.x == 0) init_barriers(barriers_of(shared));
    __syncthreads();
    if (warp >= 4 * LOADING_GROUPS) look_ahead(&p, (int)threadIdx.x - (THREADS - CONSUMERS));
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    if (warp < 4 * LOADING_GROUPS) {
        setmaxnreg_dec(LOADING_REGISTERS);
        if (warp < LOADERS)
            load_items(&p, shared, 0);
        else if (warp < 2 * LOADERS)
            load_items(&p, shared, 1);
        else if (warp < 2 * LOADERS + ITEM_THREADS / WARP)
            prepare_items(&p, shared, (int)threadIdx.x - PREPARERS_AT);
        else if (FP8)
            transpose_items(&p, shared, warp - 2 * LOADERS - ITEM_THREADS / WARP);
    } else {
        setmaxnreg_inc(COMPUTING_REGISTERS);
        compute_items(&p, shared);
    }
}
