/* decode_mma.cuh - decode tiles by mma.sync: few query rows against many keys, bound by memory.
 *
 * Keys are the 16 rows of a product and the rows of q, token by token and head by head of the group, its 8
 * columns (or twice 8), so a group of 4 wastes half of a product instead of three quarters:
 *
 *   S^T [16 keys, 8 rows]  = K [16, dim_qk] Q^T         K by ldmatrix, Q^T in registers
 *   O^T [dim_vo, 8 rows]  += V^T [dim_vo, 16 keys] P^T  V by ldmatrix.trans, P^T by movmatrix
 *
 * The warps of a block share a work item: of its tiles of TILE keys a warp takes every DECODE_WARPS-th. Each warp has
 * a ring of DECODE_STAGES tiles of its own in shared memory, filled by Hopper's copy engine or by cp.async,
 * so no warp waits for another but at the end of an item, where the warps' results are added up. The ring
 * runs on through the items of the strip: the next item's keys are under way while one is finished, as is its
 * q, and what the plan says of the items is in shared memory before any is begun. Tickets of cut tiles are drawn when
 * all of these are done.
 *
 * 8-bit keys and values stay 8 bits in shared memory and become f16 on the way to the products, exactly. A
 * register of ldmatrix then has four neighbouring dims of a key, so the columns of a product stand for dims
 * in another order, and q is loaded in that order; of values it has two dims of two keys, so the rows 2g and
 * 2g + 1 of a product are dims of one register.
 *
 * JIT constants: HEAD_DIM_QK, HEAD_DIM_VO, GROUP_SIZE, PAGE_SIZE (0 = ragged), DTYPE_Q, DTYPE_KV, DTYPE_O,
 * CAUSAL, WINDOW, SOFT_CAP, ALIBI, CUSTOM_MASK, SPARSE, MIXED; DECODE_ROWS, 8 or 16, the most rows of q of an item;
 * DECODE_STAGES; DECODE_PIECE, keys that one copy of the copy engine brings, 0: cp.async; THREADS.
 * Bound: HBM, 2 head dims of elements a key and KV head; 16 products of 16x8x16 a tile of 16 keys of 128.
 * Source: the operand swap follows from the fragment layouts of the PTX manual, section mma.m16n8k16.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_DECODE_MMA_CUH
#define QI_ATTENTION_DECODE_MMA_CUH

#include "ops/attention/decode_loads.cuh"
#include "ops/attention/merge_rows.cuh"

/* ---- the rows of an item -------------------------------------------------------------------- */

/* Of lane 4g + c: of each 8 rows of q, rows 2c and 2c + 1. */
typedef struct decode_state {
    const decode_item *item;
    int count, kv_end; /* of the item */
    int low, high;     /* every row sees the keys [low, high) of the list */
    u32 q[NQ][STEPS_QK][2];
    float o[NQ][STEPS_VO][4];
    float max[NQ][2], sum[NQ][2], scale[NQ][2]; /* sum: of this lane's keys */
    int position[NQ][2];
} decode_state;

/* This thread's part of an item's q, to be put into shared memory when the item before is done. */
QI_INLINE void decode_load_query(const attention_cuda_params *c, const decode_item *i,
                                 uint4 q[Q_OF_THREAD])
{
    const attention_params *p = &c->at;
#pragma unroll
    for (int u = 0; u < Q_OF_THREAD; u++) {
        const int unit = u * THREADS + (int)threadIdx.x, m = unit / (2 * STEPS_QK);
        const int d = unit % (2 * STEPS_QK) * 8;
        q[u] = make_uint4(0, 0, 0, 0);
        if (unit >= Q_UNITS || m >= i->count || d >= HEAD_DIM_QK) continue;
        q[u] = load_query_unit(c, decode_row(p, i, m), i->kv_head * GROUP_SIZE + m % GROUP_SIZE, d);
    }
}

