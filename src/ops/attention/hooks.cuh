/* hooks.cuh - a variant's hooks, as GPU kernels call them; what an absent hook would do is nothing. In a
 * JIT build with a variant QI_VARIANT is defined, and the file "qi_variant.h" has variant_params and the
 * user's text.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_HOOKS_CUH
#define QI_ATTENTION_HOOKS_CUH

#include "kern/cuda/prelude.cuh"
#include "kern/variant.h"
#include "ops/attention/attention_params.h"

#ifdef QI_VARIANT
#include "qi_variant.h"
#define VARIANT_ARGS(c)      ((const variant_params *)(c)->args)
#define END_OF_PARAMETERS(c) ((const char *)(c)->args + sizeof(variant_params))
#else
#define END_OF_PARAMETERS(c) ((const char *)(c)->args)
#endif

#ifdef VARIANT_NO_SOFTMAX
enum { SOFTMAX = 0 };
#else
enum { SOFTMAX = 1 };
#endif

#ifdef VARIANT_PAIR_HALF
#define PAIR_FIRST(i, dim)  (i)
#define PAIR_SECOND(i, dim) ((i) + (dim) / 2)
#else
#define PAIR_FIRST(i, dim)  (2 * (i))
#define PAIR_SECOND(i, dim) (2 * (i) + 1)
#endif

#ifdef VARIANT_QUERY
enum { CHANGES_QUERIES = 1 };
#else
enum { CHANGES_QUERIES = 0 };
#endif

#ifdef VARIANT_KEY
enum { CHANGES_KEYS = 1 };
#else
enum { CHANGES_KEYS = 0 };
#endif

/* A pair of q, of which the first is dim a. */
QI_INLINE qi_pair hook_query(const attention_cuda_params *c, qi_pos pos, int a, qi_pair pair)
{
#ifdef VARIANT_QUERY
    return variant_query(VARIANT_ARGS(c), pos, a, pair);
#else
    return pair;
#endif
}

/* Pair i of a row of q or k. */
QI_INLINE void hook_pair(const attention_cuda_params *c, qi_pos pos, float *row, int i, int dim,
                         const int is_key)
{
    const int a = PAIR_FIRST(i, dim), b = PAIR_SECOND(i, dim);
    qi_pair pair = {row[a], row[b]};
    if (!is_key) pair = hook_query(c, pos, a, pair);
#ifdef VARIANT_KEY
    if (is_key) pair = variant_key(VARIANT_ARGS(c), pos, a, pair);
#endif
    row[a] = pair.x;
    row[b] = pair.y;
}

QI_INLINE float hook_logit(const attention_cuda_params *c, qi_pos pos, float logit)
{
#ifdef VARIANT_LOGIT
    return variant_logit(VARIANT_ARGS(c), pos, logit);
#else
    return logit;
#endif
}

QI_INLINE int hook_mask(const attention_cuda_params *c, qi_pos pos)
{
#ifdef VARIANT_MASK
    return variant_mask(VARIANT_ARGS(c), pos) != 0;
#else
    return 1;
#endif
}

#ifdef VARIANT_STATE
enum { HAS_STATE = 1 };
#else
enum { HAS_STATE = 0 };
#endif

/* -infinity: no extra logit. */
QI_INLINE float hook_state(const attention_cuda_params *c, qi_pos pos)
{
#ifdef VARIANT_STATE
    return variant_state(VARIANT_ARGS(c), pos);
#else
    return -QI_INFINITY;
#endif
}

QI_INLINE float hook_output(const attention_cuda_params *c, qi_pos pos, int d, float o)
{
#ifdef VARIANT_OUTPUT
    return variant_output(VARIANT_ARGS(c), pos, d, o);
#else
    return o;
#endif
}

#endif
