/* wgmma_tile.cuh - the warpgroups that compute on Hopper: 64 rows each of one KV head's queries, tokens times heads of
 * the group, against keys and values that other warps bring. FlashAttention-3 (Shah et al. 2024): the scores of a
 * block are multiplied together with the values of the block before, so that a softmax runs beside a product.
 *
 * Bound: the tensor cores, 2 (head_dim_qk + head_dim_vo) flops a row and key.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_WGMMA_TILE_CUH
#define QI_ATTENTION_WGMMA_TILE_CUH

#include "ops/attention/merge_rows.cuh"
#include "ops/attention/wgmma_store.cuh"

#define WGMMA_CALL_(n, depth, form, type) wgmma_m64n##n##k##depth##_##form##_##type
#define WGMMA_CALL(n, depth, form, type)  WGMMA_CALL_(n, depth, form, type)
#if FP8
#define MULTIPLY(n, form, ...) WGMMA_CALL(n, 32, form, e4m3)(__VA_ARGS__)
#else
#define MULTIPLY(n, form, ...)                                                                     \
    (MMA_TYPE == QI_BF16 ? WGMMA_CALL(n, 16, form, bf16)(__VA_ARGS__)                              \
                         : WGMMA_CALL(n, 16, form, f16)(__VA_ARGS__))
#endif

/* ---- products ------------------------------------------------------------------------------- */

/* Begins s = q k^T; q: of the warpgroup's rows. */
QI_INLINE void multiply_keys(u32 q, u32 k, float *s)
{
#pragma unroll
    for (int i = 0; i < (HEAD_DIM_QK * PRODUCT_BYTES + 31) / 32; i++)
        MULTIPLY(KEYS, ss, s, wgmma_descriptor(q, (u32)(i / 4 * Q_CHUNK_BYTES + i % 4 * 32)),
                 wgmma_descriptor(k, (u32)(i / 4 * KV_CHUNK_BYTES + i % 4 * 32)), i > 0);
    wgmma_commit_group();
}

/* Of e4m3 the sums of a block stand apart, and are added to o in f32, since the tensor cores cut off what is small
 * beside d: for a part of the columns at a time, as registers allow. Otherwise o is the products' d. */
#if FP8
#define PART_COLUMNS 32
#else
#define PART_COLUMNS COLUMNS
#endif
enum { PARTS = COLUMNS / PART_COLUMNS, PART_SUMS = PART_COLUMNS / 2 };

/* With two buffers of weights those of a block are made while the ones before are still multiplied; with one, which is what
 * registers hold elsewhere, after that. */
enum {
    WEIGHT_BUFFERS = WARPGROUPS == 2 && THREADS == 384 && PIECE > 0 && !GENERAL_SCORES &&
                             !SOFT_CAP && NUM_SUMS + NUM_SCORES + 2 * NUM_WEIGHTS <= 192
                         ? 2
                         : 1
};

/* Begins o += weights v, or sums = weights v for columns of the part. */
QI_INLINE void multiply_values(const u32 *weights, u32 v, const int part, float *sums, float *o)
{
#if FP8
#pragma unroll
    for (int i = 0; i < KEYS / 32; i++)
        MULTIPLY(PART_COLUMNS, rs, sums, weights + 4 * i,
                 wgmma_descriptor(v, (u32)(part * PART_COLUMNS * 128 + i * 32)), i > 0);
#else
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++)
        MULTIPLY(COLUMNS, rs, o, weights + 4 * i, wgmma_descriptor(v, (u32)i * 2048));
#endif
    wgmma_commit_group();
}

QI_INLINE void hold_scores(float *s)
{
#pragma unroll
    for (int i = 0; i < NUM_SCORES; i++) wgmma_hold(s[i]);
}

/* After a wait: o has the part's sums. */
QI_INLINE void take_sums(const int part, float *sums, float *o)
{
#if FP8
#pragma unroll
    for (int i = 0; i < PART_SUMS; i++) {
        wgmma_hold(sums[i]);
        o[part * PART_SUMS + i] += sums[i];
    }
#else
#pragma unroll
    for (int i = 0; i < NUM_SUMS; i++) wgmma_hold(o[i]);
#endif
}

/* ---- blocks --------------------------------------------------------------------------------- */

