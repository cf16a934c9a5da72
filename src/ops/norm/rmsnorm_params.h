/* rmsnorm_params.h - what qkv_rmsnorm and qkv_add_rmsnorm hand to their kernel.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_RMSNORM_PARAMS_H
#define QI_RMSNORM_PARAMS_H

#include "kern/abi.h"

typedef struct rmsnorm_params {
    void *out;          /* dtype [num_tokens, hidden_size] */
    void *residual;     /* dtype [num_tokens, hidden_size], NULL: plain norm */
    const void *x;      /* dtype [num_tokens, hidden_size] */
    const void *weight; /* weight_dtype [hidden_size] */
    i64 out_stride, residual_stride, x_stride; /* of a token */
    i64 num_tokens, hidden_size;
    qi_dtype dtype, weight_dtype;
    float eps, weight_bias;
    i32 streams; /* out is stored past the caches */
} rmsnorm_params;

#endif
