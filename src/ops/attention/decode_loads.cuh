/* decode_loads.cuh - the ring of each warp: how a tile of keys and values lies in a slot, and how it gets there. See
 * decode_mma.cuh for the whole.
 *
 * DECODE_PIECE > 0: the copy engine brings pieces of so many keys, a lane asks for each, all rows at once:
 *
 *   K of a piece, then of the next one, then V:  [dim / 128 bytes][DECODE_PIECE][128 bytes]
 *
 * The eight 16 bytes of a row are exchanged as its number says, so that neither rows nor columns meet in a bank, and
 * no byte is padding. A slot's barrier ends a phase when the bytes are there. Rows at addresses that the engine does
 * not take are copied an element at a time to the same places.
 *
 * DECODE_PIECE 0: cp.async, 16 bytes a lane, to padded rows.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_DECODE_LOADS_CUH
#define QI_ATTENTION_DECODE_LOADS_CUH

#include "ops/attention/decode_stream.cuh"
#if DECODE_PIECE > 0
#include "kern/cuda/tma.cuh"
#endif

/* ---- where a tile lies ---------------------------------------------------------------------- */

/* Row r of K or V, of `pitch` bytes each. */
QI_INLINE int decode_row_at(int r, const int pitch)
{
    return DECODE_PIECE > 0 ? r / PIECE * (PIECE * pitch) + r % PIECE * 128 : r * pitch;
}

/* 16 bytes of it, number `chunk`. */
QI_INLINE int decode_chunk_at(int r, int chunk, const int pitch)
{
    if (DECODE_PIECE == 0) return decode_row_at(r, pitch) + 16 * chunk;
    return decode_row_at(r, pitch) + chunk / 8 * (PIECE * 128) + (chunk % 8 ^ r % 8) * 16;
}

/* Where chunk 0 or 1 of a row is at `at`, the one 2i further. */
QI_INLINE int decode_chunk_pair(int at, const int i)
{
    return DECODE_PIECE > 0 ? (at ^ i % 4 * 32) + i / 4 * (PIECE * 128) : at + 32 * i;
}

/* ---- by cp.async or by elements --------------------------------------------------------------- */

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
            cp_async_16_evict_first(to + r * pitch + 16 * chunk, from, (u32)bytes);
    }
}

/* A whole tile of rows that follow each other at `step` bytes: no lane asks another. */
QI_INLINE void decode_load_run(char *to, const int pitch, const char *first, i64 step,
                               const int dim)
{
    const int chunks = (dim + 15) / 16 * KV_BYTES, lane = threadIdx.x % WARP;
    if (dim % 16 == 0 && WARP % chunks == 0) { /* a lane has the same chunk of every few rows */
        const int rows = WARP / chunks, r = lane / chunks, chunk = lane % chunks;
        const char *from = first + r * step + 16 * chunk;
        char *at = to + r * pitch + 16 * chunk;
#pragma unroll
        for (int i = 0; i < TILE / rows; i++, from += rows * step)
            cp_async_16_evict_first(at + i * rows * pitch, from, 16);
        return;
    }
#pragma unroll
    for (int i = 0; i < (TILE * chunks + WARP - 1) / WARP; i++) {
        const int e = lane + i * WARP, r = e / chunks, chunk = e % chunks;
        const int left = dim * KV_BYTES - 16 * chunk, bytes = left < 0 ? 0 : left < 16 ? left : 16;
        if ((TILE * chunks) % WARP == 0 || r < TILE)
            cp_async_16_evict_first(to + r * pitch + 16 * chunk, first + r * step + 16 * chunk,
                                    (u32)bytes);
    }
}

/* The same from any address, a lane a row: slow. */
QI_INLINE void decode_copy_rows(char *to, const int pitch, const char *row, const int dim,
                                int valid)
{
    const int r = threadIdx.x % WARP;
#pragma unroll 1
    for (int chunk = 0; r < TILE && chunk < (dim + 15) / 16 * KV_BYTES; chunk++)
        copy_elements(to + decode_chunk_at(r, chunk, pitch), row + 16 * chunk,
                      r < valid ? dim * KV_BYTES - 16 * chunk : 0);
}

