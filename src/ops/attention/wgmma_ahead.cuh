/* wgmma_ahead.cuh - what the warps that compute do while the launch before their own may still run: they bring into L2
 * what a block begins with, which it would otherwise wait for from DRAM one after another: its first item, the item's
 * group and rows, queries, and keys and values of its first block. What is read here counts for nothing but that, as in
 * decode_ahead.cuh, and by the same rules leads to memory that there is.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_WGMMA_AHEAD_CUH
#define QI_ATTENTION_WGMMA_AHEAD_CUH

#include "ops/attention/wgmma_items.cuh"

/* Of `bytes` in a row. */
QI_INLINE void prefetch_row(const char *row, const int bytes)
{
#pragma unroll
    for (int i = 0; i < bytes; i += LINE) prefetch_l2(row + i);
}

/* A row of the item's queries for each query head, and what says where it is. */
QI_INLINE void prefetch_queries(const attention_params *p, const qi_work *w, int tid)
{
    const int row_begin = __ldcg(&w->row_begin), num_rows = __ldcg(&w->num_rows);
    const int head = __ldcg(&w->kv_head) * GROUP_SIZE;
    for (int m = tid; m < num_rows * GROUP_SIZE; m += CONSUMERS) {
        int token = row_begin + m / GROUP_SIZE;
        if (MIXED && __ldcg(&p->plan.header->num_levels) > 1) {
            if (token >= p->plan.max_tokens) continue; /* parts of an item may be of two plans */
            token = __ldcg(&p->plan.rows[token]);
            const int request = __ldcg(&p->plan.token_request[token]);
            prefetch_l2(&p->plan.qo_pos[request]);
            prefetch_l2(&p->plan.qo_indptr[request]);
        }
        if (token >= p->q_rows) continue;
        const i64 at = token * p->q_stride[0] + (head + m % GROUP_SIZE) * p->q_stride[1];
        prefetch_row(qi_at(p->q, DTYPE_Q, at), HEAD_DIM_QK * qi_size_of(DTYPE_Q));
    }
}

/* A key and a value of the item's first block. */
QI_INLINE void prefetch_block(const attention_params *p, const qi_work *w, const qi_group *g,
                              int tid)
{
    const int key = __ldcg(&w->kv_begin) + tid;
    const char *k = 0, *v = 0;
    if (tid >= KEYS || key >= __ldcg(&w->kv_end)) return;
    find_ahead(p, __ldcg(&g->kv_begin), key, __ldcg(&w->kv_head), &k, &v);
    if (k) prefetch_row(k, HEAD_DIM_QK * KV_BYTES);
    if (v) prefetch_row(v, HEAD_DIM_VO * KV_BYTES);
}

/* By the CONSUMERS threads that compute. */
QI_INLINE void look_ahead(const wgmma_params *p, int tid)
{
    const attention_params *a = &p->c.at;
    const qi_plan *plan = &a->plan;
    if (tid == 0) {
        if (p->q_by_tma) tma_prefetch_map(&p->q);
        if (p->o_by_tma) tma_prefetch_map(&p->o);
        if (p->kv_by_tma) tma_prefetch_map(&p->k);
        if (p->kv_by_tma) tma_prefetch_map(&p->v);
    }
    const qi_plan_header *h = plan->header;
    const int count = __ldcg(&h->num_work);
    const int item =
        __ldcg(&h->claimed)
            ? nth_item((int)blockIdx.x, count, __ldcg(&h->shared_begin), __ldcg(&h->num_shared))
            : __ldcg(&plan->work_indptr[blockIdx.x]);
    if (item < 0 || item >= count) return;
    const qi_work *w = &plan->work[item];
    const qi_group *g = &plan->groups[__ldcg(&w->group)];
    if (SPARSE && (__ldcg(&g->flags) & QI_GROUP_SPARSE)) return;
    prefetch_l2(&g->pos_first); /* it may begin another line */
    prefetch_queries(a, w, tid);
    prefetch_block(a, w, g, tid);
}

#endif
