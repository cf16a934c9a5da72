/* log.h - verbose lines: stable comma-separated text, "qkv,<kind>,...".
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_BASE_LOG_H
#define QI_BASE_LOG_H

#include "qkv/context.h"

enum { QI_VERBOSE_ERROR = 1, QI_VERBOSE_DISPATCH = 2, QI_VERBOSE_PLAN = 4, QI_VERBOSE_RUN = 8 };

typedef struct qi_logger {
    qkv_log_fn log; /* NULL: standard error */
    void *user;
} qi_logger;

/* Is this kind wanted (QKV_VERBOSE)? Costs one load after the first call. */
int qi_verbose(const qi_logger *logger, int kind);

/* Monotonic time in nanoseconds, for the durations in lines. */
int64_t qi_now_ns(void);

/* Writes "qkv," and the line. logger NULL: standard error. */
__attribute__((format(printf, 2, 3))) void qi_log(const qi_logger *logger, const char *format, ...);

#endif
