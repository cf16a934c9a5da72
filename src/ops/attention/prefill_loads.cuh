/* prefill_loads.cuh - the shared memory of a prefill tile on GPUs with mma.sync, and what fills it: notes on
 * its rows, addresses of its keys, queries, and tiles of keys and values as they stand in memory.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_PREFILL_LOADS_CUH
#define QI_ATTENTION_PREFILL_LOADS_CUH

#include "ops/attention/mma_types.cuh"

enum {
    PREFILL_ROWS = PREFILL_TILE_M(HEAD_DIM_VO),
    PREFILL_N = PREFILL_KEYS(HEAD_DIM_QK, HEAD_DIM_VO, KV_BYTES),
    PREFILL_BUFFERS = PREFILL_STAGES(HEAD_DIM_QK, HEAD_DIM_VO, KV_BYTES),
    PREFILL_QK = (HEAD_DIM_QK + 15) / 16 * 16,
    PREFILL_VO = (HEAD_DIM_VO + 15) / 16 * 16,
    PREFILL_Q_PITCH = PREFILL_PITCH(HEAD_DIM_QK, 2),
    PREFILL_K_PITCH = PREFILL_PITCH(HEAD_DIM_QK, KV_BYTES),
    PREFILL_V_PITCH = PREFILL_PITCH(HEAD_DIM_VO, KV_BYTES),
    PREFILL_KEYS_MOST = 64,
    /* where things are in shared memory */
    PREFILL_ROWS_AT = PREFILL_ITEM_BYTES,
    PREFILL_ADDRESSES_AT = PREFILL_ROWS_AT + PREFILL_ROWS * PREFILL_ROW_BYTES,
    PREFILL_POSITIONS_AT = PREFILL_ADDRESSES_AT + 2 * 2 * PREFILL_KEYS_MOST * 8,
    PREFILL_Q_AT = PREFILL_NOTES(HEAD_DIM_VO),
    PREFILL_K_AT = PREFILL_Q_AT + PREFILL_ROWS * PREFILL_Q_PITCH,
    PREFILL_V_AT = PREFILL_K_AT + PREFILL_BUFFERS * PREFILL_N * PREFILL_K_PITCH,
};
_Static_assert(THREADS == 128, "4 warps, and two threads a key");
_Static_assert(KV_BYTES == 2 || PREFILL_N % 32 == 0, "8-bit keys are read 32 at a time");

/* ---- the item ----------------------------------------------------------------------------- */

/* What is needed of it now and then stays here, since o and scores leave few registers. */
typedef struct prefill_item_notes {
    qi_work work;
    qi_group group;
    /* Keys [plain_begin, plain_end) of the group's list are seen by all rows, as far as causality, windows
     * and the end of the item's keys go. */
    int plain_begin, plain_end;
    int aligned; /* can rows of keys be copied 16 bytes at a time? */
} prefill_item_notes;
_Static_assert(sizeof(prefill_item_notes) <= PREFILL_ITEM_BYTES, "as launched");

QI_INLINE const prefill_item_notes *prefill_noted(const char *shared)
{
    return (const prefill_item_notes *)shared;
}

/* By one thread. */
QI_INLINE void note_prefill_item(const attention_params *p, const qi_work *w, char *shared)
{
    prefill_item_notes *n = (prefill_item_notes *)shared;
    const qi_group g = p->plan.groups[w->group];
    i64 lowest = g.pos_first, highest = g.pos_last;
    if (!MIXED || !(g.flags & QI_GROUP_MIXED)) {
        lowest += w->row_begin - g.row_begin;
        highest = lowest + w->num_rows - 1;
    }
    lowest -= g.kv_offset, highest -= g.kv_offset;
    i64 begin = w->kv_begin, end = w->kv_end;
    if (CAUSAL && lowest + 1 < end) end = lowest + 1;
    if (WINDOW && p->window_right >= 0 && lowest + p->window_right + 1 < end)
        end = lowest + p->window_right + 1;
    if (WINDOW && p->window_left >= 0 && highest - p->window_left > begin)
        begin = highest - p->window_left;
    n->work = *w;
    n->group = g;
    n->plain_begin = (int)(begin < w->kv_end ? begin : w->kv_end);
    n->plain_end = (int)(end > w->kv_begin ? end : w->kv_begin);
    n->aligned = keys_aligned(p);
}

