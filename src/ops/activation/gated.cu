/* gated.cu - activation(gate) * up, elementwise: a block a piece of a row, a thread TIMES accesses of both
 * inputs, all under way at once.
 *
 * JIT constants: DTYPE; VEC, elements of an access; KIND, GATED_SILU and so on; TIMES; THREADS.
 * Bound: HBM, 3 x size bytes an element. For 16-bit types a sigmoid is 2 MUFU and about 6 other instructions:
 * an eighth of what the bytes take.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/activation/gated_params.h"

/* x / (1 + e^-y), by a power that is at most 1; 0 where it is beyond f32, though x may be -infinity there. */
QI_INLINE float times_sigmoid(float x, float y)
{
    const float size = fabsf(y);
    if (DTYPE == QI_F32) {
        const float power = expf(-size);
        return (y < 0.f ? fmaxf(x, -1e30f) * power : x) / (1.f + power);
    }
    const float power = ex2(-QI_LOG2E * size);
    return (y < 0.f ? fmaxf(x, -1e30f) * power : x) * __fdividef(1.f, 1.f + power);
}

QI_INLINE float activate(float x)
{
    if (KIND == GATED_SILU) return times_sigmoid(x, x);
    /* x Phi(x) = x/2 erfc(-x / sqrt(2)), without cancellation where x is negative */
    if (KIND == GATED_GELU) return x < -15.f ? -0.f : 0.5f * x * erfcf(x * -0.70710678118654752f);
    /* x/2 (1 + tanh u) = x / (1 + exp(-2u)) */
    const float u = (x + x * x * x * 0.044715f) * 0.79788456080286536f;
    return times_sigmoid(x, 2.f * u);
}

QI_KERNEL(gated, gated_params)
{
    enum { WORDS = qi_words(DTYPE, VEC) };
    const i64 first = ((i64)blockIdx.x * TIMES * THREADS + threadIdx.x) * VEC;
    griddepcontrol_wait();
    for (i64 token = blockIdx.y; token < p.num_tokens; token += gridDim.y) {
        const char *gates = qi_at(p.gate, DTYPE, token * p.gate_stride);
        const char *ups = qi_at(p.up, DTYPE, token * p.up_stride);
        char *out = qi_to(p.out, DTYPE, token * p.out_stride);
        u32 gate[TIMES][WORDS], up[TIMES][WORDS];
#pragma unroll
        for (int n = 0; n < TIMES; n++) {
            const i64 i = first + n * THREADS * VEC;
            if (i >= p.size) continue;
            qi_load_words(gate[n], qi_at(gates, DTYPE, i), DTYPE, VEC);
            qi_load_words(up[n], qi_at(ups, DTYPE, i), DTYPE, VEC);
        }
#pragma unroll
        for (int n = 0; n < TIMES; n++) {
            const i64 i = first + n * THREADS * VEC;
            if (i >= p.size) continue;
            float x[VEC], y[VEC];
            qi_unpack_all(x, gate[n], DTYPE, VEC);
            qi_unpack_all(y, up[n], DTYPE, VEC);
            for (int e = 0; e < VEC; e++) x[e] = activate(x[e]) * y[e];
            qi_store(qi_to(out, DTYPE, i), x, DTYPE, VEC);
        }
    }
}
