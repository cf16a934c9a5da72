/* rope.h - rotary position embedding.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_ROPE_H
#define QKV_ROPE_H

#include "qkv/context.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qkv_rope_spec {
    uint32_t struct_size;
    int32_t rotary_dim; /* even; 0 = head_dim. Dims from rotary_dim on are copied unrotated */
    int32_t
        interleaved; /* 0: pairs (i, i + rotary_dim/2), NeoX; 1: pairs (2i, 2i + 1), GPT-J, GGUF */
    float theta;     /* base; 0 = 10000 */
    float scale;     /* context extension factor, >= 1; 0 or 1 = none */
    float low_freq, high_freq; /* Llama 3.1: 1 and 4; both 0: every frequency is divided by scale */
    float old_context;         /* Llama 3.1: 8192 */
} qkv_rope_spec;
#define QKV_ROPE_SPEC_INIT .struct_size = sizeof(qkv_rope_spec)

/*
 * qkv_rope - rotate pairs of elements of q and k by their token's position.
 *
 *   (x, y) -> (x cos a - y sin a, x sin a + y cos a),  a = position * freq(i),
 *   freq(i) = theta^(-2i / rotary_dim), i = 0 .. rotary_dim/2 - 1, then scaled:
 *   without low/high_freq: freq / scale. With them (Llama 3.1), by wavelength w = 2 pi / freq:
 *   w < old_context / high_freq: freq;  w > old_context / low_freq: freq / scale;  between:
 *   s = (old_context / w - low_freq) / (high_freq - low_freq),  (1 - s) freq / scale + s freq.
 *
 *   q_out, q   [nnz, num_qo_heads, head_dim]  f32|f16|bf16, same dtype; q_out may be q itself
 *   k_out, k   [nnz, num_kv_heads, head_dim]  the same dtype and head_dim as q; or both NULL
 *   positions  i32 [nnz] position of each row; or
 *   indptr, offsets  i32 [requests + 1], i32 [requests]: row t of request r has position
 *              offsets[r] + t - indptr[r]; rows from indptr[last] on are left alone. Give positions
 *              or these two, NULL the other
 *
 * Outputs overlap nothing else that is given, nor themselves. Angles in double: exact to f32 rounding
 * for positions up to 10^7 either way. Errors: INVALID.
 * Source: Su et al. 2021, arXiv:2104.09864; Llama 3.1 model card for the scaling.
 */
QKV_API qkv_status qkv_rope(qkv_context *ctx, const qkv_rope_spec *spec, DLTensor *q_out,
                            const DLTensor *q, DLTensor *k_out, const DLTensor *k,
                            const DLTensor *positions, const DLTensor *indptr,
                            const DLTensor *offsets, void *stream);

#ifdef __cplusplus
}
#endif
#endif
