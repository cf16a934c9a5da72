/* activation.h - gated activations of the feed-forward layer.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_ACTIVATION_H
#define QKV_ACTIVATION_H

#include "qkv/context.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    QKV_SILU = 0,     /* x / (1 + exp(-x)) */
    QKV_GELU = 1,     /* x/2 (1 + erf(x / sqrt 2)) */
    QKV_GELU_TANH = 2 /* x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) */
};

/*
 * qkv_gated_activation - out[t, h] = activation(gate[t, h]) * up[t, h].
 *
 *   out   [num_tokens, size]  f32|f16|bf16; may be gate or up itself
 *   gate  [num_tokens, size]  same dtype; gate and up may be the halves of one wider tensor
 *   up    [num_tokens, size]  same dtype
 *   kind  QKV_SILU, QKV_GELU or QKV_GELU_TANH
 *
 * Computed in f32. Activations below 2^-120 in size may come out as 0; that of -infinity is 0, that
 * of NaN is NaN. Errors: INVALID. Source: Shazeer 2020, arXiv:2002.05202.
 */
QKV_API qkv_status qkv_gated_activation(qkv_context *ctx, DLTensor *out, const DLTensor *gate,
                                        const DLTensor *up, int32_t kind, void *stream);

#ifdef __cplusplus
}
#endif
#endif