/* Begins to load the stream's next tile into a slot. */
QI_INLINE void decode_copy_tile(const attention_params *p, const decode_item *now,
                                const decode_stream *s, char *slot, int aligned)
{
    const int in_pages = decode_in_pages(now), valid = now->kv_end - s->at;
    const int run = DECODE_PIECE == 0 && aligned && in_pages && valid >= TILE;
    const int r = run ? 0 : (int)threadIdx.x % TILE; /* the row that this lane finds */
    const int in_list = in_pages ? s->at + r : s->in_list;
    const int known_by = s->tile % TILES_AHEAD * PIECES + r / PIECE;
    const i64 page = in_pages ? __shfl_sync(ALL_LANES, s->page, known_by) : s->page;
    const i64 in_page = PAGE_SIZE > 0 ? in_list % (PAGE_SIZE | !PAGE_SIZE) : now->list + in_list;
    const i64 k_step = p->k_stride[1] * KV_BYTES, v_step = p->v_stride[1] * KV_BYTES;
    const char *k = (const char *)p->k +
                    (page * p->k_stride[0] + now->kv_head * p->k_stride[2]) * KV_BYTES +
                    in_page * k_step;
    const char *v = (const char *)p->v +
                    (page * p->v_stride[0] + now->kv_head * p->v_stride[2]) * KV_BYTES +
                    in_page * v_step;
    char *values = slot + TILE * K_PITCH;
    if (run) {
        decode_load_run(slot, K_PITCH, k, k_step, HEAD_DIM_QK);
        decode_load_run(values, V_PITCH, v, v_step, HEAD_DIM_VO);
        return;
    }
    if (r >= valid) k = (const char *)p->k, v = (const char *)p->v; /* not read */
    if (DECODE_PIECE == 0 && aligned) {
        decode_load_rows(slot, K_PITCH, k, HEAD_DIM_QK, valid);
        decode_load_rows(values, V_PITCH, v, HEAD_DIM_VO, valid);
    } else {
        decode_copy_rows(slot, K_PITCH, k, HEAD_DIM_QK, valid);
        decode_copy_rows(values, V_PITCH, v, HEAD_DIM_VO, valid);
    }
}

/* ---- by the copy engine ----------------------------------------------------------------------- */

#if DECODE_PIECE > 0
/* Asks for the stream's next tile, the lanes that know its pages for a piece each. */
QI_INLINE void decode_ask(const mma_params *m, const decode_item *now, const decode_stream *s,
                          char *slot, u64 *full)
{
    const int lane = threadIdx.x % WARP, piece = lane % PIECES;
    const int key = s->at + piece * PIECE;
    if (lane / PIECES != (int)((u32)s->tile % TILES_AHEAD)) return;
    if (piece > 0 && key >= now->kv_end) {
        mbarrier_arrive(full);
        return;
    }
    char *k = slot + piece * PIECE * K_PITCH;
    char *v = slot + TILE * K_PITCH + piece * PIECE * V_PITCH;
    const int head = now->kv_head;
    const int token =
        PAGE_SIZE > 0 ? (int)((u32)key % (PAGE_SIZE | !PAGE_SIZE)) : (int)now->list + key;
    mbarrier_arrive_expect_tx(full, PIECE * (K_PITCH + V_PITCH));
    tma_load_5d_evict_first(k, &m->k, full, 0, token, 0, head, s->page);
    tma_load_5d_evict_first(v, &m->v, full, 0, token, 0, head, s->page);
}

/* Makes the values zero that are not of the item's keys, which rows [begin, end) are: a weight of 0 times what came may
 * be NaN. */
QI_INLINE void decode_clear_values(char *values, int begin, int end)
{
    enum { CHUNKS = V_PITCH / 16 };
#pragma unroll 1
    for (int e = threadIdx.x % WARP; e < TILE * CHUNKS; e += WARP) {
        const int r = e / CHUNKS;
        if (r < begin || r >= end)
            *(uint4 *)(values + decode_chunk_at(r, e % CHUNKS, V_PITCH)) = make_uint4(0, 0, 0, 0);
    }
    fence_proxy_async();
    __syncwarp();
}
#endif

