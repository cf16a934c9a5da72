/* scale.h - a checked qkv_scale, as host code and kernels read it; base/scale_spec.h checks it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_SCALE_H
#define QI_KERN_SCALE_H

#include "kern/abi.h"

typedef struct qi_scale {
    float value;
    i32 step;            /* of tensor, a head: 0 = one value for all */
    const float *tensor; /* NULL: value */
} qi_scale;

static inline float qi_scale_at(const qi_scale *s, i64 head)
{
    return s->tensor ? s->tensor[head * s->step] : s->value;
}

/* Is it 1 for every head, as far as one can say without looking at a tensor? */
static inline int qi_scale_is_one(const qi_scale *s)
{
    return !s->tensor && s->value == 1.f;
}

#endif
