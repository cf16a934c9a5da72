/* groups.h - from a batch's index arrays to groups of rows that share a list of keys.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_GROUPS_H
#define QI_ATTENTION_GROUPS_H

#include "kern/kv_view.h"
#include "ops/attention/attention_params.h"
#include "ops/attention/schedule.h"

/* Listed blocks of a sparse batch; indptr NULL: not sparse. */
typedef struct bsr_view {
    i32 rows, cols;
    i32 num_lists;     /* 1, or num_kv_heads: each has its own */
    i64 num_blocks;    /* row blocks */
    const i32 *indptr; /* [num_lists, num_blocks + 1] by stride */
    i64 indptr_stride;
    const i32 *indices;
    const u8 *mask; /* NULL: every bit is set */
    i64 mask_stride;
} bsr_view;

/* A batch as checked: what it borrows from its arrays. */
typedef struct batch_view {
    i32 num_levels;
    qi_kv_view level[MAX_LEVELS];
    bsr_view bsr;
    const i32 *qo_pos; /* NULL: at the end of the keys */
    const u8 *mask_bits;
    const i64 *mask_indptr;
    i64 num_mask_bytes;
    i64 max_tokens; /* rows at most, of arrays on the device */
    i32 detect_shared_prefix;
    i32 in_place; /* arrays are on the device, where kernels read page tables: no copy is made of them */
    i64 pages_at; /* then the address that groups count from */
} batch_view;

/* Groups of the batch, level by level, and the order of rows that makes each group's adjoin. */
typedef struct group_list {
    qi_group *groups; /* [num_groups] */
    i32 *rows;        /* [num_tokens] token of each row; written where num_levels > 1 */
    i32 num_groups, num_levels;
} group_list;

/* The three ways to make them. All lengths are checked before. kv_begin of paged groups counts from
 * the first page list of the first level on, one list after another, if not in place. The first is
 * collective, of several lanes in place only; a request's group is the last level's of its number. */
void qi_groups_by_level(qi_lanes lanes, const batch_view *batch, group_list *out);
void qi_groups_by_block(const batch_view *batch, const qi_limits *limits, group_list *out);

/*
 * Requests whose page lists begin with the same pages, as levels. A part that n requests share becomes
 * a group if reading it n - 1 times costs more than the partial rows of those requests; with at most
 * max_levels - 1 of them above each other. Whole pages only. O(pages compared + requests log requests).
 * order: [num_requests] scratch.
 */
void qi_groups_by_prefix(const batch_view *batch, const qi_limits *limits, i32 max_levels,
                         i32 *order, group_list *out);

/* What kernels know of requests: qo_indptr, kv_len, qo_pos, mask_first and token_request of the plan, and
 * with a mask mask_indptr, [requests]. Collective. */
void qi_copy_requests(qi_lanes lanes, const batch_view *batch, const qi_plan *out,
                      i64 *mask_indptr);

/* What the scheduler is to cut, with room for its notes. */
static inline qi_lengths qi_lengths_of(const batch_view *batch, const group_list *list,
                                       qi_span *spans, qi_strip *strips)
{
    const qi_kv_view *last = &batch->level[batch->num_levels - 1];
    const qi_lengths lengths = {.groups = list->groups,
                                .num_groups = list->num_groups,
                                .num_requests = (i32)last->num_requests,
                                .num_tokens = last->qo_indptr[last->num_requests],
                                .num_levels = list->num_levels,
                                .spans = spans,
                                .strips = strips};
    return lengths;
}

/* Position of a request's row 0. */
static inline i64 qi_first_position(const batch_view *batch, i64 request, i64 kv_len, i64 qo_len)
{
    return batch->qo_pos ? batch->qo_pos[request] : kv_len - qo_len;
}

#endif
