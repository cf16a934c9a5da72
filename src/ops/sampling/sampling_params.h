/* sampling_params.h - what the operators of sampling.h hand to their kernels.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_PARAMS_H
#define QI_SAMPLING_PARAMS_H

#include "kern/abi.h"

typedef struct argmax_params {
    i32 *tokens;        /* [batch] */
    const void *logits; /* dtype [batch, vocab] */
    i64 logits_stride;  /* of a row */
    i64 batch, vocab;
    qi_dtype dtype;
} argmax_params;

/* What a row is between two stages. Weights are probabilities up to a factor, f32, of which 1 is the unit: what
 * softmax makes before the sum is known, and what kernels of an unfused pipe hand on. */
enum { ROW_LOGITS, ROW_PROBS, ROW_WEIGHTS, ROW_TOKENS };

enum { MAX_VOCAB = 1 << 19 }; /* QKV_MAX_VOCAB */

/* As qkv_stage_kind numbers them; stages.c asserts it. */
enum {
    STAGE_REPETITION,
    STAGE_FREQUENCY,
    STAGE_PRESENCE,
    STAGE_BIAS,
    STAGE_BITMASK,
    STAGE_USER,
    STAGE_TEMPERATURE,
    STAGE_TOP_N_SIGMA,
    STAGE_SOFTMAX,
    STAGE_TOP_K,
    STAGE_TOP_P,
    STAGE_MIN_P,
    STAGE_TYPICAL_P,
    STAGE_SAMPLE,
    MAX_STAGES = 16,
};

/* Can a stage go on with a list of the few tokens that a filter has left? (list.cuh) */
#define TAKES_LIST(kind)                                                                           \
    ((kind) >= STAGE_TEMPERATURE && (kind) != STAGE_TOP_N_SIGMA && (kind) != STAGE_TYPICAL_P)
enum { MOST_LISTED = 1024 }; /* tokens of a list, and so the largest k that rows are streamed to */
enum { MOST_SAMPLED = 16 };  /* of a thread, of a row that does not stay in shared memory */

/* A number for each request, or one for all, of the type that its reader says. */
typedef struct request_values {
    const void *values; /* [batch]; NULL: one */
    i64 step;           /* 1, or 0 where values has one element */
    union {
        float real;
        i32 whole;
        u64 bits;
    } one;
} request_values;

static inline float request_f32(const request_values *v, i64 request)
{
    return v->values ? ((const float *)v->values)[request * v->step] : v->one.real;
}

static inline i32 request_i32(const request_values *v, i64 request)
{
    return v->values ? ((const i32 *)v->values)[request * v->step] : v->one.whole;
}

static inline u64 request_u64(const request_values *v, i64 request)
{
    return v->values ? ((const u64 *)v->values)[request * v->step] : v->one.bits;
}

/* What a user stage of a pipe is given on the CPU: values of consecutive tokens of a request. */
typedef struct stage_block {
    float *logits;         /* [count], in place */
    const float *elements; /* [count]; NULL: 0 */
    i64 count;
    i32 first_token, request;
    float value;
} stage_block;

typedef struct sampling_stage {
    i32 kind;
    qi_dtype dtype; /* of bias, and of a user stage's tensor */
    request_values value;
    const void *tensor; /* counts; bias; bitmask; a user stage's; NULL: none */
    i64 tensor_stride;  /* from a request to the next, in elements; 0: one for all */
    const u32 *prompt;  /* of repetition; NULL: none */
    i64 prompt_stride;
    void (*apply)(const void *block, qi_task task); /* of a user stage, on the CPU */
} sampling_stage;

typedef struct sampling_params {
    const void *rows; /* dtype [num_rows, vocab] */
    void *out;        /* i32 [batch], or out_dtype [batch, vocab] */
    i64 rows_stride, out_stride;
    i64 batch, num_rows, vocab;
    const i32 *indices; /* [batch], NULL: request i has row i */
    u8 *valid;          /* [batch], NULL: not asked for */
    i32 valid_so_far;   /* 1: valid has what was found by the lists before this one */
    request_values seed, offset;
    qi_dtype dtype, out_dtype;
    i32 in, out_kind; /* ROW_...; tokens where the last stage samples */
    i32 num_stages;
    sampling_stage stages[MAX_STAGES];
} sampling_params;

#endif
