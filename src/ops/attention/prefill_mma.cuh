/* prefill_mma.cuh - the prefill tile of GPUs with mma.sync: many rows of one KV head against their keys, by
 * a block of 4 warps. FlashAttention-2 (Dao 2023): scores, weights and o stay in registers.
 *
 * Row m of a tile is query head m % GROUP_SIZE of row m / GROUP_SIZE. A warp has 16 rows, and 16 more 64
 * below where head_dim_vo <= 128, so that few rows spread over all warps. Of 16 x 8 sums lane 4g + c has
 * columns 2c, 2c + 1 of row g, then of row g + 8 (kern/cuda/ptx.cuh, mma_m16n8k16).
 *
 * JIT constants: HEAD_DIM_QK, HEAD_DIM_VO (multiples of 8, to 256), GROUP_SIZE, PAGE_SIZE (0 = ragged),
 * DTYPE_Q, DTYPE_KV, DTYPE_O, CAUSAL, WINDOW, SOFT_CAP, ALIBI, CUSTOM_MASK, SPARSE, MIXED, THREADS = 128;
 * QI_VARIANT.
 * Bound: the tensor cores, which for 128 x 64 x 128 need as long as shared memory for its operands.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_PREFILL_MMA_CUH
#define QI_ATTENTION_PREFILL_MMA_CUH

#include "ops/attention/prefill_store.cuh"

/* ---- scores ------------------------------------------------------------------------------- */

/* s = q k^T of the tile at k; q: of the warp's first row. */
QI_INLINE void multiply_keys(const char *q, const char *k, prefill_scores s, const int tiles)
{
    const int lane = tid_x() % WARP;
    q += lane % 16 * PREFILL_Q_PITCH + lane / 16 * 16;
    k += KV_BYTES == 2 ? (lane / 16 * 8 + lane % 8) * PREFILL_K_PITCH + lane / 8 % 2 * 16
                       : lane * PREFILL_K_PITCH;
#pragma unroll
    for (int t = 0; t < tiles; t++)
#pragma unroll
        for (int n = 0; n < PREFILL_S; n++) s[t][n][0] = s[t][n][1] = s[t][n][2] = s[t][n][3] = 0.f;
#pragma unroll
    for (int d = 0; d < PREFILL_QK; d += 16) {
        u32 a[PREFILL_WARP_TILES][4], b[4];
#pragma unroll
        for (int t = 0; t < tiles; t++) ldmatrix_x4(a[t], q + t * 64 * PREFILL_Q_PITCH + d * 2);
#pragma unroll
        for (int n = 0; n < PREFILL_S; n += 4 / KV_BYTES) {
            ldmatrix_x4(b, k + n * 8 * PREFILL_K_PITCH + d * KV_BYTES);
#pragma unroll
            for (int i = 0; i < 4 / KV_BYTES; i++) {
                const u32 b0 = KV_BYTES == 2 ? b[2 * i] : widen(b[i]);
                const u32 b1 = KV_BYTES == 2 ? b[2 * i + 1] : widen(b[i] >> 16);
#pragma unroll
                for (int t = 0; t < tiles; t++) mma(s[t][n + i], a[t], b0, b1);
            }
        }
    }
}

/* Scores in every row's natural units times log2(e) by way of a soft cap: tanh(x) = 1 - 2 / (1 + e^2x),
 * within 1e-6 of the cap. */
QI_INLINE void cap_scores(float cap, const prefill_row *rows, prefill_scores s, const int tiles)
{
#pragma unroll
    for (int t = 0; t < tiles; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float scale = fabsf(rows[prefill_row_index(t, h)].scale) * QI_LOG2E;
            const float twice = 2.f * scale / cap, largest = cap * QI_LOG2E;
#pragma unroll
            for (int i = 0; i < 2 * PREFILL_S; i++) {
                float *x = &s[t][i / 2][2 * h + i % 2];
                *x = cap > 0.f ? largest - 2.f * largest * rcp(1.f + ex2(*x * twice)) : *x * scale;
            }
        }
}

