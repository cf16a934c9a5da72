/* decode_ahead.cuh - what a block does while the launch before its own may still run.
 *
 * decode_early(): where the plan and old keys are known to stand, it reads its items and asks for the keys that its
 * rings begin with, up to the first that may be of the batch's own rows. Rows of q come into L2.
 *
 * decode_ahead(): else it brings into L2 what its strip begins with, which it would otherwise wait for from DRAM one
 * after another: the place of its work items, the items, their groups, page numbers, rows of q and the first keys. What
 * is read here counts for nothing but that, since it may be about to change: keys, q, even the plan. It
 * leads to memory that there is all the same: the plan's arrays hold zeros or what some plan of this operator
 * put there, page numbers are looked up in plan.pages alone (other tables, of plans made on the device, are
 * the caller's and may be gone), and rows are prefetched within q, k and v as this launch has them. Reads go
 * past L1, which would keep them.
 *
 * JIT constants: those of decode_mma.cuh.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_DECODE_AHEAD_CUH
#define QI_ATTENTION_DECODE_AHEAD_CUH

#include "ops/attention/decode_loads.cuh"

enum {
    KEYS_AHEAD = DECODE_WARPS * (DECODE_STAGES - 1) * TILE, /* as many as the rings load at once */
};

/* Of a work item what leads to its first rows. */
typedef struct item_ahead {
    int kv_begin, num_keys, kv_head, row_begin, num_rows;
    i64 list;
} item_ahead;

/* What is shared of it: the first items of a strip. */
typedef struct ahead_shared {
    int begin, count;
    item_ahead items[DECODE_ITEMS];
} ahead_shared;
_Static_assert(sizeof(ahead_shared) <= SLOT_BYTES, "it is put where the first ring will be");

QI_INLINE void read_ahead(const attention_params *p, int at, item_ahead *to, decode_guess *guess)
{
    const qi_work *w = &p->plan.work[at];
    const int group = __ldcg(&w->group), merge = __ldcg(&w->merge);
    const qi_group *g = &p->plan.groups[group];
    const int is_decode = __ldcg(&w->flags) == QI_TILE_DECODE;
    const int sparse = SPARSE && (__ldcg(&g->flags) & QI_GROUP_SPARSE);
    to->kv_begin = __ldcg(&w->kv_begin);
    to->num_keys = is_decode && !sparse ? max(__ldcg(&w->kv_end) - to->kv_begin, 0) : 0;
    to->kv_head = __ldcg(&w->kv_head);
    to->row_begin = __ldcg(&w->row_begin);
    to->num_rows = is_decode ? __ldcg(&w->num_rows) : 0;
    to->list = __ldcg(&g->kv_begin);
    guess->group = group;
    guess->merge = merge;
    prefetch_l2(&g->pos_first); /* it may begin another line */
    if (merge < 0) return;
    prefetch_l2(&p->plan.merge[merge]);
    prefetch_l2(&p->plan.ticket[merge]);
}

/* Rows of so many bytes, where each lane says; 0: none. */
QI_INLINE void prefetch_rows(const char *row, const int bytes)
{
    const int lines = (bytes + LINE - 1) / LINE;
#pragma unroll
    for (int i = 0; i < lines; i++) {
        const int e = i * WARP + (int)threadIdx.x % WARP;
        const char *from = (const char *)__shfl_sync(ALL_LANES, (u64)row, e / lines);
        if (from) prefetch_l2(from + e % lines * LINE);
    }
}

QI_INLINE void prefetch_keys(const attention_params *p, const ahead_shared *t)
{
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < KEYS_AHEAD; i += THREADS) {
        const char *k = 0, *v = 0;
        int n = 0, key = i;
        while (n < t->count && key >= t->items[n].num_keys) key -= t->items[n++].num_keys;
        const item_ahead *at = &t->items[n];
        if (n < t->count) find_ahead(p, at->list, at->kv_begin + key, at->kv_head, &k, &v);
        prefetch_rows(k, HEAD_DIM_QK * KV_BYTES);
        prefetch_rows(v, HEAD_DIM_VO * KV_BYTES);
    }
}

