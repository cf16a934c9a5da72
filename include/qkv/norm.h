/* norm.h - normalisation over the last axis.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_NORM_H
#define QKV_NORM_H

#include "qkv/context.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * qkv_rmsnorm - root-mean-square normalisation over the last axis.
 *
 *   out[t, h] = x[t, h] / sqrt(mean_h(x[t, :]^2) + eps) * (weight_bias + weight[h])
 *
 *   out          [num_tokens, hidden_size]  f32|f16|bf16, may be x itself
 *   x            [num_tokens, hidden_size]  same dtype as out; hidden_size up to 131072
 *   weight       [hidden_size]              f32 or the dtype of x
 *   eps          >= 0, finite, added to the mean square
 *   weight_bias  0 for Llama, 1 for Gemma, which stores weight - 1
 *
 * Sums in f32. Errors: INVALID (shape, dtype, eps).
 * Source: Zhang and Sennrich 2019, arXiv:1910.07467.
 */
QKV_API qkv_status qkv_rmsnorm(qkv_context *ctx, DLTensor *out, const DLTensor *x,
                               const DLTensor *weight, float eps, float weight_bias, void *stream);

/*
 * qkv_add_rmsnorm - add to the residual stream, then normalise it, in one pass.
 *
 *   residual[t, h] += x[t, h];  out = rmsnorm(residual) as above, of the sum before it is rounded
 *
 *   residual  [num_tokens, hidden_size]  dtype of x, updated in place; must not overlap out or x
 *   out       may be x itself; the rest as qkv_rmsnorm
 */
QKV_API qkv_status qkv_add_rmsnorm(qkv_context *ctx, DLTensor *out, DLTensor *residual,
                                   const DLTensor *x, const DLTensor *weight, float eps,
                                   float weight_bias, void *stream);

#ifdef __cplusplus
}
#endif
#endif
