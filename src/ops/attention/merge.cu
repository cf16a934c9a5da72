/* merge.cu - merging attention states: a warp a (token, head) row. A piece of every state's row is read
 * before the result's is written, so the result may stand in a state's place.
 *
 * JIT constants: DTYPE_O, DTYPE_STATE; VEC, elements of an access; THREADS.
 * Bound: HBM, one read of every state and one write.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/attention/merge_params.h"

QI_INLINE float exponent_of(const merge_params *p, int s, i64 token, i64 head)
{
    const merge_state *state = &p->states[s];
    return p->log2_scale * state->lse[token * state->lse_stride[0] + head * state->lse_stride[1]];
}

QI_KERNEL(merge, merge_params)
{
    const i64 row = (i64)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (row >= p.tokens * p.heads) return;
    const i64 token = row / p.heads, head = row % p.heads;
    float max = -QI_INFINITY, sum = 0.f;
    for (int s = 0; s < p.num_states; s++) {
        const float e = exponent_of(&p, s, token, head);
        max = e > max ? e : max;
    }
    for (int s = 0; s < p.num_states; s++) {
        const float e = exponent_of(&p, s, token, head);
        if (e != -QI_INFINITY) sum += exp2f(e - max);
    }
    const float scale = sum == 0.f ? 0.f : 1.f / sum; /* 0: no state counts */
    for (i64 d = lane * VEC; d < p.dim; d += WARP * VEC) {
        float acc[VEC] = {};
        for (int s = 0; s < p.num_states; s++) {
            const merge_state *state = &p.states[s];
            const float e = exponent_of(&p, s, token, head);
            if (e == -QI_INFINITY) continue; /* its o may be anything */
            const float weight = exp2f(e - max);
            float in[VEC];
            qi_load(in,
                    qi_at(state->o, DTYPE_STATE,
                          token * state->o_stride[0] + head * state->o_stride[1] + d),
                    DTYPE_STATE, VEC);
            for (int i = 0; i < VEC; i++) acc[i] += weight * in[i];
        }
        for (int i = 0; i < VEC; i++) acc[i] *= scale;
        qi_store(qi_to(p.o, DTYPE_O, token * p.o_stride[0] + head * p.o_stride[1] + d), acc,
                 DTYPE_O, VEC);
    }
    __syncwarp(); /* lse may stand in a state's place */
    if (p.lse && lane == 0)
        p.lse[token * p.lse_stride[0] + head * p.lse_stride[1]] =
            sum == 0.f ? -QI_INFINITY : (max + log2f(sum)) / p.log2_scale;
}
