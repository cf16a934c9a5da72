/* sampling.h - from logits to tokens, without sorting the vocabulary.
 *
 * A row is one distribution over the vocabulary: logits, or probabilities up to a common factor. Every
 * operator here is a list of stages over rows, and every stage is exact:
 *
 *   - tokens are ordered by value, largest first, equal values by index, lowest first; top-k, top-p and
 *     the other filters keep a set that this order defines, ties included;
 *   - masses are integers: exp(l - max) or a probability counts in units of 2^-42 of the largest one's power of
 *     two, rounded down. Their sums do not depend on an order of adding, so a row gives the same bits on
 *     every run, in every batch, and on the CPU and a GPU alike;
 *   - the random number of a row is Philox4x32-10 keyed by its seed at counter offset, and nothing else: a
 *     request draws the same tokens whatever it is batched with.
 *
 * NaN and negative probabilities count as 0, NaN logits as -inf; +inf is the largest finite number.
 * Probabilities below 2^-126 count as 0. A row without mass gives token 0, or zeros; `valid` says so.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_SAMPLING_H
#define QKV_SAMPLING_H

#include "qkv/context.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The longest row. */
#define QKV_MAX_VOCAB 524288

/* The largest tree of draft tokens. */
#define QKV_MAX_NODES 1024

/*
 * qkv_argmax - the index of each row's largest logit; the lowest index among equals.
 *
 *   tokens  i32 [batch]
 *   logits  [batch, vocab]  f32|f16|bf16. NaN counts as -inf; a row of nothing else gives 0
 *
 * Errors: INVALID (vocab 0, shapes, dtypes).
 */
QKV_API qkv_status qkv_argmax(qkv_context *ctx, DLTensor *tokens, const DLTensor *logits,
                              void *stream);

typedef enum qkv_row_kind { QKV_LOGITS = 0, QKV_PROBS = 1 } qkv_row_kind;

typedef enum qkv_filter_order {
    QKV_TOP_K_FIRST = 0, /* top_p counts the mass of what top_k leaves as 1 */
    QKV_TOP_K_JOINT = 1  /* top_p counts the mass before top_k: both see the same distribution */
} qkv_filter_order;

/*
 * What happens to a row, in this order; each stage is there if its tensor is given. With l for logits,
 * p for probabilities:
 *
 *   repetition   l > 0 ? l / r : l * r for tokens that `prompt` has or whose count is above 0
 *   frequency    l -= f * count
 *   presence     l -= r for tokens whose count is above 0
 *   bias         l += bias
 *   bitmask      l = -inf for tokens whose bit is 0
 *   temperature  l *= 1 / T; T = 0 keeps the largest l alone
 *   top_n_sigma  keep l >= max - n * sigma; sigma is the standard deviation of the row's finite logits
 *   top_k        keep the k largest; 0 or >= vocab keeps all
 *   softmax      p = exp(l - max) / sum
 *   top_p        keep the shortest prefix of the order whose mass is at least top_p of all that is left
 *   min_p        keep p >= min_p * max p
 *   typical_p    of the order by |log p + H|, H the entropy of what is left, keep the shortest prefix whose
 *                mass is at least typical_p of that (equals: the larger p, then the lower index)
 *
 * Rows of probabilities begin after softmax (top_k of them is allowed: it stands before top_p, or after it
 * where the order is QKV_TOP_K_JOINT; so it is for logits).
 *
 * Values are f32 (top_k i32, seed and offset u64), [batch] on the rows' device, or one number for all rows:
 * [1] there or on the host, which is read by the call. They are checked where they are on the host.
 */
