/* attention.h - the one attention operator: rows of queries x a list of KV pages, in three calls.
 *
 *   qkv_attention_create   per model: what is fixed (spec) and how large a step can get (limits)
 *   qkv_attention_plan     per step:  lengths and page tables, checked and cut into equal work
 *   qkv_attention_run      per layer: the tensors; only computes
 *
 * Semantics, for query row i (0 .. qo_len-1) of a request, key j (0 .. kv_len-1), and the row's
 * position p = i + kv_len - qo_len (or qo_pos[request] + i):
 *
 *   x(i,j) = (q_i . k_j) * sm_scale;  with a soft cap c: x = c * tanh(x / c)
 *   j is visible  iff  (mask is not CAUSAL or j <= p)
 *                  and (window_left  < 0 or j >= p - window_left)
 *                  and (window_right < 0 or j <= p + window_right)
 *   o_i = sum_j softmax_j(x(i,j)) v_j over visible j;   lse_i = log sum_j exp x(i,j)
 *
 * Causal is thus aligned to the bottom right. A row that sees no key gives o = 0, lse = -inf.
 * Softmax in f32. Query head h reads KV head h / (num_qo_heads / num_kv_heads).
 * Pages that no request lists, and slots past a request's end, are never read into a result: they
 * may hold NaN. Rows of o and lse from qo_indptr[last] on are not written.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_ATTENTION_H
#define QKV_ATTENTION_H

#include "qkv/context.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qkv_attention qkv_attention;

/* The order of a page's axes in the shape of k and v; strides are free either way. */
enum { QKV_NHD = 0 /* [page, token, head, dim] */, QKV_HND = 1 /* [page, head, token, dim] */ };
enum { QKV_MASK_NONE = 0, QKV_MASK_CAUSAL = 1 };
enum { QKV_FEATURE_SOFT_CAP = 1, QKV_FEATURE_WINDOW = 4 };
enum { QKV_ATTENTION_LSE_BASE_2 = 2 }; /* flags: lse in base 2 instead of natural log */

/* Per model; fixed at create. */
typedef struct qkv_attention_spec {
    uint32_t struct_size, flags;           /* QKV_ATTENTION_... */
    int32_t num_qo_heads, num_kv_heads;    /* qo a multiple of kv */
    int32_t head_dim_qk, head_dim_vo;      /* multiples of 8, 8 .. 512 */
    int32_t page_size;                     /* tokens a page, >= 1; 0 = ragged KV without pages */
    int32_t kv_layout;                     /* QKV_NHD, QKV_HND */
    int32_t mask;                          /* QKV_MASK_... */
    int32_t features;                      /* QKV_FEATURE_...; a field whose feature is not here
                                           must be left 0 (a window may be -1), not ignored */
    DLDataType dtype_q, dtype_kv, dtype_o; /* each f32, f16 or bf16 */
    float sm_scale;                        /* > 0; 0 = 1/sqrt(head_dim_qk) */
    float logits_soft_cap;                 /* > 0; with FEATURE_SOFT_CAP */
    int32_t window_left, window_right;     /* keys visible beside the row's own, -1 = open; with
                                             FEATURE_WINDOW; the widest that a layer will ask for */
} qkv_attention_spec;
#define QKV_ATTENTION_SPEC_INIT .struct_size = sizeof(qkv_attention_spec)

/* How large a step can get; fixes kernels, work lists and memory. */
typedef struct qkv_attention_limits {
    uint32_t struct_size;
    int32_t max_requests;
    int64_t max_tokens;     /* rows of q */
    int32_t max_qo_len;     /* per request; 1 = decode only; 0 = max_tokens */
    int32_t max_workers;    /* strips that the work is cut into; 0 = the context's threads */
    int64_t max_kv_len;     /* per request */
    int64_t max_pages;      /* entries of all page lists together; unused when ragged */
    int64_t max_split_rows; /* partial rows (token x qo head); 0 = enough; less splits less */
    int64_t pool_pages;     /* pages in the pool: plan checks page numbers; 0 = only run does */
} qkv_attention_limits;
#define QKV_ATTENTION_LIMITS_INIT .struct_size = sizeof(qkv_attention_limits)

