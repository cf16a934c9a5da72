/* groups.c - groups from given levels and from sparse blocks; see groups.h. prefix.c finds levels.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/groups.h"

/* ---- levels ------------------------------------------------------------------------------- */

/* Groups of one level; parents: those of the level above, or NULL. A group's keys follow its
 * parent's. Returns how many. */
static i32 add_level(const qi_kv_view *view, i32 level, const qi_group *parents, i32 *listed,
                     qi_group *out)
{
    i32 parent = 0;
    for (i64 g = 0; g < view->num_requests; g++) {
        out[g] = (qi_group){.row_begin = view->qo_indptr[g],
                            .num_rows = view->qo_indptr[g + 1] - view->qo_indptr[g],
                            .kv_begin = view->page_size ? *listed : view->kv_indptr[g],
                            .kv_len = (i32)qi_kv_len(view, g),
                            .kv_head = -1,
                            .level = (u8)level};
        *listed += (i32)qi_kv_num_pages(view, g);
        if (!parents || out[g].num_rows == 0) continue;
        while (out[g].row_begin >= parents[parent].row_begin + parents[parent].num_rows) parent++;
        out[g].kv_offset = parents[parent].kv_offset + parents[parent].kv_len;
    }
    return (i32)view->num_requests;
}

/* Smallest and largest position of a shared group's rows, from its requests' groups; leaf: the first
 * that may belong to it. Returns the first beyond. */
static const qi_group *span_positions(qi_group *g, const qi_group *leaf, const qi_group *end)
{
    int first = 1;
    for (; leaf < end && leaf->row_begin < g->row_begin + g->num_rows; leaf++) {
        if (leaf->num_rows == 0) continue;
        if (first || leaf->pos_first < g->pos_first) g->pos_first = leaf->pos_first;
        if (first || leaf->pos_last > g->pos_last) g->pos_last = leaf->pos_last;
        if (first) g->request = leaf->request;
        first = 0;
    }
    g->flags |= QI_GROUP_MIXED;
    return leaf;
}

void qi_groups_by_level(const batch_view *batch, group_list *out)
{
    const i32 last = batch->num_levels - 1;
    i32 first[MAX_LEVELS + 1] = {0}, listed = 0, shared = 0;
    for (i32 l = 0; l <= last; l++)
        first[l + 1] =
            first[l] + add_level(&batch->level[l], l, l ? out->groups + first[l - 1] : NULL,
                                 &listed, out->groups + first[l]);

    qi_group *leaves = out->groups + first[last], *end = out->groups + first[last + 1];
    for (qi_group *g = leaves; g < end; g++) {
        const i32 request = (i32)(g - leaves);
        g->request = request;
        g->pos_first =
            qi_first_position(batch, request, (i64)g->kv_offset + g->kv_len, g->num_rows);
        g->pos_last = g->pos_first + g->num_rows - 1;
        if (g->kv_offset == 0) g->flags |= QI_GROUP_ALONE;
        out->leaf[request] = g;
        shared += g->kv_offset > 0;
    }
    for (i32 l = 0; l < last; l++) {
        const qi_group *leaf = leaves;
        for (qi_group *g = out->groups + first[l]; g < out->groups + first[l + 1]; g++)
            if (g->kv_len == 0)
                g->num_rows = 0; /* nothing to compute */
            else if (g->num_rows > 0)
                leaf = span_positions(g, leaf, end);
    }
    out->num_groups = first[last + 1];
    out->num_levels = shared ? batch->num_levels : 1;
    for (i32 t = 0; shared && t < batch->level[last].qo_indptr[batch->level[last].num_requests];
         t++)
        out->rows[t] = t;
}

/* ---- sparse blocks ------------------------------------------------------------------------ */

/* The first of `count` ascending indices that is not below `least`. */
static i32 first_not_below(const i32 *indices, i32 count, i64 least)
{
    i32 lo = 0, hi = count;
    while (lo < hi) {
        const i32 mid = lo + (hi - lo) / 2;
        if (indices[mid] < least)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* One row block of a request, for one list: its entries, but those that no row sees. */
static qi_group make_block(const bsr_view *bsr, const qi_limits *limits, const qi_group *request,
                           i32 block, i64 number, i32 list)
{
    qi_group g = *request;
    const i32 row = block * bsr->rows, cols = bsr->cols;
    const i32 *indptr = bsr->indptr + list * bsr->indptr_stride + number;
    g.row_begin += row;
    g.num_rows = g.num_rows - row < bsr->rows ? g.num_rows - row : bsr->rows;
    g.pos_first += row;
    g.pos_last = g.pos_first + g.num_rows - 1;
    g.kv_head = (i16)(bsr->num_lists > 1 ? list : -1);
    g.flags |= QI_GROUP_SPARSE;

    i32 begin, end; /* keys that some row sees */
    qi_visible(limits, request->kv_len, g.pos_first, g.pos_last, &begin, &end);
    const i32 *indices = bsr->indices + indptr[0];
    const i32 count = indptr[1] - indptr[0];
    const i32 from = first_not_below(indices, count, begin / cols);
    const i32 to = begin < end ? first_not_below(indices, count, (end - 1) / cols + 1) : from;
    g.block_begin = indptr[0] + from;
    i64 keys = (i64)(to - from) * cols;
    /* The request's last block may be cut off. */
    const i64 past = to > from ? ((i64)indices[to - 1] + 1) * cols - request->kv_len : 0;
    if (past > 0) keys -= past;
    g.kv_len = (i32)keys;
    return g;
}

void qi_groups_by_block(const batch_view *batch, const qi_limits *limits, group_list *out)
{
    const qi_kv_view *view = &batch->level[0];
    const bsr_view *bsr = &batch->bsr;
    i64 number = 0;
    i32 listed = 0;
    out->num_groups = 0;
    out->num_levels = 1;
    for (i64 r = 0; r < view->num_requests; r++) {
        const i32 qo_len = view->qo_indptr[r + 1] - view->qo_indptr[r];
        const qi_group request = {.row_begin = view->qo_indptr[r],
                                  .num_rows = qo_len,
                                  .kv_begin = view->page_size ? listed : view->kv_indptr[r],
                                  .kv_len = (i32)qi_kv_len(view, r),
                                  .flags = QI_GROUP_ALONE,
                                  .request = (i32)r,
                                  .pos_first =
                                      qi_first_position(batch, r, qi_kv_len(view, r), qo_len)};
        listed += (i32)qi_kv_num_pages(view, r);
        for (i32 block = 0; (i64)block * bsr->rows < qo_len; block++, number++)
            for (i32 list = 0; list < bsr->num_lists; list++)
                out->groups[out->num_groups++] =
                    make_block(bsr, limits, &request, block, number, list);
    }
}
