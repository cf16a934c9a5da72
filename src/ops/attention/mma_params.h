/* mma_params.h - what run hands to attention_mma.cu.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_MMA_PARAMS_H
#define QI_ATTENTION_MMA_PARAMS_H

#include "kern/tensor_map.h"
#include "ops/attention/attention_params.h"

/* The largest head_dim_vo beside which a thread has registers to begin before its launch's turn. */
#define MMA_EARLY_DIM 128

/* k, v: [pages, heads, rows' 128 bytes, tokens of a page, their elements], in boxes of whole rows: DECODE_PIECE tokens
 * of a head. */
typedef struct mma_params {
    qi_tensor_map k, v;
    i32 kv_by_tma; /* 0: there are no maps, since the kernel or the addresses are not for the copy engine */
    i32 early; /* the plan, and keys that are not of its rows, may be read before the launch's turn */
    attention_cuda_params c;
} mma_params;
_Static_assert(sizeof(mma_params) <= 4096, "a kernel's parameters");

#endif