/* Hides from each row what it does not see of the tile at key `first`. */
QI_INLINE void mask_scores(const attention_params *p, int first, const char *shared,
                           prefill_scores s, const int tiles)
{
    const prefill_item_notes *n = prefill_noted(shared);
    const prefill_row *rows = prefill_rows_of(shared);
    const int column = tid_x() % 4 * 2;
#pragma unroll
    for (int t = 0; t < tiles; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            /* the row itself, and keys from low to high, as numbers of the tile's */
            const i64 own =
                (i64)rows[prefill_row_index(t, h)].row.position - n->group.kv_offset - first;
            i64 low = 0, high = n->work.kv_end - 1 - first;
            if (CAUSAL && own < high) high = own;
            if (WINDOW && p->window_right >= 0 && own + p->window_right < high)
                high = own + p->window_right;
            if (WINDOW && p->window_left >= 0 && own - p->window_left > low)
                low = own - p->window_left;
            const int from = (int)(low < PREFILL_N ? low : PREFILL_N) - column;
            const int to = (int)(high < -1 ? -1 : high < PREFILL_N ? high : PREFILL_N) - column;
#pragma unroll
            for (int i = 0; i < 2 * PREFILL_S; i++) {
                const int key = i / 2 * 8 + i % 2;
                if (key > to || (WINDOW && key < from)) s[t][i / 2][2 * h + i % 2] = -QI_INFINITY;
            }
        }
}

/* Scores of every feature; 8 keys at a time, for which the others move on, since this is long. */
QI_INLINE void general_prefill_scores(const attention_cuda_params *c, int first, const char *shared,
                                      int slot, prefill_scores s, const int tiles)
{
    const prefill_row *rows = prefill_rows_of(shared);
    const qi_work *w = &prefill_noted(shared)->work;
    const qi_group *g = &prefill_noted(shared)->group;
#pragma unroll 1
    for (int n = 0; n < PREFILL_S; n++) {
#pragma unroll
        for (int i = 0; i < 4 * tiles; i++) {
            const int t = i / 4, m = prefill_row_index(t, i / 2 % 2);
            const int key = n * 8 + (int)threadIdx.x % 4 * 2 + i % 2, index = first + key;
            float x = SOFTMAX ? -QI_INFINITY : 0.f;
            if (index < w->kv_end) {
                const int kv_pos =
                    SPARSE ? prefill_positions((char *)shared, slot)[key] : g->kv_offset + index;
                x = score(c, g, rows[m].row, prefill_head(w, m), index, kv_pos, s[t][0][i % 4],
                          fabsf(rows[m].scale));
            }
            s[t][0][i % 4] = x;
        }
#pragma unroll
        for (int i = 0; i < 4 * tiles; i++) {
            const float x = s[i / 4][0][i % 4];
#pragma unroll
            for (int to = 0; to < PREFILL_S - 1; to++)
                s[i / 4][to][i % 4] = s[i / 4][to + 1][i % 4];
            s[i / 4][PREFILL_S - 1][i % 4] = x;
        }
    }
}

/* ---- softmax and values ------------------------------------------------------------------- */

/* The maximum that weights are relative to follows the true one only where that would be 2^8 above it: o
 * is seldom multiplied then, and stays far from what f32 and the tensor cores' types hold. */
QI_INLINE void follow_maxima(const prefill_scores s, const prefill_of_rows scale,
                             prefill_of_rows max, prefill_of_rows sum, prefill_sums o,
                             const int tiles)
{
    float top[PREFILL_WARP_TILES][2];
    int grew = 0;
#pragma unroll
    for (int t = 0; t < tiles; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float x = s[t][0][2 * h], y = s[t][0][2 * h + 1]; /* two chains are faster than one */
#pragma unroll
            for (int n = 1; n < PREFILL_S; n++) {
                x = fmaxf(x, s[t][n][2 * h]);
                y = fmaxf(y, s[t][n][2 * h + 1]);
            }
            top[t][h] = fmaxf(x, y) * scale[t][h];
            grew |= top[t][h] > max[t][h] + 8.f;
        }
    if (!__any_sync(ALL_LANES, grew))
        return; /* of no lane's keys: the row's other lanes need not be asked */
#pragma unroll
    for (int i = 0; i < 2 * tiles; i++) {
        float x = top[i / 2][i % 2];
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
        top[i / 2][i % 2] = x > max[i / 2][i % 2] + 8.f ? x : max[i / 2][i % 2];
    }
#pragma unroll
    for (int t = 0; t < tiles; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float shrink = top[t][h] == max[t][h] ? 1.f : ex2(max[t][h] - top[t][h]);
            max[t][h] = top[t][h];
            sum[t][h] *= shrink;
#pragma unroll
            for (int n = 0; n < PREFILL_O; n++) {
                o[t][n][2 * h] *= shrink;
                o[t][n][2 * h + 1] *= shrink;
            }
        }
}

