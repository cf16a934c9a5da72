/* variants_ref.h - attention with a variant, in double: the hooks of qkv/variant.h as functions, and
 * those of examples/variants/ written from their formulas.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_VARIANTS_REF_H
#define QKV_TESTS_VARIANTS_REF_H

#include <stdbool.h>

#include "qkv/attention.h"

typedef struct ref_pos {
    int64_t request, qo_head, kv_head, qo_pos, kv_pos, qo_idx, qo_len, kv_len;
} ref_pos;

/* What the examples take: one of each parameter. Arrays are row by row. */
typedef struct ref_values {
    double bias, cap, theta;
    int64_t head_dim, max_distance, sink_tokens, window;
    double *slopes, *sink; /* [heads] */
    double *table;         /* [heads][2 * max_distance + 1] */
    double *document;      /* [requests][positions] */
    double *tree;          /* [requests][nodes][nodes] */
    int64_t positions, nodes;
} ref_values;

/* NULL: the variant has no such hook. query and key change a whole row of dim elements. */
typedef struct ref_variant {
    const char *name;
    void (*query)(const ref_values *v, const ref_pos *pos, double *x, int64_t dim);
    void (*key)(const ref_values *v, const ref_pos *pos, double *x, int64_t dim);
    double (*logit)(const ref_values *v, const ref_pos *pos, double x);
    bool (*mask)(const ref_values *v, const ref_pos *pos);
    double (*state)(const ref_values *v, const ref_pos *pos);
    double (*output)(const ref_values *v, const ref_pos *pos, int64_t dim, double o);
    bool no_softmax;
    bool angles; /* query and key turn by angles that grow with position */
    double gain; /* how much output enlarges an error of o; 0 = 1 */
} ref_variant;

/* By the name of its file; aborts if there is none. */
const ref_variant *ref_variant_of(const char *name);

typedef struct ref_problem {
    const qkv_attention_spec *spec; /* mask NONE or CAUSAL, soft cap, window, sm_scale > 0; the rest
                                       is in the numbers below */
    const ref_variant *variant;
    const ref_values *values;
    int32_t num_requests;
    const int32_t *qo_len, *kv_len, *qo_pos;
    const double *q;            /* [tokens][num_qo_heads][head_dim_qk], times its scale */
    const double *k, *v;        /* [keys][num_kv_heads][dim], times their scales */
    const int32_t *const *keys; /* keys[request][j]: where key j is in k and v */
} ref_problem;

/* What one (token, query head) saw: its lse, and the sizes that rounding errors scale with. */
typedef struct ref_row {
    double lse;           /* natural; -inf without a key or state */
    double max_logit;     /* largest |x|, before and after the hooks */
    double max_dot;       /* largest sum_d |q_d k_d| * sm_scale */
    double max_angle;     /* largest |q| |k| * sm_scale * (|qo_pos| + |kv_pos|) */
    double mean_v, rms_v; /* largest over d of sum_j |w_j v_jd|, of sqrt(sum_j (w_j v_jd)^2) */
    double norm_v;        /* largest over d of sqrt(sum_j v_jd^2) */
    int64_t num_keys;     /* visible ones */
} ref_row;

/* o [tokens][num_qo_heads][head_dim_vo], rows [tokens][num_qo_heads]. o is not divided by o_scale. */
void variants_ref(const ref_problem *problem, double *o, ref_row *rows);

#endif
