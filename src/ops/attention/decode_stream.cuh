/* decode_stream.cuh - decode tiles of GPUs, what comes before a load: a strip's work items in shared memory, and
 * which tile a warp has next along the page tables of one item after another. See decode_mma.cuh for the whole.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_DECODE_STREAM_CUH
#define QI_ATTENTION_DECODE_STREAM_CUH

#include "ops/attention/mma_params.h"
#include "ops/attention/mma_types.cuh"

enum {
    DECODE_WARPS = THREADS / WARP,
    DECODE_ITEMS = 16, /* of a strip that are in shared memory at a time */
    TILE = DECODE_TILE(KV_BYTES),
    PIECE = DECODE_PIECE > 0 ? DECODE_PIECE : TILE, /* keys that lie in one page for sure */
    PIECES = TILE / PIECE,
    TILES_AHEAD = WARP / PIECES, /* whose pages a warp knows, a piece a lane */
    K_PITCH = DECODE_PITCH(HEAD_DIM_QK, KV_BYTES, DECODE_PIECE), /* bytes of a key */
    V_PITCH = DECODE_PITCH(HEAD_DIM_VO, KV_BYTES, DECODE_PIECE),
    Q_PITCH = DECODE_Q_PITCH(HEAD_DIM_QK),
    SLOT_BYTES = DECODE_SLOT_BYTES(HEAD_DIM_QK, HEAD_DIM_VO, KV_BYTES, DECODE_ROWS, DECODE_PIECE),
    RINGS_BYTES = DECODE_WARPS * DECODE_STAGES * SLOT_BYTES,
    NQ = DECODE_ROWS / 8,
    STEPS_QK = (HEAD_DIM_QK + 15) / 16,
    STEPS_VO = (HEAD_DIM_VO + 15) / 16,
    SUM_PITCH = DECODE_SUM_PITCH(HEAD_DIM_VO),
    Q_UNITS = DECODE_ROWS * STEPS_QK * 2, /* of 8 elements */
    Q_OF_THREAD = (Q_UNITS + THREADS - 1) / THREADS,
};

/* A work item and what its group says. A prefill tile has no rows and no keys here. */
typedef struct decode_item {
    int kv_begin, kv_end; /* keys of the group's list */
    int first;   /* where tiles begin: kv_begin or, where it is not at a piece's begin, that */
    int old_end; /* keys from here on are of the group's own rows */
    int block, kv_offset, kv_head; /* of the list */
    int row_begin, count;          /* rows of q: tokens times heads of the group */
    int request, position;         /* of its first row; MIXED groups: of none */
    int slot, merge, flags;
    qi_merge cut; /* its tile, where that is cut */
    i64 list;     /* where it begins, of plan.pages or of tokens */
    const qi_group *group;
} decode_item;

/* What the warps of a block share beside the rings. */
typedef struct decode_shared {
    u32 last; /* bits: of the items, those that were the last pieces of their tiles */
    tile_row row[DECODE_WARPS][DECODE_ROWS];
    float max[DECODE_WARPS][DECODE_ROWS], sum[DECODE_WARPS][DECODE_ROWS];
    int sums
        [DECODE_WARPS]; /* bytes from here to [DECODE_ROWS][SUM_PITCH] sums of v, in key order of tiles */
    u64 full[DECODE_WARPS][DECODE_STAGES]; /* of the rings' slots, where DECODE_PIECE > 0 */
    decode_item items[DECODE_ITEMS];
    __align__(
        16) char q[DECODE_ROWS * Q_PITCH]; /* of the item at hand, in the type of the products */
} decode_shared;
_Static_assert(sizeof(decode_shared) <= DECODE_SHARED_ROOM(HEAD_DIM_QK, DECODE_ROWS, DECODE_WARPS),
               "as launched");

/* Where what a strip begins with was before this launch's turn; begin -1: not known. */
typedef struct decode_guess {
    int begin, count; /* the strip's items */
    int group, merge; /* of item begin + threadIdx.x */
    i64 entry; /* of plan.pages, where this lane finds its first page number; -1: not known */
    int page;  /* what is there now */
} decode_guess;

QI_INLINE void decode_guess_nothing(decode_guess *g)
{
    g->begin = -1;
    g->count = 0;
    g->entry = -1;
}

/* Where tiles of keys from `begin` on begin. */
QI_INLINE int decode_first(int begin)
{
    return DECODE_PIECE > 0 && PAGE_SIZE > 0 ? begin - begin % PIECE : begin;
}

/* Work item w of group `at`; its tile's pieces where it is cut. */
QI_INLINE void decode_put_item(const attention_params *p, const qi_work *w, const qi_group *at,
                               const qi_group *g, const qi_merge *cut, decode_item *to)
{
    decode_item i;
    const int is_decode = w->flags == QI_TILE_DECODE;
    i.kv_begin = w->kv_begin;
    i.kv_end = is_decode ? w->kv_end : w->kv_begin;
    i.first = i.kv_begin < i.kv_end ? decode_first(i.kv_begin) : i.kv_begin;
    i.old_end = g->kv_len - g->num_rows;
    i.list = g->kv_begin;
    i.block = g->block_begin;
    i.kv_offset = g->kv_offset;
    i.kv_head = w->kv_head;
    i.row_begin = w->row_begin;
    i.count = is_decode ? w->num_rows * GROUP_SIZE : 0;
    i.request = g->request;
    i.position = (int)g->pos_first + (w->row_begin - g->row_begin);
    i.slot = w->slot;
    i.merge = w->merge;
    if (w->merge >= 0) {
        i.cut = *cut;
        prefetch_l2(&p->plan.ticket[w->merge]);
    }
    i.flags = g->flags;
    i.group = at;
    *to = i;
}

