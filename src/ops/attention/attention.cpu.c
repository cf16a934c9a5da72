/* attention.cpu.c - the attention kernel of the CPU: each worker walks its strip of the plan.
 *
 * One kernel, three rows: head dims 64 and 128 as constants in the decode tile, and any; the JIT
 * compiles the general one again with a variant's text. Work items
 * are decode tiles (decode_tile.h) or prefill tiles (prefill_tile.h). The last piece of a cut tile
 * to finish merges it, in key order, so the result does not depend on who that is; with several
 * levels all partial rows are merged by a launch of their own, level by level.
 *
 * JIT constants: QI_VARIANT, HEAD_DIM_QK, HEAD_DIM_VO.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/attention_tile.h"
#include "ops/attention/decode_tile.h"
#include "ops/attention/prefill_tile.h"

#ifndef HEAD_DIM_QK
#define HEAD_DIM_QK (p->head_dim_qk)
#define HEAD_DIM_VO (p->head_dim_vo)
#endif

typedef void (*tile_function)(const attention_params *, const qi_work *, float *);

#ifndef QI_VARIANT
#define DEFINE_DECODE(name, dim)                                                                   \
    static void name(const attention_params *p, const qi_work *w, float *scratch)                  \
    {                                                                                              \
        switch (p->dtype_kv) {                                                                     \
        case QI_F32: decode_tile(p, w, scratch, dim, dim, QI_F32, 0); break;                       \
        case QI_F16: decode_tile(p, w, scratch, dim, dim, QI_F16, 0); break;                       \
        case QI_BF16: decode_tile(p, w, scratch, dim, dim, QI_BF16, 0); break;                     \
        case QI_E4M3: decode_tile(p, w, scratch, dim, dim, QI_E4M3, 0); break;                     \
        case QI_E5M2: decode_tile(p, w, scratch, dim, dim, QI_E5M2, 0); break;                     \
        default: decode_tile(p, w, scratch, dim, dim, QI_I8, 0); break;                            \
        }                                                                                          \
    }
DEFINE_DECODE(decode_d64, 64)
DEFINE_DECODE(decode_d128, 128)
#endif

static void decode_any(const attention_params *p, const qi_work *w, float *scratch)
{
    decode_tile(p, w, scratch, HEAD_DIM_QK, HEAD_DIM_VO, QI_F32, 1);
}

static void prefill_any(const attention_params *p, const qi_work *w, float *scratch)
{
#if defined(__AVX512BF16__) && !defined(QI_VARIANT) /* half the time to compile one */
    const int exact = p->dtype_kv == QI_BF16 || qi_size_of(p->dtype_kv) == 1;
    if (p->dtype_q == QI_BF16 && exact && !CHANGES_KEYS(p) && !CHANGES_QUERIES(p) && SOFTMAX) {
        prefill_tile(p, w, scratch, 1);
        return;
    }
#endif
    prefill_tile(p, w, scratch, 0);
}

/* ---- merging ------------------------------------------------------------------------------ */

/* The pieces of one (row, query head) of one tile: piece i at partial row slot + i * step. */
typedef struct pieces {
    i64 slot, step;
    i32 count;
} pieces;

/* o = sum_i w_i o_i / sum_i w_i with w_i = 2^(lse_i - max), over the pieces of every level in key
 * order; without a softmax their plain sum. acc: [head_dim_vo]. */
static void merge_row(const attention_params *p, const pieces *levels, i32 num_levels,
                      const tile_row *row, i32 qo_head, float *acc)
{
    float max = -INFINITY, sum = 0.f;
    for (i32 l = 0; l < num_levels; l++)
        for (i32 i = 0; i < levels[l].count; i++)
            max = fmaxf(max, p->plan.lse_partial[levels[l].slot + i * levels[l].step]);
    memset(acc, 0, (size_t)p->head_dim_vo * sizeof *acc);
    for (i32 l = 0; l < num_levels; l++)
        for (i32 i = 0; i < levels[l].count; i++) {
            const i64 slot = levels[l].slot + i * levels[l].step;
            const float lse = p->plan.lse_partial[slot];
            /* NaN stays NaN */
            const float weight = !SOFTMAX ? 1.f : lse == -INFINITY ? 0.f : exp2f(lse - max);
            const float *o = p->plan.o_partial + slot * p->head_dim_vo;
            i32 d = 0;
            for (; d + QI_VW <= p->head_dim_vo; d += QI_VW)
                vf_store(acc + d, vf_load(acc + d) + vf_load(o + d) * weight);
            for (; d < p->head_dim_vo; d++) acc[d] += weight * o[d];
            sum += weight;
        }
    finish_row(p, row, qo_head, acc, max, sum);
}

