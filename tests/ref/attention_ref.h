/* attention_ref.h - what include/qkv/attention.h says, in double, two passes, one key at a time.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_ATTENTION_REF_H
#define QKV_TESTS_ATTENTION_REF_H

#include "qkv/attention.h"

/* What one (token, query head) saw: its lse, and the sizes that rounding errors scale with. */
typedef struct attention_ref_row {
    double lse;       /* in the base that the spec's flags ask for; -inf without a visible key   */
    double max_logit; /* largest |logit| before the soft cap */
    double max_walk;  /* largest root of the sum of squares of a logit's partial sums: what the
                         roundings of adding it up amount to, in units of eps                      */
    double max_v;     /* largest |v_jd| over visible j                                           */
    int64_t num_keys; /* visible ones                                                            */
} attention_ref_row;

/*
 * attention_ref - one layer of a batch that plan and run accept.
 *
 *   o     [qo_indptr[last], num_qo_heads, head_dim_vo]
 *   rows  [qo_indptr[last], num_qo_heads]
 *
 * io->o and io->lse are not looked at. Aborts if memory runs out.
 */
void attention_ref(const qkv_attention_spec *spec, const qkv_attention_batch *batch,
                   const qkv_attention_io *io, double *o, attention_ref_row *rows);

#endif
