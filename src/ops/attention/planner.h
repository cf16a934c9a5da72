/* planner.h - the planner of arrays on the device: checks them against the limits, makes groups and cuts
 * the work, in lanes. Text that is included after groups.c and schedule.c, by plan.cu and the tests.
 *
 * The checks are those that batch.c makes of arrays on the host, but for the page numbers.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_PLANNER_H
#define QI_ATTENTION_PLANNER_H

#include "ops/attention/plan_params.h"

typedef struct plan_room {
    qi_group *groups;
    qi_span *spans;
    qi_strip *strips;
} plan_room;

/* A fault as a number: the least of several is named. */
#define NO_FAULT 0x7fffffffffffffffLL

static i64 fault(i32 status, i32 level, i64 request)
{
    return status == QI_PLAN_OK ? NO_FAULT
                                : ((i64)status * 256 + level) << 32 | (request & 0x7fffffff);
}

static i32 check_rows(const plan_params *p, const qi_kv_view *view, i64 g, i32 is_last)
{
    const i32 begin = view->qo_indptr[g], end = view->qo_indptr[g + 1];
    if ((g == 0 && begin != 0) || end < begin) return QI_PLAN_QO_INDPTR;
    if (end > p->max_tokens) return QI_PLAN_MAX_TOKENS;
    return is_last && end - begin > p->max_qo_len ? QI_PLAN_MAX_QO_LEN : QI_PLAN_OK;
}

static i32 check_table(const plan_params *p, const qi_kv_view *view, i64 g)
{
    const i32 kv_len = view->kv_lens[g];
    if (kv_len < 0) return QI_PLAN_KV_LENS;
    if (qi_kv_num_pages(view, g) > view->num_entries) return QI_PLAN_COLUMNS;
    return kv_len > p->max_kv_len ? QI_PLAN_MAX_KV_LEN : QI_PLAN_OK;
}

static i32 check_keys(const plan_params *p, const qi_kv_view *view, i64 g)
{
    if (view->block_table) return check_table(p, view, g);
    const i32 begin = view->kv_indptr[g], end = view->kv_indptr[g + 1];
    const i32 last = view->page_size > 0 ? view->kv_last_page_len[g] : 1;
    if (begin < 0 || end < begin) return QI_PLAN_KV_INDPTR;
    if (view->page_size > 0) {
        if (end > view->num_entries) return QI_PLAN_KV_INDICES;
        if (end > begin && (last < 1 || last > view->page_size)) return QI_PLAN_LAST_PAGE_LEN;
    }
    return qi_kv_len(view, g) > p->max_kv_len ? QI_PLAN_MAX_KV_LEN : QI_PLAN_OK;
}

/* Of a request whose rows and keys are in order. */
static i32 check_mask(const plan_params *p, const qi_kv_view *view, i64 r)
{
    const i64 *indptr = p->batch.mask_indptr;
    if (!p->batch.mask_bits) return QI_PLAN_OK;
    const i64 rows = view->qo_indptr[r + 1] - view->qo_indptr[r];
    const i64 bytes = (rows * qi_kv_len(view, r) + 7) / 8;
    if (indptr[r] < 0 || indptr[r + 1] < indptr[r] || indptr[r + 1] - indptr[r] < bytes)
        return QI_PLAN_MASK_INDPTR;
    return indptr[r + 1] > p->batch.num_mask_bytes ? QI_PLAN_MASK_BITS : QI_PLAN_OK;
}

/* The end of a group must be that of a group of the next level. */
static i32 check_end(const qi_kv_view *view, const qi_kv_view *inner, i64 g)
{
    const i32 *ends = inner->qo_indptr, row = view->qo_indptr[g + 1];
    if (row == ends[inner->num_requests]) return QI_PLAN_OK;
    if (g + 1 == view->num_requests) return QI_PLAN_NESTING;
    return ends[group_of(inner, 0, row)] == row ? QI_PLAN_OK : QI_PLAN_NESTING;
}

