/* top_k_params.h - what qkv_top_k hands to its kernels.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_TOP_K_PARAMS_H
#define QI_TOP_K_PARAMS_H

#include "kern/abi.h"

enum { MOST_STREAMED = 2048 }; /* the largest k that rows are streamed to on a GPU */

typedef struct top_k_params {
    void *values;     /* dtype [batch, k], NULL: not wanted */
    i32 *indices;     /* [batch, k] */
    const void *rows; /* dtype [batch, vocab] */
    i64 values_stride, indices_stride, rows_stride;
    i64 batch, vocab, k;
    qi_dtype dtype;
    i32 sorted; /* 1: in the order of sampling.h; 0: by index */
} top_k_params;

#endif
