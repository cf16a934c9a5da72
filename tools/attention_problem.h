/* attention_problem.h - what a problem string says about attention: the spec, lengths and limits.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_ATTENTION_PROBLEM_H
#define QKV_TOOLS_ATTENTION_PROBLEM_H

#include <stdbool.h>

#include "data.h"
#include "problem.h"
#include "qkv/attention.h"

typedef struct attention_problem {
    qkv_attention_spec spec;
    qkv_attention_limits limits;
    int64_t batch, num_tokens, num_pages, num_keys; /* all requests together */
    int64_t pool_pages;                             /* in the pool: shared ones once */
    int64_t pool_slots;       /* tokens that the pool holds: whole pages, or num_keys when ragged */
    int64_t shared, form;     /* keys that all requests begin with; FORM_... */
    int32_t *qo_len, *kv_len; /* [batch] */
} attention_problem;

bool attention_problem_is(const problem *p); /* decode, prefill or mixed */

/* The same lengths for the same problem. */
attention_problem attention_problem_create(const problem *p);
void attention_problem_destroy(attention_problem *a);

#endif
