/* decode_mma.cuh - decode tiles by mma.sync: few query rows against many keys, bound by memory.
 *
 * Keys are the 16 rows of a product and the rows of q, token by token and head by head of the group, its 8
 * columns (or twice 8), so a group of 4 wastes half of a product instead of three quarters:
 *
 *   S^T [16 keys, 8 rows]  = K [16, dim_qk] Q^T         K by ldmatrix, Q^T in registers
 *   O^T [dim_vo, 8 rows]  += V^T [dim_vo, 16 keys] P^T  V by ldmatrix.trans, P^T by movmatrix
 *
 * The warps of a block share a work item: of its tiles of TILE keys warp w takes every fourth. Each warp has
 * a ring of DECODE_STAGES tiles of its own in shared memory, filled by cp.async one row of 16 bytes a lane,
 * so no warp waits for another but at the end of an item, where the warps' results are added up. The ring
 * runs on through the items of the strip: the next item's keys are under way while one is finished.
 *
 * 8-bit keys and values stay 8 bits in shared memory and become f16 on the way to the products, exactly. A
 * register of ldmatrix then has four neighbouring dims of a key, so the columns of a product stand for dims
 * in another order, and q is loaded in that order; of values it has two dims of two keys, so the rows 2g and
 * 2g + 1 of a product are dims of one register.
 *
 * JIT constants: HEAD_DIM_QK, HEAD_DIM_VO, GROUP_SIZE, PAGE_SIZE (0 = ragged), DTYPE_Q, DTYPE_KV, DTYPE_O,
 * CAUSAL, WINDOW, SOFT_CAP, ALIBI, CUSTOM_MASK, SPARSE; DECODE_ROWS, 8 or 16, the most rows of q of an item;
 * DECODE_STAGES; THREADS.
 * Bound: HBM, 2 head dims of elements a key and KV head; 32 products of 16x8x16 a tile of 16 keys of 128.
 * Source: the operand swap follows from the fragment layouts of the PTX manual, section mma.m16n8k16.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_DECODE_MMA_CUH
#define QI_ATTENTION_DECODE_MMA_CUH

#include "ops/attention/merge_rows.cuh"
#include "ops/attention/mma_types.cuh"

enum {
    DECODE_WARPS = THREADS / WARP,
    TILE = DECODE_TILE(KV_BYTES),
    K_PITCH = 16 * DECODE_CHUNKS(HEAD_DIM_QK, KV_BYTES), /* bytes of a key in shared memory */
    V_PITCH = 16 * DECODE_CHUNKS(HEAD_DIM_VO, KV_BYTES),
    SLOT_BYTES = DECODE_SLOT_BYTES(HEAD_DIM_QK, HEAD_DIM_VO, KV_BYTES, DECODE_ROWS),
    NQ = DECODE_ROWS / 8,
    STEPS_QK = (HEAD_DIM_QK + 15) / 16,
    STEPS_VO = (HEAD_DIM_VO + 15) / 16,
    SUM_PITCH = 16 * STEPS_VO + 4, /* floats of a row of sums: quads of lanes on different banks */
};

/* What the warps of a block share beside the rings. */
typedef struct decode_shared {
    tile_row row[DECODE_WARPS][DECODE_ROWS];
    float max[DECODE_WARPS][DECODE_ROWS], sum[DECODE_WARPS][DECODE_ROWS];
    const float *sums[DECODE_WARPS]; /* [DECODE_ROWS][SUM_PITCH] sums of v, in key order of tiles */
    int is_last;
} decode_shared;
_Static_assert(sizeof(decode_shared) <= ATTENTION_SHARED_ROOM, "as launched");

/* ---- the stream of keys that a warp loads --------------------------------------------------- */

/* An item as loads see it. */
typedef struct decode_span {
    int kv_begin, kv_end; /* keys of the group's list */
    int list, block, sparse, kv_head;
} decode_span;

typedef struct decode_stream {
    decode_span now, next; /* items `item` and `item + 1` */
    int item, end;
    int first; /* which warp takes the item's first tile: turns, so that short items use all */
    int at;    /* the first key of this warp's next tile */
    int page, in_list; /* of this lane's key of that tile */
} decode_stream;

QI_INLINE int decode_tiles(int kv_begin, int kv_end)
{
    return (kv_end - kv_begin + TILE - 1) / TILE;
}

/* The place of this warp among those of an item. */
QI_INLINE int decode_place(int first)
{
    return ((int)threadIdx.x / WARP + DECODE_WARPS - first) % DECODE_WARPS;
}

