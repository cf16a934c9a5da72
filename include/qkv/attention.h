/* attention.h - the one attention operator: rows of queries x a list of KV pages, in three calls.
 *
 *   qkv_attention_create   per model: what is fixed (spec) and how large a step can get (limits)
 *   qkv_attention_plan     per step:  lengths and page tables, checked and cut into equal work
 *   qkv_attention_run      per layer: the tensors; only computes
 *
 * Semantics, for query row i (0 .. qo_len-1) of a request, key j (0 .. kv_len-1), and the row's
 * position p = i + kv_len - qo_len (or qo_pos[request] + i):
 *
 *   x(i,j) = (q_i . k_j) * sm_scale;  with a soft cap c: x = c * tanh(x / c);
 *            with ALiBi: x += slope[head] * (j - p);  then the variant's logit hook
 *   j is visible  iff  (mask is not CAUSAL or j <= p)
 *                  and (window_left  < 0 or j >= p - window_left)
 *                  and (window_right < 0 or j <= p + window_right)
 *                  and (mask is not CUSTOM or bit (i, j) is set)
 *                  and (no BSR, or j's column block is listed for i's row block, its bit set)
 *                  and the variant's mask hook keeps it
 *   o_i = sum_j softmax_j(x(i,j)) v_j over visible j;   lse_i = log sum_j exp x(i,j)
 *   with a sink: one more logit sink[head] in the softmax's denominator and in lse, without a v
 *
 * q, k, v stand for what is stored times its scale; o is stored divided by o_scale. With RoPE, q_i
 * is rotated by p and k_j by j first. Causal is thus aligned to the bottom right. A row that sees no
 * key gives o = 0, lse = -inf (with a sink: lse = sink). Softmax in f32. Query head h reads KV head
 * h / (num_qo_heads / num_kv_heads).
 * Pages that no request lists, and slots past a request's end, are never read into a result: they
 * may hold NaN. Keys and values that a row does not see but others do must be finite. Rows of o and
 * lse from qo_indptr[last] on are not written.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_ATTENTION_H
#define QKV_ATTENTION_H

#include "qkv/context.h"
#include "qkv/rope.h"
#include "qkv/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qkv_attention qkv_attention;

/* The order of a page's axes in the shape of k and v; strides are free either way. */
enum { QKV_NHD = 0 /* [page, token, head, dim] */, QKV_HND = 1 /* [page, head, token, dim] */ };
/* CUSTOM: the batch's bits say it all, with a window if wanted. */
enum { QKV_MASK_NONE = 0, QKV_MASK_CAUSAL = 1, QKV_MASK_CUSTOM = 2 };
enum {
    QKV_FEATURE_SOFT_CAP = 1,
    QKV_FEATURE_ALIBI = 2,
    QKV_FEATURE_WINDOW = 4,
    QKV_FEATURE_ROPE = 8, /* the cache holds keys that are not rotated yet */
};
/* flags */
enum {
    QKV_ATTENTION_BATCH_INVARIANT = 1, /* a request's bits depend on nothing but the request: not on
                                          its neighbours, max_workers or threads; one level only */
    QKV_ATTENTION_LSE_BASE_2 = 2,      /* lse in base 2 instead of natural log */
    QKV_ATTENTION_HAS_SINK = 4,        /* every layer brings io.sink */
    QKV_ATTENTION_ONLY_APPENDS = 8,    /* the caller's promise: from a plan to its last run no keys
                                          and values are written but those of the batch's rows, the
                                          last qo_len of each request. A GPU may then read older
                                          ones before a run's turn has come: while the launch
                                          before it, which may append the new ones, still runs */
};

