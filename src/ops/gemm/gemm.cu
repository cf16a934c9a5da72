/* gemm.cu - out = x w^T where no better provider is at hand: tiles of 64 x 64, in f32 throughout. For few
 * rows of x, a warp an output column, which reads w once.
 *
 * JIT constants: DTYPE_OUT, DTYPE_X, DTYPE_W; VEC, elements of an access; ROWS, of x in the thin form;
 * THREADS.
 * Bound: FMA; the thin form HBM, the bytes of w.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/gemm/gemm_params.h"

/* Rows [first, first + ROWS) of x, those past m left out. */
QI_KERNEL(gemm_thin, gemm_params)
{
    const i64 column = (i64)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    const i64 first = (i64)blockIdx.y * ROWS;
    const int lane = threadIdx.x % WARP;
    if (column >= p.n) return;
    float acc[ROWS] = {};
    for (i64 k = lane * VEC; k < p.k; k += WARP * VEC) {
        float w[VEC], x[VEC];
        qi_load(w, qi_at(p.w, DTYPE_W, column * p.w_stride + k), DTYPE_W, VEC);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (first + r >= p.m) break;
            qi_load(x, qi_at(p.x, DTYPE_X, (first + r) * p.x_stride + k), DTYPE_X, VEC);
            for (int e = 0; e < VEC; e++) acc[r] += x[e] * w[e];
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float sum = warp_sum(acc[r]);
        if (lane == 0 && first + r < p.m)
            qi_store(qi_to(p.out, DTYPE_OUT, (first + r) * p.out_stride + column), &sum, DTYPE_OUT,
                     1);
    }
}

enum { TILE = 64, DEPTH = 16, SIDE = 4 }; /* of a block, of a step, of a thread */

/* Rows [row, row + TILE) and columns [k, k + DEPTH) of a matrix, zero past its ends, as [k][row]. */
QI_INLINE void load_tile(float (*tile)[TILE + SIDE], const void *data, const int t, i64 stride,
                         i64 row, i64 rows, i64 k, i64 depth)
{
    for (int i = (int)threadIdx.x; i < TILE * DEPTH; i += THREADS) {
        const int r = i / DEPTH, c = i % DEPTH;
        float x = 0.f;
        if (row + r < rows && k + c < depth)
            qi_load(&x, qi_at(data, t, (row + r) * stride + k + c), t, 1);
        tile[c][r] = x;
    }
}

QI_KERNEL(gemm, gemm_params)
{
    __shared__ float x[DEPTH][TILE + SIDE], w[DEPTH][TILE + SIDE];
    const i64 row = (i64)blockIdx.y * TILE, column = (i64)blockIdx.x * TILE;
    const int r = (int)threadIdx.x / (TILE / SIDE) * SIDE,
              c = (int)threadIdx.x % (TILE / SIDE) * SIDE;
    float acc[SIDE][SIDE] = {};
    for (i64 k = 0; k < p.k; k += DEPTH) {
        load_tile(x, p.x, DTYPE_X, p.x_stride, row, p.m, k, p.k);
        load_tile(w, p.w, DTYPE_W, p.w_stride, column, p.n, k, p.k);
        __syncthreads();
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
            for (int i = 0; i < SIDE; i++)
                for (int j = 0; j < SIDE; j++) acc[i][j] += x[d][r + i] * w[d][c + j];
        __syncthreads();
    }
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++)
            if (row + r + i < p.m && column + c + j < p.n)
                qi_store(qi_to(p.out, DTYPE_OUT, (row + r + i) * p.out_stride + column + c + j),
                         &acc[i][j], DTYPE_OUT, 1);
}
