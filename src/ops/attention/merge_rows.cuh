/* merge_rows.cuh - merging partial results on a GPU: o = sum_i w_i o_i / sum_i w_i with w_i = 2^(lse_i - max),
 * over a row's pieces in key order; without a softmax their plain sum. A warp takes a row of one query head:
 * lanes read the pieces' lse side by side, then every lane sums four dims of each piece. What other blocks
 * wrote is read past L1.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_MERGE_ROWS_CUH
#define QI_ATTENTION_MERGE_ROWS_CUH

#include "ops/attention/rows.cuh"

/* Partial rows under way at a time; beside prefill tiles there are no registers for more. */
#if defined(DECODE_ROWS) && !PREFILL
enum { MERGE_LOADS = 16 };
#else
enum { MERGE_LOADS = 8 };
#endif

/* The pieces of one (row, query head) of one tile: piece i at partial row slot + i * step. */
typedef struct pieces {
    i64 slot;
    int step, count;
} pieces;

QI_INLINE pieces pieces_of(const attention_params *p, const qi_merge *m, int row, int qo_head)
{
    const int group = HEADS_OF_GROUP(p), head = qo_head / group - m->kv_head;
    pieces of;
    of.slot = m->slot + ((i64)head * m->num_rows + (row - m->row_begin)) * group + qo_head % group;
    of.step = m->rows_per_piece;
    of.count = m->num_pieces;
    return of;
}

/* The partial row of piece i over all lists. */
QI_INLINE i64 piece_slot(const pieces *lists, int i)
{
    while (i >= lists->count) i -= (lists++)->count;
    return lists->slot + (i64)i * lists->step;
}

/* Four dims of pieces i to i + MERGE_LOADS of the 32 whose slots the lanes have, side by side. */
QI_INLINE void load_pieces(const attention_params *p, i64 slot, int i, int here, int d,
                           float4 v[MERGE_LOADS])
{
    const float *column = p->plan.o_partial + (d < p->head_dim_vo ? d : 0);
#pragma unroll
    for (int j = 0; j < MERGE_LOADS; j++) {
        const i64 at = __shfl_sync(ALL_LANES, slot, i + j < here ? i + j : i);
        v[j] = __ldcg((const float4 *)(column + at * p->head_dim_vo));
    }
}

/* By one warp. The first pieces' sums are asked for together with the lse of all. */
QI_INLINE void merge_row(const attention_cuda_params *c, const pieces *lists, int num_lists,
                         tile_row row, int qo_head)
{
    const attention_params *p = &c->at;
    const int lane = threadIdx.x % WARP;
    const float none = SOFTMAX ? -QI_INFINITY : 0.f;
    int total = 0;
    for (int l = 0; l < num_lists; l++) total += lists[l].count;
    for (int first = 0; first < p->head_dim_vo; first += 4 * WARP) {
        const int d = first + 4 * lane;
        float max = none, sum = 0.f, o[4] = {};
#pragma unroll 1
        for (int from = 0; from < total; from += WARP) { /* pieces, a lane each */
            const int here = total - from < WARP ? total - from : WARP;
            const i64 slot = lane < here ? piece_slot(lists, from + lane) : 0;
            float weight = lane < here ? 1.f : 0.f, shrink = 1.f;
            float4 v[MERGE_LOADS];
            const float lse = SOFTMAX && lane < here ? __ldcg(p->plan.lse_partial + slot) : none;
            load_pieces(p, slot, 0, here, d, v);
            if (SOFTMAX) {
                const float before = max;
                max = fmaxf(max, warp_max(lse));
                shrink = before == -QI_INFINITY ? 0.f : ex2(before - max);
                weight = lse == -QI_INFINITY ? 0.f : ex2(lse - max);
            }
            sum = sum * shrink + warp_sum(weight);
            for (int i = 0; i < 4; i++) o[i] *= shrink;
#pragma unroll 1
            for (int i = 0; i < here; i += MERGE_LOADS) {
                if (i > 0) load_pieces(p, slot, i, here, d, v);
#pragma unroll
                for (int j = 0; j < MERGE_LOADS; j++) {
                    const float w = __shfl_sync(ALL_LANES, weight, (i + j) % WARP);
                    if (i + j >= here) continue;
                    o[0] += w * v[j].x, o[1] += w * v[j].y, o[2] += w * v[j].z, o[3] += w * v[j].w;
                }
            }
        }
        const float norm = finish_row(c, row, qo_head, max, sum, first == 0 && lane == 0);
        for (int i = 0; i < 4; i++) o[i] *= norm;
        if (d < p->head_dim_vo) store_outputs(c, row, qo_head, d, o);
    }
}