/* Items of prefill tiles have no keys here. */
QI_INLINE decode_span decode_span_at(const attention_params *p, int item)
{
    const qi_work *w = &p->plan.work[item];
    const qi_group *g = &p->plan.groups[w->group];
    decode_span s;
    s.kv_begin = w->kv_begin;
    s.kv_end = w->flags == QI_TILE_DECODE ? w->kv_end : w->kv_begin;
    s.list = g->kv_begin;
    s.block = g->block_begin;
    s.sparse = SPARSE && (g->flags & QI_GROUP_SPARSE);
    s.kv_head = w->kv_head;
    return s;
}

/* Looks up the page of this lane's key, one tile before it is loaded. */
QI_INLINE void decode_find_page(const attention_params *p, decode_stream *s)
{
    const int index = s->at + (int)threadIdx.x % TILE;
    s->page = 0;
    s->in_list = index;
    if (s->item >= s->end || index >= s->now.kv_end) return;
    if (s->now.sparse)
        s->in_list =
            p->bsr_indices[s->now.block + index / p->bsr_cols] * p->bsr_cols + index % p->bsr_cols;
    if (PAGE_SIZE > 0) s->page = p->plan.pages[s->now.list + s->in_list / (PAGE_SIZE | !PAGE_SIZE)];
}

/* To the first tile at or after `at` that there is, in this item or a later one. */
QI_INLINE void decode_settle(const attention_params *p, decode_stream *s)
{
    while (s->item < s->end && s->at >= s->now.kv_end) {
        s->first = (s->first + decode_tiles(s->now.kv_begin, s->now.kv_end)) % DECODE_WARPS;
        s->now = s->next;
        s->item++;
        if (s->item + 1 < s->end) s->next = decode_span_at(p, s->item + 1);
        s->at = s->now.kv_begin + TILE * decode_place(s->first);
    }
    decode_find_page(p, s);
}

QI_INLINE void decode_open(const attention_params *p, decode_stream *s, int begin, int end)
{
    s->item = begin;
    s->end = end;
    s->first = 0;
    s->at = 0;
    s->now.kv_begin = s->now.kv_end = 0;
    if (begin < end) s->now = decode_span_at(p, begin);
    if (begin + 1 < end) s->next = decode_span_at(p, begin + 1);
    s->at = s->now.kv_begin + TILE * decode_place(0);
    decode_settle(p, s);
}

/* Loads rows of `dim` elements from where each lane says, `to` rows of `pitch` bytes; rows from `valid` on, and
 * what rows have past dim up to a multiple of 16, become 0. */
QI_INLINE void decode_load_rows(char *to, const int pitch, const char *row, const int dim,
                                int valid)
{
    const int chunks = (dim + 15) / 16 * KV_BYTES, lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < (TILE * chunks + WARP - 1) / WARP; i++) {
        const int e = lane + i * WARP, r = e / chunks, chunk = e % chunks;
        const char *from = (const char *)__shfl_sync(ALL_LANES, (u64)row, r % TILE) + 16 * chunk;
        const int left = dim * KV_BYTES - 16 * chunk;
        const int bytes = r >= valid || left < 0 ? 0 : left < 16 ? left : 16;
        if ((TILE * chunks) % WARP == 0 || r < TILE)
            cp_async_16(to + r * pitch + 16 * chunk, from, (u32)bytes);
    }
}

/* The same from any address, a lane a row: slow. */
QI_INLINE void decode_copy_rows(char *to, const int pitch, const char *row, const int dim,
                                int valid)
{
    const int r = threadIdx.x % WARP;
#pragma unroll 1
    for (int chunk = 0; r < TILE && chunk < (dim + 15) / 16 * KV_BYTES; chunk++)
        copy_elements(to + r * pitch + 16 * chunk, row + 16 * chunk,
                      r < valid ? dim * KV_BYTES - 16 * chunk : 0);
}

/* Begins to load this warp's next tile of the strip into a slot of the ring, if there is one. */
QI_INLINE void decode_load(const attention_params *p, decode_stream *s, char *slot, int aligned)
{
    if (s->item < s->end) {
        const i64 page = s->page, in_page = PAGE_SIZE > 0 ? s->in_list % (PAGE_SIZE | !PAGE_SIZE)
                                                          : (i64)s->now.list + s->in_list;
        const int valid = s->now.kv_end - s->at;
        const char *k = (const char *)p->k, *v = (const char *)p->v;
        if ((int)threadIdx.x % TILE < valid) {
            k += (page * p->k_stride[0] + in_page * p->k_stride[1] +
                  s->now.kv_head * p->k_stride[2]) *
                 KV_BYTES;
            v += (page * p->v_stride[0] + in_page * p->v_stride[1] +
                  s->now.kv_head * p->v_stride[2]) *
                 KV_BYTES;
        }
        char *values = slot + TILE * K_PITCH;
        if (aligned) {
            decode_load_rows(slot, K_PITCH, k, HEAD_DIM_QK, valid);
            decode_load_rows(values, V_PITCH, v, HEAD_DIM_VO, valid);
        } else {
            decode_copy_rows(slot, K_PITCH, k, HEAD_DIM_QK, valid);
            decode_copy_rows(values, V_PITCH, v, HEAD_DIM_VO, valid);
        }
        s->at += DECODE_WARPS * TILE;
        decode_settle(p, s);
    }
    cp_async_commit_group();
}

