/* verify_params.h - what qkv_verify hands to its kernels.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_VERIFY_PARAMS_H
#define QI_VERIFY_PARAMS_H

#include "ops/sampling/sampling_params.h"

enum { MAX_NODES = 1024 }; /* of a tree, whose children that a node has rejected are listed */

typedef struct verify_params {
    i32 *accepted, *tokens;  /* [batch, nodes + 1] */
    i32 *num_accepted;       /* [batch] */
    const void *target;      /* dtype [batch, nodes + 1, vocab] */
    const void *draft;       /* dtype [batch, nodes, vocab]; NULL: one-hot */
    const i32 *draft_tokens; /* [batch, nodes] */
    const i32 *parents;      /* [batch or 1, nodes]; NULL: a chain */
    i64 accepted_stride, tokens_stride, draft_tokens_stride, parents_stride; /* of a request */
    i64 target_stride[2], draft_stride[2]; /* of a request, a row */
    request_values seed, offset;
    i64 batch, vocab;
    i32 nodes;
    qi_dtype dtype;
} verify_params;

#endif