static pieces pieces_of(const attention_params *p, const qi_merge *m, i32 row, i32 qo_head)
{
    const i32 group = p->num_qo_heads / p->num_kv_heads;
    const i32 head = qo_head / group - m->kv_head;
    return (pieces){.slot = m->slot + ((i64)head * m->num_rows + (row - m->row_begin)) * group +
                            qo_head % group,
                    .step = m->rows_per_piece,
                    .count = m->num_pieces};
}

/* Counts a finished piece; the last one merges the tile and leaves the ticket as it was found. */
static void finish_piece(const attention_params *p, const qi_work *w, float *scratch)
{
    const qi_merge *m = &p->plan.merge[w->merge];
    i32 *ticket = &p->plan.ticket[w->merge];
    if (__atomic_add_fetch(ticket, 1, __ATOMIC_ACQ_REL) < m->num_pieces) return;
    const i32 group = p->num_qo_heads / p->num_kv_heads;
    for (i32 row = m->row_begin; row < m->row_begin + m->num_rows; row++) {
        const tile_row r = row_at(p, row);
        for (i32 h = m->kv_head * group; h < (m->kv_head + m->num_kv_heads) * group; h++) {
            const pieces of = pieces_of(p, m, row, h);
            merge_row(p, &of, 1, &r, h, scratch);
        }
    }
    __atomic_store_n(ticket, 0, __ATOMIC_RELAXED);
}

/* Several levels: all rows that have partial ones. */
static void merge_levels(const attention_params *p, qi_task task)
{
    float *scratch = (float *)(p->scratch + task.index * p->scratch_stride);
    const i32 group = p->num_qo_heads / p->num_kv_heads, levels = p->plan.header->num_levels;
    i64 begin, end;
    qi_task_share(task, p->plan.header->num_tokens, 1, &begin, &end);
    for (i64 row = begin; row < end; row++) {
        const tile_row r = row_at(p, (i32)row);
        for (i32 h = 0; h < p->num_qo_heads; h++) {
            pieces of[MAX_LEVELS];
            i32 count = 0;
            for (i32 l = 0; l < levels; l++) {
                const i32 merge =
                    p->plan.row_merge[(l * p->plan.max_tokens + row) * p->num_kv_heads + h / group];
                if (merge >= 0) of[count++] = pieces_of(p, &p->plan.merge[merge], (i32)row, h);
            }
            if (count > 0) merge_row(p, of, count, &r, h, scratch);
        }
    }
}

/* ---- entries ------------------------------------------------------------------------------ */

QI_INLINE void walk_strips(const attention_params *p, qi_task task, tile_function decode_item)
{
    float *scratch = (float *)(p->scratch + task.index * p->scratch_stride);
    const int one_level = p->plan.header->num_levels == 1;
    for (i32 worker = task.index; worker < p->num_workers; worker += task.count)
        for (i32 i = p->plan.work_indptr[worker]; i < p->plan.work_indptr[worker + 1]; i++) {
            const qi_work *w = &p->plan.work[i];
            if (w->flags & QI_TILE_PREFILL)
                prefill_any(p, w, scratch);
            else
                decode_item(p, w, scratch);
            if (w->slot >= 0 && one_level) finish_piece(p, w, scratch);
        }
}

#ifndef QI_VARIANT
QI_CPU_KERNEL(attention_d64)
{
    walk_strips(params, task, decode_d64);
}

QI_CPU_KERNEL(attention_d128)
{
    walk_strips(params, task, decode_d128);
}
#endif

QI_CPU_KERNEL(attention_any)
{
    walk_strips(params, task, decode_any);
}

QI_CPU_KERNEL(attention_levels)
{
    merge_levels(params, task);
}