QI_INLINE void decode_put_query(const uint4 q[Q_OF_THREAD], decode_shared *t)
{
#pragma unroll
    for (int u = 0; u < Q_OF_THREAD; u++) {
        const int unit = u * THREADS + (int)threadIdx.x;
        if (unit < Q_UNITS)
            *(uint4 *)(t->q + unit / (2 * STEPS_QK) * Q_PITCH + unit % (2 * STEPS_QK) * 16) = q[u];
    }
}

/* The dims of q that this lane has in register `half` of a step: see the head of the file. */
QI_INLINE int decode_dim(int step, int half)
{
    const int c = threadIdx.x % 4;
    return KV_BYTES == 1 ? 16 * step + 4 * c + 2 * half : 16 * step + 2 * c + 8 * half;
}

/* Row m of an item, which a warp has noted where rows are looked up. */
QI_INLINE tile_row decode_noted_row(const attention_params *p, const decode_item *i,
                                    const tile_row *row, int m)
{
    return MIXED ? row[m] : decode_row(p, i, m);
}

/* Which keys all rows see: those in between need no mask but the custom ones. */
QI_INLINE void decode_find_bounds(const attention_params *p, const decode_item *i,
                                  const tile_row *row, decode_state *r)
{
    const int lane = threadIdx.x % WARP;
    int first = i->position, last = first + (i->count - 1) / GROUP_SIZE;
    if (MIXED && (i->flags & QI_GROUP_MIXED)) {
        first = last = row[lane < i->count ? lane : 0].position;
        for (int step = WARP / 2; step > 0; step /= 2) {
            first = min(first, __shfl_xor_sync(ALL_LANES, first, step));
            last = max(last, __shfl_xor_sync(ALL_LANES, last, step));
        }
    }
    i64 low = i->kv_begin, high = i->kv_end;
    const i64 offset = i->kv_offset;
    if (CAUSAL) high = min(high, first + 1 - offset);
    if (WINDOW && p->window_right >= 0) high = min(high, (i64)first + p->window_right + 1 - offset);
    if (WINDOW && p->window_left >= 0) low = max(low, (i64)last - p->window_left - offset);
    r->low = (int)low;
    r->high = (int)high;
}

QI_INLINE void decode_begin(const attention_cuda_params *c, const decode_item *i, decode_shared *t,
                            decode_state *r)
{
    const attention_params *p = &c->at;
    const int lane = threadIdx.x % WARP;
    tile_row *row = t->row[threadIdx.x / WARP];
    r->item = i;
    r->count = i->count;
    r->kv_end = i->kv_end;
    if (MIXED) {
        if (lane < i->count) row[lane] = decode_row(p, i, lane);
        __syncwarp();
    }
    decode_find_bounds(p, i, row, r);
#pragma unroll
    for (int n = 0; n < NQ; n++) {
        const char *q = t->q + (8 * n + lane / 4) * Q_PITCH;
#pragma unroll
        for (int step = 0; step < STEPS_QK; step++)
            for (int half = 0; half < 2; half++)
                r->q[n][step][half] = *(const u32 *)(q + 2 * decode_dim(step, half));
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int m = 8 * n + 2 * (lane % 4) + h;
            r->max[n][h] = -QI_INFINITY;
            r->sum[n][h] = 0.f;
            r->scale[n][h] = query_scale(c, i->kv_head * GROUP_SIZE + m % GROUP_SIZE);
            r->position[n][h] = decode_noted_row(p, i, row, m < i->count ? m : 0).position;
        }
#pragma unroll
        for (int step = 0; step < STEPS_VO; step++)
            for (int j = 0; j < 4; j++) r->o[n][step][j] = 0.f;
    }
}

/* ---- products ------------------------------------------------------------------------------- */

/* s[n] = K q[n] over 16 keys from `keys` on; even and odd steps are added up apart, since a product waits for
 * the one before it. */
