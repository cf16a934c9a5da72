/* log_probs_params.h - what qkv_log_probs hands to its kernels.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_LOG_PROBS_PARAMS_H
#define QI_LOG_PROBS_PARAMS_H

#include "kern/abi.h"

typedef struct log_probs_params {
    float *log_probs;   /* [batch, n] */
    i32 *ranks;         /* [batch, n], NULL: not wanted */
    const void *logits; /* dtype [batch, vocab] */
    const i32 *tokens;  /* [batch, n], of any number */
    i64 log_probs_stride, ranks_stride, logits_stride, tokens_stride;
    i64 batch, vocab, n;
    qi_dtype dtype;
} log_probs_params;

#endif
