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

/* On a GPU: how the kernels are compiled and launched, and the plan block there, a copy of the host's. */
typedef struct attention_cuda {
    i32 decode_rows, decode_stages; /* 0: no tile has few rows */
    i32 prefill;                    /* 0: no tile has many */
    i32 blocks_per_sm;
    u32 shared_bytes;         /* of a block; more than there is: the kernel declines */
    char *block;              /* [workspace size's plan_bytes] */
    const char *host;         /* the block that it is a copy of */
    qi_plan plan;             /* addresses in block; fixed, since captured launches keep them */
    cu_function functions[2]; /* attention, attention_levels */
    cu_event uploaded;        /* the host's block may be written again */
} attention_cuda;

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
    attention_cuda cuda;
    char *scratch; /* [tasks][scratch_stride] after the partials */
    i64 scratch_stride;
    qkv_workspace owned; /* plan and scratch that destroy must free; NULL where borrowed */
    /* room to make groups in, beside those of the current plan */
    qi_group *spare_groups, **leaf;
    i32 *spare_rows, *order;
    /* what run checks against the current plan, or borrows from its batch */
    int planned;
    i64 num_tokens;
    i64 num_listed;                                 /* page numbers of all requests */
    i64 max_page, max_page_request, max_page_entry; /* -1: no page */
    i64 ragged_end;                                 /* tokens that k and v must have */
    bsr_view bsr;
    const u8 *mask_bits;
    i64 *mask_indptr; /* [max_requests] */
};

/* cuda.c: what create, plan, run and destroy do beside on a GPU. */
void qi_attention_cuda_configure(qkv_attention *a);
qkv_status qi_attention_cuda_compile(qkv_attention *a);
qkv_status qi_attention_cuda_alloc(qkv_attention *a, const qkv_workspace_size *size,
                                   qkv_workspace *out);
void qi_attention_cuda_free(qkv_attention *a);
qkv_status qi_attention_cuda_bind(qkv_attention *a, const qkv_workspace *w);
qkv_status qi_attention_cuda_begin_plan(qkv_attention *a, void *stream);
qkv_status qi_attention_cuda_upload(qkv_attention *a, const qi_lengths *lengths, void *stream);
qkv_status qi_attention_cuda_run(qkv_attention *a, const attention_params *p,
                                 const qi_scale scales[4], float sm_scale, void *stream);

#endif
