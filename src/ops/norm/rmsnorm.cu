/* rmsnorm.cu - RMSNorm, with or without adding to a residual stream first. A group of threads has a
 * token's row in registers between the sum of its squares and the scaling: one read and one write of
 * memory a row. Blocks of short rows hold several groups.
 *
 * JIT constants: DTYPE, WEIGHT_DTYPE; VEC, elements of an access; GROUP, threads of a row; TIMES, accesses
 * of a thread a row; THREADS of a block; RESIDUAL 0 or 1.
 * Bound: HBM, 2 (with residual 4) x hidden_size x size bytes a token. Rows wait in their own type, and the
 * weights are asked for with them, so that the scaling need not wait again: with 2 accesses a thread about
 * 40 registers, 1536 threads an SM, 48 KB of x under way.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/norm/rmsnorm_params.h"

enum {
    WORDS = qi_words(DTYPE, VEC),
    WEIGHT_WORDS = qi_words(WEIGHT_DTYPE, VEC),
    EARLY = TIMES <= 2 /* weights have registers of their own */
};

QI_INLINE void load_weight(const rmsnorm_params *p, int h, u32 *words)
{
    qi_load_words(words, qi_at(p->weight, WEIGHT_DTYPE, h), WEIGHT_DTYPE, VEC);
}

QI_KERNEL(rmsnorm, rmsnorm_params)
{
    __shared__ float room[THREADS / WARP];
    const int lane = threadIdx.x % GROUP;
    const i64 token = (i64)blockIdx.x * (THREADS / GROUP) + threadIdx.x / GROUP;
    const int here = token < p.num_tokens; /* the others only help to sum */
    const int size = here ? (int)p.hidden_size : 0;
    const char *x = qi_at(p.x, DTYPE, token * p.x_stride);
    char *residual = qi_to(p.residual, DTYPE, token * p.residual_stride);
    char *out = qi_to(p.out, DTYPE, token * p.out_stride);

    u32 raw[TIMES][WORDS], before[RESIDUAL ? TIMES : 1][WORDS],
        weight[EARLY ? TIMES : 1][WEIGHT_WORDS];
    griddepcontrol_wait();
#pragma unroll
    for (int i = 0; i < TIMES; i++) {
        const int h = (i * GROUP + lane) * VEC;
        if (h >= size) continue;
        qi_load_words(raw[i], qi_at(x, DTYPE, h), DTYPE, VEC);
        if (RESIDUAL)
            qi_load_words(before[RESIDUAL ? i : 0], qi_at(residual, DTYPE, h), DTYPE, VEC);
        if (EARLY) load_weight(&p, h, weight[EARLY ? i : 0]);
    }
    float sums[RESIDUAL ? TIMES : 1][VEC]; /* f32: what is normalised is not rounded */
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < TIMES; i++) {
        const int h = (i * GROUP + lane) * VEC;
        if (h >= size) continue;
        float row[VEC];
        qi_unpack_all(row, raw[i], DTYPE, VEC);
        if (RESIDUAL) {
            float of_residual[VEC];
            qi_unpack_all(of_residual, before[RESIDUAL ? i : 0], DTYPE, VEC);
            for (int e = 0; e < VEC; e++) sums[RESIDUAL ? i : 0][e] = row[e] += of_residual[e];
            qi_store(qi_to(residual, DTYPE, h), row, DTYPE, VEC);
        }
        for (int e = 0; e < VEC; e++) squares += row[e] * row[e];
    }
    const float mean = group_sum(squares, GROUP / WARP, room) / (float)p.hidden_size;
    const float scale = 1.f / sqrtf(mean + p.eps);
#pragma unroll
    for (int i = 0; i < TIMES; i++) {
        const int h = (i * GROUP + lane) * VEC;
        if (h >= size) continue;
        float row[VEC], factor[VEC];
        if (!EARLY) load_weight(&p, h, weight[0]);
        qi_unpack_all(factor, weight[EARLY ? i : 0], WEIGHT_DTYPE, VEC);
        if (RESIDUAL)
            for (int e = 0; e < VEC; e++) row[e] = sums[RESIDUAL ? i : 0][e];
        else
            qi_unpack_all(row, raw[i], DTYPE, VEC);
        for (int e = 0; e < VEC; e++) row[e] = row[e] * scale * (factor[e] + p.weight_bias);
        qi_store(qi_to(out, DTYPE, h), row, DTYPE, VEC);
    }
}
