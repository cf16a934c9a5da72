/* gated.cu - activation(gate) * up, elementwise: a thread takes one access of each.
 *
 * JIT constants: DTYPE; VEC, elements of an access; KIND, GATED_SILU and so on; THREADS.
 * Bound: HBM, 3 x size bytes an element.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/activation/gated_params.h"

/* x / (1 + e^y), and 0 where e^y is beyond f32: there x may be -infinity. */
QI_INLINE float over_1_plus_exp(float x, float y)
{
    return y > 88.f ? 0.f : x / (1.f + expf(y));
}

QI_INLINE float activate(float x)
{
    if (KIND == GATED_SILU) return over_1_plus_exp(x, -x);
    /* x Phi(x) = x/2 erfc(-x / sqrt(2)), without cancellation where x is negative */
    if (KIND == GATED_GELU) return x < -15.f ? -0.f : 0.5f * x * erfcf(x * -0.70710678118654752f);
    /* x/2 (1 + tanh u) = x / (1 + exp(-2u)) */
    const float u = (x + x * x * x * 0.044715f) * 0.79788456080286536f;
    return over_1_plus_exp(x, -2.f * u);
}

QI_KERNEL(gated, gated_params)
{
    const i64 per_row = (p.size + VEC - 1) / VEC;
    const i64 at = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (at >= p.num_tokens * per_row) return;
    const i64 token = at / per_row, i = at % per_row * VEC;
    float gate[VEC], up[VEC];
    qi_load(gate, qi_at(p.gate, DTYPE, token * p.gate_stride + i), DTYPE, VEC);
    qi_load(up, qi_at(p.up, DTYPE, token * p.up_stride + i), DTYPE, VEC);
    for (int e = 0; e < VEC; e++) gate[e] = activate(gate[e]) * up[e];
    qi_store(qi_to(p.out, DTYPE, token * p.out_stride + i), gate, DTYPE, VEC);
}