/* Exact sizes. plan: private to one operator, kept between calls. scratch: may be shared by
 * operators that never run at the same time; its content is free between runs. pinned: host
 * staging, 0 on the CPU. Nothing need be zeroed. */
typedef struct qkv_workspace_size {
    uint64_t plan_bytes, scratch_bytes, pinned_bytes;
} qkv_workspace_size;

typedef struct qkv_workspace { /* blocks of at least those sizes, aligned to 64 bytes (CPU) */
    uint32_t struct_size, reserved;
    void *plan, *scratch, *pinned;
    uint64_t plan_bytes, scratch_bytes, pinned_bytes;
} qkv_workspace;
#define QKV_WORKSPACE_INIT .struct_size = sizeof(qkv_workspace)

/* Where each request's keys are: exactly one form is set, the other pointers are NULL. All i32.
 *   paged CSR    kv_indptr, kv_indices, kv_last_page_len
 *   block table  block_table, kv_lens
 *   ragged       kv_indptr alone (spec.page_size = 0): offsets in tokens into k and v */
typedef struct qkv_kv_index {
    uint32_t struct_size, reserved;
    const DLTensor *qo_indptr;        /* [requests + 1] offsets into q's rows, first 0 */
    const DLTensor *kv_indptr;        /* [requests + 1] offsets into kv_indices, first >= 0 */
    const DLTensor *kv_indices;       /* [>= kv_indptr[last]] page numbers */
    const DLTensor *kv_last_page_len; /* [requests] 1 .. page_size; any for a request of no pages */
    const DLTensor *block_table;      /* [requests, columns] page numbers; unused entries free */
    const DLTensor *kv_lens;          /* [requests] tokens, including the new ones */
} qkv_kv_index;
#define QKV_KV_INDEX_INIT .struct_size = sizeof(qkv_kv_index)

/* One step. */
typedef struct qkv_attention_batch {
    uint32_t struct_size;
    int32_t num_levels;         /* 1 */
    const qkv_kv_index *levels; /* [num_levels] */
    const DLTensor *qo_pos; /* i32 [requests] position of each request's row 0, any value; NULL =
                                   at the end of its keys (kv_len - qo_len) */
} qkv_attention_batch;
#define QKV_ATTENTION_BATCH_INIT .struct_size = sizeof(qkv_attention_batch)

/* One layer. */
typedef struct qkv_attention_io {
    uint32_t struct_size, reserved;
    const DLTensor *q; /* [tokens, num_qo_heads, head_dim_qk] */
    const DLTensor *k; /* [pages, page_size, num_kv_heads, head_dim_qk] by layout; ragged without
                          the pages axis ([tokens, heads, dim] or [heads, tokens, dim]) */
    const DLTensor *v; /* the same with head_dim_vo. NULL: k holds both, [pages, 2, ...] */
    DLTensor *o;       /* [tokens, num_qo_heads, head_dim_vo]; must not overlap q, k, v */
    DLTensor *lse;     /* f32 [tokens, num_qo_heads], any strides; NULL = not wanted */
    float sm_scale, logits_soft_cap; /* this layer's; 0 = the spec's */
    int32_t set_window;              /* 1: the two below replace the spec's (narrower or equal) */
    int32_t window_left, window_right;
    int32_t reserved2;
} qkv_attention_io;
#define QKV_ATTENTION_IO_INIT .struct_size = sizeof(qkv_attention_io)

/*
 * qkv_attention_can_run - which rows of the kernel table take this spec, and why the others do not.
 *
 *   reasons  [reasons_bytes] NULL, or receives one line a row: "attention.d64: head_dim is not 64"
 *            or "attention.any: runs", cut off (and terminated) if it does not fit
 *
 * Errors: INVALID (the spec or limits break their contract), UNSUPPORTED (no row).
 */
