/* plan.h - what a planner hands to kernels: the same bytes for host planner, device planner,
 * kernels.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_PLAN_H
#define QI_KERN_PLAN_H

#include "kern/abi.h"

/* Why a planner on the device gave no work: what of the batch is not within the limits. In the order in
 * which one of several is named. */
enum {
    QI_PLAN_OK = 0,
    QI_PLAN_QO_INDPTR = 1, /* begins with another number than 0, or falls */
    QI_PLAN_MAX_TOKENS,
    QI_PLAN_MAX_QO_LEN,
    QI_PLAN_KV_INDPTR,  /* negative, or falls */
    QI_PLAN_KV_INDICES, /* fewer than kv_indptr says */
    QI_PLAN_LAST_PAGE_LEN,
    QI_PLAN_KV_LENS, /* negative */
    QI_PLAN_COLUMNS, /* of block_table, fewer than kv_lens says */
    QI_PLAN_MAX_KV_LEN,
    QI_PLAN_MAX_PAGES,
    QI_PLAN_MASK_INDPTR,
    QI_PLAN_MASK_BITS, /* fewer than mask_indptr says */
    QI_PLAN_NESTING,
    QI_PLAN_ALL_LEVELS, /* max_kv_len, over all of them */
    QI_PLAN_SPLIT_ROWS,
};

typedef struct qi_plan_header {
    i32 status;         /* QI_PLAN_... * 256 + level */
    i32 status_request; /* the one at fault, of the level; -1: none in particular */
    i32 num_tokens, num_requests, num_work, num_merges;
    i32 num_strips; /* workers that have work */
    i32 num_levels; /* 1: split tiles are merged by their last piece; more: by a launch of its own */
    i32 claimed;    /* 1: workers take items as they come free, not by strips */
    i32 shared_begin, num_shared; /* work of shared levels, which stands together: first or last */
    i32 reserved;
    i64 num_split_rows;  /* partial rows in use */
    i64 cost_per_worker; /* ceil(total cost / workers), in cost units */
} qi_plan_header;

/* flags of a group */
enum {
    QI_GROUP_ALONE = 1,  /* its rows have keys in no other group (per KV head) */
    QI_GROUP_MIXED = 2,  /* rows of several requests: positions do not count up */
    QI_GROUP_SPARSE = 4, /* keys are listed column blocks */
};

/* Rows that share one list of keys: a request, what several requests share, or a row block. */
typedef struct qi_group {
    i32 row_begin, num_rows; /* in the plan's order of rows */
    i64 kv_begin;    /* paged: offset from qi_plan.pages, of a device plan to the caller's table;
                                ragged: token. Sparse: of the request */
    i32 kv_len;      /* keys of the list */
    i32 kv_offset;   /* position of key 0 (sparse: of key 0 of block 0) */
    i32 block_begin; /* sparse: of its column blocks in bsr_indices */
    i16 kv_head;     /* the only one, or -1: all */
    u8 level, flags;
    i32 request; /* of its first row */
    i32 reserved;
    i64 pos_first, pos_last; /* smallest and largest position of its rows */
} qi_group;

/* flags of a work item */
enum {
    QI_TILE_DECODE = 0,  /* few rows; on a CPU all KV heads: a page is read once */
    QI_TILE_PREFILL = 1, /* many rows, one KV head */
};

/* One piece of work: some rows of a group against part of the keys that they see. 32 bytes. */
typedef struct qi_work {
    i32 group;
    i32 row_begin;
    u16 num_rows, flags;
    u16 kv_head, num_kv_heads;
    i32 kv_begin, kv_end; /* keys [begin, end) of the group's list */
    i32 slot;             /* first partial row; -1: final, write o and lse */
    i32 merge;            /* of its tile, -1: none */
} qi_work;
_Static_assert(sizeof(qi_work) == 32, "host and device must agree");

/* A tile with partial rows. Piece i holds its rows at slot + i * rows_per_piece, in the order [kv
 * head][row][query head of the group]; pieces stand in ascending key order. */
typedef struct qi_merge {
    i32 row_begin;
    u16 num_rows, kv_head, num_kv_heads, reserved;
    i32 num_pieces;
    i32 slot, rows_per_piece;
} qi_merge;

/* Pointers into the plan block, fixed at create, passed to kernels by value. */
typedef struct qi_plan {
    qi_plan_header *header;
    i32 *work_indptr; /* [workers + 1]: worker w does work[work_indptr[w]] .. in order */
    qi_work *work;    /* [max_work] */
    qi_merge *merge;  /* [max_merges] ascending slot */
    i32 *ticket;      /* [max_merges] pieces done; the last arriver merges and writes back 0 */
    i32 *claims;      /* [2] of a GPU: items taken past the first, blocks done; 0 between runs */
    qi_group *groups; /* [max_groups] */
    i32 *rows;        /* [max_tokens] token of each row; one level: NULL, row = token */
    i32 *row_merge;   /* [max_levels][max_tokens][num_kv_heads] merge of a row's tile in a level, or
                           -1; one level: NULL */
    i32 *token_request; /* [max_tokens] */
    i32 *qo_indptr;     /* [max_requests + 1] */
    i32 *kv_len;        /* [max_requests] all levels together */
    i32 *qo_pos;        /* [max_requests] position of row 0 */
    i32 *mask_first;    /* [max_requests] position of the first key that mask_bits speak of */
    i32 *pages;         /* [max_pages] */
    float *o_partial;   /* scratch: [max_split_rows, head_dim_vo], normalised */
    float *lse_partial; /* scratch: [max_split_rows], base 2 */
    i64 max_tokens;     /* the middle axis of row_merge */
} qi_plan;

#endif
