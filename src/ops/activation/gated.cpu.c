/* gated.cpu.c - activation(gate) * up, elementwise. Tasks share blocks of BLOCK elements of rows,
 * so that one long row is shared too. Bound: memory, 3 x size bytes an element; out of a cache, the
 * exponential.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cpu/stream.h"
#include "ops/activation/gated_params.h"

#define BLOCK 1024
#define AHEAD 512 /* elements to prefetch: hardware stops at the end of a 4-KB page */

/* x Phi(x) = max(x, 0) - a Q(a), a = |x|, Q the normal tail. Q(a) exp(a^2/2) is smooth in
 * u = 1 / (1 + 0.35 a): a minimax polynomial of degree 9 on a <= 14, relative error 3.2e-8. */
QI_INLINE vf gelu(vf x)
{
    vf a = vf_abs(x);
    a = vf_select(a > 15.f, vf_set1(15.f), a); /* Q is 0 from here on; NaN stays */
    const vf u = 1.f / (a * 0.35f + 1.f);
    vf q = vf_set1(-2.914586972e-2f);
    q = q * u + 1.439714192e-1f;
    q = q * u - 2.557137142e-1f;
    q = q * u + 1.591735866e-1f;
    q = q * u - 2.310947178e-2f;
    q = q * u + 1.055078644e-1f;
    q = q * u + 1.198328993e-1f;
    q = q * u + 1.398618658e-1f;
    q = q * u + 1.396214045e-1f;
    q = q * u * vf_exp2(a * a * (-0.5f * QI_LOG2E));
    return vf_max(x, vf_set1(0.f)) - a * q;
}

/* x / (1 + 2^y), and 0 where 2^y is beyond f32: there x may be -infinity. */
QI_INLINE vf over_1_plus_exp2(vf x, vf y)
{
    const vi beyond = y > 127.f;
    return (vf)(~beyond & (vi)(x / (1.f + vf_exp2(y))));
}

QI_INLINE vf activate(vf x, const i32 kind)
{
    if (kind == GATED_SILU) return over_1_plus_exp2(x, x * -QI_LOG2E);
    if (kind == GATED_GELU) return gelu(x);
    /* x/2 (1 + tanh u) = x / (1 + exp(-2u)), without cancellation */
    const vf u = (x + x * x * x * 0.044715f) * 0.79788456080286536f;
    return over_1_plus_exp2(x, u * (-2.f * QI_LOG2E));
}

QI_INLINE void gated_block(const gated_params *p, i64 token, i64 begin, i64 n, const qi_dtype t,
                           const i32 kind, const int streams)
{
    const char *gate = qi_at(p->gate, t, token * p->gate_stride + begin);
    const char *up = qi_at(p->up, t, token * p->up_stride + begin);
    char *out = (char *)p->out + (token * p->out_stride + begin) * (i64)qi_size_of(t);
    i64 i = 0;
    for (; i + QI_VW <= n; i += QI_VW) {
        qi_prefetch(qi_at(gate, t, i + AHEAD));
        qi_prefetch(qi_at(up, t, i + AHEAD));
        const vf v = activate(qi_load(qi_at(gate, t, i), t), kind) * qi_load(qi_at(up, t, i), t);
        if (streams) {
            qi_stream(out + i * (i64)qi_size_of(t), t, v);
        } else {
            qi_prefetch(qi_at(out, t, i + AHEAD));
            qi_store(out + i * (i64)qi_size_of(t), t, v);
        }
    }
    if (i < n)
        qi_store_n(out + i * (i64)qi_size_of(t), t,
                   activate(qi_load_n(qi_at(gate, t, i), t, n - i), kind) *
                       qi_load_n(qi_at(up, t, i), t, n - i),
                   n - i);
}

QI_INLINE void gated_all(const gated_params *p, qi_task task, const qi_dtype t, const i32 kind)
{
    const i64 per_row = (p->size + BLOCK - 1) / BLOCK;
    i64 begin, end;
    qi_task_share(task, p->num_tokens * per_row, 1, &begin, &end);
    for (i64 i = begin; i < end; i++) {
        const i64 token = i / per_row, at = i % per_row * BLOCK;
        const i64 n = p->size - at < BLOCK ? p->size - at : BLOCK;
        if (p->streams && qi_can_stream(qi_at(p->out, t, token * p->out_stride), t))
            gated_block(p, token, at, n, t, kind, 1);
        else
            gated_block(p, token, at, n, t, kind, 0);
    }
    if (p->streams) qi_stream_end();
}

QI_INLINE void gated_kind(const gated_params *p, qi_task task, const qi_dtype t)
{
    switch (p->kind) {
    case GATED_SILU: gated_all(p, task, t, GATED_SILU); break;
    case GATED_GELU: gated_all(p, task, t, GATED_GELU); break;
    default: gated_all(p, task, t, GATED_GELU_TANH); break;
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
