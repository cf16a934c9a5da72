/* plan.h - what a planner hands to kernels: the same bytes for host planner, device planner,
 * kernels.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_PLAN_H
#define QI_KERN_PLAN_H

#include "kern/abi.h"

typedef struct qi_plan_header {
    i32 status, status_request; /* device planner: 0, or what exceeded the limits, and where */
    i32 num_tokens, num_requests, num_work, num_merges;
    i32 num_strips, reserved; /* workers that have work */
    i64 num_split_rows;       /* partial rows in use */
    i64 cost_per_worker;      /* ceil(total cost / workers), in cost units */
} qi_plan_header;

/* flags of a work item */
enum {
    QI_TILE_DECODE = 0,  /* few rows, all KV heads: a page is read once */
    QI_TILE_PREFILL = 1, /* many rows, one KV head */
};

/* One piece of work: some rows of one request against part of the keys that they see. 32 bytes. */
typedef struct qi_work {
    i32 group;     /* request (later: row of the level's index arrays) */
    i32 row_begin; /* token: row of q */
    u16 num_rows;  /* tokens */
    u8 level, flags;
    u16 kv_head, num_kv_heads;
    i32 kv_begin, kv_end; /* keys [begin, end) of this level */
    i32 kv_offset;        /* position of this level's key 0 in the request */
    i32 slot;             /* first partial row; -1: final, write o and lse */
} qi_work;
_Static_assert(sizeof(qi_work) == 32, "host and device must agree");

/* A tile whose keys were cut into pieces. Piece i holds its rows at slot + i * rows_per_piece, in
 * the order [kv head][token][query head of the group]; pieces stand in ascending key order. */
typedef struct qi_merge {
    i32 row_begin;
    u16 num_rows, kv_head, num_kv_heads, reserved;
    i32 num_pieces;
    i32 slot, rows_per_piece;
} qi_merge;

/* Pointers into the plan block, fixed at create, passed to kernels by value. */
typedef struct qi_plan {
    qi_plan_header *header;
    i32 *work_indptr;   /* [workers + 1]: worker w does work[work_indptr[w]] .. in order */
    qi_work *work;      /* [max_work] */
    qi_merge *merge;    /* [max_merges] ascending slot */
    i32 *ticket;        /* [max_merges] pieces done; the last arriver merges and writes back 0 */
    i32 *qo_indptr;     /* [max_requests + 1] */
    i32 *kv_len;        /* [max_requests] */
    i32 *qo_pos;        /* [max_requests] position of row 0 */
    i32 *kv_begin;      /* [max_requests + 1] paged: offset into pages; ragged: first token */
    i32 *pages;         /* [max_pages] */
    float *o_partial;   /* scratch: [max_split_rows, head_dim_vo], normalised */
    float *lse_partial; /* scratch: [max_split_rows], base 2 */
} qi_plan;

#endif
