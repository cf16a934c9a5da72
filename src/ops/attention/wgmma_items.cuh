/* wgmma_items.cuh - the shared memory of the Hopper tile, its barriers, and the two warps that prepare items ahead of
 * the warpgroups that compute: what is noted of an item and its rows, and queries.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_WGMMA_ITEMS_CUH
#define QI_ATTENTION_WGMMA_ITEMS_CUH

#include "kern/cuda/mma_sm90.cuh"
#include "kern/cuda/tma.cuh"
#include "ops/attention/prefill_notes.cuh"
#include "ops/attention/wgmma_params.h"

/* Warps that fill each of the two rings, of as many warpgroups; and those of one more that transpose values for products
 * of e4m3. */
#define TRANSPOSERS (FP8 ? 4 : 0)
#define LOADERS     (THREADS / 128 - WARPGROUPS - TRANSPOSERS / 4)

/* The products' left and right elements. */
enum { PRODUCT_TYPE = FP8 ? QI_E4M3 : MMA_TYPE, PRODUCT_BYTES = FP8 ? 1 : 2 };

enum {
    TILE_ROWS = 64 * WARPGROUPS,
    CHUNK_DIMS = 128 / PRODUCT_BYTES, /* of a row of shared memory; of 16 bytes of it */
    PIECE_DIMS = 16 / PRODUCT_BYTES,
    QK_CHUNKS = WGMMA_CHUNKS(HEAD_DIM_QK, PRODUCT_BYTES),
    VO_CHUNKS = WGMMA_CHUNKS(HEAD_DIM_VO, PRODUCT_BYTES),
    Q_CHUNK_BYTES = TILE_ROWS * 128,
    KV_CHUNK_BYTES = KEYS * 128,
    Q_BYTES = WGMMA_TILE_BYTES(TILE_ROWS, HEAD_DIM_QK, PRODUCT_BYTES),
    K_BYTES = WGMMA_TILE_BYTES(KEYS, HEAD_DIM_QK, PRODUCT_BYTES),
    V_BYTES = WGMMA_TILE_BYTES(KEYS, HEAD_DIM_VO, PRODUCT_BYTES),
    TURNED_BYTES = WGMMA_TURNED_BYTES(HEAD_DIM_VO, KEYS, PRODUCT_BYTES),
    K_AT = WGMMA_RINGS_AT(HEAD_DIM_QK, PRODUCT_BYTES, WARPGROUPS, BUFFERS),
    V_AT = K_AT + STAGES * K_BYTES,
    TURNED_AT = V_AT + STAGES * V_BYTES,
    NOTES_AT = TURNED_AT + STAGES * TURNED_BYTES,
    ROWS_AT = NOTES_AT + WGMMA_NOTES * PREFILL_ITEM_BYTES,
    BARRIERS_AT = ROWS_AT + BUFFERS * WGMMA_ROWS_BYTES(WARPGROUPS),
    CONSUMERS = WARPGROUPS * 128, /* threads that compute; in front of them are those that load */
    PREPARERS_AT = LOADERS * 64,  /* of the latter, threads that prepare items follow the others */
    ITEM_THREADS = 64,
    /* named barriers: of a computing warpgroup its number, of all of them, of the threads that prepare items */
    BAR_CONSUMERS = WARPGROUPS + 1,
    BAR_ITEMS = WARPGROUPS + 2,
};
_Static_assert(LOADERS >= 1 && LOADERS <= 2 && KEYS % (FP8 ? 32 : 16) == 0 &&
                   COLUMNS == WGMMA_COLUMNS(HEAD_DIM_VO),
               "as launched");

/* full: what was loaded is there; empty: it was used. */
typedef struct tile_barriers {
    uint4 zeros;                                    /* for values that are not the item's */
    u64 noted[WGMMA_NOTES], forgotten[WGMMA_NOTES]; /* items */
    u64 loaded[WGMMA_NOTES];                        /* of an item all keys were asked for */
    u64 rows_full[BUFFERS], rows_empty[BUFFERS];    /* queries and what is noted of rows */
    u64 k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    u64 turned_full[STAGES], turned_empty[STAGES]; /* values as e4m3 products take them */
    int is_last;                                   /* did this block finish the item's tile? */
    u32 queries[ITEM_THREADS / WARP];              /* their kind, of each warp's rows */
} tile_barriers;
_Static_assert(sizeof(tile_barriers) <= WGMMA_BARRIERS_BYTES && BARRIERS_AT % 16 == 0,
               "as launched");