/* Per model; fixed at create. */
typedef struct qkv_attention_spec {
    uint32_t struct_size, flags;        /* QKV_ATTENTION_... */
    int32_t num_qo_heads, num_kv_heads; /* qo 1 to 512 times kv; kv 1 to 1024 */
    int32_t head_dim_qk, head_dim_vo;   /* multiples of 8, 8 .. 512 */
    int32_t page_size;                  /* tokens a page, 1 .. 2^24; 0 = ragged, no pages */
    int32_t kv_layout;                  /* QKV_NHD, QKV_HND */
    int32_t mask;                       /* QKV_MASK_... */
    int32_t features;                   /* QKV_FEATURE_...; a field whose feature is not here
                                           must be left 0 (a window may be -1), not ignored */
    DLDataType dtype_q, dtype_o;        /* each f32, f16, bf16, e4m3 or e5m2 */
    DLDataType dtype_kv;                /* these, or i8 */
    float sm_scale;                     /* > 0; 0 = 1/sqrt(head_dim_qk) */
    float logits_soft_cap;              /* > 0; with FEATURE_SOFT_CAP */
    int32_t window_left, window_right;  /* keys visible beside the row's own, -1 = open; with
                                             FEATURE_WINDOW; the widest that a layer will ask for */
    const qkv_rope_spec *rope;          /* with FEATURE_ROPE; read by create */
    const qkv_variant *variant;         /* NULL = built-in; read by create */
} qkv_attention_spec;
#define QKV_ATTENTION_SPEC_INIT .struct_size = sizeof(qkv_attention_spec)

/* How large a step can get; fixes kernels, work lists and memory. */
typedef struct qkv_attention_limits {
    uint32_t struct_size;
    int32_t max_requests; /* and groups of each level */
    int64_t max_tokens;   /* rows of q; at most 2^30, as max_kv_len */
    int32_t max_qo_len;   /* per request; 1 = decode only; 0 = max_tokens */
    int32_t max_workers; /* strips that the work is cut into, <= 4096; 0 = the context's threads, or
                             the blocks that a GPU has room for at a time */
    int64_t max_kv_len;  /* per request, all levels together */
    int64_t max_pages;   /* entries of all page lists together; unused when ragged */
    int64_t max_split_rows; /* partial rows (token x qo head); 0 = enough; less splits less. Several
                               levels need one for each level that a row has keys in, and
                               BATCH_INVARIANT one for each piece of a split row: less fails plan */
    int64_t pool_pages;     /* pages in the pool: plan checks page numbers; 0 = only run does */
    int32_t max_levels;     /* 0 = 1. Also how deep detect_shared_prefix looks */
    int32_t max_row_blocks; /* BSR: row blocks (times KV heads, if each has its own); 0 = no BSR */
    int32_t plans_in_flight; /* GPU: plans of host arrays that may wait for the stream before plan
                                waits for the first of them, up to 16; 0 = 2. Each takes its part of
                                pinned_bytes */
    int32_t reserved;
} qkv_attention_limits;
#define QKV_ATTENTION_LIMITS_INIT .struct_size = sizeof(qkv_attention_limits)

/* Exact sizes. plan: private to one operator, kept between calls. scratch: may be shared by
 * operators that never run at the same time; its content is free between runs. pinned: host
 * staging, 0 on the CPU. Nothing need be zeroed. */
typedef struct qkv_workspace_size {
    uint64_t plan_bytes, scratch_bytes, pinned_bytes;
} qkv_workspace_size;

typedef struct qkv_workspace { /* blocks of at least those sizes, apart, aligned to 64; on a GPU
                                   plan and scratch are its memory, pinned is the host's */
    uint32_t struct_size, reserved;
    void *plan, *scratch, *pinned;
    uint64_t plan_bytes, scratch_bytes, pinned_bytes;
} qkv_workspace;
#define QKV_WORKSPACE_INIT .struct_size = sizeof(qkv_workspace)

/* Where each request's keys are: exactly one form is set, the other pointers are NULL. All i32.
 *   paged CSR    kv_indptr, kv_indices, kv_last_page_len
 *   block table  block_table, kv_lens
 *   ragged       kv_indptr alone (spec.page_size = 0): offsets in tokens into k and v
 *
 * With bsr_indptr, only listed blocks of the logical matrix [qo_len, kv_len] of each request exist:
 * row block b of a request has its rows [b * bsr_rows, ..), column block c its keys [c * bsr_cols,
 * ..), the last of each cut off at the lengths. A request has ceil(qo_len / bsr_rows) row blocks;
 * they are numbered through all requests. */