QI_INLINE void decode_scores(const char *keys, const decode_state *r, float s[NQ][4])
{
    const int lane = threadIdx.x % WARP;
    const int at = decode_chunk_at(lane % 16, lane / 16, K_PITCH);
    float odd[NQ][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS_QK; step += 2) {
        u32 a[2][4];
        if (KV_BYTES == 2) {
            ldmatrix_x4(a[0], keys + decode_chunk_pair(at, step));
            if (step + 1 < STEPS_QK) ldmatrix_x4(a[1], keys + decode_chunk_pair(at, step + 1));
        } else {
            u32 raw[4]; /* of both steps: four dims of keys g and g + 8 */
            ldmatrix_x4(raw, keys + decode_chunk_pair(at, step / 2));
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++) a[i][j] = widen(raw[2 * i + j % 2] >> j / 2 * 16);
        }
#pragma unroll
        for (int n = 0; n < NQ; n++) {
            if (n > 0 && r->count <= 8) break;
            mma(s[n], a[0], r->q[n][step][0], r->q[n][step][1]);
            if (step + 1 < STEPS_QK) mma(odd[n], a[1], r->q[n][step + 1][0], r->q[n][step + 1][1]);
        }
    }
    for (int n = 0; n < NQ; n++)
        for (int i = 0; i < 4; i++) s[n][i] += odd[n][i];
}

/* o[n] += V^T P^T over 16 keys; b: the registers of P^T. */
QI_INLINE void decode_values(const char *values, const u32 b[NQ][2], decode_state *r)
{
    const int lane = threadIdx.x % WARP;
    if (KV_BYTES == 2) {
        const int at = decode_chunk_at(lane % 8 + lane / 16 * 8, lane / 8 % 2, V_PITCH);
#pragma unroll
        for (int step = 0; step < STEPS_VO; step++) {
            u32 a[4];
            ldmatrix_x4_trans(a, values + decode_chunk_pair(at, step));
#pragma unroll
            for (int n = 0; n < NQ; n++)
                if (n == 0 || r->count > 8) mma(r->o[n][step], a, b[n][0], b[n][1]);
        }
        return;
    }
    const int at = decode_chunk_at(lane % 16, lane / 16, V_PITCH);
#pragma unroll
    for (int step = 0; step < STEPS_VO; step += 2) {
        u32 raw[4];
        ldmatrix_x4_trans(raw, values + decode_chunk_pair(at, step / 2));
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (step + i == STEPS_VO) break;
            /* bytes: (key, dim), (key, dim + 1), (key + 1, dim), (key + 1, dim + 1): dims apart */
            const u32 x = __byte_perm(raw[2 * i], 0, 0x3120),
                      y = __byte_perm(raw[2 * i + 1], 0, 0x3120);
            const u32 a[4] = {widen(x), widen(x >> 16), widen(y), widen(y >> 16)};
#pragma unroll
            for (int n = 0; n < NQ; n++)
                if (n == 0 || r->count > 8) mma(r->o[n][step + i], a, b[n][0], b[n][1]);
        }
    }
}

/* ---- softmax -------------------------------------------------------------------------------- */

/* Products of keys `index` + g and + 8 with rows 2c, 2c + 1 to scores in powers of two. */
QI_INLINE void decode_mask(const attention_cuda_params *c, const decode_state *r,
                           const tile_row *row, int index, int n, float s[4])
{
    const attention_params *p = &c->at;
    const decode_item *of = r->item;
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int key = index + lane / 4 + i / 2 * 8, m = 8 * n + 2 * (lane % 4) + i % 2;
        if (GENERAL_SCORES) {
            const int there = key < r->kv_end && m < r->count;
            const float none = SOFTMAX ? -QI_INFINITY : 0.f;
            const int head = of->kv_head * GROUP_SIZE + m % GROUP_SIZE;
            s[i] = there ? score(c, of->group, decode_noted_row(p, of, row, m), head, key,
                                 key_at(p, of->group, key).position, s[i], r->scale[n][i % 2])
                         : none;
            continue;
        }
        const i64 at = of->kv_offset + (i64)key, from = r->position[n][i % 2];
        int seen = key < r->kv_end;
        if (CAUSAL) seen &= at <= from;
        if (WINDOW && p->window_left >= 0) seen &= at >= from - p->window_left;
        if (WINDOW && p->window_right >= 0) seen &= at <= from + p->window_right;
        if (!seen) s[i] = -QI_INFINITY;
    }
}

