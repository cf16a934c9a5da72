/* merge.cpu.c - merging attention states. Tasks share the (token, head) rows; a row of every state
 * is read before the result is written, so the result may stand in a state's place. Bound: memory,
 * one read of every state and one write.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cpu/simd.h"
#include "ops/attention/merge_params.h"

/* out[0, dim) += weight * in */
QI_INLINE void add_row(float *out, float weight, const void *in, i64 dim, const qi_dtype t)
{
    i64 d = 0;
    for (; d + QI_VW <= dim; d += QI_VW)
        vf_store(out + d, vf_load(out + d) + qi_load(qi_at(in, t, d), t) * weight);
    if (d < dim)
        qi_store_n(out + d, QI_F32,
                   qi_load_n(out + d, QI_F32, dim - d) +
                       qi_load_n(qi_at(in, t, d), t, dim - d) * weight,
                   dim - d);
}

static void add_state(float *out, float weight, const void *in, i64 dim, qi_dtype t)
{
    switch (t) {
    case QI_F32: add_row(out, weight, in, dim, QI_F32); break;
    case QI_F16: add_row(out, weight, in, dim, QI_F16); break;
    default: add_row(out, weight, in, dim, QI_BF16); break;
    }
}

static void merge_one(const merge_params *p, i64 token, i64 head, float *acc)
{
    float max = -INFINITY, sum = 0.f, exponent[QI_MAX_STATES];
    for (i32 s = 0; s < p->num_states; s++) {
        const merge_state *state = &p->states[s];
        exponent[s] =
            p->log2_scale * state->lse[token * state->lse_stride[0] + head * state->lse_stride[1]];
        max = exponent[s] > max ? exponent[s] : max;
    }
    memset(acc, 0, (size_t)p->dim * sizeof *acc);
    for (i32 s = 0; s < p->num_states; s++) {
        if (exponent[s] == -INFINITY) continue; /* its o may be anything */
        const merge_state *state = &p->states[s];
        const i64 at = token * state->o_stride[0] + head * state->o_stride[1];
        const float weight = exp2f(exponent[s] - max);
        add_state(acc, weight, qi_at(state->o, p->dtype_state, at), p->dim, p->dtype_state);
        sum += weight;
    }
    const float scale = sum == 0.f ? 0.f : 1.f / sum; /* 0: no state counts */
    for (i64 d = 0; d < p->dim; d++) acc[d] *= scale;
    qi_narrow((char *)p->o +
                  (token * p->o_stride[0] + head * p->o_stride[1]) * (i64)qi_size_of(p->dtype_o),
              p->dtype_o, acc, p->dim);
    if (p->lse)
        p->lse[token * p->lse_stride[0] + head * p->lse_stride[1]] =
            sum == 0.f ? -INFINITY : (max + log2f(sum)) / p->log2_scale;
}

QI_CPU_KERNEL(merge)
{
    const merge_params *p = params;
    i64 begin, end;
    qi_task_share(task, p->tokens * p->heads, 1, &begin, &end);
    for (i64 row = begin; row < end; row++)
        merge_one(p, row / p->heads, row % p->heads, task.scratch);
}