typedef struct qkv_kv_index {
    uint32_t struct_size, reserved;
    const DLTensor *qo_indptr;        /* [requests + 1] offsets into q's rows, first 0 */
    const DLTensor *kv_indptr;        /* [requests + 1] offsets into kv_indices, first >= 0 */
    const DLTensor *kv_indices;       /* [>= kv_indptr[last]] page numbers */
    const DLTensor *kv_last_page_len; /* [requests] 1 .. page_size; any for a request of no pages */
    const DLTensor *block_table;      /* [requests, columns] page numbers; unused entries free */
    const DLTensor *kv_lens;          /* [requests] tokens, including the new ones */
    int32_t bsr_rows, bsr_cols;       /* rows and keys of a block, >= 1 each */
    const DLTensor *bsr_indptr;  /* [1 or num_kv_heads, row_blocks + 1] offsets into bsr_indices */
    const DLTensor *bsr_indices; /* [>= largest offset] column blocks, ascending in a row block */
    const DLTensor *bsr_mask;    /* u8 [blocks, ceil(bsr_rows * bsr_cols / 8)], bit i * bsr_cols
                                         + j of a block (lowest of a byte first): is it visible?
                                         NULL = all are. bsr_indices and bsr_mask stay borrowed
                                         until the next plan */
} qkv_kv_index;
#define QKV_KV_INDEX_INIT .struct_size = sizeof(qkv_kv_index)

/* One step.
 *
 * Index arrays are all on the host, or, for a context on a GPU, all on it (device type kDLCUDA; some may
 * then be pinned or managed memory). See qkv_attention_plan.
 *
 * Several levels: the keys of a request are those of its group in level 0, then of its group in
 * level 1, ..., last its own, and they are read once for all the group's rows. Groups nest: each
 * level's qo_indptr cuts the rows into runs of whole groups of the next level; the last level's
 * groups are the requests. kv_len is the sum over levels. BSR takes one level. */
typedef struct qkv_attention_batch {
    uint32_t struct_size;
    int32_t num_levels;          /* 1 .. limits.max_levels */
    const qkv_kv_index *levels;  /* [num_levels], levels[0].struct_size bytes apart, shared first */
    const DLTensor *qo_pos;      /* i32 [requests] position of each request's row 0, any value; NULL
                                   = at the end of its keys (kv_len - qo_len) */
    const DLTensor *mask_bits;   /* MASK_CUSTOM: u8 [bytes], borrowed until the next plan. Of
                                   request r from byte mask_indptr[r] on: bit i * n + j (lowest of
                                   a byte first) for row i and key j of its n keys in the last
                                   level; keys of earlier levels are visible */
    const DLTensor *mask_indptr; /* i64 [requests + 1] */
    int32_t detect_shared_prefix; /* 1: requests whose page lists begin with the same pages become
                                   levels, as deep as that pays; paged, one level, no BSR, not with
                                   BATCH_INVARIANT; the same result within rounding */
    int32_t max_tokens; /* arrays on the device, which plan cannot look into: qo_indptr[last] is at
                           most that, and q, o and lse of run have at least so many rows; 0 =
                           limits.max_tokens */
} qkv_attention_batch;
#define QKV_ATTENTION_BATCH_INIT .struct_size = sizeof(qkv_attention_batch)

/* What a stored element is multiplied by: tensor f32 [1] or [heads] (query heads for q and o, KV
 * heads for k and v) if given, else value; neither = 1. Finite and > 0. */
typedef struct qkv_scale {
    float value;
    const DLTensor *tensor;
} qkv_scale;

/* One layer. */
typedef struct qkv_attention_io {
    uint32_t struct_size, reserved;
    const DLTensor *q; /* [tokens, num_qo_heads, head_dim_qk] */
    const DLTensor *k; /* [pages, page_size, num_kv_heads, head_dim_qk] by layout; ragged without
                          the pages axis ([tokens, heads, dim] or [heads, tokens, dim]) */
    const DLTensor *v; /* the same with head_dim_vo. NULL: k holds both, [pages, 2, ...] */
    DLTensor *o;       /* [tokens, num_qo_heads, head_dim_vo]; must not overlap what run
                          reads, nor itself. fp8 saturates at its largest value */
    DLTensor *lse;     /* f32 [tokens, num_qo_heads], any strides; NULL = not wanted */
    float sm_scale, logits_soft_cap; /* this layer's; 0 = the spec's */
    int32_t set_window;              /* 1: the two below replace the spec's (narrower or equal) */
    int32_t window_left, window_right;
    int32_t num_args;                             /* of the variant, as many as it has parameters */
    qkv_scale q_scale, k_scale, v_scale, o_scale; /* of any dtype */
    const DLTensor *sink;         /* f32 [num_qo_heads] with HAS_SINK, natural units */
    const DLTensor *alibi_slopes; /* f32 [num_qo_heads] with FEATURE_ALIBI */
    const qkv_arg *args;          /* [num_args] of the variant, in order of declaration */
} qkv_attention_io;
#define QKV_ATTENTION_IO_INIT .struct_size = sizeof(qkv_attention_io)