/* 16 keys of the list from `index` on: weights from s, relative to the running maxima, which move only when
 * a score passes them by 2^8, since sums and weights up to that are as exact. */
QI_INLINE void decode_weigh(const attention_cuda_params *c, const tile_row *row, int index,
                            float s[NQ][4], decode_state *r)
{
    const attention_params *p = &c->at;
    const int masked = index < r->low || index + 16 > r->high;
#pragma unroll
    for (int n = 0; n < NQ; n++) {
        if (n > 0 && r->count <= 8) break;
        if (!GENERAL_SCORES) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[n][i] *= r->scale[n][i % 2];
                if (SOFT_CAP) s[n][i] = tanhf(s[n][i] / p->logits_soft_cap) * p->logits_soft_cap;
                s[n][i] *= QI_LOG2E;
            }
        }
        if (GENERAL_SCORES || masked) decode_mask(c, r, row, index, n, s[n]);
        if (!SOFTMAX) continue;
        float top[2] = {fmaxf(s[n][0], s[n][2]), fmaxf(s[n][1], s[n][3])};
        for (int step = 4; step < WARP; step *= 2)
            for (int h = 0; h < 2; h++)
                top[h] = fmaxf(top[h], __shfl_xor_sync(ALL_LANES, top[h], step));
        if (__any_sync(ALL_LANES, top[0] > r->max[n][0] + 8.f || top[1] > r->max[n][1] + 8.f)) {
            float shrink[2];
            for (int h = 0; h < 2; h++) {
                const float max = fmaxf(r->max[n][h], top[h]);
                shrink[h] = max == r->max[n][h] ? 1.f : ex2(r->max[n][h] - max);
                r->max[n][h] = max;
                r->sum[n][h] *= shrink[h];
            }
#pragma unroll
            for (int i = 0; i < STEPS_VO; i++)
                for (int j = 0; j < 4; j++) r->o[n][i][j] *= shrink[j % 2];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float max = r->max[n][i % 2];
            s[n][i] = ex2(s[n][i] - (max == -QI_INFINITY ? 0.f : max));
            r->sum[n][i % 2] += s[n][i];
        }
    }
}

/* One tile in shared memory, keys of the list from `index` on. */
QI_INLINE void decode_tile(const attention_cuda_params *c, const char *slot, const tile_row *row,
                           int index, decode_state *r)
{
#pragma unroll
    for (int sub = 0; sub < TILE; sub += 16) {
        if (sub > 0 && index + sub >= r->kv_end) break;
        float s[NQ][4] = {};
        u32 b[NQ][2];
        decode_scores(slot + decode_row_at(sub, K_PITCH), r, s);
        decode_weigh(c, row, index + sub, s, r);
#pragma unroll
        for (int n = 0; n < NQ; n++)
            for (int i = 0; i < 2; i++)
                b[n][i] = movmatrix_trans(pack_pair(s[n][2 * i], s[n][2 * i + 1]));
        decode_values(slot + TILE * K_PITCH + decode_row_at(sub, V_PITCH), b, r);
    }
}

/* ---- the end of an item --------------------------------------------------------------------- */

/* Where sum d of row m is: rows 2c on other banks for each c, and four sums stay side by side. */
QI_INLINE int decode_sum_at(int m, int d)
{
    return m * SUM_PITCH + (d ^ m / 2 % 4 * 8);
}

