/* rope_params.h - what qkv_rope hands to its kernel.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ROPE_PARAMS_H
#define QI_ROPE_PARAMS_H

#include "kern/rope.h"

typedef struct rope_tensor {
    const void *in;                  /* dtype [nnz, heads, head_dim], NULL: none */
    void *out;                       /* the same; may be in */
    i64 in_stride[2], out_stride[2]; /* token, head */
    i64 heads;
} rope_tensor;

typedef struct rope_params {
    rope_tensor q, k;
    const i32 *positions;        /* [nnz], or NULL and */
    const i32 *indptr, *offsets; /* [requests + 1], [requests] */
    i64 nnz, num_requests, head_dim;
    qi_rope rope;
    qi_dtype dtype;
} rope_params;

#endif
