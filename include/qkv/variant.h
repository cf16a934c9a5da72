/* variant.h - attention variants: a few lines of C, compiled into every attention kernel.
 *
 * A variant is source text that defines some of these functions, each announced by a #define:
 *
 *   #define VARIANT_QUERY 1     qi_pair variant_query(const variant_params *v, qi_pos pos, int dim, qi_pair x)
 *   #define VARIANT_KEY 1       qi_pair variant_key  (const variant_params *v, qi_pos pos, int dim, qi_pair x)
 *       change a pair of elements of q or k, after the built-in RoPE. The pairs are (2i, 2i + 1), or
 *       (i, i + head_dim/2) under #define VARIANT_PAIR_HALF 1; dim is the index of x.x, the first.
 *       A key is shared by rows and requests: of pos only kv_pos and kv_head are set for it, and
 *       kv_pos is 0 for a query.
 *   #define VARIANT_LOGIT 1     float variant_logit(const variant_params *v, qi_pos pos, float logit)
 *       change a score, in natural units: scaled, capped, with its ALiBi bias
 *   #define VARIANT_MASK 1      int variant_mask(const variant_params *v, qi_pos pos)
 *       0 drops the score; ANDed with the built-in masks
 *   #define VARIANT_STATE 1     float variant_state(const variant_params *v, qi_pos pos)
 *       one more logit in the row's denominator and lse (a sink); kv_pos is 0
 *   #define VARIANT_OUTPUT 1    float variant_output(const variant_params *v, qi_pos pos, int dim, float o)
 *       change one element of the output, after v_scale and before o_scale; kv_pos is 0
 *   #define VARIANT_NO_SOFTMAX 1
 *       o = sum_j logit(i,j) v_j over visible j, with nothing normalised. lse is not offered and
 *       VARIANT_STATE not called
 *
 * Written as QI_FN float variant_logit(...). The text is the common subset of C11 and C++17 (no
 * designated initialisers, compound literals, restrict or _Bool), has no loops over keys and no
 * stores, and uses no headers. It sees
 *
 *   qi_pos { int request, qo_head, kv_head, qo_pos, kv_pos, qo_idx, qo_len, kv_len; }
 *       positions and lengths in tokens of the request; qo_idx counts its rows from 0
 *   qi_pair { float x, y; }
 *   qi_exp qi_exp2 qi_log qi_log2 qi_tanh qi_sigmoid qi_sin qi_cos qi_sqrt qi_abs qi_min qi_max
 *       of floats, without branches, so that a loop over keys vectorises; exact to a few ulp
 *       (qi_sin and qi_cos for |x| < 10^5)
 *   variant_params: a struct written from the table of parameters. f32 and i32 parameters are fields
 *       float and int; a tensor is { const T *data; long long stride[ndim]; }, strides in elements.
 *
 * docs/variants.md has examples; examples/variants/ more of them.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_VARIANT_H
#define QKV_VARIANT_H

#include "qkv/base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum qkv_param_type {
    QKV_PARAM_F32 = 0,
    QKV_PARAM_I32 = 1,
    QKV_PARAM_TENSOR = 2
} qkv_param_type;

typedef struct qkv_param {
    const char *name; /* an identifier of C and C++ */
    int32_t type;     /* QKV_PARAM_... */
    int32_t ndim;     /* of a tensor, 1 .. 4; else 0 */
    DLDataType dtype; /* of a tensor: f32, i32, i64, u8 or i8; else zero */
} qkv_param;

/* Everything is copied by the call that reads it. */
typedef struct qkv_variant {
    uint32_t struct_size;
    int32_t num_params;      /* 0 .. 32 */
    const char *name;        /* for messages: an identifier of at most 63 characters */
    const char *source;      /* the text */
    const qkv_param *params; /* [num_params] */
} qkv_variant;
#define QKV_VARIANT_INIT .struct_size = sizeof(qkv_variant)

/* The value of one parameter: the member that its type says; tensors of any strides. */
typedef struct qkv_arg {
    float f32;
    int32_t i32;
    const DLTensor *tensor;
} qkv_arg;

#ifdef __cplusplus
}
#endif
#endif