/* A warpgroup at its work. */
typedef struct worker {
    const wgmma_params *p;
    char *shared;
    tile_barriers *b;
    int group, tid; /* number of the warpgroup, and of the thread in it */
    ring keys, values;
    u32 item; /* how many were before this one */
} worker;

/* The place of an item's queries is free, once the warp's rows have left from there. */
QI_INLINE void pass_queries(const worker *t, u32 item)
{
    if (t->tid % WARP > 0) return;
    tma_await_reads();
    mbarrier_arrive(&t->b->rows_empty[item % BUFFERS]);
}

/* With two buffers rows may leave while the next item is begun. */
QI_INLINE void pass_last_queries(const worker *t)
{
    if (BUFFERS > 1 && t->item > 0) pass_queries(t, t->item - 1);
}

QI_INLINE u32 tile_of_keys(const worker *t)
{
    return wgmma_tile(t->shared + K_AT + t->keys.stage * K_BYTES, 0);
}

QI_INLINE u32 tile_of_values(const worker *t)
{
    if (FP8) return wgmma_tile(t->shared + TURNED_AT + t->values.stage * TURNED_BYTES, 0);
    return wgmma_tile(t->shared + V_AT + t->values.stage * V_BYTES, KV_CHUNK_BYTES);
}

QI_INLINE void pass_keys(worker *t)
{
    if (t->tid == 0) mbarrier_arrive(&t->b->k_empty[t->keys.stage]);
    ring_next(&t->keys, STAGES);
}

QI_INLINE void wait_for_values(const worker *t)
{
    u64 *full = FP8 ? t->b->turned_full : t->b->v_full;
    mbarrier_wait(&full[t->values.stage], t->values.parity);
}

QI_INLINE void pass_values(worker *t)
{
    u64 *empty = FP8 ? t->b->turned_empty : t->b->v_empty;
    if (t->tid == 0) mbarrier_arrive(&empty[t->values.stage]);
    ring_next(&t->values, STAGES);
}

/* Makes rows [begin, end) of a stage of values zero. */
QI_INLINE void clear_values(char *v, int begin, int end, int tid)
{
#pragma unroll
    for (int c = 0; c < VO_CHUNKS; c++)
#pragma unroll 1
        for (int i = begin * 8 + tid; i < end * 8; i += 128)
            *(uint4 *)(v + c * KV_CHUNK_BYTES + i * 16) = make_uint4(0, 0, 0, 0);
}

/* Waits for the values of the block at `first`. Those of keys that are not the item's become zeros, since a weight
 * of 0 times what lies there may be NaN; every warpgroup sees to it itself, where they were not transposed. */
QI_INLINE void await_values(worker *t, const tile_item *item, int first)
{
    wait_for_values(t);
    if (FP8 || is_plain(item, first)) return;
    const qi_work *w = &item->notes->work;
    const int begin = w->kv_begin - first, end = w->kv_end - first; /* rows of the item's keys */
    if (begin <= 0 && end >= KEYS) return;
    char *v = t->shared + V_AT + t->values.stage * V_BYTES;
    clear_values(v, 0, begin, t->tid);
    clear_values(v, end, KEYS, t->tid);
    fence_proxy_async();
    bar_sync(1 + t->group, 128);
}

/* The part of PARTS of a block's scores to weights; what they are without a softmax. */
QI_INLINE void weigh_part(two_rows *r, float *s, const int part)
{
#pragma unroll
    for (int i = 0; i < NUM_SCORES; i += 4)
        if (SOFTMAX && i * PARTS / NUM_SCORES == part) weigh_scores(r, s + i);
}

/* After the last of a block's products with values, or its only one. */
QI_INLINE void end_values(worker *t, float *sums, float *o)
{
    wgmma_wait_group(0);
    take_sums(PARTS - 1, sums, o);
    pass_values(t);
}

/* The next block of an item, at key `first`: its weights to `next`; the values of the block before, which `weights` are of,
 * to o. */
