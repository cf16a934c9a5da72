/* sampling_params.h - what qkv_argmax and qkv_sample hand to their kernels.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_PARAMS_H
#define QI_SAMPLING_PARAMS_H

#include "kern/abi.h"

typedef struct argmax_params {
    i32 *tokens;        /* [batch] */
    const void *logits; /* dtype [batch, vocab] */
    i64 logits_stride;  /* of a row */
    i64 batch, vocab;
    qi_dtype dtype;
} argmax_params;

/* Shared memory of a block of qkv_sample's GPU kernel: two histograms of 2048 bins, 2 numbers a warp, and
 * some more. */
#define SAMPLER_BYTES(threads) (2 * 2048 * 12 + 2 * 8 * ((threads) / 32) + 56)

typedef struct sample_params {
    argmax_params rows;
    const float *temperature; /* [batch], NULL: 1 */
    const i32 *top_k;         /* [batch], NULL or 0: all */
    const float *top_p;       /* [batch], NULL: 1 */
    const float *min_p;       /* [batch], NULL: 0 */
    const u64 *seed;          /* [batch] */
    const u64 *offset;        /* [batch], NULL: 0 */
} sample_params;

#endif