QI_INLINE tile_barriers *barriers_of(char *shared)
{
    return (tile_barriers *)(shared + BARRIERS_AT);
}

/* By one thread. */
QI_INLINE void init_barriers(tile_barriers *b)
{
    enum { READERS = 2 * LOADERS + TRANSPOSERS + CONSUMERS / WARP }; /* warps that read notes */
    if (FP8) b->zeros = make_uint4(0, 0, 0, 0);
    for (int i = 0; i < WGMMA_NOTES; i++) {
        mbarrier_init(&b->noted[i], 1);
        mbarrier_init(&b->forgotten[i], READERS);
        mbarrier_init(&b->loaded[i], LOADERS);
    }
    for (int i = 0; i < BUFFERS; i++) {
        mbarrier_init(&b->rows_full[i], ITEM_THREADS);
        mbarrier_init(&b->rows_empty[i], CONSUMERS / WARP);
    }
    for (int i = 0; i < STAGES; i++) {
        mbarrier_init(&b->k_full[i], LOADERS);
        mbarrier_init(&b->v_full[i], LOADERS);
        mbarrier_init(&b->k_empty[i], WARPGROUPS);
        mbarrier_init(&b->v_empty[i], FP8 ? TRANSPOSERS : WARPGROUPS);
        if (!FP8) continue;
        mbarrier_init(&b->turned_full[i], TRANSPOSERS);
        mbarrier_init(&b->turned_empty[i], WARPGROUPS);
    }
    mbarrier_fence_init();
}

/* A place in a ring, and how often it was passed. */
typedef struct ring {
    u32 stage, parity;
} ring;

QI_INLINE void ring_next(ring *r, const int size)
{
    if (++r->stage == size) r->stage = 0, r->parity ^= 1;
}

/* ---- items -------------------------------------------------------------------------------- */

/* The notes of a place in their ring; no rows: there are no more items. */
QI_INLINE prefill_item_notes *item_notes(char *shared, u32 place)
{
    return (prefill_item_notes *)(shared + NOTES_AT + place * PREFILL_ITEM_BYTES);
}

QI_INLINE prefill_row *item_rows(char *shared, u32 buffer)
{
    return (prefill_row *)(shared + ROWS_AT + buffer * WGMMA_ROWS_BYTES(WARPGROUPS));
}

/* A warp is done with the notes there. */
QI_INLINE void forget_item(tile_barriers *b, u32 place)
{
    __syncwarp();
    if (threadIdx.x % WARP == 0) mbarrier_arrive(&b->forgotten[place]);
}

/* The key of the group's list that an item's first block begins with: copies of pages begin at a multiple of
 * PIECE. */
QI_INLINE int first_key(const wgmma_params *p, int begin)
{
    const int piece = PAGE_SIZE > 0 && PIECE > 0 ? PIECE : 1;
    return p->kv_by_tma ? begin - begin % piece : begin;
}

QI_INLINE int num_blocks(int first, int end)
{
    return end > first ? (end - first + KEYS - 1) / KEYS : 0;
}

/* ---- queries ------------------------------------------------------------------------------ */

/* Dim d of row m of a tile of rows in shared memory: 16-byte pieces stand as wgmma takes them. */
QI_INLINE char *query_at(char *q, int m, int d)
{
    return q + d / CHUNK_DIMS * Q_CHUNK_BYTES + m * 128 + ((d / PIECE_DIMS % 8) ^ (m % 8)) * 16 +
           d % PIECE_DIMS * PRODUCT_BYTES;
}

/* Queries of any type, order and address, by way of f32; where the scale is negative the query is negated, and zeros
 * follow the last dim. */