/* Rows of q, tokens times heads of the group, where they stand in the plan's order. */
QI_INLINE void prefetch_query(const attention_params *p, int row_begin, int rows, int kv_head)
{
    enum { LINES = (HEAD_DIM_QK * qi_size_of(DTYPE_Q) + LINE - 1) / LINE };
    for (int e = (int)threadIdx.x; e < rows * LINES; e += THREADS) {
        const int m = e / LINES;
        const i64 token = row_begin + m / GROUP_SIZE;
        const i64 head = kv_head * GROUP_SIZE + m % GROUP_SIZE;
        if (token < p->q_rows)
            prefetch_l2(qi_at(p->q, DTYPE_Q, token * p->q_stride[0] + head * p->q_stride[1]) +
                        e % LINES * LINE);
    }
}

/* Where the page number is that this lane looks up first (decode_find_pages). */
QI_INLINE void guess_page(const attention_params *p, const item_ahead *i, decode_guess *guess)
{
    const int warp = threadIdx.x / WARP;
    const int in_pages = DECODE_PIECE > 0 || (PAGE_SIZE % TILE == 0 && i->kv_begin % TILE == 0);
    const int past = TILE * warp + (in_pages ? decode_piece_ahead() : (int)threadIdx.x % TILE);
    const int key = decode_first(i->kv_begin) + past;
    if (PAGE_SIZE == 0 || key >= i->kv_begin + i->num_keys) return;
    const i64 entry = i->list + key / (PAGE_SIZE | !PAGE_SIZE);
    if (entry >= 0 && entry < p->max_pages) guess->entry = entry;
}

/* The strip of this block. By all threads; another barrier must come before *t is used again. */
QI_INLINE void decode_ahead(const attention_cuda_params *c, ahead_shared *t, decode_guess *guess)
{
    const attention_params *p = &c->at;
    if (threadIdx.x < WARP) { /* one warp, so that all threads go by the same count */
        const int *strip = p->plan.work_indptr + blockIdx.x;
        const int begin = __ldcg(strip), count = min(__ldcg(strip + 1) - begin, DECODE_ITEMS);
        if ((int)threadIdx.x < count)
            read_ahead(p, begin + (int)threadIdx.x, &t->items[threadIdx.x], guess);
        if (threadIdx.x == 0) t->begin = begin, t->count = count;
    } else if (threadIdx.x == WARP) {
        prefetch_l2(p->plan.header);
    }
    __syncthreads();
    guess->begin = t->begin;
    guess->count = t->count;
    if (t->count <= 0) return;
    guess_page(p, &t->items[0], guess);
    const item_ahead *i = &t->items[0];
    if (!MIXED) prefetch_query(p, i->row_begin, i->num_rows * GROUP_SIZE, i->kv_head);
    prefetch_keys(p, t);
}

/* Is the stream's next tile of keys that are not of the batch's rows? */
QI_INLINE int decode_is_old(const decode_item *items, const decode_stream *s)
{
    return s->item < s->end && min(s->at + TILE, items[s->item].kv_end) <= items[s->item].old_end;
}

/* Work items [begin, begin + count), the first of a strip, and keys of theirs as they come in the stream. By all
 * threads. */
QI_INLINE void decode_early(const mma_params *m, int begin, int count, decode_stream *s,
                            decode_ring *ring, decode_shared *t)
{
    const attention_params *p = &m->c.at;
    const int aligned = keys_aligned(p);
    decode_guess none;
    decode_guess_nothing(&none);
    decode_read_items(p, begin, count, t);
    const decode_item *i = &t->items[0];
    prefetch_query(p, i->row_begin, i->count, i->kv_head);
    decode_open(p, t->items, count, &none, s);
#pragma unroll 1
    while (s->asked < DECODE_STAGES - 1 && decode_is_old(t->items, s)) {
        decode_load(m, t->items, s, ring, s->asked, aligned);
        s->asked++;
    }
}

#endif
