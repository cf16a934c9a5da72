/* merge.cu - merging attention states: a few lanes a (token, head) row. They share the states' weights, then
 * each takes pieces of the row, of up to 4 states at a time. A piece of every state's row is read before
 * the result's is written, so the result may stand in a state's place.
 *
 * JIT constants: DTYPE_O, DTYPE_STATE; VEC, elements of an access; LANES of a row, a power of two; THREADS.
 * Bound: HBM, one read of every state and one write.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/attention/merge_params.h"

enum { ROWS = THREADS / LANES, TIMES = 4, WORDS = qi_words(DTYPE_STATE, VEC) };
#define ABSENT (-1.f) /* weight of a state that saw no key: its o may be anything */

QI_INLINE float lanes_max(float x)
{
    for (int step = LANES / 2; step > 0; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

QI_INLINE float lanes_sum(float x)
{
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

/* The states' lse in base 2. */
QI_INLINE float exponent_of(const merge_params *p, int s, i64 token, i64 head)
{
    const merge_state *state = &p->states[s];
    return p->log2_scale * state->lse[token * state->lse_stride[0] + head * state->lse_stride[1]];
}

/* Elements [d, d + VEC) of the weighted sum of all states. */
QI_INLINE void sum_states(const merge_params *p, i64 token, i64 head, i64 d, const float *weights,
                          float *acc)
{
    for (int first = 0; first < p->num_states; first += TIMES) {
        u32 words[TIMES][WORDS];
        float weight[TIMES];
#pragma unroll
        for (int n = 0; n < TIMES; n++) {
            const merge_state *state = &p->states[first + n];
            weight[n] = first + n < p->num_states ? weights[first + n] : ABSENT;
            if (weight[n] == ABSENT) continue;
            qi_load_words(words[n],
                          qi_at(state->o, DTYPE_STATE,
                                token * state->o_stride[0] + head * state->o_stride[1] + d),
                          DTYPE_STATE, VEC);
        }
#pragma unroll
        for (int n = 0; n < TIMES; n++) {
            float in[VEC];
            if (weight[n] == ABSENT) continue;
            qi_unpack_all(in, words[n], DTYPE_STATE, VEC);
            for (int i = 0; i < VEC; i++) acc[i] += weight[n] * in[i];
        }
    }
}

QI_KERNEL(merge, merge_params)
{
    __shared__ float of_rows[ROWS][QI_MAX_STATES];
    float *weights = of_rows[threadIdx.x / LANES];
    const i64 row = (i64)blockIdx.x * ROWS + threadIdx.x / LANES;
    const int lane = threadIdx.x % LANES, here = row < p.tokens * p.heads;
    const i64 token = here ? row / p.heads : 0, head = here ? row - token * p.heads : 0;
    float max = -QI_INFINITY, sum = 0.f;
    griddepcontrol_wait();
    for (int s = lane; s < p.num_states; s += LANES) {
        const float e = exponent_of(&p, s, token, head);
        weights[s] = e;
        max = e > max ? e : max;
    }
    max = lanes_max(max);
    for (int s = lane; s < p.num_states; s += LANES) {
        const float e = weights[s];
        weights[s] = e == -QI_INFINITY ? ABSENT : exp2f(e - max);
        if (e != -QI_INFINITY) sum += weights[s];
    }
    sum = lanes_sum(sum);
    __syncwarp(); /* all weights are there; and lse, which may stand in a state's place, has been read */
    if (!here) return;
    const float scale = sum == 0.f ? 0.f : 1.f / sum; /* 0: no state counts */
    for (i64 d = lane * VEC; d < p.dim; d += LANES * VEC) {
        float acc[VEC] = {};
        sum_states(&p, token, head, d, weights, acc);
        for (int i = 0; i < VEC; i++) acc[i] *= scale;
        qi_store(qi_to(p.o, DTYPE_O, token * p.o_stride[0] + head * p.o_stride[1] + d), acc,
                 DTYPE_O, VEC);
    }
    if (p.lse && lane == 0)
        p.lse[token * p.lse_stride[0] + head * p.lse_stride[1]] =
            sum == 0.f ? -QI_INFINITY : (max + log2f(sum)) / p.log2_scale;
}
