/* attention.cpu.c - the attention kernel of the CPU: each worker walks its strip of the plan.
 *
 * One kernel, three rows: head dims 64 and 128 as constants in the decode tile, and any. Work items
 * are decode tiles (decode_tile.h) or prefill tiles (prefill_tile.h); the last piece of a cut tile
 * to finish merges it, in key order, so the result does not depend on who that is.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/attention_tile.h"
#include "ops/attention/decode_tile.h"
#include "ops/attention/prefill_tile.h"

#define DEFINE_DECODE(name, dim_qk, dim_vo)                                                        \
    static void name(const attention_params *p, const qi_work *w, float *scratch)                  \
    {                                                                                              \
        switch (p->dtype_kv) {                                                                     \
        case QI_F32: decode_tile(p, w, scratch, dim_qk, dim_vo, QI_F32); break;                    \
        case QI_F16: decode_tile(p, w, scratch, dim_qk, dim_vo, QI_F16); break;                    \
        default: decode_tile(p, w, scratch, dim_qk, dim_vo, QI_BF16); break;                       \
        }                                                                                          \
    }
DEFINE_DECODE(decode_d64, 64, 64)
DEFINE_DECODE(decode_d128, 128, 128)
DEFINE_DECODE(decode_any, p->head_dim_qk, p->head_dim_vo)

static void prefill_any(const attention_params *p, const qi_work *w, float *scratch)
{
    switch (p->dtype_kv) {
    case QI_F32: prefill_tile(p, w, scratch, QI_F32, 0); break;
    case QI_F16: prefill_tile(p, w, scratch, QI_F16, 0); break;
    default:
#if defined(__AVX512BF16__)
        if (p->dtype_q == QI_BF16) {
            prefill_tile(p, w, scratch, QI_BF16, 1);
            break;
        }
#endif
        prefill_tile(p, w, scratch, QI_BF16, 0);
        break;
    }
}

/* o = sum_i w_i o_i / sum_i w_i with w_i = 2^(lse_i - max), pieces in key order. acc:
 * [head_dim_vo]. */
static void merge_row(const attention_params *p, const qi_merge *m, i32 row, float *acc)
{
    const i32 group = p->num_qo_heads / p->num_kv_heads, per_head = m->num_rows * group;
    const i32 head = m->kv_head + row / per_head;
    float max = -INFINITY, sum = 0.f;
    for (i32 i = 0; i < m->num_pieces; i++)
        max = fmaxf(max, p->plan.lse_partial[m->slot + i * m->rows_per_piece + row]);
    memset(acc, 0, (size_t)p->head_dim_vo * sizeof *acc);
    for (i32 i = 0; i < m->num_pieces; i++) {
        const i64 slot = m->slot + i * m->rows_per_piece + row;
        const float lse = p->plan.lse_partial[slot];
        const float weight = lse == -INFINITY ? 0.f : exp2f(lse - max); /* NaN stays NaN */
        const float *o = p->plan.o_partial + slot * p->head_dim_vo;
        for (i32 d = 0; d < p->head_dim_vo; d++) acc[d] += weight * o[d];
        sum += weight;
    }
    finish_row(p, -1, m->row_begin + row % per_head / group, head * group + row % group, acc, max,
               sum);
}

/* Counts a finished piece; the last one merges the tile and leaves the ticket as it was found. */
static void finish_piece(const attention_params *p, const qi_work *w, float *scratch)
{
    i32 lo = 0, hi = p->plan.header->num_merges - 1;
    while (lo < hi) { /* the last merge whose first slot is not above ours */
        const i32 mid = lo + (hi - lo + 1) / 2;
        if (p->plan.merge[mid].slot <= w->slot)
            lo = mid;
        else
            hi = mid - 1;
    }
    const qi_merge *m = &p->plan.merge[lo];
    if (__atomic_add_fetch(&p->plan.ticket[lo], 1, __ATOMIC_ACQ_REL) < m->num_pieces) return;
    for (i32 row = 0; row < m->rows_per_piece; row++) merge_row(p, m, row, scratch);
    __atomic_store_n(&p->plan.ticket[lo], 0, __ATOMIC_RELAXED);
}

QI_INLINE void walk_strips(const attention_params *p, qi_task task,
                           void (*decode)(const attention_params *, const qi_work *, float *))
{
    float *scratch = (float *)(p->scratch + task.index * p->scratch_stride);
    for (i32 worker = task.index; worker < p->num_workers; worker += task.count)
        for (i32 i = p->plan.work_indptr[worker]; i < p->plan.work_indptr[worker + 1]; i++) {
            const qi_work *w = &p->plan.work[i];
            if (w->flags & QI_TILE_PREFILL)
                prefill_any(p, w, scratch);
            else
                decode(p, w, scratch);
            if (w->slot >= 0) finish_piece(p, w, scratch);
        }
}

QI_CPU_KERNEL(attention_d64)
{
    walk_strips(params, task, decode_d64);
}

QI_CPU_KERNEL(attention_d128)
{
    walk_strips(params, task, decode_d128);
}

QI_CPU_KERNEL(attention_any)
{
    walk_strips(params, task, decode_any);
}
