/* lanes.h - the few things that lanes do together: planners are written over {id, count}, so that the host
 * runs them as one lane and a block of a GPU as its threads, with the same bytes in the end. Text of the
 * subset that C11 and NVRTC share, as all that includes it.
 *
 * Who runs more than one lane defines QI_LANES and brings those functions itself (plan.cu, the tests). All but the
 * last three are collective: each lane calls them in the same order, and sees what every lane wrote before.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_LANES_H
#define QI_ATTENTION_LANES_H

#include "kern/plan.h"

#ifndef __CUDACC_RTC__
#include <string.h>
#endif

/* Before a loop of the planner's text: on a GPU it runs once, from cold instruction caches, where short code
 * is fast code. And before a function that a batch of single rows seldom or never calls. */
#ifdef __CUDACC_RTC__
#define QI_ROLLED   _Pragma("unroll 1")
#define QI_OUTLINED static __device__ __noinline__
#else
#define QI_ROLLED
#define QI_OUTLINED static

/* Writes 32 bytes, in wide stores. */
static inline void put_words(void *to, u64 a, u64 b, u64 c, u64 d)
{
    memcpy((char *)to, &a, 8);
    memcpy((char *)to + 8, &b, 8);
    memcpy((char *)to + 16, &c, 8);
    memcpy((char *)to + 24, &d, 8);
}

/* a / b, a >= 0, b > 0. */
static inline i64 quotient(i64 a, i64 b)
{
    return a / b;
}
#endif

typedef struct qi_lanes {
    i32 id, count;
} qi_lanes;

enum { NUM_SUMS = 6, NUM_MOST = 2 };

#ifndef QI_LANES
/* Each of NUM_SUMS values becomes the sum over lower lanes, totals that over all; and each of NUM_MOST numbers,
 * not negative, the largest in any lane. */
static inline void lanes_add(qi_lanes lanes, i64 *values, i64 *totals,
                             i64 *most) /* NOLINT(readability-non-const-parameter) */
{
    (void)lanes, (void)most;
    for (int i = 0; i < NUM_SUMS; i++) {
        totals[i] = values[i];
        values[i] = 0;
    }
}

/* Is it so in any lane? */
static inline int lanes_any(qi_lanes lanes, int value)
{
    (void)lanes;
    return value;
}

/* The sum of numbers that are not negative. */
static inline i64 lanes_sum(qi_lanes lanes, i64 value)
{
    (void)lanes;
    return value;
}

/* The smallest. */
static inline i64 lanes_min(qi_lanes lanes, i64 value)
{
    (void)lanes;
    return value;
}

static inline void lanes_sync(qi_lanes lanes)
{
    (void)lanes;
}

/* Lower or raise a number that other lanes lower or raise too. */
static inline void lanes_lower32(i32 *at, i32 value)
{
    if (value < *at) *at = value;
}

static inline void lanes_lower(i64 *at, i64 value)
{
    if (value < *at) *at = value;
}

static inline void lanes_raise(i64 *at, i64 value)
{
    if (value > *at) *at = value;
}
#endif

#endif