QI_INLINE void convert_queries(const attention_cuda_params *c, const qi_work *w,
                               const prefill_row *rows, char *q, int tid)
{
    enum { PAIRS = QK_CHUNKS * CHUNK_DIMS / 2 };
    const attention_params *p = &c->at;
#pragma unroll 1
    for (int i = tid; i < w->num_rows * GROUP_SIZE * PAIRS; i += ITEM_THREADS) {
        const int m = i / PAIRS, pair = i % PAIRS, real = pair < HEAD_DIM_QK / 2;
        const int a = real ? PAIR_FIRST(pair, HEAD_DIM_QK) : 2 * pair;
        const int b = real ? PAIR_SECOND(pair, HEAD_DIM_QK) : 2 * pair + 1;
        qi_pair x = {0.f, 0.f};
        if (real) {
            const prefill_row *r = &rows[m];
            const int head = prefill_head(w, m);
            const i64 at = r->row.token * p->q_stride[0] + head * p->q_stride[1];
            x.x = qi_load1(qi_at(p->q, DTYPE_Q, at + a), DTYPE_Q);
            x.y = qi_load1(qi_at(p->q, DTYPE_Q, at + b), DTYPE_Q);
            if (CHANGES_QUERIES) x = hook_query(c, hook_pos(p, r->row, head), a, x);
            if (r->scale < 0.f) x.x = -x.x, x.y = -x.y;
        }
        qi_store(query_at(q, m, a), &x.x, PRODUCT_TYPE, 1);
        qi_store(query_at(q, m, b), &x.y, PRODUCT_TYPE, 1);
    }
    fence_proxy_async();
}

/* Unit i of a tile's queries as they stand in memory: 16 bytes of row m, from dim d on. */
enum { UNIT_DIMS = 16 / qi_size_of(DTYPE_Q), ROW_UNITS = CHUNK_DIMS * QK_CHUNKS / UNIT_DIMS };
#define UNIT_ROW(i) ((i) / ROW_UNITS)
#define UNIT_DIM(i) ((i) % ROW_UNITS * UNIT_DIMS)

/* A unit in shared memory from its type to the products'. */
QI_INLINE void convert_unit(char *q, int m, int d, float sign)
{
    const uint4 unit = *(const uint4 *)query_at(q, m, d);
#if FP8 /* it is of that type, and to be negated */
    const u32 signs = 0x80808080;
    *(uint4 *)query_at(q, m, d) =
        make_uint4(unit.x ^ signs, unit.y ^ signs, unit.z ^ signs, unit.w ^ signs);
#else
    const u32 words[4] = {unit.x, unit.y, unit.z, unit.w};
#pragma unroll
    for (int i = 0; i < UNIT_DIMS; i += 8) {
        float x[8];
        qi_unpack_all(x, words + i * qi_size_of(DTYPE_Q) / 4, DTYPE_Q, 8);
        *(uint4 *)query_at(q, m, d + i) =
            make_uint4(pack_pair(sign * x[0], sign * x[1]), pack_pair(sign * x[2], sign * x[3]),
                       pack_pair(sign * x[4], sign * x[5]), pack_pair(sign * x[6], sign * x[7]));
    }
#endif
}

/* Queries 16 bytes at a time. What is of another type or to be negated is changed where it came to lie, by the thread
 * that copied it. */
QI_INLINE void copy_queries(const attention_cuda_params *c, const qi_work *w,
                            const prefill_row *rows, char *q)
{
    const int tid = tid_x() - PREPARERS_AT; /* no registers for what follows from it */
    const attention_params *p = &c->at;
    const int all = w->num_rows * GROUP_SIZE * ROW_UNITS;
#pragma unroll 2
    for (int i = tid; i < all; i += ITEM_THREADS) {
        const int m = UNIT_ROW(i), d = UNIT_DIM(i), left = (HEAD_DIM_QK - d) * qi_size_of(DTYPE_Q);
        const int bytes = left < 0 ? 0 : left < 16 ? left : 16;
        const i64 at = rows[m].row.token * p->q_stride[0] + prefill_head(w, m) * p->q_stride[1];
        cp_async_16(query_at(q, m, d), qi_at(p->q, DTYPE_Q, at + (bytes > 0 ? d : 0)), (u32)bytes);
    }
    cp_async_commit_group();
    cp_async_wait_group(0);
#pragma unroll 1
    for (int i = tid; i < all; i += ITEM_THREADS) {
        const float scale = rows[UNIT_ROW(i)].scale;
        if (DTYPE_Q != PRODUCT_TYPE || scale < 0.f)
            convert_unit(q, UNIT_ROW(i), UNIT_DIM(i), scale < 0.f ? -1.f : 1.f);
    }
    fence_proxy_async();
}

/* Can queries be read 16 bytes at a time? */
QI_INLINE int queries_aligned(const attention_params *p)
{
    const i64 size = qi_size_of(DTYPE_Q);
    return (((i64)p->q | p->q_stride[0] * size | p->q_stride[1] * size) & 15) == 0;
}

