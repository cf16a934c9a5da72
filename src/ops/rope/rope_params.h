/* rope_params.h - what qkv_rope hands to its kernel.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ROPE_PARAMS_H
#define QI_ROPE_PARAMS_H

#include "kern/abi.h"

enum { ROPE_MAX_PAIRS = 2048 };

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
    i32 num_pairs; /* rotary_dim = 2 * num_pairs */
    i32 interleaved;
    qi_dtype dtype;
    double theta, scale, low_freq, high_freq,
        old_context; /* as in qkv_rope_spec; low_freq 0: plain */
} rope_params;

#endif