/* A warp's results to shared memory, its sums of v into the slot that it has just used. */
QI_INLINE void decode_put(decode_state *r, int place, char *slot, decode_shared *t)
{
    const int lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4;
    float *sums = (float *)slot;
    __syncwarp(); /* all lanes have read the tile */
#pragma unroll
    for (int n = 0; n < NQ; n++) {
        for (int step = 4; step < WARP; step *= 2)
            for (int h = 0; h < 2; h++)
                r->sum[n][h] += __shfl_xor_sync(ALL_LANES, r->sum[n][h], step);
        for (int h = 0; h < 2; h++) {
            const int m = 8 * n + 2 * c + h;
            if (g == 0) t->max[place][m] = r->max[n][h], t->sum[place][m] = r->sum[n][h];
#pragma unroll
            for (int i = 0; i < STEPS_VO; i++) {
                const int d = KV_BYTES == 1 ? 16 * i + 2 * g : 16 * i + g;
                sums[decode_sum_at(m, d)] = r->o[n][i][h];
                sums[decode_sum_at(m, d + (KV_BYTES == 1 ? 1 : 8))] = r->o[n][i][2 + h];
            }
        }
    }
    if (lane == 0) t->sums[place] = (int)((char *)sums - (char *)t);
    decode_fence();
}

/* Adds up what `places` warps have put, in key order, and writes the item's result: four dims a thread. */
QI_INLINE void decode_finish(const attention_cuda_params *c, const decode_item *of,
                             const tile_row *row, int places, const decode_shared *t)
{
    const attention_params *p = &c->at;
    enum { QUADS = HEAD_DIM_VO / 4 };
    for (int e = (int)threadIdx.x; e < of->count * QUADS; e += THREADS) {
        const int m = e / QUADS, d = e % QUADS * 4;
        float max = -QI_INFINITY, sum = 0.f, o[4] = {}, lse[DECODE_WARPS];
#pragma unroll
        for (int i = 0; i < DECODE_WARPS; i++) {
            lse[i] = i < places ? t->max[i][m] : -QI_INFINITY;
            max = fmaxf(max, lse[i]);
        }
#pragma unroll
        for (int i = 0; i < DECODE_WARPS; i++) {
            const int there =
                i < places ? i : 0; /* no branch, so that no place waits for another */
            const float *sums = (const float *)((const char *)t + t->sums[there]);
            const float4 v = *(const float4 *)(sums + decode_sum_at(m, d));
            const float part = t->sum[there][m];
            const float weight = !SOFTMAX ? 1.f : lse[i] == -QI_INFINITY ? 0.f : ex2(lse[i] - max);
            if (i >= places) continue;
            sum += weight * part;
            o[0] += weight * v.x, o[1] += weight * v.y, o[2] += weight * v.z, o[3] += weight * v.w;
        }
        if (of->slot < 0) {
            const int head = of->kv_head * GROUP_SIZE + m % GROUP_SIZE;
            const tile_row to = decode_noted_row(p, of, row, m);
            const float norm = finish_row(c, to, head, max, sum, d == 0);
            for (int i = 0; i < 4; i++) o[i] *= norm;
            store_outputs(c, to, head, d, o);
            continue;
        }
        const float norm = norm_of(sum);
        const i64 slot = (i64)of->slot + m;
        *(float4 *)(p->plan.o_partial + slot * HEAD_DIM_VO + d) =
            make_float4(o[0] * norm, o[1] * norm, o[2] * norm, o[3] * norm);
        if (d == 0) p->plan.lse_partial[slot] = lse_of(max, sum);
    }
}

/* Is item `lane` of the `count` in shared memory a piece of a cut tile? */
QI_INLINE int decode_is_piece(int count, const decode_shared *t)
{
    const int lane = threadIdx.x % WARP;
    return lane < count && t->items[lane].count > 0 && t->items[lane].slot >= 0;
}

/* Counts these pieces, whose partial rows stand before a barrier, and merges the tiles of which they are the last. Only
 * once all items are done: the tickets' fence waits for whatever the SM has asked for, so that of an item among others it
 * would wait for the rings, 4 us. By all threads; between the barriers nobody writes to the items. */