typedef struct qkv_sampling_params {
    uint32_t struct_size;
    int32_t kind;                /* qkv_row_kind of the rows */
    const DLTensor *temperature; /* >= 0 */
    const DLTensor *top_k;       /* >= 0 */
    const DLTensor *top_p;       /* (0, 1] */
    const DLTensor *min_p;       /* [0, 1] */
    const DLTensor *seed;        /* for what draws; required there */
    const DLTensor *offset;      /* draw number of the seed's stream; default 0 */
    int32_t order;               /* qkv_filter_order */
    uint32_t reserved;
    const DLTensor *typical_p;   /* (0, 1] */
    const DLTensor *top_n_sigma; /* > 0 */
    const DLTensor *repetition;  /* > 0; with counts, prompt or both */
    const DLTensor *frequency;   /* any finite; with counts */
    const DLTensor *presence;    /* any finite; with counts */
    const DLTensor *counts;      /* i32 [batch, vocab] how often the output has each token so far */
    const DLTensor
        *prompt; /* i32 [batch, ceil(vocab / 32)] bit t % 32 of word t / 32: is it there? */
    const DLTensor *bias;    /* f32|f16|bf16 [batch or 1, vocab] */
    const DLTensor *bitmask; /* i32 [batch or 1, ceil(vocab / 32)], bits as in prompt */
    const DLTensor
        *indices;    /* i32 [batch] request i has row indices[i], instead of row i; outside of
                                    the rows it has no mass */
    DLTensor *valid; /* u8 [batch], written: 1 if the row given has no NaN, no +inf, no negative
                                    probability, and mass is left to draw from; else 0 */
} qkv_sampling_params;
#define QKV_SAMPLING_PARAMS_INIT .struct_size = sizeof(qkv_sampling_params)

/*
 * qkv_sample - draw one token per request from what the stages leave of its row.
 *
 *   tokens  i32 [batch]
 *   rows    [batch, vocab]  f32|f16|bf16; [any, vocab] with indices
 *
 * The token is the first in order of index at which the running sum of masses exceeds u * their sum, u
 * the row's random number in [0, 1). Requests of one seed and offset have one number: give each a seed of
 * its own. No allocation, no waiting; values on the device are read when the kernel runs, so a captured
 * graph draws anew once seeds or offsets were changed there.
 *
 * Errors: INVALID (shapes, dtypes, a stage that the kind of rows has not, a value out of range: names the
 * request). Source: Salmon et al. 2011 (Philox); Holtzman et al. 2020 (top-p), arXiv:1904.09751; Meister et
 * al. 2023 (typical), arXiv:2202.00666; Tang et al. 2024 (top-n-sigma), arXiv:2411.07641.
 */
QKV_API qkv_status qkv_sample(qkv_context *ctx, DLTensor *tokens, const DLTensor *rows,
                              const qkv_sampling_params *params, void *stream);

/*
 * qkv_renormalize - the distribution that qkv_sample would draw from: softmax, top_k_renorm, top_p_renorm,
 * min_p_renorm, by the stages that are given.
 *
 *   probs  [batch, vocab]  f32|f16|bf16; may be rows itself, without indices
 *   rows   as of qkv_sample
 *
 * p = mass / sum of masses kept, as f32, rounded to probs' type; 0 for tokens not kept. Errors as of
 * qkv_sample; seed and offset must be NULL.
 */
QKV_API qkv_status qkv_renormalize(qkv_context *ctx, DLTensor *probs, const DLTensor *rows,
                                   const qkv_sampling_params *params, void *stream);

/*
 * qkv_mask_logits - rows after the stages up to top_k, tokens not kept as -inf: top_k_mask_logits,
 * penalties, bias, bitmask, temperature alone or together.
 *
 *   out   [batch, vocab]  f32|f16|bf16; may be rows itself, without indices
 *   rows  logits, as of qkv_sample
 *
 * Errors as of qkv_sample; stages after top_k, seed and offset must be NULL.
 */
QKV_API qkv_status qkv_mask_logits(qkv_context *ctx, DLTensor *out, const DLTensor *rows,
                                   const qkv_sampling_params *params, void *stream);

/*
 * qkv_top_k - each row's k largest values and where they are.
 *
 *   values   [batch, k] rows' dtype, elements as they are, NaN as -inf; or NULL
 *   indices  i32 [batch, k]
 *   rows     [batch, vocab]  f32|f16|bf16; NaN counts as -inf; 1 <= k <= vocab
 *   sorted   1: in the order of this header; 0: by index
 *
 * Which tokens are kept does not depend on `sorted`. Errors: INVALID (shapes, dtypes).
 */