/* How an item's queries come: element by element, where hooks change them or addresses are odd; 16 bytes at a time; in
 * one box of a whole tile's, where tokens are neighbours and more than a few, of the products' type, and no scale is
 * negative. */
enum { QUERIES_CONVERTED, QUERIES_COPIED, QUERIES_BOXED };
/* A box brings 8 times as many from L2, as much as half a block of keys and values. */
enum { FEW_QUERIES = 16 };

/* Asked of this thread's rows. */
QI_INLINE u32 kind_of_queries(const wgmma_params *p, const qi_work *w, const prefill_row *rows,
                              int tid)
{
    if (CHANGES_QUERIES || !queries_aligned(&p->c.at)) return QUERIES_CONVERTED;
    if (!p->q_by_tma || w->num_rows * GROUP_SIZE <= FEW_QUERIES) return QUERIES_COPIED;
    for (int m = tid; m < w->num_rows * GROUP_SIZE; m += ITEM_THREADS)
        if (rows[m].scale < 0.f || rows[m].row.token != rows[0].row.token + m / GROUP_SIZE)
            return QUERIES_COPIED;
    return QUERIES_BOXED;
}

/* ---- which items ---------------------------------------------------------------------------- */

/* Where a block finds its items: in its strip of the plan, where few tiles were cut so that strips are equal; otherwise
 * whoever is free takes the next of all: first what levels share, long pieces, of which there are about as many as
 * blocks; then the others from the last to the first, so that blocks are at keys of the same few requests, which stay
 * in L2, and of each request the long tiles come first. */
typedef struct item_source {
    int begin, end; /* left of a strip */
    int claimed;    /* 0: a strip; 1: of all, none yet; more: some */
} item_source;

QI_INLINE item_source find_items(const qi_plan *plan)
{
    const item_source s = {plan->work_indptr[blockIdx.x], plan->work_indptr[blockIdx.x + 1],
                           plan->header->claimed};
    return s;
}

/* The n-th that is taken of all `count`, of which num_shared from shared_begin on are of shared levels; -1: there is
 * none. */
QI_INLINE int nth_item(int n, int count, int shared_begin, int num_shared)
{
    if (n < num_shared) return shared_begin + n;
    if (n >= count) return -1;
    const int past = shared_begin > 0 ? shared_begin : count; /* of the others */
    return past - 1 - (n - num_shared);
}

/* The next item, -1: no more. */
QI_INLINE int take_item(const qi_plan *plan, item_source *s)
{
    const qi_plan_header *h = plan->header;
    if (!s->claimed) return s->begin < s->end ? s->begin++ : -1;
    /* The first without a wait for the count, which is then of the others. */
    const int n =
        s->claimed++ == 1 ? (int)blockIdx.x : (int)gridDim.x + atomicAdd(&plan->claims[0], 1);
    return nth_item(n, h->num_work, h->shared_begin, h->num_shared);
}

/* After a block's last: the last block to come here leaves the counts as they were found. */
QI_INLINE void end_items(const qi_plan *plan, const item_source *s)
{
    if (!s->claimed || atomicAdd(&plan->claims[1], 1) < (int)gridDim.x - 1) return;
    plan->claims[0] = plan->claims[1] = 0;
}

/* ---- the warps that prepare items ----------------------------------------------------------- */

/* Rows and queries of the item that is noted. */
QI_INLINE void prepare_rows(const wgmma_params *p, const prefill_item_notes *notes, u32 buffer,
                            char *shared, int tid)
{
    tile_barriers *b = barriers_of(shared);
    const qi_work *w = &notes->work;
    prefill_row *rows = item_rows(shared, buffer);
    char *q = shared + buffer * Q_BYTES;
    const int noted = w->num_rows * GROUP_SIZE <= 64 ? 64 : TILE_ROWS; /* others read none */
#pragma unroll 1
    for (int m = tid; m < noted; m += ITEM_THREADS)
        rows[m] = make_prefill_row(&p->c, w, &notes->group, m);
    bar_sync(BAR_ITEMS, ITEM_THREADS);
    const u32 of_warp = __reduce_min_sync(ALL_LANES, kind_of_queries(p, w, rows, tid));
    if (tid % WARP == 0) b->queries[tid / WARP] = of_warp;
    bar_sync(BAR_ITEMS, ITEM_THREADS);
    const u32 kind = b->queries[0] < b->queries[1] ? b->queries[0] : b->queries[1];
    if (kind == QUERIES_CONVERTED) {
        convert_queries(&p->c, w, rows, q, tid);
    } else if (kind == QUERIES_COPIED) {
        copy_queries(&p->c, w, rows, q);
    } else if (tid == 0) {
        enum { ROWS = TILE_ROWS / GROUP_SIZE * GROUP_SIZE };
        mbarrier_arrive_expect_tx(&b->rows_full[buffer], ROWS * 128 * QK_CHUNKS);
        for (int i = 0; i < QK_CHUNKS; i++)
            tma_load_4d(q + i * Q_CHUNK_BYTES, &p->q, &b->rows_full[buffer], CHUNK_DIMS * i, 0,
                        w->kv_head, rows[0].row.token);
        return;
    }
    mbarrier_arrive(&b->rows_full[buffer]);
}

