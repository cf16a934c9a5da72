/* gemm.h - matrix products with row-major weights, as linear layers store them.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_GEMM_H
#define QKV_GEMM_H

#include "qkv/context.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * qkv_gemm - out[m, n] = sum_k x[m, k] * w[n, k].
 *
 *   out  [m, n]  f32|f16|bf16; must not overlap x, w or, by its strides, itself
 *   x    [m, k]  f32|f16|bf16
 *   w    [n, k]  f32|f16|bf16
 *
 * Products and sums in f32 (f16 and bf16 inputs are exact in f32), rounded once to out's dtype. k =
 * 0 gives zeros. A row of out depends on its row of x alone, not on m: the same bits for a token
 * whatever it is batched with. Allocates nothing; CPU scratch belongs to the context.
 *
 * Errors: INVALID (shape, dtype, overlap).
 */
QKV_API qkv_status qkv_gemm(qkv_context *ctx, DLTensor *out, const DLTensor *x, const DLTensor *w,
                            void *stream);

#ifdef __cplusplus
}
#endif
#endif
