/* merge_params.h - what qkv_attention_merge hands to its kernel.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_MERGE_PARAMS_H
#define QI_MERGE_PARAMS_H

#include "kern/abi.h"

#define QI_MAX_STATES 64

typedef struct merge_state {
    const void *o;    /* dtype_state [tokens, heads, dim] */
    const float *lse; /* [tokens, heads] */
    i64 o_stride[2], lse_stride[2];
} merge_state;

typedef struct merge_params {
    void *o;    /* dtype_o [tokens, heads, dim] */
    float *lse; /* [tokens, heads], NULL = not wanted */
    i64 o_stride[2], lse_stride[2];
    i64 tokens, heads, dim;
    qi_dtype dtype_o, dtype_state;
    float log2_scale; /* multiplies lse to make it base 2: log2(e) or 1 */
    i32 num_states;
    merge_state states[QI_MAX_STATES];
} merge_params;

#endif