QKV_API qkv_status qkv_top_k(qkv_context *ctx, DLTensor *values, DLTensor *indices,
                             const DLTensor *rows, int32_t sorted, void *stream);

/*
 * qkv_log_probs - log softmax(logits)[tokens], natural log, and the rank of each token in its row.
 *
 *   log_probs  f32 [batch, n]; -inf for a token without mass or outside of the vocabulary
 *   ranks      i32 [batch, n] number of tokens before it in the order of this header (vocab for a token outside
 *              of it), or NULL
 *   logits     [batch, vocab]  f32|f16|bf16
 *   tokens     i32 [batch, n]; qkv_top_k's indices give the log-probabilities of the top n
 *
 * Errors: INVALID (shapes, dtypes).
 */
QKV_API qkv_status qkv_log_probs(qkv_context *ctx, DLTensor *log_probs, DLTensor *ranks,
                                 const DLTensor *logits, const DLTensor *tokens, void *stream);

/*
 * qkv_verify - speculative sampling: walks a request's tree of draft tokens as far as the target model
 * accepts them, and draws one more token. The tokens emitted are distributed as the target's own.
 *
 *   accepted      i32 [batch, nodes + 1] nodes accepted from the root's child on, then -1
 *   num_accepted  i32 [batch]
 *   tokens        i32 [batch, nodes + 1] the accepted nodes' tokens, the token drawn last, then -1
 *   target        [batch, nodes + 1, vocab] f32|f16|bf16 probabilities: row 0 after the context, row i + 1
 *                 after node i
 *   draft_tokens  i32 [batch, nodes]; one outside of the vocabulary is never accepted,
 *                 nor tested
 *   draft         [batch, nodes, vocab] target's dtype: what node i's token was drawn from, given its
 *                 parent; NULL where draft tokens were chosen without chance (one-hot)
 *   parents       i32 [batch or 1, nodes] node i's parent, below i, -1 the root; NULL = i - 1, a chain.
 *                 One out of range makes the node a leaf that nothing reaches.
 *                 nodes: 0 to QKV_MAX_NODES
 *   seed, offset  u64 [batch] or [1], as of qkv_sample; offset NULL = 0. A walk uses draws offset ..
 *                 offset + nodes
 *
 * At a node the children are tried in order of number: child c with token x is accepted if u * d(x) < r(x), r
 * the target's row there and d the child's draft row; else r becomes max(r - d, 0), renormalised, for the next
 * child, and in the end for the draw. Rows need not sum to 1: each is divided by its own sum.
 *
 * Errors: INVALID (shapes, dtypes). Source: Leviathan et al. 2023, arXiv:2211.17192; Miao et al. 2024
 * (SpecInfer), arXiv:2305.09781.
 */
typedef struct qkv_verify_io {
    uint32_t struct_size, reserved;
    DLTensor *accepted, *num_accepted, *tokens;
    const DLTensor *target, *draft_tokens, *draft, *parents, *seed, *offset;
} qkv_verify_io;
#define QKV_VERIFY_IO_INIT .struct_size = sizeof(qkv_verify_io)
QKV_API qkv_status qkv_verify(qkv_context *ctx, const qkv_verify_io *io, void *stream);

/* ---- stages in an order of one's own -------------------------------------------------------------- */

typedef enum qkv_stage_kind {
    QKV_STAGE_REPETITION = 0, /* on logits: value "repetition", tensors "counts", "prompt" */
    QKV_STAGE_FREQUENCY = 1,  /* on logits: "frequency", "counts" */
    QKV_STAGE_PRESENCE = 2,   /* on logits: "presence", "counts" */
    QKV_STAGE_BIAS = 3,       /* on logits: tensor "bias" */
    QKV_STAGE_BITMASK = 4,    /* on logits: tensor "bitmask" */
    QKV_STAGE_USER = 5, /* on logits: a value and a tensor by the names that the stage gives */
    QKV_STAGE_TEMPERATURE = 6, /* on logits: "temperature" */
    QKV_STAGE_TOP_N_SIGMA = 7, /* on logits: "top_n_sigma" */
    QKV_STAGE_SOFTMAX = 8,     /* logits to probabilities */
    QKV_STAGE_TOP_K = 9,       /* on either: "top_k" */
    QKV_STAGE_TOP_P = 10,      /* on probabilities: "top_p" */
    QKV_STAGE_MIN_P = 11,      /* on probabilities: "min_p" */
    QKV_STAGE_TYPICAL_P = 12,  /* on probabilities: "typical_p" */
    QKV_STAGE_SAMPLE = 13      /* either to tokens, last: "seed", "offset" */
} qkv_stage_kind;