/* Word `lane` of a struct of fewer words than a warp has lanes. */
#define WORD_OF(from, lane) ((lane) < (int)(sizeof *(from) / 4) ? ((const u32 *)(from))[lane] : 0)

QI_INLINE void store_word(void *to, int bytes, int lane, u32 word)
{
    if (lane < bytes / 4) ((u32 *)to)[lane] = word;
}

/* Items as the first of these warps takes them. A lane has a word of what is looked up in memory. */
typedef struct item_queue {
    item_source source;
    int item, next; /* next: of lane 0, taken ahead, or NOT_YET */
    u32 work;       /* of the item, whose first word is the group */
} item_queue;
enum { NOT_YET = -2 };

/* On to the next item, and to the one after it if that is to be taken ahead. */
QI_INLINE void advance(const qi_plan *plan, item_queue *q, int lane, int ahead)
{
    int item = 0;
    if (lane == 0) item = q->next == NOT_YET ? take_item(plan, &q->source) : q->next;
    q->item = __shfl_sync(ALL_LANES, item, 0);
    if (q->item >= 0) q->work = WORD_OF(&plan->work[q->item], lane);
    q->next = NOT_YET;
    if (lane == 0 && ahead && item >= 0) q->next = take_item(plan, &q->source);
}

/* Takes item after item, notes it for all, and prepares its rows. Short items are taken ahead, so that nobody waits for
 * what is looked up; after a longer one the next is taken when the last of its keys have been asked for, some
 * two blocks before its end: whoever is in a long item leaves the others to those that are free. */
QI_INLINE void prepare_items(const wgmma_params *p, char *shared, int tid)
{
    const qi_plan *plan = &p->c.at.plan;
    tile_barriers *b = barriers_of(shared);
    item_queue queue = {find_items(plan), -1, NOT_YET, 0};
    ring note = {0, 0}, buffer = {0, 0};
    if (tid < WARP) advance(plan, &queue, tid, 0);
#pragma unroll 1
    for (;;) {
        prefill_item_notes *notes = item_notes(shared, note.stage);
        if (tid < WARP) {
            const u32 group = __shfl_sync(ALL_LANES, queue.work, 0);
            const u32 word = queue.item < 0 ? 0 : WORD_OF(&plan->groups[group], tid);
            mbarrier_wait(&b->forgotten[note.stage], note.parity ^ 1);
            store_word(&notes->work, sizeof notes->work, tid, queue.item < 0 ? 0 : queue.work);
            store_word(&notes->group, sizeof notes->group, tid, word);
            __syncwarp();
            if (tid == 0) {
                note_plain_keys(&p->c.at, notes);
                mbarrier_arrive(&b->noted[note.stage]);
            }
        }
        mbarrier_wait(&b->noted[note.stage], note.parity);
        if (notes->work.num_rows == 0) break;
        const int is_short = notes->work.num_rows * GROUP_SIZE <= 64 &&
                             notes->work.kv_end - notes->work.kv_begin <= KEYS;
        if (tid < WARP && is_short) advance(plan, &queue, tid, 1);
        mbarrier_wait(&b->rows_empty[buffer.stage], buffer.parity ^ 1);
        prepare_rows(p, notes, buffer.stage, shared, tid);
        if (tid < WARP && !is_short) {
            mbarrier_wait(&b->loaded[note.stage], note.parity);
            advance(plan, &queue, tid, 0);
        }
        ring_next(&note, WGMMA_NOTES);
        ring_next(&buffer, BUFFERS);
    }
    if (tid == 0) end_items(plan, &queue.source);
}

#endif
