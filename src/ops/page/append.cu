/* append.cu - scatter rows of k and v into pages, quantised and rotated on the way where that is asked
 * for: a block a row. Rows whose slot or page is not in the pool are left out.
 *
 * JIT constants: K_FROM, K_TO, V_FROM, V_TO, Q_FROM, Q_TO, types; VEC, elements of an access; LAYOUT of
 * pairs; THREADS.
 * Bound: HBM, one read and one write of every row.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/rope.cuh"
#include "kern/scale.h"
#include "ops/page/append_params.h"

typedef struct place {
    i64 position, page, slot; /* page -1: nowhere */
} place;

QI_INLINE place place_by_slot(const append_params *p, i64 row)
{
    const i64 slot =
        p->slots_dtype == QI_I32 ? ((const i32 *)p->slots)[row] : ((const i64 *)p->slots)[row];
    place at = {p->positions ? p->positions[row] : 0, -1, 0};
    if (slot < 0 || slot / p->page_size >= p->num_pages) return at;
    at.page = slot / p->page_size;
    at.slot = slot % p->page_size;
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
    const i64 page = qi_kv_pages(view, request)[at.position / p->page_size];
    if (page < 0 || page >= p->num_pages) return at;
    at.page = page;
    at.slot = at.position % p->page_size;
    return at;
}

QI_INLINE void append_row(const append_params *p, const append_tensor *t, const int from,
                          const int to, i64 row, i64 page, i64 slot, const float2 *angles)
{
    const int rotates = LAYOUT != ROPE_NONE && t->rotate, pairs = p->rope.num_pairs;
    const int pieces = rotates ? rope_pieces((int)t->head_dim, pairs, LAYOUT, VEC)
                               : rope_pieces((int)t->head_dim, pairs, ROPE_NONE, VEC);
    for (int i = (int)threadIdx.x; i < t->num_heads * pieces; i += THREADS) {
        const int head = i / pieces, piece = i % pieces;
        const char *in = qi_at(t->rows, from, row * t->row_stride + head * t->row_head_stride);
        char *out = qi_to(t->cache, to,
                          page * t->page_stride + slot * t->slot_stride + head * t->head_stride);
        const float scale = qi_scale_at(&t->scale, head);
        if (rotates)
            rope_piece(out, to, in, from, (int)t->head_dim, piece, pairs, angles, scale, LAYOUT,
                       VEC);
        else
            rope_piece(out, to, in, from, (int)t->head_dim, piece, pairs, angles, scale, ROPE_NONE,
                       VEC);
    }
}

QI_KERNEL(append, append_params)
{
    extern __shared__ float2 angles[]; /* [num_pairs] */
    const i64 row = blockIdx.x;
    const place at = p.slots ? place_by_slot(&p, row) : place_by_position(&p, row);
    if (LAYOUT != ROPE_NONE) {
        rope_angles(&p.rope, at.position, angles);
        __syncthreads();
    }
    if (at.page >= 0) {
        append_row(&p, &p.k, K_FROM, K_TO, row, at.page, at.slot, angles);
        append_row(&p, &p.v, V_FROM, V_TO, row, at.page, at.slot, angles);
    }
    /* A slot below 0 skips the caches alone; by position such a row is of no request. */
    if (p.q.rows && (at.page >= 0 || p.slots))
        append_row(&p, &p.q, Q_FROM, Q_TO, row, row, 0, angles);
}