/* ---- the rows of an item -------------------------------------------------------------------- */

/* Of lane 4g + c: of each 8 rows of q, rows 2c and 2c + 1. */
typedef struct decode_item {
    const qi_group *group;
    int kv_head, kv_end, kv_offset, count; /* count: rows of q that there are */
    int low, high;                         /* every row sees the keys [low, high) of the list */
    u32 q[NQ][STEPS_QK][2];
    float o[NQ][STEPS_VO][4];
    float max[NQ][2], sum[NQ][2], scale[NQ][2]; /* sum: of this lane's keys */
    int position[NQ][2];
} decode_item;

/* The dims of q that this lane has in register `half` of a step: see the head of the file. */
QI_INLINE int decode_dim(int step, int half)
{
    const int c = threadIdx.x % 4;
    return KV_BYTES == 1 ? 16 * step + 4 * c + 2 * half : 16 * step + 2 * c + 8 * half;
}

QI_INLINE void decode_load_queries(const attention_cuda_params *c, const tile_row *row,
                                   decode_item *r)
{
    const attention_params *p = &c->at;
    const int g = threadIdx.x % WARP / 4;
    const int pairs = query_pairs_aligned(p);
#pragma unroll
    for (int n = 0; n < NQ; n++) {
        const int m = 8 * n + g, there = m < r->count;
        const tile_row of = row[there ? m : 0];
        const int head = r->kv_head * GROUP_SIZE + (there ? m : 0) % GROUP_SIZE;
#pragma unroll
        for (int step = 0; step < STEPS_QK; step++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int d = decode_dim(step, half);
                r->q[n][step][half] =
                    there && d < HEAD_DIM_QK ? load_query_pair(c, of, head, d, pairs) : 0;
            }
    }
}

/* Which keys all rows see: those in between need no mask but the custom ones. */
QI_INLINE void decode_find_bounds(const attention_params *p, const qi_work *w, const tile_row *row,
                                  decode_item *r)
{
    const int lane = threadIdx.x % WARP, m = lane < r->count ? lane : 0;
    int first = row[m].position, last = first;
    for (int step = WARP / 2; step > 0; step /= 2) {
        first = min(first, __shfl_xor_sync(ALL_LANES, first, step));
        last = max(last, __shfl_xor_sync(ALL_LANES, last, step));
    }
    i64 low = w->kv_begin, high = w->kv_end;
    const i64 offset = r->kv_offset;
    if (CAUSAL) high = min(high, first + 1 - offset);
    if (WINDOW && p->window_right >= 0) high = min(high, (i64)first + p->window_right + 1 - offset);
    if (WINDOW && p->window_left >= 0) low = max(low, (i64)last - p->window_left - offset);
    r->low = (int)low;
    r->high = (int)high;
}

QI_INLINE void decode_begin(const attention_cuda_params *c, const qi_work *w, tile_row *row,
                            decode_item *r)
{
    const attention_params *p = &c->at;
    const int lane = threadIdx.x % WARP;
    r->group = &p->plan.groups[w->group];
    r->kv_head = w->kv_head;
    r->kv_end = w->kv_end;
    r->kv_offset = r->group->kv_offset;
    r->count = w->num_rows * GROUP_SIZE;
    if (lane < r->count) row[lane] = row_of_group(p, r->group, w->row_begin + lane / GROUP_SIZE);
    __syncwarp();
    decode_find_bounds(p, w, row, r);
    decode_load_queries(c, row, r);
#pragma unroll
    for (int n = 0; n < NQ; n++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int m = 8 * n + 2 * (lane % 4) + h;
            r->max[n][h] = -QI_INFINITY;
            r->sum[n][h] = 0.f;
            r->scale[n][h] = query_scale(c, r->kv_head * GROUP_SIZE + m % GROUP_SIZE);
            r->position[n][h] = row[m < r->count ? m : 0].position;
        }
#pragma unroll
        for (int i = 0; i < STEPS_VO; i++)
            for (int j = 0; j < 4; j++) r->o[n][i][j] = 0.f;
    }
}

