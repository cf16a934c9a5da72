/* stages.h - the list of stages of a call: put together tensor by tensor, checked, launched. Every operator
 * of sampling.h over rows, and the pipe, is such a list.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_STAGES_H
#define QI_SAMPLING_STAGES_H

#include "core/launch.h"
#include "ops/sampling/sampling_params.h"
#include "qkv/sampling.h"

/* What a stage is called, takes and gives: for messages, and for whoever checks an order of them. */
typedef struct stage_info {
    const char *name;   /* and that of its value, where it has one */
    const char *tensor; /* "counts", "bias", "bitmask"; NULL: none */
    i32 has_value;
    i32 takes_logits, takes_probs;
} stage_info;
extern const stage_info qi_stage_info[];

/* The tensors of one stage; what it has not is NULL. */
typedef struct stage_tensors {
    const DLTensor *value, *tensor, *prompt;
    const char *value_name, *tensor_name; /* for messages */
} stage_tensors;

/* Begins a list over rows of a kind. in: ROW_LOGITS, ROW_PROBS, ROW_WEIGHTS. INVALID */
qkv_status qi_stages_begin(sampling_params *p, const DLTensor *rows, i32 in,
                           const DLTensor *indices, DLTensor *valid);

/* Adds a stage whose order fits. INVALID names the tensor, or the request whose value is out of range. */
qkv_status qi_stages_add(sampling_params *p, i32 kind, const stage_tensors *t);

/* A number for each request or one for all, of f32, i32 or u64; its range is the caller's to check. INVALID */
qkv_status qi_request_values(request_values *out, const DLTensor *t, const char *name,
                             DLDataType dtype, i64 batch);

/* Says where the result goes: tokens, or values of the kind. INVALID: it is no tensor for that, or
 * overlaps what is read without being the rows themselves. */
qkv_status qi_stages_out(sampling_params *p, const DLTensor *rows, DLTensor *out, const char *name,
                         i32 out_kind);

/* The texts of a list's user stages, compiled into its kernel on a GPU. NULL where it has none. */
typedef struct stage_texts {
    qi_functions *functions; /* its kernels */
    const char *header;
} stage_texts;

/* On a GPU: compiles the kernel that rows like these would be run by. COMPILE: with the compiler's words. */
qkv_status qi_stages_compile(const qkv_context *ctx, const sampling_params *p,
                             const stage_texts *texts);

/* Runs the list. */
qkv_status qi_stages_launch(const qkv_context *ctx, const sampling_params *p,
                            const stage_texts *texts, void *stream);

#endif
