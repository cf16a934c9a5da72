/* prefill_loads.cuh - the shared memory of a prefill tile on GPUs with mma.sync, and what fills it: notes on
 * its rows, addresses of its keys, queries, and tiles of keys and values as they stand in memory.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_PREFILL_LOADS_CUH
#define QI_ATTENTION_PREFILL_LOADS_CUH

#include "ops/attention/prefill_notes.cuh"

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

/* ---- notes -------------------------------------------------------------------------------- */

QI_INLINE const prefill_item_notes *prefill_noted(const char *shared)
{
    return (const prefill_item_notes *)shared;
}

QI_INLINE const prefill_row *prefill_rows_of(const char *shared)
{
    return (const prefill_row *)(shared + PREFILL_ROWS_AT);
}

QI_INLINE void note_prefill_rows(const attention_cuda_params *c, const qi_work *w,
                                 const qi_group *g, char *shared)
{
    const int m = tid_x();
    if (m < PREFILL_ROWS)
        ((prefill_row *)(shared + PREFILL_ROWS_AT))[m] = make_prefill_row(c, w, g, m);
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
/* Queries in the tensor cores' type, zeros past the last row and dim. Where they lie first, then the copies:
 * a copy to shared memory is not to be waited for by what looks the next one up there. */
QI_INLINE void load_prefill_queries(const attention_cuda_params *c, const qi_work *w, char *shared)
{
    enum { BATCH = 4, PIECES = PREFILL_QK / 8, COUNT = PREFILL_ROWS * PIECES };
    const attention_params *p = &c->at;
    const int all = w->num_rows * GROUP_SIZE, first_head = w->kv_head * GROUP_SIZE;
    const int size = qi_size_of(DTYPE_Q), unit = size == 2 ? 16 : 8;
    const int aligned =
        (((i64)p->q | p->q_stride[0] * size | p->q_stride[1] * size) & (unit - 1)) == 0;
    const int same = DTYPE_Q == DTYPE_KV && KV_BYTES == 2;
#pragma unroll 1
    for (int begin = tid_x(); begin < COUNT; begin += BATCH * THREADS) {
        const char *from[BATCH];
        float scale[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const int i = begin + j * THREADS, m = i / PIECES, d = i % PIECES * 8;
            if (i >= COUNT) break;
            const prefill_row *r = prefill_rows_of(shared) + m;
            from[j] = qi_at(p->q, DTYPE_Q,
                            r->row.token * p->q_stride[0] +
                                (first_head + m % GROUP_SIZE) * p->q_stride[1] + d);
            scale[j] = r->scale;
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const int i = begin + j * THREADS, m = i / PIECES, d = i % PIECES * 8;
            const int there = m < all && d < HEAD_DIM_QK;
            char *to = shared + PREFILL_Q_AT + m * PREFILL_Q_PITCH;
            if (i >= COUNT) break;
            if (same && aligned && scale[j] > 0.f)
                cp_async_16(to + 2 * d, from[j], there ? 16 : 0);
            else if (there)
                convert_query(from[j], aligned, scale[j] < 0.f ? -1.f : 1.f, to, d);
            else
                for (int e = 0; e < 8; e += 2) *(u32 *)(to + 2 * prefill_q_place(d + e)) = 0;
        }
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

/* Where a tile of keys is copied to, from the addresses that a slot has; by thread tid. Keys from `end` on, of
 * which `first` is the slot's first, become zeros. */
typedef struct prefill_copies {
    char *k, *v, *shared;
    int slot, first, end, tid;
    int aligned; /* can keys be copied 16 bytes at a time? */
} prefill_copies;

/* Into the buffers that a slot's tile has. */
QI_INLINE prefill_copies prefill_copies_to(char *shared, int slot, int first, int end, int aligned)
{
    const int buffer = PREFILL_BUFFERS == 2 ? slot * PREFILL_N : 0;
    const prefill_copies c = {shared + PREFILL_K_AT + buffer * PREFILL_K_PITCH,
                              shared + PREFILL_V_AT + buffer * PREFILL_V_PITCH,
                              shared,
                              slot,
                              first,
                              end,
                              tid_x(),
                              aligned};
    return c;
}

/* A tile of k or v element by element, if they are not aligned. */
QI_INLINE void copy_odd_keys(const prefill_copies *c, const int is_v)
{
    const int dim = is_v ? HEAD_DIM_VO : HEAD_DIM_QK;
    const int pitch = is_v ? PREFILL_V_PITCH : PREFILL_K_PITCH;
    const int chunks = (dim + 15) / 16 * KV_BYTES;
    if (c->aligned) return;
#pragma unroll 1
    for (int at = c->tid; at < PREFILL_N * chunks; at += THREADS) {
        const int key = at / chunks, chunk = at % chunks;
        copy_elements((is_v ? c->v : c->k) + key * pitch + chunk * 16,
                      prefill_addresses(c->shared, c->slot, is_v)[key] + chunk * 16,
                      key < c->end - c->first ? prefill_chunk_bytes(chunk, dim) : 0);
    }
}

/* The same by asynchronous copies, if they are aligned, without a branch, so that what follows is mixed with
 * it. Addresses are looked up four copies ahead: a copy to shared memory is not overtaken by a look there. */
QI_INLINE void copy_keys(const prefill_copies *c, const int is_v)
{
    enum { BATCH = 4 };
    const int dim = is_v ? HEAD_DIM_VO : HEAD_DIM_QK;
    const int pitch = is_v ? PREFILL_V_PITCH : PREFILL_K_PITCH;
    const int chunks = (dim + 15) / 16 * KV_BYTES, count = PREFILL_N * chunks;
    const int even = THREADS % chunks == 0; /* all of a thread's copies are of the same chunk */
    const int my_key = c->tid / chunks, my_chunk = c->tid % chunks;
    const char *const *addresses =
        (const char *const *)prefill_addresses(c->shared, c->slot, is_v) + (even ? my_key : 0);
    char *const to = (is_v ? c->v : c->k) + (even ? my_key * pitch + my_chunk * 16 : 0);
    const char *from[2 * BATCH];
#pragma unroll
    for (int i = -BATCH; i < (count + THREADS - 1) / THREADS; i++) {
        const int ahead = (i + BATCH) * THREADS, base = i * THREADS;
        if (ahead < count) {
            const int at = ahead + c->tid < count ? ahead + c->tid : 0;
            from[(i + BATCH) % (2 * BATCH)] = even ? addresses[ahead / chunks] + my_chunk * 16
                                                   : addresses[at / chunks] + at % chunks * 16;
        }
        if (i < 0) continue;
        const int at = base + c->tid, key = even ? base / chunks + my_key : at / chunks;
        const int chunk = even ? my_chunk : at % chunks;
        const int bytes = key < c->end - c->first ? prefill_chunk_bytes(chunk, dim) : 0;
        cp_async_16_if(c->aligned && (base + THREADS <= count || at < count),
                       even ? to + base / chunks * pitch : to + key * pitch + chunk * 16,
                       from[i % (2 * BATCH)], (u32)bytes);
    }
}

#endif
