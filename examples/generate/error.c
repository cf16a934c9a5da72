/* error.c - SPDX-License-Identifier: Apache-2.0 */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

bool fail(char error[GGUF_ERROR], const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(error, GGUF_ERROR, format, args);
    va_end(args);
    return false;
}

bool works(char error[GGUF_ERROR], const char *call, qkv_status status)
{
    return status == QKV_OK ||
           fail(error, "%s: %s: %s", call, qkv_status_name(status), qkv_last_error());
}

void *allocate(size_t bytes)
{
    const size_t large = (size_t)2 << 20, grain = bytes < large ? 64 : large;
    if (bytes > SIZE_MAX - large) return NULL;
    const size_t whole = bytes ? (bytes + grain - 1) / grain * grain : grain;
    void *p = aligned_alloc(grain, whole);
    if (p && grain == large) madvise(p, whole, MADV_HUGEPAGE); /* fewer misses; failing is fine */
    return p;
}
