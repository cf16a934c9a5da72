/* sampling.h - from logits to tokens.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_SAMPLING_H
#define QKV_SAMPLING_H

#include "qkv/context.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * qkv_argmax - the index of each row's largest logit; the lowest index among equals.
 *
 *   tokens  i32 [batch]
 *   logits  [batch, vocab]  f32|f16|bf16. NaN counts as -inf; a row of nothing else gives 0
 *
 * Errors: INVALID (vocab 0, shapes, dtypes).
 */
QKV_API qkv_status qkv_argmax(qkv_context *ctx, DLTensor *tokens, const DLTensor *logits,
                              void *stream);

/* Per request, on the logits' device; NULL = the default for all. Values are checked where they are
 * on the host. */
typedef struct qkv_sampling_params {
    uint32_t struct_size, reserved;
    const DLTensor *temperature; /* f32 [batch] >= 0; 0 = argmax; default 1 */
    const DLTensor *top_k;       /* i32 [batch]; 0 or >= vocab = all; default all */
    const DLTensor *top_p;       /* f32 [batch] in (0, 1]; default 1 */
    const DLTensor *min_p;       /* f32 [batch] in [0, 1]; default 0 */
    const DLTensor *seed;        /* u64 [batch]; required */
    const DLTensor *offset;      /* u64 [batch]; draw number of the seed's stream; default 0 */
} qkv_sampling_params;
#define QKV_SAMPLING_PARAMS_INIT .struct_size = sizeof(qkv_sampling_params)

/*
 * qkv_sample - draw one token per row from its filtered, tempered distribution.
 *
 *   p = softmax(logits / temperature); keep the top_k largest; of those, renormalised, the smallest
 *   set of largest whose sum reaches top_p; of those, the ones with p >= min_p * max p; renormalise;
 *   draw by inverse transform in descending order of p. Equal logits are ordered by index.
 *
 *   tokens  i32 [batch]
 *   logits  [batch, vocab]  f32|f16|bf16; NaN and -inf have probability 0; a row of nothing else
 *           gives 0
 *
 * The uniform number of a row is Philox4x32-10 keyed by its seed at counter offset: it depends on
 * nothing else, so a request draws the same tokens whatever it is batched with. Rows of one seed and
 * offset have one number: give each request a seed of its own. No allocation.
 *
 * Errors: INVALID (shapes, dtypes, a parameter out of range: names the row). Source: Salmon et al.
 * 2011 (Philox); Holtzman et al. 2020 (top-p), arXiv:1904.09751.
 */
QKV_API qkv_status qkv_sample(qkv_context *ctx, DLTensor *tokens, const DLTensor *logits,
                              const qkv_sampling_params *params, void *stream);

#ifdef __cplusplus
}
#endif
#endif
