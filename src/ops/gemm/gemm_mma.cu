/* gemm_mma.cu - out = x w^T by mma.sync where x and w are both bf16 or both f16: a block a tile of out, its
 * warps WARPS_M x WARPS_N parts of that; steps of 32 in k come by cp.async, STAGES of them under way.
 *
 * A row of shared memory is 4 chunks of 16 bytes of x or of w; chunk c of row r stands at c ^ (r / 2 % 4), so
 * that the 8 rows of an ldmatrix lie in different banks. An element of out is summed over k in steps of 16
 * in order, whatever the tile: the same bits in any of them.
 *
 * JIT constants: DTYPE_OUT; DTYPE of x and w; VEC, elements of an access to them (below 8 no cp.async but
 * loads); VEC_OUT 1 or 2; WARPS_M, WARPS_N; TILES_M, TILES_N, mma tiles of 16 and of 8 of a warp; STAGES;
 * THREADS, 32 a warp.
 * Bound: tensor cores; for few rows HBM, the bytes of w.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/gemm/gemm_params.h"

enum {
    BLOCK_M = WARPS_M * TILES_M * 16,
    BLOCK_N = WARPS_N * TILES_N * 8,
    BLOCK_ROWS = BLOCK_M + BLOCK_N, /* of x, then of w */
    BLOCK_K = 32,
    CHUNK = 8, /* elements */
    CHUNKS = BLOCK_K / CHUNK,
    STAGE_BYTES = BLOCK_ROWS * BLOCK_K * 2
};
static_assert(THREADS == WARPS_M * WARPS_N * WARP && TILES_N % 2 == 0, "whole warps, tiles by two");

QI_INLINE char *chunk_at(char *stage, int row, int chunk)
{
    return stage + (row * CHUNKS + (chunk ^ (row / 2 % CHUNKS))) * 16;
}

/* 8 elements from column k of a row of depth elements, zero past its end. */
QI_INLINE void load_chunk(char *to, const void *row, i64 k, i64 depth)
{
    if (VEC == CHUNK) {
        cp_async_16(to, qi_at(row, DTYPE, k < depth ? k : 0), k < depth ? 16 : 0);
        return;
    }
    float x[CHUNK] = {};
#pragma unroll
    for (int e = 0; e < CHUNK; e += VEC)
        if (k + e < depth) qi_load(x + e, qi_at(row, DTYPE, k + e), DTYPE, VEC);
    qi_store(to, x, DTYPE, CHUNK);
}

/* Columns [k, k + BLOCK_K) of the block's rows. */
QI_INLINE void load_stage(const gemm_params *p, char *stage, i64 row, i64 column, i64 k)
{
#pragma unroll
    for (int i = 0; i < (BLOCK_ROWS * CHUNKS + THREADS - 1) / THREADS; i++) {
        const int at = i * THREADS + (int)threadIdx.x, r = at / CHUNKS, chunk = at % CHUNKS;
        if (BLOCK_ROWS * CHUNKS % THREADS != 0 && r >= BLOCK_ROWS) break;
        const int of_x = r < BLOCK_M;
        const i64 line = of_x ? row + r : column + r - BLOCK_M;
        const int inside = line < (of_x ? p->m : p->n);
        const void *base = of_x ? p->x : p->w;
        const i64 stride = of_x ? p->x_stride : p->w_stride;
        load_chunk(chunk_at(stage, r, chunk), qi_at(base, DTYPE, inside ? line * stride : 0),
                   k + chunk * CHUNK, inside ? p->k : 0);
    }
}

QI_INLINE void multiply(float acc[4], const u32 a[4], u32 b0, u32 b1)
{
    if (DTYPE == QI_BF16)
        mma_m16n8k16_bf16(acc, a, b0, b1);
    else
        mma_m16n8k16_f16(acc, a, b0, b1);
}

QI_INLINE void multiply_stage(char *stage, int first_row, int first_column,
                              float (*acc)[TILES_N][4])
{
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < CHUNKS; k += 2) {
        u32 a[TILES_M][4], b[TILES_N / 2][4];
#pragma unroll
        for (int i = 0; i < TILES_M; i++)
            ldmatrix_x4(a[i], chunk_at(stage, first_row + i * 16 + lane % 16, k + lane / 16));
#pragma unroll
        for (int j = 0; j < TILES_N / 2; j++)
            ldmatrix_x4(b[j],
                        chunk_at(stage, BLOCK_M + first_column + j * 16 + lane / 16 * 8 + lane % 8,
                                 k + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < TILES_M; i++)
#pragma unroll
            for (int j = 0; j < TILES_N; j++)
                multiply(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
}

/* Two neighbours of a row. */
QI_INLINE void store_pair(const gemm_params *p, i64 row, i64 column, const float *pair)
{
    if (row >= p->m) return;
    char *out = qi_to(p->out, DTYPE_OUT, row * p->out_stride + column);
    if (VEC_OUT == 2) {
        if (column < p->n) qi_store(out, pair, DTYPE_OUT, 2);
        return;
    }
    for (int e = 0; e < 2; e++)
        if (column + e < p->n) qi_store(qi_to(out, DTYPE_OUT, e), pair + e, DTYPE_OUT, 1);
}

QI_KERNEL(gemm_mma, gemm_params)
{
    extern __shared__ __align__(128) char stages[]; /* [STAGES][STAGE_BYTES] */
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int first_row = warp / WARPS_N * TILES_M * 16,
              first_column = warp % WARPS_N * TILES_N * 8;
    const i64 blocks_m = (p.m + BLOCK_M - 1) / BLOCK_M;
    const i64 row = blockIdx.x % blocks_m * BLOCK_M, column = blockIdx.x / blocks_m * BLOCK_N;
    float acc[TILES_M][TILES_N][4] = {};
    griddepcontrol_wait();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s * BLOCK_K < p.k) load_stage(&p, stages + s * STAGE_BYTES, row, column, s * BLOCK_K);
        cp_async_commit_group();
    }
    int now = 0, next = STAGES - 1;
    for (i64 k = 0; k < p.k; k += BLOCK_K) {
        cp_async_wait_group(STAGES - 2);
        __syncthreads(); /* the stage is here, and the one before it has been used */
        const i64 ahead = k + (STAGES - 1) * BLOCK_K;
        if (ahead < p.k) load_stage(&p, stages + next * STAGE_BYTES, row, column, ahead);
        cp_async_commit_group();
        multiply_stage(stages + now * STAGE_BYTES, first_row, first_column, acc);
        now = now + 1 == STAGES ? 0 : now + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
#pragma unroll
    for (int i = 0; i < TILES_M; i++)
#pragma unroll
        for (int j = 0; j < TILES_N; j++)
            for (int half = 0; half < 2; half++)
                store_pair(&p, row + first_row + i * 16 + half * 8 + lane / 4,
                           column + first_column + j * 8 + lane % 4 * 2, acc[i][j] + half * 2);
}
