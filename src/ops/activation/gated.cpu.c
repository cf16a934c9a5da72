/* gated.cpu.c - activation(gate) * up, elementwise.
 *
 * Tasks share blocks of BLOCK elements of rows, so that one long row is shared too.
 * Bound: memory, 3 x size bytes an element; exact GELU by libm's erfc a lane.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cpu/simd.h"
#include "ops/activation/gated_params.h"

#define BLOCK 1024

QI_INLINE vf activate(vf x, const i32 kind)
{
    if (kind == 0) return x / (1.f + vf_exp(-x));
    if (kind == 2) { /* x/2 (1 + tanh u) = x / (1 + exp(-2u)), without cancellation */
        const vf u = (x + x * x * x * 0.044715f) * 0.79788456080286536f;
        return x / (1.f + vf_exp(u * -2.f));
    }
    float lane[QI_VW];
    vf_store(lane, x);
    for (int i = 0; i < QI_VW; i++) lane[i] = 0.5f * lane[i] * erfcf(lane[i] * -0.70710678118654752f);
    return vf_load(lane);
}

QI_INLINE void gated_block(const gated_params *p, i64 token, i64 begin, i64 n, const qi_dtype t,
                           const i32 kind)
{
    const char *gate = qi_at(p->gate, t, token * p->gate_stride + begin);
    const char *up = qi_at(p->up, t, token * p->up_stride + begin);
    char *out = (char *)p->out + (token * p->out_stride + begin) * (i64)qi_size_of(t);
    i64 i = 0;
    for (; i + QI_VW <= n; i += QI_VW)
        qi_store(out + i * (i64)qi_size_of(t), t,
                 activate(qi_load(qi_at(gate, t, i), t), kind) * qi_load(qi_at(up, t, i), t));
    if (i < n)
        qi_store_n(out + i * (i64)qi_size_of(t), t,
                   activate(qi_load_n(qi_at(gate, t, i), t, n - i), kind) *
                       qi_load_n(qi_at(up, t, i), t, n - i), n - i);
}

QI_INLINE void gated_all(const gated_params *p, qi_task task, const qi_dtype t, const i32 kind)
{
    const i64 per_row = (p->size + BLOCK - 1) / BLOCK;
    i64 begin, end;
    qi_task_share(task, p->num_tokens * per_row, 1, &begin, &end);
    for (i64 i = begin; i < end; i++) {
        const i64 at = i % per_row * BLOCK;
        gated_block(p, i / per_row, at, p->size - at < BLOCK ? p->size - at : BLOCK, t, kind);
    }
}

QI_INLINE void gated_kind(const gated_params *p, qi_task task, const qi_dtype t)
{
    switch (p->kind) {
    case 0: gated_all(p, task, t, 0); break;
    case 1: gated_all(p, task, t, 1); break;
    default: gated_all(p, task, t, 2); break;
    }
}

QI_CPU_KERNEL(gated)
{
    const gated_params *p = params;
    switch (p->dtype) {
    case QI_F32: gated_kind(p, task, QI_F32); break;
    case QI_F16: gated_kind(p, task, QI_F16); break;
    default: gated_kind(p, task, QI_BF16); break;
    }
}
