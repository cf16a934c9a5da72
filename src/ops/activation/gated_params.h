/* gated_params.h - what qkv_gated_activation hands to its kernel.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_GATED_PARAMS_H
#define QI_GATED_PARAMS_H

#include "kern/abi.h"

typedef struct gated_params {
    void *out;        /* dtype [num_tokens, size]              */
    const void *gate; /* dtype [num_tokens, size]              */
    const void *up;   /* dtype [num_tokens, size]              */
    i64 out_stride, gate_stride, up_stride; /* of a token      */
    i64 num_tokens, size;
    qi_dtype dtype;
    i32 kind; /* 0 SiLU, 1 GELU, 2 GELU by tanh                */
} gated_params;

#endif
