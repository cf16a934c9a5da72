/* prefill_notes.cuh - what prefill tiles of GPUs note in shared memory of an item and its rows, since o and scores
 * leave few registers; and how a finished row is written.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_PREFILL_NOTES_CUH
#define QI_ATTENTION_PREFILL_NOTES_CUH

#include "ops/attention/mma_types.cuh"

/* The maximum of a row that has seen no key: -infinity - it is -infinity. */
#define PREFILL_LOWEST -3.402823466e38f

/* ---- the item ----------------------------------------------------------------------------- */

typedef struct prefill_item_notes {
    qi_work work;
    qi_group group;
    /* Keys [plain_begin, plain_end) of the group's list are seen by all rows, as far as causality, windows
     * and the end of the item's keys go. */
    int plain_begin, plain_end;
    int aligned; /* can rows of keys be copied 16 bytes at a time? */
} prefill_item_notes;
_Static_assert(sizeof(prefill_item_notes) <= PREFILL_ITEM_BYTES, "as launched");

/* What follows from work and group. By one thread. */
QI_INLINE void note_plain_keys(const attention_params *p, prefill_item_notes *n)
{
    const qi_work *w = &n->work;
    const qi_group *g = &n->group;
    i64 lowest = g->pos_first, highest = g->pos_last;
    if (!MIXED || !(g->flags & QI_GROUP_MIXED)) {
        lowest += w->row_begin - g->row_begin;
        highest = lowest + w->num_rows - 1;
    }
    lowest -= g->kv_offset, highest -= g->kv_offset;
    i64 begin = w->kv_begin, end = w->kv_end;
    if (CAUSAL && lowest + 1 < end) end = lowest + 1;
    if (WINDOW && p->window_right >= 0 && lowest + p->window_right + 1 < end)
        end = lowest + p->window_right + 1;
    if (WINDOW && p->window_left >= 0 && highest - p->window_left > begin)
        begin = highest - p->window_left;
    n->plain_begin = (int)(begin < w->kv_end ? begin : w->kv_end);
    n->plain_end = (int)(end > w->kv_begin ? end : w->kv_begin);
}

/* ---- rows --------------------------------------------------------------------------------- */

/* A tile's row m: query head m % GROUP_SIZE of a row of q. */
typedef struct prefill_row {
    tile_row row;
    float scale; /* of its logits, in natural units; not 0, so that -infinity times it is not NaN */
} prefill_row;
_Static_assert(sizeof(prefill_row) == PREFILL_ROW_BYTES, "as launched");

QI_INLINE int prefill_head(const qi_work *w, int m)
{
    return w->kv_head * GROUP_SIZE + m % GROUP_SIZE;
}

/* Row m of an item; past the last: that one, for what looks at all of them. Rows of one request follow from its group,
 * without a look at that. */
QI_INLINE prefill_row make_prefill_row(const attention_cuda_params *c, const qi_work *w,
                                       const qi_group *g, int m)
{
    const int all = w->num_rows * GROUP_SIZE;
    if (m >= all) m = all - 1;
    const int row = w->row_begin + m / GROUP_SIZE;
    prefill_row r;
    if (MIXED && g->flags & QI_GROUP_MIXED) {
        r.row = row_at(&c->at, row);
    } else {
        r.row.token = token_at(&c->at, row);
        r.row.request = g->request;
        r.row.position = (int)g->pos_first + row - g->row_begin;
    }
    r.scale = query_scale(c, prefill_head(w, m));
    if (r.scale == 0.f) r.scale = 1e-30f;
    return r;
}

/* ---- o ------------------------------------------------------------------------------------ */

/* Dims d to d + 7 of row m of o. */
QI_INLINE void store_piece(const attention_cuda_params *c, const prefill_row *r, int head, int d,
                           float x[8], int aligned)
{
    const attention_params *p = &c->at;
#ifdef VARIANT_OUTPUT
    aligned = 0;
#endif
    if (!aligned) {
        store_outputs(c, r->row, head, d, x);
        store_outputs(c, r->row, head, d + 4, x + 4);
        return;
    }
    const float scale = qi_scale_at(&c->o_scale, head);
    for (int i = 0; i < 8; i++) x[i] *= scale == 1.f ? 1.f : 1.f / scale;
    const i64 at = r->row.token * p->o_stride[0] + head * p->o_stride[1] + d;
    qi_store(qi_to(p->o, DTYPE_O, at), x, DTYPE_O, 8);
}

/* Can o be written in pieces of 8 dims? */
QI_INLINE int outputs_aligned(const attention_params *p)
{
    const int size = qi_size_of(DTYPE_O), unit = size == 1 ? 8 : 16;
    return (((i64)p->o | p->o_stride[0] * size | p->o_stride[1] * size) & (unit - 1)) == 0;
}

#endif
