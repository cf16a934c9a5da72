/* attention.h - the operator object, shared by create, plan and run.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_H
#define QI_ATTENTION_H

#include "core/launch.h"
#include "ops/attention/attention_params.h"
#include "ops/attention/schedule.h"
#include "qkv/attention.h"

struct qkv_attention {
    qkv_context *ctx;
    const qi_kernel *row;
    qkv_attention_spec spec;     /* defaults filled in */
    qkv_attention_limits limits; /* defaults filled in */
    qi_limits schedule;
    qi_plan plan;
    char *scratch; /* [tasks][scratch_stride] after the partials */
    i64 scratch_stride;
    qkv_workspace owned; /* plan and scratch that destroy must free; NULL where borrowed */
    /* what run checks against the current plan */
    int planned;
    i64 num_tokens;
    i64 max_page, max_page_request, max_page_entry; /* -1: no page */
    i64 ragged_end;                                 /* tokens that k and v must have */
};

#endif
