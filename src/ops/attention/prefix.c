/* prefix.c - finding requests whose page lists begin alike; see qi_groups_by_prefix in groups.h.
 *
 * A set of requests that agree on their first pages is split by the next page; each part agrees on
 * some pages more, which become a group if that pays, and is split in turn. Every page is compared
 * once, with that of one other request.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/groups.h"

/* Measured costs (docs/performance.md) in the scheduler's unit, a multiply-add over a head: of one
 * partial row of one query head, written, read and merged; and of packing a key for a prefill tile,
 * whose pairs cost PREFILL_PAIR / 8 units. */
enum { COST_PARTIAL = 60, COST_PACK = 36, PREFILL_PAIR = 9 };

/* Branches above each other that are looked at: the stack must be bounded. */
enum { MAX_BRANCHES = 64 };

typedef struct finder {
    const qi_kv_view *view;
    const qi_limits *limits;
    i32 max_shared; /* shared levels */
    i32 *order;     /* requests, so that those of a group adjoin */
    group_list *out;
} finder;

/* Pages of a request that are full: the last may be shared only where all of it is in use. */
static i64 full_pages(const finder *f, i32 request)
{
    return qi_kv_len(f->view, request) / f->view->page_size;
}

static i64 rows_of_request(const finder *f, i32 request)
{
    return f->view->qo_indptr[request + 1] - f->view->qo_indptr[request];
}

/* The page of a request at a depth, ~0 where it has no full one. */
static u32 page_at(const finder *f, i32 request, i64 depth)
{
    return depth < full_pages(f, request) ? (u32)qi_kv_pages(f->view, request)[depth] : ~0u;
}

/* Does a stand before b? A request's number breaks ties, so that the order is unique. */
static int before(const finder *f, i32 a, i32 b, i64 depth)
{
    const u32 x = page_at(f, a, depth), y = page_at(f, b, depth);
    return x != y ? x < y : a < b;
}

/* Sorts order[begin, end) by the page at `depth`: Shell's sort, since most sets are small or sorted. */
static void sort_requests(const finder *f, i32 begin, i32 end, i64 depth)
{
    i32 *order = f->order + begin;
    const i32 n = end - begin;
    i32 gap = 1;
    while (gap < n / 3) gap = 3 * gap + 1;
    for (; gap > 0; gap /= 3)
        for (i32 i = gap; i < n; i++) {
            const i32 request = order[i];
            i32 j = i;
            for (; j >= gap && before(f, request, order[j - gap], depth); j -= gap)
                order[j] = order[j - gap];
            order[j] = request;
        }
}

/* The depth to which order[begin, end) agree, known to be at least `depth`. */
static i64 common_depth(const finder *f, i32 begin, i32 end, i64 depth)
{
    const i32 *first = qi_kv_pages(f->view, f->order[begin]);
    i64 common = full_pages(f, f->order[begin]);
    for (i32 i = begin + 1; i < end && common > depth; i++) {
        const i32 *pages = qi_kv_pages(f->view, f->order[i]);
        const i64 full = full_pages(f, f->order[i]);
        i64 same = depth;
        common = full < common ? full : common;
        while (same < common && pages[same] == first[same]) same++;
        common = same;
    }
    return common;
}

/* Is it cheaper to read these pages once for all of order[begin, end)? */
static int pays(const finder *f, i32 begin, i32 end, i64 pages)
{
    const qi_limits *l = f->limits;
    i64 tokens = 0;
    for (i32 i = begin; i < end; i++) tokens += rows_of_request(f, f->order[i]);
    const i64 rows = tokens * l->group_size;
    const i64 flat = (end - begin) * (i64)l->cost_key + rows * l->cost_pair;
    const i64 shared = tokens <= l->decode_rows
                           ? l->cost_key + rows * l->cost_pair
                           : COST_PACK + rows * l->cost_pair * PREFILL_PAIR / 8;
    return pages * f->view->page_size * (flat - shared) > 2 * rows * COST_PARTIAL;
}

