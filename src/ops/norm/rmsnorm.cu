/* rmsnorm.cu - RMSNorm, with or without adding to a residual stream first. A group of threads has a
 * token's row in registers between the sum of its squares and the scaling: one read and one write of
 * memory a row. Blocks of short rows hold several groups.
 *
 * JIT constants: DTYPE, WEIGHT_DTYPE; VEC, elements of an access; GROUP, threads of a row; TIMES, accesses
 * of a thread a row; THREADS of a block; RESIDUAL 0 or 1.
 * Bound: HBM, 2 (with residual 4) x hidden_size x size bytes a token.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/norm/rmsnorm_params.h"

QI_KERNEL(rmsnorm, rmsnorm_params)
{
    __shared__ float room[THREADS / WARP];
    const int lane = threadIdx.x % GROUP;
    const i64 token = (i64)blockIdx.x * (THREADS / GROUP) + threadIdx.x / GROUP;
    const int here = token < p.num_tokens; /* the others only help to sum */
    const char *x = qi_at(p.x, DTYPE, token * p.x_stride);
    char *residual = qi_to(p.residual, DTYPE, token * p.residual_stride);
    char *out = qi_to(p.out, DTYPE, token * p.out_stride);
    const int size = (int)p.hidden_size;

    float row[TIMES][VEC], squares = 0.f;
#pragma unroll
    for (int i = 0; i < TIMES; i++) {
        const int h = (i * GROUP + lane) * VEC;
        if (!here || h >= size) continue;
        qi_load(row[i], qi_at(x, DTYPE, h), DTYPE, VEC);
        if (RESIDUAL) {
            float before[VEC];
            qi_load(before, qi_at(residual, DTYPE, h), DTYPE, VEC);
            for (int e = 0; e < VEC; e++) row[i][e] += before[e];
            qi_store(qi_to(residual, DTYPE, h), row[i], DTYPE, VEC);
        }
        for (int e = 0; e < VEC; e++) squares += row[i][e] * row[i][e];
    }
    const float mean = group_sum(squares, GROUP / WARP, room) / (float)p.hidden_size;
    const float scale = 1.f / sqrtf(mean + p.eps);
#pragma unroll
    for (int i = 0; i < TIMES; i++) {
        const int h = (i * GROUP + lane) * VEC;
        if (!here || h >= size) continue;
        float weight[VEC];
        qi_load(weight, qi_at(p.weight, WEIGHT_DTYPE, h), WEIGHT_DTYPE, VEC);
        for (int e = 0; e < VEC; e++) row[i][e] = row[i][e] * scale * (weight[e] + p.weight_bias);
        qi_store(qi_to(out, DTYPE, h), row[i], DTYPE, VEC);
    }
}