/* ---- the ring --------------------------------------------------------------------------------- */

/* Of a warp. Tiles take slots in turn, as they are loaded and as they are used. */
typedef struct decode_ring {
    char *slots;
    u64 *full;     /* [DECODE_STAGES] */
    int now, used; /* slots: of the next tile, and of the one before */
    u32 parity;    /* of the next tile's phase */
} decode_ring;

/* Before the launch's turn, since it reads nothing but parameters. */
QI_INLINE decode_ring decode_ring_open(const mma_params *m, char *rings, decode_shared *t)
{
    const int warp = (int)threadIdx.x / WARP;
#if DECODE_PIECE > 0
    if (threadIdx.x % WARP == 0) {
        if (warp == 0 && m->kv_by_tma) {
            tma_prefetch_map(&m->k);
            tma_prefetch_map(&m->v);
        }
        for (int i = 0; i < DECODE_STAGES; i++) mbarrier_init(&t->full[warp][i], PIECES);
        mbarrier_fence_init();
    }
    __syncwarp();
#endif
    decode_ring r = {rings + warp * DECODE_STAGES * SLOT_BYTES, t->full[warp], 0, DECODE_STAGES - 1,
                     0};
    return r;
}

/* The block's memory is for something else from its next barrier on. Every load has come, and was used. */
QI_INLINE void decode_ring_close(const decode_ring *ring)
{
#if DECODE_PIECE > 0
    if (threadIdx.x % WARP == 0)
        for (int i = 0; i < DECODE_STAGES; i++) mbarrier_inval(&ring->full[i]);
#endif
}

/* A thread's ordinary reads and writes of slots come before what the copy engine writes there, once there has been a
 * barrier. */
QI_INLINE void decode_fence()
{
#if DECODE_PIECE > 0
    fence_proxy_async();
#endif
}

/* Begins to load this warp's next tile into a slot, if there is one. No lane may still be at what was there. */
QI_INLINE void decode_load(const mma_params *m, const decode_item *items, decode_stream *s,
                           const decode_ring *ring, int slot, int aligned)
{
    const attention_params *p = &m->c.at;
    if (s->item < s->end) {
        char *to = ring->slots + slot * SLOT_BYTES;
#if DECODE_PIECE > 0
        if (m->kv_by_tma)
            decode_ask(m, &items[s->item], s, to, &ring->full[slot]);
        else
#endif
            decode_copy_tile(p, &items[s->item], s, to, aligned);
        s->at += DECODE_WARPS * TILE;
        s->tile++;
        decode_guess none;
        decode_guess_nothing(&none);
        decode_settle(p, items, &none, s);
    }
    if (DECODE_PIECE == 0) cp_async_commit_group();
}

/* Waits for the ring's next tile, keys of `of` from `index` on, and returns it. Loads of all slots but the one used
 * last may be under way. */
QI_INLINE const char *decode_await(const mma_params *m, const decode_ring *ring,
                                   const decode_item *of, int index)
{
    char *slot = ring->slots + ring->now * SLOT_BYTES;
#if DECODE_PIECE > 0
    const int begin = WINDOW ? of->kv_begin - index : 0, end = of->kv_end - index;
    if (m->kv_by_tma)
        mbarrier_wait(&ring->full[ring->now], ring->parity);
    else
        __syncwarp();
    if (begin > 0 || end < TILE) decode_clear_values(slot + TILE * K_PITCH, begin, end);
#else
    cp_async_wait_group(DECODE_STAGES - 2);
    __syncwarp();
#endif
    return slot;
}

QI_INLINE void decode_ring_next(decode_ring *r)
{
    r->used = r->now;
    r->now = r->now + 1 == DECODE_STAGES ? 0 : r->now + 1;
    r->parity ^= r->now == 0;
}

#endif