/* Work items [begin, begin + count) to shared memory, a thread each. */
QI_INLINE void decode_read_items(const attention_params *p, int begin, int count, decode_shared *t)
{
    if ((int)threadIdx.x < count) {
        const qi_work w = p->plan.work[begin + (int)threadIdx.x];
        const qi_group *at = &p->plan.groups[w.group];
        const qi_group g = *at;
        qi_merge cut = {};
        if (w.merge >= 0) cut = p->plan.merge[w.merge];
        decode_put_item(p, &w, at, &g, &cut, &t->items[threadIdx.x]);
    }
    __syncthreads();
}

/* The same of a strip's first items, from where they are likely to be: no load waits for another. Returns
 * whether they are those of [begin, end). */
QI_INLINE int decode_read_guessed(const attention_params *p, int begin, int end, decode_guess *g,
                                  decode_shared *t)
{
    int right = 1;
    if (PAGE_SIZE > 0) g->page = p->plan.pages[max(g->entry, 0LL)];
    if ((int)threadIdx.x < g->count) {
        const qi_work w = p->plan.work[g->begin + (int)threadIdx.x];
        const qi_group *at = &p->plan.groups[g->group], of = *at;
        qi_merge cut = {};
        if (g->merge >= 0) cut = p->plan.merge[g->merge];
        decode_put_item(p, &w, at, &of, &cut, &t->items[threadIdx.x]);
        right = w.group == g->group && w.merge == g->merge;
    }
    right = __syncthreads_and(right);
    return right && g->begin == begin && g->count == min(end - begin, DECODE_ITEMS);
}

/* The row of q of an item that row m of a product is. */
QI_INLINE tile_row decode_row(const attention_params *p, const decode_item *i, int m)
{
    const int r = m / GROUP_SIZE;
    if (MIXED && (i->flags & QI_GROUP_MIXED)) return row_at(p, i->row_begin + r);
    tile_row row;
    row.token = token_at(p, i->row_begin + r);
    row.request = i->request;
    row.position = i->position + r;
    return row;
}

/* ---- the stream of keys that a warp loads --------------------------------------------------- */

typedef struct decode_stream {
    int item, end; /* of the items in shared memory */
    int first;     /* which warp takes the item's first tile: turns, so that short items use all */
    int at;        /* the first key of this warp's next tile */
    int tile;      /* its number among this warp's tiles of the item */
    int asked;     /* tiles that were asked for before the launch's turn */
    int page;      /* of this lane's key of that tile, or of its piece of TILES_AHEAD tiles */
    int in_list;   /* where this lane's key is, if tiles do not lie in pages */
} decode_stream;

QI_INLINE int decode_tiles(const decode_item *i)
{
    return (i->kv_end - i->first + TILE - 1) / TILE;
}

/* The place of this warp among those of an item. */
QI_INLINE int decode_place(int first)
{
    return ((int)threadIdx.x / WARP + DECODE_WARPS - first) % DECODE_WARPS;
}

/* Does each piece of the item lie in one page? (Ragged keys are one page.) */
QI_INLINE int decode_in_pages(const decode_item *i)
{
    if (DECODE_PIECE > 0) return 1;
    if (SPARSE && (i->flags & QI_GROUP_SPARSE)) return 0;
    return PAGE_SIZE == 0 || (PAGE_SIZE % TILE == 0 && i->kv_begin % TILE == 0);
}

/* Past the first key of a warp's tile: this lane's piece, of TILES_AHEAD tiles. */
QI_INLINE int decode_piece_ahead()
{
    const int lane = threadIdx.x % WARP;
    return lane / PIECES * (DECODE_WARPS * TILE) + lane % PIECES * PIECE;
}

/* Looks up pages before they are needed: of TILES_AHEAD tiles at a time, or of the next tile's keys. */
QI_INLINE void decode_find_pages(const attention_params *p, const decode_item *now,
                                 const decode_guess *guess, decode_stream *s)
{
    const int in_pages = decode_in_pages(now);
    const int index = s->at + (in_pages ? decode_piece_ahead() : (int)threadIdx.x % TILE);
    if (in_pages && s->tile % TILES_AHEAD != 0) return;
    s->page = 0;
    s->in_list = index;
    if (index >= now->kv_end) return;
    if (SPARSE && (now->flags & QI_GROUP_SPARSE))
        s->in_list =
            p->bsr_indices[now->block + index / p->bsr_cols] * p->bsr_cols + index % p->bsr_cols;
    if (PAGE_SIZE == 0) return;
    const i64 entry = now->list + s->in_list / (PAGE_SIZE | !PAGE_SIZE);
    s->page = entry == guess->entry ? guess->page : p->plan.pages[entry];
}

/* To the first tile at or after `at` that there is, in this item or a later one. */
QI_INLINE void decode_settle(const attention_params *p, const decode_item *items,
                             const decode_guess *guess, decode_stream *s)
{
    while (s->item < s->end && s->at >= items[s->item].kv_end) {
        s->first = (s->first + decode_tiles(&items[s->item])) % DECODE_WARPS;
        s->tile = 0;
        if (++s->item < s->end) s->at = items[s->item].first + TILE * decode_place(s->first);
    }
    if (s->item < s->end) decode_find_pages(p, &items[s->item], guess, s);
}

QI_INLINE void decode_open(const attention_params *p, const decode_item *items, int end,
                           const decode_guess *guess, decode_stream *s)
{
    s->item = 0;
    s->end = end;
    s->first = 0;
    s->tile = s->asked = 0;
    s->at = items[0].first + TILE * decode_place(0);
    decode_settle(p, items, guess, s);
}

#endif
