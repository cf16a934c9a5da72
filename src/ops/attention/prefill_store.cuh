/* prefill_store.cuh - what a warp holds of a prefill tile on GPUs with mma.sync, and how its rows are finished
 * and written: through shared memory, in pieces of 8 dims.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_PREFILL_STORE_CUH
#define QI_ATTENTION_PREFILL_STORE_CUH

#include "ops/attention/prefill_loads.cuh"

enum {
    PREFILL_WARP_TILES = PREFILL_ROWS / 64, /* of 16 rows */
    PREFILL_S = PREFILL_N / 8,              /* columns of 8 that scores and o have */
    PREFILL_O = PREFILL_VO / 8,
    PREFILL_STAGE_PITCH = PREFILL_STAGED_PITCH(HEAD_DIM_VO),
};

typedef float prefill_scores[PREFILL_WARP_TILES][PREFILL_S][4];
typedef float prefill_sums[PREFILL_WARP_TILES][PREFILL_O][4];
typedef float prefill_of_rows[PREFILL_WARP_TILES][2]; /* of rows g and g + 8 */

/* Of a warp's 16 rows number t, the one that is this lane's h-th. */
QI_INLINE int prefill_row_index(int t, int h)
{
    const int tid = tid_x();
    return t * 64 + tid / WARP * 16 + h * 8 + tid % WARP / 4;
}

/* Maximum and sum of each row, where addresses of keys have been. */
QI_INLINE float2 *prefill_results(char *shared)
{
    return (float2 *)(shared + PREFILL_ADDRESSES_AT);
}
_Static_assert(PREFILL_ROWS * sizeof(float2) <= 4 * 8 * PREFILL_KEYS_MOST, "fits");

/* Completes the warp's rows but for o: in the place of its sum a row has then what multiplies its weighted
 * sum of v. */
QI_INLINE void finish_prefill_rows(const attention_cuda_params *c, const prefill_of_rows max,
                                   const prefill_of_rows sum, char *shared, const int tiles)
{
    const attention_params *p = &c->at;
    const qi_work *w = &prefill_noted(shared)->work;
    const int tid = tid_x(), lane = tid % WARP;
    float2 *results = prefill_results(shared);
#pragma unroll
    for (int i = 0; i < 2 * tiles; i++) {
        float total = sum[i / 2][i % 2];
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        if (lane % 4 == 0)
            results[prefill_row_index(i / 2, i % 2)] = make_float2(max[i / 2][i % 2], total);
    }
    __syncwarp();
    const int m = lane / 16 * 64 + tid / WARP * 16 + lane % 16; /* a row a lane */
    if (lane / 16 < tiles && m < w->num_rows * GROUP_SIZE) {
        const float2 r = results[m];
        float norm = norm_of(r.y);
        if (w->slot < 0)
            norm = finish_row(c, prefill_rows_of(shared)[m].row, prefill_head(w, m), r.x, r.y, 1);
        else
            p->plan.lse_partial[(i64)w->slot + m] = lse_of(r.x, r.y);
        results[m].y = norm;
    }
    __syncwarp();
}

/* The lane's part of the warp's tile t of o, multiplied, as rows of f32 in shared memory. */
QI_INLINE void stage_output(const float o[PREFILL_O][4], const float2 *results, char *stage, int t)
{
    const int lane = tid_x() % WARP;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        char *row = stage + (lane / 4 + 8 * h) * PREFILL_STAGE_PITCH;
        const float norm = results[prefill_row_index(t, h)].y;
#pragma unroll
        for (int n = 0; n < PREFILL_O; n += 2) {
            const float *even = &o[n][2 * h], *odd = &o[n + 1][2 * h];
            if (KV_BYTES == 1) {
                *(float4 *)(row + (n * 8 + lane % 4 * 4) * 4) =
                    make_float4(even[0] * norm, odd[0] * norm, even[1] * norm, odd[1] * norm);
            } else {
                float2 *to = (float2 *)(row + (n * 8 + lane % 4 * 2) * 4);
                to[0] = make_float2(even[0] * norm, even[1] * norm);
                to[4] = make_float2(odd[0] * norm, odd[1] * norm);
            }
        }
    }
}

/* The staged 16 rows of the warp's tile t: to o, or to partial rows. */
QI_INLINE void store_staged(const attention_cuda_params *c, const char *shared, const char *stage,
                            int t)
{
    const qi_work *w = &prefill_noted(shared)->work;
    const attention_params *p = &c->at;
    const int all = w->num_rows * GROUP_SIZE, pieces = HEAD_DIM_VO / 8;
    const int aligned = outputs_aligned(p), tid = tid_x();
    for (int i = tid % WARP; i < 16 * pieces; i += WARP) {
        const int row = i / pieces, d = i % pieces * 8;
        const int m = t * 64 + tid / WARP * 16 + row;
        if (m >= all) break;
        float x[8];
        qi_load(x, stage + row * PREFILL_STAGE_PITCH + d * 4, QI_F32, 8);
        if (w->slot < 0)
            store_piece(c, prefill_rows_of(shared) + m, prefill_head(w, m), d, x, aligned);
        else
            qi_store(p->plan.o_partial + ((i64)w->slot + m) * HEAD_DIM_VO + d, x, QI_F32, 8);
    }
}

/* Writes the warp's rows. */
QI_INLINE void store_prefill_rows(const attention_cuda_params *c, const prefill_sums o,
                                  const prefill_of_rows max, const prefill_of_rows sum,
                                  char *shared, const int tiles)
{
    char *stage = shared + PREFILL_Q_AT + tid_x() / WARP * 16 * PREFILL_STAGE_PITCH;
    finish_prefill_rows(c, max, sum, shared, tiles);
#pragma unroll
    for (int t = 0; t < tiles; t++) {
        stage_output(o[t], prefill_results(shared), stage, t);
        __syncwarp();
        store_staged(c, shared, stage, t);
        __syncwarp();
    }
}

#endif
