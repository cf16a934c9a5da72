/* rope.h - the parameters of rotary embedding, as kernels take them; base/rope_spec.h reads them from
 * a qkv_rope_spec, whose comment has the formula.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_ROPE_H
#define QI_KERN_ROPE_H

#include "kern/abi.h"

enum { QI_ROPE_MAX_PAIRS = 2048 };

typedef struct qi_rope {
    i32 num_pairs; /* rotary_dim = 2 * num_pairs; 0: no rotation */
    i32 interleaved;
    double theta, scale, low_freq, high_freq, old_context; /* low_freq 0: plain scaling */
    /* what GPUs multiply by, since they divide slowly */
    double octaves; /* log2(theta) / num_pairs: a pair's frequency lies so far below the last */
    double inverse_scale; /* 1 / scale */
    double inverse_range; /* 1 / (high_freq - low_freq) */
} qi_rope;

#endif
