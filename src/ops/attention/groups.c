/* groups.c - groups from given levels, and what kernels know of requests; see groups.h. prefix.c finds levels,
 * blocks.c makes groups of sparse blocks. No libc, and C that NVRTC takes too: plan.cu includes this file.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/groups.h"

/* The last group of a level that begins at or before a row, of those from `from` on, which does: nearby
 * ones are found first. */
static i32 group_of(const qi_kv_view *view, i32 from, i32 row)
{
    const i32 *indptr = view->qo_indptr, n = (i32)view->num_requests;
    i32 step = 1;
    QI_ROLLED
    while (from + step < n && indptr[from + step] <= row) {
        from += step;
        step *= 2;
    }
    i32 low = from, high = from + step < n ? from + step : n;
    QI_ROLLED
    while (high - low > 1) {
        const i32 middle = low + (high - low) / 2;
        if (indptr[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Keys that a row has in the levels before one. at: [level] groups of rows before it; of this row then. */
static i64 keys_before(const batch_view *batch, i32 level, i32 row, i32 *at)
{
    i64 keys = 0;
    QI_ROLLED
    for (i32 l = 0; l < level; l++) {
        at[l] = group_of(&batch->level[l], at[l], row);
        keys += qi_kv_len(&batch->level[l], at[l]);
    }
    return keys;
}

/* Where a group's page list begins, from the plan's pages on; listed: pages of the lists before. */
static i64 list_begin(const batch_view *batch, const qi_kv_view *view, i64 g, i64 listed)
{
    if (view->page_size == 0) return view->kv_indptr[g];
    if (!batch->in_place) return listed;
    return ((i64)qi_kv_pages(view, g) - batch->pages_at) / (i64)sizeof(i32);
}

/* A group without rows, or of a shared level without keys, is left with no rows. Returns the position of its first
 * key. Field by field, so that nothing waits to be copied. */
static i32 make_group(const batch_view *batch, i32 level, i64 number, i64 listed, i32 *at,
                      qi_group *g)
{
    const qi_kv_view *view = &batch->level[level];
    const i32 row = view->qo_indptr[number], kv_len = (i32)qi_kv_len(view, number);
    i32 rows = view->qo_indptr[number + 1] - row, flags = 0;
    const i32 offset = rows > 0 ? (i32)keys_before(batch, level, row, at) : 0;
    i64 first = 0, last = 0;
    i32 request = 0;
    if (level + 1 == batch->num_levels) {
        if (offset == 0) flags = QI_GROUP_ALONE;
        request = (i32)number;
        first = qi_first_position(batch, number, (i64)offset + kv_len, rows);
        last = first + rows - 1;
    } else {
        if (kv_len == 0) rows = 0; /* nothing to compute */
        if (rows > 0) {
            flags = QI_GROUP_MIXED;
            request = 0x7fffffff; /* of its requests the first; positions of all of them */
            first = 0x7fffffffffffffffLL;
            last = -first;
        }
    }
    g->row_begin = row;
    g->num_rows = rows;
    g->kv_begin = list_begin(batch, view, number, listed);
    g->kv_len = kv_len;
    g->kv_offset = offset;
    g->block_begin = 0;
    g->kv_head = -1;
    g->level = (u8)level;
    g->flags = (u8)flags;
    g->request = request;
    g->reserved = 0;
    g->pos_first = first;
    g->pos_last = last;
    return offset;
}

/* The groups above a request's get to know of it. */
static void join_groups(const batch_view *batch, const qi_group *leaf, qi_group *groups, i32 *at)
{
    QI_ROLLED
    for (i32 l = 0, first = 0; l + 1 < batch->num_levels; l++) {
        const qi_kv_view *view = &batch->level[l];
        at[l] = group_of(view, at[l], leaf->row_begin);
        qi_group *g = groups + first + at[l];
        first += (i32)view->num_requests;
        if (g->num_rows == 0) continue;
        lanes_lower(&g->pos_first, leaf->pos_first);
        lanes_raise(&g->pos_last, leaf->pos_last);
        lanes_lower32(&g->request, leaf->request);
    }
}

void qi_groups_by_level(qi_lanes lanes, const batch_view *batch, group_list *out)
{
    const i32 last = batch->num_levels - 1;
    i32 first = 0, shared = 0;
    i64 listed = 0;
    QI_ROLLED
    for (i32 l = 0; l <= last; l++) {
        const qi_kv_view *view = &batch->level[l];
        i32 at[MAX_LEVELS] = {0};
        QI_ROLLED
        for (i64 g = lanes.id; g < view->num_requests; g += lanes.count) {
            const i32 offset = make_group(batch, l, g, listed, at, &out->groups[first + g]);
            if (!batch->in_place) listed += qi_kv_num_pages(view, g);
            shared |= l == last && offset > 0;
        }
        if (l < last) first += (i32)view->num_requests;
    }
    const qi_kv_view *own = &batch->level[last];
    shared = lanes_any(lanes, shared);
    out->num_groups = first + (i32)own->num_requests;
    out->num_levels = shared ? batch->num_levels : 1;
    if (last > 0) {
        i32 at[MAX_LEVELS] = {0};
        QI_ROLLED
        for (i64 r = lanes.id; r < own->num_requests; r += lanes.count)
            if (out->groups[first + r].num_rows > 0)
                join_groups(batch, &out->groups[first + r], out->groups, at);
        lanes_sync(lanes);
    }
    const i32 tokens = own->qo_indptr[own->num_requests];
    QI_ROLLED
    for (i32 t = lanes.id; shared && t < tokens; t += lanes.count) out->rows[t] = t;
}

/* The request of each token. */
static void copy_tokens(qi_lanes lanes, const qi_kv_view *view, i32 *token_request)
{
    const i32 tokens = view->qo_indptr[view->num_requests];
    if (lanes.count == 1) {
        QI_ROLLED
        for (i32 r = 0; r < view->num_requests; r++) {
            QI_ROLLED
            for (i32 t = view->qo_indptr[r]; t < view->qo_indptr[r + 1]; t++) token_request[t] = r;
        }
        return;
    }
    QI_ROLLED
    for (i32 t = lanes.id, r = 0; t < tokens; t += lanes.count) {
        /* With a row each, requests and tokens have the same numbers. */
        if (t < view->num_requests && view->qo_indptr[t] <= t) r = t;
        token_request[t] = r = group_of(view, r, t);
    }
}

void qi_copy_requests(qi_lanes lanes, const batch_view *batch, const qi_plan *out, i64 *mask_indptr)
{
    const qi_kv_view *view = &batch->level[batch->num_levels - 1];
    i32 at[MAX_LEVELS] = {0};
    QI_ROLLED
    for (i64 r = lanes.id; r <= view->num_requests; r += lanes.count) {
        const i32 begin = view->qo_indptr[r];
        out->qo_indptr[r] = begin;
        if (r == view->num_requests) break;
        const i32 rows = view->qo_indptr[r + 1] - begin;
        const i32 shared = rows ? (i32)keys_before(batch, batch->num_levels - 1, begin, at) : 0;
        const i32 kv_len = (i32)qi_kv_len(view, r) + shared;
        out->mask_first[r] = shared;
        out->kv_len[r] = kv_len;
        out->qo_pos[r] = (i32)qi_first_position(batch, r, kv_len, rows);
        if (batch->mask_bits) mask_indptr[r] = batch->mask_indptr[r];
    }
    copy_tokens(lanes, view, out->token_request);
}