/* ---- rows --------------------------------------------------------------------------------- */

/* A tile's row m: query head m % GROUP_SIZE of a row of q. */
typedef struct prefill_row {
    tile_row row;
    float scale; /* of its logits, in natural units; not 0, so that -infinity times it is not NaN */
} prefill_row;
_Static_assert(sizeof(prefill_row) == PREFILL_ROW_BYTES, "as launched");

QI_INLINE const prefill_row *prefill_rows_of(const char *shared)
{
    return (const prefill_row *)(shared + PREFILL_ROWS_AT);
}

QI_INLINE int prefill_head(const qi_work *w, int m)
{
    return w->kv_head * GROUP_SIZE + m % GROUP_SIZE;
}

/* Rows past the last are as it is, for what looks at all of them. */
QI_INLINE void note_prefill_rows(const attention_cuda_params *c, const qi_work *w, char *shared)
{
    const int all = w->num_rows * GROUP_SIZE, tid = tid_x();
    if (tid >= PREFILL_ROWS) return;
    const int m = tid < all ? tid : all - 1, head = prefill_head(w, m);
    prefill_row r;
    r.row = row_at(&c->at, w->row_begin + m / GROUP_SIZE);
    r.scale = query_scale(c, head);
    if (r.scale == 0.f) r.scale = 1e-30f;
    ((prefill_row *)(shared + PREFILL_ROWS_AT))[tid] = r;
}

/* ---- queries ------------------------------------------------------------------------------ */

/* Where dim d of a row of q goes. 8-bit keys come four dims at a time, 4c and the next three, where 16-bit
 * ones would be 2c, 2c + 1, 2c + 8, 2c + 9: q is put in the same order. */
QI_INLINE int prefill_q_place(int d)
{
    if (KV_BYTES == 2) return d;
    return d / 16 * 16 + d % 16 / 4 * 2 + d % 2 + d / 2 % 2 * 8;
}

/* Dims d to d + 7 of row m, by way of f32: of another type, in another order, from an odd address, or
 * negated, which makes a negative scale positive. */
QI_INLINE void convert_query(const char *from, int aligned, float sign, char *to, int d)
{
    float x[8];
    if (aligned)
        qi_load(x, from, DTYPE_Q, 8);
    else
        for (int i = 0; i < 8; i++) x[i] = qi_load1(qi_at(from, DTYPE_Q, i), DTYPE_Q);
#pragma unroll
    for (int i = 0; i < 8; i += 2)
        *(u32 *)(to + 2 * prefill_q_place(d + i)) = pack_pair(sign * x[i], sign * x[i + 1]);
}