QI_INLINE void walk_block(worker *t, const tile_item *item, const char *queries, int first,
                          const u32 *weights, two_rows *r, float *s, u32 *next, float *o)
{
    float sums[PART_SUMS], shrink[2];
    int grew;
    mbarrier_wait(&t->b->k_full[t->keys.stage], t->keys.parity);
    wgmma_fence();
    multiply_keys(wgmma_tile(queries, 0), tile_of_keys(t), s);
    await_values(t, item, first - KEYS);
    const u32 v = tile_of_values(t);
    wgmma_fence();
    multiply_values(weights, v, 0, sums, o);
    wgmma_wait_group(1);
    hold_scores(s);
    pass_keys(t);
    finish_scores(&t->p->c, item, first, r, s);
    if (FP8) {
        grew = SOFTMAX && follow_maxima(s, r, shrink);
#pragma unroll
        for (int part = 1; part < PARTS; part++) { /* beside each the next one's weights */
            wgmma_wait_group(0);
            take_sums(part - 1, sums, o);
            wgmma_fence();
            multiply_values(weights, v, part, sums, o);
            weigh_part(r, s, part - 1);
        }
        weigh_part(r, s, PARTS - 1);
        end_values(t, sums, o);
        pack_weights(s, next);
    } else {
        if (WEIGHT_BUFFERS == 1) end_values(t, sums, o);
        grew = weigh_block(r, s, next, shrink);
        if (WEIGHT_BUFFERS == 2) end_values(t, sums, o);
    }
    if (!grew) return;
#pragma unroll
    for (int i = 0; i < NUM_SUMS; i++) o[i] *= shrink[i / 2 % 2];
}

/* The values of an item's last block, at key `first`, to o. Beside them rows are completed. */
QI_INLINE void walk_values(worker *t, const tile_item *item, int first, const u32 *weights,
                           two_rows *r, float *o, float norm[2])
{
    float sums[PART_SUMS];
    await_values(t, item, first);
    const u32 v = tile_of_values(t);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        wgmma_fence();
        multiply_values(weights, v, part, sums, o);
        if (part == PARTS - 1) continue;
        wgmma_wait_group(0);
        take_sums(part, sums, o);
    }
    complete_rows_of_lane(&t->p->c, item, r, norm);
    end_values(t, sums, o);
}

/* 64 rows of the item, of the warp those from row_begin on, whose queries these are: their weighted sums of v to o, which
 * norm is to multiply. */
QI_INLINE void walk_blocks(worker *t, const tile_item *item, const char *queries, int row_begin,
                           two_rows *r, float *o, float norm[2])
{
    float s[NUM_SCORES], shrink[2];
    u32 weights[NUM_WEIGHTS], second[NUM_WEIGHTS];
    u32 *const other = WEIGHT_BUFFERS == 2 ? second : weights;
    int first = item->first;
    mbarrier_wait(&t->b->k_full[t->keys.stage], t->keys.parity);
    wgmma_fence();
    multiply_keys(wgmma_tile(queries, 0), tile_of_keys(t), s);
    pass_last_queries(t);
    open_rows(item, row_begin, r, o);
    wgmma_wait_group(0);
    hold_scores(s);
    pass_keys(t);
    finish_scores(&t->p->c, item, first, r, s);
    if (SOFTMAX) follow_maxima(s, r, shrink);
#pragma unroll
    for (int part = 0; part < PARTS; part++) weigh_part(r, s, part);
    pack_weights(s, weights);
#pragma unroll 1
    for (int i = 1; i < item->blocks; i += WEIGHT_BUFFERS) {
        walk_block(t, item, queries, first += KEYS, weights, r, s, other, o);
        if (WEIGHT_BUFFERS == 1) continue;
        if (i + 1 == item->blocks) {
            walk_values(t, item, first, other, r, o, norm);
            return;
        }
        walk_block(t, item, queries, first += KEYS, other, r, s, weights, o);
    }
    walk_values(t, item, first, weights, r, o, norm);
}

/* Of an item without keys. */
QI_INLINE void walk_nothing(worker *t, const tile_item *item, int row_begin, two_rows *r, float *o,
                            float norm[2])
{
    pass_last_queries(t);
    open_rows(item, row_begin, r, o);
    complete_rows_of_lane(&t->p->c, item, r, norm);
}

