/* copy_pages_params.h - what qkv_kv_copy_pages hands to its kernel.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_COPY_PAGES_PARAMS_H
#define QI_COPY_PAGES_PARAMS_H

#include "kern/abi.h"

enum { COPY_CHUNK = 1 << 14 }; /* bytes that a block of a GPU copies */

/* One pool. A page is runs[0] x runs[1] x runs[2] runs of run_bytes; strides in bytes. */
typedef struct copy_pool {
    char *data;
    i64 page_stride;
    i64 runs[3], run_strides[3];
    i64 run_bytes;
} copy_pool;

typedef struct copy_pages_params {
    copy_pool pools[2];
    i64 num_pools, num_pages, num_copies;
    const i32 *src, *dst; /* [num_copies] */
} copy_pages_params;

#endif
