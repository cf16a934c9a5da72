/* attention_arguments.h - attention's structures, read from arguments of calls.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_PYTHON_ATTENTION_ARGUMENTS_H
#define QKV_PYTHON_ATTENTION_ARGUMENTS_H

#include "arguments.h"
#include "context_object.h"
#include "tensors.h"

/* A scale: a number, an f32 array of one or of a value a head, or a list of these. */
void read_scale(call *c, PyObject *value, const char *name, qkv_scale *out);

/* What Attention(...), can_run(...) and workspace_size(...) have in common, in the order of their text. */
#define OPERATOR_PARAMETERS                                                                        \
    "*, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None, page_size=0, "                  \
    "kv_layout=\"NHD\", "                                                                          \
    "mask=\"causal\", dtype_q=\"bf16\", dtype_kv=None, dtype_o=None, sm_scale=None, "              \
    "logits_soft_cap=0.0, window_left=-1, window_right=-1, alibi=False, sink=False, rope=None, "   \
    "variant=None, batch_invariant=False, lse_base_2=False, only_appends=False, "                  \
    "max_requests, max_tokens, max_qo_len=0, "                                                     \
    "max_kv_len, max_pages=0, max_workers=0, max_split_rows=0, pool_pages=0, max_levels=1, "       \
    "max_row_blocks=0, plans_in_flight=0, ctx=None, device=\"cpu\""
enum {
    OP_NUM_QO_HEADS,
    OP_NUM_KV_HEADS,
    OP_HEAD_DIM_QK,
    OP_HEAD_DIM_VO,
    OP_PAGE_SIZE,
    OP_KV_LAYOUT,
    OP_MASK,
    OP_DTYPE_Q,
    OP_DTYPE_KV,
    OP_DTYPE_O,
    OP_SM_SCALE,
    OP_LOGITS_SOFT_CAP,
    OP_WINDOW_LEFT,
    OP_WINDOW_RIGHT,
    OP_ALIBI,
    OP_SINK,
    OP_ROPE,
    OP_VARIANT,
    OP_BATCH_INVARIANT,
    OP_LSE_BASE_2,
    OP_ONLY_APPENDS,
    OP_MAX_REQUESTS,
    OP_MAX_TOKENS,
    OP_MAX_QO_LEN,
    OP_MAX_KV_LEN,
    OP_MAX_PAGES,
    OP_MAX_WORKERS,
    OP_MAX_SPLIT_ROWS,
    OP_POOL_PAGES,
    OP_MAX_LEVELS,
    OP_MAX_ROW_BLOCKS,
    OP_PLANS_IN_FLIGHT,
    OP_CTX,
    OP_DEVICE,
    NUM_OP
};

enum { MAX_PARAMS = 32 }; /* of a variant */

/* An operator's description. The spec points into it. */
typedef struct operator_spec {
    qkv_attention_spec spec;
    qkv_attention_limits limits;
    qkv_rope_spec rope;
    qkv_variant variant;
    qkv_param params[MAX_PARAMS];
    PyObject *texts;     /* a list: owns the variant's strings */
    context_object *ctx; /* borrowed */
} operator_spec;

/* -1 with an exception. Release with free_operator, failed or not. */
int read_operator(PyObject *const *values, operator_spec *out);
void free_operator(operator_spec *op);

/* Memory that the host pinned is a GPU's too, which frameworks do not say when they lend it: asks the arrays
 * (NULL: none) that kernels read where the host has planned. The others may be on the host anyhow. */
void share_pinned(tensor *t);

/* The arrays of one level of a plan, in the order of LEVEL_NAMES. */
enum {
    LEVEL_QO_INDPTR,
    LEVEL_KV_INDPTR,
    LEVEL_KV_INDICES,
    LEVEL_KV_LAST_PAGE_LEN,
    LEVEL_BLOCK_TABLE,
    LEVEL_KV_LENS,
    LEVEL_BSR_ROWS,
    LEVEL_BSR_COLS,
    LEVEL_BSR_INDPTR,
    LEVEL_BSR_INDICES,
    LEVEL_BSR_MASK,
    NUM_LEVEL
};
enum { LEVEL_ARRAYS = 9 }; /* all but bsr_rows and bsr_cols */
typedef struct level_tensors {
    tensor *of[NUM_LEVEL]; /* NULL where absent */
} level_tensors;

void read_level(call *c, DLDevice device, PyObject *const *values, qkv_kv_index *out,
                level_tensors *tensors);

#endif
