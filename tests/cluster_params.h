/* cluster_params.h - between test_cluster.c and its kernels, cluster.cu.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_CLUSTER_PARAMS_H
#define QKV_TESTS_CLUSTER_PARAMS_H

#include "kern/abi.h"

enum { THREADS = 96 };

/* What `exchange` does wrong. */
enum { NOTHING, FORGETS_BEFORE, FORGETS_AFTER };

/* What `fault`, of clusters of two, does wrong. */
enum {
    FAULT_NONE,
    FAULT_ARRIVES_TWICE,
    FAULT_WAITS_ALONE,
    FAULT_NOT_SHARED,
    FAULT_NO_SUCH_BLOCK,
    FAULT_NOT_ALL_ARRIVE,
    FAULT_READS_AFTER_END,
    FAULT_WRITES_AFTER_END,
    FAULT_USES_FIRST, /* and has no barrier before; or none after */
    FAULT_USES_LAST
};

typedef struct cluster_params {
    i32 *out;                       /* [blocks, rounds, THREADS] */
    i32 cluster_size, rounds, mode; /* of the enums above */
} cluster_params;

/* What a thread of a block of the grid sends to block `rank` of its cluster in a round. */
static inline i32 message(i32 block, i32 rank, i32 thread, i32 round)
{
    return (block * 31 + rank * 7 + thread * 3 + round * 11) % 1009;
}

/* What it keeps for others to read. */
static inline i32 notice(i32 block, i32 thread, i32 round)
{
    return (block * 17 + thread * 5 + round * 13) % 1013;
}

/* What it adds to a sum of each block of the cluster. */
static inline i32 share(i32 block, i32 thread, i32 round)
{
    return block + thread + round;
}

/* Whether it has a vote in its block. */
static inline i32 votes(i32 block, i32 thread)
{
    return (block + thread) % 3 == 0;
}

#endif