/* Scores to weights, 2^(scale s - max), and this lane's part of their sum. */
QI_INLINE void weigh_scores(const prefill_of_rows scale, const prefill_of_rows max,
                            prefill_of_rows sum, prefill_scores s, const int tiles)
{
#pragma unroll
    for (int n = 0; n < PREFILL_S; n++)
#pragma unroll
        for (int i = 0; i < 4 * tiles; i++) {
            const int t = i / 4, h = i / 2 % 2;
            const float x = ex2(fmaf(s[t][n][i % 4], scale[t][h], -max[t][h]));
            s[t][n][i % 4] = x;
            sum[t][h] += x;
        }
}

/* o += s v of the tile at v. Of 8-bit values columns 2i and 2i + 1 of 8 have the even and the odd dims of
 * 16. */
QI_INLINE void multiply_values(const char *v, const prefill_scores s, prefill_sums o,
                               const int tiles)
{
    const int lane = tid_x() % WARP;
    v += lane % 16 * PREFILL_V_PITCH + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < PREFILL_N; k += 16) {
        u32 a[PREFILL_WARP_TILES][4], b[4];
#pragma unroll
        for (int t = 0; t < tiles; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *x = &s[t][k / 8 + i / 2][i % 2 * 2];
                a[t][i] = pack_pair(x[0], x[1]);
            }
#pragma unroll
        for (int n = 0; n < PREFILL_O; n += 4 / KV_BYTES) {
            ldmatrix_x4_trans(b, v + k * PREFILL_V_PITCH + n * 8 * KV_BYTES);
            if (KV_BYTES == 1)
#pragma unroll
                for (int i = 0; i < 4; i++) b[i] = __byte_perm(b[i], 0, 0x3120);
#pragma unroll
            for (int i = 0; i < 4 / KV_BYTES && n + i < PREFILL_O; i++) {
                const u32 *pair = KV_BYTES == 2 ? b + 2 * i : b + i / 2 * 2;
                const u32 b0 = KV_BYTES == 2 ? pair[0] : widen(pair[0] >> i % 2 * 16);
                const u32 b1 = KV_BYTES == 2 ? pair[1] : widen(pair[1] >> i % 2 * 16);
#pragma unroll
                for (int t = 0; t < tiles; t++) mma(o[t][n + i], a[t], b0, b1);
            }
        }
    }
}

/* ---- the tile ----------------------------------------------------------------------------- */

/* From products of the tile of keys at `first` to scores. */
QI_INLINE void finish_scores(const attention_cuda_params *c, int first, const char *shared,
                             int slot, prefill_scores s, const int tiles)
{
    const prefill_item_notes *n = prefill_noted(shared);
    if (GENERAL_SCORES) {
        general_prefill_scores(c, first, shared, slot, s, tiles);
        return;
    }
    if (SOFT_CAP) cap_scores(c->at.logits_soft_cap, prefill_rows_of(shared), s, tiles);
    if (first < n->plain_begin || first + PREFILL_N > n->plain_end)
        mask_scores(&c->at, first, shared, s, tiles);
}

/* From scores to weights. */
QI_INLINE void softmax_scores(const char *shared, prefill_scores s, prefill_sums o,
                              prefill_of_rows max, prefill_of_rows sum, const int tiles)
{
    prefill_of_rows scale;
#pragma unroll
    for (int i = 0; i < 2 * tiles; i++)
        scale[i / 2][i % 2] =
            GENERAL_SCORES || SOFT_CAP
                ? 1.f
                : fabsf(prefill_rows_of(shared)[prefill_row_index(i / 2, i % 2)].scale) * QI_LOG2E;
    follow_maxima(s, scale, max, sum, o, tiles);
    weigh_scores(scale, max, sum, s, tiles);
}

/* The item's keys, tile by tile, and then results, by a warp that has rows in `tiles` tiles of 16, or none:
 * then it helps to load. Notes, queries and the first keys are on their way. The next tile is asked for
 * beside the softmax, which leaves the load unit alone. */
