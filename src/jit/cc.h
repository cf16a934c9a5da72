/* cc.h - the system's C compiler: where it is, and running it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_JIT_CC_H
#define QI_JIT_CC_H

#include <stddef.h>

#include "base/status.h"
#include "jit/job.h"

enum { QI_PATH_MAX = 1024 };

typedef struct qi_cc {
    char path[QI_PATH_MAX]; /* empty: none was found */
    char
        identity[QI_PATH_MAX + 64]; /* real path, size and time: another compiler, another string */
} qi_cc;

/* wanted: a path or a name to look for in PATH; NULL = $QKV_CC, else the first of cc, gcc, clang. */
void qi_cc_find(const char *wanted, qi_cc *out);

/* Compiles into *image, malloc'ed. COMPILE: no compiler, or its first lines. */
qkv_status qi_cc_compile(const qi_cc *cc, const qi_jit_job *job, void **image, size_t *bytes);

/* The flags of a level, NULL if it has none here. */
const char *qi_cc_flags(const char *level);

#endif