QKV_API qkv_status qkv_attention_can_run(qkv_context *ctx, const qkv_attention_spec *spec,
                                         const qkv_attention_limits *limits, char *reasons,
                                         size_t reasons_bytes);

/* The exact workspace of an operator. Allocates nothing. Errors: as qkv_attention_can_run. */
QKV_API qkv_status qkv_attention_workspace_size(qkv_context *ctx, const qkv_attention_spec *spec,
                                                const qkv_attention_limits *limits,
                                                qkv_workspace_size *out);

/*
 * qkv_attention_create - choose kernels and bind memory.
 *
 *   workspace  NULL: taken from the context's allocator and owned by the operator; else borrowed
 *              until destroy
 *   out        set to the operator, or to NULL on failure
 *
 * The only call of the four that allocates. One thread uses an operator at a time.
 * Errors: INVALID, UNSUPPORTED, MEMORY (no memory, or a workspace too small: says by how much).
 */
QKV_API qkv_status qkv_attention_create(qkv_context *ctx, const qkv_attention_spec *spec,
                                        const qkv_attention_limits *limits,
                                        const qkv_workspace *workspace, qkv_attention **out);

/* NULL is fine. */
QKV_API void qkv_attention_destroy(qkv_attention *attention);

/*
 * qkv_attention_plan - take one step's lengths and page tables.
 *
 * Checks every index (monotone, in range, within limits and pool) and copies what run needs, so the
 * arrays are free afterwards. No allocation. Deterministic: the same batch gives the same plan.
 * A failed plan leaves the former one in force.
 *
 * Errors: INVALID, naming the array, the request and the entry.
 */
QKV_API qkv_status qkv_attention_plan(qkv_attention *attention, const qkv_attention_batch *batch,
                                      void *stream);

/*
 * qkv_attention_run - compute one layer under the current plan.
 *
 * No allocation, no system call beyond waking threads. The same plan and tensors give the same
 * bits, with any number of threads. Errors: INVALID (a tensor, or no plan yet).
 */
QKV_API qkv_status qkv_attention_run(qkv_attention *attention, const qkv_attention_io *io,
                                     void *stream);

/*
 * qkv_attention_merge - combine attention over parts of the keys into attention over all of them.
 *
 *   lse[t, h] = log sum_s exp(lse_s[t, h])
 *   o[t, h]   = sum_s exp(lse_s[t, h] - lse[t, h]) o_s[t, h]
 *
 *   o           [tokens, heads, dim]  f32|f16|bf16, any outer strides; may be one of the o_states
 *   lse         [tokens, heads]       f32, any strides; may be one of the lse_states; NULL = not wanted
 *   o_states    num_states tensors [tokens, heads, dim] of one f32|f16|bf16
 *   lse_states  num_states tensors f32 [tokens, heads], natural log, or base 2 (and lse with them)
 *               under flag QKV_ATTENTION_LSE_BASE_2
 *   num_states  1 .. 64
 *   flags       0 or QKV_ATTENTION_LSE_BASE_2
 *
 * The parts' keys must be disjoint. A state with lse = -inf counts for nothing, whatever its o
 * holds; where all are -inf, o = 0 and lse = -inf. Sums in f32, in the order of the states.
 * Allocates nothing. Errors: INVALID (names the tensor and the state). Source: Ye et al. 2025,
 * arXiv:2501.01005, section 2.2 (attention states).
 */
QKV_API qkv_status qkv_attention_merge(qkv_context *ctx, DLTensor *o, DLTensor *lse,
                                       const DLTensor *const *o_states,
                                       const DLTensor *const *lse_states, int32_t num_states,
                                       uint32_t flags, void *stream);

#ifdef __cplusplus
}
#endif
#endif