#ifdef VARIANT_QUERY
/* Queries as a hook changes them, pair by pair. */
QI_INLINE void load_prefill_queries(const attention_cuda_params *c, const qi_work *w, char *shared)
{
    const attention_params *p = &c->at;
    const int all = w->num_rows * GROUP_SIZE, pairs = PREFILL_QK / 2;
    for (int i = tid_x(); i < PREFILL_ROWS * pairs; i += THREADS) {
        const int m = i / pairs, pair = i % pairs, real = pair < HEAD_DIM_QK / 2;
        const int a = real ? PAIR_FIRST(pair, HEAD_DIM_QK) : 2 * pair;
        const int b = real ? PAIR_SECOND(pair, HEAD_DIM_QK) : 2 * pair + 1;
        qi_pair x = {0.f, 0.f};
        if (m < all && real) {
            const prefill_row *r = prefill_rows_of(shared) + m;
            const int head = prefill_head(w, m);
            const i64 at = r->row.token * p->q_stride[0] + head * p->q_stride[1];
            x.x = qi_load1(qi_at(p->q, DTYPE_Q, at + a), DTYPE_Q);
            x.y = qi_load1(qi_at(p->q, DTYPE_Q, at + b), DTYPE_Q);
            x = hook_query(c, hook_pos(p, r->row, head), a, x);
            if (r->scale < 0.f) x.x = -x.x, x.y = -x.y;
        }
        u16 *to = (u16 *)(shared + PREFILL_Q_AT + m * PREFILL_Q_PITCH);
        const u32 both = pack_pair(x.x, x.y);
        to[prefill_q_place(a)] = (u16)both;
        to[prefill_q_place(b)] = (u16)(both >> 16);
    }
}
#else
/* Queries in the tensor cores' type, zeros past the last row and dim. */
QI_INLINE void load_prefill_queries(const attention_cuda_params *c, const qi_work *w, char *shared)
{
    const attention_params *p = &c->at;
    const int all = w->num_rows * GROUP_SIZE, pieces = PREFILL_QK / 8;
    const int size = qi_size_of(DTYPE_Q), unit = size == 2 ? 16 : 8;
    const int aligned =
        (((i64)p->q | p->q_stride[0] * size | p->q_stride[1] * size) & (unit - 1)) == 0;
    const int same = DTYPE_Q == DTYPE_KV && KV_BYTES == 2;
#pragma unroll 4
    for (int i = tid_x(); i < PREFILL_ROWS * pieces; i += THREADS) {
        const int m = i / pieces, d = i % pieces * 8, there = m < all && d < HEAD_DIM_QK;
        const prefill_row *r = prefill_rows_of(shared) + m;
        const i64 at = r->row.token * p->q_stride[0] + prefill_head(w, m) * p->q_stride[1] + d;
        const char *from = qi_at(p->q, DTYPE_Q, at);
        char *to = shared + PREFILL_Q_AT + m * PREFILL_Q_PITCH;
        if (same && aligned && r->scale > 0.f)
            cp_async_16(to + 2 * d, from, there ? 16 : 0);
        else if (there)
            convert_query(from, aligned, r->scale < 0.f ? -1.f : 1.f, to, d);
        else
            for (int e = 0; e < 8; e += 2) *(u32 *)(to + 2 * prefill_q_place(d + e)) = 0;
    }
}
#endif

/* ---- keys --------------------------------------------------------------------------------- */

/* Tile j notes the addresses of its keys in slot j % 2: [slot][k, v][key]. A thread knows one key of each
 * tile, and of it either k or v. */
QI_INLINE const char **prefill_addresses(char *shared, int slot, int is_v)
{
    return (const char **)(shared + PREFILL_ADDRESSES_AT) + (2 * slot + is_v) * PREFILL_KEYS_MOST;
}

/* Positions of a slot's keys, where a group may be sparse. */
QI_INLINE int *prefill_positions(char *shared, int slot)
{
    return (int *)(shared + PREFILL_POSITIONS_AT) + slot * PREFILL_KEYS_MOST;
}

/* This thread's key of the tile at `first`, as it stands in the list; past the last key: that one. */
QI_INLINE int prefill_key_index(int first, int end)
{
    const int index = first + tid_x() % PREFILL_KEYS_MOST;
    return index < end ? index : end - 1;
}

/* The same counted from the request's first key. */
QI_INLINE int prefill_key_in_list(const attention_params *p, const qi_group *g, int index)
{
    if (!SPARSE || !(g->flags & QI_GROUP_SPARSE)) return index;
    return p->bsr_indices[g->block_begin + index / p->bsr_cols] * p->bsr_cols + index % p->bsr_cols;
}

/* The page of this thread's key: what has to be read before it is needed. */
QI_INLINE int find_prefill_page(const attention_params *p, const qi_group *g, int first, int end)
{
#if PAGE_SIZE > 0
    const int in_list = prefill_key_in_list(p, g, prefill_key_index(first, end));
    return p->plan.pages[g->kv_begin + in_list / PAGE_SIZE];
#else
    return 0;
#endif
}

QI_INLINE void note_prefill_key(const attention_params *p, const qi_group *g, int kv_head,
                                int first, int end, int page, int slot, char *shared)
{
    const int tid = tid_x(), key = tid % PREFILL_KEYS_MOST, is_v = tid / PREFILL_KEYS_MOST;
    const int index = prefill_key_index(first, end), in_list = prefill_key_in_list(p, g, index);
    const i64 *stride = is_v ? p->v_stride : p->k_stride;
    i64 offset = kv_head * stride[2];
#if PAGE_SIZE > 0
    offset += page * stride[0] + in_list % PAGE_SIZE * stride[1];
#else
    offset += ((i64)g->kv_begin + in_list) * stride[1];
#endif
    prefill_addresses(shared, slot, is_v)[key] = qi_at(is_v ? p->v : p->k, DTYPE_KV, offset);
    if (SPARSE && !is_v)
        prefill_positions(shared, slot)[key] =
            g->flags & QI_GROUP_SPARSE ? in_list : g->kv_offset + index;
}