/* Of an item without rows of this warpgroup: blocks pass unused. */
QI_INLINE void skip_blocks(worker *t, const tile_item *item)
{
    pass_last_queries(t);
#pragma unroll 1
    for (int i = 0; i < item->blocks; i++) {
        mbarrier_wait(&t->b->k_full[t->keys.stage], t->keys.parity);
        bar_sync(1 + t->group, 128); /* or a stage could pass a warp twice */
        pass_keys(t);
        wait_for_values(t);
        bar_sync(1 + t->group, 128);
        pass_values(t);
    }
}

/* ---- items ---------------------------------------------------------------------------------- */

/* The block that finishes a tile's last piece merges it. */
QI_INLINE void finish_piece_of(worker *t, i32 merge)
{
    const attention_cuda_params *c = &t->p->c;
    const qi_merge *tile = &c->at.plan.merge[merge];
    const int tid = t->group * 128 + t->tid;
    bar_sync(BAR_CONSUMERS, CONSUMERS);
    if (tid == 0) t->b->is_last = draw_ticket(&c->at, merge) == tile->num_pieces - 1;
    bar_sync(BAR_CONSUMERS, CONSUMERS);
    if (t->b->is_last) merge_tile(c, tile, merge, tid, CONSUMERS);
}

/* Warpgroups take 64 rows each; items of no more, which are often short, in turn. */
QI_INLINE void compute_item(worker *t, const prefill_item_notes *notes)
{
    const attention_cuda_params *c = &t->p->c;
    const u32 buffer = t->item % BUFFERS;
    char *queries = t->shared + buffer * Q_BYTES;
    tile_item item = {
        notes, item_rows(t->shared, buffer), 0, 0, notes->plain_begin, notes->plain_end,
    };
    const qi_work *w = &item.notes->work;
    item.first = first_key(t->p, w->kv_begin);
    item.blocks = num_blocks(item.first, w->kv_end);
    const int all = w->num_rows * GROUP_SIZE, part = all <= 64 ? 0 : t->group;
    if (all <= 64 ? t->group != (int)(t->item % WARPGROUPS) : all <= 64 * part) {
        skip_blocks(t, &item);
        return;
    }
    const int row_begin = part * 64 + t->tid / WARP * 16;
    two_rows r;
    float o[NUM_SUMS], norm[2];
    if (item.blocks > 0)
        walk_blocks(t, &item, queries + part * 64 * 128, row_begin, &r, o, norm);
    else
        walk_nothing(t, &item, row_begin, &r, o, norm);
    if (w->slot >= 0) {
        store_partial_rows(c, w, o, norm, row_begin);
        store_lse_of_lane(&c->at, &item, &r);
        return;
    }
    bar_sync(1 + t->group, 128); /* all of the warpgroup's products with its queries are done */
    const int aligned = outputs_aligned(&c->at);
    char *const stage = queries + row_begin * 128;
    if (PLAIN_OUTPUTS && aligned && qi_scale_is_one(&c->o_scale))
        store_plain_rows(t->p, &item, o, norm, stage, row_begin);
    else
        store_rows(c, &item, o, norm, stage, row_begin, aligned);
    store_lse_of_lane(&c->at, &item, &r);
    fence_proxy_async();
}

QI_INLINE void compute_items(const wgmma_params *p, char *shared)
{
    const int tid = (int)threadIdx.x - (THREADS - CONSUMERS);
    worker t = {
        p, shared, barriers_of(shared), (int)uniform((u32)tid / 128), tid % 128, {0, 0}, {0, 0}, 0};
#pragma unroll 1
    for (;; t.item++) {
        const u32 place = t.item % WGMMA_NOTES, buffer = t.item % BUFFERS;
        const prefill_item_notes *notes = item_notes(shared, place);
        mbarrier_wait(&t.b->noted[place], t.item / WGMMA_NOTES & 1);
        if (notes->work.num_rows == 0) break;
        mbarrier_wait(&t.b->rows_full[buffer], t.item / BUFFERS & 1);
        compute_item(&t, notes);
        const i32 slot = notes->work.slot, merge = notes->work.merge;
        forget_item(t.b, place);
        if (BUFFERS == 1) pass_queries(&t, t.item);
        if (slot >= 0 && p->c.at.plan.header->num_levels == 1) finish_piece_of(&t, merge);
    }
    pass_last_queries(&t);
}

#endif
