/* wgmma_loads.cuh - the warps that fill the rings of the Hopper tile, with keys the ones, with values the others: a warp
 * each by the copy engine, whole pages or pieces of pages at a time; where 8 does not divide pages two warps each, row
 * by row; and rows that do not begin at multiples of 16 bytes by elements.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_WGMMA_LOADS_CUH
#define QI_ATTENTION_WGMMA_LOADS_CUH

#include "ops/attention/wgmma_items.cuh"

/* One of the two rings, as one of LOADERS warps sees it. */
typedef struct loader {
    char *to; /* [STAGES][chunks][KEYS][128 bytes], from the warp's first row on */
    u64 *full, *empty;
    ring at;
    int lane;
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
    int first, end, kv_head; /* keys [first, end) of the group's list */
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
            tma_load_4d(to + i * KV_CHUNK_BYTES, is_v ? &p->v : &p->k, full, CHUNK_DIMS * i,
                        PAGE_SIZE > 0 ? slot_of_key(key) : (int)k->list + key, k->kv_head, page);
    ring_next(&l->at, STAGES);
#endif
}

/* The blocks of one item; pages are looked up a block ahead. */
QI_INLINE void load_by_tma(const wgmma_params *p, const item_keys *k, loader *l, const int is_v)
{
    const attention_params *a = &p->c.at;
    int first = k->first, page = page_of_piece(a, k, first, l->lane);
#pragma unroll 1
    for (; first < k->end; first += KEYS) {
        const int next = page_of_piece(a, k, first + KEYS, l->lane);
        load_pieces(p, k, first, page, l, is_v);
        page = next;
    }
}

/* ---- row by row ------------------------------------------------------------------------------- */

enum {
    WIDENED = PRODUCT_BYTES / KV_BYTES, /* bytes that each becomes */
    WARP_ROWS = KEYS / LOADERS,         /* rows of a block that a warp brings */
    /* So many at a time, each by so many lanes; and the rows whose addresses a lane has. */
    STEP_ROWS = 4 * WIDENED,
    ROW_LANES = WARP / STEP_ROWS,
    STEPS = WARP_ROWS / STEP_ROWS,
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

/* Rows of a block that are other warps', before this one's. */
QI_INLINE int rows_before()
{
    return tid_x() / WARP % LOADERS * WARP_ROWS;
}

/* A lane's own row of WARP: one of those that it has a part in, so that the lanes of a row ask only each other. */
QI_INLINE int own_row()
{
    const int lane = tid_x() % WARP; /* no registers for what follows from it */
    return lane % ROW_LANES * STEP_ROWS + lane / ROW_LANES;
}

/* The pages of this lane's rows of the warp's, which begin at key `first`. */
QI_INLINE void find_pages(const attention_params *p, const item_keys *k, int first,
                          int page[ROWS_OF_LANE])
{
#pragma unroll
    for (int i = 0; i < ROWS_OF_LANE; i++)
        page[i] = page_of_key(p, k, first + i * WARP + own_row());
}

/* Where those rows are. */
QI_INLINE void find_rows(const attention_params *p, const item_keys *k, int first,
                         const int page[ROWS_OF_LANE], const char *row[ROWS_OF_LANE],
                         const int is_v)
{
#pragma unroll
    for (int i = 0; i < ROWS_OF_LANE; i++)
        row[i] = row_of_key(p, k, first + i * WARP + own_row(), page[i], is_v);
}

/* Where the row is that this lane has a part in at step i. */
QI_INLINE const char *row_at_step(const char *const row[ROWS_OF_LANE], const int i)
{
    return (const char *)__shfl_sync(ALL_LANES, (u64)row[i / ROW_LANES], i % ROW_LANES, ROW_LANES);
}

/* Where this lane's part of 64 dims of its row at step 0 begins; flip: its piece of 16 bytes with bits changed. */
QI_INLINE char *part_of_lane(char *to, const int flip)
{
    const int lane = tid_x() % WARP, mine = lane / ROW_LANES, piece = lane % ROW_LANES * WIDENED;
    return to + mine * 128 + (piece ^ mine ^ flip) * 16;
}

/* The warp's rows to `to`, of each chunk 16 bytes a lane; past the last dim come zeros. */
QI_INLINE void copy_rows(char *to, const char *const row[ROWS_OF_LANE], const int is_v)
{
    const int chunks = is_v ? VO_CHUNKS : QK_CHUNKS, dim = is_v ? HEAD_DIM_VO : HEAD_DIM_QK;
    const int mine = tid_x() % ROW_LANES * 16; /* of a row's bytes */
    char *const part[2] = {part_of_lane(to, 0), part_of_lane(to, STEP_ROWS % 8)};
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const char *from = row_at_step(row, i) + mine;
#pragma unroll
        for (int c = 0; c < chunks; c++) {
            const int first = CHUNK_DIMS * c +
                              mine / KV_BYTES; /* of the lane's 8 or 16 dims; 8 are there or not */
            const int bytes = first + (KV_BYTES == 1 ? 8 : 0) < dim ? 16 : first < dim ? 8 : 0;
            cp_async_16(part[i % 2] + i * STEP_ROWS * 128 + c * KV_CHUNK_BYTES,
                        from + (bytes > 0 ? CHUNK_DIMS * c * KV_BYTES : 0), (u32)bytes);
        }
    }
    cp_async_commit_group();
}

QI_INLINE uint4 widen_piece(u32 low, u32 high)
{
    return make_uint4(widen(low), widen(low >> 16), widen(high), widen(high >> 16));
}

