/* functions.h - the kernels that a context has loaded onto its GPU, by row and constants: a look-up takes
 * tens of ns and no lock, since entries are only ever added.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_CORE_FUNCTIONS_H
#define QI_CORE_FUNCTIONS_H

#include <pthread.h>
#include <stdatomic.h>

#include "device/cuda.h"

enum { QI_MAX_CONSTANTS = 12, QI_FUNCTION_BUCKETS = 256 };

/* What makes a kernel: a row of a table, and the values of its constants; unused ones 0. */
typedef struct qi_function_key {
    const void *row;
    i32 constants[QI_MAX_CONSTANTS];
} qi_function_key;

typedef struct qi_function {
    struct qi_function *next;
    qi_function_key key;
    cu_function function;
} qi_function;

typedef struct qi_functions {
    pthread_mutex_t lock; /* of those who add */
    _Atomic(qi_function *) buckets[QI_FUNCTION_BUCKETS];
} qi_functions;

void qi_functions_init(qi_functions *f);
void qi_functions_free(qi_functions *f);

/* NULL: not there. */
cu_function qi_functions_find(qi_functions *f, const qi_function_key *key);

/* Adds, unless another thread was faster. MEMORY */
qkv_status qi_functions_add(qi_functions *f, const qi_function_key *key, cu_function function);

#endif