/* Bytes of 16 that a row of dims has at `chunk`: rows are padded to 16 dims with zeros, since 0 times what
 * lay there may be NaN. */
QI_INLINE int prefill_chunk_bytes(int chunk, const int dim)
{
    const int left = dim * KV_BYTES - chunk * 16;
    return dim % 16 == 0 ? 16 : left < 0 ? 0 : left < 16 ? left : 16;
}

/* k or v of a slot's keys that stand before `end`, the first of them at `first`; zeros past them. all: there
 * is none past them. */
QI_INLINE void copy_prefill_keys(char *to, char *shared, int slot, const int is_v, int first,
                                 int end, const int all)
{
    enum { BATCH = PREFILL_BUFFERS == 2 ? 8 : 4 }; /* addresses first: waiting for each is slow */
    const int dim = is_v ? HEAD_DIM_VO : HEAD_DIM_QK;
    const int pitch = is_v ? PREFILL_V_PITCH : PREFILL_K_PITCH;
    const int chunks = (dim + 15) / 16 * KV_BYTES, count = PREFILL_N * chunks;
    const int even =
        THREADS % chunks == 0; /* a thread copies the same chunk of every so many keys */
    const int tid = tid_x(), key = even ? tid / chunks : 0, chunk = even ? tid % chunks : 0;
    const char *const *address = (const char *const *)prefill_addresses(shared, slot, is_v) + key;
    char *mine = to + key * pitch + chunk * 16;
#pragma unroll
    for (int begin = 0; begin < count; begin += BATCH * THREADS) {
        const char *from[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int base = begin + i * THREADS, at = base + tid;
            if (base >= count) break;
            from[i] = even ? address[base / chunks] + chunk * 16
                           : address[at / chunks] + at % chunks * 16;
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int base = begin + i * THREADS, at = base + tid;
            if (base >= count) break;
            const int of = even ? base / chunks + key : at / chunks;
            const int there = prefill_chunk_bytes(even ? chunk : at % chunks, dim);
            char *place = even ? mine + base / chunks * pitch : to + of * pitch + at % chunks * 16;
            if (base + THREADS <= count || at < count)
                cp_async_16(place, from[i], all || first + of < end ? (u32)there : 0);
        }
    }
}

QI_INLINE void load_prefill_keys(char *to, char *shared, int slot, const int is_v, int first)
{
    const int end = prefill_noted(shared)->work.kv_end, aligned = prefill_noted(shared)->aligned;
    const int dim = is_v ? HEAD_DIM_VO : HEAD_DIM_QK;
    const int pitch = is_v ? PREFILL_V_PITCH : PREFILL_K_PITCH;
    const int chunks = (dim + 15) / 16 * KV_BYTES;
    if (aligned && first + PREFILL_N <= end) {
        copy_prefill_keys(to, shared, slot, is_v, first, end, 1);
    } else if (aligned) {
        copy_prefill_keys(to, shared, slot, is_v, first, end, 0);
    } else {
#pragma unroll 1
        for (int at = tid_x(); at < PREFILL_N * chunks; at += THREADS) {
            const int key = at / chunks, chunk = at % chunks;
            copy_elements(to + key * pitch + chunk * 16,
                          prefill_addresses(shared, slot, is_v)[key] + chunk * 16,
                          first + key < end ? prefill_chunk_bytes(chunk, dim) : 0);
        }
    }
}

/* The tile at `first`, the slot's, into the buffer of that slot; where there is one buffer, its keys. */
QI_INLINE void load_prefill_tile(char *shared, int slot, int first)
{
    const int buffer = PREFILL_BUFFERS == 2 ? slot : 0;
    load_prefill_keys(shared + PREFILL_K_AT + buffer * PREFILL_N * PREFILL_K_PITCH, shared, slot, 0,
                      first);
    if (PREFILL_BUFFERS == 2)
        load_prefill_keys(shared + PREFILL_V_AT + buffer * PREFILL_N * PREFILL_V_PITCH, shared,
                          slot, 1, first);
}

#endif
