/* gemm_params.h - what qkv_gemm hands to its kernel.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_GEMM_PARAMS_H
#define QI_GEMM_PARAMS_H

#include "kern/abi.h"

typedef struct gemm_params {
    void *out;                          /* dtype_out [m, n] */
    const void *x;                      /* dtype_x   [m, k] */
    const void *w;                      /* dtype_w   [n, k] */
    i64 out_stride, x_stride, w_stride; /* of a row */
    i64 m, n, k;
    qi_dtype dtype_out, dtype_x, dtype_w;
} gemm_params;

#endif
