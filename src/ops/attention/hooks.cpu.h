/* hooks.cpu.h - calling a variant's hooks over tiles. Each hook runs in a loop of its own over keys or
 * dims, so that it vectorises (tests/test_variants.c reads the compiler's report). Without a variant
 * nothing of this is called. Included by attention_tile.h only.
 *
 * In a JIT build QI_VARIANT is defined, and the file "qi_variant.h" has variant_params and the
 * user's text.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_HOOKS_H
#define QI_ATTENTION_HOOKS_H

#include "kern/variant.h"
#include "ops/attention/attention_params.h"

#ifdef QI_VARIANT
#include "qi_variant.h"
#endif

/* Loops over hooks are functions, for a compiler drops the promise of restrict when it inlines. */
#define HOOK_LOOP static __attribute__((noinline))

#if defined(VARIANT_LOGIT) || defined(VARIANT_MASK) || defined(VARIANT_NO_SOFTMAX)
#define GENERAL_SCORES(p) 1
#else
#define GENERAL_SCORES(p) ((p)->general)
#endif

#ifdef VARIANT_KEY
#define CHANGES_KEYS(p) 1
#else
#define CHANGES_KEYS(p) ((p)->rope.num_pairs > 0)
#endif

#ifdef VARIANT_QUERY
#define CHANGES_QUERIES(p) 1
#else
#define CHANGES_QUERIES(p) ((p)->rope.num_pairs > 0)
#endif

#ifdef VARIANT_NO_SOFTMAX
enum { SOFTMAX = 0 };
#else
enum { SOFTMAX = 1 };
#endif

#ifdef VARIANT_LOGIT
/* x[j] = logit(x[j]) for keys at kv_pos[0, n). */
HOOK_LOOP void hook_logits(const void *params, qi_pos pos, const i32 *restrict kv_pos,
                           float *restrict x, i32 n)
{
    const variant_params v = *(const variant_params *)params;
    for (i32 j = 0; j < n; j++) { /* vectorises: VARIANT_LOGIT */
        qi_pos at = pos;
        at.kv_pos = kv_pos[j];
        x[j] = variant_logit(&v, at, x[j]);
    }
}
#endif

#ifdef VARIANT_MASK
/* keep[j] = 0 where the hook drops the key. */
HOOK_LOOP void hook_mask(const void *params, qi_pos pos, const i32 *restrict kv_pos,
                         i32 *restrict keep, i32 n)
{
    const variant_params v = *(const variant_params *)params;
    for (i32 j = 0; j < n; j++) { /* vectorises: VARIANT_MASK */
        qi_pos at = pos;
        at.kv_pos = kv_pos[j];
        keep[j] = variant_mask(&v, at) != 0 ? keep[j] : 0;
    }
}
#endif

#if defined(VARIANT_QUERY) || defined(VARIANT_KEY)
/* The partner of pairs' first elements, and where those are. */
#ifdef VARIANT_PAIR_HALF
#define PAIR_FIRST(i, dim)  (i)
#define PAIR_SECOND(i, dim) ((i) + (dim) / 2)
#else
#define PAIR_FIRST(i, dim)  (2 * (i))
#define PAIR_SECOND(i, dim) (2 * (i) + 1)
#endif
#define DEFINE_PAIR_LOOP(name, hook)                                                               \
    HOOK_LOOP void name(const void *params, qi_pos pos, const float *restrict in,                  \
                        float *restrict out, i32 dim)                                              \
    {                                                                                              \
        const variant_params v = *(const variant_params *)params;                                  \
        for (i32 i = 0; i < dim / 2; i++) {                                                        \
            const i32 a = PAIR_FIRST(i, dim), b = PAIR_SECOND(i, dim);                             \
            const qi_pair pair = {in[a], in[b]};                                                   \
            const qi_pair changed = hook(&v, pos, a, pair);                                        \
            out[a] = changed.x;                                                                    \
            out[b] = changed.y;                                                                    \
        }                                                                                          \
    }
#endif
#ifdef VARIANT_QUERY
DEFINE_PAIR_LOOP(hook_query, variant_query) /* vectorises: VARIANT_QUERY */
#endif
#ifdef VARIANT_KEY
DEFINE_PAIR_LOOP(hook_key, variant_key) /* vectorises: VARIANT_KEY */
#endif

#ifdef VARIANT_OUTPUT
HOOK_LOOP void hook_output(const void *params, qi_pos pos, float *restrict o, i32 dim)
{
    const variant_params v = *(const variant_params *)params;
    for (i32 d = 0; d < dim; d++) /* vectorises: VARIANT_OUTPUT */
        o[d] = variant_output(&v, pos, d, o[d]);
}
#endif

#endif
