/* hopper_params.h - between test_hopper.c and its kernels, hopper.cu.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_HOPPER_PARAMS_H
#define QKV_TESTS_HOPPER_PARAMS_H

#include "kern/tensor_map.h"

/* What `product` does wrong. */
enum { NOTHING, FORGETS_FULL, FORGETS_EMPTY, FORGETS_WAIT, FORGETS_COMMIT, RELEASES_EARLY };

/* What `fault` does wrong. */
enum {
    FAULT_NONE,
    FAULT_WAIT_FOR_EVER,
    FAULT_SPIN_FOR_EVER,
    FAULT_TOO_MANY_ARRIVALS,
    FAULT_NO_BARRIER,
    FAULT_BARRIER_OVERWRITTEN,
    FAULT_PARITY,
    FAULT_TWO_PHASES,
    FAULT_MISALIGNED,
    FAULT_PAST_SHARED,
    FAULT_NO_MAP,
    FAULT_COPY_NOT_AWAITED,
    FAULT_STORE_NOT_AWAITED,
    FAULT_PRODUCTS_NOT_AWAITED,
    FAULT_OPERANDS_DIFFER,
    FAULT_OPERAND_OUTSIDE,
    FAULT_THREE_WARPS,
    FAULT_NAMED_BARRIER,
    FAULT_UNIFORM
};

typedef struct hopper_params {
    qi_tensor_map q, k,
        v; /* [tokens, heads, HEAD_DIM] of 2-byte floats, of `product8` e4m3; `copy` goes from k to q, `fault` has k */
    float *s;     /* [128, num_tiles * TILE]; [64, 128] */
    float *o;     /* [128, HEAD_DIM]; [64, 128] */
    char *out;    /* `copy`: [bytes], shared memory after it */
    int *arrived; /* consumers */
    i32 head, num_tiles;
    i32 mode;                 /* of the enums above */
    i32 at[4], bytes, offset; /* `copy`: of the box; where in shared memory it begins */
    i32 stores;               /* `copy`: is it stored, too? */
} hopper_params;

#endif
