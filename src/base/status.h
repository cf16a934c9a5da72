/* status.h - failing with a message, and passing failures on.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_BASE_STATUS_H
#define QI_BASE_STATUS_H

#include "qkv/base.h"

/* Sets this thread's message and returns status. */
__attribute__((format(printf, 4, 5))) qkv_status qi_fail(qkv_status status, const char *file,
                                                         int line, const char *format, ...);

/* Names the status itself, so that a compiler which sees only the caller knows that it fails. */
#define QI_FAIL(status, ...) return qi_fail((status), __FILE__, __LINE__, __VA_ARGS__), (status)
#define QI_REQUIRE(cond, ...)                                                                      \
    do {                                                                                           \
        if (!(cond)) QI_FAIL(QKV_ERR_INVALID, __VA_ARGS__);                                        \
    } while (0)
#define QI_TRY(expr)                                                                               \
    do {                                                                                           \
        const qkv_status qi_try_ = (expr);                                                         \
        if (qi_try_ != QKV_OK) return qi_try_;                                                     \
    } while (0)
/* With a variable `status` in scope: on failure go to the label that undoes what is done so far. */
#define QI_TRY_OR(expr, label)                                                                     \
    do {                                                                                           \
        status = (expr);                                                                           \
        if (status != QKV_OK) goto label;                                                          \
    } while (0)

/*
 * Reads a versioned struct: copies min(from->struct_size, bytes) bytes of from to the zeroed *to.
 * INVALID if from is NULL, its struct_size is none that a compiler gives such a struct (not whole
 * units of its alignment: a pointer might be cut in two), or a tail unknown here is not zero.
 */
#define qi_read_struct(to, bytes, from, name)                                                      \
    qi_read_aligned_struct((to), (bytes), __alignof__(*(to)), (from), (name))
qkv_status qi_read_aligned_struct(void *to, size_t bytes, size_t alignment, const void *from,
                                  const char *name);

#endif
