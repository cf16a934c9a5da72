/* gemm_quantized_params.h - what qkv_gemm_quantized hands to its kernel.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_GEMM_QUANTIZED_PARAMS_H
#define QI_GEMM_QUANTIZED_PARAMS_H

#include "kern/abi.h"

/* Of a block of weights, whatever its format. */
enum { GEMM_BLOCK_SIZE = 32 };

typedef enum gemm_format { GEMM_Q8_0, GEMM_Q4_0, GEMM_Q4_1 } gemm_format;

/* Bytes of a block: f16 scale (and minimum), codes. */
static inline i64 gemm_block_bytes(const gemm_format format)
{
    return format == GEMM_Q8_0 ? 34 : format == GEMM_Q4_0 ? 18 : 20;
}

typedef struct gemm_quantized_params {
    void *out;                /* dtype_out [m, n] */
    const void *x;            /* dtype_x   [m, k] */
    const char *w;            /* blocks    [n, k / 32] */
    i64 out_stride, x_stride; /* of a row, elements */
    i64 w_stride;             /* of a row, bytes */
    i64 m, n, k;
    gemm_format format;
    qi_dtype dtype_out, dtype_x;
} gemm_quantized_params;

#endif
