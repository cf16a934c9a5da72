/* rope_spec.h - checking a qkv_rope_spec, for every operator that rotates.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_BASE_ROPE_SPEC_H
#define QI_BASE_ROPE_SPEC_H

#include "base/status.h"
#include "kern/rope.h"
#include "qkv/rope.h"

/* INVALID names the field. name: of the spec itself, in messages. */
qkv_status qi_rope_read(const qkv_rope_spec *spec, const char *name, int64_t head_dim,
                        qi_rope *out);

#endif