/* What copy_rows brought as 8 bits becomes f16 where it lies, 16 bytes two pieces: each lane's own. */
QI_INLINE void widen_rows(char *to, const int is_v)
{
    const int chunks = is_v ? VO_CHUNKS : QK_CHUNKS;
    char *part[2] = {part_of_lane(to, 0), part_of_lane(to, 1)};
#pragma unroll 1
    for (int i = 0; i < STEPS; i++) {
#pragma unroll
        for (int c = 0; c < chunks; c += 2) {
            const int n = c + 1 < chunks ? 2 : 1;
            uint4 x[2]; /* more would take registers that there are not */
#pragma unroll
            for (int j = 0; j < n; j++) x[j] = *(const uint4 *)(part[0] + (c + j) * KV_CHUNK_BYTES);
#pragma unroll
            for (int j = 0; j < n; j++) {
                *(uint4 *)(part[0] + (c + j) * KV_CHUNK_BYTES) = widen_piece(x[j].x, x[j].y);
                *(uint4 *)(part[1] + (c + j) * KV_CHUNK_BYTES) = widen_piece(x[j].z, x[j].w);
            }
        }
        part[0] += STEP_ROWS * 128;
        part[1] += STEP_ROWS * 128;
    }
}

/* The warp's rows are in the stage: makes them seen by wgmma, and tells. */
QI_INLINE void tell_rows(loader *l)
{
    fence_proxy_async();
    __syncwarp();
    if (tid_x() % WARP == 0) mbarrier_arrive(&l->full[l->at.stage]);
    ring_next(&l->at, STAGES);
}

/* The blocks of one item; the next one's pages are looked up while copies are on their way. */
QI_INLINE void load_by_rows(const attention_params *p, const item_keys *k, loader *l,
                            const int is_v)
{
    int page[ROWS_OF_LANE];
    if (k->first < k->end) find_pages(p, k, k->first + rows_before(), page);
#pragma unroll 1
    for (int first = k->first; first < k->end; first += KEYS) {
        char *to = l->to + l->at.stage * (is_v ? V_BYTES : K_BYTES);
        const char *row[ROWS_OF_LANE];
        find_rows(p, k, first + rows_before(), page, row, is_v);
        mbarrier_wait(&l->empty[l->at.stage], l->at.parity ^ 1);
        copy_rows(to, row, is_v);
        find_pages(p, k, first + KEYS + rows_before(), page);
        cp_async_wait_group(0);
        if (WIDENED == 2) widen_rows(to, is_v);
        tell_rows(l);
    }
}

/* A row's dims from d on, of `left` that it has, from any address to 16 bytes; zeros past its last. */
QI_INLINE void copy_odd_piece(char *to, const char *row, int d, int left)
{
    if (WIDENED == 1 || left <= 0) {
        copy_elements(to, row + d * KV_BYTES, left * KV_BYTES);
        return;
    }
    const u8 *from = (const u8 *)row + d;
    u32 pair[4];
#pragma unroll
    for (int i = 0; i < 4; i++) pair[i] = widen(from[2 * i] | (u32)from[2 * i + 1] << 8);
    *(uint4 *)to = make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

/* The same of rows at any address. */
QI_INLINE void load_odd_rows(const attention_params *p, const item_keys *k, loader *l,
                             const int is_v)
{
    const int pieces = 8 * (is_v ? VO_CHUNKS : QK_CHUNKS), dim = is_v ? HEAD_DIM_VO : HEAD_DIM_QK;
#pragma unroll 1
    for (int first = k->first; first < k->end; first += KEYS) {
        char *to = l->to + l->at.stage * (is_v ? V_BYTES : K_BYTES);
        mbarrier_wait(&l->empty[l->at.stage], l->at.parity ^ 1);
#pragma unroll 1
        for (int i = tid_x() % WARP; i < WARP_ROWS * pieces; i += WARP) {
            const int r = i / pieces, piece = i % pieces, key = first + rows_before() + r;
            copy_odd_piece(to + piece / 8 * KV_CHUNK_BYTES + r * 128 + ((piece ^ r) & 7) * 16,
                           row_of_key(p, k, key, page_of_key(p, k, key), is_v), piece * PIECE_DIMS,
                           dim - piece * PIECE_DIMS);
        }
        tell_rows(l);
    }
}

/* ---- the warp ----------------------------------------------------------------------------------- */

/* All items' keys, or their values. */
QI_INLINE void load_items(const wgmma_params *p, char *shared, const int is_v)
{
    tile_barriers *b = barriers_of(shared);
    loader l = {shared + (is_v ? V_AT : K_AT) + rows_before() * 128,
                is_v ? b->v_full : b->k_full,
                is_v ? b->v_empty : b->k_empty,
                {0, 0},
                (int)threadIdx.x % WARP};
    ring note = {0, 0};
    const int aligned = keys_aligned(&p->c.at);
#pragma unroll 1
    for (;; ring_next(&note, WGMMA_NOTES)) {
        const prefill_item_notes *n = item_notes(shared, note.stage);
        mbarrier_wait(&b->noted[note.stage], note.parity);
        if (n->work.num_rows == 0) return;
        const item_keys k = {first_key(p, n->work.kv_begin), n->work.kv_end, n->work.kv_head,
                             n->group.kv_begin};
        forget_item(b, note.stage);
        if (p->kv_by_tma)
            load_by_tma(p, &k, &l, is_v);
        else if (PIECE == 0 && aligned)
            load_by_rows(&p->c.at, &k, &l, is_v);
        else
            load_odd_rows(&p->c.at, &k, &l, is_v);
        if (!is_v && tid_x() % WARP == 0) mbarrier_arrive(&b->loaded[note.stage]);
    }
}

#endif