/* All that is to be seen of one group. */
static i64 check_group(const plan_params *p, i32 level, i64 g)
{
    const qi_kv_view *view = &p->batch.level[level];
    const i32 is_last = level + 1 == p->batch.num_levels;
    /* Both, whatever the first says: their loads do not wait for each other. */
    const i32 rows = check_rows(p, view, g, is_last), keys = check_keys(p, view, g);
    i32 status = rows == QI_PLAN_OK ? keys : rows;
    if (status == QI_PLAN_OK && is_last) status = check_mask(p, view, g);
    if (status == QI_PLAN_OK && !is_last) status = check_end(view, view + 1, g);
    return fault(status, level, g);
}

/* A level without groups has no row, nor then has any other. */
static i64 check_empty(const plan_params *p, i32 level)
{
    const qi_kv_view *view = &p->batch.level[level];
    const i32 n = (i32)view->num_requests;
    if (n > 0) return NO_FAULT;
    if (view->qo_indptr[0] != 0) return fault(QI_PLAN_QO_INDPTR, level, 0);
    if (level + 1 == p->batch.num_levels || view[1].qo_indptr[view[1].num_requests] == 0)
        return NO_FAULT;
    return fault(QI_PLAN_NESTING, level, -1);
}

/* A request's keys of all levels. */
static i64 check_all_levels(const plan_params *p, i64 r, i32 *at)
{
    const i32 last = p->batch.num_levels - 1;
    const qi_kv_view *view = &p->batch.level[last];
    if (view->qo_indptr[r] == view->qo_indptr[r + 1]) return NO_FAULT;
    const i64 keys = keys_before(&p->batch, last, view->qo_indptr[r], at) + qi_kv_len(view, r);
    return fault(keys > p->max_kv_len ? QI_PLAN_ALL_LEVELS : QI_PLAN_OK, last, r);
}

/* NO_FAULT, or the least fault of the batch. Collective. */
static i64 check_batch(qi_lanes lanes, const plan_params *p)
{
    const batch_view *batch = &p->batch;
    const qi_kv_view *last = &batch->level[batch->num_levels - 1];
    const i64 faulty = 1LL << 40; /* more pages than there are */
    i64 worst = NO_FAULT, pages = 0;
    QI_ROLLED
    for (i32 l = 0; l < batch->num_levels; l++) {
        const i64 empty = lanes.id == 0 ? check_empty(p, l) : NO_FAULT;
        if (empty < worst) worst = empty;
        QI_ROLLED
        for (i64 g = lanes.id; g < batch->level[l].num_requests; g += lanes.count) {
            const i64 found = check_group(p, l, g);
            if (found < worst) worst = found;
            if (found == NO_FAULT) pages += qi_kv_num_pages(&batch->level[l], g);
        }
    }
    pages = lanes_sum(lanes, worst == NO_FAULT ? pages : faulty);
    if (pages >= faulty) {
        const i64 least = lanes_min(lanes, worst);
        if (least != NO_FAULT) return least;
    }
    if (last->page_size > 0 && pages > p->max_pages) return fault(QI_PLAN_MAX_PAGES, 0, -1);
    if (batch->num_levels == 1) return NO_FAULT;
    i32 at[MAX_LEVELS] = {0};
    QI_ROLLED
    for (i64 r = lanes.id; r < last->num_requests; r += lanes.count) {
        const i64 found = check_all_levels(p, r, at);
        if (found < worst) worst = found;
    }
    return lanes_min(lanes, worst);
}

/* near: room that is faster than the plan's, for all that lanes tell each other, or the plan's. Collective. */
static void device_plan(qi_lanes lanes, const plan_params *p, const plan_room *near)
{
    const i64 found = check_batch(lanes, p);
    if (found != NO_FAULT) {
        const i32 request = (i32)(found & 0x7fffffff);
        qi_schedule_nothing(lanes, &p->limits, (i32)(found >> 32),
                            request == 0x7fffffff ? -1 : request, &p->plan);
        return;
    }
    group_list list = {.groups = near->groups, .rows = p->plan.rows};
    qi_groups_by_level(lanes, &p->batch, &list);
    QI_ROLLED
    for (i32 g = lanes.id; near->groups != p->plan.groups && g < list.num_groups; g += lanes.count)
        p->plan.groups[g] = near->groups[g];
    qi_copy_requests(lanes, &p->batch, &p->plan, p->mask_indptr);
    const qi_lengths lengths = qi_lengths_of(&p->batch, &list, near->spans, near->strips);
    qi_schedule(lanes, &lengths, &p->limits, &p->plan);
}

#endif
