/* gated_params.h - what qkv_gated_activation hands to its kernel.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_GATED_PARAMS_H
#define QI_GATED_PARAMS_H

#include "kern/abi.h"

enum { GATED_SILU = 0, GATED_GELU = 1, GATED_GELU_TANH = 2 }; /* QKV_SILU, ... */

typedef struct gated_params {
    void *out;                              /* dtype [num_tokens, size] */
    const void *gate;                       /* dtype [num_tokens, size] */
    const void *up;                         /* dtype [num_tokens, size] */
    i64 out_stride, gate_stride, up_stride; /* of a token */
    i64 num_tokens, size;
    qi_dtype dtype;
    i32 kind;
    i32 streams; /* out is stored past the caches */
} gated_params;

#endif