QI_INLINE void walk_keys(const attention_cuda_params *c, char *shared, const int tiles)
{
    const attention_params *p = &c->at;
    const prefill_item_notes *n = prefill_noted(shared);
    const char *q = shared + PREFILL_Q_AT + tid_x() / WARP * 16 * PREFILL_Q_PITCH;
    const int two = PREFILL_BUFFERS == 2, end = n->work.kv_end;
    prefill_scores s;
    prefill_sums o = {};
    prefill_of_rows max, sum = {};
#pragma unroll
    for (int i = 0; i < 2 * tiles; i++) max[i / 2][i % 2] = PREFILL_LOWEST;
    int slot = 0;
#pragma unroll 1
    for (int first = n->work.kv_begin; first < end; first += PREFILL_N, slot ^= 1) {
        const int next = first + PREFILL_N, after = next + PREFILL_N;
        char *k = shared + PREFILL_K_AT + two * slot * PREFILL_N * PREFILL_K_PITCH;
        char *v = shared + PREFILL_V_AT + two * slot * PREFILL_N * PREFILL_V_PITCH;
        cp_async_wait_group(0);
        __syncthreads(); /* this tile is there, and nobody is at the one before */
        const int page = find_prefill_page(p, &n->group, after, end);
        if (!two) {
            const prefill_copies values = prefill_copies_to(shared, slot, first, end, n->aligned);
            copy_odd_keys(&values, 1);
            copy_keys(&values, 1);
            cp_async_commit_group();
        }
        multiply_keys(q, k, s, tiles);
        if (!two) {
            cp_async_wait_group(0);
            __syncthreads(); /* the values are there, and nobody is at the keys */
        }
        if (tiles > 0) finish_scores(c, first, shared, slot, s, tiles);
        const prefill_copies copies = prefill_copies_to(shared, slot ^ 1, next, end, n->aligned);
        copy_odd_keys(&copies, 0);
        if (two) copy_odd_keys(&copies, 1);
        copy_keys(&copies, 0);
        if (two) copy_keys(&copies, 1);
        cp_async_commit_group();
        if (SPARSE) __syncthreads(); /* nobody looks at this tile's positions */
        note_prefill_key(p, &n->group, n->work.kv_head, after, end, page, slot, shared);
        if (tiles > 0 && SOFTMAX) softmax_scores(shared, s, o, max, sum, tiles);
        if (tiles > 0) multiply_values(v, s, o, tiles);
    }
    cp_async_wait_group(0); /* what was copied past the last key; where there is none: queries */
    __syncthreads();
    if (tiles > 0) store_prefill_rows(c, o, max, sum, shared, tiles);
}

/* One work item of one KV head, by all threads. What is handed over, PREFILL_SHARED_BYTES, is free
 * afterwards. */
QI_INLINE void prefill_item(const attention_cuda_params *c, const qi_work *item, char *shared)
{
    const attention_params *p = &c->at;
    const qi_work w = *item;
    const qi_group g = p->plan.groups[w.group];
    const int aligned = keys_aligned(p), any = w.kv_begin < w.kv_end;
    for (int i = 0; i < 2 && any; i++) {
        const int first = w.kv_begin + i * PREFILL_N;
        note_prefill_key(p, &g, w.kv_head, first, w.kv_end,
                         find_prefill_page(p, &g, first, w.kv_end), i, shared);
    }
    if (tid_x() == THREADS - 1) {
        prefill_item_notes *n = (prefill_item_notes *)shared;
        n->work = w;
        n->group = g;
        n->aligned = aligned;
        note_plain_keys(p, n);
    }
    note_prefill_rows(c, &w, &g, shared);
    __syncthreads();
    const prefill_copies copies = prefill_copies_to(shared, 0, w.kv_begin, w.kv_end, aligned);
    for (int is_v = 0; any && is_v < PREFILL_BUFFERS; is_v++) {
        copy_odd_keys(&copies, is_v);
        copy_keys(&copies, is_v);
    }
    load_prefill_queries(c, &w, shared);
    cp_async_commit_group();
    /* A copy of the loop for each number of 16 rows that a warp may have; they meet at its barriers. */
    const int below = w.num_rows * GROUP_SIZE - tid_x() / WARP * 16;
    if (PREFILL_WARP_TILES == 2 && below > 64)
        walk_keys(c, shared, PREFILL_WARP_TILES);
    else if (below > 0)
        walk_keys(c, shared, 1);
    else
        walk_keys(c, shared, 0);
    __syncthreads();
}

#endif
