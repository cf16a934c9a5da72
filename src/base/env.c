/* env.c - the environment variables, read once under call_once.
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/env.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

static const char *const names[QI_NUM_ENV] = {
#define X(id, name) [QI_ENV_##id] = name,
    QI_ENV(X)
#undef X
};
static char values[QI_NUM_ENV][4096]; /* room for a path */
static int set[QI_NUM_ENV];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void read_all(void)
{
    for (int i = 0; i < QI_NUM_ENV; i++) {
        const char *value = getenv(names[i]);
        /* an empty one is as good as none, but for the folder: there it means no cache */
        set[i] = value && (*value || i == QI_ENV_CACHE_DIR);
        if (set[i]) snprintf(values[i], sizeof values[i], "%s", value);
    }
}

const char *qi_env(int id)
{
    pthread_once(&once, read_all);
    return set[id] ? values[id] : NULL;
}