/* ---- products ------------------------------------------------------------------------------- */

/* s[n] += K q[n] over 16 keys from `keys` on. */
QI_INLINE void decode_scores(const char *keys, const decode_item *r, float s[NQ][4])
{
    const int lane = threadIdx.x % WARP;
    if (KV_BYTES == 2) {
        const char *at = keys + lane % 16 * K_PITCH + lane / 16 * 16;
#pragma unroll
        for (int step = 0; step < STEPS_QK; step++) {
            u32 a[4];
            ldmatrix_x4(a, at + 32 * step);
#pragma unroll
            for (int n = 0; n < NQ; n++)
                if (n == 0 || r->count > 8) mma(s[n], a, r->q[n][step][0], r->q[n][step][1]);
        }
        return;
    }
    const char *at = keys + lane % 16 * K_PITCH + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < STEPS_QK; step += 2) {
        u32 raw[4];
        ldmatrix_x4(raw, at + 16 * step);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (step + i == STEPS_QK) break;
            const u32 a[4] = {widen(raw[2 * i]), widen(raw[2 * i + 1]), widen(raw[2 * i] >> 16),
                              widen(raw[2 * i + 1] >> 16)};
#pragma unroll
            for (int n = 0; n < NQ; n++)
                if (n == 0 || r->count > 8)
                    mma(s[n], a, r->q[n][step + i][0], r->q[n][step + i][1]);
        }
    }
}

/* o[n] += V^T P^T over 16 keys; b: the registers of P^T. */
QI_INLINE void decode_values(const char *values, const u32 b[NQ][2], decode_item *r)
{
    const int lane = threadIdx.x % WARP;
    if (KV_BYTES == 2) {
        const char *at = values + (lane % 8 + lane / 16 * 8) * V_PITCH + lane / 8 % 2 * 16;
#pragma unroll
        for (int step = 0; step < STEPS_VO; step++) {
            u32 a[4];
            ldmatrix_x4_trans(a, at + 32 * step);
#pragma unroll
            for (int n = 0; n < NQ; n++)
                if (n == 0 || r->count > 8) mma(r->o[n][step], a, b[n][0], b[n][1]);
        }
        return;
    }
    const char *at = values + lane % 16 * V_PITCH + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < STEPS_VO; step += 2) {
        u32 raw[4];
        ldmatrix_x4_trans(raw, at + 16 * step);
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
QI_INLINE void decode_mask(const attention_cuda_params *c, const decode_item *r,
                           const tile_row *row, int index, int n, float s[4])
{
    const attention_params *p = &c->at;
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int key = index + lane / 4 + i / 2 * 8, m = 8 * n + 2 * (lane % 4) + i % 2;
        if (GENERAL_SCORES) {
            const int there = key < r->kv_end && m < r->count;
            s[i] = there ? score(c, r->group, row[m], r->kv_head * GROUP_SIZE + m % GROUP_SIZE, key,
                                 key_at(p, r->group, key).position, s[i], r->scale[n][i % 2])
                   : SOFTMAX ? -QI_INFINITY
                             : 0.f;
            continue;
        }
        const i64 at = r->kv_offset + (i64)key, of = r->position[n][i % 2];
        int seen = key < r->kv_end;
        if (CAUSAL) seen &= at <= of;
        if (WINDOW && p->window_left >= 0) seen &= at >= of - p->window_left;
        if (WINDOW && p->window_right >= 0) seen &= at <= of + p->window_right;
        if (!seen) s[i] = -QI_INFINITY;
    }
}

/* 16 keys of the list from `index` on: weights from s, relative to the running maxima, which move only when
 * a score passes them by 2^8, since sums and weights up to that are as exact. */
QI_INLINE void decode_weigh(const attention_cuda_params *c, const tile_row *row, int index,
                            float s[NQ][4], decode_item *r)
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
                           int index, decode_item *r)
{
#pragma unroll
    for (int sub = 0; sub < TILE; sub += 16) {
        if (sub > 0 && index + sub >= r->kv_end) break;
        float s[NQ][4] = {};
        u32 b[NQ][2];
        decode_scores(slot + sub * K_PITCH, r, s);
        decode_weigh(c, row, index + sub, s, r);
#pragma unroll
        for (int n = 0; n < NQ; n++)
            for (int i = 0; i < 2; i++)
                b[n][i] = movmatrix_trans(pack_pair(s[n][2 * i], s[n][2 * i + 1]));
        decode_values(slot + TILE * K_PITCH + sub * V_PITCH, b, r);
    }
}

/* ---- the end of an item --------------------------------------------------------------------- */

