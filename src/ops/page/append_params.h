/* append_params.h - what qkv_kv_append and qkv_kv_append_slots hand to their kernel.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_APPEND_PARAMS_H
#define QI_APPEND_PARAMS_H

#include "kern/kv_view.h"
#include "kern/rope.h"
#include "kern/scale.h"

enum { APPEND_MAX_DIM = 1 << 15 }; /* of a head that is rotated or scaled on its way */

/* Rows of k or v, and the cache that they go to. Strides in elements. */
typedef struct append_tensor {
    const void *rows; /* dtype       [nnz, num_heads, head_dim] */
    void *cache;      /* cache_dtype [pages, page_size, num_heads, head_dim] */
    i64 row_stride, row_head_stride;
    i64 page_stride, slot_stride, head_stride;
    i64 num_heads, head_dim; /* 1, num_heads * head_dim where heads adjoin on both sides */
    qi_dtype dtype, cache_dtype;
    qi_scale scale; /* what is stored is the value divided by it */
    i32 rotate;     /* by the row's position */
    i32 plain;      /* float types, neither scale nor rotation */
} append_tensor;

/* Where the rows go: by slot number, or by position within a request. All of it is checked. */
typedef struct append_params {
    append_tensor k, v;
    append_tensor q; /* rows NULL: none; its cache is q_out, [nnz, 1, num_qo_heads, head_dim] */
    qi_rope rope;    /* of the tensors that rotate */
    i64 nnz, page_size, num_pages;
    double inverse_page_size; /* for GPUs, on which division is long */
    const void *slots;        /* slots_dtype [nnz], negative: skip; NULL: by index and positions */
    qi_dtype slots_dtype;
    const i32 *positions; /* [nnz], NULL: the last ones of each request (by slot: none) */
    qi_kv_view index;
    i32 streams; /* rows that are copied as they are pass the caches */
} append_params;

#endif
