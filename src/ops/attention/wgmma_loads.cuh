/* wgmma_loads.cuh - the warps that fill the rings of the Hopper tile, with keys the ones, with values the others: a warp
 * each by the copy engine, whole pages or pieces of pages at a time; where 8 does not divide pages two warps each, row
 * by row; and rows that do not begin at multiples of 16 bytes by elements.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_WGMMA_LOADS_CUH
#define QI_ATTENTION_WGMMA_LOADS_CUH

#include "ops/attention/wgmma_items.cuh"

/* One of the two rings, as one of LOADERS warps sees it. */
typedef struct loader {
    char *to; /* [STAGES][chunks][KEYS][128 bytes] */
    u64 *full, *empty;
    ring at;
    int warp, lane;
} loader;

/* A key's place in its page; ragged: in its list. */
QI_INLINE int slot_of_key(int key)
{
#if PAGE_SIZE > 0
    return key % PAGE_SIZE;
#else
    return key;
#endif
}

/* What of an item says where its keys are. */
typedef struct item_keys {
    int begin, end, kv_head; /* keys [begin, end) of the group's list */
    i64 list;                /* where that begins: qi_group.kv_begin */
} item_keys;

/* ---- by the copy engine ------------------------------------------------------------------------ */

/* The page of this lane's piece of the block at `first`. */
QI_INLINE int page_of_piece(const attention_params *p, const item_keys *k, int first, int lane)
{
#if PAGE_SIZE > 0 && PIECE > 0
    const int key = first + lane * PIECE;
    if (lane < KEYS / PIECE && key < k->end) return p->plan.pages[k->list + key / PAGE_SIZE];
#endif
    return 0;
}

/* The block at `first`, a piece a lane. */
QI_INLINE void load_pieces(const wgmma_params *p, const item_keys *k, int first, int page,
                           loader *l, const int is_v)
{
#if PIECE > 0
    const int chunks = is_v ? VO_CHUNKS : QK_CHUNKS, bytes = is_v ? V_BYTES : K_BYTES;
    const int key = first + l->lane * PIECE, here = k->end - first;
    const int pieces = here >= KEYS ? KEYS / PIECE : (here + PIECE - 1) / PIECE;
    u64 *full = &l->full[l->at.stage];
    char *to = l->to + l->at.stage * bytes + l->lane * PIECE * 128;
    mbarrier_wait(&l->empty[l->at.stage], l->at.parity ^ 1);
    if (l->lane == 0) mbarrier_arrive_expect_tx(full, pieces * PIECE * 128 * chunks);
    __syncwarp();
    if (l->lane < pieces)
        for (int i = 0; i < chunks; i++)
            tma_load_4d(to + i * KV_CHUNK_BYTES, is_v ? &p->v : &p->k, full, 64 * i,
                        PAGE_SIZE > 0 ? slot_of_key(key) : (int)k->list + key, k->kv_head, page);
    ring_next(&l->at, STAGES);
#endif
}

/* The blocks of one item; pages are looked up a block ahead. */
QI_INLINE void load_by_tma(const wgmma_params *p, const item_keys *k, loader *l, const int is_v)
{
    const attention_params *a = &p->c.at;
    int first = first_key(p, k->begin), page = page_of_piece(a, k, first, l->lane);
#pragma unroll 1
    for (; first < k->end; first += KEYS) {
        const int next = page_of_piece(a, k, first + KEYS, l->lane);
        load_pieces(p, k, first, page, l, is_v);
        page = next;
    }
}

/* ---- row by row ------------------------------------------------------------------------------- */

enum {
    WARP_ROWS = KEYS / LOADERS, /* rows of a block that a warp brings */
    ROWS_OF_LANE = (WARP_ROWS + WARP - 1) / WARP,
};
_Static_assert(PIECE > 0 || WARP_ROWS % WARP == 0, "lanes have as many rows");

/* Key `key` of the list, or its last; in `page` already looked up. */
QI_INLINE const char *row_of_key(const attention_params *p, const item_keys *k, int key, int page,
                                 const int is_v)
{
    const i64 *stride = is_v ? p->v_stride : p->k_stride;
    if (key >= k->end) key = k->end - 1;
    const i64 slot = PAGE_SIZE > 0 ? slot_of_key(key) : k->list + key;
    return qi_at(is_v ? p->v : p->k, DTYPE_KV,
                 page * stride[0] + slot * stride[1] + k->kv_head * stride[2]);
}

QI_INLINE int page_of_key(const attention_params *p, const item_keys *k, int key)
{
#if PAGE_SIZE > 0
    return p->plan.pages[k->list + (key < k->end ? key : k->end - 1) / PAGE_SIZE];
#else
    return 0;
#endif
}

/* The pages of this lane's rows from key `first` on: row `lane` and every WARP-th after it. */
QI_INLINE void find_pages(const attention_params *p, const item_keys *k, int first, int lane,
                          int page[ROWS_OF_LANE])
{
#pragma unroll
    for (int i = 0; i < ROWS_OF_LANE; i++)
        page[i] = page_of_key(p, k, first + i * WARP + lane);
}

