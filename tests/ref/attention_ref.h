/* attention_ref.h - what include/qkv/attention.h says, in double, two passes, one key at a time.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_ATTENTION_REF_H
#define QKV_TESTS_ATTENTION_REF_H

#include "qkv/attention.h"

/* What one (token, query head) saw: its lse, and the sizes that rounding errors scale with. */
typedef struct attention_ref_row {
    double lse;       /* in the base of the spec's flags; -inf without a visible key or a sink   */
    double max_logit; /* largest |logit| before the soft cap and ALiBi                           */
    double max_bias;  /* largest |bias| of ALiBi                                                 */
    double max_dot;   /* largest sum_d |q_d k_d| * sm_scale: what errors of adding up scale with;
                         a rotated element counts with the length of its pair                    */
    double sink;      /* |sink| times its share of the denominator                               */
    double mean_v;    /* with w = softmax: largest over d of sum_j w_j |v_jd|, in units of o     */
    double rms_v;     /* largest over d of sqrt(sum_j (w_j v_jd)^2), in units of o               */
    double max_v;     /* largest |v_jd| of visible keys, in units of o                           */
    int64_t num_keys; /* visible ones                                                            */
} attention_ref_row;

/*
 * attention_ref - one layer of a batch that plan and run accept, without a variant.
 *
 *   o     [qo_indptr[last], num_qo_heads, head_dim_vo] divided by o_scale, not rounded
 *   rows  [qo_indptr[last], num_qo_heads]
 *
 * io->o and io->lse are not looked at. Aborts if memory runs out.
 */
void attention_ref(const qkv_attention_spec *spec, const qkv_attention_batch *batch,
                   const qkv_attention_io *io, double *o, attention_ref_row *rows);

#endif