/* A warp's results to shared memory, its sums of v into the slot that it has just used. */
QI_INLINE void decode_put(decode_item *r, int place, char *slot, decode_shared *t)
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
                sums[m * SUM_PITCH + d] = r->o[n][i][h];
                sums[m * SUM_PITCH + d + (KV_BYTES == 1 ? 1 : 8)] = r->o[n][i][2 + h];
            }
        }
    }
    if (lane == 0) t->sums[place] = sums;
}

/* Adds up what `places` warps have put, in key order, and writes the item's result: four dims a thread. */
QI_INLINE void decode_finish(const attention_cuda_params *c, const qi_work *w, const tile_row *row,
                             int count, int places, const decode_shared *t)
{
    const attention_params *p = &c->at;
    enum { QUADS = HEAD_DIM_VO / 4 };
    for (int e = (int)threadIdx.x; e < count * QUADS; e += THREADS) {
        const int m = e / QUADS, d = e % QUADS * 4, head = w->kv_head * GROUP_SIZE + m % GROUP_SIZE;
        float max = -QI_INFINITY, sum = 0.f, o[4] = {};
        for (int i = 0; i < places; i++) max = fmaxf(max, t->max[i][m]);
        for (int i = 0; i < places; i++) {
            const float of = t->max[i][m];
            const float weight = !SOFTMAX ? 1.f : of == -QI_INFINITY ? 0.f : exp2f(of - max);
            const float4 v = *(const float4 *)(t->sums[i] + m * SUM_PITCH + d);
            sum += weight * t->sum[i][m];
            o[0] += weight * v.x, o[1] += weight * v.y, o[2] += weight * v.z, o[3] += weight * v.w;
        }
        const int seen = sum > 0.f || sum != sum;
        float norm = !SOFTMAX ? 1.f : seen ? 1.f / sum : 0.f;
        if (w->slot < 0) norm = finish_row(c, row[m], head, max, sum, d == 0);
        for (int i = 0; i < 4; i++) o[i] *= norm;
        if (w->slot < 0) {
            store_outputs(c, row[m], head, d, o);
            continue;
        }
        const i64 slot = (i64)w->slot + m;
        *(float4 *)(p->plan.o_partial + slot * HEAD_DIM_VO + d) =
            make_float4(o[0], o[1], o[2], o[3]);
        if (d == 0) p->plan.lse_partial[slot] = seen ? max + log2f(sum) : -QI_INFINITY;
    }
}

/* ---- a strip -------------------------------------------------------------------------------- */

/* The decode items among work items [begin, end), by all threads. ring: DECODE_STAGES slots a warp. */
QI_INLINE void decode_items(const attention_cuda_params *c, int begin, int end, int one_level,
                            char *ring, decode_shared *t)
{
    const attention_params *p = &c->at;
    const int warp = (int)threadIdx.x / WARP, aligned = keys_aligned(p);
    char *slots = ring + warp * DECODE_STAGES * SLOT_BYTES;
    decode_stream stream;
    decode_item rows;
    decode_open(p, &stream, begin, end);
#pragma unroll 1
    for (int i = 0; i < DECODE_STAGES - 1; i++)
        decode_load(p, &stream, slots + i * SLOT_BYTES, aligned);
    int now = 0, used = DECODE_STAGES - 1; /* slots: of the next tile, and of the one before */
    for (int item = begin, first = 0; item < end; item++) {
        const qi_work w = p->plan.work[item];
        if (w.flags != QI_TILE_DECODE) continue;
        const int tiles = decode_tiles(w.kv_begin, w.kv_end), place = decode_place(first);
        decode_begin(c, &w, t->row[warp], &rows);
#pragma unroll 1
        for (int i = place; i < tiles; i += DECODE_WARPS) {
            cp_async_wait_group(DECODE_STAGES - 2);
            __syncwarp();
            decode_load(p, &stream, slots + used * SLOT_BYTES, aligned);
            decode_tile(c, slots + now * SLOT_BYTES, t->row[warp], w.kv_begin + i * TILE, &rows);
            used = now;
            now = now + 1 == DECODE_STAGES ? 0 : now + 1;
        }
        if (place < tiles) decode_put(&rows, place, slots + used * SLOT_BYTES, t);
        __syncthreads();
        decode_finish(c, &w, t->row[warp], rows.count, min(tiles, DECODE_WARPS), t);
        __syncthreads();
        if (w.slot >= 0 && one_level) finish_piece(c, &w, &t->is_last);
        first = (first + tiles) % DECODE_WARPS;
    }
    cp_async_wait_group(0);
    __syncthreads();
}

#endif
