/* gemm_tile.cu - out = x w^T in f32 throughout, for types that the tensor cores do not multiply exactly: a
 * block a tile of 16 SIDE x 16 SIDE, a thread SIDE x SIDE of it. The next step's elements are on their way
 * to registers while this step's are multiplied.
 *
 * JIT constants: DTYPE_OUT, DTYPE_X, DTYPE_W; VEC, elements of an access; SIDE; THREADS, 256.
 * Bound: FMA; per step of k a thread loads 2 SIDE floats of shared memory for SIDE^2 of them.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/gemm/gemm_params.h"

enum { EDGE = 16, TILE = EDGE * SIDE, DEPTH = 16, PITCH = TILE + 4 };
enum { ACCESSES = TILE * DEPTH / VEC / THREADS }; /* of a thread, a step, a matrix */
static_assert(THREADS == EDGE * EDGE && SIDE % 4 == 0 && ACCESSES * VEC * THREADS == TILE * DEPTH,
              "threads share a tile evenly");

/* Elements of rows [row, row + TILE) and columns [k, k + DEPTH) of a matrix, zero past its ends. */
QI_INLINE void fetch(float (*piece)[VEC], const void *data, const int t, i64 stride, i64 row,
                     i64 rows, i64 k, i64 depth)
{
#pragma unroll
    for (int i = 0; i < ACCESSES; i++) {
        const int at = (i * THREADS + (int)threadIdx.x) * VEC, r = at / DEPTH, c = at % DEPTH;
        for (int e = 0; e < VEC; e++) piece[i][e] = 0.f;
        if (row + r < rows && k + c < depth)
            qi_load(piece[i], qi_at(data, t, (row + r) * stride + k + c), t, VEC);
    }
}

/* Puts them down as [k][row]. */
QI_INLINE void put(float (*tile)[PITCH], const float (*piece)[VEC])
{
#pragma unroll
    for (int i = 0; i < ACCESSES; i++) {
        const int at = (i * THREADS + (int)threadIdx.x) * VEC, r = at / DEPTH, c = at % DEPTH;
        for (int e = 0; e < VEC; e++) tile[c + e][r] = piece[i][e];
    }
}

/* A thread's rows are 4 of each 4 EDGE: neighbours read neighbouring 16 bytes. */
QI_INLINE int place(int edge, int i)
{
    return i / 4 * 4 * EDGE + edge * 4 + i % 4;
}

QI_KERNEL(gemm_tile, gemm_params)
{
    __shared__ __align__(16) float x[DEPTH][PITCH], w[DEPTH][PITCH];
    const i64 tiles_m = (p.m + TILE - 1) / TILE;
    const i64 row = blockIdx.x % tiles_m * TILE, column = blockIdx.x / tiles_m * TILE;
    const int down = (int)threadIdx.x / EDGE, across = (int)threadIdx.x % EDGE;
    float acc[SIDE][SIDE] = {}, next_x[ACCESSES][VEC], next_w[ACCESSES][VEC];
    griddepcontrol_wait();
    fetch(next_x, p.x, DTYPE_X, p.x_stride, row, p.m, 0, p.k);
    fetch(next_w, p.w, DTYPE_W, p.w_stride, column, p.n, 0, p.k);
    for (i64 k = 0; k < p.k; k += DEPTH) {
        put(x, next_x);
        put(w, next_w);
        __syncthreads();
        fetch(next_x, p.x, DTYPE_X, p.x_stride, row, p.m, k + DEPTH, p.k);
        fetch(next_w, p.w, DTYPE_W, p.w_stride, column, p.n, k + DEPTH, p.k);
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            float a[SIDE], b[SIDE];
            for (int i = 0; i < SIDE; i += 4) {
                qi_load(a + i, &x[d][place(down, i)], QI_F32, 4);
                qi_load(b + i, &w[d][place(across, i)], QI_F32, 4);
            }
            for (int i = 0; i < SIDE; i++)
                for (int j = 0; j < SIDE; j++) acc[i][j] += a[i] * b[j];
        }
        __syncthreads();
    }
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) {
            const i64 r = row + place(down, i), c = column + place(across, j);
            if (r < p.m && c < p.n)
                qi_store(qi_to(p.out, DTYPE_OUT, r * p.out_stride + c), &acc[i][j], DTYPE_OUT, 1);
        }
}
