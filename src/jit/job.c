/* job.c - see job.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "jit/job.h"

#include <stdio.h>
#include <string.h>

void qi_first_lines(const char *log, char *out, size_t bytes)
{
    enum { LINES = 6 };
    const char *at = strstr(log, "error");
    while (at && at > log && at[-1] != '\n') at--;
    if (!at) at = log;
    size_t used = 0;
    for (int line = 0; line < LINES && *at; line++) {
        const size_t n = strcspn(at, "\n");
        const int wrote =
            snprintf(out + used, bytes - used, "%s%.*s", line ? "\n" : "", (int)n, at);
        if (wrote < 0 || (size_t)wrote >= bytes - used) return;
        used += (size_t)wrote;
        at += n + (at[n] == '\n');
    }
}
