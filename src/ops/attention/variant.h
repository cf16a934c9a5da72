/* variant.h - a variant's table of parameters: checked at create, filled at run.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_VARIANT_H
#define QI_ATTENTION_VARIANT_H

#include "core/launch.h"
#include "ops/attention/attention_params.h"
#include "qkv/attention.h"

enum { VARIANT_MAX_PARAMS = 32, VARIANT_MAX_NDIM = 4, VARIANT_MAX_NAME = 63 };

typedef struct variant_param {
    char name[VARIANT_MAX_NAME + 1];
    int32_t type, ndim;
    DLDataType dtype;
    size_t offset; /* in variant_params */
} variant_param;

/* Copied from a qkv_variant; num_params -1: no variant. */
typedef struct variant_table {
    char name[VARIANT_MAX_NAME + 1];
    int32_t num_params;
    int no_softmax, changes_queries, changes_keys;
    size_t bytes; /* of variant_params */
    variant_param params[VARIANT_MAX_PARAMS];
} variant_table;

/* Room for the largest variant_params: every parameter a tensor of 4 axes. */
typedef struct variant_args {
    int64_t words[VARIANT_MAX_PARAMS * (1 + VARIANT_MAX_NDIM)];
} variant_args;

/* Checks and copies; NULL is no variant. INVALID names the parameter. */
qkv_status qi_variant_read(const qkv_variant *variant, variant_table *out);

/* Compiles the attention kernel with the variant's text: entries[0] walks the plan, entries[1] merges
 * levels. COMPILE: see core/launch.h. */
qkv_status qi_variant_compile(const qkv_context *ctx, const qkv_attention_spec *spec,
                              const variant_table *table, qi_cpu_kernel entries[2]);

/* The same on a GPU, with or without a variant: out[i] is the kernel names[i] of the row's file, for i < count. */
qkv_status qi_variant_compile_cuda(const qkv_context *ctx, const qkv_attention_spec *spec,
                                   const variant_table *table, const qi_kernel *row,
                                   const char *defines, const char *const *names, i32 count,
                                   cu_function *out);

/* Fills variant_params from a layer's arguments. INVALID names the parameter. */
qkv_status qi_variant_pack(const variant_table *table, const qkv_attention_io *io,
                           variant_args *out);

#endif
