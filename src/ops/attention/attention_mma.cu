/* attention_mma.cu - attention by mma.sync, for GPUs from sm_80 on. Each block walks its strip of the plan:
 * first its decode tiles, in one stream of keys, then its prefill tiles. The last piece of a cut tile to
 * finish merges it; with several levels all partial rows are merged by a launch of their own, which begins
 * before this one has ended and waits for it.
 *
 * JIT constants: those of decode_mma.cuh and prefill_mma.cuh; DECODE_ROWS, 0 where no tile has few rows;
 * PREFILL, 0 where no tile has many; BLOCKS_PER_SM; QI_VARIANT.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/attention/merge_rows.cuh"
#include "ops/attention/mma_params.h"
#if DECODE_ROWS
#include "ops/attention/decode_ahead.cuh"
#include "ops/attention/decode_mma.cuh"
#endif
#if PREFILL
#include "ops/attention/prefill_mma.cuh"
#endif

/* Can a block begin before the launch's turn, if it is let? With the longest heads it has no registers for that. */
#if DECODE_ROWS && !PREFILL && !MIXED && !SPARSE && HEAD_DIM_VO <= MMA_EARLY_DIM &&                \
    __CUDA_ARCH__ >= 900
#define MAY_BE_EARLY 1
#else
#define MAY_BE_EARLY 0
#endif

/* Is there an item of this kind in [begin, end)? The same in all threads. */
QI_INLINE int any_item(const attention_params *p, int begin, int end, int flags)
{
    int any = 0;
    for (int i = begin + (int)threadIdx.x; i < end; i += THREADS)
        any |= p->plan.work[i].flags == flags;
    return __syncthreads_or(any);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    attention(const __grid_constant__ mma_params p)
{
    extern __shared__ __align__(1024) char shared[];
    const attention_params *a = &p.c.at;
#if DECODE_ROWS
    decode_shared *decode = (decode_shared *)(shared + RINGS_BYTES);
    decode_guess guess;
    decode_guess_nothing(&guess);
    touch_parameters(&p.kv_by_tma, END_OF_PARAMETERS(&p.c), THREADS, (int *)decode->q);
    decode_ring ring = decode_ring_open(&p, shared, decode);
    decode_stream stream;
#endif
    int begin = 0, end = 0;
    const int early = MAY_BE_EARLY && p.early;
#if MAY_BE_EARLY
    if (early) {
        begin = a->plan.work_indptr[blockIdx.x], end = a->plan.work_indptr[blockIdx.x + 1];
        if (begin < end)
            decode_early(&p, begin, min(end - begin, DECODE_ITEMS), &stream, &ring, decode);
    }
#endif
#if DECODE_ROWS && __CUDA_ARCH__ >= 900 /* else no launch overlaps the one before */
    if (!early) decode_ahead(&p.c, (ahead_shared *)shared, &guess);
#endif
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    if (!early) begin = a->plan.work_indptr[blockIdx.x], end = a->plan.work_indptr[blockIdx.x + 1];
    const int one_level = !MIXED || a->plan.header->num_levels == 1;
#if DECODE_ROWS
    if (!PREFILL || any_item(a, begin, end, QI_TILE_DECODE))
        decode_items(&p, begin, end, one_level, early, &guess, &stream, &ring, decode);
#endif
#if PREFILL
    int *is_last = (int *)shared;
#if DECODE_ROWS
    decode_ring_close(&ring);
    if (!any_item(a, begin, end, QI_TILE_PREFILL)) return;
#endif
    for (int i = begin; i < end; i++) {
        const qi_work *w = &a->plan.work[i];
        if (w->flags != QI_TILE_PREFILL) continue;
        prefill_item(&p.c, w, shared + PREFILL_SHARED_ROOM);
        if (w->slot >= 0 && one_level) finish_piece(&p.c, w, is_last);
    }
#endif
}
