/* philox.h - Philox4x32-10, the counter-based random generator of Salmon et al. 2011 ("Parallel
 * random numbers: as easy as 1, 2, 3"), table 2: a bijection of 128-bit counters under a 64-bit
 * key. A draw is a function of (key, counter) alone, so it has no state to share, save or advance.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_PHILOX_H
#define QI_KERN_PHILOX_H

#include "kern/abi.h"

typedef struct qi_philox4 {
    u32 v[4];
} qi_philox4;

static inline qi_philox4 qi_philox(qi_philox4 counter, u32 key0, u32 key1)
{
    for (int round = 0; round < 10; round++) {
        const u64 a = (u64)0xd2511f53u * counter.v[0], b = (u64)0xcd9e8d57u * counter.v[2];
        const qi_philox4 next = {{(u32)(b >> 32) ^ counter.v[1] ^ key0, (u32)b,
                                  (u32)(a >> 32) ^ counter.v[3] ^ key1, (u32)a}};
        counter = next;
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
    return counter;
}

/* 64 random bits: draw number offset of the stream of a seed. */
static inline u64 qi_philox_u64(u64 seed, u64 offset)
{
    const qi_philox4 counter = {{(u32)offset, (u32)(offset >> 32), 0, 0}};
    const qi_philox4 r = qi_philox(counter, (u32)seed, (u32)(seed >> 32));
    return (u64)r.v[1] << 32 | r.v[0];
}

#endif