/* Where those rows are. */
QI_INLINE void find_rows(const attention_params *p, const item_keys *k, int first, int lane,
                         const int page[ROWS_OF_LANE], const char *row[ROWS_OF_LANE],
                         const int is_v)
{
#pragma unroll
    for (int i = 0; i < ROWS_OF_LANE; i++)
        row[i] = row_of_key(p, k, first + i * WARP + lane, page[i], is_v);
}

/* The address that lane r % WARP has of the warp's row r. */
QI_INLINE const char *row_of_lane(const char *const row[ROWS_OF_LANE], const int base, int r)
{
    return (const char *)__shfl_sync(ALL_LANES, (u64)row[base / WARP], base % WARP + r);
}

/* The warp's rows to `to`, a row by 8 lanes; past the last dim come zeros. */
QI_INLINE void copy_rows(const loader *l, char *to, const char *const row[ROWS_OF_LANE],
                         const int is_v)
{
    const int chunks = is_v ? VO_CHUNKS : QK_CHUNKS, dim = is_v ? HEAD_DIM_VO : HEAD_DIM_QK;
    const int mine = l->lane / 8, piece = l->lane % 8;
    char *const place[2] = {to + mine * 128 + (piece ^ mine) * 16,
                            to + mine * 128 + (piece ^ mine ^ 4) * 16};
#pragma unroll
    for (int r = 0; r < WARP_ROWS; r += 4) {
        const char *from = row_of_lane(row, r, mine) + piece * 16;
#pragma unroll
        for (int c = 0; c < chunks; c++) {
            const int there = c * 64 + piece * 8 < dim;
            cp_async_16(place[r / 4 % 2] + r * 128 + c * KV_CHUNK_BYTES, from + (there ? c * 128 : 0),
                        there ? 16 : 0);
        }
    }
    cp_async_commit_group();
    cp_async_wait_group(0);
}

/* The same of rows at any address. */
QI_INLINE void copy_odd_rows(const attention_params *p, const item_keys *k, const loader *l,
                             int first, char *to, const int is_v)
{
    const int pieces = 8 * (is_v ? VO_CHUNKS : QK_CHUNKS), dim = is_v ? HEAD_DIM_VO : HEAD_DIM_QK;
#pragma unroll 1
    for (int i = l->lane; i < WARP_ROWS * pieces; i += WARP) {
        const int r = i / pieces, piece = i % pieces, key = first + r;
        const char *from = row_of_key(p, k, key, page_of_key(p, k, key), is_v) + piece * 16;
        char *place = to + piece / 8 * KV_CHUNK_BYTES + r * 128 + ((piece ^ r) & 7) * 16;
        copy_elements(place, from, piece * 8 < dim ? 16 : 0);
    }
}

/* The blocks of one item; pages are looked up a block ahead. */
QI_INLINE void load_by_rows(const wgmma_params *p, const item_keys *k, loader *l, int aligned,
                            const int is_v)
{
    const attention_params *a = &p->c.at;
    const int own = l->warp * WARP_ROWS;
    int page[ROWS_OF_LANE];
    if (PIECE == 0 && k->begin < k->end) find_pages(a, k, k->begin + own, l->lane, page);
#pragma unroll 1
    for (int first = k->begin + own; first < k->end + own; first += KEYS) {
        char *to = l->to + l->at.stage * (is_v ? V_BYTES : K_BYTES) + own * 128;
        const char *row[ROWS_OF_LANE];
        if (PIECE == 0) {
            find_rows(a, k, first, l->lane, page, row, is_v);
            find_pages(a, k, first + KEYS, l->lane, page);
        }
        mbarrier_wait(&l->empty[l->at.stage], l->at.parity ^ 1);
        if (PIECE == 0 && aligned)
            copy_rows(l, to, row, is_v);
        else
            copy_odd_rows(a, k, l, first, to, is_v);
        fence_proxy_async();
        __syncwarp();
        if (l->lane == 0) mbarrier_arrive(&l->full[l->at.stage]);
        ring_next(&l->at, STAGES);
    }
}

/* ---- the warp ----------------------------------------------------------------------------------- */

/* All items' keys, or their values; by warp `warp` of those who bring them. */
QI_INLINE void load_items(const wgmma_params *p, char *shared, int warp, const int is_v)
{
    tile_barriers *b = barriers_of(shared);
    loader l = {shared + (is_v ? V_AT : K_AT),
                is_v ? b->v_full : b->k_full,
                is_v ? b->v_empty : b->k_empty,
                {0, 0},
                warp,
                (int)threadIdx.x % WARP};
    ring note = {0, 0};
    const int aligned = keys_aligned(&p->c.at);
    if (l.lane == 0 && p->kv_by_tma) tma_prefetch_map(is_v ? &p->v : &p->k);
#pragma unroll 1
    for (;; ring_next(&note, WGMMA_NOTES)) {
        const prefill_item_notes *n = item_notes(shared, note.stage);
        mbarrier_wait(&b->noted[note.stage], note.parity);
        if (n->work.num_rows == 0) return;
        const item_keys k = {n->work.kv_begin, n->work.kv_end, n->work.kv_head, n->group.kv_begin};
        forget_item(b, note.stage);
        if (p->kv_by_tma)
            load_by_tma(p, &k, &l, is_v);
        else
            load_by_rows(p, &k, &l, aligned, is_v);
        if (!is_v && l.lane == 0) mbarrier_arrive(&b->loaded[note.stage]);
    }
}

#endif