/* Counts a finished piece of a tile, whose partial rows this block's threads wrote before a barrier; returns
 * how many pieces were done before: their rows are seen by whoever has a barrier with this thread then. By
 * one thread. */
QI_INLINE int draw_ticket(const attention_params *p, int merge)
{
    return atom_add_acq_rel(&p->plan.ticket[merge], 1);
}

/* Merges a tile of which all pieces are done, in key order, and leaves its ticket as it was found. By thread tid
 * of so many, whole warps. */
QI_INLINE void merge_tile(const attention_cuda_params *c, const qi_merge *tile, int merge, int tid,
                          const int threads)
{
    const attention_params *p = &c->at;
    const qi_merge m = *tile;
    const int group = HEADS_OF_GROUP(p), heads = m.num_kv_heads * group;
    for (int i = tid / WARP; i < m.num_rows * heads; i += threads / WARP) {
        const int row = m.row_begin + i / heads, head = m.kv_head * group + i % heads;
        const pieces of = pieces_of(p, &m, row, head);
        merge_row(c, &of, 1, row_at(p, row), head);
    }
    if (tid == 0) p->plan.ticket[merge] = 0;
}

/* The block that finishes a tile's last piece merges it. By all threads; is_last: shared. */
QI_INLINE void finish_piece(const attention_cuda_params *c, const qi_work *w, int *is_last)
{
    const qi_merge *tile = &c->at.plan.merge[w->merge];
    __syncthreads();
    if (threadIdx.x == 0) *is_last = draw_ticket(&c->at, w->merge) == tile->num_pieces - 1;
    __syncthreads();
    if (*is_last) merge_tile(c, tile, w->merge, (int)threadIdx.x, THREADS);
    __syncthreads();
}

QI_INLINE void begin_turn()
{
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
}

/* Several levels: all rows that have partial ones, a warp a (row, query head). By the whole grid; a block of
 * MERGE_THREADS has as many heads as warps, and rows and heads are counted on without a division of 64 bits. The launch
 * before, whose partial rows these are, has begun once its own turn had come, so that the plan stands, and what it says
 * of a block's first row is looked up before this launch's turn. */
QI_INLINE void merge_levels(const attention_cuda_params *c, char *shared)
{
    const attention_params *p = &c->at;
    enum { WARPS_OF_BLOCK = MERGE_THREADS / WARP };
    pieces(*lists)[MAX_LEVELS] = (pieces(*)[MAX_LEVELS])shared; /* [WARPS_OF_BLOCK] */
    _Static_assert(WARPS_OF_BLOCK * sizeof *lists <= MERGE_SHARED_BYTES, "as launched");
    const int levels = p->plan.header->num_levels, tokens = p->plan.header->num_tokens;
    const int lane = threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    const int group = HEADS_OF_GROUP(p);
    const int parts = (p->num_qo_heads + WARPS_OF_BLOCK - 1) / WARPS_OF_BLOCK; /* of a row */
    int row = (int)blockIdx.x / parts, part = (int)blockIdx.x % parts, waited = 0;
    while (levels > 1 && row < tokens) {
        const int head = part * WARPS_OF_BLOCK + warp;
        pieces of = {};
        if (lane < levels && head < p->num_qo_heads) {
            const i64 at = (lane * p->plan.max_tokens + row) * p->num_kv_heads + head / group;
            const int merge = p->plan.row_merge[at];
            if (merge >= 0) of = pieces_of(p, &p->plan.merge[merge], row, head);
        }
        const tile_row to = row_at(p, row);
        __syncwarp(); /* the row before has been merged */
        if (lane < levels) lists[warp][lane] = of;
        const int any = __any_sync(ALL_LANES, of.count > 0);
        __syncwarp();
        if (!waited) begin_turn();
        waited = 1;
        if (any) merge_row(c, lists[warp], levels, to, head);
        part += (int)gridDim.x % parts;
        row += (int)gridDim.x / parts + (part >= parts);
        if (part >= parts) part -= parts;
    }
    if (!waited) begin_turn();
}

#if !defined(MIXED) || MIXED /* else there is one level */
extern "C" __global__ void __launch_bounds__(MERGE_THREADS, 4)
    attention_levels(const __grid_constant__ attention_cuda_params p)
{
    extern __shared__ __align__(16) char lists[];
    merge_levels(&p, lists);
}
#endif

#endif