/* Everything is copied by the call that reads it. */
typedef struct qkv_stage {
    uint32_t struct_size;
    int32_t kind;        /* qkv_stage_kind */
    float default_value; /* of the stage's value, where has_default is 1 and run gives none */
    int32_t has_default;
    /*
     * Of a user stage: C text, the common subset of C11 and C++17 without headers, that defines
     *   QI_FN float logits_stage(float logit, float value, float element, int token, int request)
     * with the functions of qkv/variant.h; -inf, which is qi_log(0.f), takes a token out. value_name and
     * tensor_name, identifiers or NULL, say by what names run is given value (a number, or f32 [batch]) and
     * element (f32|f16|bf16 [batch or 1, vocab]); 0 without.
     */
    const char *source, *value_name, *tensor_name;
} qkv_stage;
#define QKV_STAGE_INIT .struct_size = sizeof(qkv_stage)

typedef struct qkv_logits_pipe qkv_logits_pipe;

typedef struct qkv_logits_pipe_spec {
    uint32_t struct_size;
    int32_t num_stages;      /* 1 .. 16 */
    const qkv_stage *stages; /* [num_stages] */
    int32_t kind;            /* qkv_row_kind of the rows */
    int32_t unfused;   /* 1: a kernel for each stage; the same tokens, for tests and measuring */
    int64_t max_batch; /* rows of the largest run; only an unfused pipe has memory for them */
    int64_t max_vocab;
} qkv_logits_pipe_spec;
#define QKV_LOGITS_PIPE_SPEC_INIT .struct_size = sizeof(qkv_logits_pipe_spec)

/* A parameter of a run, by the name that its stage has for it. */
typedef struct qkv_named_tensor {
    const char *name;
    const DLTensor *tensor; /* as in qkv_sampling_params */
} qkv_named_tensor;

/*
 * qkv_logits_pipe_create - checks the order of stages and compiles what user stages need. A pipe runs as one
 * kernel whatever its stages are. A stage of a kind may stand in it more than once; both then have one value.
 *
 * Errors: INVALID (an order that does not fit: names the stage, what it takes and what it got; a text or
 * name missing), COMPILE (a user stage: with the compiler's words), OUT_OF_MEMORY.
 */
QKV_API qkv_status qkv_logits_pipe_create(qkv_context *ctx, const qkv_logits_pipe_spec *spec,
                                          qkv_logits_pipe **pipe);

/*
 * qkv_logits_pipe_run - rows through the pipe.
 *
 *   out     i32 [batch] where the last stage samples; else f32|f16|bf16 [batch, vocab]: probabilities,
 *           renormalised, or logits. It may be rows itself
 *   rows    [batch, vocab]  f32|f16|bf16
 *   params  [num_params] by name; also "indices" and "valid" (u8 [batch], written)
 *
 * Errors: INVALID (shapes, dtypes, values; a name that no stage has, one given twice, one missing that has no
 * default). No allocation, no waiting; graphs as of qkv_sample. Any number of threads may run one pipe
 * that is fused.
 */
QKV_API qkv_status qkv_logits_pipe_run(qkv_logits_pipe *pipe, DLTensor *out, const DLTensor *rows,
                                       const qkv_named_tensor *params, int32_t num_params,
                                       void *stream);

QKV_API void qkv_logits_pipe_destroy(qkv_logits_pipe *pipe);

#ifdef __cplusplus
}
#endif
#endif
