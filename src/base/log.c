/* log.c - verbose lines to the context's callback or standard error.
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/env.h"

static int parse_kinds(const char *list)
{
    static const struct {
        const char *word;
        int kinds;
    } words[] = {
        {"error", QI_VERBOSE_ERROR},
        {"dispatch", QI_VERBOSE_DISPATCH},
        {"plan", QI_VERBOSE_PLAN},
        {"run", QI_VERBOSE_RUN},
        {"all", 15},
    };
    int kinds = 0;
    for (const char *at = list; at && *at;) {
        const size_t n = strcspn(at, ",");
        for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
            if (strlen(words[i].word) == n && strncmp(at, words[i].word, n) == 0)
                kinds |= words[i].kinds;
        at += n + (at[n] == ',');
    }
    return kinds;
}

int qi_verbose(const qi_logger *logger, int kind)
{
    static atomic_int kinds = -1; /* every thread computes the same value */
    int k = atomic_load_explicit(&kinds, memory_order_relaxed);
    if (k < 0) {
        k = parse_kinds(qi_env(QI_ENV_VERBOSE));
        atomic_store_explicit(&kinds, k, memory_order_relaxed);
    }
    (void)logger;
    return k & kind;
}

int64_t qi_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void qi_log(const qi_logger *logger, const char *format, ...)
{
    char line[1280] = "qkv,";
    va_list args;
    va_start(args, format);
    vsnprintf(line + 4, sizeof line - 4, format, args);
    va_end(args);
    if (logger && logger->log)
        logger->log(logger->user, line);
    else
        fprintf(stderr, "%s\n", line);
}