/*
 * qkv_attention_can_run - which rows of the kernel table take this spec, and why the others do not.
 *
 *   reasons  [reasons_bytes] NULL, or receives one line a row: "attention.d64: head_dim is not 64"
 *            or "attention.any: runs", cut off (and terminated) if it does not fit. Only
 *            written on success
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
 *   workspace  NULL: taken from the context's allocator (on a GPU from the driver) and owned by the
 *              operator; else borrowed until destroy
 *   out        set to the operator, or to NULL on failure
 *
 * The only call of the three that allocates; with a variant, and always on a GPU, it may compile
 * (seconds, once). One thread uses an operator at a time.
 * Errors: INVALID, UNSUPPORTED, MEMORY (no memory, or a workspace too small: says by how much), COMPILE
 * (no compiler, its first lines, or the jit_policy forbids it).
 */
QKV_API qkv_status qkv_attention_create(qkv_context *ctx, const qkv_attention_spec *spec,
                                        const qkv_attention_limits *limits,
                                        const qkv_workspace *workspace, qkv_attention **out);

/*
 * qkv_attention_warm_up - compile (or fetch from the disk cache) what create will need, so that it
 * finds it done. Built-in kernels of the CPU need nothing. Errors: as create, which says why.
 */
QKV_API qkv_status qkv_attention_warm_up(qkv_context *ctx, const qkv_attention_spec *spec,
                                         const qkv_attention_limits *limits);

/* NULL is fine. What was enqueued on a GPU must have ended, as before its tensors are freed. */
QKV_API void qkv_attention_destroy(qkv_attention *attention);

/*
 * qkv_attention_plan - take one step's lengths and page tables.
 *
 * Checks every index (monotone, in range, within limits and pool) and copies what run needs, so the
 * arrays are free afterwards (but mask_bits, bsr_indices and bsr_mask). No allocation. Deterministic: the same batch gives the same plan.
 * A failed plan leaves the former one in force. On a GPU it waits only if plans_in_flight plans
 * before it have not been copied yet, and is refused while the stream is being captured.
 *
 * Of arrays on the device it enqueues one launch, which reads them when its turn comes: no wait, no
 * copy to the host, so that it can be captured into a graph with the runs, and replayed after
 * lengths and tables have changed in place. What a graph fixes are addresses and shapes; requests
 * that come and go are slots of the batch with no rows (qo_indptr repeats) or no keys. The arrays
 * must stay as they are until the runs of the plan have executed; kernels read page tables in place.
 * The launch checks all but the page numbers against the limits. Outside of them the plan is empty:
 * runs write nothing, and qkv_attention_status says why. No BSR, no detect_shared_prefix.
 *
 * Errors: INVALID, naming the array, the request and the entry; UNSUPPORTED (BSR on the device).
 */
QKV_API qkv_status qkv_attention_plan(qkv_attention *attention, const qkv_attention_batch *batch,
                                      void *stream);

/*
 * qkv_attention_status - whether the last plan of arrays on the device was within the limits. Waits for
 * the stream. OK too after a plan of host arrays, which says so itself. Errors: INVALID, naming the
 * array or limit and the request; DEVICE (a kernel failed).
 */
QKV_API qkv_status qkv_attention_status(qkv_attention *attention, void *stream);

/*
 * qkv_attention_run - compute one layer under the current plan.
 *
 * No allocation; nothing is awaited but the threads that compute. The same plan and tensors give the same
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
