/* wgmma_scores.cuh - from products to weights: what a warpgroup of the Hopper tile does between its two matrix
 * products, in registers. A lane has KEYS / 8 times two neighbouring keys of each of two rows, g and g + 8 of its
 * warp's 16 (kern/cuda/mma_sm90.cuh).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_WGMMA_SCORES_CUH
#define QI_ATTENTION_WGMMA_SCORES_CUH

#include "ops/attention/wgmma_items.cuh"

/* Registers of a thread: scores, the same as weights, o. */
enum { NUM_SCORES = KEYS / 2, NUM_WEIGHTS = KEYS * PRODUCT_BYTES / 8, NUM_SUMS = COLUMNS / 2 };

/* The largest weight of a row when its maximum was last followed is 2 to the power of this. It may grow to 2^8, which
 * all types hold; in e4m3 weights are multiples of 2^-9, and have their 3 bits of mantissa from 2^-6 on. */
#define TOP_WEIGHT (FP8 ? 6.f : 0.f)

/* The lane's two rows. */
typedef struct two_rows {
    int m[2];       /* of the tile */
    float scale[2]; /* makes a product a score */
    float max[2];   /* that weights are relative to, 2^TOP_WEIGHT less than the maximum */
    float sum[2];   /* the lane's part of the sum of weights */
} two_rows;

/* An item as the loop over its blocks needs it. */
typedef struct tile_item {
    const prefill_item_notes *notes;
    const prefill_row *rows;
    int first, blocks;
    int plain_begin, plain_end; /* as of the notes */
} tile_item;

/* Scores in natural units times log2(e) by way of a soft cap: tanh(x) = 1 - 2 / (1 + e^2x), within 1e-6 of the
 * cap. */
QI_INLINE void cap_scores(float cap, const tile_item *t, const two_rows *r, float *s)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float scale = fabsf(t->rows[r->m[h]].scale) * QI_LOG2E;
        const float twice = 2.f * scale / cap, largest = cap * QI_LOG2E;
#pragma unroll
        for (int i = h * 2; i < NUM_SCORES; i += 4)
#pragma unroll
            for (int j = i; j < i + 2; j++)
                s[j] = cap > 0.f ? largest - 2.f * largest * rcp(1.f + ex2(s[j] * twice))
                                 : s[j] * scale;
    }
}

/* A bit for each of the lane's KEYS / 4 keys of a row: those before key `end` of the block. */
QI_INLINE u32 keys_before(int end)
{
    const int mine = end - tid_x() % 4 * 2, pair = mine % 8 < 2 ? mine % 8 : 2;
    const int count = mine <= 0 ? 0 : mine / 8 * 2 + pair;
    return count < 32 ? (1u << count) - 1 : ~0u;
}
_Static_assert(KEYS / 4 <= 32, "bits of a word");

/* Hides from the rows what they do not see of the block at key `first`: keys outside the item's, too. */
QI_INLINE void mask_scores(const attention_params *p, const tile_item *t, int first,
                           const two_rows *r, float *s)
{
    const prefill_item_notes *n = t->notes;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        /* the row itself, and keys from low to before end, as numbers of the block's */
        const i64 own = (i64)t->rows[r->m[h]].row.position - n->group.kv_offset - first;
        i64 low = n->work.kv_begin - first, end = n->work.kv_end - first;
        if (CAUSAL && own + 1 < end) end = own + 1;
        if (WINDOW && p->window_right >= 0 && own + p->window_right + 1 < end)
            end = own + p->window_right + 1;
        if (WINDOW && p->window_left >= 0 && own - p->window_left > low) low = own - p->window_left;
        u32 seen = keys_before((int)(end < 0 ? 0 : end < KEYS ? end : KEYS));
        seen &= ~keys_before((int)(low < 0 ? 0 : low < KEYS ? low : KEYS));
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) {
            float *x = &s[i / 2 * 4 + h * 2 + i % 2];
            *x = (seen >> i & 1) ? *x : -QI_INFINITY;
        }
    }
}

/* Scores of every feature; 8 keys at a time, for which the others move on, since this is long. */
QI_INLINE void general_scores(const attention_cuda_params *c, const tile_item *t, int first,
                              const two_rows *r, float *s)
{
    const qi_work *w = &t->notes->work;
    const qi_group *g = &t->notes->group;
#pragma unroll 1
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int m = r->m[i / 2], index = first + n * 8 + (int)threadIdx.x % 4 * 2 + i % 2;
            float x = SOFTMAX ? -QI_INFINITY : 0.f;
            if (index >= w->kv_begin && index < w->kv_end)
                x = score(c, g, t->rows[m].row, prefill_head(w, m), index, g->kv_offset + index,
                          s[i], fabsf(t->rows[m].scale));
            s[i] = x;
        }
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = s[i];
#pragma unroll
        for (int i = 0; i < NUM_SCORES - 4; i++) s[i] = s[i + 4];
#pragma unroll
        for (int i = 0; i < 4; i++) s[NUM_SCORES - 4 + i] = x[i];
    }
}

/* Do all rows see all keys of the block at `first`? */
QI_INLINE int is_plain(const tile_item *t, int first)
{
    return first >= t->plain_begin && first + KEYS <= t->plain_end;
}

