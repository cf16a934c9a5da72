/* verify.h - a walk of qkv_verify, step by step, in the arithmetic of weights.h: text of the CPU and of GPUs.
 *
 * At a node there is w, at first the target's row as it came. With S the sum of its masses, in the unit of its
 * largest value, r = w * share_of(S) is the row normalised; a child's draft row d is divided by its own sum in
 * the same way. The children are in order of number; those whose token is outside of the vocabulary are none.
 *   accepted        the walk goes on at the child.
 *   rejected        w becomes what is left of r, and has a sum of its own.
 *   one-hot         w loses the token, and S its mass, exactly: nothing is rounded, and no row is read.
 *   no mass left    rounding has taken it: no more tests, and w is the target's row again.
 * What ends the walk draws from w. Test i of a walk takes number offset + i of its seed, the draw offset + nodes.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_VERIFY_H
#define QI_VERIFY_H

#include "kern/philox.h"
#include "ops/sampling/verify_params.h"
#include "ops/sampling/weights.h"

/* Of a walk's random numbers. */
QI_INLINE u64 random_at(const verify_params *p, i64 request, i32 i)
{
    return qi_philox_u64(request_u64(&p->seed, request), request_u64(&p->offset, request) + (u64)i);
}

QI_INLINE i32 token_of_node(const verify_params *p, i64 request, i32 node)
{
    return p->draft_tokens[request * p->draft_tokens_stride + node];
}

/* Is the node a child of `node` that can be accepted? One whose parent is out of range is no node's, since a walk
 * asks in order of number: of nodes above the one that it is at. */
QI_INLINE int is_child(const verify_params *p, i64 request, i32 child, i32 node)
{
    const i32 token = token_of_node(p, request, child);
    const i32 parent = p->parents ? p->parents[request * p->parents_stride + child] : child - 1;
    return parent == node && token >= 0 && token < p->vocab;
}

QI_INLINE float share_of(u64 sum, int unit)
{
    return sum ? prob_scale(sum, unit) : 0.f;
}

/* u * d < r, u of 53 bits in [0, 1). */
QI_INLINE int accepts(u64 random, float d, float r)
{
    return (double)(random >> 11) * 1.1102230246251565e-16 * (double)d < (double)r;
}

/* Of a token of weight w, normalised by `share`, that the draft gives d, normalised by draft_share. */
QI_INLINE float left_of(float w, float share, float d, float draft_share)
{
    return clean_prob(rn_sub(rn_mul(w, share), rn_mul(d, draft_share)));
}

#endif
