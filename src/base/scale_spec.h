/* scale_spec.h - checking a qkv_scale.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_BASE_SCALE_SPEC_H
#define QI_BASE_SCALE_SPEC_H

#include "base/tensor.h"
#include "kern/scale.h"
#include "qkv/attention.h"

/* A number, or a tensor f32 [1] or [heads]; all > 0 and finite. Borrows the tensor. */
qkv_status qi_scale_read(const qkv_scale *in, const char *name, int64_t heads, qi_scale *out);

#endif