/* Takes the first `taken` pages of a request's list away from its own group. */
static void trim_leaf(const finder *f, i32 request, i64 taken)
{
    qi_group *leaf = &f->out->groups[request];
    const i32 keys = (i32)(taken * f->view->page_size);
    leaf->kv_begin += taken;
    leaf->kv_offset = keys;
    leaf->kv_len -= keys;
    if (taken > 0) leaf->flags = 0; /* not alone */
}

/* Splits order[begin, end), which agree to `depth`, and lists groups of `level` and below. taken: how
 * many of their pages are in groups above. row_begin and num_rows of the groups count requests in
 * `order` until place_rows(), and kv_begin pages of a list. */
static void split(finder *f, i32 begin, i32 end, i64 depth, i64 taken, i32 level, i32 branches)
{
    sort_requests(f, begin, end, depth);
    for (i32 i = begin, next; i < end; i = next) {
        const u32 page = page_at(f, f->order[i], depth);
        next = i + 1;
        while (next < end && page != ~0u && page_at(f, f->order[next], depth) == page) next++;
        if (next - i == 1 || level == f->max_shared || branches == MAX_BRANCHES) {
            for (i32 j = i; j < next; j++) trim_leaf(f, f->order[j], taken);
            continue;
        }
        const i64 common = common_depth(f, i, next, depth);
        if (!pays(f, i, next, common - taken)) {
            split(f, i, next, common, taken, level, branches + 1);
            continue;
        }
        f->out->groups[f->out->num_groups++] =
            (qi_group){.row_begin = i,
                       .num_rows = next - i,
                       .kv_begin = taken,
                       .kv_len = (i32)((common - taken) * f->view->page_size),
                       .kv_offset = (i32)(taken * f->view->page_size),
                       .kv_head = -1,
                       .level = (u8)level,
                       .flags = QI_GROUP_MIXED};
        if (level + 2 > f->out->num_levels) f->out->num_levels = level + 2;
        split(f, i, next, common, common, level + 1, branches + 1);
    }
}

/* Rows in the order of requests; groups learn their rows, their pages and their positions. */
static void place_rows(const finder *f, i32 num_leaves)
{
    const qi_kv_view *view = f->view;
    group_list *out = f->out;
    i32 placed = 0;
    for (i64 i = 0; i < view->num_requests; i++) {
        qi_group *leaf = &out->groups[f->order[i]];
        leaf->row_begin = placed;
        leaf->level = (u8)(out->num_levels - 1);
        for (i32 t = 0; t < leaf->num_rows; t++)
            out->rows[placed++] = view->qo_indptr[leaf->request] + t;
    }
    for (qi_group *g = out->groups + num_leaves; g < out->groups + out->num_groups; g++) {
        const i32 begin = g->row_begin, end = begin + g->num_rows;
        const qi_group *first = &out->groups[f->order[begin]];
        g->row_begin = first->row_begin;
        g->request = first->request;
        g->kv_begin += first->kv_begin - first->kv_offset / (i32)view->page_size;
        g->num_rows = 0;
        g->pos_first = first->pos_first;
        g->pos_last = first->pos_last;
        for (i32 i = begin; i < end; i++) {
            const qi_group *leaf = &out->groups[f->order[i]];
            g->num_rows += leaf->num_rows;
            if (leaf->pos_first < g->pos_first) g->pos_first = leaf->pos_first;
            if (leaf->pos_last > g->pos_last) g->pos_last = leaf->pos_last;
        }
    }
}

void qi_groups_by_prefix(const batch_view *batch, const qi_limits *limits, i32 max_levels,
                         i32 *order, group_list *out)
{
    const qi_kv_view *view = &batch->level[0];
    const i32 requests = (i32)view->num_requests;
    finder f = {
        .view = view, .limits = limits, .max_shared = max_levels - 1, .order = order, .out = out};
    qi_groups_by_level((qi_lanes){0, 1}, batch, out); /* each request's own, to begin with */
    for (i32 r = 0; r < requests; r++) order[r] = r;
    split(&f, 0, requests, 0, 0, 0, 0);
    if (out->num_levels > 1) place_rows(&f, requests);
}
