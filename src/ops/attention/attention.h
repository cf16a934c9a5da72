/* attention.h - the operator object, shared by create, plan and run.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_H
#define QI_ATTENTION_H

#include "core/launch.h"
#include "ops/attention/attention_params.h"
#include "ops/attention/groups.h"
#include "ops/attention/schedule.h"
#include "ops/attention/variant.h"
#include "qkv/attention.h"

struct qkv_attention {
    qkv_context *ctx;
    const qi_kernel *row, *levels_row;
    qi_kernel compiled[2]; /* with a variant: what the two point to */
    variant_table variant;
    variant_args args;           /* of the layer at hand */
    qkv_attention_spec spec;     /* defaults filled in */
    qkv_attention_limits limits; /* defaults filled in */
    qi_limits schedule;
    qi_plan plan;
    qi_rope rope;       /* num_pairs 0: none */
    double *rope_turns; /* [num_pairs] */
    float *head_scales; /* [3][num_qo_heads] logit, value and output scale of a layer */
    char *scratch;      /* [tasks][scratch_stride] after the partials */
    i64 scratch_stride;
    qkv_workspace owned; /* plan and scratch that destroy must free; NULL where borrowed */
    /* room to make groups in, beside those of the current plan */
    qi_group *spare_groups, **leaf;
    i32 *spare_rows, *order;
    /* what run checks against the current plan, or borrows from its batch */
    int planned;
    i64 num_tokens;
    i64 max_page, max_page_request, max_page_entry; /* -1: no page */
    i64 ragged_end;                                 /* tokens that k and v must have */
    bsr_view bsr;
    const u8 *mask_bits;
    i64 *mask_indptr; /* [max_requests] */
};

#endif
