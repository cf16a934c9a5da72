/* append.cu - scatter rows of k and v into pages, quantised and rotated on the way where that is asked
 * for: a group of threads a row. They fetch their first pieces of it, look up where it goes while those are
 * on their way, then store. Rows whose slot or page is not in the pool are left out.
 *
 * JIT constants: K_FROM, K_TO, V_FROM, V_TO, Q_FROM, Q_TO, types; VEC, elements of an access; LAYOUT of
 * pairs; SCALED 1: some tensor is divided by a scale; GROUP, threads of a row, all of the block's where rows rotate; THREADS.
 * Bound: HBM, one read and one write of every row. 4096 rows of 4 KB are one warp each, 31 an SM with 4 KB
 * under way.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/rope.cuh"
#include "kern/scale.h"
#include "ops/page/append_params.h"

/* Pieces of each tensor that a thread fetches ahead. */
enum { TIMES = LAYOUT == ROPE_NONE ? 4 : 1 };

typedef struct place {
    i64 position, page, slot; /* page -1: nowhere */
} place;

/* Page and slot of number n, below 2^52: its quotient is at most 1 off. */
QI_INLINE void divide(const append_params *p, i64 n, i64 *page, i64 *slot)
{
    *page = (i64)((double)n * p->inverse_page_size);
    *slot = n - *page * p->page_size;
    if (*slot < 0) --*page, *slot += p->page_size;
    if (*slot >= p->page_size) ++*page, *slot -= p->page_size;
}

QI_INLINE place place_by_slot(const append_params *p, i64 row)
{
    const i64 slot =
        p->slots_dtype == QI_I32 ? ((const i32 *)p->slots)[row] : ((const i64 *)p->slots)[row];
    place at = {p->positions ? p->positions[row] : 0, -1, 0};
    if (slot < 0 || slot >= p->num_pages * p->page_size) return at;
    divide(p, slot, &at.page, &at.slot);
    return at;
}

QI_INLINE place place_by_position(const append_params *p, i64 row)
{
    place at = {0, -1, 0};
    const qi_kv_view *view = &p->index;
    const int request = find_request(view->qo_indptr, (int)view->num_requests, row);
    if (request < 0) return at;
    const i64 kv_len = qi_kv_len(view, request);
    at.position = p->positions ? p->positions[row] : kv_len + row - view->qo_indptr[request + 1];
    if (at.position < 0 || at.position >= kv_len) return at;
    i64 entry;
    divide(p, at.position, &entry, &at.slot);
    const i64 page = qi_kv_pages(view, request)[entry];
    if (page >= 0 && page < p->num_pages) at.page = page;
    return at;
}

/* How a tensor's rows are cut. */
typedef struct cut {
    int pieces, total; /* of a head, of a row */
} cut;

QI_INLINE cut cut_of(const append_params *p, const append_tensor *t, const int layout)
{
    const int pieces = rope_pieces((int)t->head_dim, p->rope.num_pairs, layout, VEC);
    const cut c = {pieces, t->rows ? (int)t->num_heads * pieces : 0};
    return c;
}

typedef struct head_piece {
    i64 head;
    rope_place at; /* in its head */
} head_piece;

QI_INLINE head_piece piece_of(const append_params *p, const append_tensor *t, cut c, int i,
                              const int layout)
{
    const int head = t->num_heads == 1 ? 0 : i / c.pieces;
    const rope_place at =
        rope_place_of(i - head * c.pieces, (int)t->head_dim, p->rope.num_pairs, layout, VEC);
    const head_piece x = {head, at};
    return x;
}

QI_INLINE void fetch(const append_params *p, const append_tensor *t, cut c, int i, i64 row,
                     const int from, const int layout, u32 *words)
{
    if (i >= c.total) return;
    const head_piece x = piece_of(p, t, c, i, layout);
    rope_fetch(words, qi_at(t->rows, from, row * t->row_stride + x.head * t->row_head_stride), from,
               x.at, VEC);
}

