/* gemm_thin.cu - out = x w^T for up to 8 rows of x: PARTS warps take 4 columns of out, which are rows of w,
 * and read each of them once.
 *
 * JIT constants: DTYPE_OUT, DTYPE_X, DTYPE_W; VEC, elements of an access; ROWS of x, those past m left out;
 * PARTS, warps that share k; THREADS.
 * Bound: HBM, the bytes of w: a lane has 4 accesses of 16 bytes of w under way, those of the loop's next turn;
 * 16 warps an SM make 32 KB, 24 are what latency times bandwidth takes. x comes from L1, a 4th of w's
 * accesses for each row.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/gemm/gemm_params.h"

enum { COLUMNS = 4, WARPS = THREADS / WARP, SUMS = ROWS * COLUMNS, WORDS = qi_words(DTYPE_W, VEC) };

QI_INLINE void fetch(const char *const *w, i64 k, u32 (*words)[WORDS])
{
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
        qi_load_words(words[c], qi_at(w[c], DTYPE_W, k), DTYPE_W, VEC);
}

/* The sums of this lane's part of k, for columns [column, column + COLUMNS), the last one standing for those
 * past it. */
QI_INLINE void sum_part(const gemm_params *p, i64 column, int part, float (*acc)[COLUMNS])
{
    const char *w[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        const i64 at = column + c < p->n ? column + c : p->n - 1;
        w[c] = qi_at(p->w, DTYPE_W, at * p->w_stride);
    }
    enum { STEP = PARTS * WARP * VEC };
    i64 k = (part * WARP + threadIdx.x % WARP) * VEC;
    u32 next[COLUMNS][WORDS];
    if (k < p->k) fetch(w, k, next);
#pragma unroll 2
    for (; k < p->k; k += STEP) {
        float from_w[COLUMNS][VEC];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) qi_unpack_all(from_w[c], next[c], DTYPE_W, VEC);
        if (k + STEP < p->k) fetch(w, k + STEP, next);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float x[VEC];
            if (r >= p->m) break;
            qi_load(x, qi_at(p->x, DTYPE_X, r * p->x_stride + k), DTYPE_X, VEC);
            for (int c = 0; c < COLUMNS; c++)
                for (int e = 0; e < VEC; e++) acc[r][c] += x[e] * from_w[c][e];
        }
    }
}

QI_KERNEL(gemm_thin, gemm_params)
{
    __shared__ float room[WARPS][SUMS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const i64 column = ((i64)blockIdx.x * (WARPS / PARTS) + warp / PARTS) * COLUMNS;
    float acc[ROWS][COLUMNS] = {};
    griddepcontrol_wait();
    if (column < p.n) sum_part(&p, column, warp % PARTS, acc);
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
        const float sum = warp_sum(acc[i / COLUMNS][i % COLUMNS]);
        if (lane == i % WARP) room[warp][i] = sum;
    }
    __syncthreads();
    if (warp % PARTS != 0) return;
    for (int i = lane; i < SUMS; i += WARP) {
        const int r = i / COLUMNS, c = i % COLUMNS;
        if (r >= p.m || column + c >= p.n) continue;
        float sum = room[warp][i];
        for (int part = 1; part < PARTS; part++) sum += room[warp + part][i];
        qi_store(qi_to(p.out, DTYPE_OUT, r * p.out_stride + column + c), &sum, DTYPE_OUT, 1);
    }
}
