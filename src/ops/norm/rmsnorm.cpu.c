/* rmsnorm.cpu.c - RMSNorm, with or without adding to a residual stream first. Tasks share the
 * tokens.
 *
 * A token's row is widened into task scratch while its squares are summed, then scaled from there:
 * one read and one write of memory a row. Bound: memory, 2 (with residual 4) x hidden_size x size
 * bytes a token.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cpu/stream.h"
#include "ops/norm/rmsnorm_params.h"

#define CHAINS 4 /* independent sums: FMA latency over throughput, halved */

/* n <= QI_VW elements at h of the row that is normalised, which also go to `row`: x, or x added to
 * the residual. */
QI_INLINE vf take(float *row, char *residual, const char *x, i64 h, i64 n, const qi_dtype t)
{
    const i64 at = h * (i64)qi_size_of(t);
    vf v = n == QI_VW ? qi_load(x + at, t) : qi_load_n(x + at, t, n);
    if (residual) {
        v = v + (n == QI_VW ? qi_load(residual + at, t) : qi_load_n(residual + at, t, n));
        if (n == QI_VW)
            qi_store(residual + at, t, v);
        else
            qi_store_n(residual + at, t, v, n);
    }
    if (n == QI_VW)
        vf_store(row + h, v);
    else
        qi_store_n(row + h, QI_F32, v, n);
    return v;
}

/* Fills `row` and returns the sum of its squares. */
QI_INLINE float take_row(float *row, char *residual, const char *x, i64 size, const qi_dtype t)
{
    vf squares[CHAINS];
    QI_UNROLL(CHAINS)
    for (i64 c = 0; c < CHAINS; c++) squares[c] = vf_set1(0.f);
    i64 h = 0;
    for (; h + CHAINS * QI_VW <= size; h += CHAINS * QI_VW) {
        QI_UNROLL(CHAINS)
        for (i64 c = 0; c < CHAINS; c++) {
            const vf v = take(row, residual, x, h + c * QI_VW, QI_VW, t);
            squares[c] = squares[c] + v * v;
        }
    }
    for (; h + QI_VW <= size; h += QI_VW) {
        const vf v = take(row, residual, x, h, QI_VW, t);
        squares[0] = squares[0] + v * v;
    }
    if (h < size) {
        const vf v = take(row, residual, x, h, size - h, t);
        squares[1] = squares[1] + v * v;
    }
    return vf_sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

/* out = row * scale * (bias + weight). Brings x of the next row closer meanwhile: rows are read in
 * turns with such computing, too short each for the hardware to run ahead. */
QI_INLINE void scale_row(char *out, const float *row, float scale, const void *weight, float bias,
                         i64 size, const char *next, const qi_dtype t, const qi_dtype wt,
                         const int streams)
{
    i64 h = 0;
    for (; h + QI_VW <= size; h += QI_VW) {
        qi_prefetch(qi_at(next, t, h));
        const vf w = qi_load(qi_at(weight, wt, h), wt) + bias;
        const vf v = vf_load(row + h) * scale * w;
        if (streams)
            qi_stream(out + h * (i64)qi_size_of(t), t, v);
        else
            qi_store(out + h * (i64)qi_size_of(t), t, v);
    }
    const i64 n = size - h;
    if (n > 0) {
        const vf w = qi_load_n(qi_at(weight, wt, h), wt, n) + bias;
        qi_store_n(out + h * (i64)qi_size_of(t), t, qi_load_n(row + h, QI_F32, n) * scale * w, n);
    }
}

QI_INLINE void norm_rows(const rmsnorm_params *p, qi_task task, const qi_dtype t, const qi_dtype wt)
{
    const i64 size = p->hidden_size, bytes = (i64)qi_size_of(t);
    i64 begin, end;
    qi_task_share(task, p->num_tokens, 1, &begin, &end);
    for (i64 token = begin; token < end; token++) {
        const char *x = (const char *)p->x + token * p->x_stride * bytes;
        char *residual =
            p->residual ? (char *)p->residual + token * p->residual_stride * bytes : NULL;
        char *out = (char *)p->out + token * p->out_stride * bytes;
        float *row = task.scratch;
        const float squares =
            p->residual ? take_row(row, residual, x, size, t) : take_row(row, NULL, x, size, t);
        const float scale = 1.f / sqrtf(squares / (float)size + p->eps);
        const char *next = x + (token + 1 < end ? p->x_stride * bytes : 0);
        if (p->streams && qi_can_stream(out, t))
            scale_row(out, row, scale, p->weight, p->weight_bias, size, next, t, wt, 1);
        else
            scale_row(out, row, scale, p->weight, p->weight_bias, size, next, t, wt, 0);
    }
    if (p->streams) qi_stream_end();
}

QI_CPU_KERNEL(rmsnorm)
{
    const rmsnorm_params *p = params;
    switch (p->dtype) {
    case QI_F32: norm_rows(p, task, QI_F32, QI_F32); break;
    case QI_F16:
        if (p->weight_dtype == QI_F32)
            norm_rows(p, task, QI_F16, QI_F32);
        else
            norm_rows(p, task, QI_F16, QI_F16);
        break;
    default:
        if (p->weight_dtype == QI_F32)
            norm_rows(p, task, QI_BF16, QI_F32);
        else
            norm_rows(p, task, QI_BF16, QI_BF16);
        break;
    }
}