QI_INLINE void put(const append_params *p, const append_tensor *t, cut c, int i, char *cache,
                   const int from, const int to, const int layout, const u32 *words,
                   const float2 *angles)
{
    if (i >= c.total) return;
    const head_piece x = piece_of(p, t, c, i, layout);
    char *out = qi_to(cache, to, x.head * t->head_stride);
    if (layout == ROPE_NONE && from == to && !SCALED) {
        qi_store_words(qi_to(out, to, x.at.first), words, to, VEC);
        return;
    }
    const float scale = SCALED ? qi_scale_at(&t->scale, x.head) : 1.f;
    rope_put(out, to, words, from, x.at, p->rope.num_pairs, angles, scale, layout, VEC);
}

/* The fetched pieces of a row, and those past them, to a place in the cache. */
QI_INLINE void put_row(const append_params *p, const append_tensor *t, int thread, i64 row,
                       i64 page, i64 slot, const int from, const int to, const int layout,
                       u32 *words, const float2 *angles)
{
    const int size = 2 * qi_words(from, VEC);
    const cut c = cut_of(p, t, layout);
    char *cache = qi_to(t->cache, to, page * t->page_stride + slot * t->slot_stride);
    for (int i = thread; i < c.total; i += TIMES * GROUP) {
#pragma unroll
        for (int n = 0; n < TIMES; n++)
            put(p, t, c, i + n * GROUP, cache, from, to, layout, words + n * size, angles);
#pragma unroll
        for (int n = 0; n < TIMES; n++)
            fetch(p, t, c, i + (TIMES + n) * GROUP, row, from, layout, words + n * size);
    }
}

QI_KERNEL(append, append_params)
{
    extern __shared__ float2 angles[]; /* [num_pairs] */
    const i64 row = (i64)blockIdx.x * (THREADS / GROUP) + threadIdx.x / GROUP;
    const int thread = threadIdx.x % GROUP;
    if (row >= p.nnz) return; /* rotating groups are whole blocks: none of their threads */
    u32 k[TIMES][2 * qi_words(K_FROM, VEC)], v[TIMES][2 * qi_words(V_FROM, VEC)],
        q[TIMES][2 * qi_words(Q_FROM, VEC)];
    griddepcontrol_wait();
    const cut of_k = cut_of(&p, &p.k, LAYOUT), of_v = cut_of(&p, &p.v, ROPE_NONE),
              of_q = cut_of(&p, &p.q, LAYOUT);
#pragma unroll
    for (int n = 0; n < TIMES; n++) {
        fetch(&p, &p.k, of_k, thread + n * GROUP, row, K_FROM, LAYOUT, k[n]);
        fetch(&p, &p.v, of_v, thread + n * GROUP, row, V_FROM, ROPE_NONE, v[n]);
        if (LAYOUT != ROPE_NONE)
            fetch(&p, &p.q, of_q, thread + n * GROUP, row, Q_FROM, LAYOUT, q[n]);
    }
    const place at = p.slots ? place_by_slot(&p, row) : place_by_position(&p, row);
    if (LAYOUT != ROPE_NONE) {
        rope_angles(&p.rope, at.position, angles);
        __syncthreads();
    }
    if (at.page >= 0) {
        put_row(&p, &p.k, thread, row, at.page, at.slot, K_FROM, K_TO, LAYOUT, k[0], angles);
        put_row(&p, &p.v, thread, row, at.page, at.slot, V_FROM, V_TO, ROPE_NONE, v[0], angles);
    }
    /* A slot below 0 skips the caches alone; by position such a row is of no request. */
    if (LAYOUT != ROPE_NONE && (at.page >= 0 || p.slots))
        put_row(&p, &p.q, thread, row, row, 0, Q_FROM, Q_TO, LAYOUT, q[0], angles);
}