QI_INLINE void decode_merge(const attention_cuda_params *c, int count, decode_shared *t)
{
    const int lane = threadIdx.x % WARP;
    if (threadIdx.x < WARP) { /* of this warp are the threads that read the items that follow */
        const decode_item *of = &t->items[min(lane, count - 1)];
        const int is_last =
            decode_is_piece(count, t) && draw_ticket(&c->at, of->merge) == of->cut.num_pieces - 1;
        const u32 last = __ballot_sync(ALL_LANES, is_last);
        if (lane == 0) t->last = last;
    }
    __syncthreads();
    int warp = (int)threadIdx.x / WARP; /* tiles begin with the warp behind the one before's last */
    for (u32 last = t->last; last != 0; last &= last - 1) {
        const decode_item *i = &t->items[__ffs((int)last) - 1];
        merge_tile(c, &i->cut, i->merge, warp * WARP + lane, THREADS);
        warp = (int)((u32)(warp + DECODE_WARPS * DECODE_ROWS - i->count) % DECODE_WARPS);
    }
    __syncthreads();
}

/* ---- a strip -------------------------------------------------------------------------------- */

/* The first `count` items in shared memory, whose stream is open. */
QI_INLINE void decode_chunk(const mma_params *params, int count, int one_level, decode_stream *s,
                            decode_ring *ring, decode_shared *t)
{
    const attention_cuda_params *c = &params->c;
    const attention_params *p = &c->at;
    const int warp = (int)threadIdx.x / WARP, aligned = keys_aligned(p);
    decode_state state;
    uint4 q[Q_OF_THREAD];
    decode_load_query(c, &t->items[0], q);
#pragma unroll 1
    for (int i = s->asked; i < DECODE_STAGES - 1; i++)
        decode_load(params, t->items, s, ring, (ring->now + i) % DECODE_STAGES, aligned);
    decode_put_query(q, t);
    if (threadIdx.x == 0)
        t->sums[0] = -RINGS_BYTES; /* decode_finish() reads there even of no keys */
    __syncthreads();
    /* The same in all warps; asked here, since after the last item's barrier the next ones may be read already. */
    const int merges = one_level && __any_sync(ALL_LANES, decode_is_piece(count, t));
    int first = 0;
#pragma unroll 1
    for (int n = 0; n < count; n++) {
        const decode_item *of = &t->items[n];
        const int tiles = decode_tiles(of), place = decode_place(first);
        decode_begin(c, of, t, &state);
        if (n + 1 < count) decode_load_query(c, of + 1, q);
#pragma unroll 1
        for (int i = place; i < tiles; i += DECODE_WARPS) {
            const int index = of->first + i * TILE;
            const char *slot = decode_await(params, ring, of, index);
            __syncwarp(); /* all lanes have read the tile before */
            decode_load(params, t->items, s, ring, ring->used, aligned);
            decode_tile(c, slot, t->row[warp], index, &state);
            decode_ring_next(ring);
        }
        if (place < tiles) decode_put(&state, place, ring->slots + ring->used * SLOT_BYTES, t);
        __syncthreads();
        decode_finish(c, of, t->row[warp], min(tiles, DECODE_WARPS), t);
        if (n + 1 < count) decode_put_query(q, t);
        __syncthreads();
        first = (first + tiles) % DECODE_WARPS;
    }
    cp_async_wait_group(0);
    if (merges) decode_merge(c, count, t);
}

/* The decode items among work items [begin, end), by all threads. is_open: the first are in shared memory, and their
 * stream is open. */
QI_INLINE void decode_items(const mma_params *m, int begin, int end, int one_level, int is_open,
                            decode_guess *guess, decode_stream *s, decode_ring *ring,
                            decode_shared *t)
{
    const attention_params *p = &m->c.at;
    decode_fence(); /* of what decode_ahead() had there */
    int here = is_open || decode_read_guessed(p, begin, end, guess, t); /* are they there? */
#pragma unroll 1
    for (int from = begin; from < end; from += DECODE_ITEMS) {
        const int count = min(end - from, DECODE_ITEMS);
        if (!here) decode_read_items(p, from, count, t);
        if (!is_open) decode_open(p, t->items, count, guess, s);
        decode_chunk(m, count, one_level, s, ring, t);
        decode_guess_nothing(guess);
        here = is_open = 0;
    }
}

#endif
