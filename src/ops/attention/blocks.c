/* blocks.c - groups from sparse blocks; see groups.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/groups.h"

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