/* From products of the block at `first` to scores. */
QI_INLINE void finish_scores(const attention_cuda_params *c, const tile_item *t, int first,
                             const two_rows *r, float *s)
{
    if (GENERAL_SCORES) {
        general_scores(c, t, first, r, s);
        return;
    }
    if (SOFT_CAP) cap_scores(c->at.logits_soft_cap, t, r, s);
    if (!is_plain(t, first)) mask_scores(&c->at, t, first, r, s);
}

/* The maximum that a row's weights are relative to follows the true one only where weights would pass 2^8, so that o is
 * seldom multiplied, and stays far from what f32 and the tensor cores' types hold. Whether a row's does depends on the
 * row alone. */
enum { MOST_WEIGHT_LOG2 = 8 };

/* The largest of the lane's scores of each row. */
QI_INLINE void find_tops(const two_rows *r, const float *s, float top[2])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float x = s[2 * h], y = s[2 * h + 1]; /* two chains are faster than one */
#pragma unroll
        for (int i = 4 + 2 * h; i < NUM_SCORES; i += 4) {
            x = fmaxf(x, s[i]);
            y = fmaxf(y, s[i + 1]);
        }
        top[h] = fmaxf(x, y) * r->scale[h];
    }
}

/* Follows the maximum of rows of which a lane says so. shrink: what the rows' sums and o are to be multiplied by. */
QI_INLINE void follow_tops(two_rows *r, const float top[2], const int follows[2], float shrink[2])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 lanes = __ballot_sync(ALL_LANES, follows[h]) >> (tid_x() % WARP & ~3) & 15;
        float x = top[h];
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
        shrink[h] = 1.f;
        if (!lanes) continue;
        x -= TOP_WEIGHT;
        shrink[h] = ex2(r->max[h] - x);
        r->max[h] = x;
        r->sum[h] *= shrink[h];
    }
}

/* Follows the maxima of a block's scores. Returns whether any of the warp's was followed. */
QI_INLINE int follow_maxima(const float *s, two_rows *r, float shrink[2])
{
    float top[2];
    find_tops(r, s, top);
    const int follows[2] = {top[0] > r->max[0] + MOST_WEIGHT_LOG2,
                            top[1] > r->max[1] + MOST_WEIGHT_LOG2};
    if (!__any_sync(ALL_LANES, follows[0] || follows[1]))
        return 0; /* of no lane's keys: the row's other lanes need not be asked */
    follow_tops(r, top, follows, shrink);
    return 1;
}

/* Four scores, two of each row, to weights, 2^(scale s - max), and this lane's part of their sum. */
QI_INLINE void weigh_scores(two_rows *r, float *s)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int h = i / 2;
        s[i] = ex2(fmaf(s[i], r->scale[h], -r->max[h]));
        r->sum[h] += s[i];
    }
}

/* Weights as the left operand of the next product. Of e4m3 a register is of four columns, where a lane has four keys of
 * two columns of 8: so the keys of 16 change places, in values (wgmma_transpose.cuh) as here. */
QI_INLINE void pack_weights(const float *s, u32 *weights)
{
#if FP8
#pragma unroll
    for (int i = 0; i < NUM_WEIGHTS; i++) {
        const float *x = s + i / 2 * 8 + i % 2 * 2;
        weights[i] = f32_to_e4m3x4(x[0], x[1], x[4], x[5]);
    }
#else
#pragma unroll
    for (int i = 0; i < NUM_WEIGHTS; i++) weights[i] = pack_pair(s[2 * i], s[2 * i + 1]);
#endif
}

/* A block's scores to weights by the maxima so far, as the left operand, and this lane's part of their sums. */
QI_INLINE void try_weights(const two_rows *r, const float *s, u32 *weights, float sum[2])
{
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (int i = 0; i < NUM_SCORES; i += 2) {
        const int h = i / 2 % 2;
        const float even = ex2(fmaf(s[i], r->scale[h], -r->max[h]));
        const float odd = ex2(fmaf(s[i + 1], r->scale[h], -r->max[h]));
        sum[h] += even;
        sum[h] += odd;
        weights[i / 2] = pack_pair(even, odd);
    }
}

/* A block's scores to weights. No maximum is looked for first: scores stay as they are, and in the rare case that a lane's sum
 * passes the largest weight, maxima are followed and weights are made again. Returns whether any was followed. */
QI_INLINE int weigh_block(two_rows *r, const float *s, u32 *weights, float shrink[2])
{
    float sum[2], top[2];
    if (!SOFTMAX) {
        pack_weights(s, weights);
        return 0;
    }
    try_weights(r, s, weights, sum);
    const int follows[2] = {sum[0] > 1 << MOST_WEIGHT_LOG2, sum[1] > 1 << MOST_WEIGHT_LOG2};
    const int grew = __any_sync(ALL_LANES, follows[0] || follows[1]);
    if (grew) {
        find_tops(r, s, top);
        follow_tops(r, top, follows, shrink);
        try_weights(r, s, weights, sum);
    }
    r->sum[0] += sum[0];
    r->sum[1] += sum[1];
    return grew;
}

#endif
