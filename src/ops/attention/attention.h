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

enum { MAX_IN_FLIGHT = 16 };

/* On a GPU: how the kernels are compiled and launched, and the plan block there, a copy of the host's. */
typedef struct attention_cuda {
    i32 decode_rows, decode_stages; /* 0: no tile has few rows */
    i32 decode_piece;               /* keys that one copy brings; 0: they come 16 bytes at a time */
    i32 prefill;                    /* 0: no tile has many */
    i32 threads, blocks_per_sm;
    i32 tile_a_sm;            /* decodes have about a tile for each SM, which one block takes */
    i32 is_reference;         /* the row is attention.cuda */
    u32 shared_bytes;         /* of a block; more than there is: the kernel declines */
    char *block;              /* [workspace size's plan_bytes] */
    char *stages;             /* pinned blocks like it, one after another, to make plans in */
    const char *host;         /* the one that a->plan points into */
    qi_plan plan;             /* addresses in block; fixed, since captured launches keep them */
    cu_function functions[2]; /* attention, attention_levels */
    cu_function planner, uploader;    /* of plan.cu */
    cu_event uploaded[MAX_IN_FLIGHT]; /* the stage may be written again */
    u64 stage_bytes;
    i32 stage, next; /* of the last plan; of the one being made */
    /* Which runs have been enqueued after the last plan, and so wait for it: an eager one; one of the capture that this
     * stream is in, or was. */
    int run_is_behind;
    void *captured_run_is_behind;
} attention_cuda;

/* Shapes of attention_wgmma.cu's tiles. */
typedef struct attention_wgmma {
    i32 used;             /* was its row chosen? */
    i32 warpgroups, keys; /* that compute, of 64 rows each; keys of a block */
    i32 loading;          /* warpgroups that do not compute */
    i32 fp8;              /* are products of e4m3? */
    i32 stages, buffers;  /* of keys and values; of queries */
    i32 piece;            /* keys that one copy brings, 0: they come row by row */
    i32 shared_bytes;
} attention_wgmma;

static inline i32 qi_attention_wgmma_threads(const attention_wgmma *w)
{
    return 128 * (w->loading + w->warpgroups);
}

/* What the rows for tensor cores are compiled for of spec and limits, first of their constants. */
enum { QI_SPEC_CONSTANTS = 14 };
#define QI_SPEC_CONSTANT_NAMES                                                                     \
    "HEAD_DIM_QK HEAD_DIM_VO GROUP_SIZE PAGE_SIZE DTYPE_Q DTYPE_KV DTYPE_O CAUSAL WINDOW "         \
    "SOFT_CAP ALIBI CUSTOM_MASK SPARSE MIXED "

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
    attention_wgmma wgmma;
    char *scratch; /* [tasks][scratch_stride] after the partials */
    i64 scratch_stride;
    qkv_workspace owned; /* plan and scratch that destroy must free; NULL where borrowed */
    /* room to make groups in, beside those of the current plan */
    qi_group *spare_groups;
    i32 *spare_rows, *order;
    qi_span *spans; /* room of the scheduler: [groups + 1], [workers + 1] */
    qi_strip *strips;
    qi_plan_header *found; /* where qkv_attention_status has its result copied to */
    /* what run checks against the current plan, or borrows from its batch */
    int planned;
    int on_device; /* by the device's planner: what a->plan points to is of an earlier plan */
    i64 num_tokens;
    i64 num_listed;                                 /* page numbers of all requests */
    i64 max_page, max_page_request, max_page_entry; /* -1: no page */
    i64 ragged_end;                                 /* tokens that k and v must have */
    bsr_view bsr;
    const u8 *mask_bits;
    i64 *mask_indptr; /* [max_requests] */
};

/* batch.c: reads and checks all of a batch. */
qkv_status qi_attention_read_batch(const qkv_attention *a, const qkv_attention_batch *in,
                                   batch_view *out);

/* attention.c: lays the workspace out over blocks for the plan and for scratch. */
void qi_attention_bind(qkv_attention *a, char *plan, char *scratch);

/* cuda.c: what create, plan, run and destroy do beside on a GPU. */
void qi_attention_cuda_configure(qkv_attention *a);
void qi_attention_spec_constants(const qkv_attention *a, i32 out[QI_SPEC_CONSTANTS]);
qkv_status qi_attention_cuda_compile(qkv_attention *a);
qkv_status qi_attention_cuda_alloc(qkv_attention *a, const qkv_workspace_size *size,
                                   qkv_workspace *out);
void qi_attention_cuda_free(qkv_attention *a);
qkv_status qi_attention_cuda_bind(qkv_attention *a, const qkv_workspace *w);
void *qi_attention_on_device(const qkv_attention *a, const void *host);
qkv_status qi_attention_cuda_begin_plan(qkv_attention *a, void *stream);
void qi_attention_cuda_cancel_plan(qkv_attention *a);
qkv_status qi_attention_cuda_upload(qkv_attention *a, const qi_lengths *lengths, void *stream);
qkv_status qi_attention_cuda_run(qkv_attention *a, const attention_params *p,
                                 const qi_scale scales[4], float sm_scale, void *stream);

/* device_plan.c */
qkv_status qi_attention_cuda_plan(qkv_attention *a, const batch_view *batch, void *stream);

#endif
