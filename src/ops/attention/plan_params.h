/* plan_params.h - what the planner on the device reads, and the pieces of a plan made on the host.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_PLAN_PARAMS_H
#define QI_ATTENTION_PLAN_PARAMS_H

#include "ops/attention/groups.h"

/* A batch of arrays on the device, and the limits that it must keep. */
typedef struct plan_params {
    batch_view batch;
    qi_limits limits;
    qi_plan plan;     /* to be filled */
    i64 *mask_indptr; /* [max_requests] with a custom mask */
    qi_span *spans;   /* room: [max_groups + 1], [max_workers + 1] */
    qi_strip *strips;
    i64 max_tokens, max_qo_len, max_kv_len, max_pages;
} plan_params;
_Static_assert(sizeof(plan_params) <= 4096, "a kernel's parameters");

enum {
    PLAN_THREADS = 512,
    UPLOAD_THREADS = 256,
    UPLOAD_BLOCKS = 32,
    MAX_UPLOADS = 13 + MAX_LEVELS,
};

/* Pieces to copy from the host's pinned memory, [num_parts], addresses and bytes in multiples of 4. */
typedef struct upload_params {
    struct {
        void *to;
        const void *from;
        i64 bytes;
    } part[MAX_UPLOADS];
    i64 num_parts;
} upload_params;

#endif
